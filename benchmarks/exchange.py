"""What ranks send each other per step and how long a step takes, beside an all-gather of all rows.

    python benchmarks/exchange.py --out benchmarks/results/exchange.json

The rows of a step are the same number on 1, 2 and 4 ranks. `replicas` and `owners` are this
project's two modes. `all-gather` is the scheme of Sparsify's --distribute_modules: the inputs and
outputs of every hookpoint go to all ranks, one hookpoint after another, and its owner trains before
the next one is sent. A step is everything but the LM. `--paper` prints what the same counting says
of Llama-3-70B, from bandwidths that are stated and with nothing measured.

    python benchmarks/exchange.py --modes owners shared --out benchmarks/results/sharing.json

`shared`: all ranks hold each coder together. What they send is computed on paper too, for a decoder
that is cut by columns, as here, and by latents, and for 16 million latents on 64 GPUs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.step import machine
from sae import SaeConfig
from sae.coders.bank import CoderBank, costs
from sae.coders.moments import Moments, accumulate
from sae.config import TrainingConfig, Widths
from sae.lm.capture import Pairs
from sae.placement.exchange import Exchange
from sae.placement.ranks import Ranks
from sae.training.losses import divide_gradients_
from sae.training.optim import CoderOptimizer
from sae.training.schedules import Schedule

SIGNUM = Schedule(TrainingConfig(optimizer="signum", encoder_lr=1.0), 1000, 1)
SHAPE = {"hookpoints": 8, "D": 256, "L": 4096, "k": 32, "rows": 4096}
MODES = ("replicas", "owners", "all-gather")
SHARED = "shared"


def train_step(mode: str, exchange: Exchange, bank: CoderBank, rules: Any, pairs: Pairs) -> None:
    """One optimizer step of all coders on the rows that this rank captured."""
    moments: dict[str, Moments] = {}

    def learn(hookpoint: str, x: torch.Tensor, y: torch.Tensor) -> None:
        accumulate(moments, hookpoint, y)
        for _, coder in bank.at(hookpoint):
            coder.errors(x, y).squared_error.backward()

    if mode == "all-gather":
        world = exchange.ranks.world
        for hookpoint, pair in pairs.items():
            whole = []
            for rows in pair:
                buffers = [torch.empty_like(rows) for _ in range(world)]
                if world > 1:
                    dist.all_gather(buffers, rows)
                    exchange.ranks.count_bytes(rows.nbytes, (world - 1) * rows.nbytes)
                whole.append(torch.cat(buffers) if world > 1 else rows)
            if exchange.owns(hookpoint):
                learn(hookpoint, *whole)
    else:
        outputs = {hookpoint: (y, y) for hookpoint, (_, y) in pairs.items()}
        for hookpoint, (x, y) in exchange.to_owners([outputs])[0].items():
            learn(hookpoint, x, y)
        sums = [t for seen in moments.values() for t in seen]
        exchange.sum_replicas_(*sums, *bank.gradients())
    for name, coder in bank.items():
        divide_gradients_(coder, moments[bank.hookpoint[name]].total_variance)
        rules[name].step(0)


def worker(modes: list[str], repeats: int) -> dict[str, dict[str, float]]:
    """Every mode, in turns, on the ranks of this launch."""
    torch.set_num_threads(1)
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("gloo")
    ranks = Ranks(torch.device("cpu"), 10.0)
    width = Widths(SHAPE["D"], SHAPE["D"])
    widths = {f"layers.{i}": width for i in range(SHAPE["hookpoints"])}
    cfg = SaeConfig(num_latents=SHAPE["L"], k=SHAPE["k"])
    torch.manual_seed(ranks.rank)
    rows = SHAPE["rows"] // ranks.world
    pairs = {
        name: (torch.randn(rows, w.d_in), torch.randn(rows, w.d_out)) for name, w in widths.items()
    }
    steps: dict[str, Callable[[], None]] = {}
    for mode in modes:
        each = ranks.world if mode == SHARED else 1
        exchange = Exchange(ranks, costs(widths, cfg, (0,)), mode != "replicas", (), each)
        here, groups = exchange.trained_here(widths), exchange.groups
        bank = CoderBank(here, cfg, (0,), "cpu", groups=groups)
        rules = {n: CoderOptimizer(c, SIGNUM) for n, c in bank.items()}
        steps[mode] = partial(train_step, mode, exchange, bank, rules, pairs)
    return in_turns(steps, ranks, repeats)


def in_turns(
    ways: dict[str, Callable[[], None]], ranks: Ranks, repeats: int
) -> dict[str, dict[str, float]]:
    """Of each way the median of its milliseconds, and bytes that this rank receives."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    received: dict[str, float] = {}
    for _ in range(repeats + 1):
        for way, run in ways.items():
            if ranks.world > 1:
                dist.barrier()
            ranks.clear_traffic()
            began = time.perf_counter()
            run()
            if ranks.world > 1:
                dist.barrier()
            seconds[way].append(time.perf_counter() - began)
            received[way] = ranks.traffic().get(f"bytes_received/rank{ranks.rank}", 0.0)
    return {
        way: {"step_ms": 1e3 * statistics.median(seconds[way][1:]), "received_bytes": received[way]}
        for way in ways
    }


def most_of_ranks(world: int, script: str, *arguments: str) -> dict[str, dict[str, float]]:
    """The largest of each figure that the ranks of a launch of `script` measure."""
    with tempfile.TemporaryDirectory() as folder:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launch += ["--nproc_per_node", str(world), script, "--worker", folder, *arguments]
        subprocess.run(launch, check=True)
        found = [json.loads(f.read_text()) for f in sorted(Path(folder).iterdir())]
    return {
        way: {name: max(rank[way][name] for rank in found) for name in figures}
        for way, figures in found[0].items()
    }


# On paper: what is assumed of a GPU (NVIDIA's data sheet of the H100 SXM: 989 TFLOP/s dense bf16,
# 900 GB/s NVLink both ways together) and of a network of 400 Gb/s for each GPU.
ASSUMED = {"flops": 0.4 * 989e12, "nvlink": 450e9, "network": 50e9, "step_over_product": 1.6}
MODEL = {"layers": 80, "parameters": 70.6e9, "d": 8192, "L": 131_072, "tokens": 2048}


def paper(gpus: int, hookpoints: int) -> dict[str, Any]:
    """Llama-3-70B, ZeRO-3, one coder of every hookpoint on its owner, one LM forward per step."""
    d, latents, tokens = MODEL["d"], MODEL["L"], MODEL["tokens"]
    link = ASSUMED["nvlink"] if gpus <= 8 else ASSUMED["network"]
    share = -(-hookpoints // gpus)  # of the fullest rank
    others = (gpus - 1) / gpus
    coder = 2 * latents * d * 4
    rows = tokens * gpus
    product = 2 * rows * d * latents / ASSUMED["flops"]
    gigabyte = {
        "LM shard": 2 * MODEL["parameters"] / gpus,
        "LM gathered at a time": 2 * 1e9,
        "coders, gradients, momentum": 3 * share * coder,
        "rows captured and sent": 2 * hookpoints * tokens * d * 2,
        "rows received and joined": 2 * share * rows * d * 2,
    }
    moved = {
        "owners": share * (rows - tokens) * d * 2,
        "replicas": 2 * others * hookpoints * coder,
        "all-gather": 2 * hookpoints * (rows - tokens) * d * 2,
        "LM weights": 2 * MODEL["parameters"] * others,
    }
    seconds = {
        "LM forward": 2 * MODEL["parameters"] * tokens / ASSUMED["flops"],
        "LM weights": moved["LM weights"] / link,
        "rows to owners": moved["owners"] / link,
        "coders": share * ASSUMED["step_over_product"] * product,
    }
    # DeepSpeed gathers the next layer while one computes.
    total = max(seconds["LM forward"], seconds["LM weights"])
    total += seconds["rows to owners"] + seconds["coders"]
    return {
        "gpus": gpus,
        "hookpoints": hookpoints,
        "GB_per_gpu": {name: n / 1e9 for name, n in gigabyte.items()},
        "GB_per_gpu_total": sum(gigabyte.values()) / 1e9,
        "GB_received_per_step": {name: n / 1e9 for name, n in moved.items()},
        "seconds": seconds,
        "seconds_per_step": total,
        "tokens_per_second": rows / total,
    }


def sharing(d: int, latents: int, k: int, gpus: int, rows: int) -> dict[str, Any]:
    """Bytes that a rank receives in a step for one SAE that all ranks share, where sums are rings.

    A row travels in bfloat16, a candidate in 8 bytes, all else in float32. Norms: the decoder's
    rows times their gradients, and times themselves.
    """
    ring, others = 2 * (gpus - 1) / gpus, (gpus - 1) / gpus
    candidates = ring * k * 8
    return {
        **{"D": d, "L": latents, "k": k, "gpus": gpus, "rows": rows},
        "bytes_a_row": {
            "the row itself": others * d * 2,
            "decoder by columns": candidates + ring * k * 4,
            "decoder by latents": candidates + ring * d * 4,
        },
        "bytes_a_step": {"norms, by columns": ring * 2 * latents * 4},
    }


def wide_paper() -> dict[str, Any]:
    """16 million latents on 64 GPUs: memory, bytes and seconds of a step without the LM."""
    found = sharing(4096, 2**24, 256, 64, 131_072)
    d, latents, k, gpus, rows = (found[n] for n in ("D", "L", "k", "gpus", "rows"))
    gigabyte = {
        "weights, gradients, momentum": 3 * 2 * latents * d * 4 / gpus,
        "counts of what fires": 4 * latents * 8,
        "rows received, joined, in float32": rows * d * (2 + 2 + 4),
        "candidates": 5 * rows * k * 8,
        "output, error and gradient": 3 * rows * d * 4 / gpus,
    }
    columns = found["bytes_a_row"]["decoder by columns"]
    moved = rows * found["bytes_a_row"]["the row itself"], rows * columns
    seconds = {
        "rows": moved[0] / ASSUMED["network"],
        "candidates, gradients of activations": moved[1] / ASSUMED["network"],
        "norms": found["bytes_a_step"]["norms, by columns"] / ASSUMED["network"],
        "coder": ASSUMED["step_over_product"] * 2 * rows * d * latents / gpus / ASSUMED["flops"],
    }
    return {
        **found,
        "GB_per_gpu": {name: n / 1e9 for name, n in gigabyte.items()},
        "GB_per_gpu_total": sum(gigabyte.values()) / 1e9,
        "GB_of_the_whole_coder": 3 * 2 * latents * d * 4 / 1e9,
        "seconds": seconds,
        "seconds_per_step": sum(seconds.values()),
    }


def show_sharing(case: dict[str, Any]) -> None:
    shape = {name: case[name] for name in ("D", "L", "k", "gpus", "rows")}
    print("\none SAE on all ranks, on paper:", shape)
    for unit in ("bytes_a_row", "bytes_a_step"):
        for name, moved in case[unit].items():
            print(f"  {name:36} {moved:15,.0f} {unit.replace('_', ' ')}")
    for name, gigabytes in case.get("GB_per_gpu", {}).items():
        print(f"  {name:36} {gigabytes:15.2f} GB on a GPU")
    for name, seconds in case.get("seconds", {}).items():
        print(f"  {name:36} {seconds:15.3f} s")
    if "seconds" in case:
        print(f"  {'together':36} {case['GB_per_gpu_total']:15.2f} GB on a GPU")
        print(f"  {'step':36} {case['seconds_per_step']:15.3f} s")


def show_paper(case: dict[str, Any]) -> None:
    print(f"\nLlama-3-70B on {case['gpus']} GPUs, {case['hookpoints']} hookpoints, on paper")
    for name, gigabytes in case["GB_per_gpu"].items():
        print(f"  {name:30} {gigabytes:9.2f} GB on a GPU")
    print(f"  {'together':30} {case['GB_per_gpu_total']:9.2f} GB on a GPU")
    for name, gigabytes in case["GB_received_per_step"].items():
        print(f"  {name:30} {gigabytes:9.2f} GB received by a GPU in a step")
    for name, seconds in case["seconds"].items():
        print(f"  {name:30} {seconds:9.3f} s")
    print(f"  {'step':30} {case['seconds_per_step']:9.3f} s")
    print(f"  {'speed':30} {case['tokens_per_second']:9,.0f} tokens/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--modes", nargs="+", default=[*MODES], choices=[*MODES, SHARED])
    parser.add_argument("--paper", action="store_true", help="no measurement")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.worker:
        found = worker(args.modes, args.repeats)
        (args.worker / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
        return
    result: dict[str, Any] = {"machine": machine("cpu"), "shape": SHAPE, "assumed": ASSUMED}
    for world in [] if args.paper else args.ranks:
        arguments = ["--repeats", str(args.repeats), "--modes", *args.modes]
        found = most_of_ranks(world, __file__, *arguments)
        if world == args.ranks[0]:
            print(f"{SHAPE} on {result['machine']}")
            print(f"{'ranks':>5} {'mode':10} {'MB received by a rank':>22} {'step ms':>9}")
        result[f"ranks_{world}"] = found
        for mode, seen in found.items():
            megabytes = seen["received_bytes"] / 1e6
            print(f"{world:5} {mode:10} {megabytes:22.2f} {seen['step_ms']:9.1f}")
    if SHARED in args.modes:
        result["paper"] = [sharing(4096, 2**20, 64, 8, 16_384), wide_paper()]
        for case in result["paper"]:
            show_sharing(case)
    else:
        result["paper"] = [paper(8, 8), paper(64, 80)]
        for case in result["paper"]:
            show_paper(case)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""A whole training run beside the reference's: tokens per second, memory, held-out FVU.

    python benchmarks/run.py --out benchmarks/results/run.json
    python benchmarks/run.py --steps 4 --num_latents 1024 --repeats 1      a trial of a minute
    python benchmarks/run.py --device cuda --lm random --width 4096 --num_latents 131072 \\
        --batch_size 64                                                    on a GPU

The reference is Sparsify, by EleutherAI, as released: pip puts it and what it needs beside our own
requirements into a temporary folder that only its process sees, so both sides run the same torch.
Both train one SAE with the same optimizer and rate, on the same batches in the same steps (their
checksums are compared), from the same initial weights, which each side loads as it loads those to
finetune. On the CPU both run in float32. On a GPU that has bfloat16 the reference multiplies in it,
by a switch inside, and so does ours; both read an LM in it. Each run is a process of its own, ours
and theirs in turns, every turn from other weights, and the median of the ratios is what to quote.

The clock is a hook on the LM, the same on both sides: tokens per second are those from the start of
the second step to the start of the last; loading, the first step and saving are left out. Peak
memory is the most that the kernel saw the process hold up to the start of the last step: imports
and the LM are in it, saving and the final evaluation are not. Linux only. Held-out FVU is computed
here, by one function, from the coder that each leaves on disk. On a GPU, peak memory is what torch
allocated there. Ours stops the LM after the
hookpoint and the reference runs it to its end, which is part of the difference.

The reference runs unpatched, with two things chosen for it. Its command line asks for CUDA, so its
Trainer is called from Python. Where Triton is installed it would be used on the CPU as well, where
it cannot run: SPARSIFY_DISABLE_TRITON=1, its own switch, picks its PyTorch operators.
"""

import argparse
import importlib.metadata
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# Neither side's process should hold the other's modules, so each is imported where it is used.

REFERENCE = "eai-sparsify==1.3.3"
NEEDS = ["schedulefree==1.4.1", "simple-parsing==0.1.9"]
NEEDS += ["docstring-parser==0.18.0", "einops==0.8.2"]
SIDES = ("ours", "theirs")
DEFAULTS = {"hookpoint": "layers.3", "num_latents": 12288, "k": 32, "ctx_len": 256}
DEFAULTS |= {"batch_size": 32, "steps": 60, "eval_tokens": 2**15, "shuffle_seed": 42}
DEFAULTS |= {"init_seed": 0}
# The reference's recipe: both sides are to do the same.
RECIPE = {"optimizer": "signum", "steps_per_batch": 1, "encoder_lr": 1.0, "rms_units": False}
RECIPE |= {"auxk_alpha": 0.0, "wake_alpha": 0.0, "runner_ups": 0.0, "dead_feature_threshold": 1e7}
# What the median of ours / theirs should be.
TARGETS = {"tokens_per_second": (">=", 2.5), "peak_mb": ("<=", 0.6), "fvu": ("<=", 1.0)}


def status_mb(field: str) -> float:
    """A figure of this process's memory in MB, from the kernel."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 / 1e6 for x in lines if x.startswith(f"{field}:"))


def memory_mb(device: torch.device) -> tuple[float, float]:
    """The most that was held so far, and what is held now, in MB."""
    if device.type == "cuda":
        now = torch.cuda.memory_allocated(device) / 1e6
        return torch.cuda.max_memory_allocated(device) / 1e6, now
    return status_mb("VmHWM"), status_mb("VmRSS")


def watch(lm: Any, batch: torch.Size) -> list[tuple[float, float, float, int]]:
    """A list that grows by time, memory and checksum with every LM forward of a whole batch."""
    seen: list[tuple[float, float, float, int]] = []

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tokens = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        if tokens.shape == batch:  # forwards that measure widths or evaluate are smaller
            check = zlib.crc32(tokens.cpu().numpy().tobytes())  # waits for a GPU as well
            seen.append((time.perf_counter(), *memory_mb(tokens.device), check))

    lm.register_forward_pre_hook(note, with_kwargs=True)
    return seen


def precision(device: str) -> torch.dtype:
    """What both sides compute in: of bfloat16 on a GPU the reference leaves no choice."""
    bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if bf16 else torch.float32


def train_ours(lm: Any, folder: Path, flags: dict[str, Any]) -> Path:
    """Train by train_sae.py; return the folder of the coder."""
    from sae.flag_checks import from_flags
    from train_sae import TrainConfig, train

    hookpoint, steps = flags.pop("hookpoint"), flags.pop("steps")
    chosen = {"hookpoints": (hookpoint,), "log_with": "none", **RECIPE}
    chosen |= {"mixed_precision": "bf16" if lm.dtype == torch.bfloat16 else "no"}
    chosen |= {"max_examples": steps * flags["batch_size"], "save_every": steps + 2}
    chosen |= {"finetune": str(folder / "start")}
    del flags["init_seed"]
    chosen |= {"save_dir": str(folder), "run_name": "ours"}
    cfg = from_flags(TrainConfig, chosen | flags)
    summary = train(cfg, lm=lm, dataset=torch.load(folder / "blocks.pt"))
    return Path(summary["hookpoints"][hookpoint]["path"])


def train_theirs(lm: Any, folder: Path, flags: dict[str, Any]) -> Path:
    """Train by the reference's Trainer; return the folder of the coder."""
    from datasets import Dataset
    from safetensors.torch import load_model
    from sparsify import SaeConfig, TrainConfig, Trainer  # pyright: ignore[reportMissingImports]

    cfg = TrainConfig(
        SaeConfig(num_latents=flags["num_latents"], k=flags["k"]),
        hookpoints=[flags["hookpoint"]],
        finetune=str(folder / "start"),  # or it would move the biases once more
        batch_size=flags["batch_size"],
        save_every=flags["steps"] + 2,  # so that the last save is the only one
        log_to_wandb=False,
        save_dir=str(folder),
        run_name="theirs",
    )
    # It reads the data as they come, so they come in the order that ours shuffles into.
    blocks = torch.load(folder / "blocks.pt")[torch.load(folder / "order.pt")]
    data = Dataset.from_dict({"input_ids": blocks.numpy()}).with_format("torch")
    trainer = Trainer(cfg, data, lm)
    for name, coder in trainer.saes.items():
        load_model(coder, folder / "start" / name / "sae.safetensors", device=str(coder.device))
    trainer.fit()
    return folder / "theirs" / flags["hookpoint"]


def child(side: str, folder: Path, device: str, flags: dict[str, Any]) -> None:
    """One run of one side, in this process."""
    from transformers import AutoModel

    lm = AutoModel.from_pretrained(folder / "lm", dtype=precision(device)).to(device)
    batch, steps = torch.Size((flags["batch_size"], flags["ctx_len"])), flags["steps"]
    seen = watch(lm, batch)
    coder = (train_ours if side == "ours" else train_theirs)(lm, folder, dict(flags))
    # Ours has seen the first batch once before, for the coder's bias.
    times, peaks, held, checksums = zip(*seen[-steps:], strict=True)
    found = {
        "tokens_per_second": batch.numel() * (steps - 2) / (times[-1] - times[1]),
        # Beside the mean, the median step: others on the machine slow a few steps.
        "step_ms": 1e3 * statistics.median(b - a for a, b in pairwise(times[1:])),
        "peak_mb": peaks[-1],
        "before_training_mb": held[0],
        "peak_to_the_end_mb": memory_mb(lm.device)[0],
        "checksums": checksums,
        "coder": str(coder),
    }
    (folder / f"{side}.json").write_text(json.dumps(found))


def write_lm(kind: str, folder: Path, width: int) -> None:
    """Write the demo LM, or one of another width with random weights."""
    from transformers import AutoConfig, AutoModel

    if kind == "demo":
        shutil.copytree(ROOT / "demo/lm", folder, dirs_exist_ok=True)
        return
    # At this scale its activations are of the demo LM's size (std 4.0 beside 3.8).
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "initializer_range": 0.06}
    sizes |= {"num_attention_heads": max(1, width // 64)}
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(ROOT / "demo/lm", **sizes)
    AutoModel.from_config(config, dtype=torch.float32).save_pretrained(folder)


def write_data(folder: Path, flags: dict[str, Any]) -> Tensor:
    """Tokenize the demo text once, write blocks and our order of them; return those held out."""
    from sae import DataConfig, ModelConfig
    from sae.data.text import load_tokens

    sys.path.insert(0, str(ROOT / "demo"))
    from make_text import write_text

    write_text(folder / "text")
    data = DataConfig(str(folder / "text/train.jsonl"), ctx_len=flags["ctx_len"])
    found = load_tokens(data, ModelConfig(str(ROOT / "demo/lm")), limits=(4096, 512))
    train = flags["steps"] * flags["batch_size"]
    # At most a tenth of the data is held out, so a short run has less.
    held = min(-(-flags["eval_tokens"] // flags["ctx_len"]), max(1, train // 9))
    chosen = found.order(range(len(found)), seed=0)[: held + train]
    blocks = next(found.batches(chosen, held + train)).ids
    torch.save(blocks, folder / "blocks.pt")
    torch.save(found.order(range(held, held + train), flags["shuffle_seed"]), folder / "order.pt")
    return blocks[:held]


def write_start(folder: Path, lm: Any, flags: dict[str, Any]) -> None:
    """Write the coder that both sides start from, its biases from the first rows."""
    from sae import SaeConfig, SparseCoder
    from sae.coders.moments import Moments
    from sae.lm.capture import Capture

    hookpoint = flags["hookpoint"]
    first = torch.load(folder / "blocks.pt")[torch.load(folder / "order.pt")[:8]]
    mean = Moments.of(Capture(lm, [hookpoint], inputs=False)(first)[hookpoint][1]).mean
    cfg = SaeConfig(num_latents=flags["num_latents"], k=flags["k"])
    generator = torch.Generator().manual_seed(flags["init_seed"])
    coder = SparseCoder(len(mean), cfg, generator=generator)
    coder.center_(mean, mean)
    coder.save_to_disk(folder / "start" / hookpoint)


@torch.no_grad()
def held_out_fvu(coder_folder: str, lm: Any, hookpoint: str, held: Tensor) -> float:
    """FVU, over all held-out rows, of a coder on disk."""
    from sae import SparseCoder
    from sae.coders.functional import squared_error
    from sae.coders.moments import Moments, accumulate
    from sae.lm.capture import Capture

    coder, moments, error = SparseCoder.load_from_disk(coder_folder), {}, 0.0
    capture = Capture(lm, [hookpoint], inputs=False)
    for tokens in held.split(8):
        _, rows = capture(tokens)[hookpoint]
        accumulate(moments, hookpoint, rows)
        error += float(squared_error(rows, coder.decode(*coder.encode(rows))))
    seen: Moments = moments[hookpoint]
    return error / float(seen.total_variance)


def compare(
    kind: str, flags: dict[str, Any], repeats: int, folder: Path, device: str, width: int
) -> dict[str, Any]:
    """Both sides in turns on one LM: every figure of every run, medians, and ratios to the targets.

    `folder` holds the reference's packages and the data, and takes LM and runs.
    """
    from sae import ModelConfig
    from sae.lm.loading import find_hookpoints, load_lm

    write_lm(kind, folder / "lm", width)
    held, hookpoint = torch.load(folder / "held.pt"), flags["hookpoint"]
    cfg = ModelConfig(str(folder / "lm"), hookpoints=(hookpoint,))
    lm = load_lm(cfg, *find_hookpoints(cfg))
    only_theirs = {"PYTHONPATH": str(folder / "packages"), "SPARSIFY_DISABLE_TRITON": "1"}
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    if device == "cuda":  # where Triton runs, the reference uses it
        hidden = {}
        only_theirs.pop("SPARSIFY_DISABLE_TRITON")
    runs: list[dict[str, Any]] = []
    for seed in range(repeats):
        command = [sys.executable, __file__, "--folder", str(folder), "--device", device]
        command += [f"--{n}={v}" for n, v in {**flags, "init_seed": seed}.items()]
        write_start(folder, lm, {**flags, "init_seed": seed})
        pair: dict[str, Any] = {}
        for side in SIDES:
            env = os.environ | hidden | (only_theirs if side == "theirs" else {})
            subprocess.run([*command, "--side", side], env=env, check=True)
            pair[side] = json.loads((folder / f"{side}.json").read_text())
            pair[side]["fvu"] = held_out_fvu(pair[side].pop("coder"), lm, hookpoint, held)
            shutil.rmtree(folder / side)
        if pair["ours"].pop("checksums") != pair["theirs"].pop("checksums"):
            raise RuntimeError("the two sides did not train on the same batches")
        runs.append(pair)
    median = {
        side: {n: statistics.median(run[side][n] for run in runs) for n in runs[0][side]}
        for side in SIDES
    }
    targets = {}
    for figure, (sign, target) in TARGETS.items():
        ratio = statistics.median(run["ours"][figure] / run["theirs"][figure] for run in runs)
        met = ratio >= target if sign == ">=" else ratio <= target
        targets[figure] = {"ratio": ratio, "target": f"{sign} {target}", "met": met}
    of = {"width": lm.config.hidden_size, "held_out_tokens": held.numel()}
    return {**of, "runs": runs, "median": median, "targets": targets}


def show(kind: str, found: dict[str, Any]) -> None:
    """One LM's lines of the table."""
    for side in SIDES:
        speed, peak, fvu = (found["median"][side][figure] for figure in TARGETS)
        print(f"{kind:7} {side:7} {speed:12,.0f} {peak:10,.0f} {fvu:13.4f}")
    speed, peak, fvu = (found["targets"][figure]["ratio"] for figure in TARGETS)
    print(f"{kind:7} {'ratio':7} {speed:12.2f} {peak:10.2f} {fvu:13.4f}")
    goals = [f"{t['target']} {'met' if t['met'] else 'missed'}" for t in found["targets"].values()]
    print(f"{kind:7} {'target':7} {goals[0]:>12} {goals[1]:>10} {goals[2]:>13}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lm", choices=("demo", "random"), nargs="+", default=["demo", "random"])
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--width", type=int, default=384, help="of the random LM")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    flags = {name: getattr(args, name) for name in DEFAULTS}
    if args.side:
        return child(args.side, args.folder, args.device, flags)
    if args.steps < 3:
        parser.error("--steps: the first and the last are not timed, so give at least 3")

    from benchmarks.step import machine

    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    versions |= dict(need.split("==") for need in (REFERENCE, *NEEDS))
    result: dict[str, Any] = {
        "machine": machine(args.device),
        "versions": versions,
        "settings": flags,
        "precision": str(precision(args.device)),
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        subprocess.run([*install, str(folder / "packages"), REFERENCE, *NEEDS], check=True)
        torch.save(write_data(folder, flags), folder / "held.pt")
        for kind in args.lm:
            of_lm = (folder, args.device, args.width)
            result[kind] = compare(kind, flags, args.repeats, *of_lm)
    print(f"{flags} on {result['machine']}")
    print(f"{'LM':7} {'side':7} {'tokens/s':>12} {'peak MB':>10} {'held-out FVU':>13}")
    for kind in args.lm:
        show(kind, result[kind])
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""A search for the active latents in int8: what a step costs, what it misses, what runs end with.

    python benchmarks/low_precision.py --out benchmarks/results/low_precision.json

`--kernels int8` takes the latents that rank highest in an int8 product and computes their
pre-activations in full. A step of it stands beside the encoder's product in bfloat16, made in turns
with it, as in step.py. Recall is the share of the exact top k that it finds, by candidates per
active latent, on rows of the demo LM, of a trained coder; and held-out FVU is of two runs that
differ in nothing else.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

from make_text import write_text

from benchmarks.step import Shape, machine, step_over_product, write
from sae import DataConfig, ModelConfig, SparseCoder, UsageError
from sae.coders import functional
from sae.config import KernelChoice
from sae.data.text import load_tokens
from sae.flag_checks import from_flags
from sae.kernels.twins import Kernels
from sae.lm.capture import Capture
from train_sae import TrainConfig, train

HOOKPOINT = "layers.3"
CHOICES: tuple[KernelChoice, ...] = ("auto", "int8")


def steps(shape: Shape, repeats: int) -> dict[str, float]:
    """A step without int8 and one with, each beside the bfloat16 product."""
    found = {}
    for choice in CHOICES:
        kernels = Kernels(choice)
        measured = step_over_product(shape, torch.bfloat16, repeats, "cpu", kernels=kernels)
        kept = ("product_ms", "product_in_place_ms", "step_ms", "ratio", "ratio_in_place")
        found |= {f"{choice}_{name}": measured[name] for name in kept}
    return found


def trained(choice: KernelChoice, folder: Path, **flags: int) -> dict[str, Any]:
    """The figures of a run on the demo LM."""
    of_run = {
        "model": str(ROOT / "demo/lm"),
        "dataset": str(folder / "text/train.jsonl"),
        "hookpoints": (HOOKPOINT,),
        "ctx_len": 256,
        "kernels": choice,
        "save_dir": str(folder),
        "run_name": choice,
        "log_with": "none",
    }
    with contextlib.redirect_stdout(io.StringIO()):
        return train(from_flags(TrainConfig, of_run | flags))["hookpoints"][HOOKPOINT]


@torch.no_grad()
def recall(coder: SparseCoder, rows: torch.Tensor, candidates: int) -> float:
    """Share of the exact top k of every row that an int8 search finds."""
    arguments = (rows, coder.encoder.weight, coder.encoder.bias, coder.cfg.k)
    _, exact = functional.encode(*arguments, pre_bias=coder.b_dec)
    _, found = functional.encode_in_int8(*arguments, coder.b_dec, candidates)
    seen = torch.zeros(len(rows), coder.num_latents, dtype=torch.bool).scatter_(1, found, True)
    return seen.gather(1, exact).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in asdict(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--steps", type=int, default=60, help="of the two runs")
    parser.add_argument("--num_latents", type=int, default=12288, help="of the two runs")
    parser.add_argument("--eval_tokens", type=int, default=2**15, help="of the two runs")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    shape = Shape(args.N, args.D, args.L, args.k)
    result: dict[str, Any] = {"machine": machine("cpu"), "shape": asdict(shape)}
    try:
        Kernels("int8").describe(torch.device("cpu"))
    except UsageError as error:
        print(error)
        return write(result | {"unmeasured": str(error)}, args.out)
    result |= steps(shape, args.repeats)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(folder / "text")
        flags = {name: getattr(args, name) for name in ("num_latents", "eval_tokens")}
        flags["max_examples"] = 32 * args.steps
        runs = {choice: trained(choice, folder, **flags) for choice in CHOICES}
        coder = SparseCoder.load_from_disk(runs["auto"]["path"])
        data = DataConfig(str(folder / "text/heldout.jsonl"), ctx_len=256)
        blocks = load_tokens(data, ModelConfig(str(ROOT / "demo/lm")), limits=(4096, 512))
        tokens = next(blocks.batches(torch.arange(8), 8)).ids
    lm = AutoModel.from_pretrained(ROOT / "demo/lm", dtype=torch.float32)
    _, rows = Capture(lm, [HOOKPOINT])(tokens)[HOOKPOINT]
    result["recall"] = {f"{n} k": recall(coder, rows, n) for n in (1, 2, 3, 4)}
    result |= {f"{choice}_fvu": figures["fvu"] for choice, figures in runs.items()}
    result["fvu_ratio"] = result["int8_fvu"] / result["auto_fvu"]
    for name, value in result.items():
        print(f"{name:26} {value}")
    write(result, args.out)


if __name__ == "__main__":
    main()

"""Whether a search for the active latents in int8 would pay: its product, and what it would miss.

    python benchmarks/low_precision.py --out benchmarks/results/low_precision.json

Such a search takes the 4 k best latents of a product in int8 (rows and latents scaled to 127) and
computes their scores again in full. It can only be worth it if the int8 product is much faster than
the bfloat16 one. Both write into memory that is there, in the chunks that a step uses: measured as
functions that return fresh memory, what differs is mostly the system clearing it.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.step import Shape, machine, median_ms, seconds, write
from sae.kernels import _chunk_rows


def to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in int8 and what each was divided by."""
    scale = rows.abs().amax(1, keepdim=True) / 127
    return (rows / scale).round().to(torch.int8), scale


def products(shape: Shape, device: str, repeats: int) -> dict[str, float]:
    """Milliseconds of the encoder's product by precision, and the median ratio."""
    x, W = (
        torch.randn(shape.N, shape.D, device=device),
        torch.randn(shape.L, shape.D, device=device),
    )
    x8, W8 = to_int8(x)[0], to_int8(W)[0]
    half, W_half = x.bfloat16(), W.bfloat16()
    rows = _chunk_rows(half, shape.L)
    in_int = torch.empty(rows, shape.L, dtype=torch.int32, device=device)
    in_half = torch.empty(rows, shape.L, dtype=torch.bfloat16, device=device)

    def int8() -> None:
        for piece in x8.split(rows):
            torch._int_mm(piece, W8.t(), out=in_int[: len(piece)])

    def bf16() -> None:
        for piece in half.split(rows):
            torch.mm(piece, W_half.t(), out=in_half[: len(piece)])

    pairs = [(seconds(bf16, device), seconds(int8, device)) for _ in range(repeats + 2)][2:]
    fresh: dict[str, Callable[[], Any]] = {
        "bf16_fresh_ms": lambda: torch.mm(half, W_half.t()),
        "int8_fresh_ms": lambda: torch._int_mm(x8, W8.t()),
    }
    return {
        "bf16_ms": 1e3 * statistics.median(b for b, _ in pairs),
        "int8_ms": 1e3 * statistics.median(i for _, i in pairs),
        "int8_over_bf16": statistics.median(i / b for b, i in pairs),
    } | {name: median_ms(work, device, repeats) for name, work in fresh.items()}


def recall(shape: Shape, device: str, wider: int) -> float:
    """Share of the exact top k that are among the `wider` k best by the int8 product."""
    x, W = torch.randn(512, shape.D, device=device), torch.randn(shape.L, shape.D, device=device)
    (x8, x_scale), (W8, W_scale) = to_int8(x), to_int8(W)
    rough = torch._int_mm(x8, W8.t()).float() * x_scale * W_scale.T
    exact = (x @ W.T).topk(shape.k, dim=1).indices
    found = torch.zeros_like(rough, dtype=torch.bool)
    found.scatter_(1, rough.topk(wider * shape.k, dim=1).indices, True)
    return found.gather(1, exact).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in asdict(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    torch.manual_seed(0)
    shape = Shape(args.N, args.D, args.L, args.k)
    result: dict[str, Any] = {"machine": machine(args.device), "shape": asdict(shape)}
    result |= products(shape, args.device, args.repeats)
    result["recall"] = {f"{wider} k": recall(shape, args.device, wider) for wider in (1, 2, 4)}
    for name, value in result.items():
        print(f"{name:16} {value}")
    write(result, args.out)


if __name__ == "__main__":
    main()

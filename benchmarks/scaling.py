"""What a step costs as latents, active latents, rows and hookpoints grow, with a plot.

    python benchmarks/scaling.py --out benchmarks/results/scaling.json --plot docs/scaling.svg

One of the four grows at a time. Steps of all sizes take turns within one run. Of hookpoints the
slope is fitted: it should be what one coder costs, so that nothing is paid per run or per pair.
The plot needs matplotlib.
"""

import argparse
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.step import Shape, Step, machine, seconds, write

BASE = Shape(N=2048, D=384, L=12288, k=32)
SWEEPS = {
    "L": [3072, 6144, 12288, 24576, 49152],
    "k": [8, 16, 32, 64, 128, 256],
    "N": [512, 1024, 2048, 4096, 8192],
    "H": [1, 2, 4, 8, 12],
}


def sweep(knob: str, device: str, repeats: int, dtype: torch.dtype) -> dict[str, float]:
    """Median milliseconds of a step at each size of one knob."""
    works: dict[int, list[Step]] = {}
    for size in SWEEPS[knob]:
        if knob == "H":
            works[size] = [Step(BASE, dtype, device, seed=i) for i in range(size)]
        else:
            works[size] = [Step(replace(BASE, **{knob: size}), dtype, device)]

    def run(steps: list[Step]) -> None:
        for step in steps:
            step()

    times: dict[int, list[float]] = {size: [] for size in works}
    for _ in range(repeats + 1):
        for size, steps in works.items():
            times[size].append(seconds(lambda steps=steps: run(steps), device))
    return {str(size): 1e3 * statistics.median(found[1:]) for size, found in times.items()}


def slope(sizes: list[int], ms: list[float]) -> float:
    """Milliseconds per unit, by least squares."""
    mean_size, mean_ms = statistics.mean(sizes), statistics.mean(ms)
    pairs = list(zip(sizes, ms, strict=True))
    above = sum((s - mean_size) * (m - mean_ms) for s, m in pairs)
    return above / sum((s - mean_size) ** 2 for s in sizes)


def plot(result: dict[str, Any], file: Path) -> None:
    """One panel per knob, time against size."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    labels = {"L": "latents", "k": "active latents", "N": "rows", "H": "hookpoints"}
    figure, axes = pyplot.subplots(1, 4, figsize=(13, 3.2), layout="constrained")
    for axis, (knob, label) in zip(axes, labels.items(), strict=True):
        sizes = [int(size) for size in result[knob]]
        axis.plot(sizes, result[knob].values(), "o-", color="#3b6ea5")
        axis.set(xlabel=label, ylim=(0, None), xlim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("ms per step")
    about = result["machine"]
    where = f"{about['device']} ({about['cpu']}), {about['date']}"
    figure.suptitle(f"{result['base']}, {result['precision']}, {where}", fontsize=9)
    figure.savefig(file, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--knobs", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--bf16", action="store_true", help="the product in bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()

    dtype = torch.bfloat16 if args.bf16 else torch.float32
    result: dict[str, Any] = {
        "machine": machine(args.device),
        "base": ", ".join(f"{n} = {v}" for n, v in asdict(BASE).items()),
        "precision": str(dtype).removeprefix("torch."),
    }
    print(f"{result['base']}, {result['precision']}, on {result['machine']}")
    for knob in args.knobs:
        result[knob] = sweep(knob, args.device, args.repeats, dtype)
        print(f"{knob}: " + ", ".join(f"{size} {ms:.1f} ms" for size, ms in result[knob].items()))
    if "H" in args.knobs:
        sizes, ms = zip(*((int(s), m) for s, m in result["H"].items()), strict=True)
        result["slope_over_one_coder"] = slope(list(sizes), list(ms)) / ms[0]
        print(f"a further hookpoint costs {result['slope_over_one_coder']:.3f} of the first")
    write(result, args.out)
    if args.plot:
        plot(result, args.plot)


if __name__ == "__main__":
    main()

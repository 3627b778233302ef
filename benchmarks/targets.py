"""Every target of speed beside what was measured.

    python benchmarks/targets.py --results FOLDER      measure all (half an hour on two cores)
    python benchmarks/targets.py --read                only print what is in benchmarks/results

GPU rows are measured where there is one; elsewhere they say which command will.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
GPU = "--device cuda --N 16384 --D 4096 --L 131072 --dead_share 0"
COMMANDS = {
    "step": "step.py",
    "step_wide": "step.py --D 768 --L 24576 --k 64 --repeats 7",
    "run": "run.py",
    "scaling": "scaling.py",
    "trace": "trace.py",
    "low_precision": "low_precision.py",
}
GPU_RUN = "--device cuda --lm random --width 4096 --num_latents 131072 --batch_size 64"
GPU_COMMANDS = {
    "step_gpu_k32": f"step.py {GPU} --k 32",
    "step_gpu_k192": f"step.py {GPU} --k 192",
    "run_gpu": f"run.py {GPU_RUN}",
}

WIDE = "D = 768, L = 24576, k = 64: "
RUN, GPU_RATIO = "targets.tokens_per_second.ratio", "bfloat16.ratio"

# What, the figure in which result, its bound, and whether more is better.
Row = tuple[str, str, str, float, bool]
ROWS: list[Row] = [
    ("step / product, float32", "step", "float32.ratio", 1.15, False),
    ("step / product, bfloat16", "step", "bfloat16.ratio", 1.35, False),
    (f"{WIDE}step / product, float32", "step_wide", "float32.ratio", 1.15, False),
    (f"{WIDE}step / product, bfloat16", "step_wide", "bfloat16.ratio", 1.35, False),
    ("AuxK, 30 % dead: step / step without, float32", "step", "float32.auxk_ratio", 1.3, False),
    ("AuxK, 30 % dead: step / step without, bfloat16", "step", "bfloat16.auxk_ratio", 1.3, False),
    (f"{WIDE}AuxK, float32", "step_wide", "float32.auxk_ratio", 1.3, False),
    (f"{WIDE}AuxK, bfloat16", "step_wide", "bfloat16.auxk_ratio", 1.3, False),
    ("whole run, tokens/s / Sparsify's, demo LM", "run", f"demo.{RUN}", 2.5, True),
    ("peak memory / Sparsify's, demo LM", "run", "demo.targets.peak_mb.ratio", 0.6, False),
    ("held-out FVU / Sparsify's, demo LM", "run", "demo.targets.fvu.ratio", 1.0, False),
    ("whole run, tokens/s / Sparsify's, D = 384", "run", f"random.{RUN}", 2.5, True),
    ("peak memory / Sparsify's, D = 384", "run", "random.targets.peak_mb.ratio", 0.6, False),
    ("held-out FVU / Sparsify's, D = 384", "run", "random.targets.fvu.ratio", 1.0, False),
    ("a further hookpoint / the first", "scaling", "slope_over_one_coder", 1.05, False),
    ("int8 search: step / product, bfloat16", "low_precision", "int8_ratio", 1.0, False),
    ("int8 search: recall of the exact top k", "low_precision", "recall.2 k", 0.999, True),
    ("int8 search: held-out FVU / without", "low_precision", "fvu_ratio", 1.001, False),
    ("share of a step that waits for data, from disk", "trace", "disk.waiting_share", 0.02, False),
    ("the same, streaming", "trace", "streaming.waiting_share", 0.02, False),
    ("GPU, k = 32: step / product, bfloat16", "step_gpu_k32", GPU_RATIO, 1.6, False),
    ("GPU, k = 192: step / product, bfloat16", "step_gpu_k192", GPU_RATIO, 1.6, False),
    ("GPU, whole run, tokens/s / Sparsify's", "run_gpu", f"random.{RUN}", 2, True),
    ("GPU, peak memory / Sparsify's", "run_gpu", "random.targets.peak_mb.ratio", 0.5, False),
]


def read(results: dict[str, Any], name: str, path: str) -> float | None:
    """A figure of a result, None where it was not measured."""
    found: Any = results.get(name)
    for key in path.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return found


def table(results: dict[str, Any]) -> str:
    """Markdown, a line per target; what was missed is said so."""
    lines = ["| what | target | measured | |", "|---|---|---|---|"]
    for what, name, path, bound, more in ROWS:
        target = f"{'≥' if more else '≤'} {bound:g}"
        value = read(results, name, path)
        if value is None:
            command = (COMMANDS | GPU_COMMANDS)[name]
            lines.append(f"| {what} | {target} | unmeasured | `python benchmarks/{command}` |")
            continue
        close = value < 0.1 or abs(value - bound) < 0.01
        shown = f"{value:.4f}" if close else f"{value:.3f}"
        met = value >= bound if more else value <= bound
        in_place = read(results, name, path.replace("ratio", "ratio_in_place"))
        if in_place is not None and path.endswith("ratio"):
            shown += f" ({in_place:.3f} in place)"
        lines.append(f"| {what} | {target} | {shown} | {'met' if met else 'missed'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--read", action="store_true", help="measure nothing")
    args = parser.parse_args()
    commands = COMMANDS | (GPU_COMMANDS if torch.cuda.is_available() else {})
    for name, command in {} if args.read else commands.items():
        script, *flags = command.split()
        out = ["--out", str(args.results / f"{name}.json")]
        subprocess.run([sys.executable, str(HERE / script), *flags, *out], check=True)
    files = args.results.glob("*.json")
    print(table({file.stem: json.loads(file.read_text()) for file in files}))


if __name__ == "__main__":
    main()

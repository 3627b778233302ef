"""What a coder's step costs beside its encoder's matrix product alone, and a whole run's speed.

    python benchmarks/step.py --out benchmarks/results/step.json

A step is all that the loop does for one coder: moments of the rows, forward, backward, firing
counts, gradients, optimizer, unit norm. Product and step alternate within one run, and the median
of the ratios is what to quote: times drift with the machine, ratios much less.
"""

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from sae import SaeConfig, SparseCoder
from sae.dead_latents import FiringRecord
from sae.functional import Moments
from sae.optim import CoderOptimizer, finish_gradients_


def seconds(work: Callable[[], Any], device: str) -> float:
    """Wall time of one call, the device's own work included."""
    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def step_over_product(
    dtype: torch.dtype, n: int, d: int, latents: int, k: int, repeats: int, device: str
) -> dict[str, float]:
    """Milliseconds of the encoder's product and of a whole step, and the median ratio."""
    torch.manual_seed(0)
    coder = SparseCoder(d, SaeConfig(num_latents=latents, k=k), device)
    coder.matmul_dtype = dtype
    optimizer, firing = CoderOptimizer(coder, "signum"), FiringRecord(latents, 10**7, device)
    rows = torch.randn(n, d, device=device)
    x, weight = rows.to(dtype), coder.encoder.weight.detach().to(dtype)

    def product() -> None:
        F.linear(x, weight)

    def step() -> None:
        moments = Moments.of(rows)
        out = coder(rows, total_variance=1.0)
        out.fvu.backward()
        firing.observe(out.top_acts, out.top_indices)
        finish_gradients_(coder, moments.total_variance)
        optimizer.step(0, 1000, 0)
        firing.end_step(n)

    for work in (product, step):
        for _ in range(2):
            seconds(work, device)
    pairs = [(seconds(product, device), seconds(step, device)) for _ in range(repeats)]
    return {
        "product_ms": 1e3 * statistics.median(p for p, _ in pairs),
        "step_ms": 1e3 * statistics.median(s for _, s in pairs),
        "ratio": statistics.median(s / p for p, s in pairs),
    }


def run_tokens_per_second() -> float:
    """Tokens per second of a run on the demo LM: three hookpoints, 4 times its width in blocks."""
    from train_sae import TrainConfig, train

    with tempfile.TemporaryDirectory() as folder:
        sys.path.insert(0, str(ROOT / "demo"))
        from make_text import write_text

        write_text(Path(folder) / "text")
        summary = train(
            TrainConfig(
                model=str(ROOT / "demo/lm"),
                dataset=f"{folder}/text/heldout.jsonl",
                hookpoints=("layers.1", "layers.3", "layers.4.mlp"),
                ctx_len=256,
                batch_size=16,
                max_examples=960,
                expansion_factor=16,
                save_dir=folder,
                log_with="none",
            )
        )
    return summary["tokens_per_second"]


def machine(device: str) -> dict[str, Any]:
    """Where and when this was measured."""
    commit = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "amx_bf16": "amx_bf16" in flags,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": subprocess.run(commit, capture_output=True, text=True).stdout.strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--d_in", type=int, default=384)
    parser.add_argument("--num_latents", type=int, default=12288)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no_run", action="store_true", help="leave out the whole run")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    shape = (args.rows, args.d_in, args.num_latents, args.k)
    result: dict[str, Any] = {
        "machine": machine(args.device),
        "shape": dict(zip(("N", "D", "L", "k"), shape, strict=True)),
    }
    print(f"N={args.rows} D={args.d_in} L={args.num_latents} k={args.k} on {result['machine']}")
    print(f"{'precision':10} {'product ms':>11} {'step ms':>9} {'step / product':>15}")
    for dtype in (torch.float32, torch.bfloat16):
        found = step_over_product(dtype, *shape, args.repeats, args.device)
        name = str(dtype).removeprefix("torch.")
        result[name] = found
        print(
            f"{name:10} {found['product_ms']:11.1f} {found['step_ms']:9.1f} {found['ratio']:15.2f}"
        )
    if not args.no_run:
        result["run_tokens_per_second"] = run_tokens_per_second()
        print(f"whole run on the demo LM: {result['run_tokens_per_second']:,.0f} tokens/s")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

"""What a coder's step costs beside its encoder's matrix product alone, and what it is made of.

    python benchmarks/step.py --out benchmarks/results/step.json

A step is all that the loop does for one coder: moments of the rows, forward, backward, firing
counts, gradients, optimizer, unit norm. Products and steps alternate within one run, and the median
of their ratios is what to quote: times drift with the machine, ratios much less. The product is
measured twice: as `F.linear` runs it, into fresh memory, which the system must first clear, and
into memory that is there. On a GPU the two are the same.
"""

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from sae import SaeConfig
from sae.coders.bank import CoderBank
from sae.coders.firing import FiringRecord
from sae.coders.moments import Moments
from sae.config import KernelChoice, TrainingConfig, Widths
from sae.kernels.sparse_products import ByLatent, sampled_product
from sae.kernels.twins import Kernels
from sae.training.losses import auxiliary_loss, divide_gradients_
from sae.training.optim import CoderOptimizer
from sae.training.schedules import Schedule
from sae.training.step_sums import StepSums


@dataclass(frozen=True)
class Shape:
    """Rows, width, latents, active latents."""

    N: int = 8192
    D: int = 384
    L: int = 12288
    k: int = 32


def seconds(work: Callable[[], Any], device: str) -> float:
    """Wall time of one call, the device's own work included."""
    started = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def median_ms(work: Callable[[], Any], device: str, repeats: int) -> float:
    """Median milliseconds of a call, after two that do not count."""
    times = [seconds(work, device) for _ in range(repeats + 2)]
    return 1e3 * statistics.median(times[2:])


SIGNUM = Schedule(TrainingConfig(optimizer="signum", encoder_lr=1.0), 1000, 1)
_NAME = "layers.0"  # of the only hookpoint and its coder


class Step:
    """One coder's step on random rows, in parts that can be timed."""

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        device: str,
        dead_share: float = 0.0,
        seed: int = 0,
        kernels: Kernels | None = None,
        matryoshka: tuple[float, ...] = (),
    ) -> None:
        """`dead_share` of the latents take part in AuxK; 0: no AuxK. `matryoshka`: prefixes."""
        torch.manual_seed(seed)
        cfg = SaeConfig(num_latents=shape.L, k=shape.k, matryoshka=matryoshka)
        widths = {_NAME: Widths(shape.D, shape.D)}
        self.bank = CoderBank(widths, cfg, (seed,), device, dtype, kernels)
        self.coder = self.bank[_NAME]
        self.optimizer = CoderOptimizer(self.coder, SIGNUM)
        self.firing = FiringRecord(shape.L, 10**7, device)
        self.rows = torch.randn(shape.N, shape.D, device=device)
        dead = torch.randperm(shape.L, device=device)[: int(dead_share * shape.L)].sort().values
        self.dead = dead if dead_share else None

    def __call__(self) -> None:
        sums = StepSums(self.bank)
        sums.add_rows(_NAME, self.rows, self.rows)
        errors = self.coder.errors(self.rows, self.rows, self.dead)
        (errors.objective + auxiliary_loss(errors, 1 / 32)).backward()
        sums.add(_NAME, errors)
        divide_gradients_(self.coder, sums.variance(_NAME))
        self.optimizer.step(0)
        self.firing.add_step_(sums.fired[_NAME], len(self.rows))


def step_over_product(
    shape: Shape,
    dtype: torch.dtype,
    repeats: int,
    device: str,
    dead_share: float = 0.0,
    kernels: Kernels | None = None,
    matryoshka: tuple[float, ...] = (),
) -> dict[str, float]:
    """Milliseconds of the encoder's product and of a whole step, and the median ratios."""
    plain = Step(shape, dtype, device, kernels=kernels)
    x, W = plain.rows.to(dtype), plain.coder.encoder.weight.detach().to(dtype)
    there = x.new_empty(shape.N, shape.L)
    works: dict[str, Callable[[], Any]] = {
        "product": lambda: F.linear(x, W),
        "product_in_place": lambda: torch.mm(x, W.t(), out=there),
        "step": plain,
    }
    if dead_share:
        works["step_with_auxk"] = Step(shape, dtype, device, dead_share, kernels=kernels)
    if matryoshka:
        works["step_with_prefixes"] = Step(
            shape, dtype, device, kernels=kernels, matryoshka=matryoshka
        )
    for work in works.values():
        for _ in range(2):
            seconds(work, device)
    rounds = [{n: seconds(work, device) for n, work in works.items()} for _ in range(repeats)]
    found = {f"{n}_ms": 1e3 * statistics.median(r[n] for r in rounds) for n in works}
    found["ratio"] = statistics.median(r["step"] / r["product"] for r in rounds)
    found["ratio_in_place"] = statistics.median(r["step"] / r["product_in_place"] for r in rounds)
    if dead_share:
        found["auxk_ratio"] = statistics.median(r["step_with_auxk"] / r["step"] for r in rounds)
    if matryoshka:
        ratios = [r["step_with_prefixes"] / r["step"] for r in rounds]
        found["prefixes_ratio"] = statistics.median(ratios)
    return found


def parts(
    shape: Shape, dtype: torch.dtype, repeats: int, device: str, kernels: Kernels
) -> dict[str, float]:
    """Milliseconds of each kernel of a step, alone and one after another."""
    step = Step(shape, dtype, device, kernels=kernels)
    coder, rows = step.coder, step.rows
    W_enc, b_enc, b_dec = (
        p.detach() for p in (coder.encoder.weight, coder.encoder.bias, coder.b_dec)
    )
    assert coder.W_dec is not None
    W_dec = coder.W_dec.detach()
    latents = kernels.encode(rows, W_enc, b_enc, shape.k, "topk", b_dec, dtype)
    acts, indices, by_latent = latents
    assert by_latent is not None
    backend = kernels.backend
    inputs = rows.to(dtype)

    def gradients() -> None:
        for p in coder.parameters():
            p.grad = torch.ones_like(p)

    def update() -> None:
        divide_gradients_(coder, torch.ones((), dtype=torch.float64, device=device))
        step.optimizer.step(0)

    works: dict[str, Callable[[], Any]] = {
        "encode: product, top k": lambda: kernels.encode(
            rows, W_enc, b_enc, shape.k, "topk", b_dec, dtype
        ),
        "decode": lambda: kernels.decode(latents, W_dec),
        "gradient of activations": lambda: sampled_product(backend, rows, W_dec, indices),
        "sort by latent": lambda: ByLatent(backend, indices, shape.L)._sorted,
        "gradient of W_dec": lambda: by_latent.sum_rows(by_latent.sort(acts), rows),
        "gradient of W_enc": lambda: by_latent.sum_rows(by_latent.sort(acts), inputs),
        "moments": lambda: Moments.of(rows),
    }
    found = {name: median_ms(work, device, repeats) for name, work in works.items()}
    times = []
    for _ in range(repeats + 2):
        gradients()
        times.append(seconds(update, device))
    return found | {"update, unit norm": 1e3 * statistics.median(times[2:])}


def machine(device: str) -> dict[str, Any]:
    """Where and when this was measured."""
    commit = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    about = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    named = [line.partition(":")[2].strip() for line in about.splitlines() if "model name" in line]
    instructions = ("avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16")
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "cpu": (*named, "unknown")[0],
        "instructions": [name for name in instructions if name in about.split()],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": subprocess.run(commit, capture_output=True, text=True).stdout.strip(),
    }


def write(result: dict[str, Any], out: Path | None) -> None:
    """Write a result as JSON, where it is wanted."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(result, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in asdict(Shape()).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dead_share", type=float, default=0.3, help="dead latents, for AuxK")
    parser.add_argument("--matryoshka", type=float, nargs="+", default=(), help="time prefixes too")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--kernels", choices=get_args(KernelChoice), default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    shape = Shape(args.N, args.D, args.L, args.k)
    kernels = Kernels(args.kernels)
    made_by = kernels.describe(torch.device(args.device))
    result: dict[str, Any] = {"machine": machine(args.device), "shape": asdict(shape)}
    print(f"{shape}, {made_by}, on {result['machine']}")
    print(
        f"{'':9} {'product':>9} {'in place':>9} {'step':>9} {'ratios':>13} {'with AuxK / step':>17}"
    )
    for dtype in (torch.float32, torch.bfloat16):
        how = (shape, dtype, args.repeats, args.device)
        found = step_over_product(*how, args.dead_share, kernels, tuple(args.matryoshka))
        name = str(dtype).removeprefix("torch.")
        print(
            f"{name:9} {found['product_ms']:6.1f} ms {found['product_in_place_ms']:6.1f} ms "
            f"{found['step_ms']:6.1f} ms {found['ratio']:6.2f} {found['ratio_in_place']:6.2f} "
            f"{found.get('auxk_ratio', float('nan')):17.2f}"
        )
        if "prefixes_ratio" in found:
            print(f"    {'with prefixes / step':26} {found['prefixes_ratio']:7.2f}")
        found["parts_ms"] = parts(*how, kernels)
        for part, ms in found["parts_ms"].items():
            print(f"    {part:26} {ms:7.1f} ms")
        result[name] = found
    write(result, args.out)


if __name__ == "__main__":
    main()

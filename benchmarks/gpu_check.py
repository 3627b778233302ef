"""All that a machine with a GPU can show and no other can: one command, one table, one JSON.

    bash scripts/gpu_check.sh                  all but `run`
    bash scripts/gpu_check.sh --only run

kernels: every kernel in Triton beside the definition at real sizes, and twice for the same bits.
tests:   the tests marked gpu, and all of the kernels.
launch:  `accelerate launch` on one GPU and on all there are; a run killed and resumed, bit for bit.
steps:   a step beside its encoder's product and beside what its bytes allow (roofline.py).
run:     tokens/s and memory beside Sparsify's release (run.py).

A failure names the kernel, the shape and the largest difference; the exit code is then 1.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from roofline import GPUS, SHAPES, parts
from safetensors.torch import load_file
from step import Shape, Step, machine, median_ms, write
from step import parts as measured_parts
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from sae.coders import functional
from sae.kernels import dense_products
from sae.kernels.twins import Kernels

NARROW = (8192, 768, 24576, 32)
"""N, D, L, k of a small model, where the host is slower than the GPU."""
MS_FOR = {  # the parts that step.py times, and those of roofline.py that they are
    "encode: product, top k": ("product", "weights to bfloat16", "top k"),
    "decode": ("sum, error, their gradient",),
    "gradient of W_dec": ("gradient of W_dec",),
    "gradient of W_enc": ("gradient of W_enc",),
    "moments": ("moments",),
    "update, unit norm": ("gradients finished", "update"),
}


RUN = ["--device", "cuda", "--lm", "random", "--width", "4096", "--num_latents", "131072"]
RUN += ["--batch_size", "64", "--steps", "20", "--repeats", "1"]


class Report:
    """Lines of the table, and what failed."""

    def __init__(self) -> None:
        self.lines: dict[str, str] = {}
        self.failures: list[str] = []

    def line(self, what: str, found: str, passed: bool = True) -> None:
        """Note what was found, and whether it is as it should be."""
        self.lines[what] = found
        print(f"{what:64} {found}{'' if passed else '   FAILED'}", flush=True)
        if not passed:
            self.failures.append(f"{what}: {found}")


def difference(ours: Tensor, exact: Tensor) -> float:
    """||ours - exact|| / ||exact||, infinite where something is no number."""
    found = float((ours.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30))
    return found if found == found else float("inf")


def check_selection(report: Report) -> None:
    """The largest of every row, of equal ones the first, and what is kept of rows."""
    from sae.kernels.cuda.selection import keep_largest_, largest

    for n, width, k in (
        (1024, 131072, 32),
        (1024, 131072, 192),
        (64, 1 << 20, 64),
        (999, 39321, 2048),
    ):
        for dtype in (torch.bfloat16, torch.float32):
            values = torch.randn(n, width, device="cuda").to(dtype)
            order = values.float().sort(dim=1, descending=True, stable=True).indices[:, :k]
            expected = order.sort(dim=1).values
            top = torch.full((n, k), torch.nan, device="cuda")
            columns = torch.full((n, k), -1, device="cuda")
            largest(values, k, top, columns)
            kept = torch.zeros_like(values).scatter(1, expected, values.gather(1, expected).relu())
            wrong = int((columns != expected).sum() + (top != values.gather(1, expected)).sum())
            keep_largest_(values, k)
            wrong += int((values != kept).sum())
            report.line(f"top {k} of [{n} {width}], {dtype}", f"{wrong} entries differ", not wrong)


def step_tensors(
    ops: Any, tensors: list[Tensor], k: int, x: Tensor, dead: Tensor, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Errors of a coder with AuxK, and their gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    W_enc, b_enc, W_dec, bias, offset = leaves
    k_dead = functional.k_aux(x.shape[1])
    arguments = (x, W_enc, b_enc, k, "topk", bias, dtype, dead, k_dead)
    latents, of_dead = ops.encode_with_dead(*arguments)
    found = ops.reconstruct(latents, W_dec, offset, x, of_dead)
    (found.squared_error + found.dead_error / 32).backward()
    names = ("sae_out", "error", "AuxK", "W_enc", "b_enc", "W_dec", "bias", "offset")
    outputs = [found.sae_out, found.squared_error, found.dead_error]
    values = [t.detach() for t in outputs] + [t.grad for t in leaves if t.grad is not None]
    return dict(zip(names, values, strict=True))


def check_step(report: Report) -> None:
    """Encode, decode, errors, AuxK by entries and by dense products, and every gradient."""
    fast, pays = Kernels(), dense_products.pays
    for n, d, width, k in (
        (1024, 2304, 65536, 64),
        (777, 4096, 16384, 192),
        (1000, 768, 24576, 32),
        (3000, 768, 8192, 32),
    ):
        x, unit = (
            torch.randn(n, d, device="cuda"),
            F.normalize(torch.randn(width, d, device="cuda")),
        )
        bias, offset = torch.randn(2, d, device="cuda") / 10
        tensors = [unit + 0, torch.randn(width, device="cuda") / 10, unit, bias, offset]
        if n > 1024:  # active in more rows than are added up in one piece
            tensors[1][0] = 50.0
        dead = torch.randperm(width, device="cuda")[: width // 3].sort().values
        plain = step_tensors(functional, tensors, k, x, dead, None)
        for dense in (False, True):
            dense_products.pays = lambda *_, dense=dense: dense
            ours = step_tensors(fast, tensors, k, x, dead, torch.float32)
            again = step_tensors(fast, tensors, k, x, dead, torch.float32)
            far = {name: difference(ours[name], plain[name]) for name in plain}
            worst = max(far, key=lambda name: far[name])
            name = (
                f"step [{n} {d}], L = {width}, k = {k}, AuxK {'dense' if dense else 'by entries'}"
            )
            report.line(name, f"{far[worst]:.1e} in {worst}", far[worst] < 1e-5)
            same = all(torch.equal(ours[name], again[name]) for name in ours)
            report.line(f"{name}, twice", "the same bits" if same else "other bits", same)
            half = step_tensors(fast, tensors, k, x, dead, torch.bfloat16)
            rounded = difference(half["error"], plain["error"])
            shown = f"{rounded:.1e} in error"
            report.line(f"{name}, product in bfloat16", shown, rounded < 3e-3)
        dense_products.pays = pays
        del plain, ours, again, half
        torch.cuda.empty_cache()


def check_entries(report: Report) -> None:
    """Latents above thresholds, of which each row has a number of its own, and every gradient."""
    n, d, width = 2048, 2304, 16384
    x, W = torch.randn(n, d, device="cuda"), torch.randn(width, d, device="cuda")
    unit, offset = F.normalize(W), torch.randn(d, device="cuda") / 10
    # Between the 8th and the 9th largest, so that rounding moves none to the other side.
    ranked = (x.double() @ unit.double().T).topk(9, dim=0).values
    threshold = ranked[7:].mean(dim=0).float().clamp_min(1e-3)
    found = []
    for ops, dtype in ((functional, None), (Kernels(), torch.float32)):
        leaves = [t.clone().requires_grad_() for t in (unit, 0 * unit[:, 0], unit, offset)]
        latents = ops.encode_above(x, *leaves[:2], threshold, None, dtype)
        rebuilt = ops.reconstruct(latents, *leaves[2:], x)
        rebuilt.squared_error.backward()
        found.append([rebuilt.sae_out.detach(), *(t.grad for t in leaves if t.grad is not None)])
    far = max(difference(ours, plain) for plain, ours in zip(*found, strict=True))
    report.line(f"latents above thresholds, [{n} {d}], L = {width}", f"{far:.1e}", far < 1e-5)


def check_updates(report: Report) -> None:
    """Gradients finished, a step of signum, unit norms."""
    fast = Kernels()
    for shape in ((65536, 2304), (1000, 4097), (131072,)):
        y, z, grad = (torch.randn(shape, device="cuda") for _ in range(3))
        if y.ndim == 2:
            functional.normalize_rows_(y)
        found = []
        for ops in (fast, functional):
            mine = [y.clone(), z.clone(), grad.clone()]
            scale, matrix = torch.tensor(0.3, device="cuda"), y.ndim == 2
            square = ops.scale_and_project_(mine[2], scale, mine[0] if matrix else None)
            # Signs of what is almost 0 differ, so the step is taken along the plain gradient.
            ops.signum_step_(mine[0], mine[1], grad, 0.1, 0.95, 0.25, matrix)
            rows = grad.view(-1, shape[-1]).clone()
            ops.normalize_rows_(rows)
            found.append([*mine, square, rows])
        far = max(difference(a, b) for a, b in zip(*found, strict=True))
        report.line(f"update of {list(shape)}", f"{far:.1e}", far < 1e-5)


def kernels(report: Report) -> None:
    """Every kernel beside the definition, at real sizes."""
    check_selection(report)
    check_step(report)
    check_entries(report)
    check_updates(report)


def tests(report: Report) -> None:
    """The tests of the kernels, in Triton instead of its interpreter."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    command += [
        "tests/kernels/test_triton.py",
        "tests/kernels/test_twins.py",
        "-k",
        "triton or gpu",
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = (run.stdout.strip().splitlines() or ["nothing printed"])[-1]
    report.line("tests of the kernels", last, not run.returncode)
    if run.returncode:
        print(run.stdout[-3000:])


FLAGS = ["--hookpoints", "layers.1", "layers.3", "layers.4.mlp", "--ctx_len", "256"]
FLAGS += ["--batch_size", "16", "--max_examples", "1440", "--k", "32", "--auxk_alpha", "0.03125"]
FLAGS += ["--dead_feature_threshold", "50000", "--save_every", "20", "--eval_tokens", "65536"]
FLAGS += ["--lr_warmup", "10", "--optimizer", "adam", "--log_with", "none"]


def launched(
    config: str, folder: Path, name: str, *flags: str, until: Path | None = None
) -> dict[str, Any]:
    """Run the script by accelerate; return its summary. It is killed once `until` exists."""
    command = [shutil.which("accelerate") or "accelerate", "launch"]
    command += ["--config_file", str(ROOT / f"accelerate_configs/{config}.yaml")]
    if config == "8gpu":
        command += ["--num_processes", str(torch.cuda.device_count())]
    command += ["train_sae.py", "demo/lm", "demo/text/train.jsonl", *FLAGS, *flags]
    command += ["--save_dir", str(folder), "--run_name", name]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    while until is not None and not until.exists() and process.poll() is None:
        time.sleep(0.02)
    if until is not None:
        os.killpg(process.pid, signal.SIGKILL)
    out = process.communicate()[0]
    if until is not None:
        return {}
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}\n{out[-3000:]}")
    return json.loads((folder / name / "summary.json").read_text())


def launch(report: Report) -> None:
    """One GPU, killed and resumed; all GPUs: replicas, an owner for each coder, shared coders."""
    if not (ROOT / "demo/text/train.jsonl").exists():
        subprocess.run([sys.executable, "demo/make_text.py", "demo/text"], cwd=ROOT, check=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        whole = launched("1gpu", folder, "whole")
        fvu = {name: found["fvu"] for name, found in whole["hookpoints"].items()}
        shown = " ".join(f"{value:.4f}" for value in fvu.values())
        report.line("accelerate launch on one GPU, held-out FVU", shown, max(fvu.values()) < 0.5)
        launched("1gpu", folder, "killed", until=folder / "killed/step_20")
        launched("1gpu", folder, "killed", "--resume")
        same = [
            torch.equal(
                tensor, load_file(folder / "killed" / file.relative_to(folder / "whole"))[name]
            )
            for file in sorted((folder / "whole/step_90").rglob("sae.safetensors"))
            for name, tensor in load_file(file).items()
        ]
        found = f"{sum(same)} of {len(same)} tensors have the same bits"
        report.line("killed after step 20 and resumed", found, bool(same) and all(same))
        count = torch.cuda.device_count()
        for flags in ((), ("--distribute_modules",), ("--shard_latents",)) if count > 1 else ():
            several = launched("8gpu", folder, "-".join(["all", *flags]), *flags)
            fvu = {name: found["fvu"] for name, found in several["hookpoints"].items()}
            shown = " ".join(f"{value:.4f}" for value in fvu.values())
            report.line(
                f"{count} GPUs {' '.join(flags)}, held-out FVU", shown, max(fvu.values()) < 0.6
            )


def product_ms(step: Step) -> float:
    """The encoder's product alone, into memory that is there."""
    x, W = step.rows.bfloat16(), step.coder.encoder.weight.detach().bfloat16()
    there = x.new_empty(len(x), len(W))
    return median_ms(lambda: torch.mm(x, W.t(), out=there), "cuda", 7)


def steps(report: Report) -> dict[str, Any]:
    """A step in bfloat16 beside its product and its parts' bytes; with AuxK beside without."""
    results: dict[str, Any] = {}
    gpu = next((g for g in GPUS if g.name[:4] in torch.cuda.get_device_name()), GPUS[0])
    for n, d, latents, k in (*SHAPES, NARROW):
        shape = Shape(n, d, latents, k)
        torch.cuda.reset_peak_memory_stats()
        step = Step(shape, torch.bfloat16, "cuda")
        product = product_ms(step)
        alone = median_ms(step, "cuda", 7)
        peak = torch.cuda.max_memory_allocated() / 1e9
        step.dead = torch.arange(0, latents, 3, device="cuda")
        with_auxk = median_ms(step, "cuda", 7)
        del step
        torch.cuda.empty_cache()
        on_paper = {part.name: 1e3 * part.seconds(gpu) for part in parts(n, d, latents, k, gpu)}
        least = sum(on_paper.values())
        found: dict[str, Any] = {"product_ms": product, "step_ms": alone, "ratio": alone / product}
        found |= {"auxk_ratio": with_auxk / alone, "roofline_ms": least, "peak_gb": peak}
        name = f"N = {n}, D = {d}, L = {latents}, k = {k}"
        shown = (
            f"{alone:.1f} ms, product {product:.1f}: {alone / product:.2f}; on paper {least:.1f}"
        )
        report.line(name, f"{shown}; with AuxK {with_auxk / alone:.2f} times; {peak:.1f} GB")
        ms = measured_parts(shape, torch.bfloat16, 5, "cuda", Kernels())
        found["parts"] = {
            part: {"ms": ms[part], "roofline_ms": sum(on_paper[p] for p in theirs)}
            for part, theirs in MS_FOR.items()
        }
        results[name] = found
        torch.cuda.empty_cache()
    return results


def beside_sparsify(report: Report) -> dict[str, Any]:
    """Whole runs beside Sparsify's, which run.py installs for itself where there is a registry."""
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "run.json"
        command = [sys.executable, "benchmarks/run.py", *RUN, "--out", str(out)]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if run.returncode:
            missing = "pip" in run.stderr and "install" in run.stderr
            shown = "cannot be installed here" if missing else run.stderr.strip()[-300:]
            report.line("beside Sparsify", shown, missing)
            return {}
        found = json.loads(out.read_text())
    for what, target in found["random"]["targets"].items():
        report.line(f"beside Sparsify: {what}", f"{target['ratio']:.3f} times")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    sections: dict[str, Callable[[Report], Any]] = {
        "kernels": lambda r: (
            [check(r) for check in (check_selection, check_step, check_updates)] and None
        ),
        "launch": launch,
        "steps": steps,
        "tests": tests,
        "run": beside_sparsify,
    }
    most = [name for name in sections if name != "run"]  # which has a larger budget of its own
    parser.add_argument("--only", nargs="+", choices=sections, default=most)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/gpu.json")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: this needs a GPU that torch sees")
    torch.manual_seed(0)
    report, result = Report(), {"machine": machine("cuda")}
    for name in args.only:
        started = time.perf_counter()
        try:
            result[name] = sections[name](report)
        except Exception as error:  # is reported, and the other sections still run
            report.line(name, f"{type(error).__name__}: {error}", False)
        report.line(f"{name}: time", f"{time.perf_counter() - started:.0f} s")
        result |= {"checks": report.lines, "failures": report.failures}
        write(result, args.out)
    print("\n".join(["", *(f"FAILED {line}" for line in report.failures)]) or "all passed")
    sys.exit(bool(report.failures))


if __name__ == "__main__":
    main()

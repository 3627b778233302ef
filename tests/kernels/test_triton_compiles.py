"""Every Triton kernel compiles ahead of time, for the GPUs that runs are made on."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs tests/requirements.txt"
)
SCRIPT = Path(__file__).parent.parent / "kernel_launches.py"
# Registers that the programs on one multiprocessor share, and bytes of memory that one program can
# have: A100, H100, B200 (CUDA C++ Programming Guide, compute capabilities) and MI300X (CDNA 3 ISA).
LIMITS = {
    "sm_80": (65536, 163 * 1024),
    "sm_90": (65536, 227 * 1024),
    "sm_100": (65536, 227 * 1024),
    "gfx942": (131072, 64 * 1024),
}


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What the compilers say of the launches of training; compiled in a process of its own."""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_kernel_is_launched_in_training_and_compiles(found: dict[str, Any]) -> None:
    """Each kernel of the package is launched by the steps that are tried, and compiles for all."""
    assert len(found["kernels"]) >= 8
    for target in LIMITS:
        kernels = {report["kernel"] for report in found["reports"] if report["target"] == target}
        assert kernels == set(found["kernels"]), target


def test_kernels_keep_to_the_registers_and_memory_of_the_device(found: dict[str, Any]) -> None:
    """No kernel spills more registers than is known, and each fits on every device."""
    for report in found["reports"]:
        registers, shared = LIMITS[report["target"]]
        assert report["spilled"] == 0, report
        assert 0 < report["registers"] * report["threads"] <= registers, report
        assert report["shared"] <= shared, report


def test_what_a_step_moves_is_what_the_formulas_say() -> None:
    """Bytes counted of every operator and kernel, beside formulas; the documentation has both."""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT.parent.parent / "benchmarks/traffic.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    counted = re.findall(r"^ +sum +(\d+) +([\d.]+)$", done.stdout, re.M)
    needed = re.findall(r"roofline.py +([\d.]+)$", done.stdout, re.M)
    assert len(counted) == len(needed) == 3
    for (_, moved), least in zip(counted, needed, strict=True):
        assert 1 <= float(moved) / float(least) <= 1.05
    page = " ".join((SCRIPT.parent.parent / "docs/speed.md").read_text().split())
    for values in zip(*counted, strict=True):
        first, second, third = (f"{float(v):.1f}".removesuffix(".0") for v in values)
        assert f"{first}, {second} and {third} " in page


def test_kernels_compile_for_rows_in_float32_and_bfloat16(found: dict[str, Any]) -> None:
    """Rows in both dtypes that a run can have, with constants and widths of several kinds."""
    rows = {part for report in found["reports"] for part in report["launch"].split()}
    assert {"rows:float32", "rows:bfloat16", "UNIT=True", "UNIT=False", "width=100"} <= rows

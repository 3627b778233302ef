"""Launches of Triton kernels without a GPU: noted as training makes them, and compiled.

`python tests/kernel_launches.py` prints what the compilers report of every kernel. Tensors are on
PyTorch's meta device, where everything has a shape and nothing has values, so shapes can be those
of a large run. TRITON_INTERPRET must not be set: it replaces the kernels when they are defined.
"""

import io
import itertools
import json
import pkgutil
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, get_args
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import sae.kernels
from sae.coders.bank import CoderBank
from sae.coders.sparse_coder import SparseCoder
from sae.config import OptimizerName, SparseCoderConfig, TrainingConfig, Widths
from sae.kernels.backend import Backend
from sae.kernels.entries import Entries
from sae.training.losses import auxiliary_loss, divide_gradients_
from sae.training.optim import CoderOptimizer
from sae.training.schedules import Schedule
from sae.training.step_sums import StepSums

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Launch(NamedTuple):
    """What a kernel was given."""

    kernel: JITFunction
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    """Arguments by name, constants among them, and settings of the launch such as num_warps."""

    def describe(self) -> str:
        """The dtypes and constants, in words."""
        by_position = zip(self.kernel.arg_names, self.arguments, strict=False)
        named = {**dict(by_position), **self.options}
        return " ".join(
            f"{name}:{str(value.dtype).removeprefix('torch.')}"
            if isinstance(value, Tensor)
            else f"{name}={value}"
            for name, value in named.items()
        )


@contextmanager
def noted_launches() -> Iterator[list[Launch]]:
    """Inside, kernels are not run: what they would have been given is put into the list."""
    found: list[Launch] = []

    def note(kernel: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        most = (2**31 - 1, 65535, 65535)  # programs along each axis, on CUDA
        fits = all(0 <= size <= limit for size, limit in zip(grid, most, strict=False))
        assert fits, f"{_name(kernel)} is launched on a grid of {grid}"
        found.append(Launch(kernel, arguments, options))

    with patch.object(JITFunction, "run", note):
        yield found


def launched_kernels() -> dict[str, JITFunction]:
    """Every kernel of the package that is no part of another one, by its name."""
    kernels: dict[str, JITFunction] = {}
    for module in pkgutil.walk_packages(sae.kernels.__path__, "sae.kernels."):
        for value in vars(import_module(module.name)).values():
            if isinstance(value, JITFunction):
                kernels[_name(value)] = value
    inside = {
        id(part)
        for kernel in kernels.values()
        for name in kernel.fn.__code__.co_names
        if (part := kernel.fn.__globals__.get(name)) is not kernel
    }
    return {name: kernel for name, kernel in kernels.items() if id(kernel) not in inside}


def _name(kernel: JITFunction) -> str:
    return f"{kernel.fn.__module__.removeprefix('sae.kernels.')}.{kernel.fn.__name__}"


class _OnMeta(TorchDispatchMode):
    """What has no shape on the meta device is given one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.__name__.startswith("_fused_adam"):
            return None
        return func(*args, **kwargs)


def training_launches() -> list[Launch]:
    """Launches of steps of every kind of coder, in every dtype and with every optimizer.

    A new kind, dtype or optimizer goes into these lists; a kernel needs no mention.
    """
    kinds = {  # with the widths of their rows
        SparseCoderConfig(num_latents=131072, k=32): 4096,
        SparseCoderConfig(num_latents=65536, k=256, activation="groupmax"): 4096,
        SparseCoderConfig(num_latents=4096, k=1, multi_topk=True): 2304,
        SparseCoderConfig(num_latents=1000, k=5, transcode=True, skip_connection=True): 100,
    }
    dtypes, (largest, *_) = (torch.float32, torch.bfloat16), kinds
    fused = "torch.optim.optimizer._get_fused_kernels_supported_devices"
    in_triton = patch.object(Backend, "in_triton", lambda _, device: device.type == "meta")
    with noted_launches() as launches, _OnMeta(), in_triton, patch(fused, lambda: ["meta"]):
        for dtype, (cfg, width) in itertools.product(dtypes, kinds.items()):
            _step(cfg, dtype, width, "signum")
            _step(cfg, dtype, width, "signum", with_dead=True)
        for dtype, optimizer in itertools.product(dtypes, get_args(OptimizerName)):
            _step(largest, dtype, 4096, optimizer)
        _step(largest, torch.bfloat16, 4096, "signum", k=40960)  # as --k_decay_steps begins
        for dtype in dtypes:
            _entries(dtype)
    return launches


def _entries(dtype: torch.dtype) -> None:
    """What BatchTopK and JumpReLU coders launch, whose rows have active latents by their values."""
    indices = torch.empty(16384 * 32, dtype=torch.int64, device="meta")
    entries = Entries(Backend(), indices, torch.empty(16385, dtype=torch.int64, device="meta"), 9)
    rows, table = (torch.empty(n, 2304, dtype=dtype, device="meta") for n in (16384, 65536))
    entries.weighted_rows(torch.empty(16384 * 32, dtype=dtype, device="meta"), table)
    entries.sampled_product(rows, table)


def _step(
    cfg: SparseCoderConfig,
    dtype: torch.dtype,
    width: int,
    name: OptimizerName,
    *,
    with_dead: bool = False,
    k: int | None = None,
) -> None:
    coder = coder_on_meta(cfg, width, dtype)
    rows = torch.empty(16384, width, device="meta", dtype=dtype)
    dead = torch.empty(coder.num_latents // 4, dtype=torch.int64, device="meta")
    one_step(coder, rows, name, dead if with_dead else None, k)


def coder_on_meta(cfg: SparseCoderConfig, width: int, matmul_dtype: torch.dtype) -> SparseCoder:
    """A coder without values."""
    return CoderBank({"h": Widths(width, width)}, cfg, (0,), "meta", matmul_dtype)["h"]


def one_step(
    coder: SparseCoder,
    x: Tensor,
    name: OptimizerName,
    dead: Tensor | None = None,
    k: int | None = None,
) -> None:
    """A step of a fresh optimizer, and unit norms by themselves."""
    optimizer = CoderOptimizer(coder, Schedule(TrainingConfig(optimizer=name), 10, 1))
    step_with(optimizer, coder, x, dead, k)
    assert coder.W_dec is not None, "a coder in training has a decoder"
    coder.kernels.normalize_rows_(coder.W_dec)


def step_with(
    optimizer: CoderOptimizer,
    coder: SparseCoder,
    x: Tensor,
    dead: Tensor | None = None,
    k: int | None = None,
) -> None:
    """What the loop does for one coder: moments, errors, gradients, update with unit norms."""
    dtype = coder.matmul_dtype or torch.float32
    sums = StepSums(CoderBank.holding({"h": coder}, {"h": "h"}, coder.device, dtype))
    sums.add_rows("h", x, x)
    errors = coder.errors(x, x, dead, k)
    (errors.squared_error + auxiliary_loss(errors, 1 / 32)).backward()
    sums.add("h", errors)
    divide_gradients_(coder, sums.variance("h"))
    optimizer.step(0)


class Report(NamedTuple):
    """What a compiler says of a kernel for one device."""

    kernel: str
    launch: str
    target: str
    threads: int
    registers: int
    """Of a thread."""
    spilled: int
    """What found no place in registers: bytes, on AMD's devices registers."""
    shared: int
    """Bytes of memory that the threads of a program share."""


def compiled(launches: list[Launch], target: str) -> list[Report]:
    """Compile kernels as they would be for these launches on another machine, each once."""
    names = list(TARGETS)
    driver: Any = SimpleNamespace(  # all that is asked of a driver before a kernel is loaded
        get_current_device=lambda: names.index(target),
        get_current_stream=lambda device: 0,
        get_current_target=lambda: TARGETS[target],
    )
    triton.runtime.driver.set_active(driver)
    reports: dict[int, Report] = {}
    for kernel, arguments, options in launches:
        log = io.StringIO()
        with redirect_stdout(log):
            done = kernel.run(*arguments, grid=(1,), warmup=True, **options)
        if id(done) in reports:  # Triton has kept it from an earlier launch
            continue
        if target.startswith("sm_"):
            said = log.getvalue()
            registers = int(re.findall(r"Used (\d+) registers", said)[-1])
            spilled = sum(map(int, re.findall(r"(\d+) bytes spill", said)))
        else:
            said = done.asm["amdgcn"]
            registers = int(re.findall(r"\.vgpr_count:\s+(\d+)", said)[-1])
            spilled = sum(map(int, re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", said)))
        threads = done.metadata.num_warps * TARGETS[target].warp_size
        launch = Launch(kernel, arguments, options).describe()
        figures = (threads, registers, spilled, done.metadata.shared)
        reports[id(done)] = Report(_name(kernel), launch, target, *figures)
    return list(reports.values())


def main() -> None:
    """Print, as JSON, the kernels that are launched and every compiler's reports of them."""
    warnings.filterwarnings("ignore", "TRITON_DEFAULT_FP_FUSION")
    launches = training_launches()
    knobs.nvidia.dump_ptxas_log = True
    with tempfile.TemporaryDirectory() as folder:  # what is kept from an earlier run has no report
        knobs.cache.dir = folder
        reports = [r._asdict() for target in TARGETS for r in compiled(launches, target)]
    print(json.dumps({"kernels": sorted(launched_kernels()), "reports": reports}, indent=1))


if __name__ == "__main__":
    main()

"""Bytes and multiplications of every operator and kernel of a step, counted without a GPU.

    python benchmarks/traffic.py

A step runs on PyTorch's meta device, where tensors have shapes and no values, and is watched: an
operator reads what it is given and writes what it returns, once each, and a Triton kernel moves its
arguments once, but for tables whose rows it gathers: these once per entry, where the columns that
programs work on at one time do not fit into the L2 cache. `roofline.py` says by formulas what a
step needs; this says what it moves, and how often something is launched. Needs Triton, no GPU.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from benchmarks.roofline import GPUS, SHAPES, Gpu, Part, parts

# Of a kernel's arguments the table whose rows it gathers, and what says how many: one per entry.
GATHERED = {
    "_weighted_rows": ("table", "indices"),
    "_reconstruct": ("table", "indices"),
    "_sampled_product": ("table", "indices"),
    "_products_of_entries": ("table", "indices"),
    "_short_sums": ("rows", "entry_rows"),
}
# Which arguments a kernel both reads and writes.
CHANGED = {
    "_scale_and_project": ("grad",),
    "_signum_step": ("y_all", "z_all"),
    "_normalize_rows": ("rows",),
    "_keep_largest": ("values",),
}
ALLOCATES = ("empty", "new_empty", "empty_like", "empty_strided")
WRITES_ALONE = ("copy_", "fill_", "zero_", "zeros", "new_zeros", "zeros_like", "full", "arange")
GATHERS = ("index", "index_select", "gather", "take")


class Moved(NamedTuple):
    """What one operator or kernel moved and computed in a step."""

    times: int
    bytes: float
    flops: float

    def seconds(self, gpu: Gpu) -> float:
        """The least that it takes."""
        return Part("", self.bytes, self.flops, False).seconds(gpu)


class Traffic(TorchDispatchMode):
    """Inside, `moved` says of every operator and kernel what it moved and computed."""

    def __init__(self, gpu: Gpu) -> None:
        super().__init__()
        self.gpu, self.moved = gpu, dict[str, Moved]()

    def note(self, name: str, moved: float, flops: float) -> None:
        """Add one operator or launch."""
        known = self.moved.get(name, Moved(0, 0, 0))
        self.moved[name] = Moved(known.times + 1, known.bytes + moved, known.flops + flops)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.__name__.split(".")[0]
        if name.startswith("_fused_adam"):  # has no shapes on the meta device
            params, grads, means, squares = args[:4]
            changed = sum(size(t) for group in (params, means, squares) for t in group)
            return self.note("adam", 2 * changed + sum(map(size, grads)), 0)
        found = func(*args, **kwargs)
        returned = func._schema.returns
        alias = returned[0].alias_info if returned else None
        if name in ALLOCATES or (alias is not None and not alias.is_write):
            return found
        into = kwargs.get("out")
        given = {id(t): t for t in tree_leaves((args, kwargs)) if on_meta(t) and t is not into}
        written = [t for t in tree_leaves(found) if on_meta(t)]
        if not given and not written:
            return found
        read = 0.0 if name in WRITES_ALONE else sum(map(size, given.values()))
        if name == "copy_":
            read = size(args[1]) if on_meta(args[1]) else 0
        elif name in GATHERS:
            read = sum(map(size, written)) + sum(
                size(t) for t in tree_leaves(args[1:]) if on_meta(t)
            )
        count = flop_registry.get(func._overloadpacket)
        flops = float(count(*args, **kwargs, out_val=found)) if count else 0.0
        self.note(name, read + sum(map(size, written)), flops)
        return found

    def launch(self, kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Add the launch of a Triton kernel."""
        name = kernel.fn.__name__
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | options
        once = {id(t): n for n, t in reversed(named.items()) if isinstance(t, Tensor)}
        tensors = {n: named[n] for n in once.values()}  # one that is given twice counts once
        moved, flops = {n: float(size(t)) for n, t in tensors.items()}, 0.0
        for changed in CHANGED.get(name, ()):
            moved[changed] *= 2
        if name == "_sum_of_pieces":  # writes the few rows that were cut
            moved["out"] = min(moved["out"], moved["partial"])
        if name == "_select_largest" and named["GROUP"] > 1:  # looks into the best groups alone
            looked_at = tensors["chosen"].numel() * named["GROUP"]
            moved["source"] = float(looked_at * tensors["source"].element_size())
        if name in GATHERED:
            table, by = GATHERED[name]
            entries, width = tensors[by].numel(), tensors[table].shape[-1]
            at_once = size(tensors[table]) * min(1, named["BLOCK"] / width)
            if name in ("_reconstruct", "_sampled_product", "_products_of_entries"):
                at_once = size(tensors[table])  # such a program goes through all columns
            if at_once > self.gpu.l2_bytes:
                moved[table] = float(entries * width * tensors[table].element_size())
            flops = (4.0 if name == "_reconstruct" else 2.0) * entries * width
        self.note(name, sum(moved.values()), flops)


def on_meta(value: Any) -> bool:
    """Whether this is a tensor that stands for one on the GPU."""
    return isinstance(value, Tensor) and value.device.type == "meta"


def size(tensor: Tensor) -> int:
    """The bytes of a tensor in memory: an expanded one lies there once."""
    lengths = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(n if stride else 1 for n, stride in lengths) * tensor.element_size()


@contextmanager
def watched(gpu: Gpu) -> Iterator[Traffic]:
    """Inside, a step on the meta device is counted."""
    from triton.runtime.jit import JITFunction

    from sae.kernels.backend import Backend

    traffic = Traffic(gpu)

    def note(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        traffic.launch(kernel, arguments, options)

    fused = "torch.optim.optimizer._get_fused_kernels_supported_devices"
    in_triton = patch.object(Backend, "in_triton", lambda _, device: device.type == "meta")
    with patch.object(JITFunction, "run", note), in_triton, patch(fused, lambda: ["meta"]):
        yield traffic


def step_traffic(n: int, d: int, latents: int, k: int, gpu: Gpu = GPUS[0]) -> dict[str, Moved]:
    """What a TopK SAE's step in bfloat16 with signum moves, by operator and kernel."""
    from kernel_launches import coder_on_meta, step_with

    from sae.config import SparseCoderConfig, TrainingConfig
    from sae.training.optim import CoderOptimizer
    from sae.training.schedules import Schedule

    with watched(gpu) as traffic:
        coder = coder_on_meta(SparseCoderConfig(num_latents=latents, k=k), d, torch.bfloat16)
        optimizer = CoderOptimizer(coder, Schedule(TrainingConfig(optimizer="signum"), 10, 1))
        rows = torch.empty(n, d, device="meta")
        step_with(optimizer, coder, rows)  # which makes the optimizer's state
        coder.zero_grad(set_to_none=True)
        traffic.moved.clear()
        with traffic:
            step_with(optimizer, coder, rows)
    return traffic.moved


def main() -> None:
    gpu = GPUS[0]
    for shape in SHAPES:
        found = step_traffic(*shape, gpu)
        print(f"{gpu.name}, N = {shape[0]}, D = {shape[1]}, L = {shape[2]}, k = {shape[3]}")
        print(f"    {'':32} {'times':>6} {'GB':>8} {'TFLOP':>8} {'ms':>8}")
        for name, moved in sorted(found.items(), key=lambda item: -item[1].seconds(gpu)):
            ms = 1e3 * moved.seconds(gpu)
            if ms >= 0.01:
                print(
                    f"    {name:32} {moved.times:6} {moved.bytes / 1e9:8.2f} "
                    f"{moved.flops / 1e12:8.2f} {ms:8.2f}"
                )
        total = sum(moved.seconds(gpu) for moved in found.values())
        needed = sum(part.seconds(gpu) for part in parts(*shape, gpu))
        times = sum(moved.times for moved in found.values())
        print(f"    {'sum':32} {times:6} {'':17} {1e3 * total:8.2f}")
        print(f"    {'by the formulas of roofline.py':32} {'':24} {1e3 * needed:8.2f}\n")


if __name__ == "__main__":
    main()

"""The frozen LM's linear layers on processors for which PyTorch picks a slow library."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


def fast_linear_layers() -> AbstractContextManager[Any]:
    """Inside, a forward without gradients multiplies in float32 by oneDNN, where that is faster.

    In float32 PyTorch asks MKL, whose products took 1.6 to 2.2 times as long on an AMD EPYC with
    AVX-512 as those of oneDNN, which PyTorch holds as well; on other processors that is not known.
    Sums are the same but for their order. What torch.compile traces, it multiplies as it likes.
    """
    return _InOneDnn() if mkl_is_slow() else nullcontext()


@cache
def mkl_is_slow() -> bool:
    """Whether oneDNN is known to be faster on this processor."""
    cpu = Path("/proc/cpuinfo")
    about = cpu.read_text().split() if cpu.exists() else []
    # What compiled models call; the public way copies inputs and outputs to a layout and back.
    there = hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return there and "AuthenticAMD" in about and "avx512f" in about


class _InOneDnn(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        quiet = not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if func is F.linear and not kwargs and quiet:
            x, weight, bias = args if len(args) == 3 else (*args, None)
            if _plain(x) and _plain(weight) and x.numel():
                return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return func(*args, **(kwargs or {}))


def _plain(tensor: Tensor) -> bool:
    """Whether it is float32 on the CPU, and no subclass with products of its own."""
    known = type(tensor) in (Tensor, nn.Parameter)
    return known and tensor.dtype == torch.float32 and tensor.device.type == "cpu"

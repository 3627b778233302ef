"""The frozen LM's linear layers on processors for which PyTorch picks a slow library."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .backend import in_pytorch


def fast_linear_layers() -> AbstractContextManager[Any]:
    """Inside, a forward without gradients multiplies in float32 by oneDNN, where that is faster.

    In float32 PyTorch asks MKL, which does not use the 512-bit registers of AMD's processors: its
    products there take 1.6 to 2.2 times as long as those of oneDNN, which PyTorch holds as well.
    Sums are the same but for their order.
    """
    return nullcontext() if in_pytorch() or not _mkl_is_slow() else _InOneDnn()


@cache
def _mkl_is_slow() -> bool:
    cpu = Path("/proc/cpuinfo")
    amd = cpu.exists() and "AuthenticAMD" in cpu.read_text()
    # What compiled models call; the public way copies inputs and outputs to a layout and back.
    return amd and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class _InOneDnn(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.linear and not kwargs and not torch.is_grad_enabled():
            x, weight, bias = args if len(args) == 3 else (*args, None)
            if x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and x.numel():
                return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return func(*args, **(kwargs or {}))

"""Which kernels run: C on the CPU, Triton on CUDA, or PyTorch's operators."""

from functools import cache
from importlib import import_module
from typing import Literal

import torch
from torch import Tensor

from . import native
from .config import UsageError

Choice = Literal["auto", "torch", "native", "int8"]
_choice: Choice = "auto"


def choose(choice: Choice, device: torch.device) -> str:
    """Set from now on what computes selections, sparse sums and updates, and say it in words.

    `native` is C on the CPU and Triton (for sums and updates) on CUDA, `torch` PyTorch's operators,
    `auto` native where it can be had. The numbers are the same but for the order of sums. `int8` is
    C that looks for the top k in int8, as `functional.encode_in_int8` does. Raises UsageError where
    `native` or `int8` cannot be had; then nothing has changed.
    """
    global _choice
    in_words = _in_words(choice, device)
    _choice = choice
    return in_words


def _in_words(choice: Choice, device: torch.device) -> str:
    if choice == "int8":
        if device.type != "cpu" or not native.searches(torch.int8):
            raise UsageError(
                "--kernels int8: needs a C compiler and a CPU with AVX-512 VNNI; use auto"
            )
        return "C; the top k is searched for in int8"
    if choice != "torch" and device.type == "cpu" and native.library() is not None:
        kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        searched = [name for name, kind in kinds.items() if native.searches(kind)]
        if searched:
            return f"C, {' and '.join(searched)} products too"
        return "C for all but the products"
    if choice != "torch" and device.type == "cuda" and _has_triton():
        return "PyTorch's operators for the selection, Triton for the sums and updates"
    if choice == "native":
        raise UsageError(
            "--kernels native: needs a C compiler on the CPU, Triton on CUDA; use auto or torch"
        )
    return "PyTorch's operators"


@cache
def _has_triton() -> bool:
    try:
        import_module("triton")
    except ImportError:
        return False
    return True


def in_c(*tensors: Tensor, table: Tensor | None = None) -> bool:
    """Whether what is done with these tensors is done in C; a table may be bfloat16."""
    return _choice != "torch" and native.serves(*tensors, table=table)


def in_pytorch() -> bool:
    """Whether PyTorch's own operators were asked for."""
    return _choice == "torch"


def in_int8() -> bool:
    """Whether active latents are searched for in int8."""
    return _choice == "int8"


def in_triton(device: torch.device) -> bool:
    """Whether what is done on this device is done in Triton."""
    return _choice != "torch" and device.type == "cuda" and _has_triton()

"""Which code computes: C on the CPU, Triton on CUDA, or PyTorch's operators."""

from dataclasses import dataclass
from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from ..config import KernelChoice
from ..flag_checks import UsageError
from .cpu import compiled, native


@dataclass(frozen=True)
class Backend:
    """What computes selections, sparse products and updates.

    `native` is C on the CPU and Triton (for products and updates) on CUDA, `torch` PyTorch's
    operators, `auto` native where it can be had. The numbers are the same but for the order of
    sums. `int8` is C that looks for the top k in int8, as `functional.encode_in_int8` does.
    """

    choice: KernelChoice = "auto"
    dense: bool | None = None
    """Whether AuxK is dense products; None: where these are faster than entries."""

    def describe(self, device: torch.device) -> str:
        """What runs on the device, in words. Raises UsageError where the choice cannot be had."""
        if self.choice == "int8":
            if device.type != "cpu" or not native.searches(torch.int8):
                raise UsageError(
                    "--kernels int8: needs a C compiler and a CPU with AVX-512 VNNI; use auto"
                )
            return "C; the top k is searched for in int8"
        if self.choice != "torch" and device.type == "cpu" and compiled.library() is not None:
            kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16}
            searched = [name for name, kind in kinds.items() if native.searches(kind)]
            if searched:
                return f"C, {' and '.join(searched)} products too"
            return "C for all but the products"
        if self.in_triton(device):
            return "Triton, and cuBLAS for the encoder's product"
        if self.choice == "native":
            raise UsageError(
                "--kernels native: needs a C compiler on the CPU, Triton on CUDA; use auto or torch"
            )
        return "PyTorch's operators"

    def in_c(self, *tensors: Tensor, table: Tensor | None = None) -> bool:
        """Whether what is done with these tensors is done in C; a table may be bfloat16."""
        return self.choice != "torch" and native.serves(*tensors, table=table)

    @property
    def in_int8(self) -> bool:
        """Whether active latents are searched for in int8."""
        return self.choice == "int8"

    def in_triton(self, device: torch.device) -> bool:
        """Whether what is done on this device is done in Triton."""
        return self.choice != "torch" and device.type == "cuda" and _has_triton()


@cache
def _has_triton() -> bool:
    try:
        import_module("triton")
    except ImportError:
        return False
    return True

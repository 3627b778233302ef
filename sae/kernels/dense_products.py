"""Products over all of some latents, where so many of them are active that entries cost more."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..config import DENSE_WEIGHTS
from .backend import Backend

# Bytes that a gathered entry moves weigh as much as the multiplications of so many latents: at
# 2.5 TB/s and, of the H100, 50 TFLOP/s in float32 and 700 in bfloat16.
_LATENTS_PER_ENTRY = {torch.float32: 40, torch.bfloat16: 500, torch.float16: 500}


def pays(backend: Backend, rows: Tensor, dtype: torch.dtype, k: int, latents: int) -> bool:
    """Whether k of so many latents per row are better summed by dense products than by entries.

    `dtype`: that of the factors.
    """
    if not backend.in_triton(rows.device) or len(rows) * latents > DENSE_WEIGHTS:
        return False
    return latents <= _LATENTS_PER_ENTRY.get(dtype, 0) * k


def wide_product(a: Float[Tensor, "A B"], b: Float[Tensor, "B C"]) -> Float[Tensor, "A C"]:
    """a b in float32, from factors of fewer bits on CUDA, where sums are float32 anyway."""
    if a.dtype in (torch.bfloat16, torch.float16) and a.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a, b).float() if a.dtype != torch.float64 else torch.mm(a, b)


ALIGNED = 64
"""Latents of dense products are padded to a multiple of it: CUDA's fast products want it so."""


class AllOf:
    """The latents numbered by `latents`, of which any may be active: weights are dense, [N P].

    P is M rounded up to a multiple of `ALIGNED`; the last P - M columns are 0. The methods are
    those of `sparse_products.ByLatent`. Weights and factors are of one dtype.
    """

    def __init__(self, latents: Int[Tensor, " M"], num_latents: int, dtype: torch.dtype) -> None:
        self.latents, self.num_latents, self.dtype = latents, num_latents, dtype

    @staticmethod
    def padded(latents: int) -> int:
        """Columns of weights for so many latents."""
        return -(-latents // ALIGNED) * ALIGNED

    def weighted_rows(
        self, weights: Float[Tensor, "N P"], table: Float[Tensor, "L D"]
    ) -> Float[Tensor, "N D"]:
        """out_n = sum_m weights_nm table[latents_m]."""
        return wide_product(weights, self._rows_of(table))

    def sampled_product(
        self, rows: Float[Tensor, "N D"], table: Float[Tensor, "L D"]
    ) -> Float[Tensor, "N P"]:
        """out_nm = <rows_n, table[latents_m]>."""
        return rows.to(self.dtype) @ self._rows_of(table).T

    def of_entries(self, values: Float[Tensor, " L"]) -> Float[Tensor, " P"]:
        """out_m = values[latents_m], of every row."""
        missing = self.padded(len(self.latents)) - len(self.latents)
        return F.pad(values[self.latents], (0, missing))

    def sort(self, weights: Float[Tensor, "N P"]) -> Float[Tensor, "N P"]:
        """The weights as they are: there are no entries to put into order."""
        return weights

    def sum(self, weights: Float[Tensor, "N P"]) -> Float[Tensor, " L"]:
        """out_l = sum of the weights of latent l over rows."""
        total = weights.sum(0, dtype=torch.float32)[: len(self.latents)]
        return total.new_zeros(self.num_latents).index_copy_(0, self.latents, total)

    def sum_rows(
        self,
        weights: Float[Tensor, "N P"],
        rows: Float[Tensor, "N D"],
        add_to: Float[Tensor, "L D"] | None = None,
    ) -> Float[Tensor, "L D"]:
        """out_l = sum_n weights_nl rows_n; written over `add_to`, and added to it, if given."""
        total = wide_product(weights.T, rows.to(self.dtype))[: len(self.latents)]
        if add_to is None:
            add_to = total.new_zeros(self.num_latents, rows.shape[1])
        return add_to.index_add_(0, self.latents, total)

    def _rows_of(self, table: Float[Tensor, "L D"]) -> Float[Tensor, "P D"]:
        count = len(self.latents)
        rows = table.new_zeros(self.padded(count), table.shape[1], dtype=self.dtype)
        rows[:count] = table[self.latents]
        return rows


class Linear(torch.autograd.Function):
    """x W^T in float32 from factors in `dtype`, and so its gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, dtype: torch.dtype) -> Tensor:
        """x [N D] and W [D_out D] to [N D_out]."""
        x, W = x.to(dtype), W.to(dtype)
        ctx.save_for_backward(x, W)
        return wide_product(x, W.mT)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Those of x and of W."""
        x, W = ctx.saved_tensors
        grad = grad.to(x.dtype)
        d_x = wide_product(grad, W) if ctx.needs_input_grad[0] else None
        d_W = wide_product(grad.mT, x) if ctx.needs_input_grad[1] else None
        return d_x, d_W, None

"""What a coder's sparse latents leave of dense products, by Triton, C, or PyTorch.

Every sum has a fixed order, so a step repeats bit for bit.
"""

import warnings
from functools import cached_property
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .backend import Backend
from .cpu import native

# The sampled product goes through a CSR tensor, which warns of its beta state at first use.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support")


def _triton(backend: Backend, device: torch.device) -> ModuleType | None:
    if not backend.in_triton(device):
        return None
    from .cuda import sparse_products  # there is no Triton where there is no GPU

    return sparse_products


def weighted_rows(backend: Backend, weights: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """out_n = sum_j weights_nj table[indices_nj], [N D]."""
    if triton := _triton(backend, table.device):
        return triton.weighted_rows(weights, indices, table)
    if backend.in_c(weights, table):
        n, k = indices.shape
        starts = torch.arange(0, n * k + 1, k, dtype=torch.int32)
        columns = indices.flatten().int()
        return native.sum_rows(starts, columns, weights.contiguous(), table.contiguous())
    return F.embedding_bag(indices.int(), table, per_sample_weights=weights, mode="sum")


def sampled_product(backend: Backend, rows: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    """out_nj = <rows_n, table[indices_nj]>, [N K]."""
    if triton := _triton(backend, table.device):
        return triton.sampled_product(rows, table, indices)
    if backend.in_c(rows, table):
        return native.sampled_product(rows.contiguous(), indices, table.contiguous())
    n, k = indices.shape
    wide = torch.float32 if rows.dtype in (torch.bfloat16, torch.float16) else rows.dtype
    pattern = torch.sparse_csr_tensor(
        torch.arange(0, n * k + 1, k, device=rows.device),
        indices.flatten(),
        rows.new_zeros(n * k, dtype=wide),
        size=(n, len(table)),
        check_invariants=False,
    )
    product = torch.sparse.sampled_addmm(
        pattern, rows.contiguous().to(wide), table.to(wide).t(), beta=0.0
    )
    return product.values().view(n, k).to(rows.dtype)


class _Sorted(NamedTuple):
    """Entries in the order of their latents."""

    starts: Int[Tensor, " L+1"]
    """Where each latent's entries start."""
    order: Int[Tensor, " E"]
    """The entries' places in `top_indices`."""
    rows: Int[Tensor, " E"]
    """The entries' rows."""


class ByLatent:
    """The entries of `top_indices` by latent, the order in which gradients are summed.

    They are sorted when it is first asked for, and once: the gradients of encoder and decoder
    share one such object.
    """

    def __init__(self, backend: Backend, top_indices: Int[Tensor, "N K"], num_latents: int) -> None:
        self.backend, self.indices, self.num_latents = backend, top_indices, num_latents

    @cached_property
    def _sorted(self) -> _Sorted:
        indices = self.indices
        if indices.device.type == "cpu" and self.backend.in_c():
            return _Sorted(*native.sort_by_column(indices, self.num_latents))
        flat = indices.flatten()
        narrow = torch.int16 if self.num_latents <= 2**15 else torch.int32  # sorts faster
        order = torch.sort(flat.to(narrow), stable=True).indices
        counts = torch.bincount(flat, minlength=self.num_latents)
        starts = F.pad(counts.cumsum(0), (1, 0)).int()
        return _Sorted(starts, order, (order // indices.shape[1]).int())

    @cached_property
    def _counts(self) -> Int[Tensor, " L"]:
        return self._sorted.starts.diff().long()

    def sort(self, values: Float[Tensor, "N K"]) -> Float[Tensor, " E"]:
        """The entries' values in that order."""
        order = self._sorted.order
        if order.dtype == torch.int32 and self.backend.in_c(values):
            return native.take(values.contiguous(), order)
        return values.flatten()[order]

    def sum(self, values: Float[Tensor, " E"]) -> Float[Tensor, " L"]:
        """out_l = sum of sorted values over the entries of latent l."""
        return torch.segment_reduce(values, "sum", lengths=self._counts, unsafe=True, initial=0)

    def sum_rows(
        self,
        weights: Float[Tensor, " E"],
        rows: Float[Tensor, "N D"],
        add_to: Float[Tensor, "L D"] | None = None,
    ) -> Float[Tensor, "L D"]:
        """out_l = sum of weights_e rows_{n(e)} over the sorted entries e of latent l.

        In the dtype of `weights`; written over `add_to`, and added to it, where that is given.
        """
        starts, _, entry_rows = self._sorted
        if triton := _triton(self.backend, rows.device):
            total = triton.sum_by_latent(
                weights.to(rows.dtype), entry_rows, starts, self._counts, rows
            )
        elif self.backend.in_c(weights, table=rows):
            return native.sum_rows(starts, entry_rows, weights, rows, add_to)
        else:
            total = F.embedding_bag(
                entry_rows,
                rows,
                starts,
                per_sample_weights=weights.to(rows.dtype),
                mode="sum",
                include_last_offset=True,
            )
        total = total.to(weights.dtype)
        return total if add_to is None else add_to.add_(total)

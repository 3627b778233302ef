"""What a coder's sparse latents leave of dense products, by Triton, C, or PyTorch.

Every sum has a fixed order, so a step repeats bit for bit.
"""

import functools
import warnings
from functools import cached_property
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .backend import Backend
from .cpu import native

_DOT = 2**30  # elements of one torch.dot, which takes less than 2^31
# The sampled product goes through a CSR tensor, which warns of its beta state at first use.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support")


def _triton(backend: Backend, device: torch.device) -> ModuleType | None:
    if not backend.in_triton(device):
        return None
    from .cuda import sparse_products  # there is no Triton where there is no GPU

    return sparse_products


class Reconstructed(NamedTuple):
    """What `reconstruct` returns."""

    sae_out: Float[Tensor, "N D"]
    difference: Float[Tensor, "N D"]
    """sae_out - y."""
    products: Float[Tensor, "N K"] | None
    """<difference_n, table[indices_nj]>, where they come for free."""
    squared_error: Float[Tensor, ""]


def reconstruct(
    order: "ByLatent", weights: Tensor, table: Tensor, offset: Tensor, y: Tensor
) -> Reconstructed:
    """sae_out_n = sum_j weights_nj table[indices_nj] + offset_n, beside y."""
    triton, indices = _triton(order.backend, table.device), order.indices
    if triton and indices.ndim == 2 and 0 < indices.shape[1] <= triton.MOST_AT_ONCE:
        found = triton.reconstruct(weights, indices, table, offset, y)
        sae_out, difference, products, squares = found
        return Reconstructed(sae_out, difference, products, squares.sum())
    sae_out = order.weighted_rows(weights, table).add_(offset)
    difference = sae_out - y
    return Reconstructed(sae_out, difference, None, square_sum(difference))


def square_sum(rows: Tensor) -> Tensor:
    """The sum of squares, at least in float32."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    blocks = wide.flatten().split(_DOT)
    return functools.reduce(torch.add, (torch.dot(block, block) for block in blocks))


def weighted_rows(backend: Backend, weights: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """out_n = sum_j weights_nj table[indices_nj], [N D]."""
    if triton := _triton(backend, table.device):
        return triton.weighted_rows(weights, indices, table)
    if backend.in_c(weights, table):
        n, k = indices.shape
        starts = torch.arange(n + 1, dtype=torch.int32) * k
        columns = indices.flatten().int()
        return native.sum_rows(starts, columns, weights.contiguous(), table.contiguous())
    if not indices.shape[1]:  # which PyTorch does not take
        return table.new_zeros(len(indices), table.shape[1])
    return F.embedding_bag(indices.int(), table, per_sample_weights=weights, mode="sum")


def sampled_product(backend: Backend, rows: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    """out_nj = <rows_n, table[indices_nj]>, [N K]."""
    if triton := _triton(backend, table.device):
        return triton.sampled_product(rows, table, indices)
    if backend.in_c(rows, table):
        return native.sampled_product(rows.contiguous(), indices, table.contiguous())
    n, k = indices.shape
    starts = torch.arange(n + 1, device=rows.device) * k
    return sampled_product_by_rows(rows, table, indices.flatten(), starts).view(n, k)


def weighted_entries(
    backend: Backend,
    weights: Float[Tensor, " E"],
    indices: Int[Tensor, " E"],
    starts: Int[Tensor, " N+1"],
    table: Float[Tensor, "L D"],
) -> Float[Tensor, "N D"]:
    """out_n = sum of weights_e table[indices_e] over the entries e of row n."""
    if triton := _triton(backend, table.device):
        counts = starts.diff()
        pieces = triton.cut(counts, len(indices))
        return triton.sum_by_latent(weights, indices, starts, counts, pieces, table)
    if backend.in_c(weights, table):
        where = starts.int(), indices.int()
        return native.sum_rows(*where, weights.contiguous(), table.contiguous())
    return F.embedding_bag(
        indices, table, starts, per_sample_weights=weights, mode="sum", include_last_offset=True
    )


def products_of_entries(
    backend: Backend,
    rows: Float[Tensor, "N D"],
    table: Float[Tensor, "L D"],
    indices: Int[Tensor, " E"],
    starts: Int[Tensor, " N+1"],
) -> Float[Tensor, " E"]:
    """out_e = <rows_n, table[indices_e]> of the entries e of row n."""
    if triton := _triton(backend, table.device):
        entry_rows = row_of_entry(starts, len(indices))
        return triton.products_of_entries(rows, table, entry_rows, indices)
    if backend.in_c(rows, table):
        return native.sampled_product(rows.contiguous(), indices, table.contiguous(), starts)
    return sampled_product_by_rows(rows, table, indices, starts)


def row_of_entry(starts: Int[Tensor, " N+1"], entries: int) -> Int[Tensor, " E"]:
    """The row of every entry."""
    rows = torch.arange(len(starts) - 1, dtype=torch.int32, device=starts.device)
    return rows.repeat_interleave(starts.diff(), output_size=entries)


def sampled_product_by_rows(
    rows: Float[Tensor, "N D"],
    table: Float[Tensor, "L D"],
    indices: Int[Tensor, " E"],
    starts: Int[Tensor, " N+1"],
) -> Float[Tensor, " E"]:
    """out_e = <rows_n, table[indices_e]> of the entries e of row n, by PyTorch."""
    wide = torch.float32 if rows.dtype in (torch.bfloat16, torch.float16) else rows.dtype
    pattern = torch.sparse_csr_tensor(
        starts,
        indices,
        rows.new_zeros(len(indices), dtype=wide),
        size=(len(rows), len(table)),
        check_invariants=False,
    )
    product = torch.sparse.sampled_addmm(
        pattern, rows.contiguous().to(wide), table.to(wide).t(), beta=0.0
    )
    return product.values().to(rows.dtype)


class Sorted(NamedTuple):
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

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.indices)

    def rows(self) -> Int[Tensor, " E"]:
        """The row of every entry."""
        rows = torch.arange(self.num_rows, dtype=torch.int32, device=self.indices.device)
        return rows.repeat_interleave(self.indices.shape[1])

    @cached_property
    def _sorted(self) -> Sorted:
        return self._sorted_entries(self.indices)

    def _sorted_entries(self, indices: Int[Tensor, "N K"]) -> Sorted:
        if indices.device.type == "cpu" and self.backend.in_c():
            return Sorted(*native.sort_by_column(indices, self.num_latents))
        flat = indices.flatten()
        narrow = torch.int16 if self.num_latents <= 2**15 else torch.int32  # sorts faster
        in_order, order = torch.sort(flat.to(narrow), stable=True)
        # Counting them with bincount would ask the device how many there are.
        latents = torch.arange(self.num_latents, dtype=narrow, device=flat.device)
        starts = F.pad(torch.searchsorted(in_order, latents, right=True, out_int32=True), (1, 0))
        return Sorted(starts, order, (order // indices.shape[1]).int())

    @cached_property
    def _counts(self) -> Int[Tensor, " L"]:
        return self._sorted.starts.diff().long()

    @cached_property
    def _pieces(self) -> Any:
        triton = _triton(self.backend, self.indices.device)
        return triton.cut(self._counts, self.indices.numel()) if triton else None

    def weighted_rows(
        self, weights: Float[Tensor, "N K"], table: Float[Tensor, "L D"]
    ) -> Float[Tensor, "N D"]:
        """out_n = sum_j weights_nj table[indices_nj]."""
        return weighted_rows(self.backend, weights, self.indices, table)

    def sampled_product(
        self, rows: Float[Tensor, "N D"], table: Float[Tensor, "L D"]
    ) -> Float[Tensor, "N K"]:
        """out_nj = <rows_n, table[indices_nj]>."""
        return sampled_product(self.backend, rows, table, self.indices)

    def of_entries(self, values: Float[Tensor, " L"]) -> Float[Tensor, "N K"]:
        """out_nj = values[indices_nj]."""
        return values[self.indices]

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
            where = (entry_rows, starts, self._counts, self._pieces)
            return triton.sum_by_latent(weights, *where, rows, add_to)
        if self.backend.in_c(weights, table=rows):
            return native.sum_rows(starts, entry_rows, weights, rows, add_to)
        total = F.embedding_bag(
            entry_rows,
            rows.to(weights.dtype),
            starts,
            per_sample_weights=weights,
            mode="sum",
            include_last_offset=True,
        )
        return total if add_to is None else add_to.add_(total)

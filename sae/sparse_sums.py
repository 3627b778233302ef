"""The sums that a coder's sparse latents leave of dense products, by Triton, C, or PyTorch.

Every sum has a fixed order, so a step repeats bit for bit.
"""

import warnings
from types import ModuleType

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from . import native
from .backend import in_c, in_triton

# The sampled product goes through a CSR tensor, which warns of its beta state at first use.
warnings.filterwarnings("ignore", message="Sparse CSR tensor support")


def _triton(device: torch.device) -> ModuleType | None:
    if not in_triton(device):
        return None
    from . import triton_kernels  # there is no Triton where there is no GPU

    return triton_kernels


def weighted_rows(weights: Tensor, indices: Tensor, table: Tensor) -> Tensor:
    """out_n = sum_j weights_nj table[indices_nj], [N D]."""
    if sums := _triton(table.device):
        return sums.weighted_rows(weights, indices, table)
    if in_c(weights, table):
        n, k = indices.shape
        starts = torch.arange(0, n * k + 1, k, dtype=torch.int32)
        columns = indices.flatten().int()
        return native.sum_rows(starts, columns, weights.contiguous(), table.contiguous())
    return F.embedding_bag(indices.int(), table, per_sample_weights=weights, mode="sum")


def sampled_product(rows: Tensor, table: Tensor, indices: Tensor) -> Tensor:
    """out_nj = <rows_n, table[indices_nj]>, [N K]."""
    if sums := _triton(table.device):
        return sums.sampled_product(rows, table, indices)
    if in_c(rows, table):
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


class ByLatent:
    """The entries of `top_indices` sorted by latent, the order in which gradients are summed."""

    # Encoder and decoder gradients of one forward share one sort.
    _sorted = WeakTensorKeyDictionary()

    def __init__(self, top_indices: Tensor, num_latents: int) -> None:
        if in_c() and top_indices.device.type == "cpu":
            found = native.sort_by_column(top_indices, num_latents)
            self.starts, self.order, self.rows = found
        else:
            flat = top_indices.flatten()
            narrow = torch.int16 if num_latents <= 2**15 else torch.int32  # sorts faster
            self.order = torch.sort(flat.to(narrow), stable=True).indices
            counts = torch.bincount(flat, minlength=num_latents)
            self.starts = F.pad(counts.cumsum(0), (1, 0)).int()
            self.rows = (self.order // top_indices.shape[1]).int()
        self.counts = self.starts.diff().long()

    @classmethod
    def of(cls, top_indices: Tensor, num_latents: int) -> "ByLatent":
        """The order of this very tensor, made only once."""
        found = cls._sorted.get(top_indices)
        if found is None or len(found.counts) != num_latents:
            found = cls._sorted[top_indices] = cls(top_indices, num_latents)
        return found

    def sort(self, values: Float[Tensor, "N K"]) -> Float[Tensor, " E"]:
        """The entries' values in that order."""
        if self.order.dtype == torch.int32 and in_c(values):
            return native.take(values.contiguous(), self.order)
        return values.flatten()[self.order]

    def sum(self, values: Float[Tensor, " E"]) -> Float[Tensor, " L"]:
        """out_l = sum of sorted values over the entries of latent l."""
        return torch.segment_reduce(values, "sum", lengths=self.counts, unsafe=True, initial=0)

    def sum_rows(
        self,
        weights: Float[Tensor, " E"],
        rows: Float[Tensor, "N D"],
        add_to: Float[Tensor, "L D"] | None = None,
    ) -> Float[Tensor, "L D"]:
        """out_l = sum of weights_e rows_{n(e)} over the sorted entries e of latent l.

        In the dtype of `weights`; written over `add_to`, and added to it, where that is given.
        """
        if sums := _triton(rows.device):
            total = sums.sum_by_latent(
                weights.to(rows.dtype), self.rows, self.starts, self.counts, rows
            )
        elif in_c(weights, table=rows):
            return native.sum_rows(self.starts, self.rows, weights, rows, add_to)
        else:
            total = F.embedding_bag(
                self.rows,
                rows,
                self.starts,
                per_sample_weights=weights.to(rows.dtype),
                mode="sum",
                include_last_offset=True,
            )
        total = total.to(weights.dtype)
        return total if add_to is None else add_to.add_(total)

"""Active latents where every row has a number of them of its own: entries, row after row."""

from functools import cached_property

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from .backend import Backend
from .cpu import native
from .selection import chunk_rows
from .sparse_products import ByLatent, Sorted, sampled_product_by_rows


class Entries(ByLatent):
    """`ByLatent` of entries [E]: those of row n lie from starts_n to starts_{n+1}."""

    def __init__(
        self,
        backend: Backend,
        indices: Int[Tensor, " E"],
        starts: Int[Tensor, " N+1"],
        num_latents: int,
    ) -> None:
        super().__init__(backend, indices, num_latents)
        self.starts = starts

    @cached_property
    def _sorted(self) -> Sorted:
        starts, order, _ = self._sorted_entries(self.indices.unsqueeze(1))
        return Sorted(starts, order, self.rows()[order.long()])

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.starts) - 1

    def rows(self) -> Int[Tensor, " E"]:
        """The row of every entry."""
        rows = torch.arange(self.num_rows, dtype=torch.int32, device=self.indices.device)
        return rows.repeat_interleave(self.starts.diff(), output_size=len(self.indices))

    def weighted_rows(
        self, weights: Float[Tensor, " E"], table: Float[Tensor, "L D"]
    ) -> Float[Tensor, "N D"]:
        """out_n = sum of weights_e table[indices_e] over the entries e of row n."""
        if self.backend.in_c(weights, table):
            where = self.starts.int(), self.indices.int()
            return native.sum_rows(*where, weights.contiguous(), table.contiguous())
        return F.embedding_bag(
            self.indices,
            table,
            self.starts,
            per_sample_weights=weights,
            mode="sum",
            include_last_offset=True,
        )

    def sampled_product(
        self, rows: Float[Tensor, "N D"], table: Float[Tensor, "L D"]
    ) -> Float[Tensor, " E"]:
        """out_e = <rows_n, table[indices_e]> of the entries e of row n."""
        if self.backend.in_c(rows, table):
            where = self.indices, table.contiguous(), self.starts
            return native.sampled_product(rows.contiguous(), *where)
        return sampled_product_by_rows(rows, table, self.indices, self.starts)


def entries_above(
    backend: Backend,
    inputs: Float[Tensor, "N D"],
    W_enc: Float[Tensor, "L D"],
    b_enc: Float[Tensor, " L"],
    threshold: Float[Tensor, " L"],
) -> tuple[Float[Tensor, " E"], Entries]:
    """The active latents of `functional.encode_above`, in the dtype of W_enc.

    The dtype of `inputs` is the precision of the product. A GPU is asked how many they are.
    """
    W, bias = W_enc.to(inputs.dtype), b_enc.to(inputs.dtype)
    least = threshold.clamp(min=0)
    acts, indices, lengths = [W_enc.new_empty(0)], [], []
    for rows in inputs.split(chunk_rows(inputs, len(W))):
        pre_acts = torch.addmm(bias, rows, W.t())
        active = pre_acts > least
        lengths.append(active.sum(1))
        found = active.flatten().nonzero().squeeze(1)
        indices.append(found % len(W))
        acts.append(pre_acts.flatten()[found].to(W_enc.dtype))
    starts = F.pad(torch.cat(lengths).cumsum(0), (1, 0))
    return torch.cat(acts), Entries(backend, torch.cat(indices), starts, len(W))


def largest_in_groups(
    top_acts: Float[Tensor, "N M"], top_indices: Int[Tensor, "N M"], k: int, group: int, whole: bool
) -> tuple[Float[Tensor, " E"], Int[Tensor, " E"], Int[Tensor, " N+1"]] | None:
    """Of the M largest latents of each row those that `functional.encode_in_groups` finds.

    None where a row may have more of them than M; `whole`: M is all. A GPU is asked how many.
    """
    top_indices, order = top_indices.sort(1)  # equal ones are taken in this order
    top_acts = top_acts.gather(1, order)
    kept = torch.zeros_like(top_acts, dtype=torch.bool)
    for acts, chosen in zip(top_acts.split(group), kept.split(group), strict=True):
        if not len(acts):
            break
        flat = acts.flatten()
        wanted = min(k * len(acts), flat.numel())
        level = flat.topk(wanted).values.amin()
        if not whole and bool(((acts.amin(1) >= level) & (acts.amin(1) > 0)).any()):
            return None
        above, equal = flat > level, (flat == level) & (flat > 0)
        first = equal.cumsum(0) <= wanted - above.sum()
        chosen.copy_((above | (equal & first)).view_as(acts))
    starts = F.pad(kept.sum(1).cumsum(0), (1, 0))
    return top_acts[kept], top_indices[kept], starts


def in_rows(
    acts: Tensor, indices: Tensor, starts: Int[Tensor, " N+1"] | None
) -> tuple[Float[Tensor, "N K"], Int[Tensor, "N K"]]:
    """Entries as rows of the longest one's length, the rest zeros of latent 0.

    Without `starts` they are rows already.
    """
    if starts is None:
        return acts, indices
    lengths = starts.diff()
    places = torch.arange(int(lengths.max()) if len(lengths) else 0, device=acts.device)
    there = places < lengths.unsqueeze(1)
    rows = acts.new_zeros(there.shape), indices.new_zeros(there.shape)
    return rows[0].masked_scatter(there, acts), rows[1].masked_scatter(there, indices)

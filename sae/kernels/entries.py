"""Active latents where every row has a number of them of its own: entries, row after row."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .backend import Backend
from .cpu import native
from .selection import chunk_rows
from .sparse_products import ByLatent, Sorted, products_of_entries, row_of_entry, weighted_entries


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
        return Sorted(starts, order, self.rows().index_select(0, order))

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.starts) - 1

    def rows(self) -> Int[Tensor, " E"]:
        """The row of every entry."""
        return row_of_entry(self.starts, len(self.indices))

    def weighted_rows(
        self, weights: Float[Tensor, " E"], table: Float[Tensor, "L D"]
    ) -> Float[Tensor, "N D"]:
        """out_n = sum of weights_e table[indices_e] over the entries e of row n."""
        return weighted_entries(self.backend, weights, self.indices, self.starts, table)

    def sampled_product(
        self, rows: Float[Tensor, "N D"], table: Float[Tensor, "L D"]
    ) -> Float[Tensor, " E"]:
        """out_e = <rows_n, table[indices_e]> of the entries e of row n."""
        return products_of_entries(self.backend, rows, table, self.indices, self.starts)


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
    acts, indices, lengths = [W_enc.new_empty(0)], [], []
    for found in _above(inputs, W_enc, b_enc, threshold.clamp(min=0)):
        acts.append(found.values.to(W_enc.dtype))
        indices.append(found.latents)
        lengths.append(found.lengths)
    starts = F.pad(torch.cat(lengths).cumsum(0), (1, 0))
    return torch.cat(acts), Entries(backend, torch.cat(indices), starts, len(W_enc))


class _Chunk(NamedTuple):
    """What is above its latent's level in some rows."""

    values: Float[Tensor, " E"]
    latents: Int[Tensor, " E"]
    lengths: Int[Tensor, " N"]


def _above(
    inputs: Float[Tensor, "N D"],
    W_enc: Float[Tensor, "L D"],
    b_enc: Float[Tensor, " L"],
    least: Float[Tensor, " L"],
) -> Iterator[_Chunk]:
    """Pre-activations above `least`, of some rows after others; a GPU is asked how many."""
    W, bias = W_enc.to(inputs.dtype), b_enc.to(inputs.dtype)
    buffer = native.in_huge_pages(inputs.new_empty(chunk_rows(inputs, len(W)), len(W)))
    for rows in inputs.split(len(buffer)):
        pre_acts = torch.addmm(bias, rows, W.t(), out=buffer[: len(rows)]).flatten()
        found = (pre_acts.view(-1, len(W)) > least).flatten().nonzero().squeeze(1)
        ends = torch.arange(0, len(pre_acts) + 1, len(W), device=found.device)
        yield _Chunk(pre_acts[found], found % len(W), torch.searchsorted(found, ends).diff())


class Around(Entries):
    """`Entries` of `entries_around`: active latents, and others that are near their thresholds."""

    near: Bool[Tensor, " E"]
    """Which are less than half the bandwidth from the threshold."""
    counts: Int[Tensor, " L"]
    """How many rows are near the threshold of each latent."""


def entries_around(
    backend: Backend,
    inputs: Float[Tensor, "N D"],
    W_enc: Float[Tensor, "L D"],
    b_enc: Float[Tensor, " L"],
    threshold: Float[Tensor, " L"],
    bandwidth: float,
    most: int,
) -> tuple[Float[Tensor, " E"], Around]:
    """The latents of `functional.encode_jumping`, in the dtype of W_enc.

    The dtype of `inputs` is the precision of the product. A GPU is asked how many they are.
    """
    counts = torch.zeros_like(threshold, dtype=torch.int64)
    acts, indices, nears, lengths = [W_enc.new_empty(0)], [], [], []
    for found in _above(inputs, W_enc, b_enc, threshold - bandwidth / 2):
        values, latents, length = found
        above = values.to(W_enc.dtype) - threshold[latents]
        near = above.abs() < bandwidth / 2
        counts.scatter_add_(0, latents, near.long())
        if len(values) > most and int(length.amax()) > most:
            kept = _farthest(above, length, most)
            values, latents, above, near = (t[kept] for t in (values, latents, above, near))
            length = length.clamp(max=most)
        active = (above > 0) & (values > 0)
        acts.append(values.where(active, 0).to(W_enc.dtype))
        indices.append(latents)
        nears.append(near)
        lengths.append(length)
    starts = F.pad(torch.cat(lengths).cumsum(0), (1, 0))
    entries = Around(backend, torch.cat(indices), starts, len(W_enc))
    entries.near, entries.counts = torch.cat(nears), counts
    return torch.cat(acts), entries


def _farthest(
    above: Float[Tensor, " E"], lengths: Int[Tensor, " N"], most: int
) -> Int[Tensor, " K"]:
    """Of each row's entries the `most` largest, of equal ones the first, in their order."""
    rows = torch.arange(len(lengths), device=above.device).repeat_interleave(lengths)
    by_size = above.argsort(descending=True, stable=True)
    order = by_size[rows[by_size].argsort(stable=True)]  # row after row, the largest first
    starts = lengths.cumsum(0) - lengths
    place = torch.arange(len(above), device=above.device) - starts[rows]
    return order[place < most].sort().values


def group_of_rows(groups: list[int], device: torch.device) -> Int[Tensor, " N"]:
    """The number of each row's group, where they have so many rows."""
    numbers = torch.arange(len(groups), device=device)
    return numbers.repeat_interleave(_sizes(groups, device), output_size=sum(groups))


def _sizes(groups: list[int], device: torch.device) -> Int[Tensor, " G"]:
    sizes = torch.tensor(groups, dtype=torch.int64)
    pinned = sizes.pin_memory() if device.type == "cuda" else sizes  # so that no copy is waited for
    return pinned.to(device, non_blocking=True)


def largest_in_groups(
    top_acts: Float[Tensor, "N M"],
    top_indices: Int[Tensor, "N M"],
    k: int,
    groups: list[int],
    whole: bool,
) -> tuple[Float[Tensor, " E"], Int[Tensor, " E"], Int[Tensor, " N+1"]] | None:
    """Of the M largest latents of each row those that `functional.encode_in_groups` finds.

    None where a row may have more of them than M; `whole`: M is all. A GPU is asked once whether
    that is so, and how many they are.
    """
    top_indices, order = top_indices.sort(1)  # equal ones are taken in this order
    top_acts, device = top_acts.gather(1, order), top_acts.device
    longest, of_row = max(groups, default=0), group_of_rows(groups, device)
    if not longest:
        return top_acts.flatten(), top_indices.flatten(), top_indices.new_zeros(1)
    sizes = _sizes(groups, device)
    first = (sizes.cumsum(0) - sizes)[of_row]  # row of the group of each row
    padded = top_acts.new_zeros(len(groups), longest, top_acts.shape[1])
    padded[of_row, torch.arange(len(of_row), device=device) - first] = top_acts
    wanted = k * sizes
    largest = padded.flatten(1).topk(k * longest).values
    level = largest.gather(1, (wanted - 1).clamp(min=0).unsqueeze(1))[of_row]  # [N 1]
    least = top_acts.amin(1, keepdim=True)
    missed = ((least >= level) & (least > 0)).sum()

    def before(counts: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
        """Of a count by row the sum over the rows before it in its group."""
        sums = F.pad(counts.cumsum(0), (1, 0))
        return sums[:-1] - sums[first]

    above, equal = top_acts > level, (top_acts == level) & (top_acts > 0)
    room = wanted.index_add(0, of_row, -above.sum(1))[of_row]
    taken = before(equal.sum(1)).unsqueeze(1) + equal.cumsum(1)
    kept = above | (equal & (taken <= room.unsqueeze(1)))
    missing, size = torch.stack([missed, kept.sum()]).tolist()
    if missing and not whole:
        return None
    found = kept.flatten().nonzero_static(size=size).squeeze(1)
    starts = F.pad(kept.sum(1).cumsum(0), (1, 0))
    return top_acts.flatten()[found], top_indices.flatten()[found], starts


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


def row_starts(latents: Any) -> Int[Tensor, " N+1"] | None:
    """Where the latents of each row start, of rows with a number of their own."""
    order = getattr(latents, "by_latent", None)  # those of the specification have none
    return order.starts if isinstance(order, Entries) else None

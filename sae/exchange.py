"""Which rank owns which hookpoint, and the rows that travel to their owners."""

import json
import zlib
from collections.abc import Iterable, Iterator
from functools import reduce
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from .config import UsageError
from .hookpoints import Hookpoint
from .ranks import Ranks

T = TypeVar("T")
Pairs = dict[str, tuple[Float[Tensor, "N D"], Float[Tensor, "N D_out"]]]
"""Hookpoint -> (input rows, target rows); an SAE's two are one tensor."""


class Exchange:
    """The owner table of a run, and what it means for rows and for sums.

    Distributed modules: a coder lives on the rank that owns its hookpoint, which gets the rows of
    all ranks. Otherwise every rank trains a replica of every coder on its own rows, sums are taken
    over ranks, and the owner is the one that writes the coder to disk.
    """

    def __init__(
        self, ranks: Ranks, costs: dict[str, int], distributed: bool, fixed: tuple[str, ...] = ()
    ) -> None:
        """`costs` of the hookpoints, and those placed by hand, as `read_plan` reads them."""
        owner = plan(costs, ranks.world, read_plan(fixed))
        ranks.same({f"--layer_to_rank of {place}": rank for place, rank in owner.items()})
        self.ranks, self.owner = ranks, owner
        self.distributed = distributed and ranks.world > 1

    def here(self, hookpoints: list[Hookpoint]) -> list[Hookpoint]:
        """Those of the hookpoints whose coders this rank trains."""
        return [h for h in hookpoints if not self.distributed or self.writes(h.name)]

    def writes(self, place: str) -> bool:
        """Whether this rank writes the coders of a hookpoint to disk."""
        return self.owner[place] == self.ranks.rank

    def sum_replicas_(self, *tensors: Tensor) -> None:
        """Sum tensors in place over ranks where coders are replicas; an only owner has the sum."""
        if not self.distributed:
            self.ranks.sum_(tensors)

    def merge(self, by_coder: dict[str, T]) -> dict[str, T]:
        """What the ranks know of the coders they train, in one dictionary of all coders."""
        return self.ranks.merge(by_coder) if self.distributed else by_coder

    def to_owners(self, pairs: Pairs) -> Pairs:
        """Of the hookpoints trained here, the rows of all ranks that see them, in rank order.

        Distributed modules: one all-to-all of uneven splits carries every row to its owner and
        nowhere else, in the dtype it was captured in. Otherwise a rank keeps its own rows.
        """
        if not self.distributed:
            return pairs
        ranks, me = self.ranks, self.ranks.rank
        counts = self._row_counts(pairs)
        dtype = reduce(torch.promote_types, (t.dtype for pair in pairs.values() for t in pair))
        parts: list[list[Tensor]] = [[] for _ in range(ranks.world)]
        for place, pair in pairs.items():
            parts[self.owner[place]] += [t.to(dtype) for t in _distinct(pair)]
        mine, parts[me] = parts[me], []  # what stays here does not travel
        sent = torch.cat([t.flatten() for part in parts for t in part] or [_nothing(mine)])
        width = sum(t.shape[1] for t in mine)
        sizes = [0 if rank == me else n * width for rank, n in enumerate(counts)]
        received = sent.new_empty(sum(sizes))
        dist.all_to_all_single(received, sent, sizes, [sum(t.numel() for t in p) for p in parts])
        ranks.count_bytes(sent.nbytes, received.nbytes)

        arrived: list[list[Tensor]] = []
        for rank, (n, chunk) in enumerate(zip(counts, received.split(sizes), strict=True)):
            if rank == me:
                arrived.append(mine)
                continue
            widths = [t.shape[1] for t in mine]
            blocks = chunk.split([n * width for width in widths])
            arrived.append([b.view(n, w) for b, w in zip(blocks, widths, strict=True)])
        whole: Iterator[Tensor] = (torch.cat(rows) for rows in zip(*arrived, strict=True))
        owned: Pairs = {}
        for place in filter(self.writes, pairs):
            tensors = [next(whole) for _ in _distinct(pairs[place])]
            owned[place] = (tensors[0], tensors[-1])
        return owned

    def _row_counts(self, pairs: Pairs) -> list[int]:
        """Rows on every rank, which must mean the same tensors: gloo would mix them in silence."""
        layout = [(place, *(t.shape[1] for t in _distinct(pair))) for place, pair in pairs.items()]
        digest = zlib.crc32(repr(layout).encode())
        rows = len(next(iter(pairs.values()))[1])
        found = [divmod(n, 1 << 32) for n in self.ranks.gather((rows << 32) + digest)]
        assert all(theirs == digest for _, theirs in found), "ranks captured different tensors"
        return [n for n, _ in found]


def no_rows(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The pair with its rows dropped; one tensor twice stays one tensor twice."""
    empty = pair[1][:0]
    return (empty if pair[0] is pair[1] else pair[0][:0], empty)


def _distinct(pair: tuple[Tensor, Tensor]) -> list[Tensor]:
    return [pair[1]] if pair[0] is pair[1] else list(pair)


def _nothing(like: list[Tensor]) -> Tensor:
    return like[0].new_empty(0)


def plan(costs: dict[str, int], world: int, fixed: dict[str, int] | None = None) -> dict[str, int]:
    """Hookpoint -> owning rank: the heaviest first, each onto the rank with the least so far.

    `fixed` places some by hand. Raises UsageError for one that names no hookpoint or no rank.
    """
    owner = dict(fixed or {})
    for place, rank in owner.items():
        if place not in costs:
            raise UsageError(
                f"--layer_to_rank {place}={rank}: no coder is trained there; the hookpoints are "
                f"{', '.join(costs)}"
            )
        if not 0 <= rank < world:
            raise UsageError(
                f"--layer_to_rank {place}={rank}: there are {world} ranks, 0 to {world - 1}"
            )
    load = [sum(costs[p] for p, r in owner.items() if r == rank) for rank in range(world)]
    for place in sorted((p for p in costs if p not in owner), key=lambda p: -costs[p]):
        owner[place] = load.index(min(load))
        load[owner[place]] += costs[place]
    return {place: owner[place] for place in costs}


def read_plan(items: Iterable[str]) -> dict[str, int]:
    """`layers.0=0 layers.1=1`, or the path of a JSON file `{"layers.0": 0}`, as a dictionary."""
    items = tuple(items)
    if len(items) == 1 and items[0].endswith(".json"):
        try:
            found = json.loads(Path(items[0]).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"--layer_to_rank {items[0]}: cannot be read ({error})") from None
        pairs = list(found.items()) if isinstance(found, dict) else [(items[0], None)]
    else:
        pairs = [(name, rank) for name, _, rank in (item.rpartition("=") for item in items)]
    fixed: dict[str, int] = {}
    for name, rank in pairs:
        if not name or name in fixed or not str(rank).isdecimal():
            raise UsageError(
                f"--layer_to_rank {' '.join(items)}: give each hookpoint one rank, as in "
                f"layers.0=0 layers.1=1, or a .json file with such an object"
            )
        fixed[name] = int(str(rank))
    return fixed

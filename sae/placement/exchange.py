"""Which ranks own which hookpoint, and the rows that travel to their owners."""

import zlib
from collections.abc import Iterator
from functools import reduce
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..lm.capture import Pairs
from .groups import Mail, connect_groups
from .owners import plan_owners, read_owners, shown
from .ranks import Ranks

T = TypeVar("T")
K = TypeVar("K")


class Exchange:
    """The owner table of a run, and what it means for rows and for sums.

    Distributed modules: a coder lives on the rank that owns its hookpoint, or in parts on several,
    and each of these gets the rows of all ranks. Otherwise every rank trains a replica of every
    coder on its own rows, sums are taken over ranks, and the owner is the one that writes the coder
    to disk.
    """

    def __init__(
        self,
        ranks: Ranks,
        costs: dict[str, int],
        distributed: bool,
        fixed: tuple[str, ...] = (),
        ranks_per_coder: int = 1,
    ) -> None:
        """`costs` of the hookpoints, and a `Placement`, of which the rest are the fields."""
        owner = plan_owners(costs, ranks.world, read_owners(fixed), ranks_per_coder)
        ranks.same({f"--layer_to_rank of {name}": shown(them) for name, them in owner.items()})
        self.ranks, self.owner = ranks, owner
        self.distributed = distributed and ranks.world > 1
        self.groups = connect_groups(owner, ranks)
        """By hookpoint the ranks that hold its coders together, of those that this rank holds."""
        first = {name: them.start for name, them in owner.items()}
        self.post = Mail(ranks, first) if self.distributed else None
        """What coders of different hookpoints tell each other, where different ranks have them."""
        if any(len(them) > 1 for them in owner.values()):
            spread = spread_over_machines(owner, ranks.machines())
            for line in spread if ranks.main else ():
                print(line)

    def trained_here(self, by_hookpoint: dict[str, T]) -> dict[str, T]:
        """Of a dictionary by hookpoint, those whose coders this rank trains."""
        here = by_hookpoint.items()
        return {name: value for name, value in here if not self.distributed or self.owns(name)}

    def owns(self, hookpoint: str) -> bool:
        """Whether this rank writes the coders of a hookpoint to disk, or its part of them."""
        return self.ranks.rank in self.owner[hookpoint]

    def sum_replicas_(self, *tensors: Tensor) -> None:
        """Sum tensors in place over ranks where coders are replicas; an only owner has the sum."""
        if not self.distributed:
            self.ranks.sum_(tensors)

    def of_readers(self, values: list[int]) -> list[list[int]]:
        """As many values of each rank whose rows are trained on here, in rank order."""
        return self.ranks.gather_all(values) if self.distributed else [values]

    def merge(self, by_coder: dict[str, T]) -> dict[str, T]:
        """What the ranks know of the coders they train, in one dictionary of all coders."""
        return self.ranks.merge(by_coder) if self.distributed else by_coder

    def to_owners(self, hands: list[Pairs]) -> list[Pairs]:
        """Of the hookpoints trained here, the rows of all ranks that see them, in rank order.

        `hands` are the rows for different steps, and stay apart. Distributed modules: one
        all-to-all of uneven splits carries every row to its owners and nowhere else, in the dtype
        it was captured in. Otherwise a rank keeps its own rows.
        """
        if not self.distributed:
            return hands
        pairs = {(n, name): pair for n, hand in enumerate(hands) for name, pair in hand.items()}
        ranks, me = self.ranks, self.ranks.rank
        counts = self._row_counts(pairs)
        dtype = reduce(torch.promote_types, (t.dtype for pair in pairs.values() for t in pair))
        parts: list[list[Tensor]] = [[] for _ in range(ranks.world)]
        for (_, hookpoint), pair in pairs.items():
            rows = [t.to(dtype) for t in _distinct(pair)]
            for rank in self.owner[hookpoint]:
                parts[rank] += rows
        mine, parts[me] = parts[me], []  # what stays here does not travel
        sent = torch.cat([t.flatten() for part in parts for t in part] or [_nothing(mine)])
        owned = {key: _distinct(pair) for key, pair in pairs.items() if self.owns(key[1])}
        shapes = [[(n[key], t.shape[1]) for key, ts in owned.items() for t in ts] for n in counts]
        sizes = [sum(n * width for n, width in shape) for shape in shapes]
        sizes[me] = 0
        received = sent.new_empty(sum(sizes))
        dist.all_to_all_single(received, sent, sizes, [sum(t.numel() for t in p) for p in parts])
        ranks.count_bytes(sent.nbytes, received.nbytes)

        arrived: list[list[Tensor]] = []
        for rank, (shape, chunk) in enumerate(zip(shapes, received.split(sizes), strict=True)):
            if rank == me:
                arrived.append(mine)
                continue
            blocks = chunk.split([n * width for n, width in shape])
            arrived.append([b.view(size) for b, size in zip(blocks, shape, strict=True)])
        whole: Iterator[Tensor] = (torch.cat(rows) for rows in zip(*arrived, strict=True))
        found: list[Pairs] = [{} for _ in hands]
        for (n, hookpoint), pair in owned.items():
            tensors = [next(whole) for _ in pair]
            found[n][hookpoint] = (tensors[0], tensors[-1])
        return found

    def _row_counts(self, pairs: dict[K, tuple[Tensor, Tensor]]) -> list[dict[K, int]]:
        """Rows of each hookpoint and step on every rank.

        Ranks must mean the same tensors: gloo would mix them in silence.
        """
        layout = [(name, *(t.shape[1] for t in _distinct(pair))) for name, pair in pairs.items()]
        digest = zlib.crc32(repr(layout).encode())
        found = self.ranks.gather_all([digest, *(len(y) for _, y in pairs.values())])
        assert all(theirs == digest for theirs, *_ in found), "ranks captured different tensors"
        return [dict(zip(pairs, counts, strict=True)) for _, *counts in found]


def spread_over_machines(owner: dict[str, range], machines: list[int]) -> list[str]:
    """A line for each coder whose ranks are not all on one machine; `machines` of all ranks."""
    found = {name: {machines[rank] for rank in ranks} for name, ranks in owner.items()}
    return [
        f"--shard_latents, --ranks_per_coder or --layer_to_rank: {name} is on ranks "
        f"{shown(owner[name])}, which are on {len(where)} machines: what they send each other in a "
        f"step goes over the network"
        for name, where in found.items()
        if len(where) > 1
    ]


def no_rows(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The pair with its rows dropped; one tensor twice stays one tensor twice."""
    empty = pair[1][:0]
    return (empty if pair[0] is pair[1] else pair[0][:0], empty)


def _distinct(pair: tuple[Tensor, Tensor]) -> list[Tensor]:
    return [pair[1]] if pair[0] is pair[1] else list(pair)


def _nothing(like: list[Tensor]) -> Tensor:
    return like[0].new_empty(0)

"""The ranks that hold one coder together, and what they send each other."""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .ranks import Ranks


@dataclass(frozen=True)
class Group:
    """This rank's place among the ranks of a coder; without `ranks` a plan that talks to nobody."""

    rank: int
    size: int
    ranks: Ranks | None = None
    process_group: Any = None

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the group, in place; every rank ends with the same bits."""
        dist.all_reduce(tensor, group=self.process_group)
        moved = 2 * (self.size - 1) * tensor.nbytes // self.size  # what a ring moves
        self._count(moved, moved)
        return tensor

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, which have one shape, in rank order."""
        found = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(found, tensor, group=self.process_group)
        others = (self.size - 1) * tensor.nbytes
        self._count(others, others)
        return found

    def exchange(self, sent: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
        """Send one tensor to each rank, and receive from each one of such a shape."""
        flat = torch.cat([t.flatten() for t in sent])
        sizes = [torch.Size(shape).numel() for shape in shapes]
        received = flat.new_empty(sum(sizes))
        lengths = [t.numel() for t in sent]
        dist.all_to_all_single(received, flat, sizes, lengths, group=self.process_group)
        item = flat.element_size()
        self._count(flat.nbytes - sent[self.rank].nbytes, received.nbytes - item * sizes[self.rank])
        return [t.view(shape) for t, shape in zip(received.split(sizes), shapes, strict=True)]

    def _count(self, sent: int, received: int) -> None:
        if self.ranks is not None:
            self.ranks.count_bytes(sent, received)


def connect_groups(owner: dict[str, range], ranks: Ranks) -> dict[str, Group]:
    """Hookpoint -> group, of the coders that this rank holds together with others."""
    timeout = timedelta(minutes=ranks.timeout_minutes)
    # Every rank takes part in making every group, in one order.
    made = {
        members: dist.new_group(list(members), timeout=timeout)
        for members in dict.fromkeys(owner.values())
        if len(members) > 1
    }
    return {
        hookpoint: Group(ranks.rank - members.start, len(members), ranks, made[members])
        for hookpoint, members in owner.items()
        if members in made and ranks.rank in members
    }

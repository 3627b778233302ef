"""The ranks that hold one coder together, and what they send each other."""

from dataclasses import dataclass
from datetime import timedelta
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .ranks import Ranks

_DTYPES = [torch.float32, torch.float64, torch.int32, torch.int64, torch.bfloat16]
_HEADER = 11  # a key, how many tensors, and of each its dtype and shape


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


class Mail:
    """Tensors from rank to rank, each under a key; taken by key, in whatever order they came.

    Sending does not wait. A rank takes all that is sent to it, once. They go over the hosts, by
    gloo: NCCL has one queue for a pair of ranks, where two that send first wait for each other.
    """

    def __init__(self, ranks: Ranks, owner: dict[str, int]) -> None:
        self.rank, self.owner, self._ranks = ranks.rank, owner, ranks
        self._on_the_way: list[tuple[Any, Tensor]] = []
        self._arrived: dict[tuple[int, int], list[Tensor]] = {}

    def send(self, rank: int, key: str, tensors: list[Tensor]) -> None:
        """Send up to three tensors of one or two dimensions without waiting for it."""
        header = torch.zeros(_HEADER, dtype=torch.int64)
        header[0], header[1] = _number(key), len(tensors)
        for i, tensor in enumerate(tensors):
            shape = [_DTYPES.index(tensor.dtype), *tensor.shape, -1][:3]
            header[2 + 3 * i : 5 + 3 * i] = torch.tensor(shape)
        for tensor in (header, *tensors):
            self._post(rank, tensor.contiguous().cpu())
        self._ranks.count_bytes(sum(t.nbytes for t in tensors), 0)

    def _post(self, rank: int, tensor: Tensor) -> None:
        if tensor.numel():
            work = dist.isend(tensor, rank, group=self._ranks.on_host)
            self._on_the_way.append((work, tensor))

    def settle(self) -> None:
        """Wait until all that was sent has been taken, and let go of it."""
        for work, _ in self._on_the_way:
            work.wait()
        self._on_the_way.clear()

    def receive(self, rank: int, key: str) -> list[Tensor]:
        """What a rank has sent under this key; waits until it comes."""
        wanted = rank, _number(key)
        while wanted not in self._arrived:
            header = torch.zeros(_HEADER, dtype=torch.int64)
            dist.recv(header, rank, group=self._ranks.on_host)
            number, count, *described = header.tolist()
            found = []
            for i in range(count):
                kind, *shape = described[3 * i : 3 * i + 3]
                size = [n for n in shape if n >= 0]
                tensor = torch.empty(size, dtype=_DTYPES[kind])
                if tensor.numel():
                    dist.recv(tensor, rank, group=self._ranks.on_host)
                found.append(tensor.to(self._ranks.device))
            self._ranks.count_bytes(0, sum(t.nbytes for t in found))
            assert (rank, number) not in self._arrived, "a key is used once"
            self._arrived[rank, number] = found
        return self._arrived.pop(wanted)


def _number(key: str) -> int:
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little", signed=True)


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

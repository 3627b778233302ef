"""Several ranks as threads of one process: what shared coders ask of a group, without a launch."""

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class ThreadGroup:
    """One of several threads that stand for the ranks of a group."""

    def __init__(self, rank: int, size: int, box: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self._box, self._barrier = rank, size, box, barrier
        self.received = {"sum": 0, "gather": 0, "exchange": 0}
        """Bytes, as a ring sums them."""

    def _everyones(self, value: Any) -> list[Any]:
        self._box[self.rank] = value
        self._barrier.wait()
        found = list(self._box)
        self._barrier.wait()
        return found

    def sum_(self, tensor: Tensor) -> Tensor:
        parts = self._everyones(tensor.clone())
        assert len({part.shape for part in parts}) == 1
        self.received["sum"] += 2 * (self.size - 1) * tensor.nbytes // self.size
        return tensor.copy_(sum(parts[1:], parts[0]))

    def gather(self, tensor: Tensor) -> list[Tensor]:
        self.received["gather"] += (self.size - 1) * tensor.nbytes
        return [part.clone() for part in self._everyones(tensor)]

    def exchange(self, sent: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
        found = [parts[self.rank].clone() for parts in self._everyones(sent)]
        assert [tuple(part.shape) for part in found] == shapes
        others = (part.nbytes for rank, part in enumerate(found) if rank != self.rank)
        self.received["exchange"] += sum(others)
        return found


class Alike:
    """The first of several ranks that all have what this one has: shapes are right, numbers not."""

    rank = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor.mul_(self.size)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        return [tensor.clone() for _ in range(self.size)]

    def exchange(self, sent: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
        flat = torch.cat([t.flatten() for t in sent])  # holds what `placement.groups` holds
        sizes = [torch.Size(shape).numel() for shape in shapes]
        received = flat.new_zeros(sum(sizes)).split(sizes)
        return [t.view(shape) for t, shape in zip(received, shapes, strict=True)]


def on_ranks(size: int, work: Callable[[ThreadGroup], T]) -> list[T]:
    """What `work` returns on each of so many ranks; the first exception of any is raised."""
    box, barrier = [None] * size, threading.Barrier(size, timeout=60)
    results, errors = dict[int, T](), list[BaseException]()

    def run(rank: int) -> None:
        try:
            torch.set_num_threads(1)
            results[rank] = work(ThreadGroup(rank, size, box, barrier))
        except BaseException as error:
            if not isinstance(error, threading.BrokenBarrierError):
                errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(size)]

"""The processes of a run: what they agree on, and sums over them."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..batch import TokenBatch
from ..data.blocks import TokenSource
from ..flag_checks import UsageError
from . import liveness, signals

T = TypeVar("T")

_OWN_CALL = 1 << 16  # elements from which a tensor is summed where it lies instead of in a batch


class Ranks:
    """This process among the others. One process alone talks to nobody and waits for nobody."""

    def __init__(self, device: torch.device, timeout_minutes: float) -> None:
        together = dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.world = dist.get_world_size() if together else 1
        self.main = self.rank == 0
        self.device, self.timeout_minutes = device, timeout_minutes
        self._bytes = [0, 0]
        # Objects are exchanged by gloo: a collective on the GPU would wait for its queued kernels.
        timeout = timedelta(minutes=timeout_minutes)
        self._cpu = dist.new_group(backend="gloo", timeout=timeout) if self.world > 1 else None
        if self.world > 1:
            liveness.start(self.rank, self.world, timeout_minutes)

    def batches(self, source: TokenSource, order: Tensor, batch_size: int) -> Iterator[TokenBatch]:
        """This rank's batches of an order: of every world * batch_size blocks its batch_size.

        Raises UsageError, on all ranks, where ranks read different data.
        """
        self.same({"the data's fingerprint": source.fingerprint})
        mine = order.view(-1, self.world, batch_size)[:, self.rank].flatten()
        read = zip(mine.split(batch_size), source.batches(mine, batch_size), strict=False)
        numbered = (replace(batch, numbers=numbers) for numbers, batch in read)
        return _ahead(numbered, self.device)

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Sum each tensor over ranks, in place; every rank ends with the same bits."""
        if self.world == 1:
            return
        small: dict[torch.dtype, list[Tensor]] = {}
        works: list[Any] = []
        for tensor in tensors:
            assert tensor.is_contiguous()
            if tensor.numel() >= _OWN_CALL:
                works.append(dist.all_reduce(tensor, async_op=True))
                self._count_sum(tensor)
            else:
                small.setdefault(tensor.dtype, []).append(tensor)
        for batch in small.values():
            flat = torch.cat([t.reshape(-1) for t in batch])
            dist.all_reduce(flat)
            self._count_sum(flat)
            for tensor, piece in zip(batch, flat.split([t.numel() for t in batch]), strict=True):
                tensor.copy_(piece.view_as(tensor))
        for work in works:
            work.wait()

    def gather(self, value: int) -> list[int]:
        """The value of every rank, in rank order."""
        return [found for (found,) in self.gather_all([value])]

    def gather_all(self, values: list[int]) -> list[list[int]]:
        """The values of every rank, as many on each, in rank order."""
        if self.world == 1:
            return [values]
        found = [torch.zeros(len(values), dtype=torch.int64) for _ in range(self.world)]
        dist.all_gather(found, torch.tensor(list(map(int, values))), group=self._cpu)
        return [part.tolist() for part in found]

    @property
    def on_host(self) -> Any:
        """The process group of tensors in the host's memory."""
        return self._cpu

    @property
    def _machine(self) -> int:
        """The first rank on this rank's machine."""
        return self.rank - int(os.environ.get("LOCAL_RANK", self.rank))

    def machines(self) -> list[int]:
        """The machine of every rank, by its first rank."""
        return self.gather(self._machine)

    def sum_counts(self, counts: dict[str, int]) -> dict[str, int]:
        """Counts by name, the names the same on every rank, added up over the ranks."""
        names = sorted(counts)
        found = self.gather_all([counts[name] for name in names])
        return {name: sum(part[i] for part in found) for i, name in enumerate(names)}

    def merge(self, part: dict[str, T]) -> dict[str, T]:
        """The union of what all ranks know; where two know the same key, they know the same."""
        whole: dict[str, T] = {}
        for found in self.everyones(part):
            whole.update(found)
        return whole

    def same(self, what: dict[str, Any]) -> None:
        """Raise UsageError, on all ranks, for the first key whose value is not the same on all."""
        ours, *others = self.everyones(what)
        for rank, theirs in enumerate(others, start=1):
            for key in {**ours, **theirs}:
                if ours.get(key) != theirs.get(key):
                    raise UsageError(
                        f"{key} is {ours.get(key)!r} on rank 0 and {theirs.get(key)!r} on rank "
                        f"{rank}: start all ranks alike"
                    )

    @contextmanager
    def together(self) -> Iterator[None]:
        """Inside, a UsageError on one rank becomes the same UsageError on all."""
        message = None
        try:
            yield
        except UsageError as error:
            if self.world == 1:
                raise
            message = str(error)
        if not any(self.gather(message is not None)):
            return
        said = {rank: text for rank, text in enumerate(self.everyones(message)) if text}
        rank, text = next(iter(said.items()))
        raise UsageError(text if len(said) == self.world else f"rank {rank}: {text}")

    def stop_reason(self) -> str | None:
        """Why the run should stop after this step, if any rank was told to; all ranks agree."""
        reason = signals.stop_reason()
        if self.world == 1 or not any(self.gather(reason is not None)):
            return reason
        return next(filter(None, self.everyones(reason)))

    def main_first(self, work: Callable[..., T], *arguments: Any) -> T:
        """Call `work` on rank 0, then on one rank per machine, then on the rest.

        The first fills a cache. No rank goes on before all are done, and none waits for another in
        a collective, which would time out while files are downloaded or text is tokenized.
        """
        if self.world == 1:
            return work(*arguments)
        turn, machine = liveness.next_turn(), self._machine
        if not self.main:
            liveness.wait_for_turn(0 if self.rank == machine else machine, turn)
        found = work(*arguments)
        liveness.end_turn(turn)
        for rank in range(self.world):
            liveness.wait_for_turn(rank, turn)
        return found

    def count_bytes(self, sent: int, received: int) -> None:
        """Add to the traffic."""
        self._bytes[0] += sent
        self._bytes[1] += received

    def clear_traffic(self) -> None:
        """Count bytes from 0 again."""
        self._bytes = [0, 0]

    def traffic(self) -> dict[str, Tensor | float]:
        """Bytes that this rank sent and received since they were cleared, as metrics."""
        if self.world == 1:
            return {}
        sent, received = self._bytes
        return {
            f"bytes_sent/rank{self.rank}": float(sent),
            f"bytes_received/rank{self.rank}": float(received),
        }

    def _count_sum(self, tensor: Tensor) -> None:
        # What a ring moves, the least that a sum over ranks can.
        moved = 2 * (self.world - 1) * tensor.nbytes // self.world
        self.count_bytes(moved, moved)

    def everyones(self, value: Any) -> list[Any]:
        """The value of every rank, of any kind, in rank order."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self._cpu)
        return values


def _ahead(batches: Iterator[TokenBatch], device: torch.device) -> Iterator[TokenBatch]:
    """The same batches, on the device: each is read and copied while the one before is at work."""

    def read() -> TokenBatch | None:
        tokens = next(batches, None)
        return None if tokens is None else tokens.to(device)

    with ThreadPoolExecutor(1, thread_name_prefix="data") as reader:
        coming = reader.submit(read)
        while (tokens := coming.result()) is not None:
            coming = reader.submit(read)
            yield tokens

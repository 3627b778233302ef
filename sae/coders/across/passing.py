"""Latents on their way to the layers ahead, here and on other ranks, and their gradients back."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...flag_checks import UsageError
from ...kernels.backend import Backend
from ...kernels.entries import Entries, row_starts
from ...kernels.twins import Latents
from ..moments import Scale

ORDER = (
    "a cross-layer transcoder: its coders take the same rows, one after the other in the order of "
    "layers, and this one comes before one whose latents it reads"
)


class Post(Protocol):
    """Who owns which layer, and tensors to other ranks and from them, by key."""

    @property
    def rank(self) -> int:
        """This rank."""
        ...

    @property
    def owner(self) -> Mapping[str, int]:
        """Hookpoint -> the rank that has its coders, of all layers in order."""
        ...

    def send(self, rank: int, key: str, tensors: list[Tensor]) -> None:
        """Send without waiting for it."""
        ...

    def receive(self, rank: int, key: str) -> list[Tensor]:
        """What a rank has sent under this key, whenever it did."""
        ...

    def settle(self) -> None:
        """Wait until all that was sent has been taken."""
        ...


class Left:
    """The latents of some rows for all that read them: those here, one after the other.

    All but the last read them detached, and so does the last where other ranks read them too.
    """

    def __init__(
        self,
        latents: Latents,
        of_dead: Latents | None,
        readers: int,
        trains: bool,
        back: Callable[[Tensor], None] | None = None,
        abroad: bool = False,
    ) -> None:
        """`back` is given the sum of gradients, of latents whose encoder is elsewhere."""
        self.latents, self._of_dead, self._readers = latents, of_dead, readers
        self._back, self._abroad = back, abroad
        self._due, self._total = 0, latents.acts.new_zeros(())
        self._detached = trains and (readers > 1 or abroad or back is not None)
        if self._detached:
            self._anchor = latents.acts.detach().requires_grad_()
            self._dead = None if of_dead is None else of_dead.acts.detach().requires_grad_()

    def read(self) -> Latents:
        """For one reader."""
        self._readers -= 1
        if not self._detached:
            return self.latents
        self._due += 1
        brings_all = not (self._readers or self._abroad or self._back)
        dead = None if self._of_dead is None or not brings_all else self._of_dead.acts
        acts = self.latents.acts if brings_all else self._anchor
        return self.latents._replace(acts=_Read.apply(self, brings_all, acts, dead))

    def dead_for_reading(self) -> Latents | None:
        """AuxK's latents, which the layer itself reads alone."""
        if not self._detached or self._of_dead is None:
            return self._of_dead
        return self._of_dead._replace(acts=self._dead)

    def came_back(self, grad: Tensor, brings_all: bool) -> tuple[Tensor | None, Tensor | None]:
        """Add a reader's gradient; of the reader that brings all to the encoder, return these."""
        self._due -= 1
        self._total = self._total + grad
        if brings_all:
            assert not self._due, "the loss of each hookpoint has its backward before the next's"
            return self._total, None if self._dead is None else self._dead.grad
        if self._back is not None and not self._readers and not self._due:
            self._back(self._total)
        return None, None

    def finish(self, others: Iterable[Tensor]) -> None:
        """Take the gradients that other ranks returned, and go through the encoder."""
        assert not self._due, "every loss has its backward before the step ends"
        for grad in others:
            self._total = self._total + grad
        outputs, grads = [self.latents.acts], [self._total]
        if self._of_dead is not None and self._dead is not None and self._dead.grad is not None:
            outputs.append(self._of_dead.acts)
            grads.append(self._dead.grad)
        torch.autograd.backward(outputs, grads)


class _Read(torch.autograd.Function):
    """Activations for a reader."""

    @staticmethod
    def forward(
        ctx: Any, left: Left, brings_all: bool, acts: Tensor, dead_acts: Tensor | None
    ) -> Tensor:
        ctx.left, ctx.brings_all = left, brings_all
        return acts.view_as(acts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.left.came_back(grad, ctx.brings_all)


class Waiting:
    """What a layer left for each of those ahead, by how many layers they are; in its order."""

    def __init__(self) -> None:
        self._by_distance: dict[int, deque[Left]] = {}

    def put(self, distances: Iterable[int], left: Left) -> None:
        """Leave the same for several."""
        for distance in distances:
            self._by_distance.setdefault(distance, deque()).append(left)

    def has(self, distance: int) -> bool:
        """Whether something waits."""
        return bool(self._by_distance.get(distance))

    def take(self, distance: int) -> Latents:
        """What came first. Raises UsageError where nothing waits."""
        if not self.has(distance):
            raise UsageError(ORDER)
        return self._by_distance[distance].popleft().read()

    def clear(self) -> None:
        """Drop what was not read."""
        self._by_distance.clear()


def as_sent(latents: Latents) -> list[Tensor]:
    """Latents as tensors, 8 bytes an entry; and where rows start, if these differ in number."""
    starts = row_starts(latents)
    found = [latents.acts.detach(), latents.indices.int()]
    return found if starts is None else [*found, starts]


class Elsewhere:
    """The coder of a layer that another rank owns, as far as its latents are read here."""

    def __init__(
        self, post: Post, rank: int, name: str, num_latents: int, backend: Backend
    ) -> None:
        self.scale, self.waiting = Scale(), Waiting()
        self.distances: list[int] = []
        """How many layers ahead those are that read it here."""
        self._post, self._rank, self._name, self._number = post, rank, name, 0
        self._num_latents, self._backend = num_latents, backend

    def taken(self, distance: int) -> Latents:
        """The latents that were sent first, for the layer so far ahead."""
        if not self.waiting.has(distance):
            self._receive()
        return self.waiting.take(distance)

    def _receive(self) -> None:
        key = f"{self._name} {self._number}"
        self._number += 1
        acts, indices, *starts = self._post.receive(self._rank, key)
        numbers = indices.long()
        order = Entries(self._backend, numbers, starts[0], self._num_latents) if starts else None

        def back(total: Tensor) -> None:
            self._post.send(self._rank, f"{key} back", [total])

        latents, readers = Latents(acts, numbers, order), len(self.distances)
        left = Left(latents, None, readers, torch.is_grad_enabled(), back)
        self.waiting.put(self.distances, left)

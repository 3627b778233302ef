"""The functions of `functional` where each rank of a group computes a part.

    encode   every rank finds the k best of its own latents; the k best of all are active
    decode   every rank decodes the active latents into its own columns of the output

So what travels is sparse: candidates of 8 bytes, and the gradients of activations. Where AuxK is
dense products, the activations of all dead latents travel, and their gradients. docs/placement.md
compares this with a decoder cut by latents.
"""

from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..config import Activation
from ..kernels import dense_products
from ..kernels.backend import Backend
from ..kernels.dense_products import AllOf
from ..kernels.latents import largest
from ..kernels.selection import keep_largest_
from ..kernels.twins import Kernels, Latents, Reconstruction

_NUMBERS = 2**32 - 1


class Group(Protocol):
    """The ranks that hold one coder; all of them make the same calls in the same order."""

    @property
    def rank(self) -> int:
        """This rank's place among them."""
        ...

    @property
    def size(self) -> int:
        """How many they are."""
        ...

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place; every rank ends with the same bits."""
        ...

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, which have one shape, in rank order."""
        ...

    def exchange(self, sent: list[Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
        """Send one tensor to each rank, and receive from each one of such a shape."""
        ...


def share(total: int, rank: int, size: int, multiple: int = 1) -> range:
    """Which of `total` neighbours a rank holds: sizes differ by no more than one `multiple`."""
    runs = total // multiple
    return range(runs * rank // size * multiple, runs * (rank + 1) // size * multiple)


class ShardedKernels(Kernels):
    """The functions of `functional`, of which each rank of a group computes a part.

    W_enc and b_enc hold a rank's latents, W_dec its columns; x, latents and results are whole.
    """

    def __init__(self, kernels: Kernels, group: Group, latents: list[range]) -> None:
        """`latents`: those of each rank."""
        self.backend, self.group = kernels.backend, group
        self.first_latent, self.num_latents = latents[group.rank].start, latents[-1].stop
        self._starts = torch.tensor([of_rank.start for of_rank in latents])
        self._known_dead: tuple[Tensor, list[Tensor]] | None = None

    def encode(
        self,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        k: int,
        activation: Activation = "topk",
        pre_bias: Tensor | None = None,
        matmul_dtype: torch.dtype | None = None,
    ) -> Latents:
        """Twin of `functional.encode`."""
        x, pre_bias = copied(self.group, x, pre_bias)
        here = self._candidates(k, activation, W_enc)
        found = super().encode(x, W_enc, b_enc, here, activation, pre_bias, matmul_dtype)
        return self._best(found, k)

    def encode_with_dead(
        self,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        k: int,
        activation: Activation,
        pre_bias: Tensor | None,
        matmul_dtype: torch.dtype | None,
        dead: Int[Tensor, " M"],
        k_dead: int,
    ) -> tuple[Latents, Latents]:
        """Twin of `functional.encode_with_dead`; `dead` is in ascending order."""
        mine = self.dead_here(dead)
        x, pre_bias = copied(self.group, x, pre_bias)
        here = self._candidates(k, activation, W_enc)
        factors = matmul_dtype or W_enc.dtype
        dense = dense_products.pays(self.backend, x, factors, k_dead, len(dead))
        if not len(mine):
            found = super().encode(x, W_enc, b_enc, here, activation, pre_bias, matmul_dtype)
            # Part of the graph all the same: every rank is to sum the same gradients.
            acts = b_enc[:0].to(factors if dense else b_enc.dtype).expand(len(x), 0)
            of_dead = Latents(acts, dead.new_zeros(len(x), 0))
        else:
            widths = here, len(mine) if dense else min(k_dead, len(mine))
            backend = replace(self.backend, dense=dense)
            select = partial(largest, backend, activation, widths, mine)
            found, of_dead = self._active(select, x, W_enc, b_enc, pre_bias, matmul_dtype)
        if not dense:
            return self._best(found, k), self._best(of_dead, k_dead)
        counts = [len(theirs) for theirs in self._dead_by_rank(dead)]
        acts = _apply(_AllDead, self.backend, self.group, of_dead.acts, counts, k_dead)
        return self._best(found, k), Latents(acts, dead, AllOf(dead, self.num_latents, factors))

    def dead_here(self, dead: Tensor) -> Tensor:
        """Of the dead latents those held here, numbered from the first that is."""
        return self._dead_by_rank(dead)[self.group.rank] - self.first_latent

    def _dead_by_rank(self, dead: Tensor) -> list[Tensor]:
        # The host asks the device once per step, whose forwards share one tensor.
        if self._known_dead is None or self._known_dead[0] is not dead:
            self._starts = self._starts.to(dead.device)
            places = torch.searchsorted(dead, self._starts).tolist()
            self._known_dead = dead, list(dead.tensor_split(places[1:]))
        return self._known_dead[1]

    def _candidates(self, k: int, activation: Activation, W_enc: Tensor) -> int:
        """How many of its latents a rank proposes; with groupmax the largest of each group."""
        if activation == "groupmax":
            return len(W_enc) // (self.num_latents // k)
        return min(k, len(W_enc))

    def _best(self, found: Latents, k: int) -> Latents:
        numbers = found.indices + self.first_latent
        return Latents(*_apply(_Best, self.group, found.acts, numbers, k))

    def decode(self, latents: Latents, W_dec: Tensor) -> Tensor:
        """Twin of `functional.decode`: this rank's columns."""
        (acts,) = copied(self.group, latents.acts)
        return super().decode(latents._replace(acts=acts), W_dec)

    def reconstruct(
        self,
        latents: Latents,
        W_dec: Tensor,
        offset: Tensor,
        y: Tensor,
        dead_latents: Latents | None = None,
        prefixes: tuple[int, ...] = (),
        alone: bool = False,
    ) -> Reconstruction:
        """Twin of `functional.reconstruct`: this rank's columns, the errors of all columns."""
        found = [latents] if dead_latents is None else [latents, dead_latents]
        acts = copied(self.group, *(each.acts for each in found))
        found = [each._replace(acts=own) for each, own in zip(found, acts, strict=True)]
        of_dead = None if dead_latents is None else found[1]
        here = super().reconstruct(found[0], W_dec, offset, y, of_dead, prefixes, alone)
        parts = {n: part for n, part in here._asdict().items() if part is not None}
        del parts["sae_out"]
        return here._replace(**{n: _apply(_Summed, self.group, p) for n, p in parts.items()})

    def scale_and_project_(
        self, grad: Tensor, scale: Tensor, unit_rows: Tensor | None = None
    ) -> Tensor:
        """Twin of `functional.scale_and_project_`; the square that it returns is of this part."""
        if unit_rows is None:
            return super().scale_and_project_(grad, scale)
        grad.mul_(scale)
        along = self.group.sum_(row_dots(grad, unit_rows))
        grad.addcmul_(unit_rows, along.unsqueeze(1), value=-1)
        return row_dots(grad, grad).sum()

    def signum_step_(
        self,
        y: Tensor,
        z: Tensor,
        grad: Tensor,
        lr: float,
        beta: float,
        c: float,
        unit_norm: bool = False,
    ) -> None:
        """Twin of `functional.signum_step_`."""
        super().signum_step_(y, z, grad, lr, beta, c)
        if unit_norm:
            self.normalize_rows_(y)

    def normalize_rows_(self, rows: Tensor) -> None:
        """Twin of `functional.normalize_rows_`, of rows whose columns the ranks hold."""
        norm = self.group.sum_(row_dots(rows, rows)).sqrt_().unsqueeze(1)
        rows.div_(norm.masked_fill_(norm == 0, 1))


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    return function.apply(*arguments)  # untyped


def row_dots(a: Float[Tensor, "R D"], b: Float[Tensor, "R D"]) -> Float[Tensor, " R"]:
    """<a_r, b_r> by rows."""
    return torch.linalg.vecdot(a, b)


def copied(group: Group, *tensors: Any) -> tuple[Any, ...]:
    """What is whole on every rank, on its way to where each rank computes a part with it."""
    if not any(t is not None and t.requires_grad for t in tensors):
        return tensors
    return _apply(_Copied, group, *tensors)


class _Copied(torch.autograd.Function):
    """Whole tensors as they are; their gradients are of each rank's part, and are summed."""

    @staticmethod
    def forward(ctx: Any, group: Group, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.group = group
        ctx.set_materialize_grads(False)
        return tuple(t if t is None else t.view_as(t) for t in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None]
        for grad, needed in zip(grads, ctx.needs_input_grad[1:], strict=True):
            if not needed or grad is None:
                found.append(None)
            else:
                found.append(ctx.group.sum_(grad.clone(memory_format=torch.contiguous_format)))
        return tuple(found)


class _Summed(torch.autograd.Function):
    """The sum of what all ranks computed; each rank's gradient is that of its own part."""

    @staticmethod
    def forward(ctx: Any, group: Group, part: Tensor) -> Tensor:
        return group.sum_(part.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


class _Best(torch.autograd.Function):
    """The k best of all ranks' candidates, ties by number: (acts, their latents' numbers), [N k].

    A candidate travels as one whole number: the bits of its activation, which is not negative, so
    that they are in the order of the values, above the latent's number from the far end. Each rank
    gets all candidates of some rows, and sends their k best to all.
    """

    @staticmethod
    def forward(
        ctx: Any, group: Group, acts: Tensor, numbers: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        assert acts.dtype == torch.float32 and acts.shape[1] <= k
        bits = acts.detach().abs().view(torch.int32).long()
        keys = numbers.new_full((len(acts), k), -1)
        keys[:, : acts.shape[1]] = (bits << 32) | (_NUMBERS - numbers)
        lengths = [len(share(len(acts), rank, group.size)) for rank in range(group.size)]
        of_my_rows = [(lengths[group.rank], k)] * group.size
        candidates = group.exchange(list(keys.split(lengths)), of_my_rows)
        mine = torch.cat(candidates, dim=1).topk(k, dim=1).values  # the largest first
        best = torch.cat(group.exchange([mine] * group.size, [(n, k) for n in lengths]))
        keys = keys[:, : acts.shape[1]].contiguous()
        ctx.save_for_backward(keys >= best[:, -1:], torch.searchsorted(-best, -keys))
        found = _NUMBERS - (best & _NUMBERS)
        ctx.mark_non_differentiable(found)
        return (best >> 32).int().view(torch.float32), found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[None, Tensor, None, None]:
        chosen, place = ctx.saved_tensors
        mine = grad.gather(1, place.clamp(max=grad.shape[1] - 1))
        return None, mine.masked_fill_(~chosen, 0), None, None


class _AllDead(torch.autograd.Function):
    """Activations of each rank's dead latents [N P_rank] to those of all, [N P]: the k largest."""

    @staticmethod
    def forward(
        ctx: Any, backend: Backend, group: Group, acts: Tensor, counts: list[int], k: int
    ) -> Tensor:
        total, mine = sum(counts), counts[group.rank]
        sent, shapes = [acts[:, :mine]] * group.size, [(len(acts), count) for count in counts]
        found = acts.new_zeros(len(acts), AllOf.padded(total))
        parts = found[:, :total].split(counts, dim=1)
        for part, theirs in zip(parts, group.exchange(sent, shapes), strict=True):
            part.copy_(theirs)
        if k < total:
            keep_largest_(backend, found, k)
        start = sum(counts[: group.rank])
        ctx.columns, ctx.held = slice(start, start + mine), acts.shape[1]
        ctx.save_for_backward(found[:, ctx.columns] > 0)
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (chosen,) = ctx.saved_tensors
        mine = grad.new_zeros(len(grad), ctx.held)
        mine[:, : chosen.shape[1]] = grad[:, ctx.columns].masked_fill(~chosen, 0)
        return None, None, mine, None, None

"""One coder over several ranks: each has latents of its encoder, and columns of its decoder.

    encoder   every rank finds the k best of its own latents; the k best of all are active
    decoder   every rank decodes the active latents into its own columns of the output

So what travels is sparse: candidates of 8 bytes, and the gradients of top_acts. Every rank of a
group sees the same rows, and knows the same latents, errors and losses. docs/placement.md compares
this with a decoder cut by latents.
"""

from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..config import Activation, SparseCoderConfig
from ..flag_checks import UsageError
from ..formats.pieces import Part, Piece
from ..kernels.twins import Kernels, Latents
from .sparse_coder import CoderErrors, SparseCoder

_DRAWN_ROWS = 1024  # so much of the encoder is there at a time when it starts
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


def shared_latents(cfg: SparseCoderConfig, num_latents: int, size: int) -> list[range]:
    """The latents that each of several ranks holds; with groupmax, whole groups of latents.

    Raises UsageError where there is too little to share.
    """
    in_groups = cfg.activation == "groupmax"
    shared = cfg.k if in_groups else num_latents
    if shared < size:
        what = f"k = {cfg.k} groups of latents (groupmax)" if in_groups else f"{shared} latents"
        raise UsageError(_too_many(size, what))
    return [share(num_latents, rank, size, num_latents // shared) for rank in range(size)]


def _too_many(size: int, what: str) -> str:
    return (
        f"--ranks_per_coder or --layer_to_rank: {size} ranks cannot share a coder of {what}: give "
        f"it fewer ranks"
    )


class ShardedCoder(SparseCoder):
    """A coder of which this rank holds a part; it computes what the whole one does.

    `encoder.weight` [L_rank D], `encoder.bias` [L_rank], `W_dec` [L D_rank], `W_skip` [D_rank D];
    `b_dec` is whole. `sae_out` has the rank's own columns, see `whole`; all else that is returned,
    and every gradient of what is whole, is that of the whole coder.
    """

    def __init__(
        self,
        group: Group,
        d_in: int,
        cfg: SparseCoderConfig,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        *,
        d_out: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """The part of the coder that `SparseCoder` would make, with the same initial weights."""
        super().__init__(d_in, cfg, "meta", dtype, d_out=d_out)
        self.group = group
        latents = shared_latents(cfg, self.num_latents, group.size)
        columns = [share(self.d_out, rank, group.size) for rank in range(group.size)]
        if self.d_out < group.size:
            raise UsageError(_too_many(group.size, f"{self.d_out} columns of output"))
        self.cuts = {"encoder.weight": (0, latents), "encoder.bias": (0, latents)}
        self.cuts |= {"W_dec": (1, columns), "W_skip": (0, columns)}
        """By parameter the dimension that it is cut along, and the indices that each rank has."""
        parts = {name: Part(dim, of[group.rank]) for name, (dim, of) in self.cuts.items()}
        self.piece = Piece(group.rank, group.size, parts)
        mine = columns[group.rank]
        self.columns = slice(mine.start, mine.stop)
        planned = torch.device(device).type == "meta"
        held = {} if planned else self._drawn(latents[group.rank], generator)
        for name, parameter in list(self.named_parameters()):
            shape = list(parameter.shape)
            if part := self.piece.part_of(name):
                shape[part.dim] = len(part.indices)
            zeros = torch.zeros(shape, device=device, dtype=dtype)
            module = self.encoder if name.startswith("encoder.") else self
            weights = held[name].to(device) if name in held else zeros
            setattr(module, name.removeprefix("encoder."), nn.Parameter(weights))
        self.use(self.kernels)

    def _drawn(self, latents: range, generator: torch.Generator | None) -> dict[str, Tensor]:
        """This rank's part of the initial weights: all are drawn, a block of rows at a time."""
        dtype = self.dtype
        found = {"encoder.weight": torch.empty(len(latents), self.d_in, dtype=dtype)}
        if not self.cfg.transcode:
            width = self.columns.stop - self.columns.start
            found["W_dec"] = torch.empty(self.num_latents, width, dtype=dtype)
        for start in range(0, self.num_latents, _DRAWN_ROWS):
            stop = min(start + _DRAWN_ROWS, self.num_latents)
            block = self.draw(torch.empty(stop - start, self.d_in, dtype=dtype), generator)
            first, last = max(start, latents.start), min(stop, latents.stop)
            if first < last:
                mine = block[first - start : last - start]
                found["encoder.weight"][first - latents.start : last - latents.start] = mine
            if "W_dec" in found:
                if self.cfg.normalize_decoder:
                    self.kernels.normalize_rows_(block)
                found["W_dec"][start:stop] = block[:, self.columns]
        return found

    def use(self, kernels: Kernels) -> None:
        """Compute by these kernels, on this rank's part."""
        assert self.piece is not None
        latents = self.piece.parts["encoder.weight"].indices
        self.kernels = ShardedKernels(kernels, self.group, latents.start, self.num_latents)

    def errors(
        self, x: Tensor, y: Tensor, dead: Tensor | None = None, k: int | None = None
    ) -> CoderErrors:
        """As of the whole coder, but that `sae_out` has this rank's columns."""
        return super().errors(x, y[:, self.columns], dead, k)

    def _offset(self, rows: Tensor) -> Tensor:
        rows, b_dec = _copied(self.group, rows, self.b_dec)
        mine = b_dec[self.columns]
        return mine if self.W_skip is None else rows @ self.W_skip.mT + mine

    def decode(self, top_acts: Tensor, top_indices: Tensor) -> Tensor:
        """As of the whole coder, without gradients."""
        k = top_acts.shape[-1]
        latents = self.kernels.Latents(
            top_acts.reshape(-1, k).to(self.dtype), top_indices.reshape(-1, k)
        )
        with torch.no_grad():
            out = self.whole(self._reconstruct(latents, self.b_dec[self.columns]))
        return out.view(*top_acts.shape[:-1], self.d_out)

    @torch.no_grad()
    def whole(self, sae_out: Float[Tensor, "N _"]) -> Float[Tensor, "N D"]:
        """The columns of all ranks."""
        widths = [len(columns) for columns in self.cuts["W_dec"][1]]
        padded = sae_out.new_zeros(len(sae_out), max(widths))
        padded[:, : sae_out.shape[1]] = sae_out
        found = self.group.gather(padded)
        return torch.cat([t[:, :width] for t, width in zip(found, widths, strict=True)], dim=1)

    @torch.no_grad()
    def decoder_norms(self) -> Float[Tensor, " L"]:
        """The norms of the whole decoder rows."""
        assert self.W_dec is not None
        return self.group.sum_(_row_dots(self.W_dec, self.W_dec)).sqrt()

    def total(self, by_parameter: dict[str, Tensor]) -> Tensor:
        """The sum over the whole coder of numbers that were summed over each parameter here."""
        assert self.piece is not None
        zero = self.b_dec.new_zeros(())
        cut, whole = zero.clone(), zero.clone()
        for name, value in by_parameter.items():
            target = cut if self.piece.part_of(name) else whole
            target += value
        return self.group.sum_(cut) + whole


class ShardedKernels(Kernels):
    """The functions of `functional`, of which each rank of a group computes a part.

    W_enc and b_enc hold a rank's latents, W_dec its columns; x, latents and results are whole.
    """

    def __init__(self, kernels: Kernels, group: Group, first_latent: int, num_latents: int) -> None:
        self.backend = kernels.backend
        self.group, self.first_latent, self.num_latents = group, first_latent, num_latents
        self._known_dead: tuple[Tensor, Tensor] | None = None

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
        x, pre_bias = _copied(self.group, x, pre_bias)
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
        mine = self._dead_here(dead, len(W_enc))
        x, pre_bias = _copied(self.group, x, pre_bias)
        here = self._candidates(k, activation, W_enc)
        arguments = (x, W_enc, b_enc, here, activation, pre_bias, matmul_dtype)
        if not len(mine):
            found = super().encode(*arguments)
            # Part of the graph all the same: every rank is to sum the same gradients.
            of_dead = Latents(b_enc[:0].expand(len(x), 0), dead.new_zeros(len(x), 0))
        else:
            found, of_dead = super().encode_with_dead(*arguments, mine, min(k_dead, len(mine)))
        return self._best(found, k), self._best(of_dead, k_dead)

    def _dead_here(self, dead: Tensor, held: int) -> Tensor:
        """Of the dead latents those held here, numbered from the first that is."""
        # The host asks the device once per step, whose forwards share one tensor.
        if self._known_dead is None or self._known_dead[0] is not dead:
            ends = torch.tensor([0, held], device=dead.device) + self.first_latent
            start, stop = torch.searchsorted(dead, ends).tolist()
            self._known_dead = dead, dead[start:stop] - self.first_latent
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
        (acts,) = _copied(self.group, latents.acts)
        return super().decode(latents._replace(acts=acts), W_dec)

    def decode_with_dead(
        self, latents: Latents, dead_latents: Latents, W_dec: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Twin of `functional.decode_with_dead`: this rank's columns."""
        acts, of_dead = _copied(self.group, latents.acts, dead_latents.acts)
        both = latents._replace(acts=acts), dead_latents._replace(acts=of_dead)
        return super().decode_with_dead(*both, W_dec)

    def squared_error(self, y: Tensor, y_hat: Tensor) -> Tensor:
        """Twin of `functional.squared_error`, of all columns; the gradient is of these."""
        return _apply(_Summed, self.group, super().squared_error(y, y_hat))

    def scale_and_project_(
        self, grad: Tensor, scale: Tensor, unit_rows: Tensor | None = None
    ) -> Tensor:
        """Twin of `functional.scale_and_project_`; the square that it returns is of this part."""
        if unit_rows is None:
            return super().scale_and_project_(grad, scale)
        grad.mul_(scale)
        along = self.group.sum_(_row_dots(grad, unit_rows))
        grad.addcmul_(unit_rows, along.unsqueeze(1), value=-1)
        return _row_dots(grad, grad).sum()

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
        norm = self.group.sum_(_row_dots(rows, rows)).sqrt_().unsqueeze(1)
        rows.div_(norm.masked_fill_(norm == 0, 1))


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    return function.apply(*arguments)  # untyped


def _row_dots(a: Tensor, b: Tensor) -> Tensor:
    """<a_r, b_r> by rows."""
    return torch.linalg.vecdot(a, b)


def _copied(group: Group, *tensors: Any) -> tuple[Any, ...]:
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

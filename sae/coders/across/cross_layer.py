"""Cross-layer transcoders: latents of a layer write to the layers ahead of it, too.

    a^s       = encode(x^s)
    y_hat^t   = b_dec^t [+ x^t W_skip^T] + a^t W_dec^t + sum over s = t - N .. t - 1 of a^s W^{s->t}
    loss      = sum over t of FVU^t

Each layer has a coder of its own, with the decoders of all latents that write there, and all are
given the same rows in the order of layers. A coder leaves its latents for those ahead. They are
read detached from their encoder, so that the loss of each target has a backward of its own, and
holds what one target needs alone; what these backwards return is added up, and goes on through the
encoder in that of the last reader.

Gradients of a coder are divided by the variance of its own targets. So what target t returns to
layer s is multiplied by (rms^s / rms^t)^2 of the first batch: the sum is that of FVU^t.

Decoder rows are not normalized: they start at 0, and rows of norm 1 from the first step on would be
noise at all targets to which a latent has nothing to say.

Source: Ameisen et al., "Circuit Tracing: Revealing Computational Graphs in Language Models"
(transformer-circuits.pub/2025/attribution-graphs/methods.html).
"""

import re
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...config import SparseCoderConfig
from ...flag_checks import UsageError
from ...kernels.twins import Latents
from ..sparse_coder import SparseCoder
from .crosscoder import Crosscoder


class CrossLayerTranscoder(SparseCoder):
    """The coder of one layer: its encoder, and the decoders that write to this layer.

    `W_from` [L D_out] by distance: "1" is that of the latents of the layer before. They start at 0,
    as `W_dec` does.
    """

    def __init__(
        self,
        d_in: int,
        cfg: SparseCoderConfig,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        *,
        d_out: int | None = None,
        decoder: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            d_in, cfg, device, dtype, d_out=d_out, decoder=decoder, generator=generator
        )
        shape = (self.num_latents, self.d_out)
        self.W_from = nn.ParameterDict(
            {
                str(distance): nn.Parameter(torch.zeros(shape, device=device, dtype=dtype))
                for distance in range(1, len(cfg.sources) + 1)
                if decoder
            }
        )
        self.sources: tuple[CrossLayerTranscoder, ...] = ()
        """The coders whose latents come in, the nearest layer last; `link` says which."""
        self.targets: tuple[CrossLayerTranscoder, ...] = ()
        """The coders that its own go to, the nearest first."""
        self.left: dict[int, deque[_Left]] = {}
        """What waits for the layers ahead, by how many layers they are; first in, first out."""

    def decoders(self) -> list[nn.Parameter]:
        """Of its own latents: to this layer, the next, and so on."""
        assert self.W_dec is not None, "this coder was loaded with decoder=False"
        return [self.W_dec, *(t.W_from[str(i)] for i, t in enumerate(self.targets, 1))]

    def unit(self, parameter: str) -> float:
        """As of every transcoder; of decoders of layers before this one's rms over theirs."""
        if parameter.startswith("W_from."):
            source = self.sources[-int(parameter.removeprefix("W_from."))]
            return self.scale.y / source.scale.y
        return super().unit(parameter)

    def leave(self, rows: Float[Tensor, "N D"], distance: int) -> None:
        """Leave the latents of `rows` for the layer so far ahead alone, which then reads them."""
        latents = self.family.select(self, rows.to(self.dtype), self.cfg.k, None, None).latents
        self.left.setdefault(distance, deque()).append(_Left(latents, None, 1))

    def _passed_on(
        self, latents: Latents, of_dead: Latents | None
    ) -> tuple[Latents, Latents | None]:
        """The latents for this layer's own target; the same are left for those ahead."""
        self._check_linked()
        left = _Left(latents, of_dead, 1 + len(self.targets))
        for distance in range(1, len(self.targets) + 1):
            self.left.setdefault(distance, deque()).append(left)
        return left.read(), left.dead_for_reading()

    def _offset(self, rows: Float[Tensor, "N D"]) -> Tensor:
        """What is added to this layer's own: also what latents of the layers before write."""
        total = super()._offset(rows)
        for distance, source in sources_of(self).values():
            latents = source.taken(distance)
            weighted = _weighted(latents.acts, (source.scale.y / self.scale.y) ** 2)
            latents = latents._replace(acts=weighted)
            written = self.kernels.decode(latents, self.W_from[str(distance)])
            if len(written) != len(rows):
                raise UsageError(_ORDER)
            total = total + written
        return total

    def taken(self, distance: int) -> Latents:
        """The latents that were left first for the layer so far ahead."""
        waiting = self.left.get(distance)
        if not waiting:
            raise UsageError(_ORDER)
        return waiting.popleft().read()

    def _check_linked(self) -> None:
        for mine, names in ((self.sources, self.cfg.sources), (self.targets, self.cfg.targets)):
            if len(mine) != len(names):
                raise UsageError(
                    f"this is one layer of a cross-layer transcoder, which goes with those of "
                    f"{', '.join(names)}: load all of them, by load_many"
                )

    def directions(self) -> Float[Tensor, "L D"]:
        """What every latent writes to all its targets, one after the other."""
        return torch.cat([*self.decoders()], dim=1)


_ORDER = (
    "a cross-layer transcoder: its coders take the same rows, one after the other in the order of "
    "layers, and this one comes before one whose latents it reads"
)


class _Left:
    """The latents of some rows, on the way to all that read them."""

    def __init__(self, latents: Latents, of_dead: Latents | None, readers: int) -> None:
        self.latents, self.of_dead, self._readers = latents, of_dead, readers
        self.due = 0  # gradients that have not come back
        self._detached = latents.acts.requires_grad and readers > 1
        if self._detached:
            self.acts = latents.acts.detach().requires_grad_()
            self.dead_acts = None if of_dead is None else of_dead.acts.detach().requires_grad_()

    def read(self) -> Latents:
        """For one reader; the last one's gradient brings those of all to the encoder."""
        self._readers -= 1
        if not self._detached:
            return self.latents
        if self._readers:
            self.due += 1
            acts = self.acts.view_as(self.acts)
            acts.register_hook(self._came_back)
        else:
            dead_acts = None if self.of_dead is None else self.of_dead.acts
            acts = _Rejoined.apply(self, self.latents.acts, dead_acts)
        return self.latents._replace(acts=acts)

    def dead_for_reading(self) -> Latents | None:
        """AuxK's latents, which this layer alone reads."""
        if not self._detached or self.of_dead is None:
            return self.of_dead
        return self.of_dead._replace(acts=self.dead_acts)

    def _came_back(self, grad: Tensor) -> None:
        self.due -= 1


class _Rejoined(torch.autograd.Function):
    """Activations for the last reader; backward adds what the other readers returned."""

    @staticmethod
    def forward(ctx: Any, left: _Left, acts: Tensor, dead_acts: Tensor | None) -> Tensor:
        ctx.left = left
        return acts.view_as(acts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        left = ctx.left
        assert not left.due, "the loss of each hookpoint has its backward before the next one's"
        if left.acts.grad is not None:
            grad = grad + left.acts.grad
        return None, grad, None if left.dead_acts is None else left.dead_acts.grad


class _Weighted(torch.autograd.Function):
    """Activations as they are, whose gradient is multiplied."""

    @staticmethod
    def forward(ctx: Any, acts: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return acts.view_as(acts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.weight, None


def _weighted(acts: Tensor, weight: float) -> Tensor:
    return acts if weight == 1 else _Weighted.apply(acts, weight)  # type: ignore[no-any-return]


def coder_class(cfg: SparseCoderConfig) -> type[SparseCoder]:
    """The class of a coder on one rank."""
    if cfg.parts:
        return Crosscoder
    return CrossLayerTranscoder if cfg.sources or cfg.targets else SparseCoder


def link(coders: Mapping[str, SparseCoder], hookpoint: Mapping[str, str] | None = None) -> None:
    """Tell coders of layers of each other, those whose names end alike behind their hookpoint's.

    Without `hookpoint` names are hookpoints, or these and a seed. Where some layers are missing the
    others stay alone, and say so when they are used.
    """
    hookpoint = hookpoint or {name: re.sub(r"\.seed-?\d+$", "", name) for name in coders}
    by_name = {
        (hookpoint[name], name.removeprefix(hookpoint[name])): coder
        for name, coder in coders.items()
        if isinstance(coder, CrossLayerTranscoder)
    }
    for (_, end), coder in by_name.items():
        coder.sources = _found(by_name, coder.cfg.sources, end)
        coder.targets = _found(by_name, coder.cfg.targets, end)
    forget(coders.values())


def sources_of(coder: SparseCoder) -> dict[str, tuple[int, CrossLayerTranscoder]]:
    """Hookpoint -> how many layers before and the coder there, of those whose latents come in."""
    if not isinstance(coder, CrossLayerTranscoder):
        return {}
    pairs = enumerate(zip(reversed(coder.cfg.sources), reversed(coder.sources), strict=True), 1)
    return {name: (distance, source) for distance, (name, source) in pairs}


def forget(coders: Iterable[SparseCoder]) -> None:
    """Drop what these coders, and those whose latents they take, have left and nothing has read."""
    for coder in coders:
        if isinstance(coder, CrossLayerTranscoder):
            for one in (coder, *coder.sources):
                one.left.clear()


def _found(
    coders: Mapping[tuple[str, str], CrossLayerTranscoder], names: Iterable[str], end: str
) -> tuple[CrossLayerTranscoder, ...]:
    found = [coders.get((name, end)) for name in names]
    return tuple(coder for coder in found if coder is not None)

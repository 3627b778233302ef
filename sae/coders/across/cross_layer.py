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

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...config import SparseCoderConfig
from ...flag_checks import UsageError
from ...formats.origin import without_seed
from ...kernels.twins import Latents
from ..moments import Scale
from ..outputs import CoderOutput
from ..sparse_coder import SparseCoder
from .crosscoder import Crosscoder
from .passing import ORDER, Elsewhere, Left, Post, Waiting, as_sent


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
        self.sources: dict[int, CrossLayerTranscoder | Elsewhere] = {}
        """The coders whose latents come in, by how many layers they are before; see `link`."""
        self.targets: dict[int, CrossLayerTranscoder] = {}
        """The coders here that its own go to, by how many layers they are ahead."""
        self.waiting = Waiting()
        """Its latents for these."""
        self.name = ""
        self.post: Post | None = None
        self.abroad: list[int] = []
        """Other ranks that have coders which its latents go to."""
        self._number = 0
        self._unfinished: list[tuple[str, Left]] = []

    def decoders(self) -> list[nn.Parameter]:
        """Of its own latents: to this layer, the next, and so on."""
        assert self.W_dec is not None, "this coder was loaded with decoder=False"
        return [self.W_dec, *(t.W_from[str(i)] for i, t in sorted(self.targets.items()))]

    def unit(self, parameter: str) -> float:
        """As of every transcoder; of decoders of layers before this one's rms over theirs."""
        if parameter.startswith("W_from."):
            source = self.sources[int(parameter.removeprefix("W_from."))]
            return self.scale.y / source.scale.y
        return super().unit(parameter)

    def scale_sources_(self, scales: Mapping[str, Scale]) -> None:
        """Tell the scale of every hookpoint, for layers whose coders other ranks have."""
        for distance, source in self.sources.items():
            if isinstance(source, Elsewhere):
                source.scale = scales[self.cfg.sources[-distance]]

    def leave(self, rows: Float[Tensor, "N D"], distance: int) -> None:
        """Leave the latents of `rows` for the layer so far ahead alone, which then reads them."""
        latents = self.family.select(self, rows.to(self.dtype), self.cfg.k, None, None).latents
        self.waiting.put([distance], Left(latents, None, 1, trains=False))

    def _passed_on(
        self, latents: Latents, of_dead: Latents | None
    ) -> tuple[Latents, Latents | None]:
        """The latents for this layer's own target; the same are left for those ahead."""
        self.check_linked()
        trains, abroad = latents.acts.requires_grad, bool(self.abroad)
        left = Left(latents, of_dead, 1 + len(self.targets), trains, abroad=abroad)
        self.waiting.put(self.targets, left)
        if self.post is not None and abroad:
            key = f"{self.name} {self._number}"
            self._number += 1
            for rank in self.abroad:
                self.post.send(rank, key, as_sent(latents))
            if trains:
                self._unfinished.append((key, left))
        return left.read(), left.dead_for_reading()

    def forward(self, *args: Any, **kwargs: Any) -> CoderOutput:
        """As of every coder; what it left before and nothing has read is dropped."""
        self.waiting.clear()
        return super().forward(*args, **kwargs)

    def finish_(self) -> None:
        """Take the gradients that other ranks return for this coder's latents to its encoder."""
        for key, left in self._unfinished:
            assert self.post is not None
            left.finish([self.post.receive(rank, f"{key} back")[0] for rank in self.abroad])
        self._unfinished.clear()

    def _offset(self, rows: Float[Tensor, "N D"]) -> Tensor:
        """What is added to this layer's own: also what latents of the layers before write."""
        total = super()._offset(rows)
        for distance, source in sorted(self.sources.items()):
            latents = source.taken(distance)
            weighted = _weighted(latents.acts, (source.scale.y / self.scale.y) ** 2)
            latents = latents._replace(acts=weighted)
            written = self.kernels.decode(latents, self.W_from[str(distance)])
            if len(written) != len(rows):
                raise UsageError(ORDER)
            total = total + written
        return total

    def taken(self, distance: int) -> Latents:
        """The latents that were left first for the layer so far ahead."""
        return self.waiting.take(distance)

    def check_linked(self) -> None:
        """Raise UsageError where coders of other layers are not there."""
        here = self.post is None
        for mine, names in ((self.sources, self.cfg.sources), (self.targets, self.cfg.targets)):
            if here and len(mine) != len(names):
                raise UsageError(
                    f"this is one layer of a cross-layer transcoder, which goes with those of "
                    f"{', '.join(names)}: take all of them, by load_many or without --hookpoint"
                )

    def directions(self) -> Float[Tensor, "L D"]:
        """What every latent writes to all its targets, one after the other."""
        return torch.cat([*self.decoders()], dim=1)

    def state_tensors(self) -> dict[str, Tensor]:
        """What resuming needs beside the weights: the scales of the layers before, too."""
        scales = [self.sources[d].scale for d in range(len(self.sources), 0, -1)]
        found = {"scale.sources": torch.tensor(scales, dtype=torch.float64)} if scales else {}
        return {**super().state_tensors(), **found}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state_tensors` returned."""
        super().load_state_tensors(tensors)
        if self.sources:
            scales = (Scale(*scale) for scale in tensors["scale.sources"].tolist())
            self.scale_sources_(dict(zip(self.cfg.sources, scales, strict=True)))


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
    return acts if weight == 1 else _Weighted.apply(acts, weight)


def coder_class(cfg: SparseCoderConfig) -> type[SparseCoder]:
    """The class of a coder on one rank."""
    if cfg.parts:
        return Crosscoder
    return CrossLayerTranscoder if cfg.sources or cfg.targets else SparseCoder


def link(
    coders: Mapping[str, SparseCoder],
    hookpoint: Mapping[str, str] | None = None,
    post: Post | None = None,
) -> None:
    """Tell coders of layers of each other, those whose names end alike behind their hookpoint's.

    Without `hookpoint` names are hookpoints, or these and a seed. With `post` other ranks have the
    coders that are not here; without, where some layers are missing the others stay alone, and say
    so when they are used.
    """
    hookpoint = hookpoint or {name: without_seed(name) for name in coders}
    elsewhere: dict[str, Elsewhere] = {}
    for name, coder in coders.items():
        if not isinstance(coder, CrossLayerTranscoder):
            continue
        end = name.removeprefix(hookpoint[name])
        coder.name, coder.post = name, post
        sources = {i: f"{h}{end}" for i, h in enumerate(reversed(coder.cfg.sources), 1)}
        targets = {i: f"{h}{end}" for i, h in enumerate(coder.cfg.targets, 1)}
        coder.sources, coder.targets = _here(coders, sources), _here(coders, targets)
        if post is None:
            continue
        ranks = {post.owner[h] for h in coder.cfg.targets} - {post.rank}
        coder.abroad = sorted(ranks)
        for distance in sources.keys() - coder.sources.keys():
            source = sources[distance]
            if source not in elsewhere:
                owner = post.owner[coder.cfg.sources[-distance]]
                backend = coder.kernels.backend
                elsewhere[source] = Elsewhere(post, owner, source, coder.num_latents, backend)
            coder.sources[distance] = elsewhere[source]
            elsewhere[source].distances.append(distance)
    forget(coders.values())


def _here(coders: Mapping[str, SparseCoder], names: dict[int, str]) -> dict[int, Any]:
    found = {distance: coders.get(name) for distance, name in names.items()}
    return {d: coder for d, coder in found.items() if isinstance(coder, CrossLayerTranscoder)}


def sources_of(coder: SparseCoder) -> dict[str, tuple[int, CrossLayerTranscoder]]:
    """Hookpoint -> how many layers before and the coder there, of those whose latents come in."""
    if not isinstance(coder, CrossLayerTranscoder):
        return {}
    return {
        coder.cfg.sources[-distance]: (distance, source)
        for distance, source in coder.sources.items()
        if isinstance(source, CrossLayerTranscoder)
    }


def forget(coders: Iterable[SparseCoder]) -> None:
    """Drop what these coders, and those whose latents they take, have left and nothing has read."""
    for coder in coders:
        if isinstance(coder, CrossLayerTranscoder):
            for one in (coder, *coder.sources.values()):
                one.waiting.clear()

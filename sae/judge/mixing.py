"""How far the latents of a coder are mixed with each other: figures that need no labels."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ..coders.bank import CoderBank
from ..coders.sparse_coder import SparseCoder
from ..lm.capture import Pairs
from .latents import nearest_rows

DENSE = 0.1
"""Share of rows above which a latent that is active on them is called dense."""
_COPY, _ALIGNED = 0.9, 0.5  # cosines
_BLOCK, _SAMPLE = 1024, 4096
_BINS = torch.linspace(0, 1, 21, dtype=torch.float64)


@dataclass(frozen=True)
class Mixing:
    """Figures of the latents that held-out rows activate; docs/metrics.md says what they tell."""

    nearest_cosine: float | None
    """Mean over latents of the largest cosine between its decoder row and another one's."""

    nearest_cosine_histogram: list[int]
    """Latents by it: 20 bins from 0 to 1, what is below 0 in the first."""

    copies: float | None
    """Share of latents of which it is above .9."""

    alignment: float | None
    """Mean cosine between a latent's encoder and decoder row; None for a transcoder."""

    misaligned: float | None
    """Share of latents of which that is below .5."""

    firing_entropy: float
    """Entropy of which latent an activation is of, over log L: 1 if all fire equally often."""

    dense_share: float
    """Share of all latents that are active on more than a tenth of the rows."""

    dense_explains: float | None
    """(FVU without these - FVU) / (1 - FVU): their part of what is explained."""


def nearest_cosines(
    W_dec: Float[Tensor, "L D"], sample: int = _SAMPLE, block: int = _BLOCK
) -> Float[Tensor, " S"]:
    """max over j != i of cos(W_dec_i, W_dec_j), for S rows: all or, of more, a `sample` of them.

    `block` rows at a time meet all others.
    """
    chosen = torch.arange(len(W_dec))
    if len(W_dec) > sample:
        chosen = torch.randperm(len(W_dec), generator=torch.Generator().manual_seed(0))[:sample]
    return nearest_rows(W_dec, chosen.to(W_dec.device), 1, block).values.flatten()


def firing_entropy(fired: Float[Tensor, " L"]) -> float:
    """-sum_l p_l log p_l / log L, with p_l the share of all activations that are of latent l.

    Source: Pielou, "The measurement of diversity in different types of biological collections"
    (1966), where it is called evenness.
    """
    p = fired[fired > 0].double() / fired.sum()
    return float(-(p * p.log()).sum()) / math.log(len(fired)) if len(fired) > 1 else 1.0


@torch.no_grad()
def dense_errors(
    bank: CoderBank, batches: Iterator[Pairs], dense: Mapping[str, Tensor]
) -> dict[str, float]:
    """By coder sum ||y - sae_out||^2 without the latents that the mask `dense` [L] names."""
    sums = {name: torch.zeros((), dtype=torch.float64) for name in dense}
    for pairs in batches:
        for name, (x, y) in ((name, pairs[bank.hookpoint[name]]) for name in dense):
            coder = bank[name]
            source, target = x if coder.cfg.transcode else y, y.to(coder.dtype)
            found = coder(source, target, total_variance=1.0)
            acts = found.top_acts * dense[name][found.top_indices]
            of_dense = coder.decode(acts, found.top_indices) - coder.b_dec
            sums[name] += (target - found.sae_out + of_dense).double().square().sum().cpu()
    return {name: float(total) for name, total in sums.items()}


@torch.no_grad()
def mixing(coder: SparseCoder, fired: Float[Tensor, " L"], rows: float) -> Mixing:
    """The figures of a coder of which each latent was active on `fired` of so many rows.

    All but `dense_explains`, for which the rows must be read again.
    """
    alive = (fired > 0).to(coder.device)
    W_dec, W_enc = coder.directions()[alive].float(), coder.encoder.weight[alive].float()
    nearest = nearest_cosines(W_dec).cpu()
    aligned = None if coder.cfg.transcode else F.cosine_similarity(W_enc, W_dec, dim=1)
    return Mixing(
        nearest_cosine=_mean(nearest),
        nearest_cosine_histogram=_histogram(nearest),
        copies=_mean(nearest > _COPY),
        alignment=None if aligned is None else _mean(aligned),
        misaligned=None if aligned is None else _mean(aligned < _ALIGNED),
        firing_entropy=firing_entropy(fired),
        dense_share=float((fired > DENSE * rows).double().mean()),
        dense_explains=None,
    )


def _mean(values: Tensor) -> float | None:
    return float(values.double().mean()) if len(values) else None


def _histogram(cosines: Tensor) -> list[int]:
    return [int(n) for n in torch.histogram(cosines.double().clamp(0, 1), bins=_BINS).hist]


def explained(fvu: float, without: float) -> float | None:
    """(FVU without some latents - FVU) / (1 - FVU); None where nothing is explained."""
    return (without - fvu) / (1 - fvu) if fvu < 1 else None

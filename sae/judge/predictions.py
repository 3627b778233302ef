"""What the LM predicts with something in place of its activations."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from ..batch import TokenBatch
from ..coders.across.cross_layer import CrossLayerTranscoder, forget, sources_of
from ..coders.bank import CoderBank
from ..coders.sparse_coder import SparseCoder
from ..config import Columns
from ..data.blocks import TokenSource
from ..lm.capture import RowReader
from ..lm.head import (
    agreement,
    check_head,
    cross_entropy,
    kl_divergence,
    last_hidden_state,
    predictions_made,
)
from ..lm.joined import Joined
from ..lm.rows import RowRule
from ..lm.splice import Replacement, spliced
from ..placement.ranks import Ranks


@dataclass(frozen=True)
class Predictions:
    """The LM's next-token predictions, in nats, with something in place of activations."""

    ce_clean: float
    """Cross-entropy of the LM as it is."""

    ce_spliced: float
    """With the reconstruction."""

    ce_zero: float
    """With zeros."""

    ce_mean: float
    """With the mean of the held-out rows."""

    ce_recovered: float
    """(ce_zero - ce_spliced) / (ce_zero - ce_clean): 1 is the LM as it is, 0 is as bad as zeros."""

    kl: float
    """KL(clean || spliced), mean over positions."""

    top1_agreement: float
    """Share of positions at which the most likely next token stays the same."""


class Spliced(NamedTuple):
    """What goes into the LM in place of its activations."""

    widths: dict[str, int]
    """Hookpoint -> how wide its rows are."""
    at: Callable[[TokenBatch], dict[str, Replacement]]
    """For some tokens, what is put in at each hookpoint."""
    coders: list[SparseCoder]
    """Whose reconstructions they are."""


def of_coders(coders: dict[str, SparseCoder]) -> Spliced:
    """The reconstructions of coders, each at its hookpoint."""
    widths = {hookpoint: coder.d_out for hookpoint, coder in coders.items()}
    return Spliced(widths, lambda tokens: _reconstruction(coders), [*coders.values()])


def of_crosscoder(coder: SparseCoder, capture: Joined, hookpoints: Sequence[str]) -> Spliced:
    """The reconstruction of a crosscoder at some hookpoints, from the rows of the LM as it is."""

    def at(tokens: TokenBatch) -> dict[str, Replacement]:
        ((rows, _),) = capture(tokens).values()
        out = split_parts(coder.errors(rows, rows).sae_out, coder.cfg.parts)
        return {name: partial(_given, out[name]) for name in hookpoints}

    widths = {part.hookpoint: part.width for part in coder.cfg.parts}
    return Spliced({name: widths[name] for name in hookpoints}, at, [coder])


def everything_spliced(
    bank: CoderBank, capture: RowReader, with_prefixes: bool = False
) -> dict[str, Spliced]:
    """Every coder by its name, and all at once by "" where there is one per hookpoint.

    A crosscoder at all hookpoints of the first LM, and at each of them by `place_key`;
    `with_prefixes`: with every prefix too, by `prefix_key`.
    """
    found: dict[str, Spliced] = {}
    for name, coder in bank.items():
        shown = {name: coder}
        if with_prefixes:
            shown |= {prefix_key(name, n): coder.first(n) for n in coder.prefixes[:-1]}
        for key, one in shown.items():
            if isinstance(capture, Joined):
                places = [part.hookpoint for part in capture.parts if not part.lm]
                found[key] = of_crosscoder(one, capture, places)
                alone = {place_key(key, place): [place] for place in places}
                found |= {n: of_crosscoder(one, capture, at) for n, at in alone.items()}
            else:
                found[key] = of_coders({bank.hookpoint[name]: one})
    several = len(set(bank.hookpoint.values())) < len(bank.hookpoint)
    if not several and not isinstance(capture, Joined):
        found[""] = of_coders({bank.hookpoint[name]: coder for name, coder in bank.items()})
    return found


def prefix_key(name: str, latents: int) -> str:
    """What a prefix of a coder is called here."""
    return f"{name} first {latents}"  # which no hookpoint is called


def place_key(name: str, hookpoint: str) -> str:
    """What a crosscoder at one of its hookpoints is called here."""
    return f"{name} at {hookpoint}"


def split_parts(rows: Tensor, parts: tuple[Columns, ...]) -> dict[str, Tensor]:
    """By hookpoint the columns of a crosscoder's rows, in the unit of the hookpoint."""
    columns = rows.split([part.width for part in parts], dim=-1)
    return {p.hookpoint: of_one * p.rms for p, of_one in zip(parts, columns, strict=True)}


def _given(rows: Tensor, x: Tensor, y: Tensor | None) -> Tensor:
    return rows


@torch.no_grad()
def predictions(
    lm: PreTrainedModel,
    replace: dict[str, Spliced],
    means: dict[str, Tensor],
    source: TokenSource,
    order: Int[Tensor, " n"],
    real: int,
    rule: RowRule,
    ranks: Ranks,
) -> dict[str, Predictions]:
    """What the LM predicts with each kind of rows spliced in, and with zeros and means instead.

    `means` are the mean outputs of the hookpoints. Of `order` the blocks after the first `real`
    only keep ranks in step and do not count.
    """
    check_head(lm)
    # Per set: cross-entropy clean, spliced, zero, mean; KL; agreement; positions of CE and of KL.
    sums = {name: torch.zeros(8, dtype=torch.float64, device=ranks.device) for name in replace}

    def hidden_with(kind: dict[str, Replacement], tokens: TokenBatch) -> Tensor:
        with spliced(lm, kind, tokens, rule):
            return last_hidden_state(lm, tokens)

    for i, tokens in enumerate(source.batches(order, 1)):
        tokens = tokens.to(ranks.device)
        clean, made = last_hidden_state(lm, tokens), predictions_made(tokens)
        ce_clean = cross_entropy(lm, clean, tokens)
        constant: dict[tuple[str, ...], list[Tensor]] = {}
        for name, (widths, at, coders) in replace.items():
            if tuple(widths) not in constant:
                kinds = [_constant(widths), _constant(widths, means)]
                states = (hidden_with(kind, tokens) for kind in kinds)
                constant[tuple(widths)] = [cross_entropy(lm, state, tokens) for state in states]
            hidden = hidden_with(at(tokens), tokens)
            forget(coders)
            found = [ce_clean, cross_entropy(lm, hidden, tokens), *constant[tuple(widths)]]
            found += [kl_divergence(lm, hidden, clean, tokens)]
            found += [agreement(lm, hidden, clean, tokens)]
            found += [torch.tensor(count, device=clean.device) for count in made]
            sums[name] += torch.stack([t.double() for t in found]) * (i < real)
    ranks.sum_(sums.values())
    results = {}
    for name, total in sums.items():
        *ce, kl, same, targets, positions = total.tolist()
        ce_clean, ce_spliced, ce_zero, ce_mean = (loss / targets for loss in ce)
        # Where zeros change nothing there is nothing to recover, but something to spoil.
        lost = ce_zero - ce_clean
        recovered = (ce_zero - ce_spliced) / lost if lost else float(ce_spliced == ce_clean)
        results[name] = Predictions(
            ce_clean=ce_clean,
            ce_spliced=ce_spliced,
            ce_zero=ce_zero,
            ce_mean=ce_mean,
            ce_recovered=recovered,
            kl=kl / positions,
            top1_agreement=same / positions,
        )
    return results


def _reconstruction(coders: dict[str, SparseCoder]) -> dict[str, Replacement]:
    """What coders make of what their modules read; layers before them are read alone."""

    def of(coder: SparseCoder) -> Replacement:
        def rows(x: Tensor, y: Tensor | None) -> Tensor:
            source = x if coder.cfg.transcode else y
            assert source is not None, "an SAE's module runs"
            return coder.errors(source, x.new_zeros(len(x), coder.d_out)).sae_out

        return rows

    def reading(source: CrossLayerTranscoder, distance: int) -> Replacement:
        def rows(x: Tensor, y: Tensor | None) -> Tensor:
            assert y is not None, "modules run"
            source.leave(x, distance)
            return y

        return rows

    found = {hookpoint: of(coder) for hookpoint, coder in coders.items()}
    for coder in coders.values():
        for name, (distance, source) in sources_of(coder).items():
            found.setdefault(name, reading(source, distance))
    return found


def _constant(
    widths: dict[str, int], rows: dict[str, Tensor] | None = None
) -> dict[str, Replacement]:
    """Zeros, or a row for each hookpoint, whatever the activations are."""

    def of(hookpoint: str, width: int) -> Replacement:
        row = torch.zeros(width) if rows is None else rows[hookpoint]
        return lambda x, y: row.to(x).expand(len(x), width)

    return {name: of(name, width) for name, width in widths.items()}

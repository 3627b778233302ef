"""What the LM predicts with something in place of its activations."""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from ..batch import TokenBatch
from ..coders.across.cross_layer import CrossLayerTranscoder, forget, sources_of
from ..coders.sparse_coder import SparseCoder
from ..data.blocks import TokenSource
from ..lm.head import (
    agreement,
    check_head,
    cross_entropy,
    kl_divergence,
    last_hidden_state,
    predictions_made,
)
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


@torch.no_grad()
def predictions(
    lm: PreTrainedModel,
    replace: dict[str, dict[str, SparseCoder]],
    means: dict[str, Tensor],
    source: TokenSource,
    order: Int[Tensor, " n"],
    real: int,
    rule: RowRule,
    ranks: Ranks,
) -> dict[str, Predictions]:
    """What the LM predicts with each set of coders, and with zeros and means in their place.

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
        for name, coders in replace.items():
            if tuple(coders) not in constant:
                kinds = [_constant(coders), _constant(coders, means)]
                states = (hidden_with(kind, tokens) for kind in kinds)
                constant[tuple(coders)] = [cross_entropy(lm, state, tokens) for state in states]
            hidden = hidden_with(_reconstruction(coders), tokens)
            forget(coders.values())
            found = [ce_clean, cross_entropy(lm, hidden, tokens), *constant[tuple(coders)]]
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
    coders: dict[str, SparseCoder], rows: dict[str, Tensor] | None = None
) -> dict[str, Replacement]:
    """Zeros, or a row for each hookpoint, whatever the activations are."""

    def of(hookpoint: str, width: int) -> Replacement:
        row = torch.zeros(width) if rows is None else rows[hookpoint]
        return lambda x, y: row.to(x).expand(len(x), width)

    return {name: of(name, coder.d_out) for name, coder in coders.items()}

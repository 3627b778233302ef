"""Held-out figures of coders, in training and by command."""

import dataclasses
import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from natsort import natsorted
from torch import Tensor

from ..coders.across.crosscoder import part_norms, shares_by_lm
from ..coders.bank import CoderBank
from ..coders.moments import Moments, accumulate
from ..coders.sparse_coder import SparseCoder
from ..data.blocks import TokenSource
from ..flag_checks import UsageError
from ..lm.capture import Pairs, RowReader
from ..lm.head import has_head, unusable_head
from ..lm.joined import Joined
from ..placement.exchange import no_rows
from ..runs.checkpoint import check_room
from ..training.state import TrainingState
from .mixing import DENSE, Mixing, dense_errors, explained, mixing
from .predictions import (
    Predictions,
    everything_spliced,
    place_key,
    predictions,
    prefix_key,
    split_parts,
)

_BINS = torch.linspace(-6, 0, 25, dtype=torch.float64)


@dataclass(frozen=True)
class PrefixFigures:
    """Figures of the reconstruction from the first latents of a coder alone."""

    latents: int
    """How many they are."""

    fvu: float
    """sum ||y - sae_out_m||^2 / sum ||y - y_mean||^2 over all held-out rows."""

    l0: float
    """How many of them are active on a row, in the mean."""

    dead_share: float
    """Share of them that no held-out row activates."""

    predictions: Predictions | None = None
    """What the LM predicts with this reconstruction, where that is known."""


@dataclass(frozen=True)
class HookpointFigures:
    """Figures of a crosscoder at one of its hookpoints."""

    hookpoint: str
    """Where."""

    fvu: float
    """sum ||y - sae_out||^2 / sum ||y - y_mean||^2 of its columns, over all held-out rows."""

    decoder_share: float
    """Mean over latents of the part that its norm has in the sum of decoder norms."""

    predictions: Predictions | None = None
    """What the LM predicts with the reconstruction there alone, of the first LM's hookpoints."""


@dataclass(frozen=True)
class ModelFigures:
    """How far the latents of a crosscoder over several LMs are those of one of them."""

    model: str
    """Which LM, "" for the first."""

    decoder_share: float
    """Mean over latents of the part that its hookpoints have in the sum of decoder norms."""

    histogram: list[int]
    """Latents by that part: 20 bins from 0, not of this LM at all, to 1, of no other."""


@dataclass(frozen=True)
class CoderFigures:
    """Figures of one coder on held-out rows; those of predictions where the LM has its head.

    Source of NMSE, and of the downstream loss: Gao et al., sections 2.1 and 4.1.
    """

    fvu: float
    """sum ||y - sae_out||^2 / sum ||y - y_mean||^2 over all held-out rows."""

    nmse: float
    """MSE over that of always predicting the mean activation: over the same rows it is the FVU."""

    cosine: float
    """Mean over rows of the cosine between y and sae_out."""

    l0: float
    """Mean active latents per row."""

    dead_share: float
    """Share of latents that no held-out row activates."""

    frequency_histogram: list[int]
    """Latents by log10 of the share of rows that activate them: 24 bins from -6 to 0."""

    predictions: Predictions | None = None
    """What the LM predicts with this reconstruction in place of the activations."""

    hookpoints: tuple[HookpointFigures, ...] | None = None
    """Of a crosscoder, how well it does at each of its hookpoints."""

    models: tuple[ModelFigures, ...] | None = None
    """Of a crosscoder over several LMs, whose its latents are."""

    prefixes: tuple[PrefixFigures, ...] | None = None
    """The same of every prefix, of a coder that has some (--matryoshka)."""

    mixing: Mixing | None = None
    """How far latents are mixed with each other, where that was asked for."""


class Evaluation(NamedTuple):
    """Figures of every coder, and of all spliced in at once where there is one per hookpoint."""

    coders: dict[str, CoderFigures]
    together: Predictions | None = None

    def scalars(self) -> dict[str, float]:
        """Every figure that is a number, by `figure/coder`; of all at once by `figure/all`."""
        found, (by_coder, all_at_once) = dict[str, float](), self.as_json()
        for name, figures in by_coder.items():
            values = {**figures, **(figures["predictions"] or {})}
            found |= {f"{n}/{name}": v for n, v in values.items() if isinstance(v, float)}
            for part in figures["hookpoints"] or ():
                found[f"fvu_of_{part['hookpoint']}/{name}"] = part["fvu"]
            for prefix in figures["prefixes"] or ():
                found[f"fvu_of_first_{prefix['latents']}/{name}"] = prefix["fvu"]
        return found | {f"{n}/all": v for n, v in (all_at_once or {}).items()}

    def fvu(self) -> dict[str, float]:
        """Held-out FVU by coder."""
        return {name: found.fvu for name, found in self.coders.items()}

    def as_json(self) -> tuple[dict[str, dict[str, Any]], dict[str, float] | None]:
        """The figures of every coder, and those with all spliced in at once."""
        by_coder = {name: dataclasses.asdict(found) for name, found in self.coders.items()}
        return by_coder, None if self.together is None else dataclasses.asdict(self.together)


@torch.no_grad()
def held_out_figures(
    capture: RowReader,
    state: TrainingState,
    source: TokenSource,
    blocks: Int[Tensor, " held"],
    in_depth: bool = False,
) -> Evaluation:
    """Figures of every coder as it would be saved, over all rows of the held-out `blocks` at once.

    Every rank takes each W-th block, and all know all figures in the end. `in_depth`, in one
    process: predictions with every prefix, and how latents are mixed, for which the text is read
    once more. Raises UsageError where the rows define no FVU.
    """
    bank, exchange = state.bank, state.exchange
    ranks, mine = exchange.ranks, blocks[exchange.ranks.rank :: exchange.ranks.world]
    # All ranks run the LM equally often: those without a block left read one and drop its rows.
    idle = -(-len(blocks) // ranks.world) - len(mine)
    order = torch.cat([mine, blocks[-1:].expand(idle)])
    zero = torch.zeros(3, dtype=torch.float64, device=ranks.device)
    sums = {name: zero.clone() for name in bank.hookpoint}  # squared error, cosine, active
    fired = {n: zero.new_zeros(c.num_latents) for n, c in bank.items()}
    of_prefixes = {n: zero.new_zeros(len(c.prefixes)) for n, c in bank.items() if c.prefixes}
    of_columns = {n: zero.new_zeros(2, c.d_out) for n, c in bank.items() if c.cfg.parts}
    moments: dict[str, Moments] = {}
    with ExitStack() as stack:
        for optimizer in state.optimizers.values():
            stack.enter_context(optimizer.trained())
        for i, tokens in enumerate(source.batches(order, 1)):
            pairs = capture(tokens.to(ranks.device))
            if i >= len(mine):
                pairs = {name: no_rows(pair) for name, pair in pairs.items()}
            for hookpoint, (x, y) in exchange.to_owners([pairs])[0].items():
                accumulate(moments, hookpoint, y)
                for name, coder in bank.at(hookpoint):
                    # A folder may hold SAEs beside transcoders.
                    errors = coder.errors(x if coder.cfg.transcode else y, y)
                    active = errors.top_acts > 0
                    sae_out = coder.whole(errors.sae_out)
                    cosine = F.cosine_similarity(sae_out, y.float(), dim=1).sum()
                    sums[name] += torch.stack([errors.squared_error, cosine, active.sum()])
                    fired[name].index_add_(0, errors.top_indices[active], active[active].double())
                    if name in of_columns:
                        squares = torch.stack([(sae_out - y).square().sum(0), y.square().sum(0)])
                        of_columns[name] += squares
                    if errors.prefix_errors is not None:
                        of_prefixes[name] += errors.prefix_errors
        totals = [t for seen in moments.values() for t in seen]
        if exchange.post is not None:
            exchange.post.settle()
        by_coder = [*sums.values(), *fired.values(), *of_prefixes.values(), *of_columns.values()]
        exchange.sum_replicas_(*totals, *by_coder)
        figures: dict[str, CoderFigures] = {}
        with ranks.together():
            for name, hookpoint in bank.hookpoint.items():
                found = (moments[hookpoint], sums[name], fired[name])
                figures[name] = _figures(hookpoint, *found)
                if name in of_columns:
                    parts = _of_hookpoints(bank[name], of_columns[name], moments[hookpoint])
                    more = {"hookpoints": parts, "models": _of_models(bank[name])}
                    figures[name] = dataclasses.replace(figures[name], **more)
                if name in of_prefixes:
                    prefixes = _of_prefixes(bank[name].prefixes, of_prefixes[name], *found)
                    figures[name] = dataclasses.replace(figures[name], prefixes=prefixes)
        if in_depth:
            again = (capture(t.to(ranks.device)) for t in source.batches(blocks, 1))
            figures = _with_mixing(figures, bank, again, moments, fired)
        means = {name: seen.mean for name, seen in moments.items()}
        where = (means, source, order, len(mine))
        predicted = _predictions(capture, state, *where, in_depth)
        figures = {name: _with(predicted, name, found) for name, found in figures.items()}
    merged = exchange.merge(figures)
    ordered = {name: merged[name] for name in natsorted(merged)}
    return Evaluation(ordered, predicted.get(""))


def _predictions(
    capture: RowReader,
    state: TrainingState,
    means: dict[str, Tensor],
    source: TokenSource,
    order: Tensor,
    real: int,
    predict_prefixes: bool = False,
) -> dict[str, Predictions]:
    """What the LM predicts with each coder, and with all at once by ""; nothing without its head.

    `means` are those of the hookpoints' rows; of `order` the first `real` blocks count.
    `predict_prefixes`: with each prefix too.
    """
    lm, bank, exchange = capture.lm, state.bank, state.exchange
    if lm is None or exchange.distributed or not has_head(lm):
        return {}
    replace = everything_spliced(bank, capture, predict_prefixes)
    if isinstance(capture, Joined):
        means = split_parts(next(iter(means.values())), capture.parts)
    return predictions(
        *(lm, replace, means, source, order, real, capture.rule, state.exchange.ranks)
    )


def _with_mixing(
    figures: dict[str, CoderFigures],
    bank: CoderBank,
    batches: Iterator[Pairs],
    moments: dict[str, Moments],
    fired: dict[str, Tensor],
) -> dict[str, CoderFigures]:
    """The figures with those of mixed latents; `batches` are all rows again."""
    seen = {name: moments[bank.hookpoint[name]] for name in figures}
    rows = {name: float(found.count) for name, found in seen.items()}
    found = {name: mixing(bank[name], fired[name], rows[name]) for name in figures}
    dense = {name: fired[name] > DENSE * rows[name] for name in figures}
    errors = dense_errors(bank, batches, dense)
    for name, of_one in figures.items():
        without = explained(of_one.fvu, errors[name] / float(seen[name].total_variance))
        whole = dataclasses.replace(found[name], dense_explains=without)
        figures[name] = dataclasses.replace(of_one, mixing=whole)
    return figures


def _with(predicted: dict[str, Predictions], name: str, figures: CoderFigures) -> CoderFigures:
    """The figures of a coder with what the LM predicts with it, and with its prefixes."""
    prefixes, whole = figures.prefixes, predicted.get(name)
    parts = tuple(
        dataclasses.replace(p, predictions=predicted.get(place_key(name, p.hookpoint)))
        for p in figures.hookpoints or ()
    )
    if prefixes is not None:
        keys = [prefix_key(name, prefix.latents) for prefix in prefixes[:-1]]
        found = [*(predicted.get(key) for key in keys), whole]
        pairs = zip(prefixes, found, strict=True)
        prefixes = tuple(dataclasses.replace(p, predictions=of_one) for p, of_one in pairs)
    found = {"predictions": whole, "prefixes": prefixes, "hookpoints": parts or None}
    return dataclasses.replace(figures, **found)


def rehearse_end(
    run: Path,
    capture: RowReader,
    state: TrainingState,
    source: TokenSource,
    held_out: Int[Tensor, " held"],
) -> None:
    """Try what comes at the end of a run before hours of training; moves no number.

    Raises UsageError where the LM cannot be evaluated with reconstructions in it, or the disk has
    no room for a checkpoint.
    """
    bank = state.bank
    means = {bank.hookpoint[n]: torch.zeros(c.d_out, device=c.device) for n, c in bank.items()}
    with state.exchange.ranks.together():
        check_room(run, state)
    if capture.lm is None:
        return
    if (note := unusable_head(capture.lm)) and state.exchange.ranks.main:
        print(note)
    try:
        _predictions(capture, state, means, source, held_out[:1], 1)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"MODEL: {type(capture.lm).__name__} cannot be evaluated with reconstructions in it: "
            f"leave --eval_every out, or take the model without its head. {reason}"
        ) from None


def _figures(hookpoint: str, seen: Moments, sums: Tensor, fired: Tensor) -> CoderFigures:
    error, cosine, active = sums.tolist()
    fvu = error / float(seen.total_variance) if seen.total_variance else float("nan")
    if not math.isfinite(fvu):
        raise UsageError(
            f"--eval_tokens: held-out FVU at {hookpoint} is not a number: too few tokens are held "
            f"out (see --exclude_tokens, --exclude_positions), or the activations hold NaN or Inf"
        )
    rows = float(seen.count)
    return CoderFigures(
        fvu=fvu,
        nmse=(error / rows) / (float(seen.total_variance) / rows),
        cosine=cosine / rows,
        l0=active / rows,
        dead_share=float((fired == 0).double().mean()),
        frequency_histogram=frequency_histogram(fired, rows),
    )


def _of_hookpoints(
    coder: SparseCoder, squares: Float[Tensor, "2 D"], seen: Moments
) -> tuple[HookpointFigures, ...]:
    """`squares` are sums over rows, by column, of the error and of the target."""
    assert coder.W_dec is not None
    parts = coder.cfg.parts
    norms = part_norms(coder.W_dec.double(), parts)
    shares = (norms / norms.sum(1, keepdim=True)).nanmean(0)
    variance = squares[1] - seen.total.square() / seen.count
    sums = torch.stack([squares[0], variance]).split([part.width for part in parts], dim=1)
    return tuple(
        HookpointFigures(part.hookpoint, float(error / of_all), float(share))
        for part, (error, of_all), share in zip(
            parts, (s.sum(1) for s in sums), shares, strict=True
        )
    )


def _of_models(coder: SparseCoder) -> tuple[ModelFigures, ...] | None:
    assert coder.W_dec is not None
    found = []
    for lm, shares in shares_by_lm(coder.W_dec.detach(), coder.cfg.parts).items():
        histogram = torch.histogram(shares.double().cpu(), bins=20, range=(0.0, 1.0)).hist
        found.append(ModelFigures(lm, float(shares.nanmean()), [int(n) for n in histogram]))
    return tuple(found) or None


def _of_prefixes(
    prefixes: tuple[int, ...], errors: Tensor, seen: Moments, sums: Tensor, fired: Tensor
) -> tuple[PrefixFigures, ...]:
    fvu, rows = (errors / seen.total_variance).tolist(), float(seen.count)
    return tuple(
        PrefixFigures(
            latents,
            fvu=of_one,
            l0=float(fired[:latents].sum()) / rows,
            dead_share=float((fired[:latents] == 0).double().mean()),
        )
        for latents, of_one in zip(prefixes, fvu, strict=True)
    )


def frequency_histogram(fired: Float[Tensor, " L"], rows: float) -> list[int]:
    """Latents by log10 of the share of rows that activate them: 24 bins from -6 to 0."""
    frequency = (fired[fired > 0].double().cpu() / rows).log10()
    return [int(n) for n in torch.histogram(frequency.clamp(min=-6), bins=_BINS).hist]

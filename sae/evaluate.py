"""What trained coders are worth, on tokens that they were not trained on."""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Int
from natsort import natsorted
from torch import Tensor
from transformers import PreTrainedModel

from .bank import CoderBank
from .blocks import TokenSource
from .config import UsageError
from .exchange import Exchange, no_rows
from .functional import Moments, accumulate
from .hookpoints import capture
from .optim import CoderOptimizer
from .ranks import Ranks


@dataclass(frozen=True)
class HeldOut:
    """Held-out figures of one coder."""

    fvu: float
    """sum ||y - sae_out||^2 / sum ||y - y_mean||^2 over all held-out rows."""

    l0: float
    """Mean active latents per row."""


def first_moments(
    lm: PreTrainedModel,
    places: list[str],
    batches: Iterable[Int[Tensor, "B S"]],
    ranks: Ranks,
    exclude_tokens: tuple[int, ...] = (),
) -> tuple[dict[str, Moments], dict[str, Moments]]:
    """Moments of every hookpoint's inputs and of its outputs over all rows of all ranks' batches.

    Raises UsageError where no row is left.
    """
    inputs: dict[str, Moments] = {}
    outputs: dict[str, Moments] = {}
    for tokens in batches:
        captured = capture(lm, tokens, places, exclude_tokens)
        for place, pair in captured.items():
            for found, rows in zip((inputs, outputs), pair, strict=True):
                accumulate(found, place, rows)
    ranks.sum_(t for found in (inputs, outputs) for m in found.values() for t in m)
    ranks.traffic()  # is of no step
    if not all(moments.count for moments in outputs.values()):
        raise UsageError(
            f"--exclude_tokens {' '.join(map(str, exclude_tokens[:9]))}: leaves no token of the "
            f"first step; exclude fewer"
        )
    return inputs, outputs


@torch.no_grad()
def held_out(
    lm: PreTrainedModel,
    exchange: Exchange,
    bank: CoderBank,
    optimizers: dict[str, CoderOptimizer],
    source: TokenSource,
    held: Int[Tensor, " held"],
    exclude_tokens: tuple[int, ...] = (),
) -> dict[str, HeldOut]:
    """Figures of every coder as it would be saved, over all rows of the held-out blocks at once.

    Every rank takes each W-th block, and all know all figures in the end. Raises UsageError where
    the rows define no FVU.
    """
    ranks = exchange.ranks
    places, mine = list(exchange.owner), held[ranks.rank :: ranks.world]
    # All ranks run the LM equally often: those without a block left read one and drop its rows.
    idle = -(-len(held) // ranks.world) - len(mine)
    order = torch.cat([mine, held[-1:].expand(idle)])
    zero = torch.zeros((), dtype=torch.float64, device=ranks.device)
    errors = {name: zero.clone() for name in bank.hookpoint}
    active = {name: zero.clone() for name in bank.hookpoint}
    moments: dict[str, Moments] = {}
    with ExitStack() as stack:
        for optimizer in optimizers.values():
            stack.enter_context(optimizer.trained())
        for i, tokens in enumerate(source.batches(order, 1)):
            pairs = capture(
                lm, tokens.to(ranks.device), places, exclude_tokens, inputs=bank.transcode
            )
            if i >= len(mine):
                pairs = {place: no_rows(pair) for place, pair in pairs.items()}
            for place, (x, y) in exchange.to_owners(pairs).items():
                accumulate(moments, place, y)
                for name, coder in bank.at(place):
                    out = coder(x, y, total_variance=1.0)
                    errors[name] += out.fvu
                    active[name] += (out.top_acts > 0).sum()
    sums = [t for seen in moments.values() for t in seen]
    exchange.sum_replicas_(*sums, *errors.values(), *active.values())
    figures: dict[str, HeldOut] = {}
    with ranks.together():
        for name, place in bank.hookpoint.items():
            fvu, rows = errors[name] / moments[place].total_variance, moments[place].count
            if not fvu.isfinite():
                raise UsageError(
                    f"--eval_tokens: held-out FVU at {place} is not a number: too few tokens are "
                    f"held out (see --exclude_tokens), or the activations hold NaN or Inf"
                )
            figures[name] = HeldOut(fvu=float(fvu), l0=float(active[name] / rows))
    ranks.traffic()  # is of no step
    merged = exchange.merge(figures)
    return {name: merged[name] for name in natsorted(merged)}

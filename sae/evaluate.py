"""What trained coders are worth, on tokens that they were not trained on."""

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from .bank import CoderBank
from .config import UsageError
from .functional import Moments, accumulate
from .hookpoints import capture
from .optim import CoderOptimizer


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
    exclude_tokens: tuple[int, ...] = (),
) -> tuple[dict[str, Moments], dict[str, Moments]]:
    """Moments of every hookpoint's inputs and of its outputs over all rows of the batches.

    Raises UsageError where no row is left.
    """
    inputs: dict[str, Moments] = {}
    outputs: dict[str, Moments] = {}
    for tokens in batches:
        for place, pair in capture(lm, tokens, places, exclude_tokens).items():
            for found, rows in zip((inputs, outputs), pair, strict=True):
                accumulate(found, place, rows.float())
    if not all(moments.count for moments in outputs.values()):
        raise UsageError(
            f"--exclude_tokens {' '.join(map(str, exclude_tokens[:9]))}: leaves no token of the "
            f"first step; exclude fewer"
        )
    return inputs, outputs


@torch.no_grad()
def held_out(
    lm: PreTrainedModel,
    bank: CoderBank,
    optimizers: dict[str, CoderOptimizer],
    batches: Iterable[Int[Tensor, "B S"]],
    exclude_tokens: tuple[int, ...] = (),
) -> dict[str, HeldOut]:
    """Figures of every coder as it would be saved, over all rows of the batches at once.

    Raises UsageError where the rows define no FVU.
    """
    places = list(dict.fromkeys(bank.hookpoint.values()))
    zero = torch.zeros((), dtype=torch.float64, device=lm.device)
    errors, active = dict.fromkeys(bank.hookpoint, zero), dict.fromkeys(bank.hookpoint, zero)
    moments: dict[str, Moments] = {}
    with ExitStack() as stack:
        for optimizer in optimizers.values():
            stack.enter_context(optimizer.trained())
        for tokens in batches:
            for place, (x, y) in capture(lm, tokens, places, exclude_tokens).items():
                x, y = x.float(), y.float()
                accumulate(moments, place, y)
                for name, coder in bank.at(place):
                    out = coder(x if coder.cfg.transcode else y, y, total_variance=1.0)
                    errors[name] = errors[name] + out.fvu
                    active[name] = active[name] + (out.top_acts > 0).sum()
    for name, place in bank.hookpoint.items():
        if place not in moments or not (errors[name] / moments[place].total_variance).isfinite():
            raise UsageError(
                f"--eval_tokens: held-out FVU at {place} is not a number: too few tokens are held "
                f"out (see --exclude_tokens), or the activations hold NaN or Inf"
            )
    return {
        name: HeldOut(
            fvu=float(errors[name] / moments[place].total_variance),
            l0=float(active[name] / moments[place].count),
        )
        for name, place in bank.hookpoint.items()
    }

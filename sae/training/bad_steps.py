"""Steps whose numbers went bad are skipped, counted, and end the run when they are too many."""

import math
import sys
from typing import NamedTuple

import torch
from torch import Tensor

from ..coders.firing import FiringRecord
from ..flag_checks import UsageError
from ..placement.ranks import Ranks

Metrics = dict[str, Tensor | float]


class BadNumber(NamedTuple):
    """A metric that is NaN or infinite."""

    name: str
    value: float


def bad_number(metrics: Metrics, ranks: Ranks) -> BadNumber | None:
    """The first metric that is not finite on some rank, the same on all; None if all are."""
    numbers = as_numbers(metrics)
    bad = [name for name, value in numbers.items() if not math.isfinite(value)]
    if not any(ranks.gather(len(bad))):
        return None
    found = ranks.merge({bad[0]: numbers[bad[0]]} if bad else {})
    return BadNumber(*min(found.items()))


class BadSteps:
    """The steps that were skipped because a loss or a gradient was NaN or infinite."""

    def __init__(self, limit: int, ranks: Ranks, dealt: int = 1) -> None:
        """`limit`: as many are skipped before the run ends.

        The steps that one batch is `dealt` to have rows of all its sequences: they count as one.
        """
        self._limit, self._ranks, self._dealt = limit, ranks, dealt
        self._batches: set[int] = set()
        self.skipped = 0
        self.verdict: UsageError | None = None
        """What ends the run, once more than `limit` batches had bad steps."""

    def skip(self, bad: BadNumber, step: int, sequences: Tensor) -> None:
        """Count step number `step` as skipped, and say so.

        `sequences` are the numbers of the blocks that it was made of.
        """
        self.skipped += 1
        self._batches.add((step - 1) // self._dealt)
        metric, _, coder = bad.name.partition("/")
        said = f"step {step}: {metric} at {coder} is {bad.value}"
        made_of = f"it was made of sequences {' '.join(str(int(n)) for n in sequences)}"
        if len(self._batches) > self._limit:
            self.verdict = UsageError(
                f"{said}, in the LM's activations there or the loss, or the targets are constant "
                f"(see --exclude_tokens); {made_of}. {self.skipped} bad steps were skipped, by "
                f"batches more than --max_bad_steps {self._limit}; what was last good is saved as "
                f"step {step}. Try --mixed_precision no, a lower --lr, or another hookpoint"
            )
        elif self._ranks.main:
            print(f"{said}: no update; {made_of}", file=sys.stderr)


def ask(
    metrics: Metrics, firing: dict[str, FiringRecord], seen: dict[str, tuple[Tensor, int]]
) -> tuple[Metrics, dict[str, int]]:
    """Metrics as numbers, and how many latents of each coder are dead once the step is counted.

    `seen` is what `FiringRecord.add_step_` will be given. What a step must know of the device is
    asked here, in one transfer: the host waits until all that is queued there is done.
    """
    dead = {f"dead after/{name}": firing[name].dead_after(*seen[name]) for name in firing}
    numbers = as_numbers({**metrics, **dead})
    return (
        {name: numbers[name] for name in metrics},
        {name: int(numbers[f"dead after/{name}"]) for name in firing},
    )


def as_numbers(metrics: Metrics) -> dict[str, float]:
    """Metrics as numbers, in one transfer from the device."""
    tensors = [m for m in metrics.values() if isinstance(m, Tensor)]
    moved = torch.stack([t.detach().double() for t in tensors]).tolist() if tensors else []
    read = iter(moved)
    return {n: next(read) if isinstance(m, Tensor) else float(m) for n, m in metrics.items()}

"""Steps whose numbers went bad are skipped, counted, and end the run when they are too many."""

import math
import sys

import torch
from torch import Tensor

from .config import UsageError
from .ranks import Ranks

Metrics = dict[str, Tensor | float]


class BadSteps:
    """The steps that were skipped because a loss or a gradient was NaN or infinite."""

    def __init__(self, limit: int, ranks: Ranks) -> None:
        """`limit`: as many are skipped before the run ends."""
        self._limit, self._ranks = limit, ranks
        self.skipped = 0
        self.verdict: UsageError | None = None
        """What ends the run, once more than `limit` steps were bad."""

    def good(self, metrics: Metrics, step: int, sequences: Tensor) -> bool:
        """Whether all numbers of step number `step` are finite, on all ranks: else make no update.

        Of a bad step only the count remains in `metrics`. `sequences` are the numbers of the
        blocks that it was made of.
        """
        numbers = as_numbers(metrics)
        bad = [name for name, value in numbers.items() if not math.isfinite(value)]
        found = {bad[0]: numbers[bad[0]]} if bad else {}
        if not any(self._ranks.gather(len(bad))):
            return True
        (name, value), *_ = sorted(self._ranks.merge(found).items())
        self.skipped += 1
        metrics.clear()
        metrics["skipped_steps"] = float(self.skipped)
        metric, _, place = name.partition("/")
        said = f"step {step}: {metric} at {place} is {value}"
        made_of = f"it was made of sequences {' '.join(str(int(n)) for n in sequences)}"
        if self.skipped > self._limit:
            self.verdict = UsageError(
                f"{said}, in the LM's activations there or the loss, or the targets are constant "
                f"(see --exclude_tokens); {made_of}. {self.skipped} bad steps were skipped, more "
                f"than --max_bad_steps {self._limit}; what was last good is saved as step {step}. "
                f"Try --mixed_precision no, a lower --lr, or another hookpoint"
            )
        elif self._ranks.main:
            print(f"{said}: no update; {made_of}", file=sys.stderr)
        return False


def as_numbers(metrics: Metrics) -> dict[str, float]:
    """Metrics as numbers, in one transfer from the device."""
    tensors = [m for m in metrics.values() if isinstance(m, Tensor)]
    moved = torch.stack([t.detach().double() for t in tensors]).tolist() if tensors else []
    read = iter(moved)
    return {n: next(read) if isinstance(m, Tensor) else float(m) for n, m in metrics.items()}

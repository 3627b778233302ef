"""What one optimizer step adds up: over pieces, forwards and ranks, to divide only once."""

import torch
from torch import Tensor

from .bank import CoderBank
from .dead_latents import FiringRecord, dead_latents
from .functional import Moments, accumulate
from .sparse_coder import CoderOutput

_LOSSES = ("fvu", "auxk", "multi_topk_fvu")


class StepSums:
    """Moments of targets, sums of squared errors, and counts of what fired, of one step.

    They add over everything that a step consists of, so that the denominator of FVU, and all that
    is logged, is of all rows of the step.
    """

    def __init__(self, bank: CoderBank, dead_after: int) -> None:
        """`dead_after`: tokens of silence after which a latent counts as dead."""
        self.bank = bank
        self.firing = {
            n: FiringRecord(c.num_latents, dead_after, c.device) for n, c in bank.items()
        }
        """How often each coder's latents fire, over all steps."""
        self.start_step()

    def start_step(self, auxk: bool = False) -> dict[str, Tensor | None]:
        """Forget the last step; return numbers of the latents that AuxK may revive, if asked for.

        Of a step that was skipped, gradients and counts are still there.
        """
        self.bank.zero_grad(set_to_none=True)
        self.rows = 0
        """Rows of each hookpoint on this rank, trained here or sent to their owner."""
        self._moments: dict[str, Moments] = {}
        device = next((coder.device for _, coder in self.bank.items()), "cpu")
        for record in self.firing.values():
            record.step_counts.zero_()
        self._errors = {name: torch.zeros(3, device=device) for name, _ in self.bank.items()}
        return dead_latents(self.firing) if auxk else dict.fromkeys(self.firing)

    def add_targets(self, place: str, y: Tensor) -> None:
        """Count the target rows of a hookpoint."""
        accumulate(self._moments, place, y)

    def add(self, name: str, out: CoderOutput) -> None:
        """Count what a coder returned for a total variance of 1: sums of squared errors."""
        self._errors[name] += torch.stack(out[3:]).detach()
        self.firing[name].observe(out.top_acts, out.top_indices)

    def tensors(self) -> list[Tensor]:
        """Everything that sums over ranks."""
        moments = [t for seen in self._moments.values() for t in seen]
        counts = [record.step_counts for record in self.firing.values()]
        return [*moments, *self._errors.values(), *counts]

    def variance(self, name: str) -> Tensor:
        """sum ||y - y_mean||^2 over the targets of a coder; 1 where its targets were not seen."""
        place = self.bank.hookpoint[name]
        if place not in self._moments:
            return torch.ones((), dtype=torch.float64, device=self._errors[name].device)
        return self._moments[place].total_variance

    def losses(self, name: str) -> dict[str, Tensor | float]:
        """FVU, AuxK and Multi-TopK of a coder, as metrics; none where its targets were not seen."""
        if self.bank.hookpoint[name] not in self._moments:
            return {}
        found = self._errors[name] / self.variance(name)
        return {f"{loss}/{name}": value for loss, value in zip(_LOSSES, found, strict=True)}

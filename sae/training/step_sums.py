"""What one optimizer step adds up: over pieces, forwards and ranks, to divide only once."""

from collections import Counter

import torch
from torch import Tensor

from ..coders.bank import CoderBank
from ..coders.moments import Moments, accumulate
from ..coders.outputs import CoderErrors
from ..coders.sparse_coder import SparseCoder

_LOSSES = ("fvu", "auxk", "multi_topk_fvu")


class StepSums:
    """Moments of targets, sums of squared errors, and counts of what fired, of one step.

    They add over everything that a step consists of, so that the denominator of FVU, and all that
    is logged, is of all rows of the step.
    """

    def __init__(self, bank: CoderBank) -> None:
        coders = dict(bank.items())
        device = next((coder.device for coder in coders.values()), "cpu")
        self.rows: Counter[str] = Counter()
        """Rows of each hookpoint on this rank, trained here or sent to their owner."""
        self.fired = {
            name: torch.zeros(coder.num_latents, dtype=torch.int64, device=device)
            for name, coder in coders.items()
        }
        """Times each latent of each coder was active."""
        self.lm_loss: Tensor | None = None
        """In end-to-end training the LM's loss, and the positions that it is summed over, [2]."""
        self.gradients_apart: dict[str, list[Tensor]] = {}
        """In end-to-end training the gradients that are divided by the variance, by coder."""
        self.levels = {
            name: none
            for name, coder in coders.items()
            if (none := coder.family.no_levels(coder)) is not None
        }
        """What coders learn their thresholds from."""
        self._hookpoint = bank.hookpoint
        self._moments: dict[str, Moments] = {}
        self._inputs: dict[str, Moments] = {}
        self._errors = {name: torch.zeros(3, device=device) for name in coders}
        self._objectives = {
            name: torch.zeros((), device=device) for name, coder in coders.items() if coder.prefixes
        }

    def add_rows(self, hookpoint: str, x: Tensor, y: Tensor) -> None:
        """Count the rows of a hookpoint, inputs and targets; of an SAE they are one tensor."""
        accumulate(self._moments, hookpoint, y)
        if x is not y:
            accumulate(self._inputs, hookpoint, x)

    def add(self, name: str, errors: CoderErrors) -> None:
        """Count the errors of a coder, and what fired."""
        found = (errors.squared_error, errors.auxk_error, errors.multi_topk_error)
        self._errors[name] += torch.stack(found).detach()
        if name in self._objectives:
            self._objectives[name] += errors.objective.detach()
        if errors.levels is not None:
            self.levels[name] += errors.levels
        active = (errors.top_acts > 0).flatten().to(torch.int64)
        self.fired[name].scatter_add_(0, errors.top_indices.flatten(), active)

    def tensors(self) -> list[Tensor]:
        """Everything that sums over ranks."""
        moments = [t for m in (self._moments, self._inputs) for seen in m.values() for t in seen]
        apart = [t for tensors in self.gradients_apart.values() for t in tensors]
        lm_loss = [] if self.lm_loss is None else [self.lm_loss]
        found = [*moments, *self._errors.values(), *self.fired.values()]
        return [*found, *self._objectives.values(), *self.levels.values(), *lm_loss, *apart]

    def mean_lm_loss(self) -> Tensor:
        """The LM's loss over all positions of the step, in nats."""
        assert self.lm_loss is not None, "this is end-to-end training"
        loss, positions = self.lm_loss
        return loss / positions

    def inputs(self, name: str) -> Moments | None:
        """Moments of what a coder read; None where its rows were not seen."""
        hookpoint = self._hookpoint[name]
        return self._inputs.get(hookpoint, self._moments.get(hookpoint))

    def variance(self, name: str) -> Tensor:
        """sum ||y - y_mean||^2 over the targets of a coder; 1 where its targets were not seen."""
        hookpoint = self._hookpoint[name]
        if hookpoint not in self._moments:
            return torch.ones((), dtype=torch.float64, device=self._errors[name].device)
        return self._moments[hookpoint].total_variance

    def add_penalty_(self, name: str, coder: SparseCoder, rows: dict[str, int], k: int) -> None:
        """Add what a coder's kind puts beside its FVU to its gradients, once all sums are in.

        `rows` of each hookpoint are those of all ranks.
        """
        hookpoint = self._hookpoint[name]
        seen = self.levels.get(name), self.fired[name], rows[hookpoint]
        coder.family.add_penalty_(coder, *seen, k, self.variance(name))

    def losses(self, name: str) -> dict[str, Tensor | float]:
        """FVU, AuxK and the like of a coder, as metrics; none where its targets were not seen."""
        if self._hookpoint[name] not in self._moments:
            return {}
        errors: dict[str, Tensor] = dict(zip(_LOSSES, self._errors[name], strict=True))
        if name in self._objectives:
            errors["mean_prefix_fvu"] = self._objectives[name]
        return {f"{loss}/{name}": error / self.variance(name) for loss, error in errors.items()}

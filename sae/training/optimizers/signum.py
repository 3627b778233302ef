"""Sign descent with schedule-free averaging."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...kernels.twins import Kernels


class ScheduleFreeSignum(torch.optim.Optimizer):
    """Sign descent with schedule-free averaging.

    Three points per parameter: z takes the steps, x averages them, gradients are taken at y.

        z' = z - lr sign(g),   x' = (1 - c) x + c z',   y' = beta x' + (1 - beta) z'
        c  = lr_max^2 / sum of lr_max^2 over the steps so far   (1 / t at a constant lr)

    The parameter is y and the state z; x = (y - (1 - beta) z) / beta is what a trained coder is.
    One pass over the weights computes what schedulefree's wrapper around a sign optimizer does.

    Source: Defazio et al., "The Road Less Scheduled" (arXiv 2405.15682), equations 1-3.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        beta: float = 0.95,
        unit_norm: Tensor | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        """`unit_norm`: the parameter whose rows get unit norm in the same pass.

        A group's `unit` multiplies its lr and is no part of the averages' weights.
        """
        at_start = {"lr": lr, "unit": 1.0, "beta": beta, "lr_max": 0.0, "weight_sum": 0.0}
        super().__init__(params, at_start)
        self._unit_norm = unit_norm
        self._kernels = kernels or Kernels()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            lr, beta = group["lr"], group["beta"]
            group["lr_max"] = max(lr, group["lr_max"])
            weight = group["lr_max"] ** 2
            group["weight_sum"] += weight
            c = weight / group["weight_sum"] if group["weight_sum"] else 0.0
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "z" not in state:
                    state["z"] = p.clone(memory_format=torch.preserve_format)
                unit_norm = p is self._unit_norm
                step = lr * group["unit"]
                self._kernels.signum_step_(p, state["z"], p.grad, step, beta, c, unit_norm)

    @torch.no_grad()
    def average_(self) -> None:
        """Set every parameter to its average x; the state stays."""
        for group in self.param_groups:
            for p in group["params"]:
                if "z" in self.state[p]:
                    p.lerp_(self.state[p]["z"], 1 - 1 / group["beta"])

"""Adam in the eigenbasis of gradients."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Soap(torch.optim.Optimizer):
    """Adam in the eigenbasis of a matrix's gradients, of their columns alone.

        C = b2 C + (1 - b2) G^T G,   Q its eigenvectors,   m = b1 m + (1 - b1) G
        v = b2 v + (1 - b2) (G Q)^2,   W -= lr (m Q / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)) Q^T

    Activations vary in few directions, and this gives each of them its own rate. Q comes from C
    whole at first, and then every tenth step from one step of orthogonal iteration, where v is
    taken along. The first step only makes Q.

    Source: Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam" (arXiv 2409.11321);
    here for one side of the matrix.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float]
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": 1e-8, "every": 10})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, self._rows(p, p.grad), self.state[p], group)

    def _rows(self, p: Tensor, grad: Tensor) -> Tensor:
        """The rows of a gradient that are updated here."""
        return grad

    def _outer(self, rows: Tensor) -> Tensor:
        """G^T G of the whole gradient."""
        return rows.T @ rows

    def _subtract(self, p: Tensor, update: Tensor, basis: Tensor, rate: float) -> None:
        """Subtract the update of those rows, which is in the basis."""
        p.addmm_(update, basis.T, alpha=-rate)

    def _update(self, p: Tensor, grad: Tensor, state: dict[str, Any], of: dict[str, Any]) -> None:
        b1, b2 = of["betas"]
        outer = self._outer(grad)
        if not state:
            state |= {"step": 0, "mean": torch.zeros_like(grad), "square": torch.zeros_like(grad)}
            state["outer"] = outer * (1 - b2)
            state["basis"] = torch.linalg.eigh(outer).eigenvectors.flip(1).contiguous()
            return
        state["step"] = step = int(state["step"]) + 1  # a tensor where a run was resumed
        basis = state["basis"]
        turned = grad @ basis
        state["mean"].lerp_(grad, 1 - b1)
        state["square"].mul_(b2).addcmul_(turned, turned, value=1 - b2)
        size = (state["square"] / (1 - b2**step)).sqrt_().add_(of["eps"])
        update = torch.matmul(state["mean"], basis, out=turned).div_(size)
        self._subtract(p, update, basis, of["lr"] / (1 - b1**step))
        state["outer"].lerp_(outer, 1 - b2)
        if step % of["every"] == 0:
            iterated = state["outer"] @ basis
            order = (basis * iterated).sum(0).argsort(descending=True, stable=True)
            state["basis"] = torch.linalg.qr(iterated[:, order]).Q.contiguous()
            state["square"] = state["square"][:, order]

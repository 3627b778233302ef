"""Optimizers of whole matrices, for coders of which each rank of a group holds a part."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...coders.sharded import ShardedCoder
from ...coders.sharded_kernels import Group, share
from ...formats.pieces import Part, Piece
from .soap import Soap

Groups = list[dict[str, Any]]


class ShardedMuon(torch.optim.Muon):
    """Muon on matrices of which each rank of a group holds some rows or columns.

    Its products run over the longer side of a matrix: with that side cut, each is a sum over ranks
    of small squares. A matrix that is cut along the shorter side is cut anew for them, and back.
    """

    def __init__(
        self, groups: Groups, lr: float, coder: ShardedCoder, matrices: Mapping[str, nn.Parameter]
    ) -> None:
        super().__init__(groups, lr=lr)
        self._group = coder.group
        self._layout = {p: coder.cuts[name] for name, p in matrices.items()}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p.grad)
                average = self.state[p]["momentum_buffer"]
                average.lerp_(p.grad, 1 - momentum)
                update = p.grad.lerp(average, momentum) if group["nesterov"] else average
                dim, cuts = self._layout[p]
                shape = [*p.shape]
                shape[dim] = cuts[-1].stop
                update = self._orthogonal(update.bfloat16(), shape, dim, cuts, group)
                p.mul_(1 - lr * group["weight_decay"])
                p.add_(update, alpha=-lr * math.sqrt(max(1, shape[0] / shape[1])))

    def _orthogonal(
        self, part: Tensor, shape: list[int], dim: int, cuts: list[range], group: dict[str, Any]
    ) -> Tensor:
        """This rank's part of the nearly orthogonal matrix that torch.optim.Muon makes."""
        long = int(shape[1] >= shape[0])
        other = [share(shape[long], rank, self._group.size) for rank in range(self._group.size)]
        if dim != long:
            part = cut_anew(self._group, part, dim, cuts, other)
        rows = part if long else part.T  # [shorter side, a part of the longer side]
        square = self._group.sum_(rows.float().square().sum())
        rows = rows / square.sqrt().to(rows.dtype).clamp(min=group["eps"])
        a, b, c = group["ns_coefficients"]
        for _ in range(group["ns_steps"]):
            gram = self._group.sum_((rows @ rows.T).float()).to(rows.dtype)
            rows = torch.addmm(rows, torch.addmm(gram, gram, gram, beta=b, alpha=c), rows, beta=a)
        part = rows if long else rows.T
        return cut_anew(self._group, part, 1 - dim, other, cuts) if dim != long else part


class ShardedSoap(Soap):
    """Soap on matrices of which each rank of a group holds some rows or columns.

    Every rank updates some rows, in the eigenbasis that all ranks share. The gradient of a matrix
    that is cut by columns is cut anew for it, and the update back; its state stays by rows.
    """

    def __init__(
        self,
        groups: Groups,
        lr: float,
        betas: tuple[float, float],
        coder: ShardedCoder,
        matrices: Mapping[str, nn.Parameter],
    ) -> None:
        super().__init__(groups, lr, betas)
        self._group = coder.group
        self._columns: dict[Tensor, tuple[list[range], list[range]]] = {}
        """Of a matrix that is cut by columns those of each rank, and the rows it updates."""
        self._parts: dict[str, Part | None] = {}
        for name, p in matrices.items():
            dim, cuts = coder.cuts[name]
            self._parts |= {f"{name}.outer": None, f"{name}.basis": None}
            if dim == 1:
                rows = [share(len(p), rank, self._group.size) for rank in range(self._group.size)]
                self._columns[p] = cuts, rows
                mine = Part(0, rows[self._group.rank])
                self._parts |= {f"{name}.mean": mine, f"{name}.square": mine}

    def stored(self, piece: Piece) -> Piece:
        """What this rank holds of the coder and of this optimizer's state."""
        return replace(piece, parts={**piece.parts, **self._parts})

    def _rows(self, p: Tensor, grad: Tensor) -> Tensor:
        if p not in self._columns:
            return grad
        columns, rows = self._columns[p]
        return cut_anew(self._group, grad, 1, columns, rows)

    def _outer(self, rows: Tensor) -> Tensor:
        return self._group.sum_(super()._outer(rows))

    def _subtract(self, p: Tensor, update: Tensor, basis: Tensor, rate: float) -> None:
        if p not in self._columns:
            return super()._subtract(p, update, basis, rate)
        columns, rows = self._columns[p]
        p.sub_(cut_anew(self._group, update @ basis.T, 0, rows, columns), alpha=rate)


def cut_anew(group: Group, part: Tensor, dim: int, cuts: list[range], new: list[range]) -> Tensor:
    """This rank's part along the other dimension, by `new`, of a matrix cut along `dim`."""
    sent = part.split([len(indices) for indices in new], dim=1 - dim)
    mine = len(new[group.rank])
    shapes = [(len(cut), mine) if dim == 0 else (mine, len(cut)) for cut in cuts]
    return torch.cat(group.exchange(list(sent), shapes), dim=dim)

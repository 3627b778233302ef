"""Optimizers by name, one set per coder."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..coders.moments import Scale
from ..coders.sharded import ShardedCoder
from ..coders.sharded_kernels import share
from ..coders.sparse_coder import SparseCoder
from ..config import OptimizerName, TrainingConfig
from ..flag_checks import UsageError
from ..kernels.cpu.native import in_huge_pages
from ..kernels.twins import Kernels
from .schedules import Schedule


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


class ShardedMuon(torch.optim.Muon):
    """Muon on matrices of which each rank of a group holds some rows or columns.

    Its products run over the longer side of a matrix: with that side cut, each is a sum over ranks
    of small squares. A matrix that is cut along the shorter side is cut anew for them, and back.
    """

    def __init__(self, coder: ShardedCoder, matrices: dict[str, nn.Parameter], lr: float) -> None:
        super().__init__(_groups(matrices), lr=lr)
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
            part = self._cut_anew(part, dim, cuts, other)
        rows = part if long else part.T  # [shorter side, a part of the longer side]
        square = self._group.sum_(rows.float().square().sum())
        rows = rows / square.sqrt().to(rows.dtype).clamp(min=group["eps"])
        a, b, c = group["ns_coefficients"]
        for _ in range(group["ns_steps"]):
            gram = self._group.sum_((rows @ rows.T).float()).to(rows.dtype)
            rows = torch.addmm(rows, torch.addmm(gram, gram, gram, beta=b, alpha=c), rows, beta=a)
        part = rows if long else rows.T
        return self._cut_anew(part, 1 - dim, other, cuts) if dim != long else part

    def _cut_anew(self, part: Tensor, dim: int, cuts: list[range], new: list[range]) -> Tensor:
        """This rank's part along the other dimension, by `new`, of a matrix cut along `dim`."""
        sent = part.split([len(indices) for indices in new], dim=1 - dim)
        mine = len(new[self._group.rank])
        shapes = [(len(cut), mine) if dim == 0 else (mine, len(cut)) for cut in cuts]
        return torch.cat(self._group.exchange(list(sent), shapes), dim=dim)


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
                    self._update(p, p.grad, self.state[p], group)

    def _update(self, p: Tensor, grad: Tensor, state: dict[str, Any], of: dict[str, Any]) -> None:
        b1, b2 = of["betas"]
        outer = grad.T @ grad
        if not state:
            state |= {"step": 0, "mean": torch.zeros_like(p), "square": torch.zeros_like(p)}
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
        p.addmm_(update, basis.T, alpha=-of["lr"] / (1 - b1**step))
        state["outer"].lerp_(outer, 1 - b2)
        if step % of["every"] == 0:
            iterated = state["outer"] @ basis
            order = (basis * iterated).sum(0).argsort(descending=True, stable=True)
            state["basis"] = torch.linalg.qr(iterated[:, order]).Q.contiguous()
            state["square"] = state["square"][:, order]


class CoderOptimizer:
    """The optimizers of one coder: all its parameters, updated and decayed together."""

    def __init__(self, coder: SparseCoder, schedule: Schedule) -> None:
        cfg = schedule.cfg
        if cfg.adam_8bit and coder.piece is not None:
            raise UsageError(
                "--adam_8bit: rounds blocks of whole parameters, and ranks that share a coder hold "
                "parts of them: leave it out, or --ranks_per_coder"
            )
        parameters = dict(coder.named_parameters())
        for p in parameters.values():
            in_huge_pages(p.data, touched=True)
        self.schedule, self.lr = schedule, 0.0
        self.name: OptimizerName = cfg.optimizer
        self.peak_lr = peak_lr = schedule.peak_lr(coder.num_latents, coder.cfg.transcode)
        of_matrices = self.name in ("muon", "soap")
        matrices = {n: p for n, p in parameters.items() if of_matrices and p.ndim == 2}
        rest = {n: p for n, p in parameters.items() if n not in matrices}
        self.optimizers: list[torch.optim.Optimizer] = []
        self.names: list[list[str]] = []
        if self.name == "muon":
            self._add(_muon(coder, matrices, self.peak_lr), matrices)
        elif self.name == "soap":
            if coder.piece is not None:
                raise UsageError(
                    "--optimizer soap: needs whole matrices, and ranks that share a coder hold "
                    "parts of them: take another, or leave out --ranks_per_coder"
                )
            betas = cfg.adam_beta1, cfg.adam_beta2
            self._add(Soap(_groups(matrices), peak_lr, betas), matrices)
        if self.name == "signum":
            unit_norm = coder.W_dec if coder.rows_are_unit else None
            self._add(
                ScheduleFreeSignum(_groups(rest), peak_lr, 0.95, unit_norm, coder.kernels), rest
            )
        else:
            self._add(_adam(rest, cfg, peak_lr), rest)
        self.coder = coder

    def _add(self, optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]) -> None:
        self.optimizers.append(optimizer)
        self.names.append(list(parameters))

    def step(self, step: int) -> None:
        """Update the coder at the learning rate of `step`, in the unit of each parameter."""
        self.lr = self.peak_lr * self.schedule.lr_scale(step)
        for optimizer, names in zip(self.optimizers, self.names, strict=True):
            for name, group in zip(names, optimizer.param_groups, strict=True):
                unit = self.coder.unit(name)
                encoder = self.schedule.encoder_lr(self.coder.cfg.transcode)
                factor = encoder if name == "encoder.weight" else 1.0
                rate = unit * factor
                if "weight_decay" in group:  # which the rate multiplies as well
                    group["weight_decay"] = optimizer.defaults["weight_decay"] / unit
                if "unit" in group:  # its averages are weighted by the rate without a unit
                    group |= {"lr": self.lr, "unit": rate}
                else:
                    group["lr"] = self.lr * rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.name != "signum" or not self.coder.rows_are_unit:  # else done in its one pass
            self.coder.normalize_decoder_()

    @contextmanager
    def trained(self) -> Iterator[SparseCoder]:
        """Inside, the coder is what is saved: averaged where the optimizer averages, unit-norm.

        Outside, the point that training continues from, bit for bit.
        """
        averaging = [o for o in self.optimizers if isinstance(o, ScheduleFreeSignum)]
        kept = {n: p.detach().clone() for n, p in self.coder.named_parameters() if averaging}
        for optimizer in averaging:
            optimizer.average_()
        if averaging:
            self.coder.normalize_decoder_()
        try:
            yield self.coder
        finally:
            with torch.no_grad():
                for name, parameter in self.coder.named_parameters():
                    if name in kept:
                        parameter.copy_(kept[name])

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that resuming needs, by name: the training point and the optimizers' state."""
        found = {f"point.{n}": p.detach() for n, p in self.coder.named_parameters()}
        found["scale"] = torch.tensor(self.coder.scale, dtype=torch.float64)
        for i, (optimizer, names) in enumerate(zip(self.optimizers, self.names, strict=True)):
            for name, group in zip(names, optimizer.param_groups, strict=True):
                (parameter,) = group["params"]
                for key, value in optimizer.state[parameter].items():
                    found[f"state.{i}.{name}.{key}"] = torch.as_tensor(value)
            if isinstance(optimizer, ScheduleFreeSignum):
                group = optimizer.param_groups[0]
                for key in ("lr_max", "weight_sum"):
                    found[f"group.{i}.{key}"] = torch.tensor(group[key], dtype=torch.float64)
        return found

    @torch.no_grad()
    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state_tensors` returned. Raises UsageError if it is another optimizer's."""
        for name, parameter in self.coder.named_parameters():
            stored = tensors.get(f"point.{name}")
            if stored is None or stored.shape != parameter.shape:
                raise UsageError(f"--resume: the checkpoint has no {name} of this coder's shape")
            parameter.copy_(stored)
        if "scale" in tensors:  # runs of before had none
            self.coder.scale = Scale(*tensors["scale"].tolist())
        for i, (optimizer, names) in enumerate(zip(self.optimizers, self.names, strict=True)):
            for name, group in zip(names, optimizer.param_groups, strict=True):
                (parameter,) = group["params"]
                prefix = f"state.{i}.{name}."
                state = {
                    key.removeprefix(prefix): value.to(parameter.device, copy=True)
                    for key, value in tensors.items()
                    if key.startswith(prefix)
                }
                if not state:
                    raise UsageError(
                        f"--resume: the checkpoint has no {self.name} state for {name}"
                    )
                optimizer.state[parameter] = state
                for key in ("lr_max", "weight_sum"):
                    if f"group.{i}.{key}" in tensors:
                        group[key] = tensors[f"group.{i}.{key}"].item()


def state_bytes(coder: SparseCoder, name: OptimizerName, adam_8bit: bool = False) -> int:
    """Bytes that the optimizer of a coder keeps beside the weights: z, moments, or momentum."""
    adam = 2 if adam_8bit else 8
    per_element = {"signum": (4, 4), "adam": (adam, adam), "muon": (4, adam), "soap": (8, adam)}
    found = sum(p.numel() * per_element[name][p.ndim != 2] for p in coder.parameters())
    widths = [p.shape[1] for p in coder.parameters() if p.ndim == 2 and name == "soap"]
    return found + sum(8 * width * width for width in widths)


def _muon(
    coder: SparseCoder, matrices: dict[str, nn.Parameter], lr: float
) -> torch.optim.Optimizer:
    if not isinstance(coder, ShardedCoder):
        return torch.optim.Muon(_groups(matrices), lr=lr)
    return ShardedMuon(coder, matrices, lr)


def _groups(parameters: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """A group for each parameter, since each has its own unit."""
    return [{"params": [p]} for p in parameters.values()]


def _adam(
    parameters: dict[str, nn.Parameter], cfg: TrainingConfig, lr: float
) -> torch.optim.Optimizer:
    betas = cfg.adam_beta1, cfg.adam_beta2
    if not cfg.adam_8bit:
        return torch.optim.Adam(_groups(parameters), lr=lr, betas=betas, fused=True)
    try:
        from bitsandbytes.optim import Adam8bit  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UsageError("--adam_8bit needs bitsandbytes: pip install bitsandbytes") from None
    return Adam8bit(_groups(parameters), lr=lr, betas=betas)

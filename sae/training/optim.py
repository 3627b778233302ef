"""Optimizers by name, one set per coder."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..coders.moments import Scale
from ..coders.sharded import ShardedCoder
from ..coders.sparse_coder import SparseCoder
from ..config import OptimizerName, TrainingConfig
from ..flag_checks import UsageError, refuse
from ..formats.pieces import Piece
from ..kernels.cpu.native import in_huge_pages
from .optimizers.shared import ShardedMuon, ShardedSoap
from .optimizers.signum import ScheduleFreeSignum
from .optimizers.soap import Soap
from .schedules import Schedule


class CoderOptimizer:
    """The optimizers of one coder: all its parameters, updated and decayed together."""

    def __init__(self, coder: SparseCoder, schedule: Schedule) -> None:
        cfg = schedule.cfg
        check_optimizer(cfg, coder)
        parameters = dict(coder.named_parameters())
        for p in parameters.values():
            in_huge_pages(p.data, touched=True)
        self.schedule, self.lr = schedule, 0.0
        self.name: OptimizerName = cfg.optimizer
        self.peak_lr = peak_lr = schedule.peak_lr(coder.num_latents, coder.cfg.transcode)
        self.encoder_lr = schedule.encoder_lr(coder.cfg.transcode)
        of_matrices = self.name in ("muon", "soap")
        matrices = {n: p for n, p in parameters.items() if of_matrices and p.ndim == 2}
        rest = {n: p for n, p in parameters.items() if n not in matrices}
        self.optimizers: list[torch.optim.Optimizer] = []
        self.names: list[list[str]] = []
        if self.name == "muon":
            self._add(_muon(coder, matrices, self.peak_lr), matrices)
        elif self.name == "soap":
            self._add(_soap(coder, matrices, peak_lr, (cfg.adam_beta1, cfg.adam_beta2)), matrices)
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
                factor = self.encoder_lr if name == "encoder.weight" else 1.0
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

    @property
    def piece(self) -> Piece | None:
        """What this rank holds of `state_tensors`; None: all."""
        found = self.coder.piece
        for optimizer in self.optimizers:
            if found is not None and isinstance(optimizer, ShardedSoap):
                found = optimizer.stored(found)
        return found

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything that resuming needs, by name: the training point and the optimizers' state."""
        found = {f"point.{n}": p.detach() for n, p in self.coder.named_parameters()}
        found["scale"] = torch.tensor(self.coder.scale, dtype=torch.float64)
        # Rules of defaults may change from version to version, a run's rates do not.
        found["rates"] = torch.tensor([self.peak_lr, self.encoder_lr], dtype=torch.float64)
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
        if "rates" in tensors:
            self.peak_lr, self.encoder_lr = tensors["rates"].tolist()
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


def check_optimizer(cfg: TrainingConfig, coder: SparseCoder) -> None:
    """Raise UsageError for an optimizer that a coder which ranks share cannot have."""
    if cfg.adam_8bit and coder.piece is not None:
        refuse(
            cfg,
            "adam_8bit",
            "rounds blocks of whole parameters, and ranks that share a coder hold parts of them: "
            "leave it out, or give each coder one rank",
        )


def state_bytes(coder: SparseCoder, name: OptimizerName, adam_8bit: bool = False) -> int:
    """Bytes that the optimizer of a coder keeps beside the weights: z, moments, or momentum."""
    adam = 2 if adam_8bit else 8
    per_element = {"signum": (4, 4), "adam": (adam, adam), "muon": (4, adam), "soap": (8, adam)}
    found = sum(p.numel() * per_element[name][p.ndim != 2] for p in coder.parameters())
    matrices = {n: p for n, p in coder.named_parameters() if p.ndim == 2 and name == "soap"}
    widths = [coder.d_out if n == "W_dec" else p.shape[1] for n, p in matrices.items()]
    return found + sum(8 * width * width for width in widths)


def update_bytes(coder: SparseCoder, name: OptimizerName) -> int:
    """The most bytes that an update of a coder holds beside weights, gradients and state.

    Measured, as multiples of its largest parameter (tests/training/test_optim.py).
    """
    whole, shared = {"muon": (2, 4), "soap": (2, 7)}.get(name, (0, 1))
    largest = max(p.numel() for p in coder.parameters())
    return 4 * largest * (whole if coder.piece is None else shared)


def _muon(
    coder: SparseCoder, matrices: dict[str, nn.Parameter], lr: float
) -> torch.optim.Optimizer:
    if not isinstance(coder, ShardedCoder):
        return torch.optim.Muon(_groups(matrices), lr=lr)
    return ShardedMuon(_groups(matrices), lr, coder, matrices)


def _soap(
    coder: SparseCoder, matrices: dict[str, nn.Parameter], lr: float, betas: tuple[float, float]
) -> Soap:
    if not isinstance(coder, ShardedCoder):
        return Soap(_groups(matrices), lr, betas)
    return ShardedSoap(_groups(matrices), lr, betas, coder, matrices)


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

"""Losses that a coder's own forward takes part in: runner-ups, and dead latents learning alone."""

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..config import SparseCoderConfig, TrainingConfig
from ..flag_checks import refuse
from ..kernels.twins import Latents

if TYPE_CHECKING:
    from .sparse_coder import SparseCoder


# Measured, docs/recipes.md: of 768 latents per active one a third stays dead otherwise, at 384 and
# below either does.
_MANY = 512


class OwnLosses(NamedTuple):
    """Flags of a run; a coder by itself has none of these losses."""

    runner_ups: float = 0.0
    """Weight of what runner-ups learn."""
    auxk_alone: bool | None = False
    """Whether AuxK's latents learn alone; None: where a coder has many."""


NONE = OwnLosses()


def dead_learn_alone(coder: "SparseCoder") -> bool:
    """--auxk_alone; where that is not given, of TopK coders with 512 latents per active one."""
    given, cfg = coder.own_losses.auxk_alone, coder.cfg
    if given is None:
        return cfg.activation == "topk" and coder.num_latents >= _MANY * cfg.k
    return given


def active_alone(coder: "SparseCoder", wide: Latents, k: int) -> Latents:
    """The k largest of `wide`; the others, the runner-ups R, are 0 and have a loss of their own:

        runner_ups sum_n sum_(i in R_n) ||e_n - acts_ni W_dec_i||^2,   e = (y - sae_out).detach()

    in units of squared error, whose gradient reaches the encoder alone: each learns the activation
    with which it alone would explain most of what is left, so that those are chosen that help.
    """
    # A transcoder's rows start as 0, and stay so until they have been active.
    unit = coder.rows_are_unit and not coder.cfg.transcode
    squares = None if unit else coder.decoder_norms().square()[wide.indices]
    active = coder.kernels.largest_columns(wide.acts.detach(), k)
    acts = _ActiveAlone.apply(wide.acts, active, coder.own_losses.runner_ups, squares)
    return wide._replace(acts=acts)


class _ActiveAlone(torch.autograd.Function):
    """Activations of each row, but 0 outside its `active` columns."""

    @staticmethod
    def forward(
        ctx: Any, acts: Tensor, active: Tensor, weight: float, squares: Tensor | None
    ) -> Float[Tensor, "N W"]:
        active = torch.zeros_like(acts, dtype=torch.bool).scatter_(1, active, True)
        ctx.save_for_backward(acts, active)
        ctx.weight, ctx.squares = weight, squares
        return torch.where(active, acts, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        acts, active = ctx.saved_tensors
        # At an activation of 0 the gradient of the squared error is -2 <e, W_dec_i>.
        slope = 2 * (acts if ctx.squares is None else acts * ctx.squares)
        return torch.where(active, grad, ctx.weight * (grad + slope)), None, None, None


def selected_over_k(coder: "SparseCoder") -> int:
    """How many latents of a row are selected, over k: those of every loss that is asked for."""
    if coder.cfg.multi_topk:
        return 4
    return 2 if coder.own_losses.runner_ups > 0 and torch.is_grad_enabled() else 1


def excluded_by(coder: SparseCoderConfig, training: TrainingConfig) -> str:
    """The flag of a run whose coders have no runner-ups, or of its loss; of others nothing."""
    for excludes, flag in (
        (coder.activation != "topk", f"--activation {coder.activation}"),
        (coder.multi_topk, "--multi_topk"),
        (coder.matryoshka, "--matryoshka"),
        (coder.cross_layer, f"--cross_layer {coder.cross_layer}"),
        (training.uses_lm_loss, f"--loss_fn {training.loss_fn}"),
    ):
        if excludes:
            return flag
    return ""


def check_flags(cfg: Any) -> None:
    """Raise UsageError for flags of the script's `TrainConfig` that runner-ups do not go with."""
    other = excluded_by(cfg.coder, cfg.training)
    if cfg.training.runner_ups and other:
        refuse(cfg.training, "runner_ups", f"does not go with {other}: drop one of the two")

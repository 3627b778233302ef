"""Runner-ups: what the latents that come next to the active ones learn from a row."""

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..config import SparseCoderConfig
from ..flag_checks import refuse
from ..kernels.twins import Latents

if TYPE_CHECKING:
    from .sparse_coder import SparseCoder


def active_alone(coder: "SparseCoder", wide: Latents, k: int) -> Latents:
    """The k largest of `wide`; the others, the runner-ups R, are 0 and have a loss of their own:

        runner_ups sum_n sum_(i in R_n) ||e_n - acts_ni W_dec_i||^2,   e = (y - sae_out).detach()

    in units of squared error, whose gradient reaches the encoder alone: each learns the activation
    with which it alone would explain most of what is left, so that those are chosen that help.
    """
    # A transcoder's rows start as 0, and stay so until they have been active.
    unit = coder.rows_are_unit and not coder.cfg.transcode
    squares = None if unit else coder.decoder_norms().square()[wide.indices]
    acts = _ActiveAlone.apply(wide.acts, k, coder.runner_ups, squares)
    return wide._replace(acts=acts)


class _ActiveAlone(torch.autograd.Function):
    """Activations of each row, but 0 where they are not among its k largest."""

    @staticmethod
    def forward(
        ctx: Any, acts: Float[Tensor, "N W"], k: int, weight: float, squares: Tensor | None
    ) -> Float[Tensor, "N W"]:
        largest = acts.topk(k, dim=1).indices
        active = torch.zeros_like(acts, dtype=torch.bool).scatter_(1, largest, True)
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


def check_flags(cfg: Any) -> None:
    """Raise UsageError for flags of the script's `TrainConfig` that runner-ups do not go with."""
    check(cfg.coder)
    if cfg.coder.runner_ups and cfg.training.uses_lm_loss:
        refuse(cfg.coder, "runner_ups", "is a part of the FVU loss: use --loss_fn fvu, or drop it")


def check(cfg: SparseCoderConfig) -> None:
    """Raise UsageError for a kind of coder that has no runner-ups."""
    for excluded, name in (
        (cfg.activation != "topk", f"--activation {cfg.activation}"),
        (cfg.multi_topk, "--multi_topk"),
        (cfg.matryoshka, "--matryoshka"),
        (cfg.cross_layer, f"--cross_layer {cfg.cross_layer}"),
    ):
        if cfg.runner_ups and excluded:
            refuse(cfg, "runner_ups", f"does not go with {name}: drop one of the two")

"""The losses of a step beside the one at hand, and how sums of squared errors become FVU."""

import torch
from torch import Tensor

from ..coders.moments import Moments
from ..coders.outputs import CoderErrors
from ..coders.own_losses import OwnLosses, excluded_by
from ..coders.sparse_coder import SparseCoder
from ..config import SparseCoderConfig, TrainingConfig


def auxiliary_loss(errors: CoderErrors, auxk_alpha: float) -> Tensor:
    """auxk_alpha auxk_error + multi_topk_error / 8, in units of squared error.

    Source: Gao et al., appendix A.2 (AuxK) and section 5.3 (Multi-TopK).
    """
    return auxk_alpha * errors.auxk_error + errors.multi_topk_error / 8


def own_losses(coder: SparseCoderConfig, training: TrainingConfig) -> OwnLosses:
    """Those of a run; --runner_ups is 0.3 by default, of coders and losses that have such."""
    default = 0.0 if excluded_by(coder, training) else 0.3
    weight = default if training.runner_ups is None else training.runner_ups
    return OwnLosses(weight, training.auxk_alone)


@torch.no_grad()
def wake_dead_(
    coder: SparseCoder, dead: Tensor | None, x: Moments | None, wake_alpha: float
) -> None:
    """Add to the summed gradients those of a term that raises pre_acts of `dead` latents.

        -wake_alpha (k / L) unit(b_enc) sum over the step's rows and dead latents of pre_acts

    AuxK gives a latent no gradient where its pre_act is negative, so one that is negative on all
    rows would be dead for ever. A transcoder, whose inputs are not centred, has many of these. The
    term is as large as what a latent gets that fires on k / L of the rows. It is linear, so its
    gradient needs the sum of the rows alone: `x` are their moments, over all ranks.

    After the pre-activation loss of Anthropic, "Circuits Updates - January 2025"
    (transformer-circuits.pub/2025/january-update), on what a latent lacks to its threshold.
    """
    encoder = coder.encoder
    if dead is None or x is None or wake_alpha == 0 or encoder.weight.grad is None:
        return
    assert encoder.bias.grad is not None, "both have a gradient or none has"
    size = wake_alpha * coder.cfg.k / coder.num_latents * coder.unit("encoder.bias")
    read = x.total if coder.pre_bias is None else x.total - x.count * coder.pre_bias
    here = coder.held_latents(dead)
    rows = (-size * read).to(coder.dtype).expand(len(here), -1)
    encoder.weight.grad.index_add_(0, here, rows)
    encoder.bias.grad.index_add_(0, here, (-size * x.count).to(coder.dtype).expand(len(here)))


@torch.no_grad()
def divide_gradients_(coder: SparseCoder, total_variance: Tensor) -> Tensor:
    """Turn the summed gradients of squared errors into those of FVU; return their norm.

    grad *= unit / total_variance: with the unit of its parameter a gradient is the same at every
    scale of the data. For unit-norm decoders g -= (g . w) w row by row: the part along a row is
    what normalizing would undo.
    """
    squares: dict[str, Tensor] = {}
    for name, parameter in coder.named_parameters():
        if parameter.grad is not None:
            unit_rows = coder.fixed_directions() if name == "W_dec" else None
            scale = (coder.unit(name) / total_variance).to(coder.dtype)
            square = coder.kernels.scale_and_project_(parameter.grad, scale, unit_rows)
            squares[name] = square
    return coder.total(squares).sqrt()

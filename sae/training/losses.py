"""The losses of a step beside the one at hand, and how sums of squared errors become FVU."""

import torch
from torch import Tensor

from ..coders.outputs import CoderErrors
from ..coders.sparse_coder import SparseCoder


def auxiliary_loss(errors: CoderErrors, auxk_alpha: float) -> Tensor:
    """auxk_alpha auxk_error + multi_topk_error / 8, in units of squared error.

    Source: Gao et al., appendix A.2 (AuxK) and section 5.3 (Multi-TopK).
    """
    return auxk_alpha * errors.auxk_error + errors.multi_topk_error / 8


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
            unit_norm = name == "W_dec" and coder.cfg.normalize_decoder
            unit_rows = parameter if unit_norm else None
            scale = (coder.unit(name) / total_variance).to(coder.dtype)
            square = coder.kernels.scale_and_project_(parameter.grad, scale, unit_rows)
            squares[name] = square
    return coder.total(squares).sqrt()

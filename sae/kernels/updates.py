"""What an optimizer step does to the weights, in one pass over each: in C, Triton, or by blocks."""

from types import ModuleType

import torch
from jaxtyping import Float
from torch import Tensor

from .backend import Backend
from .cpu import native

# Elements that stay in a core's cache while every operation of an update runs; and, on a GPU, so
# many that it is asked seldom.
_BLOCK, _BLOCK_ON_GPU = 1 << 17, 1 << 26


def _triton(backend: Backend, tensor: Tensor) -> ModuleType | None:
    if not backend.in_triton(tensor.device) or tensor.dtype != torch.float32:
        return None
    from .cuda import updates  # there is no Triton where there is no GPU

    return updates


def scale_and_project_(
    backend: Backend, grad: Tensor, scale: Tensor, unit_rows: Tensor | None
) -> Tensor:
    """grad *= scale, and g -= (g . w) w by rows w of `unit_rows`, if given; return ||grad||^2."""
    if backend.in_c(grad):
        return native.scale_and_project_(grad, unit_rows, float(scale))
    if triton := _triton(backend, grad):
        return triton.scale_and_project_(grad, scale, unit_rows)
    square = grad.new_zeros(())
    rows = _rows_at_once(grad) if grad.ndim == 2 else len(grad)
    weights = grad if unit_rows is None else unit_rows
    for g, w in zip(grad.split(rows), weights.split(rows), strict=True):
        g.mul_(scale)
        if unit_rows is not None:
            g.addcmul_(w, torch.linalg.vecdot(g, w).unsqueeze(1), value=-1)
        square += torch.dot(g.flatten(), g.flatten())
    return square


def signum_step_(
    backend: Backend,
    y: Tensor,
    z: Tensor,
    grad: Tensor,
    lr: float,
    beta: float,
    c: float,
    unit_norm: bool,
) -> None:
    """z' = z - lr sign(g), y' = (1 - c)(y - (1 - beta) z) + (1 - beta + beta c) z'.

    Then every row of y' gets unit norm, if `unit_norm`.
    """
    if backend.in_c(y, z, grad):
        native.signum_step_(y, z, grad, lr, beta, c, unit_norm)
        return
    if triton := _triton(backend, y):
        triton.signum_step_(y, z, grad, lr, beta, c, unit_norm)
        return
    rows = _rows_at_once(y) if y.ndim == 2 else len(y)
    blocks = (t.split(rows) for t in (y, z, grad))
    for y_part, z_part, g in zip(*blocks, strict=True):
        y_part.sub_(z_part, alpha=1 - beta).mul_(1 - c)  # (1 - c) beta x
        z_part.add_(g.sign(), alpha=-lr)
        y_part.add_(z_part, alpha=1 - beta + beta * c)
    if unit_norm:
        normalize_rows_(backend, y)


def normalize_rows_(backend: Backend, rows: Float[Tensor, "R D"]) -> None:
    """Scale every row to unit norm; rows of zeros stay."""
    if backend.in_c(rows):
        native.normalize_rows_(rows)
        return
    if triton := _triton(backend, rows):
        triton.normalize_rows_(rows)
        return
    for block in rows.split(_rows_at_once(rows)):
        norm = torch.linalg.vector_norm(block, dim=1, keepdim=True)
        block.div_(norm.masked_fill_(norm == 0, 1))


def _rows_at_once(matrix: Tensor) -> int:
    elements = _BLOCK if matrix.device.type == "cpu" else _BLOCK_ON_GPU
    return max(1, elements // max(1, matrix.shape[1]))

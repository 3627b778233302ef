"""What an optimizer step does to the weights on CUDA, in Triton: one launch and one pass each.

A program works on one row, in blocks of columns, in float32; nothing is asked of the device.
"""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
# Triton makes constants of what is annotated as such.

import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from .launching import on_its_device

_BLOCK = 4096  # columns at a time


@on_its_device
def scale_and_project_(grad: Tensor, scale: Tensor, unit_rows: Tensor | None) -> Tensor:
    """grad *= scale, and g -= (g . w) w by rows w of `unit_rows`, if given; return ||grad||^2."""
    rows, width = _as_rows(grad, unit_rows)
    squares = grad.new_empty(rows)
    weights = grad if unit_rows is None else unit_rows
    _scale_and_project[(rows,)](
        *(grad, weights, scale, squares, width), UNIT=unit_rows is not None, BLOCK=_block(width)
    )
    return squares.sum()


@on_its_device
def signum_step_(
    y: Tensor, z: Tensor, grad: Tensor, lr: float, beta: float, c: float, unit_norm: bool
) -> None:
    """The step of `optim.ScheduleFreeSignum`, and unit norm for the rows of y if wanted."""
    rows, width = _as_rows(y, z, grad)
    factors = (lr, 1 - beta, 1 - c, 1 - beta + beta * c)
    _signum_step[(rows,)](y, z, grad, *factors, width, UNIT=unit_norm, BLOCK=_block(width))


@on_its_device
def normalize_rows_(rows: Float[Tensor, "R D"]) -> None:
    """Scale every row to unit norm; rows of zeros stay."""
    count, width = _as_rows(rows)
    _normalize_rows[(count,)](rows, width, BLOCK=_block(width))


def _as_rows(tensor: Tensor, *others: Tensor | None) -> tuple[int, int]:
    for other in (tensor, *others):
        assert other is None or (other.is_contiguous() and other.shape == tensor.shape)
    return (len(tensor), tensor.shape[1]) if tensor.ndim == 2 else (1, tensor.numel())


def _block(width: int) -> int:
    return min(_BLOCK, triton.next_power_of_2(width))


@triton.jit
def _scale_and_project(
    grad, weights, scale, squares, width, UNIT: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * width
    by = tl.load(scale)
    along = tl.zeros((BLOCK,), dtype=tl.float32)
    if UNIT:
        for begin in range(0, width, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            g = tl.load(grad + row + column, mask=column < width, other=0.0)
            w = tl.load(weights + row + column, mask=column < width, other=0.0)
            along += g * w
    part = tl.sum(along, axis=0) * by
    square = tl.zeros((BLOCK,), dtype=tl.float32)
    for begin in range(0, width, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        g = tl.load(grad + row + column, mask=column < width, other=0.0) * by
        if UNIT:
            g -= part * tl.load(weights + row + column, mask=column < width, other=0.0)
        square += g * g
        tl.store(grad + row + column, g, mask=column < width)
    tl.store(squares + tl.program_id(0), tl.sum(square, axis=0))


@triton.jit
def _signum_step(
    y_all, z_all, grad, lr, before, keep, after, width, UNIT: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * width
    square = tl.zeros((BLOCK,), dtype=tl.float32)
    for begin in range(0, width, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < width
        y = tl.load(y_all + row + column, mask=inside, other=0.0)
        z = tl.load(z_all + row + column, mask=inside, other=0.0)
        g = tl.load(grad + row + column, mask=inside, other=0.0)
        moved = z - lr * ((g > 0).to(tl.float32) - (g < 0).to(tl.float32))
        y = (y - before * z) * keep + after * moved
        tl.store(z_all + row + column, moved, mask=inside)
        tl.store(y_all + row + column, y, mask=inside)
        square += tl.where(inside, y * y, 0.0)
    if UNIT:
        _scale_row(y_all + row, tl.sum(square, axis=0), width, BLOCK)


@triton.jit
def _normalize_rows(rows, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * width
    square = tl.zeros((BLOCK,), dtype=tl.float32)
    for begin in range(0, width, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        value = tl.load(rows + row + column, mask=column < width, other=0.0)
        square += value * value
    _scale_row(rows + row, tl.sum(square, axis=0), width, BLOCK)


@triton.jit
def _scale_row(row, square, width, BLOCK: tl.constexpr):
    norm = tl.sqrt(square)
    by = 1.0 / tl.where(norm == 0, 1.0, norm)
    for begin in range(0, width, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        value = tl.load(row + column, mask=column < width, other=0.0)
        tl.store(row + column, value * by, mask=column < width)

"""Sparse products on CUDA, in Triton: the functions and numbers of kernels/sparse_products.py.

Every sum runs in one order, entry by entry, in float32 (float64 for float64): no atomics, so a step
repeats bit for bit. Nothing of size N x K x D exists.
"""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false
# Triton makes constants of what is annotated as such.

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

_LONG = 1024  # entries of one latent from which its sum is cut into pieces
_BLOCK = 512  # columns that one program works on


_Launch = TypeVar("_Launch", bound=Callable[..., Any])


def on_its_device(launch: _Launch) -> _Launch:
    """Run a function on the device of its first argument: Triton asks which is the current one."""

    @wraps(launch)
    def there(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(tensor):
            return launch(tensor, *args, **kwargs)

    return there  # type: ignore[return-value]  # it takes what `launch` takes


@on_its_device
def weighted_rows(
    weights: Float[Tensor, "N K"], indices: Int[Tensor, "N K"], table: Float[Tensor, "L D"]
) -> Float[Tensor, "N D"]:
    """out_n = sum_j weights_nj table[indices_nj]."""
    (n, k), width = indices.shape, table.shape[1]
    out = table.new_empty(n, width)
    block = _block(width)
    _weighted_rows[(n, triton.cdiv(width, block))](
        weights.contiguous(), indices.contiguous(), table.contiguous(), out, k, width, BLOCK=block
    )
    return out


@on_its_device
def sampled_product(
    rows: Float[Tensor, "N D"], table: Float[Tensor, "L D"], indices: Int[Tensor, "N K"]
) -> Float[Tensor, "N K"]:
    """out_nj = <rows_n, table[indices_nj]>."""
    n, k = indices.shape
    out = rows.new_empty(n, k)
    block = _block(rows.shape[1])
    _sampled_product[(n,)](
        *(rows.contiguous(), table.contiguous(), indices.contiguous(), out, k, rows.shape[1]),
        BLOCK=block,
    )
    return out


@on_its_device
def sum_by_latent(
    weights: Float[Tensor, " E"],
    entry_rows: Int[Tensor, " E"],
    starts: Int[Tensor, " L"],
    counts: Int[Tensor, " L"],
    rows: Float[Tensor, "N D"],
) -> Float[Tensor, "L D"]:
    """out_l = sum of weights_e rows[entry_rows_e] over the counts_l entries from starts_l on.

    A latent with many entries is summed in pieces of 1,024, so that no program works alone while
    all others are done; then the pieces are added in order.
    """
    latents, width = len(counts), rows.shape[1]
    rows, weights, entry_rows = rows.contiguous(), weights.contiguous(), entry_rows.contiguous()
    out = rows.new_empty(latents, width)
    block = _block(width)
    columns = triton.cdiv(width, block)
    # Pieces of the latents that have too many entries; an upper bound of their number is known
    # without asking the device.
    pieces = torch.where(counts > _LONG, (counts + _LONG - 1) // _LONG, 0)
    last_piece = pieces.cumsum(0)
    bound = 2 * len(weights) // _LONG
    _short_sums[(latents, columns)](
        *(weights, entry_rows, starts, counts, rows, out, width), LONG=_LONG, BLOCK=block
    )
    if bound:
        owner = torch.searchsorted(last_piece, torch.arange(bound, device=rows.device), right=True)
        partial = torch.empty(bound, width, dtype=_wide(rows), device=rows.device)
        first_piece = last_piece - pieces
        _pieces[(bound, columns)](
            *(weights, entry_rows, starts, counts, rows, owner, first_piece, partial),
            *(latents, width),
            LONG=_LONG,
            BLOCK=block,
        )
        _sum_of_pieces[(latents, columns)](*(partial, first_piece, pieces, out, width), BLOCK=block)
    return out


def _block(width: int) -> int:
    return min(_BLOCK, triton.next_power_of_2(width))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@triton.jit
def _wide_zeros(out, BLOCK: tl.constexpr):
    if out.dtype.element_ty == tl.float64:
        zeros = tl.zeros((BLOCK,), dtype=tl.float64)
    else:
        zeros = tl.zeros((BLOCK,), dtype=tl.float32)
    return zeros


@triton.jit
def _weighted_rows(weights, indices, table, out, k, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = _wide_zeros(out, BLOCK)
    for j in range(k):
        weight = tl.load(weights + row * k + j)
        latent = tl.load(indices + row * k + j).to(tl.int64)
        values = tl.load(table + latent * width + column, mask=inside, other=0.0)
        total += weight.to(total.dtype) * values.to(total.dtype)
    tl.store(out + row * width + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _sampled_product(rows, table, indices, out, k, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    for j in range(k):
        latent = tl.load(indices + row * k + j).to(tl.int64)
        total = _wide_zeros(out, BLOCK)
        for begin in range(0, width, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            inside = column < width
            a = tl.load(rows + row * width + column, mask=inside, other=0.0)
            b = tl.load(table + latent * width + column, mask=inside, other=0.0)
            total += a.to(total.dtype) * b.to(total.dtype)
        tl.store(out + row * k + j, tl.sum(total, axis=0).to(out.dtype.element_ty))


@triton.jit
def _entry_sum(weights, entry_rows, rows, begin, end, column, inside, total, width):
    for entry in range(begin, end):
        weight = tl.load(weights + entry)
        row = tl.load(entry_rows + entry).to(tl.int64)
        values = tl.load(rows + row * width + column, mask=inside, other=0.0)
        total += weight.to(total.dtype) * values.to(total.dtype)
    return total


@triton.jit
def _short_sums(
    weights, entry_rows, starts, counts, rows, out, width, LONG: tl.constexpr, BLOCK: tl.constexpr
):
    latent = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    begin = tl.load(starts + latent).to(tl.int64)
    count = tl.load(counts + latent).to(tl.int64)
    if count <= LONG:
        total = _wide_zeros(out, BLOCK)
        total = _entry_sum(
            weights, entry_rows, rows, begin, begin + count, column, inside, total, width
        )
        tl.store(out + latent * width + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _pieces(
    weights,
    entry_rows,
    starts,
    counts,
    rows,
    owner,
    first_piece,
    partial,
    latents,
    width,
    LONG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    piece = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    latent = tl.load(owner + piece).to(tl.int64)
    if latent < latents:
        start = tl.load(starts + latent).to(tl.int64)
        end = start + tl.load(counts + latent).to(tl.int64)
        begin = start + (piece - tl.load(first_piece + latent).to(tl.int64)) * LONG
        end = tl.minimum(end, begin + LONG)
        total = _wide_zeros(partial, BLOCK)
        total = _entry_sum(weights, entry_rows, rows, begin, end, column, inside, total, width)
        tl.store(partial + piece * width + column, total, mask=inside)


@triton.jit
def _sum_of_pieces(partial, first_piece, pieces, out, width, BLOCK: tl.constexpr):
    latent = tl.program_id(0).to(tl.int64)
    count = tl.load(pieces + latent).to(tl.int64)
    if count > 0:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        begin = tl.load(first_piece + latent).to(tl.int64)
        total = _wide_zeros(partial, BLOCK)
        for piece in range(begin, begin + count):
            total += tl.load(partial + piece * width + column, mask=inside, other=0.0)
        tl.store(out + latent * width + column, total.to(out.dtype.element_ty), mask=inside)

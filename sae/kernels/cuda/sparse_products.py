"""Sparse products on CUDA, in Triton: the functions and numbers of kernels/sparse_products.py.

Every sum runs in one order, entry by entry, in float32 (float64 for float64): no atomics, so a step
repeats bit for bit. Nothing of size N x K x D exists.
"""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportCallIssue=false
# Triton makes constants of what is annotated as such.

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from .launching import on_its_device

_LONG = 1024  # entries of one latent from which its sum is cut into pieces
_BLOCK = 512  # columns that one program works on
_TILE = 8192  # elements of gathered rows that one program holds
_ENTRIES = 16  # that one program multiplies, of whatever rows
MOST_AT_ONCE = 256
"""Active latents of a row whose rows of the table `reconstruct` holds at once."""


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
def reconstruct(
    weights: Float[Tensor, "N K"],
    indices: Int[Tensor, "N K"],
    table: Float[Tensor, "L D"],
    offset: Float[Tensor, "D"] | Float[Tensor, "N D"],
    y: Float[Tensor, "N D"],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out_n = sum_j weights_nj table[indices_nj] + offset_n, and what is asked of it, in one pass.

    Also difference = out - y, its products <difference_n, table[indices_nj]> [N K], and
    ||difference_n||^2 [N]. K is at most `MOST_AT_ONCE`.
    """
    (n, k), width = indices.shape, table.shape[1]
    out, difference = table.new_empty(n, width), table.new_empty(n, width)
    products, squares = table.new_empty(n, k), table.new_empty(n)
    at_once = triton.next_power_of_2(k)
    block = min(triton.next_power_of_2(width), max(16, _TILE // at_once))
    _reconstruct[(n,)](
        *(weights.contiguous(), indices.contiguous(), table.contiguous(), offset.contiguous()),
        *(y.contiguous(), out, difference, products, squares, k, width),
        offset.ndim - 1,
        K=at_once,
        BLOCK=block,
        num_warps=8,
    )
    return out, difference, products, squares


@on_its_device
def sampled_product(
    rows: Float[Tensor, "N D"], table: Float[Tensor, "L D"], indices: Int[Tensor, "N K"]
) -> Float[Tensor, "N K"]:
    """out_nj = <rows_n, table[indices_nj]>."""
    n, k = indices.shape
    out = rows.new_empty(n, k)
    at_once = min(32, triton.next_power_of_2(k))
    block = min(triton.next_power_of_2(rows.shape[1]), _TILE // at_once)
    _sampled_product[(n, triton.cdiv(k, at_once))](
        *(rows.contiguous(), table.contiguous(), indices.contiguous(), out, k, rows.shape[1]),
        K=at_once,
        BLOCK=block,
    )
    return out


@on_its_device
def products_of_entries(
    rows: Float[Tensor, "N D"],
    table: Float[Tensor, "L D"],
    entry_rows: Int[Tensor, " E"],
    indices: Int[Tensor, " E"],
) -> Float[Tensor, " E"]:
    """out_e = <rows[entry_rows_e], table[indices_e]>."""
    out, width = rows.new_empty(len(indices)), rows.shape[1]
    block = min(triton.next_power_of_2(width), _TILE // _ENTRIES)
    _products_of_entries[(triton.cdiv(len(indices), _ENTRIES),)](
        *(rows.contiguous(), table.contiguous(), entry_rows.contiguous(), indices.contiguous()),
        *(out, len(indices), width),
        K=_ENTRIES,
        BLOCK=block,
    )
    return out


class Pieces(NamedTuple):
    """Latents with many entries, cut up, so that no program works alone while others are done."""

    owner: Int[Tensor, " P"]
    """The latent of each piece; behind the last piece a number that no latent has."""
    first: Int[Tensor, " L"]
    """Each latent's first piece."""
    count: Int[Tensor, " L"]
    """Each latent's pieces, 0 where it is summed at once."""


@on_its_device
def cut(counts: Int[Tensor, " L"], entries: int) -> Pieces | None:
    """Pieces of 1,024 entries of the latents that have more; None where none can have."""
    # An upper bound of their number is known without asking the device.
    bound = 2 * entries // _LONG
    if not bound:
        return None
    count = torch.where(counts > _LONG, (counts + _LONG - 1) // _LONG, 0)
    last = count.cumsum(0)
    numbers = torch.arange(bound, device=counts.device)
    return Pieces(torch.searchsorted(last, numbers, right=True), last - count, count)


@on_its_device
def sum_by_latent(
    weights: Float[Tensor, " E"],
    entry_rows: Int[Tensor, " E"],
    starts: Int[Tensor, " L"],
    counts: Int[Tensor, " L"],
    pieces: Pieces | None,
    rows: Float[Tensor, "N D"],
    add_to: Float[Tensor, "L D"] | None = None,
) -> Float[Tensor, "L D"]:
    """out_l = sum of weights_e rows[entry_rows_e] over the counts_l entries from starts_l on.

    In the dtype of `weights`, whatever that of `rows`; written over `add_to`, and added to it,
    where that is given. A latent of several pieces is summed piece by piece; then these are added
    in order.
    """
    latents, width = len(counts), rows.shape[1]
    rows, weights, entry_rows = rows.contiguous(), weights.contiguous(), entry_rows.contiguous()
    out = weights.new_empty(latents, width) if add_to is None else add_to
    block = _block(width)
    columns = triton.cdiv(width, block)
    how = {"ADD": add_to is not None, "BLOCK": block}
    _short_sums[(latents, columns)](
        *(weights, entry_rows, starts, counts, rows, out, width), LONG=_LONG, **how
    )
    if pieces is not None:
        owner, first, count = pieces
        partial = torch.empty(len(owner), width, dtype=_wide(weights), device=rows.device)
        _pieces[(len(owner), columns)](
            *(weights, entry_rows, starts, counts, rows, owner, first, partial, latents, width),
            LONG=_LONG,
            BLOCK=block,
        )
        _sum_of_pieces[(len(owner), columns)](
            *(partial, owner, first, count, out, latents, width), **how
        )
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
def _reconstruct(
    weights,
    indices,
    table,
    offset,
    y,
    out,
    difference,
    products,
    squares,
    k,
    width,
    offset_by_row,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, K)
    active = j < k
    latent = tl.load(indices + row * k + j, mask=active, other=0).to(tl.int64)
    product = _wide_zeros(out, K)
    square = _wide_zeros(out, BLOCK)
    weight = tl.load(weights + row * k + j, mask=active, other=0.0).to(product.dtype)
    for begin in range(0, width, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < width
        held = tl.load(
            table + latent[:, None] * width + column[None, :],
            mask=active[:, None] & inside[None, :],
            other=0.0,
        ).to(product.dtype)
        total = tl.sum(held * weight[:, None], axis=0)
        here = row * width + column
        total += tl.load(offset + offset_by_row * row * width + column, mask=inside, other=0.0)
        apart = total - tl.load(y + here, mask=inside, other=0.0)
        tl.store(out + here, total, mask=inside)
        tl.store(difference + here, apart, mask=inside)
        square += apart * apart
        product += tl.sum(held * apart[None, :], axis=1)
    tl.store(products + row * k + j, product, mask=active)
    tl.store(squares + row, tl.sum(square, axis=0))


@triton.jit
def _sampled_product(rows, table, indices, out, k, width, K: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * K + tl.arange(0, K)
    active = j < k
    latent = tl.load(indices + row * k + j, mask=active, other=0).to(tl.int64)
    product = _wide_zeros(out, K)
    for begin in range(0, width, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < width
        a = tl.load(rows + row * width + column, mask=inside, other=0.0)
        held = tl.load(
            table + latent[:, None] * width + column[None, :],
            mask=active[:, None] & inside[None, :],
            other=0.0,
        )
        product += tl.sum(held.to(product.dtype) * a[None, :].to(product.dtype), axis=1)
    tl.store(out + row * k + j, product.to(out.dtype.element_ty), mask=active)


@triton.jit
def _products_of_entries(
    rows, table, entry_rows, indices, out, entries, width, K: tl.constexpr, BLOCK: tl.constexpr
):
    entry = tl.program_id(0).to(tl.int64) * K + tl.arange(0, K)
    there = entry < entries
    row = tl.load(entry_rows + entry, mask=there, other=0).to(tl.int64)
    latent = tl.load(indices + entry, mask=there, other=0).to(tl.int64)
    product = _wide_zeros(out, K)
    for begin in range(0, width, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = there[:, None] & (column < width)[None, :]
        a = tl.load(rows + row[:, None] * width + column[None, :], mask=inside, other=0.0)
        b = tl.load(table + latent[:, None] * width + column[None, :], mask=inside, other=0.0)
        product += tl.sum(a.to(product.dtype) * b.to(product.dtype), axis=1)
    tl.store(out + entry, product.to(out.dtype.element_ty), mask=there)


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
    weights,
    entry_rows,
    starts,
    counts,
    rows,
    out,
    width,
    LONG: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK: tl.constexpr,
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
        if ADD:
            total += tl.load(out + latent * width + column, mask=inside, other=0.0)
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
def _sum_of_pieces(
    partial, owner, first_piece, pieces, out, latents, width, ADD: tl.constexpr, BLOCK: tl.constexpr
):
    piece = tl.program_id(0).to(tl.int64)
    latent = tl.load(owner + piece).to(tl.int64)
    # One program per latent works; pieces behind the last have no latent.
    if tl.load(first_piece + latent, mask=latent < latents, other=-1) == piece:
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = column < width
        total = _wide_zeros(partial, BLOCK)
        for i in range(piece, piece + tl.load(pieces + latent).to(tl.int64)):
            total += tl.load(partial + i * width + column, mask=inside, other=0.0)
        if ADD:
            total += tl.load(out + latent * width + column, mask=inside, other=0.0)
        tl.store(out + latent * width + column, total.to(out.dtype.element_ty), mask=inside)

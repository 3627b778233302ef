"""The k largest entries of every row on CUDA, in Triton, exactly.

Of equal entries those in the first columns are taken, so that a row's active latents do not depend
on what else is computed. A row's entries are compared as whole numbers of the same order, and the
k-th largest is found eight bits at a time: no sort, nothing asked of the device.
"""

# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportCallIssue=false, reportOperatorIssue=false
# Triton makes constants of what is annotated as such.

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from .launching import on_its_device

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of which entries can be selected."""

_BLOCK = 4096  # entries that one program looks at together
_TILE = 8192  # entries that one program takes maxima of


@on_its_device
def largest(
    values: Float[Tensor, "N W"], k: int, top: Float[Tensor, "N K"], columns: Int[Tensor, "N K"]
) -> None:
    """Write the k largest entries of every row, and their columns in rising order.

    They lie in the k runs of neighbouring columns with the largest maxima: a run left out has k
    maxima, each in a run of its own, that are larger than anything in it, or equal and before it.
    """
    n, width = values.shape
    group = _group(width, k)
    bits = _bits(values)
    if group == 1:
        _select(values, None, k, 1, width, top, columns, bits)
        return
    groups = triton.cdiv(width, group)
    maxima = torch.empty(n, groups, dtype=torch.int32, device=values.device)
    block = min(_TILE // group, triton.next_power_of_2(groups))
    _group_maxima[(n, triton.cdiv(groups, block))](
        values, maxima, width, groups, GROUP=group, BLOCK=block
    )
    chosen = torch.empty(n, k, dtype=torch.int32, device=values.device)
    _select(maxima, None, k, 1, groups, None, chosen, bits)
    _select(values, chosen, k, group, k * group, top, columns, bits)


@on_its_device
def keep_largest_(values: Float[Tensor, "N W"], k: int) -> None:
    """Set all but the k largest entries of every row, and those below 0, to 0."""
    n, width = values.shape
    block = min(_BLOCK, triton.next_power_of_2(width))
    _keep_largest[(n,)](values, k, width, BITS=_bits(values), BLOCK=block, num_warps=8)


def _group(width: int, k: int) -> int:
    """Columns per run: about where there are as many runs as entries in k of them."""
    group = 1
    while group < 128 and k * group * group * 2 < width:
        group *= 2
    return group if group >= 4 else 1


def _bits(values: Tensor) -> int:
    """Of an entry's number, those that tell it from others."""
    return 16 if values.dtype == torch.bfloat16 else 32


def _select(
    source: Tensor,
    chosen: Tensor | None,
    k: int,
    group: int,
    width: int,
    top: Tensor | None,
    columns: Tensor,
    bits: int,
) -> None:
    """Of `width` entries of every row: its own, or those of the `chosen` runs of `group`."""
    block = min(_BLOCK, triton.next_power_of_2(width))
    _select_largest[(len(source),)](
        source,
        source if chosen is None else chosen,
        source if top is None else top,
        *(columns, k, width, source.shape[1]),
        GROUP=0 if chosen is None else group,
        BITS=bits,
        VALUES=top is not None,
        BLOCK=block,
        num_warps=8 if block > 2048 else 4,
    )


@triton.jit
def _ordered(values):
    """Whole numbers, without a sign, in the order of the values; NaN above all."""
    if values.dtype == tl.int32:
        signed = values
    else:
        wide = values.to(tl.float32)
        bits = wide.to(tl.int32, bitcast=True)
        signed = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
        signed = tl.where(wide != wide, 0x7FFFFFFF, signed)
    return signed.to(tl.uint32, bitcast=True) ^ 0x80000000


@triton.jit
def _group_maxima(values, maxima, width, groups, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    found = tl.load(values + row * width + column, mask=column < width, other=float("-inf"))
    signed = (_ordered(found) ^ 0x80000000).to(tl.int32, bitcast=True)
    tl.store(maxima + row * groups + group, tl.max(signed, axis=1), mask=group < groups)


@triton.jit
def _load(source, chosen, row, position, k, width, own_width, GROUP: tl.constexpr):
    """Entries of a row as ordered numbers, and their columns; 0 and none outside of it."""
    inside = position < width
    if GROUP == 0:
        column = position
    else:
        run = tl.load(chosen + row * k + position // GROUP, mask=inside, other=0)
        column = run * GROUP + position % GROUP
        inside = inside & (column < own_width)
    values = tl.load(source + row * own_width + column, mask=inside, other=0)
    return values, tl.where(inside, _ordered(values), 0), column, inside


@triton.jit
def _limit(
    source,
    chosen,
    row,
    k,
    width,
    own_width,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The k-th largest number of a row, the last that equals it, and how many such are wanted.

    Eight bits at a time, from the highest: of the numbers that agree so far, the next bits that k
    of all numbers reach.
    """
    limit = tl.zeros((), dtype=tl.uint32)
    wanted = k
    digits = tl.arange(0, 256)
    for step in range(BITS // 8):
        shift = 24 - 8 * step
        counts = tl.zeros((256,), dtype=tl.int32)
        for begin in range(0, width, BLOCK):
            position = begin + tl.arange(0, BLOCK)
            _, numbers, _, inside = _load(source, chosen, row, position, k, width, own_width, GROUP)
            agrees = inside & ((((numbers ^ limit) >> shift) >> 8) == 0)
            digit = ((numbers >> shift) & 255).to(tl.int32)
            counts += tl.histogram(digit, 256, mask=agrees)
        reach = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0) + counts
        digit = tl.sum((reach >= wanted).to(tl.int32), axis=0) - 1
        wanted -= tl.sum(tl.where(digits > digit, counts, 0), axis=0)
        limit |= digit.to(tl.uint32) << shift
    # Of what has 16 bits the other bits are all alike.
    return limit, limit if BITS == 32 else limit | 0xFFFF, wanted


@triton.jit
def _select_largest(
    source,
    chosen,
    top,
    columns,
    k,
    width,
    own_width,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    VALUES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    limit, last, equal_wanted = _limit(source, chosen, row, k, width, own_width, GROUP, BITS, BLOCK)
    equal_seen = tl.zeros((), dtype=tl.int32)
    written = tl.zeros((), dtype=tl.int32)
    for begin in range(0, width, BLOCK):
        position = begin + tl.arange(0, BLOCK)
        values, numbers, column, _ = _load(
            source, chosen, row, position, k, width, own_width, GROUP
        )
        equal = ((numbers >= limit) & (numbers <= last)).to(tl.int32)
        place = equal_seen + tl.cumsum(equal, axis=0)
        wanted = (numbers > last) | ((equal == 1) & (place <= equal_wanted))
        slot = written + tl.cumsum(wanted.to(tl.int32), axis=0) - 1
        tl.store(columns + row * k + slot, column.to(columns.dtype.element_ty), mask=wanted)
        if VALUES:
            tl.store(top + row * k + slot, values.to(top.dtype.element_ty), mask=wanted)
        equal_seen += tl.sum(equal, axis=0)
        written += tl.sum(wanted.to(tl.int32), axis=0)


@triton.jit
def _keep_largest(values, k, width, BITS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    limit, last, equal_wanted = _limit(values, values, row, k, width, width, 0, BITS, BLOCK)
    equal_seen = tl.zeros((), dtype=tl.int32)
    for begin in range(0, width, BLOCK):
        position = begin + tl.arange(0, BLOCK)
        found, numbers, _, inside = _load(values, values, row, position, k, width, width, 0)
        equal = ((numbers >= limit) & (numbers <= last)).to(tl.int32)
        place = equal_seen + tl.cumsum(equal, axis=0)
        wanted = (numbers > last) | ((equal == 1) & (place <= equal_wanted))
        kept = tl.where(wanted & (found.to(tl.float32) > 0), found, 0)
        tl.store(values + row * width + position, kept.to(values.dtype.element_ty), mask=inside)
        equal_seen += tl.sum(equal, axis=0)

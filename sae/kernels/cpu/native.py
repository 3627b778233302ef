"""The C beside this file as functions of tensors, which must be on the CPU and contiguous."""

import ctypes
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from . import compiled

_KINDS = (torch.float32, torch.bfloat16, torch.int8)


def serves(*tensors: Tensor, table: Tensor | None = None) -> bool:
    """Whether the functions here take such tensors: float32, a table also bfloat16."""
    fit = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
    if table is not None:
        fit &= table.device.type == "cpu" and table.dtype in (torch.float32, torch.bfloat16)
    return fit and compiled.library() is not None


class Wanted(NamedTuple):
    """The k largest values + bias, of all columns or those listed in `among`, to be written."""

    among: Int[Tensor, " M"] | None
    bias: Float[Tensor, " M"]
    top: Float[Tensor, "N K"]
    columns: Int[Tensor, "N K"]


def select_largest(values: Float[Tensor, "N L"], *wanted: Wanted) -> None:
    """The positive parts of the k largest values + bias in every row and their columns, unordered.

    One or two selections are made in one go. Where fewer than k are above -inf, the rest are zeros
    of the first column.
    """
    (rows, width), arguments = values.shape, list[Tensor | int | None]()
    for w in wanted:
        assert 0 < w.top.shape[1] <= len(w.bias) <= width < 2**31 and w.top.shape == w.columns.shape
        arguments += [w.among, len(w.bias), w.top.shape[1], w.bias, w.top, w.columns]
    arguments += [None, 0, 0, None, None, None] * (2 - len(wanted))
    _call("select_largest", values, int(values.dtype == torch.bfloat16), rows, width, *arguments)


def searches(kind: torch.dtype) -> bool:
    """Whether this processor makes products of this kind while it searches them."""
    return _columns_at_once(kind) > 0


def _columns_at_once(kind: torch.dtype) -> int:
    if compiled.library() is None or kind not in _KINDS:
        return 0
    return compiled.library().columns_at_once(ctypes.c_int64(_KINDS.index(kind)))


def search(
    inputs: Float[Tensor, "N D"],
    W: Float[Tensor, "L D"],
    bias: Float[Tensor, " L"],
    kind: torch.dtype,
    tops: list[Tensor],
    columns: list[Tensor],
    dead: Int[Tensor, " M"] | None = None,
) -> None:
    """The k largest of inputs W^T + bias in every row, and of those listed in `dead`.

    Written like `select_largest` does; the product, of numbers rounded to `kind`, is never stored.
    """
    tile = _columns_at_once(kind)
    assert tile and inputs.dtype in (torch.float32, torch.bfloat16)
    assert kind in (torch.int8, inputs.dtype)
    assert W.shape == (len(bias), inputs.shape[1]) and len(W) < 2**31 - 2 * tile
    assert 0 < tops[0].shape[1] <= len(W)

    def in_whole_tiles(numbers: Tensor) -> Tensor:
        return torch.nn.functional.pad(numbers, (0, -len(numbers) % tile), value=-1)

    among, listed = torch.arange(len(W), dtype=torch.int32), 0
    if dead is not None:
        assert 0 < tops[1].shape[1] <= len(dead)
        rest = torch.ones(len(W), dtype=torch.bool).index_fill_(0, dead.long(), False)
        first = in_whole_tiles(dead.int())
        among, listed = torch.cat([first, among[rest]]), len(first)
    among = in_whole_tiles(among)
    outs: list[Tensor | int | None] = [listed, tops[-1].shape[1], tops[-1], columns[-1]]
    _call(
        *("search", _KINDS.index(kind), inputs, int(inputs.dtype == torch.bfloat16)),
        *(*inputs.shape, W, bias, among, len(among), tops[0].shape[1], tops[0], columns[0]),
        *(outs if listed else [0, 0, None, None]),
    )


def sum_rows(
    starts: Int[Tensor, " M+1"],
    columns: Int[Tensor, " E"],
    weights: Float[Tensor, " E"],
    table: Float[Tensor, "R D"],
    add_to: Float[Tensor, "M D"] | None = None,
) -> Float[Tensor, "M D"]:
    """out_m = sum of weights_j table[columns_j] over starts_m <= j < starts_{m+1}, in float32.

    Where `add_to` is given, it is added to that, in place.
    """
    out = add_to
    if out is None:
        out = in_huge_pages(torch.empty(len(starts) - 1, table.shape[1]))
    bf16, more = int(table.dtype == torch.bfloat16), int(add_to is not None)
    _call("sum_rows", starts, columns, weights, len(out), table, bf16, *table.shape, more, out)
    return out


def sampled_product(
    rows: Float[Tensor, "N D"],
    columns: Int[Tensor, "N K"] | Int[Tensor, " E"],
    table: Float[Tensor, "R D"],
    starts: Int[Tensor, " N+1"] | None = None,
) -> Float[Tensor, "N K"] | Float[Tensor, " E"]:
    """out_nj = <rows_n, table[columns_nj]>; with `starts` of starts_n <= j < starts_{n+1}, [E]."""
    out = torch.empty(columns.shape)
    if starts is None:
        n, k = columns.shape
        starts = torch.arange(n + 1, dtype=torch.int32) * k
    _call("sampled_product", rows, starts.int(), columns.int(), len(rows), table, *table.shape, out)
    return out


def sort_by_column(
    indices: Int[Tensor, "N K"], columns: int
) -> tuple[Int[Tensor, " L+1"], Int[Tensor, " E"], Int[Tensor, " E"]]:
    """The entries sorted by column, stable: where columns start; each entry's place, and row."""
    assert indices.numel() < 2**31
    starts = torch.empty(columns + 1, dtype=torch.int32)
    order, rows = torch.empty(2, indices.numel(), dtype=torch.int32)
    _call("sort_by_column", indices, *indices.shape, columns, starts, order, rows)
    return starts, order, rows


def take(values: Float[Tensor, "N K"], order: Int[Tensor, " E"]) -> Float[Tensor, " E"]:
    """out_i = values.flatten()[order_i]."""
    out = torch.empty(len(order))
    _call("take", order, len(order), values, out)
    return out


def in_huge_pages(tensor: Tensor, touched: bool = False) -> Tensor:
    """The same tensor, in pages of 2 MB where it is large and the system has them.

    Fresh memory then comes faster, and so do rows gathered from it; `touched`: it is in use.
    """
    if tensor.device.type == "cpu" and compiled.library() is not None:
        _call("use_huge_pages", tensor, tensor.nbytes, int(touched))
    return tensor


def scale_and_project_(grad: Tensor, weight: Tensor | None, scale: float) -> Tensor:
    """grad *= scale, then grad -= (grad . w) w by rows of unit-norm `weight`; ||grad||^2."""
    rows, d = (1, grad.numel()) if grad.ndim == 1 else grad.shape
    squares = torch.empty(rows)
    _call("scale_and_project", grad, weight, ctypes.c_float(scale), rows, d, squares)
    return squares.sum()


def signum_step_(
    y: Tensor, z: Tensor, grad: Tensor, lr: float, beta: float, c: float, unit_norm: bool
) -> None:
    """The step of `optim.ScheduleFreeSignum`, and unit norm for the rows of y if wanted."""
    rows, d = (1, y.numel()) if y.ndim == 1 else y.shape
    factors = [ctypes.c_float(f) for f in (lr, beta, c)]
    _call("signum_step", y, z, grad, rows, d, *factors, int(unit_norm))


def normalize_rows_(rows: Float[Tensor, "R D"]) -> None:
    """Scale every row to unit norm; rows of zeros stay."""
    _call("normalize_rows", rows, *rows.shape)


def _call(name: str, *arguments: Tensor | int | ctypes.c_float | None) -> None:
    passed: list[Any] = []
    for value in arguments:
        if isinstance(value, Tensor):
            assert value.is_contiguous() and value.device.type == "cpu"
            value = value.data_ptr()
        # Pointers and sizes are 64 bits wide, as a bare int would not be.
        passed.append(ctypes.c_int64(value) if isinstance(value, int) else value)
    getattr(compiled.library(), name)(*passed)

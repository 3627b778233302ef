"""The C beside this file, compiled for this machine when it is first needed."""

import ctypes
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

_SOURCES = ("select.c", "sums.c", "update.c")


@cache
def library() -> Any:
    """The compiled functions, or None where there is no C compiler or it cannot make them.

    They run on torch's own threads: the OpenMP library is the one that torch has loaded.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    sources = [str(Path(__file__).with_name(name)) for name in _SOURCES]
    objects = [name.replace(".c", ".o") for name in _SOURCES]
    with tempfile.TemporaryDirectory() as folder:
        flags = ["-O3", "-march=native", "-fopenmp", "-fPIC", "-c"]
        try:
            for command in (
                [compiler, *flags, *sources],
                [compiler, "-shared", *objects, "-lm", "-o", "native.so"],
            ):
                subprocess.run(command, check=True, capture_output=True, timeout=120, cwd=folder)
            return ctypes.CDLL(f"{folder}/native.so")
        except (OSError, subprocess.SubprocessError):
            return None


def serves(*tensors: Tensor, table: Tensor | None = None) -> bool:
    """Whether the functions here take such tensors: float32, a table also bfloat16."""
    fit = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors)
    if table is not None:
        fit &= table.device.type == "cpu" and table.dtype in (torch.float32, torch.bfloat16)
    return fit and library() is not None


def select_largest(
    values: Float[Tensor, "N L"], *wanted: tuple[Tensor, Float[Tensor, "N K"], Int[Tensor, "N K"]]
) -> None:
    """The positive parts of the k largest values + bias in every row and their columns, unordered.

    One or two are wanted, each (bias [L], tops [N K], columns [N K]), the last two to be written.
    A bias of -inf leaves a column out; where too few are left the rest are zeros of column 0.
    """
    rows, width = values.shape
    arguments: list[Tensor | int | None] = []
    for bias, top, columns in wanted:
        assert 0 < top.shape[1] <= width < 2**31 and top.shape == columns.shape
        arguments += [bias, top.shape[1], top, columns]
    arguments += [None, 0, None, None] * (2 - len(wanted))
    _call("select_largest", values, int(values.dtype == torch.bfloat16), rows, width, *arguments)


def sum_rows(
    starts: Int[Tensor, " M+1"],
    columns: Int[Tensor, " E"],
    weights: Float[Tensor, " E"],
    table: Float[Tensor, "R D"],
) -> Float[Tensor, "M D"]:
    """out_m = sum of weights_j table[columns_j] over starts_m <= j < starts_{m+1}, in float32."""
    out = torch.empty(len(starts) - 1, table.shape[1])
    bf16 = int(table.dtype == torch.bfloat16)
    _call("sum_rows", starts, columns, weights, len(out), table, bf16, *table.shape, out)
    return out


def sampled_product(
    rows: Float[Tensor, "N D"], columns: Int[Tensor, "N K"], table: Float[Tensor, "R D"]
) -> Float[Tensor, "N K"]:
    """out_nj = <rows_n, table[columns_nj]>."""
    out = torch.empty(columns.shape)
    _call("sampled_product", rows, columns.int(), *columns.shape, table, *table.shape, out)
    return out


def sort_by_column(
    indices: Int[Tensor, "N K"], columns: int
) -> tuple[Int[Tensor, " L+1"], Int[Tensor, " E"]]:
    """Where each column's entries start once sorted by column (stable), and the row of each."""
    assert indices.numel() < 2**31
    starts = torch.empty(columns + 1, dtype=torch.int32)
    rows = torch.empty(indices.numel(), dtype=torch.int32)
    _call("sort_by_column", indices, *indices.shape, columns, starts, rows)
    return starts, rows


def values_by_column(
    indices: Int[Tensor, "N K"], starts: Int[Tensor, " L+1"], values: Float[Tensor, "N K"]
) -> Float[Tensor, " E"]:
    """The values of the entries in the order of `sort_by_column`."""
    out = torch.empty(indices.numel())
    _call("values_by_column", indices, len(out), len(starts) - 1, starts, values, out)
    return out


def finish_gradient_(grad: Tensor, weight: Tensor | None, scale: float) -> Tensor:
    """grad *= scale, then grad -= (grad . w) w by rows of unit-norm `weight`; ||grad||^2."""
    rows, d = (1, grad.numel()) if grad.ndim == 1 else grad.shape
    squares = torch.empty(rows)
    _call("finish_gradient", grad, weight, ctypes.c_float(scale), rows, d, squares)
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
    getattr(library(), name)(*passed)

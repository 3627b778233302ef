"""select.c, compiled for this machine when it is first needed."""

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


@cache
def library() -> Any:
    """The compiled functions, or None where there is no C compiler or it cannot make them.

    They run on torch's own threads: the OpenMP library is the one that torch has loaded.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    source = Path(__file__).with_name("select.c")
    with tempfile.TemporaryDirectory() as folder:
        compiled, linked = f"{folder}/select.o", f"{folder}/select.so"
        flags = ["-O3", "-march=native", "-fopenmp", "-fPIC", "-c"]
        try:
            for command in (
                [compiler, *flags, str(source), "-o", compiled],
                [compiler, "-shared", compiled, "-o", linked],
            ):
                subprocess.run(command, check=True, capture_output=True, timeout=120)
            found = ctypes.CDLL(linked)
        except (OSError, subprocess.SubprocessError):
            return None
    for function in (found.select_16, found.select_32):
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        function.argtypes, function.restype = [pointer, size, size, size, pointer], None
    return found


def top_k(values: Float[Tensor, "N L"], k: int) -> tuple[Float[Tensor, "N K"], Int[Tensor, "N K"]]:
    """The k largest entries of every row and their columns, in no order; exact above 0.

    Below 0 any entries may stand for each other.
    """
    compiled, (rows, width) = library(), values.shape
    assert values.is_contiguous() and values.device.type == "cpu" and 0 < k <= width < 2**32
    columns = torch.empty(rows, k, dtype=torch.int64)
    select = compiled.select_16 if values.element_size() == 2 else compiled.select_32
    select(values.data_ptr(), rows, width, k, columns.data_ptr())
    return values.gather(1, columns), columns


def serves(values: Tensor) -> bool:
    """Whether `top_k` takes such values here."""
    kinds = (torch.float32, torch.bfloat16)
    return values.device.type == "cpu" and values.dtype in kinds and library() is not None

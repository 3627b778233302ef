"""The C beside this file as a library, compiled once for each machine."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
_SOURCES = ("search.c", "select.c", "sparse_products.c", "update.c")
_HEADERS = ("lanes.h", "largest.h", "memory.h")
# Rows are read as other types than they were written as.
_FLAGS = ("-O3", "-march=native", "-fno-strict-aliasing", "-fopenmp", "-fPIC", "-c")


@cache
def library() -> Any:
    """The compiled functions, or None where there is no C compiler or it cannot make them.

    They run on torch's own threads: the OpenMP library is the one that torch has loaded. What is
    compiled is kept in the user's cache, for this processor, compiler and these sources; where that
    cannot be written, it is compiled anew by every process.
    """
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    try:
        folder, name = _cache_folder(), _name(compiler)
        kept = next(filter(_is_whole, sorted(folder.glob(f"{name}-*.so")) if folder else ()), None)
        if kept is not None:
            return ctypes.CDLL(str(kept))
        with tempfile.TemporaryDirectory() as aside:
            made = _compile(compiler, Path(aside))
            if folder is not None:
                with suppress(OSError):
                    _keep(made, folder, name)
            return ctypes.CDLL(str(made))
    except (OSError, subprocess.SubprocessError):
        return None


def _cache_folder() -> Path | None:
    with suppress(RuntimeError):  # there is no home
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sae"
    return None


def _is_whole(kept: Path) -> bool:
    """Whether a kept library is what was written: a damaged one would end the process."""
    return kept.stem.endswith(_checksum(kept))


def _checksum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:32]


def _name(compiler: str) -> str:
    """A name for what the sources are compiled to: other machines may share the folder."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().split("\n\n")[0].splitlines() if cpu.exists() else []
    about = [x for x in lines if x.startswith(("model name", "flags", "Features", "CPU"))]
    version = subprocess.run([compiler, "--version"], capture_output=True, timeout=60).stdout
    text = [repr((about or platform.processor(), platform.machine(), _FLAGS)).encode(), version]
    text += [(_HERE / name).read_bytes() for name in (*_SOURCES, *_HEADERS)]
    return hashlib.sha256(b"\0".join(text)).hexdigest()[:32]


def _compile(compiler: str, folder: Path) -> Path:
    objects = [name.replace(".c", ".o") for name in _SOURCES]

    def call(*arguments: str) -> None:
        command = [compiler, *arguments]
        subprocess.run(command, check=True, capture_output=True, timeout=120, cwd=folder)

    with ThreadPoolExecutor() as pool:
        list(pool.map(partial(call, *_FLAGS), (str(_HERE / name) for name in _SOURCES)))
    call("-shared", *objects, "-lm", "-o", "kernels.so")
    return folder / "kernels.so"


def _keep(made: Path, folder: Path, name: str) -> None:
    """Copy a library into the cache in one move: another process may be doing the same."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        copy = Path(shutil.copy(made, aside))
        os.replace(copy, folder / f"{name}-{_checksum(made)}.so")

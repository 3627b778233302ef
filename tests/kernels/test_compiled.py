"""The compiled library is kept in the user's cache, and compiled anew where it is not there."""

import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from sae import SaeConfig, SparseCoder
from sae.kernels.cpu import compiled, native
from sae.kernels.sparse_products import ByLatent
from sae.kernels.twins import Kernels

ROOT = Path(__file__).parents[2]
COMPILER = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler")


# Writes down what it is asked for. What a source was compiled to before stands for it again.
STAND_IN = """#!/bin/sh
echo "$@" >> {calls}
for source; do :; done
made={objects}/$(basename "$source" .c).o
[ "$source" = "${{source%.c}}" ] && exec {compiler} "$@"
[ -f "$made" ] || {{ {compiler} "$@" && cp "$(basename "$made")" "$made"; }} || exit 1
cp "$made" .
"""


class Machine:
    """A user's cache folder, and a compiler that writes down what it is asked for."""

    def __init__(self, folder: Path, objects: Path) -> None:
        self.cache, self.calls, self.path = folder / "cache", folder / "calls", folder / "bin"
        self.path.mkdir()
        text = STAND_IN.format(calls=self.calls, objects=objects, compiler=COMPILER)
        for name in ("cc", "gcc", "clang"):
            (self.path / name).write_text(text)
            (self.path / name).chmod(0o755)

    def compiles(self, environment: dict[str, str] | None = None) -> bool:
        """Whether a new process that uses the library compiles it."""
        self.calls.write_text("")
        own = {"XDG_CACHE_HOME": str(self.cache), "PATH": f"{self.path}:{os.environ['PATH']}"}
        code = (
            "import torch; from sae.kernels.cpu import native;"
            "rows = torch.full((3, 4), 2.0); native.normalize_rows_(rows);"
            "assert rows.eq(0.5).all()"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, **own, **(environment or {})},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        calls = self.calls.read_text().splitlines()
        return calls != ["--version"]

    def kept(self) -> list[Path]:
        """Files in the cache."""
        return list((self.cache / "sae").iterdir())


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("objects")


@pytest.fixture
def machine(tmp_path: Path, objects: Path) -> Machine:
    return Machine(tmp_path, objects)


@needs_compiler
def test_the_library_is_compiled_once_for_all_processes(machine: Machine) -> None:
    """A second process finds it in $XDG_CACHE_HOME/sae, whole, and only asks for the version."""
    assert machine.compiles()
    (kept,) = machine.kept()
    assert kept.suffix == ".so" and kept.stat().st_size > 0
    assert not machine.compiles()
    assert machine.kept() == [kept]


@needs_compiler
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_damaged_library_is_compiled_anew_and_replaced(machine: Machine, share: float) -> None:
    """A kept file that a crash of the machine has cut short is never loaded."""
    assert machine.compiles()
    (kept,) = machine.kept()
    whole = kept.read_bytes()
    kept.write_bytes(whole[: int(share * len(whole))])
    assert machine.compiles()
    assert machine.kept() == [kept] and kept.stat().st_size > 0
    assert not machine.compiles()


@needs_compiler
def test_where_the_cache_cannot_be_written_each_process_compiles(machine: Machine) -> None:
    """A cache folder that is a file, which even root cannot write into, still gives a library."""
    machine.cache.write_text("not a folder")
    assert machine.compiles()
    assert machine.compiles()
    assert machine.cache.read_text() == "not a folder"


@needs_compiler
def test_other_compilers_have_libraries_of_their_own(machine: Machine) -> None:
    """What one compiler made is not taken for another's: machines may share a cache."""
    assert machine.compiles()
    script = machine.path / "cc"
    first, rest = script.read_text().split("\n", 1)
    script.write_text(f'{first}\ntest "$1" = --version && echo new\n{rest}')
    assert machine.compiles()
    assert len(machine.kept()) == 2


def test_without_a_compiler_there_is_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """None, and no tensors that C would serve."""
    monkeypatch.setenv("PATH", "")
    compiled.library.cache_clear()
    try:
        assert compiled.library() is None
        assert not native.serves(torch.zeros(2))
    finally:
        monkeypatch.undo()
        compiled.library.cache_clear()


def test_nothing_is_compiled_for_tensors_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coder on another device than the CPU never asks for the library."""
    monkeypatch.setattr(compiled, "library", lambda: pytest.fail("compiles for nothing"))
    coder, x = SparseCoder(8, SaeConfig(num_latents=64, k=4), "meta"), torch.empty(9, 8).to("meta")
    errors = coder.errors(x, x)
    assert errors.sae_out.is_meta
    coder.kernels.normalize_rows_(x)
    by_latent = ByLatent(coder.kernels.backend, errors.top_indices, 64)
    with suppress(NotImplementedError):  # of operators that count, and cannot on shapes alone
        assert by_latent.sum_rows(by_latent.sort(errors.top_acts), x).is_meta
    assert Kernels("auto").describe(torch.device("meta")) == "PyTorch's operators"


def test_sources_that_do_not_compile_are_no_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """PyTorch's operators take over where the compiler fails."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled, "_FLAGS", ("--no-such-flag",))
    compiled.library.cache_clear()
    try:
        assert compiled.library() is None
    finally:
        monkeypatch.undo()
        compiled.library.cache_clear()
    assert not list(tmp_path.iterdir())

"""The folder of a run: whose it is, what was asked for, and which checkpoints are whole.

RUN/run.json   the run's flags (never the token)
RUN/run.lock   who writes here: held by the kernel for as long as the process lives
"""

import fcntl
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from natsort import natsorted

from .config import UsageError
from .ranks import Ranks

_PACKAGES = ("torch", "accelerate", "deepspeed", "transformers", "datasets", "safetensors")

# Flags that do not change what a run computes, but for rounding: they may differ on resume.
_FREE_ON_RESUME = {
    *("resume", "save_dir", "run_name", "save_every", "save_best", "log_every", "log_with"),
    *("data_preprocessing_num_proc", "micro_acc_steps", "batch_size", "grad_acc_steps"),
    *("distribute_modules", "layer_to_rank", "timeout", "dry_run", "keep_last", "max_bad_steps"),
    *("eval_every", "finetune", "kernels", "compile"),
}

_locks: dict[Path, int] = {}
"""Descriptors of the folders that this process writes to."""


def open_run(folder: Path, flags: dict[str, Any], ranks: Ranks) -> bool:
    """Make the run's folder this run's own; return whether there is a checkpoint to resume from.

    Rank 0 does it, once all ranks were found to have the same flags and the same packages. With
    `resume` and no checkpoint yet the run starts from the beginning, so that one command starts
    and restarts it. Raises UsageError for ranks that differ, a folder that cannot be written, that
    another process writes to, or that holds a run which is not resumed or had other flags.
    """
    versions = {f"the version of {package}": version(package) for package in _PACKAGES}
    # Machines may differ in their number of cores, which is this flag's default.
    given = {f"--{n}": v for n, v in flags.items() if n != "data_preprocessing_num_proc"}
    ranks.same({**given, **versions})
    found: dict[str, bool] = {}
    with ranks.together():
        if ranks.main:
            found["resumes"] = _open_run(folder, flags)
    return ranks.merge(found)["resumes"]


def recorded_flags(cfg: Any, lm: Any, dataset: Any) -> dict[str, Any]:
    """The flags of a run as they are written down, without the token.

    What was passed from Python has no name by which it could be found again, but an LM may know it.
    """
    flags = {name: value for name, value in asdict(cfg).items() if name != "hf_token"}
    if lm is not None:
        flags["model"] = lm.name_or_path or None
    if dataset is not None:
        flags["dataset"] = None
    return flags


def _open_run(folder: Path, flags: dict[str, Any]) -> bool:
    with _writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _lock(folder)
    for left_over in folder.glob("*.tmp"):  # of a save or a deletion that was cut off
        # Cut off between two renames, .old.tmp is the only best coder: keep_best puts it back.
        if not left_over.name.endswith(".old.tmp"):
            shutil.rmtree(left_over, ignore_errors=True)
    if any(folder.glob("step_*")):
        if not flags["resume"]:
            raise UsageError(
                f"--run_name {folder.name}: {folder} already holds a run; add --resume to continue "
                f"it, or give another --run_name"
            )
        _same_run(folder, flags)
        return True
    if flags["resume"]:
        print(f"--resume: {folder} holds no checkpoint yet; the run starts from the beginning")
    with _writable(folder):
        write_json(folder / "run.json", flags)
    return False


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"--save_dir {folder.parent}: cannot be written ({error.strerror}); give another folder"
        ) from None


def _same_run(folder: Path, flags: dict[str, Any]) -> None:
    before = read_json(folder / "run.json")
    if flags["sequences_per_step"] != _sequences_per_step(before):
        raise UsageError(
            f"--resume: --batch_size times --grad_acc_steps times the number of ranks is "
            f"{flags['sequences_per_step']} now and was {_sequences_per_step(before)} when "
            f"the run started: choose the two so that it is the same on this many ranks"
        )
    for name, value in json.loads(json.dumps(flags)).items():
        from_python = name in ("model", "dataset") and value is None
        if name in {*_FREE_ON_RESUME, "sequences_per_step"} or from_python:
            continue
        if before.get(name) != value:
            raise UsageError(
                f"--resume: --{name} is {value!r} now and was {before.get(name)!r} when the "
                f"run started; give the same flags, or start a new run with --finetune"
            )


def _sequences_per_step(flags: dict[str, Any]) -> Any:
    # Runs from before there were several ranks did not write it.
    alone = flags.get("batch_size", 0) * flags.get("grad_acc_steps", 0)
    return flags.get("sequences_per_step", alone)


def _lock(folder: Path) -> None:
    """Hold the folder until `unlock`, or until this process ends in whatever way.

    Raises UsageError that names the host and the process that holds it.
    """
    where = folder.resolve()
    if where in _locks:  # a run of this process that was cut short
        return
    descriptor = os.open(where / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 200).decode(errors="replace") or "another process"
        os.close(descriptor)
        raise UsageError(
            f"--run_name {folder.name}: {holder} is writing to {folder}; wait until it ends, or "
            f"give another --run_name"
        ) from None
    if stale := os.read(descriptor, 200).decode(errors="replace"):
        print(f"{folder}: {stale} wrote here and did not end in order; its lock is void")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}".encode(), 0)
    _locks[where] = descriptor


def unlock(folder: Path) -> None:
    """Give the folder back."""
    descriptor = _locks.pop(folder.resolve(), None)
    if descriptor is not None:
        os.ftruncate(descriptor, 0)
        os.close(descriptor)


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    found = [f for f in folder.glob("step_*") if f.suffix == "" and (f / "manifest.json").is_file()]
    return natsorted(found, key=lambda f: f.name)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    flush(aside)
    os.replace(aside, path)


def check_target(flag: str, path: Path) -> None:
    """Raise UsageError, before hours of work, for a file that could not be written after them."""
    new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        raise UsageError(
            f"{flag} {path}: cannot be written ({error.strerror}); give another file"
        ) from None
    if new:
        path.unlink()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises UsageError for a damaged one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read ({error}): the file is damaged") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} is not a JSON object: the file is damaged")
    return value


def flush(path: Path) -> None:
    """Have the disk take a file, or the entries of a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Small files that are whole or not there."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..flag_checks import UsageError


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


@contextmanager
def disk_errors(run: Path, step: int) -> Iterator[None]:
    """Inside, what the disk does not take becomes a UsageError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"--save_dir {run.parent}: step {step} cannot be saved ({error}); make room, then "
            f"--resume from the last checkpoint"
        ) from None

"""RUN/run.lock says who writes to a run: held by the kernel for as long as the process lives."""

import fcntl
import os
import platform
from pathlib import Path

from ..flag_checks import UsageError

_locks: dict[Path, int] = {}
"""Descriptors of the folders that this process writes to."""


def lock(folder: Path) -> None:
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

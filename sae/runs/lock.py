"""RUN/run.lock says who writes to a run: held by the kernel for as long as the process lives."""

import errno
import os
import platform
from pathlib import Path

from ..flag_checks import UsageError

try:
    import fcntl
except ImportError:  # no POSIX
    fcntl = None

_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
_locks: dict[Path, int] = {}
"""Descriptors of the folders that this process writes to."""


def lock(folder: Path) -> None:
    """Hold the folder until `unlock`, or until this process ends in whatever way.

    Where the file system has no locks, it says so and goes on. Raises UsageError that names the
    host and the process that holds it.
    """
    where = folder.resolve()
    if where in _locks:  # a run of this process that was cut short
        return
    descriptor = os.open(where / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
    held = False
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
    except BlockingIOError:
        holder = os.read(descriptor, 200).decode(errors="replace") or "another process"
        os.close(descriptor)
        raise UsageError(
            f"--run_name {folder.name}: {holder} is writing to {folder}; wait until it ends, or "
            f"give another --run_name"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(descriptor)
            raise
    before = os.read(descriptor, 200).decode(errors="replace")
    if before and held:
        print(f"{folder}: {before} wrote here and did not end in order; its lock is void")
    if not held:
        print(
            f"{folder}: no locks on this file system; see to it that nothing else writes here"
            + (f" ({before} did, and did not end in order)" if before else "")
        )
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}".encode(), 0)
    _locks[where] = descriptor


def unlock_all() -> None:
    """Give back every folder that this process writes to."""
    for folder in [*_locks]:
        unlock(folder)


def unlock(folder: Path) -> None:
    """Give the folder back."""
    descriptor = _locks.pop(folder.resolve(), None)
    if descriptor is not None:
        os.ftruncate(descriptor, 0)
        os.close(descriptor)

"""The exit codes of a run, and how a process ends with one."""

import os
import sys
from typing import NoReturn

FAILED, MISTAKE, LOST_A_RANK, STOPPED, INTERRUPTED = 1, 2, 3, 75, 130
"""Exit codes: an error of ours, of the user's, a dead or hung rank, told to stop (run again), and
told twice by ctrl-C."""


class Stopped(BaseException):
    """A signal, or the launcher's death, ended the run: after a save once training has begun."""

    @classmethod
    def saved(cls, reason: str, step: int) -> "Stopped":
        """What a run that was told to stop ends with after its save."""
        return cls(f"{reason}: saved after step {step}; the same command with --resume goes on")


def end_process(message: str | None, code: int, *, alone: bool) -> NoReturn:
    """Print what ended the process, if anything is to be said, and end it.

    Where it is not `alone`, at once: connections to ranks that are gone would keep the interpreter
    from ending.
    """
    if message is not None:
        print(f"error: {message}" if code != STOPPED else message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if alone:
        sys.exit(code)
    os._exit(code)

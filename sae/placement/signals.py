"""Requests to stop: signals, and the death of the launcher."""

import os
import signal
import threading
import time
from types import FrameType

from .exit_codes import INTERRUPTED, STOPPED, Stopped

_LOOK_EVERY = 0.5  # seconds
_GRACE = 30.0  # seconds that an orphan has to finish its step and save
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class _Request:
    """What this process was told."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.since: float | None = None
        self.training = False

    def stop(self, reason: str) -> None:
        self.reason = self.reason or reason
        self.since = self.since or time.monotonic()


_request = _Request()


def stop_reason() -> str | None:
    """Why this process should stop, or None."""
    return _request.reason


def told_for() -> float:
    """Seconds since this process was told to stop; 0 if it was not."""
    return 0.0 if _request.since is None else time.monotonic() - _request.since


def training_begins() -> None:
    """From now on a signal waits until the loop asks for `stop_reason`."""
    _request.training = True


def training_has_begun() -> bool:
    """Whether there is a loop that asks for `stop_reason`."""
    return _request.training


def watch_for_signals() -> None:
    """Before training a signal raises Stopped, later it is a reason to stop; twice ctrl-C ends."""
    for number in _SIGNALS:
        signal.signal(number, _on_signal)
    arrived, arrives = os.pipe()
    os.set_blocking(arrives, False)
    signal.set_wakeup_fd(arrives)
    threading.Thread(target=_listen, args=[arrived], daemon=True).start()


def watch_launcher() -> None:
    """Take the death of the launcher that started this process for a request to stop."""
    if {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys():  # launched
        threading.Thread(target=_guard_against_orphans, args=[os.getppid()], daemon=True).start()


def ignore_handlers() -> None:
    """Let signals end this process at once."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def _on_signal(number: int, frame: FrameType | None) -> None:
    _request.stop(_name(number))
    if not _request.training:
        raise Stopped(f"{_request.reason} before the first step; nothing to save")


def _name(number: int) -> str:
    return "ctrl-C" if number == signal.SIGINT else signal.Signals(number).name


def _listen(arrived: int) -> None:
    """Note signals as they arrive.

    A handler waits for the operation at hand, which can take a while, or for ever where that is a
    collective that another rank will not join; a thread need not.
    """
    count = 0
    while number := os.read(arrived, 1):
        if number[0] in _SIGNALS:
            _request.stop(_name(number[0]))
        count += number[0] == signal.SIGINT
        if count == 2:
            os.write(2, b"ctrl-C again: ends without saving\n")
            os._exit(INTERRUPTED)


def _guard_against_orphans(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(_LOOK_EVERY)
    _request.stop("the launcher is gone")
    if _request.training:
        time.sleep(_GRACE)
    os._exit(STOPPED)

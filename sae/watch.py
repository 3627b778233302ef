"""Signals, a launcher or a rank that is gone, and the exit codes that tell them apart."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from .config import UsageError

FAILED, MISTAKE, LOST_A_RANK, STOPPED, INTERRUPTED = 1, 2, 3, 75, 130
"""Exit codes: an error of ours, of the user's, a dead or hung rank, told to stop (run again), and
told twice by ctrl-C."""

_BEAT = 0.5  # seconds between two signs of life
_SILENT = 4.0  # seconds without one after which a rank is missing, once something is wrong
_BYE = b"bye"  # the last sign of a rank that ended in order
_SAID = ""  # for a reason that rank 0 gave itself
_GRACE = 30.0  # seconds that an orphan has to finish its step and save


_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class Stopped(BaseException):
    """A signal, or the launcher's death, ended the run: after a save once training has begun."""


class _Watch:
    """What one process knows of its own end and of the others'."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.in_steps = False
        self.left = False
        self.turns = 0
        self.since: float | None = None
        self.rank, self.world, self.timeout = 0, 1, float("inf")
        self.store: Store | None = None
        self.signs: dict[int, tuple[bytes, float]] = {}
        self.lock = threading.Lock()

    def stop(self, reason: str) -> None:
        self.reason = self.reason or reason
        self.since = self.since or time.monotonic()

    def missing(self, silence: float) -> list[int]:
        """Other ranks that have given no sign of life for that many seconds."""
        assert self.store is not None
        others = [rank for rank in range(self.world) if rank != self.rank]
        now = time.monotonic()
        with self.lock:
            for rank, sign in zip(others, self._read("sign", others), strict=True):
                if rank not in self.signs or self.signs[rank][0] != sign or sign == _BYE:
                    self.signs[rank] = (sign, now)
        return [rank for rank in others if now - self.signs[rank][1] > silence]

    def last_words(self) -> dict[int, str]:
        """What ranks that ended with an error of their own said."""
        others = [rank for rank in range(self.world) if rank != self.rank]
        found = dict(zip(others, self._read("words", others), strict=True))
        return {rank: words.decode() for rank, words in found.items() if words != b"-"}

    def write(self, key: str, value: str) -> None:
        if self.store is not None and not (key == "sign" and self.left):
            with suppress(RuntimeError):  # the store lives in a process that may be gone
                self.store.set(f"{key}/{self.rank}", value)

    def leave(self) -> None:
        """End in order: the others must not miss this rank."""
        self.write("sign", _BYE.decode())
        self.left = True

    def _read(self, key: str, ranks: list[int]) -> list[bytes]:
        assert self.store is not None
        return self.store.multi_get([f"{key}/{rank}" for rank in ranks])


_watch = _Watch()


def join(rank: int, world: int, timeout_minutes: float) -> None:
    """Show signs of life to the other ranks from now on, and look for theirs."""
    _watch.timeout = timeout_minutes * 60
    if _watch.store is not None:
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    wait = timedelta(seconds=60)
    store = dist.TCPStore(address, port, is_master=False, timeout=wait)  # pyright: ignore
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    _watch.store = PrefixStore(f"watch/{attempt}", store)
    _watch.rank, _watch.world = rank, world
    for key in ("sign", "words", "turn"):
        _watch.write(key, "-")
    # No daemon: one that is in a call of the store when the interpreter ends aborts the process.
    threading.Thread(target=_beat).start()


def next_turn() -> int:
    """The number of a round of turns; all ranks take part in all rounds."""
    _watch.turns += 1
    return _watch.turns


def had(turn: int) -> None:
    """Tell the others that this rank has had its turn."""
    _watch.write("turn", str(turn))


def has_had(rank: int, turn: int) -> bool:
    """Whether a rank has had its turn."""
    (found,) = _watch._read("turn", [rank])
    return found != b"-" and int(found) >= turn


def stop_reason() -> str | None:
    """Why this process should stop, or None. From the first call on, signals wait for the next."""
    _watch.in_steps = True
    return _watch.reason


@contextmanager
def exit_codes() -> Iterator[None]:
    """Run a script: signals, the launcher's death, and every error become a line and a code."""
    _hide_tokens()
    for number in _SIGNALS:
        signal.signal(number, _on_signal)
    arrived, arrives = os.pipe()
    os.set_blocking(arrives, False)
    signal.set_wakeup_fd(arrives)
    threading.Thread(target=_end_at_second_ctrl_c, args=[arrived], daemon=True).start()
    if {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION"} & os.environ.keys():  # launched
        threading.Thread(target=_guard_against_orphans, args=[os.getppid()], daemon=True).start()
    try:
        yield
        _watch.leave()
    except UsageError as error:
        _last_words(str(error), MISTAKE)
    except Stopped as stopped:
        lost = _why_others_ended() if _watch.world > 1 and not _watch.in_steps else None
        _watch.leave()
        said = str(stopped) if _watch.rank == 0 else None  # all ranks would say the same
        _end(said if lost is None else lost, STOPPED if lost is None else LOST_A_RANK)
    except Exception as error:  # whatever it is, the other ranks must hear of it
        if _watch.world == 1:
            raise
        if _is_of_communication(error) and (lost := _why_others_ended()) is not None:
            _end(lost, LOST_A_RANK)
        sys.excepthook(type(error), error, error.__traceback__)
        _watch.write("words", f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        _end(None, FAILED)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _hide_tokens() -> None:
    """Blank the value of --hf_token where other users' process lists read it from."""
    with suppress(OSError, ValueError, IndexError):
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end of proc(5)
        words = ctypes.string_at(start, end - start).split(b"\0")
        before = b""
        for word in words:
            flag, equals, _ = word.partition(b"=")
            skip = len(flag) + 1 if equals and _is_token(flag) else 0
            if skip or _is_token(before):
                ctypes.memset(start + skip, ord("*"), len(word) - skip)
            start, before = start + len(word) + 1, word


def _is_token(flag: bytes) -> bool:
    return flag.replace(b"-", b"_") == b"__hf_token"


def _on_signal(number: int, frame: FrameType | None) -> None:
    name = "ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    _watch.stop(name)
    if not _watch.in_steps:
        raise Stopped(f"{_watch.reason} before the first step; nothing to save")


def _end_at_second_ctrl_c(arrived: int) -> None:
    """A handler waits for the operation at hand, which can take a while; a thread need not."""
    count = 0
    while number := os.read(arrived, 1):
        count += number[0] == signal.SIGINT
        if count == 2:
            os.write(2, b"ctrl-C again: ends without saving\n")
            os._exit(INTERRUPTED)


def _last_words(message: str, code: int) -> None:
    """Rank 0 speaks for all; another rank speaks if rank 0 has not ended the run by then."""
    rank = int(os.environ.get("RANK", "0"))
    _watch.write("words", message)
    if rank:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        time.sleep(10)
        message = f"rank {rank}: {message}"
    _end(message, code)


def _end(message: str | None, code: int) -> None:
    if message not in (None, _SAID):
        print(f"error: {message}" if code != STOPPED else message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if _watch.world == 1:
        sys.exit(code)
    os._exit(code)  # connections to ranks that are gone would keep the interpreter from ending


def _is_of_communication(error: Exception) -> bool:
    text = str(error).lower()
    signs = ("gloo", "nccl", "connection", "timed out", "timeout", "broken pipe", "store")
    return isinstance(error, (RuntimeError, OSError)) and any(sign in text for sign in signs)


def _why_others_ended(seconds: float = _SILENT + 2) -> str | None:
    """Which rank ended first and what it said, or None; it takes a moment to tell."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            missing, words = _watch.missing(_SILENT), _watch.last_words()
        except RuntimeError:  # where ranks leave their signs is with the launcher, or with rank 0
            return "the launcher or rank 0 is gone; --resume goes on from the last checkpoint"
        if words:
            rank, said = next(iter(words.items()))
            return f"rank {rank} ended: {said}" if rank else _SAID
        if missing:
            return (
                f"rank {' and '.join(map(str, missing))} died or hangs (no sign of life for "
                f"{_SILENT:.0f} s); --resume goes on from the last checkpoint"
            )
        time.sleep(_BEAT)
    return None


def _beat() -> None:
    count, looked = 0, time.monotonic()
    while threading.main_thread().is_alive():
        count += 1
        _watch.write("sign", str(count))
        time.sleep(_BEAT)
        # A rank in a collective cannot look by itself, and a launcher that ends the survivors
        # sends the same signal as one that is asked to stop.
        told = _watch.since is not None and time.monotonic() - _watch.since > _BEAT
        if told or time.monotonic() - looked > _watch.timeout / 8:
            looked = time.monotonic()
            with suppress(RuntimeError):
                missing = _watch.missing(_SILENT if told else _watch.timeout)
                if missing:
                    names = " and ".join(map(str, missing))
                    _end(f"rank {names} died or hangs; --resume goes on", LOST_A_RANK)


def _guard_against_orphans(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(_BEAT)
    _watch.stop("the launcher is gone")
    if _watch.in_steps:
        time.sleep(_GRACE)
    os._exit(STOPPED)

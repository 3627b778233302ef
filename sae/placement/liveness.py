"""Signs of life: which ranks are there, what those that ended said, and who goes first."""

import os
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from . import signals
from .exit_codes import LOST_A_RANK, end_process

_BEAT = 0.5  # seconds between two signs of life
_LOOK = 0.2  # seconds between two looks whose turn it is
_SILENT = 4.0  # seconds without one after which a rank is missing, once something is wrong
_BYE = b"bye"  # the last sign of a rank that ended in order


# The store where ranks leave their signs is with the launcher, or with rank 0.
_GONE = "the launcher or rank 0 is gone; --resume goes on from the last checkpoint"

Lost = tuple[int | None, str]
"""The rank that ended first, if it is known, and why."""


def _missing(ranks: list[int]) -> str:
    return (
        f"rank {' and '.join(map(str, ranks))} died or hangs (no sign of life for {_SILENT:.0f} s "
        f"or more); --resume goes on from the last checkpoint"
    )


class _Liveness:
    """What one process knows of the other ranks."""

    def __init__(self) -> None:
        self.left = False
        self.turns = 0
        self.rank, self.world, self.timeout = 0, 1, float("inf")
        self.store: Store | None = None
        self.signs: dict[int, tuple[bytes, float]] = {}
        self.store_lost: float | None = None
        self.lock = threading.Lock()

    def missing(self, silence: float) -> list[int]:
        """Other ranks that have given no sign of life for that many seconds."""
        others = [rank for rank in range(self.world) if rank != self.rank]
        now = time.monotonic()
        with self.lock:
            for rank, sign in zip(others, self.read("sign", others), strict=True):
                if rank not in self.signs or self.signs[rank][0] != sign or sign == _BYE:
                    self.signs[rank] = (sign, now)
        return [rank for rank in others if now - self.signs[rank][1] > silence]

    def reported(self) -> Lost | None:
        """The first rank that ended with an error of its own, and what it said."""
        others = [rank for rank in range(self.world) if rank != self.rank]
        for rank, text in zip(others, self.read("error", others), strict=True):
            if text != b"-":
                return rank, f"rank {rank} ended: {text.decode()}"
        return None

    def lost(self) -> Lost | None:
        """Which other rank ended or is missing, and why; raises RuntimeError without the store."""
        missing = self.missing(_SILENT)
        return self.reported() or ((None, _missing(missing)) if missing else None)

    def lost_for_good(self) -> Lost | None:
        """The same; that the store is gone counts once it is for a while."""
        now = time.monotonic()
        try:
            found, self.store_lost = self.lost(), None
            return found
        except RuntimeError:
            self.store_lost = self.store_lost or now
            return (None, _GONE) if now - self.store_lost > _SILENT else None

    def write(self, key: str, value: str) -> None:
        if self.store is not None and not (key == "sign" and self.left):
            with suppress(RuntimeError):  # the store lives in a process that may be gone
                self.store.set(f"{key}/{self.rank}", value)

    def read(self, key: str, ranks: list[int]) -> list[bytes]:
        assert self.store is not None
        return self.store.multi_get([f"{key}/{rank}" for rank in ranks])


_liveness = _Liveness()


def start(rank: int, world: int, timeout_minutes: float) -> None:
    """Show signs of life to the other ranks from now on, and look for theirs."""
    _liveness.timeout = timeout_minutes * 60
    if _liveness.store is not None:
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    wait = timedelta(seconds=60)
    store = dist.TCPStore(address, port, is_master=False, timeout=wait)  # pyright: ignore
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    _liveness.store = PrefixStore(f"watch/{attempt}", store)
    _liveness.rank, _liveness.world = rank, world
    for key in ("sign", "error", "turn"):
        _liveness.write(key, "-")
    # No daemon: one that is in a call of the store when the interpreter ends aborts the process.
    threading.Thread(target=_beat).start()


def ranks_watched() -> int:
    """How many ranks watch each other; 1 before `start`."""
    return _liveness.world


def leave() -> None:
    """End in order: the others must not miss this rank."""
    _liveness.write("sign", _BYE.decode())
    _liveness.left = True


def report_error(message: str) -> None:
    """Leave the reason why this rank ends for the others."""
    _liveness.write("error", message)


def next_turn() -> int:
    """The number of a round of turns; all ranks take part in all rounds."""
    _liveness.turns += 1
    return _liveness.turns


def end_turn(turn: int) -> None:
    """Tell the others that this rank has had its turn."""
    _liveness.write("turn", str(turn))


def has_had_turn(rank: int, turn: int) -> bool:
    """Whether a rank has had its turn."""
    (found,) = _liveness.read("turn", [rank])
    return found != b"-" and int(found) >= turn


def wait_for_turn(rank: int, turn: int) -> None:
    """Look, ever less often, whether a rank has had its turn; end if one ended with an error."""
    pause = 0.005
    while not has_had_turn(rank, turn):
        if found := _liveness.reported():
            end_after(found)
        time.sleep(pause)
        pause = min(2 * pause, _LOOK)


def why_others_ended(seconds: float = _SILENT + 2) -> Lost | None:
    """Which rank ended first, and why; None if none did. It takes a moment."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            found = _liveness.lost()
        except RuntimeError:
            return None, _GONE
        if found is not None:
            return found
        time.sleep(_BEAT)
    return None


def end_after(lost: Lost) -> NoReturn:
    """End since another rank did; what rank 0 had to say it said itself."""
    rank, reason = lost
    end_process(None if rank == 0 else reason, LOST_A_RANK, alone=False)


def _beat() -> None:
    count, looked = 0, time.monotonic()
    while threading.main_thread().is_alive():
        count += 1
        _liveness.write("sign", str(count))
        time.sleep(_BEAT)
        if _liveness.left:
            continue
        # A rank in a collective cannot look by itself, and a launcher that ends the survivors
        # sends the same signal as one that is asked to stop.
        if signals.told_for() > _BEAT:
            lost = _liveness.lost_for_good()
            if lost is not None:
                end_after(lost)
        elif time.monotonic() - looked > _liveness.timeout / 8:
            looked = time.monotonic()
            with suppress(RuntimeError):
                if missing := _liveness.missing(_liveness.timeout):
                    end_after((None, _missing(missing)))

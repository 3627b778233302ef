"""How a script of this project runs: whatever ends it becomes one line and an exit code."""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch.distributed as dist

from ..flag_checks import UsageError
from . import liveness, signals
from .exit_codes import FAILED, MISTAKE, STOPPED, Stopped, end_process
from .secrets import hide_tokens


@contextmanager
def run_as_script(on_mistake: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Run a script: signals, the launcher's death, and every error become a line and a code.

    `on_mistake` is called where the user's mistake ends it.
    """
    hide_tokens()
    signals.watch_for_signals()
    signals.watch_launcher()
    try:
        yield
        liveness.leave()
    except UsageError as error:
        on_mistake()
        _end_by_mistake(str(error))
    except Stopped as stopped:
        together = liveness.ranks_watched() > 1
        lost = None
        if together and not signals.training_has_begun():
            lost = liveness.why_others_ended()
        liveness.leave()
        if lost is not None:
            liveness.end_after(lost)
        # All ranks would say the same.
        _end(str(stopped) if int(os.environ.get("RANK", "0")) == 0 else None, STOPPED)
    except Exception as error:  # whatever it is, the other ranks must hear of it
        if liveness.ranks_watched() == 1 and isinstance(error, BrokenPipeError):
            # What is printed has no reader any more, as behind `| head`.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(FAILED)
        if liveness.ranks_watched() == 1:
            raise
        if _is_of_communication(error) and (lost := liveness.why_others_ended()) is not None:
            liveness.end_after(lost)
        sys.excepthook(type(error), error, error.__traceback__)
        said = " ".join(str(error).split())[:300]
        liveness.report_error(f"{type(error).__name__}: {said}")
        _end(None, FAILED)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _end(message: str | None, code: int) -> None:
    end_process(message, code, alone=liveness.ranks_watched() == 1)


def _end_by_mistake(message: str) -> None:
    """Rank 0 reports for all; another rank reports if rank 0 has not ended the run by then."""
    rank = int(os.environ.get("RANK", "0"))
    liveness.report_error(message)
    if rank:
        signals.ignore_handlers()
        time.sleep(10)
        message = f"rank {rank}: {message}"
    _end(message, MISTAKE)


def _is_of_communication(error: Exception) -> bool:
    text = str(error).lower()
    signs = ("gloo", "nccl", "connection", "timed out", "timeout", "broken pipe", "store")
    return isinstance(error, (RuntimeError, OSError)) and any(sign in text for sign in signs)

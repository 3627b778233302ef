"""Starts scripts as often as tests like, each as a fork of one process that has imported them.

Reads one JSON object a line. {"script", "argv", "env", "log", "hold"} forks a process that runs
the `main` of a module (a script, or a launcher of scripts) and answers its process id.
{"wait", "seconds"} answers the exit code of such a process, negative for a signal, or null if it
is still alive.

"hold" stops a run of `train_sae` in a chosen forward: see `hold`.
"""

import faulthandler
import json
import os
import sys
import time
import traceback
from importlib import import_module
from itertools import count
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import train_sae
from sae.lm.capture import Pairs, count_rows
from sae.placement import dealing, signals


def hold(number: int, for_good: bool, marker: str) -> None:
    """Let a run wait in the training forward of this number, from 1, until it is told to stop.

    It makes the file `marker.held` when it begins to wait, and `marker.told` when it is told. If
    it waits `for_good`, it does not go on even then. Number 0 is where it reads the data.
    """
    numbers = count(1)

    def wait_until_told() -> None:
        Path(f"{marker}.held").touch()
        while signals.stop_reason() is None:
            time.sleep(0.01)
        Path(f"{marker}.told").touch()
        while for_good:
            time.sleep(0.01)

    def counted(pairs: Pairs) -> dict[str, int]:
        if next(numbers) == number:
            wait_until_told()
        return count_rows(pairs)

    dealing.count_rows = counted
    if number == 0:
        train_sae.load_tokens = lambda *_: wait_until_told()


def run(job: dict[str, Any]) -> None:
    """Become one process of a run."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, log), (2, log)):
        os.dup2(source, target)
    faulthandler.enable()  # a test that waits in vain sends SIGABRT to see where
    os.environ.update(job["env"])
    sys.argv = [job["script"], *job["argv"]]
    code = 0
    try:
        if job["hold"] is not None:
            hold(*job["hold"], marker=job["log"])
        import_module(job["script"]).main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait(pid: int, seconds: float) -> int | None:
    """The exit code of a process, once it is there."""
    until = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            return None
        time.sleep(0.01)


def main() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            print(json.dumps(wait(job["wait"], job["seconds"])), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            run(job)
        print(json.dumps(pid), flush=True)


if __name__ == "__main__":
    main()

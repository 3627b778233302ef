"""Starts the real script as often as a test likes: a fork of one process that has imported it.

Reads one JSON object a line: {"argv", "env", "log"} forks a run and answers its process id;
{"wait", "seconds"} answers a run's exit code, negative for a signal, or null if it is still alive.
"""

import faulthandler
import json
import os
import sys
import time
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import train_sae


def run(job: dict) -> None:
    """Become one run."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target, source in ((0, nothing), (1, log), (2, log)):
        os.dup2(source, target)
    faulthandler.enable()  # a test that waits in vain sends SIGABRT to see where
    os.environ.update(job["env"])
    sys.argv = ["train_sae.py", *job["argv"]]
    code = 0
    try:
        train_sae.main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait(pid: int, seconds: float) -> int | None:
    """The exit code of a run, once it is there."""
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

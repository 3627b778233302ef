"""Runs of the real script, started as often as a test likes, on a tiny LM and token ids on disk."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_lm

from sae.runs.folder import checkpoints

ROOT = Path(__file__).parent.parent
PATIENCE = 240.0
"""Seconds after which a test that waits for something fails, however busy the machine is."""

ACCELERATE, TORCHRUN = "accelerate.commands.accelerate_cli", "torch.distributed.run"
"""Modules whose `main` is a launcher."""

SAVE_EVERY = 4
FLAGS = [
    *("--ctx_len", "16", "--batch_size", "4", "--max_examples", "4800", "--layers", "1", "2"),
    *("--num_latents", "2048", "--k", "4", "--eval_tokens", "256", "--save_every", str(SAVE_EVERY)),
    *("--optimizer", "adam", "--lr", "1e-3", "--lr_warmup", "5", "--log_with", "none"),
]


def wait_until(
    condition: Callable[[], bool], why: Callable[[], str] = lambda: "", seconds: float = PATIENCE
) -> None:
    """Wait until something is so; fail, and say `why`, if it takes too long."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"it takes too long: {why()}"
        time.sleep(0.005)


class ForkServer:
    """A process that has imported the script, and starts forks of itself that run it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/fork_server.py")],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )

    def start(
        self,
        script: str,
        argv: list[str],
        log: Path,
        world: int = 1,
        hold: tuple[int, bool] | None = None,
        env: dict[str, str] | None = None,
    ) -> list[int]:
        """Process ids of ranks that run the `main` of a module; rank R writes to LOG.R.

        A launcher is such a module too, with a world of 1.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        ids = []
        for rank in range(world):
            given = {**(env or {})}
            if world > 1:
                given |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
                given |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
                given |= {"MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
            job = {"script": script, "argv": argv, "env": given, "log": f"{log}.{rank}"}
            ids.append(self._ask({**job, "hold": hold}))
        return ids

    def wait(self, pid: int, seconds: float = PATIENCE) -> int | None:
        """The exit code of a process, negative for a signal; None if it lives longer."""
        return self._ask({"wait": pid, "seconds": seconds})

    def _ask(self, job: dict[str, Any]) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


@cache
def fork_server() -> ForkServer:
    """The one of this process of tests; it ends when its standard input does."""
    return ForkServer()


class Starter:
    """Starts runs on the LM and the token ids of a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.server = folder, fork_server()

    def start(
        self,
        name: str,
        *flags: str,
        world: int = 1,
        hold: int | None = None,
        for_good: bool = False,
    ) -> list[int]:
        """Process ids of the ranks.

        With `hold` a run waits in its training forward of this number, from 1, until it is told
        to stop; or `for_good`, so that only what does not wait for the forward ends it.
        """
        lm, data = str(self.folder / "lm"), str(self.folder / "ids.bin")
        held = None if hold is None else (hold, for_good)
        return self.start_on(lm, data, name, *FLAGS, *flags, world=world, hold=held)

    def start_on(
        self,
        lm: str,
        data: str,
        name: str,
        *flags: str,
        world: int = 1,
        hold: tuple[int, bool] | None = None,
    ) -> list[int]:
        """The same on another LM and other data, with no flags but these."""
        for marker in (*self.folder.glob(f"{name}.*.held"), *self.folder.glob(f"{name}.*.told")):
            marker.unlink()
        argv = [lm, data, *flags, "--save_dir", str(self.folder / "runs"), "--run_name", name]
        return self.server.start("train_sae", argv, self.folder / name, world, hold)

    def wait(self, pid: int, seconds: float = PATIENCE) -> int | None:
        """The exit code of a process, negative for a signal; None if it lives longer."""
        return self.server.wait(pid, seconds)

    def wait_until_held(self, name: str) -> None:
        """Wait until rank 0 of a run with `hold` waits in its forward."""
        wait_until(lambda: (self.folder / f"{name}.0.held").exists(), lambda: self.log(name))

    def wait_until_told(self, name: str) -> None:
        """Wait until rank 0 of a run with `hold` knows, in its forward, that it is to stop."""
        wait_until(lambda: (self.folder / f"{name}.0.told").exists(), lambda: self.log(name))

    def log(self, name: str, rank: int = 0) -> str:
        """What a rank of a run said, in all starts of that name."""
        file = self.folder / f"{name}.{rank}"
        return file.read_text() if file.exists() else ""

    def steps(self, name: str) -> list[int]:
        """Steps of the whole checkpoints of a run."""
        found = checkpoints(self.folder / "runs" / name)
        return [int(f.name.removeprefix("step_")) for f in found]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LM and token ids on disk."""
    made = tmp_path_factory.mktemp("starts")
    tiny_lm().save_pretrained(made / "lm")
    tokens = torch.randint(0, 64, (40_000 * 16,), generator=torch.Generator().manual_seed(0))
    tokens.numpy().astype("uint16").tofile(made / "ids.bin")
    return made


@pytest.fixture(scope="module")
def starter(folder: Path) -> Starter:
    """Runs on the LM and the token ids of `folder`."""
    return Starter(folder)

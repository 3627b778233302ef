"""Runs of the real script, started as often as a test likes, on a tiny LM and token ids on disk."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_lm

from sae.run_folder import checkpoints

ROOT = Path(__file__).parent.parent
SAVE_EVERY = 4
FLAGS = [
    *("--ctx_len", "16", "--batch_size", "4", "--max_examples", "4800", "--layers", "1", "2"),
    *("--num_latents", "2048", "--k", "4", "--eval_tokens", "256", "--save_every", str(SAVE_EVERY)),
    *("--optimizer", "adam", "--lr", "1e-3", "--log_with", "none"),
]


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it takes too long"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LM and token ids on disk."""
    made = tmp_path_factory.mktemp("faults")
    tiny_lm().save_pretrained(made / "lm")
    tokens = torch.randint(0, 64, (40_000 * 16,), generator=torch.Generator().manual_seed(0))
    tokens.numpy().astype("uint16").tofile(made / "ids.bin")
    return made


class Starter:
    """Starts runs of the script from a process that has imported it already."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/fork_server.py")],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def ask(self, job: dict[str, Any]) -> Any:
        assert self.server.stdin is not None and self.server.stdout is not None
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, name: str, *flags: str, world: int = 1) -> list[int]:
        """Process ids of the ranks."""
        lm, data = str(self.folder / "lm"), str(self.folder / "ids.bin")
        return self.start_on(lm, data, name, *FLAGS, *flags, world=world)

    def start_on(self, lm: str, data: str, name: str, *flags: str, world: int = 1) -> list[int]:
        """The same on another LM and other data, with no flags but these."""
        argv = [lm, data, *flags]
        argv += ["--save_dir", str(self.folder / "runs"), "--run_name", name]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        ids = []
        for rank in range(world):
            env = {"HF_HUB_OFFLINE": "1"}
            if world > 1:
                env |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
                env |= {"LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
                env |= {"MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
            log = str(self.folder / f"{name}.{rank}.log")
            ids.append(self.ask({"argv": argv, "env": env, "log": log}))
        return ids

    def wait(self, pid: int, seconds: float = 60.0) -> int | None:
        return self.ask({"wait": pid, "seconds": seconds})

    def log(self, name: str, rank: int = 0) -> str:
        file = self.folder / f"{name}.{rank}.log"
        return file.read_text() if file.exists() else ""

    def steps(self, name: str) -> list[int]:
        found = checkpoints(self.folder / "runs" / name)
        return [int(f.name.removeprefix("step_")) for f in found]


@pytest.fixture(scope="module")
def starter(folder: Path) -> Iterator[Starter]:
    started = Starter(folder)
    yield started
    started.server.kill()

"""What ends a run of several processes ends all of them, says why, and loses no whole save."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import tiny_lm
from safetensors.torch import load_file

from sae.checkpoint import newest_checkpoint
from sae.ranks import Ranks
from sae.run_folder import checkpoints
from train_sae import TrainConfig, train

ROOT = Path(__file__).parent.parent
Figure = Callable[[str, str], None]
FLAGS = [
    "--layers",
    "0",
    "1",
    "--ctx_len",
    "16",
    "--num_latents",
    "64",
    "--k",
    "4",
    "--eval_tokens",
    "256",
    "--save_every",
    "20",
    "--optimizer",
    "adam",
    "--lr",
    "1e-3",
    "--lr_warmup_steps",
    "5",
    "--log_every",
    "50",
]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [
    *("-m", "accelerate.commands.accelerate_cli", "launch"),
    *("--config_file", "accelerate_configs/cpu_2proc.yaml", "--main_process_port", "0"),
]


# The script, while it reads the text for a long time.
SLEEPER = """
import sys, time, train_sae
def load_tokens(*args, **kwargs):
    print("asleep", flush=True)
    time.sleep(60)
train_sae.load_tokens = load_tokens
sys.argv = sys.argv[1:]
train_sae.main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("interruptions")
    tiny_lm().save_pretrained(made / "lm")
    tokens = torch.randint(0, 64, (400_000 * 16,), generator=torch.Generator().manual_seed(0))
    tokens.numpy().astype("uint16").tofile(made / "ids.bin")
    return made


class Launched:
    """A run of two processes that has begun to train."""

    def __init__(self, folder: Path, name: str, *flags: str, launcher: list[str]) -> None:
        self.run, self.log = folder / "runs" / name, folder / f"{name}.log"
        command = [sys.executable, *launcher, "train_sae.py", str(folder / "lm")]
        command += [str(folder / "ids.bin"), *FLAGS, "--save_dir", str(folder / "runs")]
        command += ["--run_name", name, *flags]
        with open(self.log, "w") as log:
            self.launcher = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
            )

    def wait_for_a_save(self) -> list[int]:
        """Process ids of the two ranks, once a checkpoint is there."""
        until = time.monotonic() + 90
        while not checkpoints(self.run):
            assert self.launcher.poll() is None and time.monotonic() < until, self.log.read_text()
            time.sleep(0.05)
        found = subprocess.run(
            ["pgrep", "-P", str(self.launcher.pid), "-f", "train_sae"],
            **{"capture_output": True, "text": True, "check": False},
        ).stdout
        return sorted(map(int, found.split()))

    def wait_for_word(self, words: str, seconds: float) -> str:
        until = time.monotonic() + seconds
        while not (found := re.search(words, self.log.read_text())):
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.1)
        return found[0]

    def whole_steps(self) -> list[int]:
        found = checkpoints(self.run)
        newest, _ = newest_checkpoint(self.run, Ranks(torch.device("cpu"), 1.0))
        assert newest == found[-1], "the newest checkpoint is damaged"
        return [int(f.name.removeprefix("step_")) for f in found]


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


@contextmanager
def ended(*runs: Launched) -> Iterator[None]:
    """Inside, faults may do what they like; afterwards no process is left."""
    try:
        yield
    finally:
        for run in runs:
            subprocess.run(["pkill", "-KILL", "-f", f"run_name {run.run.name}"], check=False)
            run.launcher.kill()
            run.launcher.wait()


def test_a_lost_rank_or_launcher_ends_the_run(folder: Path, figure: Figure) -> None:
    """A killed rank and a hung one are named within seconds; orphans save and end."""
    killed = Launched(folder, "killed", launcher=ACCELERATE)
    hung = Launched(folder, "hung", "--timeout", "0.1", "--distribute_modules", launcher=TORCHRUN)
    orphaned = Launched(folder, "orphaned", launcher=ACCELERATE)
    with ended(killed, hung, orphaned):
        ranks = {run: run.wait_for_a_save() for run in (killed, hung, orphaned)}
        os.kill(ranks[killed][1], signal.SIGKILL)
        os.kill(ranks[hung][1], signal.SIGSTOP)
        orphaned.launcher.kill()
        began = time.monotonic()
        while any(map(alive, ranks[orphaned])):
            assert time.monotonic() < began + 5, "orphans keep training"
            time.sleep(0.1)
        orphaned.wait_for_word("the launcher is gone: saved after step", 1)
        killed.wait_for_word("error: rank 1 died or hangs", 15)
        assert killed.launcher.wait(timeout=15) == 1
        hung.wait_for_word("error: rank 1 died or hangs", 30)
        assert not alive(ranks[killed][0]) and not alive(ranks[hung][0])
        assert all(step % 20 == 0 for step in killed.whole_steps() + hung.whole_steps())
        assert orphaned.whole_steps()
        seconds = time.monotonic() - began
        figure("a rank killed, one hung, a launcher killed", f"all ended within {seconds:.0f} s")


def test_preemption_saves_one_agreed_checkpoint(folder: Path, figure: Figure) -> None:
    """SIGTERM: all ranks save the same step and end with 75; resumed, the run is as if whole."""
    flags = ["--distribute_modules", "--batch_size", "4", "--max_examples", "8000"]
    first = Launched(folder, "preempted", *flags, launcher=ACCELERATE)
    with ended(first):
        first.wait_for_a_save()
        first.launcher.terminate()
        assert first.launcher.wait(timeout=20) == 1
    said = first.wait_for_word(r"SIGTERM: saved after step \d+", 1)
    assert first.log.read_text().count("saved after step") == 1
    steps = first.whole_steps()
    assert steps[-1] == int(said.split()[-1]) < 1000
    second = Launched(folder, "preempted", *flags, "--resume", launcher=TORCHRUN)
    with ended(second):
        assert second.launcher.wait(timeout=120) == 0, second.log.read_text()
    straight = train(
        TrainConfig(
            **{"model": str(folder / "lm"), "dataset": str(folder / "ids.bin")},
            **{"save_dir": str(folder / "runs"), "run_name": "straight", "max_examples": 8000},
            **{"batch_size": 8, "layers": (0, 1), "ctx_len": 16, "num_latents": 64, "k": 4},
            **{"eval_tokens": 256, "optimizer": "adam", "lr": 1e-3, "lr_warmup_steps": 5},
            log_with="none",
        )
    )
    resumed = json.loads((second.run / "summary.json").read_text())
    assert resumed["tokens"] == straight["tokens"] and resumed["step"] == straight["step"] == 1000
    for name, figures in straight["hookpoints"].items():
        ours = load_file(Path(resumed["hookpoints"][name]["path"]) / "sae.safetensors")
        expected = load_file(Path(figures["path"]) / "sae.safetensors")
        for key, tensor in expected.items():
            torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=1e-4)
    figure("SIGTERM to a launcher of two ranks", f"one checkpoint, of step {steps[-1]}; resumed")


def test_one_process_ends_with_75(folder: Path) -> None:
    """SIGTERM alone: before the first step there is nothing to save, later it is saved."""
    late = Launched(folder, "late", launcher=[])
    with ended(late):
        late.wait_for_a_save()
        late.launcher.send_signal(signal.SIGUSR1)
        assert late.launcher.wait(timeout=20) == 75
        late.wait_for_word("SIGUSR1: saved after step", 1)
    assert late.whole_steps()[-1] % 20 or len(late.whole_steps()) > 1
    slow = Launched(folder, "slow", launcher=["-c", SLEEPER])
    with ended(slow):
        slow.wait_for_word("asleep", 60)
        slow.launcher.terminate()
        assert slow.launcher.wait(timeout=20) == 75
        slow.wait_for_word("SIGTERM before the first step; nothing to save", 1)


@pytest.mark.parametrize("flags", [["--cpu", "--num_processes", "2"], ["multi_cpu"]])
def test_a_process_that_believes_to_be_alone_is_refused(
    folder: Path, tmp_path: Path, flags: list[str]
) -> None:
    """Launches of several that start one are found out before anything is written."""
    if flags == ["multi_cpu"]:
        config = tmp_path / "multi_cpu.yaml"
        config.write_text(
            "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_CPU\nuse_cpu: true\n"
            "num_processes: 2\n"
        )
        flags = ["--config_file", str(config)]
    command = [sys.executable, *ACCELERATE[:3], *flags, "train_sae.py", str(folder / "lm")]
    command += [str(folder / "ids.bin"), *FLAGS, "--save_dir", str(tmp_path / "runs")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "several processes were asked for and this one sees 1" in done.stderr
    assert "cpu_2proc.yaml" in done.stderr and not (tmp_path / "runs").exists()
    assert done.returncode != 0 and 'train_sae.py", line' not in done.stderr

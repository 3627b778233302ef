"""What ends a run of several processes ends all of them, says why, and loses no whole save."""

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from starts import ACCELERATE, ROOT, TORCHRUN, Starter, folder, starter, wait_until
from torch.distributed import HashStore

from sae.placement import liveness
from sae.placement.ranks import Ranks
from sae.runs.checkpoint import newest_checkpoint
from sae.runs.folder import checkpoints

__all__ = ["folder", "starter"]  # fixtures
Figure = Callable[[str, str], None]
SAVE_EVERY, HELD = 20, 25
FLAGS = (
    "--layers 0 1 --ctx_len 16 --num_latents 64 --k 4 --eval_tokens 256 --optimizer adam "
    f"--lr 1e-3 --lr_warmup 5 --log_with none --save_every {SAVE_EVERY}"
).split()
LAUNCHERS = {
    ACCELERATE: [
        *("launch", "--config_file", "accelerate_configs/cpu_2proc.yaml"),
        *("--main_process_port", "0"),
    ],
    TORCHRUN: ["--standalone", "--nproc_per_node", "2"],
}

# The script, whose rank 1 waits in a forward, and with it the other rank, until told to stop.
HELD_SCRIPT = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import fork_server, train_sae
if os.environ["RANK"] == "1":
    fork_server.hold({HELD}, for_good=False, marker=os.environ["HELD"])
train_sae.main()
"""


class Launched:
    """A run of two processes that a real launcher starts, held after its first save."""

    def __init__(self, starter: Starter, name: str, *flags: str, launcher: str) -> None:
        self.starter, self.name = starter, name
        self.run, self.held = starter.folder / "runs" / name, starter.folder / f"{name}.held"
        script = starter.folder / "held_script.py"
        script.write_text(HELD_SCRIPT)
        argv = [*LAUNCHERS[launcher], str(script), str(starter.folder / "lm")]
        argv += [str(starter.folder / "ids.bin"), *FLAGS, *flags]
        argv += ["--save_dir", str(starter.folder / "runs"), "--run_name", name]
        env = {"HELD": str(starter.folder / name)}
        (self.launcher,) = starter.server.start(launcher, argv, starter.folder / name, env=env)
        self.ranks: list[int] = []

    def wait_until_held(self) -> None:
        """Wait until rank 1 waits; then there is a checkpoint, and process ids are known."""
        wait_until(self.held.exists, self.log)
        found = {}
        for child in children(self.launcher):
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            words = dict(word.split(b"=", 1) for word in environment if b"=" in word)
            found[int(words[b"RANK"])] = child
        self.ranks = [found[0], found[1]]

    def log(self) -> str:
        """What the launcher and the ranks said."""
        return self.starter.log(self.name)

    def wait_for_words(self, words: str) -> str:
        """What was said, once it was, that matches."""
        wait_until(lambda: re.search(words, self.log()) is not None, self.log)
        found = re.search(words, self.log())
        assert found is not None
        return found[0]

    def exit_code(self) -> int | None:
        """That of the launcher, once it has ended."""
        return self.starter.wait(self.launcher)


def children(pid: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def whole_steps(run: Path) -> list[int]:
    """Steps of the checkpoints of a run, the newest of which must be whole."""
    found = checkpoints(run)
    newest, _ = newest_checkpoint(run, Ranks(torch.device("cpu"), 1.0))
    assert newest == found[-1], "the newest checkpoint is damaged"
    return [int(f.name.removeprefix("step_")) for f in found]


@contextmanager
def no_process_left(*processes: int | Launched) -> Iterator[None]:
    """Inside, faults may do what they like; afterwards no process of these runs is left."""
    try:
        yield
    finally:
        for run in processes:
            ids = [run] if isinstance(run, int) else [run.launcher, *run.ranks]
            for pid in ids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def test_a_lost_rank_or_launcher_ends_the_run(starter: Starter, figure: Figure) -> None:
    """A rank that is killed, or hangs, is named by the other one; without launcher ranks save."""
    flags = [*FLAGS, "--timeout", "0.2", "--distribute_modules", "--batch_size", "1"]
    lm, data = str(starter.folder / "lm"), str(starter.folder / "ids.bin")
    hung = starter.start_on(lm, data, "hung", *flags, world=2)
    killed = Launched(starter, "killed", launcher=ACCELERATE)
    orphaned = Launched(starter, "orphaned", launcher=TORCHRUN)
    with no_process_left(*hung, killed, orphaned):
        wait_until(lambda: bool(starter.steps("hung")), lambda: starter.log("hung"))
        os.kill(hung[1], signal.SIGSTOP)

        killed.wait_until_held()
        os.kill(killed.ranks[1], signal.SIGKILL)
        orphaned.wait_until_held()
        os.kill(orphaned.launcher, signal.SIGKILL)
        began = time.monotonic()

        wait_until(lambda: not any(map(alive, orphaned.ranks)), orphaned.log)
        assert f"the launcher is gone: saved after step {HELD}" in orphaned.log()
        assert whole_steps(orphaned.run) == [SAVE_EVERY, HELD]
        assert killed.exit_code() == 1
        killed.wait_for_words("error: rank 1 died or hangs")
        assert not alive(killed.ranks[0]) and whole_steps(killed.run) == [SAVE_EVERY]
        assert starter.wait(hung[0]) == 3
        assert "error: rank 1 died or hangs" in starter.log("hung")
        assert all(step % SAVE_EVERY == 0 for step in whole_steps(starter.folder / "runs/hung"))
        seconds = time.monotonic() - began
    figure("a rank killed, one hung, a launcher killed", f"all ended within {seconds:.0f} s")


def test_a_rank_inside_a_collective_hears_that_it_is_to_end(starter: Starter) -> None:
    """Where the other rank hangs, a signal that no handler sees ends the run with the reason."""
    flags = [*FLAGS, "--distribute_modules", "--batch_size", "1"]  # of ten minutes' patience
    lm, data = str(starter.folder / "lm"), str(starter.folder / "ids.bin")
    ranks = starter.start_on(lm, data, "deaf", *flags, world=2)
    with no_process_left(*ranks):
        wait_until(lambda: bool(starter.steps("deaf")), lambda: starter.log("deaf"))
        os.kill(ranks[1], signal.SIGSTOP)
        time.sleep(1)  # rank 0 comes to the next collective
        os.kill(ranks[0], signal.SIGTERM)
        assert starter.wait(ranks[0], 60) == 3, starter.log("deaf")
    assert "error: rank 1 died or hangs" in starter.log("deaf")


def test_the_reason_is_what_the_rank_said_or_that_its_store_is_gone() -> None:
    """An error that a rank left is the reason; without a store, that it stays away is."""
    found = liveness._Liveness()
    found.rank, found.world, found.store = 0, 2, HashStore()
    for key in ("sign", "error"):
        found.store.set(f"{key}/1", "-")
    assert found.lost_for_good() is None
    found.store.set("error/1", "OutOfMemoryError: 80 GiB")
    assert found.lost_for_good() == (1, "rank 1 ended: OutOfMemoryError: 80 GiB")

    class NoStore(HashStore):
        def multi_get(self, keys: list[str]) -> list[bytes]:
            raise RuntimeError("Broken pipe")

    found.store = NoStore()
    assert found.lost_for_good() is None and found.store_lost is not None
    found.store_lost -= 5
    lost = found.lost_for_good()
    assert lost is not None and "rank 0 is gone" in lost[1]


def test_preemption_saves_one_agreed_checkpoint(starter: Starter, figure: Figure) -> None:
    """SIGTERM: all ranks save the same step and end; resumed, the run is as if never stopped."""
    flags = ["--distribute_modules", "--batch_size", "4", "--max_examples", "480"]
    first = Launched(starter, "preempted", *flags, launcher=ACCELERATE)
    with no_process_left(first):
        first.wait_until_held()
        os.kill(first.launcher, signal.SIGTERM)
        assert first.exit_code() == 1
    assert first.log().count("saved after step") == 1
    assert f"SIGTERM: saved after step {HELD}" in first.log()
    assert whole_steps(first.run) == [SAVE_EVERY, HELD]
    lm, data = str(starter.folder / "lm"), str(starter.folder / "ids.bin")
    second = starter.start_on(lm, data, "preempted", *FLAGS, *flags, "--resume", world=2)
    (pid,) = starter.start_on(
        *(lm, data, "straight", *FLAGS), *("--batch_size", "8", "--max_examples", "480")
    )
    assert [starter.wait(rank) for rank in (*second, pid)] == [0, 0, 0], first.log()
    resumed, straight = (
        json.loads((starter.folder / "runs" / name / "summary.json").read_text())
        for name in ("preempted", "straight")
    )
    assert resumed["tokens"] == straight["tokens"] and resumed["step"] == straight["step"] == 60
    for name, figures in straight["hookpoints"].items():
        ours = load_file(Path(resumed["hookpoints"][name]["path"]) / "sae.safetensors")
        expected = load_file(Path(figures["path"]) / "sae.safetensors")
        for key, tensor in expected.items():
            torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=1e-4)
    figure("SIGTERM to a launcher of two ranks", f"one checkpoint, of step {HELD}; resumed")


def test_one_process_that_is_told_to_stop_saves_and_ends_with_75(starter: Starter) -> None:
    """A signal alone: before the first step there is nothing to save, later it is saved."""
    (late,) = starter.start("late", hold=6)
    (early,) = starter.start("early", hold=0)
    with no_process_left(late, early):
        starter.wait_until_held("late")
        os.kill(late, signal.SIGUSR1)
        assert starter.wait(late) == 75
        assert "SIGUSR1: saved after step 6" in starter.log("late")
        assert whole_steps(starter.folder / "runs/late") == [4, 6]
        starter.wait_until_held("early")
        os.kill(early, signal.SIGTERM)
        assert starter.wait(early) == 75
        assert "SIGTERM before the first step; nothing to save" in starter.log("early")
        assert starter.steps("early") == []


MULTI_CPU = """compute_environment: LOCAL_MACHINE
distributed_type: MULTI_CPU
use_cpu: true
num_processes: 2
"""


@pytest.mark.parametrize("launch_file", [None, MULTI_CPU], ids=["flags", "multi_cpu"])
def test_a_process_that_believes_to_be_alone_is_refused(
    starter: Starter, tmp_path: Path, launch_file: str | None
) -> None:
    """Launches of several that start one are found out before anything is written."""
    flags = ["--cpu", "--num_processes", "2"]
    if launch_file is not None:
        (tmp_path / "launch.yaml").write_text(launch_file)
        flags = ["--config_file", str(tmp_path / "launch.yaml")]
    argv = ["launch", *flags, "train_sae.py", str(starter.folder / "lm")]
    argv += [str(starter.folder / "ids.bin"), *FLAGS, "--save_dir", str(tmp_path / "runs")]
    (pid,) = starter.server.start(ACCELERATE, argv, tmp_path / "log")
    assert starter.wait(pid) not in (0, None)
    said = (tmp_path / "log.0").read_text()
    assert "several processes were asked for and this one sees 1" in said
    assert "cpu_2proc.yaml" in said and not (tmp_path / "runs").exists()
    assert 'train_sae.py", line' not in said

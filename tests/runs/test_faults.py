"""What machines and people do to a run, done to it: killed, cut off, filled up, told to stop.

`--faults` runs the long versions, and ends with a table of what was tried and what came of it.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from starts import FLAGS, PATIENCE, SAVE_EVERY, Starter, folder, starter, wait_until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from training_runs import Settings, assert_identical, run, weights
from transformers import PreTrainedModel

from sae import UsageError
from sae.placement.ranks import Ranks
from sae.runs.checkpoint import FORMAT, newest_checkpoint
from sae.runs.folder import checkpoints

ROOT = Path(__file__).parents[2]
ALONE = Ranks(torch.device("cpu"), 1.0)
Figure = Callable[[str, str], None]
__all__ = ["folder", "starter"]  # fixtures
SHORT, LONG = 400, 1200
"""Steps of the runs that are interrupted a few times, and many times."""


def of_steps(steps: int, batch_size: int = 4) -> list[str]:
    """Flags of a run of so many steps of four sequences."""
    return ["--batch_size", str(batch_size), "--max_examples", str(4 * steps)]


def begun(run: Path) -> int:
    """The last step whose save had begun."""
    names = [f.name.removesuffix(".tmp") for f in run.glob("step_*")]
    return max((int(name.removeprefix("step_")) for name in names), default=0)


def kill_at_random(
    starter: Starter,
    name: str,
    kills: int,
    world: int,
    seed: int,
    figure: Figure,
    flags: list[str],
    hold: int | None = None,
) -> None:
    """Start, kill, and start again; every start finds a whole checkpoint that is not too old.

    With `hold` a start does not get further than this many forwards before it is killed.
    """
    run, chance = starter.folder / "runs" / name, random.Random(seed)
    done = in_a_save = 0
    while done < kills:
        before = begun(run)
        ranks = starter.start(name, *flags, "--resume", world=world, hold=hold, for_good=True)
        until = time.monotonic() + PATIENCE
        while begun(run) <= before and time.monotonic() < until:  # it does not train yet
            if (code := starter.wait(ranks[0], 0)) is not None:
                assert code == 0, starter.log(name)
                return figure(name, f"ended by itself after {done} kills")
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.3 if world == 1 else 0.8))
        victims = chance.choice([ranks, ranks, ranks, ranks[:1], ranks[-1:]])
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        codes = {pid: starter.wait(pid) for pid in ranks}
        for pid in (pid for pid, code in codes.items() if code is None):
            os.kill(pid, signal.SIGABRT)
            starter.wait(pid)
            pytest.fail(f"a survivor does not end: {starter.log(name, ranks.index(pid))}")
        for pid in set(ranks) - set(victims):
            assert codes[pid] in (0, 3), (codes, starter.log(name))
        done += 1
        in_a_save += any(run.glob("step_*.tmp"))
        whole = starter.steps(name)
        assert begun(run) - SAVE_EVERY <= max(whole, default=0), (begun(run), whole)
        if whole:
            newest, _ = newest_checkpoint(run, ALONE)
            assert newest.name == f"step_{whole[-1]}", "the newest checkpoint is damaged"
    last = starter.start(name, *flags, "--resume", world=world)
    assert [starter.wait(pid) for pid in last] == [0] * world, starter.log(name)
    figure(
        f"SIGKILL at a random moment, {world} {'process' if world == 1 else 'ranks'}",
        f"{done} of {kills} resumed, {in_a_save} were cut off inside a save",
    )


def final_weights(starter: Starter, name: str, steps: int) -> dict[str, Tensor]:
    newest = checkpoints(starter.folder / "runs" / name)[-1]
    assert newest.name == f"step_{steps}"
    found = {}
    for file in newest.glob("*/*.safetensors"):
        found |= {f"{file.parent.name}/{file.name}/{k}": t for k, t in load_file(file).items()}
    return found


@pytest.fixture(scope="module")
def uninterrupted(starter: Starter) -> Callable[[int], dict[str, Tensor]]:
    """All tensors at the end of a run of so many steps that nothing interrupts."""

    @cache
    def weights_after(steps: int) -> dict[str, Tensor]:
        (pid,) = starter.start(f"straight-{steps}", *of_steps(steps))
        assert starter.wait(pid) == 0, starter.log(f"straight-{steps}")
        return final_weights(starter, f"straight-{steps}", steps)

    return weights_after


@pytest.mark.parametrize(
    ("kills", "steps"), [(4, SHORT), pytest.param(50, LONG, marks=pytest.mark.faults)]
)
def test_a_run_killed_at_any_moment_ends_in_the_same_bits(
    starter: Starter,
    uninterrupted: Callable[[int], dict[str, Tensor]],
    kills: int,
    steps: int,
    figure: Figure,
) -> None:
    """SIGKILLs lose at most one save interval, and the run ends in the same bits."""
    name, hold = f"killed-{kills}", 3 * SHORT // 4 // kills if steps == SHORT else None
    kill_at_random(starter, name, kills, 1, seed=1, figure=figure, flags=of_steps(steps), hold=hold)
    assert_identical(final_weights(starter, name, steps), uninterrupted(steps))


@pytest.mark.faults
def test_two_ranks_killed_at_any_moment_end_in_the_same_weights(
    starter: Starter, uninterrupted: Callable[[int], dict[str, Tensor]], figure: Figure
) -> None:
    """One rank or both, fifty times: what is left ends, and the run goes on to the same weights."""
    flags = of_steps(LONG, batch_size=2)
    kill_at_random(starter, "two-ranks", 50, world=2, seed=2, figure=figure, flags=flags)
    for name, tensor in final_weights(starter, "two-ranks", LONG).items():
        if "sae.safetensors" in name:
            torch.testing.assert_close(tensor, uninterrupted(LONG)[name], rtol=1e-3, atol=1e-4)


def test_damage_at_any_byte_is_found(
    lm: PreTrainedModel,
    tokens: Tensor,
    settings: Settings,
    figure: Figure,
    capsys: pytest.CaptureFixture,
) -> None:
    """200 truncations and flipped bits: the file is named and the checkpoint before is used."""
    run(lm, tokens, settings, run_name="r", save_every=10, layers=(1,), num_latents=32)
    folder, chance, found = Path(settings["save_dir"]) / "r", random.Random(0), 0
    files = sorted(f for f in (folder / "step_20").rglob("*") if f.is_file())
    for case in range(200):
        file = files[case % len(files)]
        whole = file.read_bytes()
        damaged = bytearray(whole[: chance.randrange(len(whole))] if case % 3 == 0 else whole)
        for _ in range(chance.randint(1, 3) if case % 3 else 0):
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        if bytes(damaged) == whole:
            damaged.append(0)
        file.write_bytes(bytes(damaged))
        newest, _ = newest_checkpoint(folder, ALONE)
        said = capsys.readouterr().out
        assert newest.name == "step_10", f"{file.name}, case {case}"
        assert (str(file) in said or file.name == "manifest.json") and "step_10" in said, said
        file.write_bytes(whole)
        found += 1
    assert newest_checkpoint(folder, ALONE)[0].name == "step_20"
    shutil.copy(files[0], folder / "step_20/layers.1/weights.pt")
    assert newest_checkpoint(folder, ALONE)[0].name == "step_10"
    assert "weights.pt was not written by the run" in capsys.readouterr().out
    figure("truncation or flipped bits, any file", f"{found} of 200 found, the file named")


def test_a_full_disk_keeps_the_last_checkpoint(starter: Starter, figure: Figure) -> None:
    """On a file system of 12 MB a save ends in one line and code 2; what was saved resumes."""
    small = starter.folder / "runs" / "small"
    small.mkdir(parents=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(small)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        (pid,) = starter.start("small", "--max_examples", "64", "--num_latents", "4096")
        code = starter.wait(pid)
        assert code == 2
        assert re.search(r"error: .*cannot be saved \(.*make room", starter.log("small"))
        assert starter.steps("small") == [SAVE_EVERY]
        assert newest_checkpoint(small, ALONE)[0].name == f"step_{SAVE_EVERY}"
        subprocess.run(["mount", "-o", "remount,size=60m", str(small)], check=True)
        flags = ["--max_examples", "64", "--num_latents", "4096", "--keep_last", "1", "--resume"]
        (pid,) = starter.start("small", *flags)
        assert starter.wait(pid) == 0, starter.log("small")
        assert starter.steps("small") == [16]
        figure(
            "disk full during a save",
            f"exit code {code}, the checkpoint before is whole; resumed with more room",
        )
    finally:
        subprocess.run(["umount", str(small)], check=False)


def test_ctrl_c_saves_and_twice_ends_at_once(starter: Starter, figure: Figure) -> None:
    """ctrl-C ends a run with a save after its step; a second one does not wait for the step."""
    (pid,) = starter.start("c", hold=6)
    starter.wait_until_held("c")
    os.kill(pid, signal.SIGINT)
    assert starter.wait(pid) == 75
    assert starter.steps("c") == [4, 6]
    assert "ctrl-C: saved after step 6; the same command with --resume" in starter.log("c")
    (pid,) = starter.start("cc", hold=6, for_good=True)
    starter.wait_until_held("cc")
    os.kill(pid, signal.SIGINT)
    starter.wait_until_told("cc")
    os.kill(pid, signal.SIGINT)
    assert starter.wait(pid) == 130 and starter.steps("cc") == [4]
    assert "ctrl-C again: ends without saving" in starter.log("cc")
    figure("ctrl-C", "saved after the step, code 75; a second one ends at once, code 130")


def test_a_folder_belongs_to_one_run(starter: Starter, figure: Figure) -> None:
    """A second run is refused by the first one's host and process; a dead one's lock is void."""
    (first,) = starter.start("mine", hold=6, for_good=True)
    starter.wait_until_held("mine")
    (second,) = starter.start("mine", "--resume")
    assert starter.wait(second) == 2
    said = starter.log("mine")
    host = os.uname().nodename
    assert f"error: --run_name mine: process {first} on {host} is writing to" in said
    os.kill(first, signal.SIGKILL)
    starter.wait(first)
    (third,) = starter.start("mine", "--resume", hold=6)
    starter.wait_until_held("mine")
    assert "its lock is void" in starter.log("mine")
    os.kill(third, signal.SIGTERM)
    assert starter.wait(third) == 75
    figure("two runs into one folder", "the second is refused by host and process; stale is void")


@pytest.mark.parametrize(
    ("signals", "steps"), [(2, SHORT), pytest.param(8, LONG, marks=pytest.mark.faults)]
)
def test_a_loop_of_restarts_finishes(
    starter: Starter,
    uninterrupted: Callable[[int], dict[str, Tensor]],
    signals: int,
    steps: int,
    figure: Figure,
) -> None:
    """`until train --resume; do :; done`, told to stop again and again, ends in the same bits."""
    name, chance, codes = f"loop-{signals}", random.Random(3), []
    while True:
        stops = len(codes) < signals
        # It cannot end before it is told to stop.
        hold = 3 * steps // 4 // signals if stops else None
        (pid,) = starter.start(name, *of_steps(steps), "--resume", hold=hold)
        if stops:
            before = begun(starter.folder / "runs" / name)
            wait_until(
                lambda before=before: begun(starter.folder / "runs" / name) > before,
                lambda: starter.log(name),
            )
            time.sleep(chance.uniform(0, 0.1))
            os.kill(pid, chance.choice([signal.SIGTERM, signal.SIGUSR1]))
        codes.append(starter.wait(pid))
        if codes[-1] == 0:
            break
        assert codes[-1] == 75, starter.log(name)
    assert codes == [75] * signals + [0]
    assert_identical(final_weights(starter, name, steps), uninterrupted(steps))
    figure("SIGTERM and SIGUSR1 in a loop of restarts", f"{signals} stops of code 75, then 0")


def test_the_token_is_nowhere(starter: Starter, figure: Figure) -> None:
    """A Hub token shows up in no file, no line and no process list."""
    token, started = "hf_QbZ3nothing4but5a6test", {}
    given = {"joined": [f"--hf-token={token}"], "apart": ["--hf_token", token]}
    for name, words in given.items():
        argv = [str(starter.folder / "lm"), str(starter.folder / "ids.bin"), *FLAGS]
        argv += ["--save_dir", str(starter.folder / "runs"), "--run_name", name]
        command = [sys.executable, "train_sae.py", *argv, *words, "--log_with", "tensorboard"]
        with open(starter.folder / f"{name}.0", "w") as log:
            env = {**os.environ, "HF_TOKEN": token, "OMP_NUM_THREADS": "1"}
            started[name] = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=env)
    for name, process in started.items():
        wait_until(lambda name=name: bool(starter.steps(name)), lambda name=name: starter.log(name))
        title = Path(f"/proc/{process.pid}/cmdline").read_bytes()
        assert token.encode() not in title and b"hf" in title and b"train_sae.py" in title
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 75, starter.log(name)
        assert token not in starter.log(name)
        for file in (starter.folder / "runs" / name).rglob("*"):
            assert not file.is_file() or token.encode() not in file.read_bytes(), file
    figure("a Hub token", "in no file of the run, no line, no process list")


@pytest.mark.parametrize("version", range(1, FORMAT + 1))
def test_checkpoints_of_older_versions_resume(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings, version: int, figure: Figure
) -> None:
    """A checkpoint of every format there was resumes to what the uninterrupted run ends with."""
    flags = {"layers": (1,), "num_latents": 32, "optimizer": "adam", "lr": 1e-2, "save_every": 10}
    flags |= {"lr_warmup": 5, "lr_decay": 1.0, "steps_per_batch": 1, "encoder_lr": 1.0}
    flags |= {"rms_units": False, "adam_beta1": 0.9, "adam_beta2": 0.999, "auxk_alpha": 0.0}
    flags |= {"wake_alpha": 0.0, "runner_ups": 0.0, "dead_feature_threshold": 10_000_000}
    settings = {k: v for k, v in settings.items() if k != "expansion_factor"}
    straight = weights(run(lm, tokens, settings, run_name="straight", **flags))
    old = Path(settings["save_dir"]) / "old"
    shutil.copytree(ROOT / f"tests/fixtures/format_{version}", old)
    resumed = run(lm, tokens, settings, run_name="old", resume=True, **flags)
    for name, tensor in weights(resumed).items():
        torch.testing.assert_close(tensor, straight[name], rtol=1e-4, atol=1e-5)
    figure(f"a checkpoint of format {version}", "resumed to the weights of an uninterrupted run")
    manifest = old / "step_20/manifest.json"
    newer = {**json.loads(manifest.read_text()), "format": FORMAT + 1}
    shutil.rmtree(old / "step_10", ignore_errors=True)
    manifest.write_text(json.dumps(newer))
    with pytest.raises(UsageError, match=f"has format {FORMAT + 1}.*--finetune"):
        run(lm, tokens, settings, run_name="old", resume=True, **flags)


@pytest.mark.faults
def test_soak(tmp_path: Path, figure: Figure) -> None:
    """Half an hour of the demo run: memory flat to 2 %, open files flat, TensorBoard readable."""
    minutes = float(os.environ.get("SOAK_MINUTES", "30"))
    subprocess.run([sys.executable, str(ROOT / "demo/make_text.py"), str(tmp_path)], check=True)
    text = tmp_path / "train.jsonl"
    text.write_text(text.read_text() * max(1, round(minutes)))
    command = [
        *(sys.executable, "train_sae.py", str(ROOT / "demo/lm"), str(text), "--ctx_len", "256"),
        *("--hookpoints", "layers.1", "layers.3", "layers.4.mlp", "--batch_size", "16"),
        *("--expansion_factor", "16", "--k", "32", "--auxk_alpha", "0.03125", "--save_every", "50"),
        *("--dead_feature_threshold", "200000", "--eval_every", "200", "--eval_tokens", "16384"),
        *("--save_dir", str(tmp_path), "--run_name", "soak", "--keep_last", "2"),
    ]
    with open(tmp_path / "log", "w") as log:
        started = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    memory, files, events = [], [], 0
    wait_until(lambda: bool(checkpoints(tmp_path / "soak")), seconds=600)
    began = time.monotonic()
    while time.monotonic() < began + 60 * minutes and started.poll() is None:
        status = Path(f"/proc/{started.pid}/status").read_text()
        memory.append(int(status.split("RssAnon:")[1].split()[0]))
        files.append(len(os.listdir(f"/proc/{started.pid}/fd")))
        if len(memory) % 30 == 0:
            reader = EventAccumulator(str(tmp_path / "soak/tensorboard"))
            points = len(reader.Reload().Scalars("fvu/layers.1"))
            assert points >= events
            events = points
        time.sleep(2)
    started.terminate()
    assert started.wait(PATIENCE) in (0, 75), (tmp_path / "log").read_text()[-2000:]
    third = len(memory) // 3
    early, late = (sorted(part)[third // 2] for part in (memory[:third], memory[-third:]))
    step = checkpoints(tmp_path / "soak")[-1].name.removeprefix("step_")
    figure(
        "soak",
        f"{(time.monotonic() - began) / 60:.0f} minutes, {step} steps: memory "
        f"{early / 2**20:.3f} to {late / 2**20:.3f} GiB, files {min(files)} to {max(files)}",
    )
    assert late / early < 1.02 and events > 0
    early_files, late_files = (sorted(f)[third // 2] for f in (files[:third], files[-third:]))
    assert late_files <= early_files  # one more is open while a checkpoint is written

"""Law 5: a run that died and was resumed ends as one that did not, bit for bit."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from torch import Tensor
from training_runs import (
    LOSSES,
    Killed,
    Settings,
    assert_identical,
    die_in_forward,
    run,
    training_state,
    weights,
)
from transformers import PreTrainedModel

from sae import UsageError
from sae.flag_checks import from_flags
from sae.runs.folder import checkpoints
from sae.training.schedules import Schedule
from train_sae import TrainConfig, train

ROOT = Path(__file__).parents[2]


def test_a_run_of_before_warm_ups_were_checked_is_resumed(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A warm-up longer than the run is refused at the start, and not in the middle."""
    flags = {"optimizer": "adam", "lr_warmup": 20, "layers": (1,), "save_every": 10}
    with pytest.raises(UsageError, match="--lr_warmup 20: the run has 20 steps"):
        run(lm, tokens, settings, run_name="r", **flags)
    with monkeypatch.context() as patch:
        patch.setattr(Schedule, "check", lambda _: None)
        run(lm, tokens, settings, run_name="r", **flags)
    shutil.rmtree(Path(settings["save_dir"]) / "r/step_20")
    assert run(lm, tokens, settings, run_name="r", resume=True, **flags)["step"] == 20


@pytest.mark.parametrize("optimizer", ["signum", "adam", "muon", "soap"])
def test_a_resumed_run_ends_in_the_same_bits(
    lm: PreTrainedModel,
    tokens: Tensor,
    settings: Settings,
    optimizer: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """20 steps = killed in step 13, resumed from 10: weights, moments and counters bit for bit."""
    flags = {
        **LOSSES,
        "optimizer": optimizer,
        "save_every": 5,
        "k_decay_steps": 15,
        "grad_acc_steps": 2,
        "batch_size": 4,
        "save_best": True,
    }
    straight = run(lm, tokens, settings, run_name="straight", **flags)
    die_in_forward(monkeypatch, 25)  # the second forward of step 13
    with pytest.raises(Killed):
        run(lm, tokens, settings, run_name="broken", **flags)
    monkeypatch.undo()
    saved = Path(settings["save_dir"])
    assert [f.name for f in checkpoints(saved / "broken")] == ["step_5", "step_10"]
    resumed = run(lm, tokens, settings, run_name="broken", resume=True, **flags)
    assert resumed["step"] == 20 and resumed["tokens"] == straight["tokens"]
    assert_identical(weights(resumed), weights(straight))
    assert_identical(training_state(resumed), training_state(straight))
    for name, figures in resumed["hookpoints"].items():
        assert figures["fvu"] == straight["hookpoints"][name]["fvu"]
    best = list((saved / "straight" / "best").rglob("*.safetensors"))
    assert len(best) == 3
    for path in best:
        other = saved / "broken" / "best" / path.relative_to(saved / "straight" / "best")
        assert path.read_bytes() == other.read_bytes()


def test_an_end_to_end_run_resumes_from_its_files_alone(
    causal_lm: PreTrainedModel, tokens: Tensor, settings: Settings
) -> None:
    """A run on the LM's own loss, the LM loaded from disk, resumes to the same bits."""
    folder = Path(settings["save_dir"])
    causal_lm.save_pretrained(folder / "lm")
    flags = {"model": str(folder / "lm"), "loss_fn": "kl", "layers": (1,), "save_every": 10}

    def run_from_disk(name: str, resume: bool = False) -> dict[str, Tensor]:
        given = {**settings, **flags, "run_name": name, "resume": resume}
        return weights(train(from_flags(TrainConfig, given), dataset=tokens))

    straight = run_from_disk("a")
    shutil.copytree(folder / "a", folder / "b")
    shutil.rmtree(folder / "b" / "step_20")
    assert_identical(run_from_disk("b", resume=True), straight)


DYING_SCRIPT = """
import os, signal
import train_sae
from sae.placement import dealing

forwards, count_rows = [], dealing.count_rows

def count_and_die(pairs):
    forwards.append(pairs)
    if len(forwards) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return count_rows(pairs)

dealing.count_rows = count_and_die
train_sae.main()
"""


def test_a_run_resumed_within_a_batch_ends_in_the_same_bits(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the third batch of 4 steps, resumed from step 10, its second: the same bits."""
    flags = {
        **{**LOSSES, "steps_per_batch": 4, "max_examples": 40, "grad_acc_steps": 2},
        **{"batch_size": 4, "save_every": 5, "exclude_tokens": (5,), "exclude_norm": 1.2},
    }
    straight = run(lm, tokens, settings, run_name="straight", **flags)
    die_in_forward(monkeypatch, 3 * 2 * 4)  # a forward is counted once for each of its steps
    with pytest.raises(Killed):
        run(lm, tokens, settings, run_name="broken", **flags)
    monkeypatch.undo()
    assert checkpoints(Path(settings["save_dir"]) / "broken")[-1].name == "step_10"
    resumed = run(lm, tokens, settings, run_name="broken", resume=True, **flags)
    assert resumed["step"] == straight["step"] == 20
    assert_identical(weights(resumed), weights(straight))
    assert_identical(training_state(resumed), training_state(straight))


def test_resume_after_sigkill_of_the_script(tmp_path: Path, tokens: Tensor) -> None:
    """The real script, killed by SIGKILL after a save and resumed, ends in the same bits."""
    tokens.numpy().astype("uint16").tofile(tmp_path / "ids.bin")

    def start(script: list[str], name: str, *more: str) -> int:
        flags = "--layers 0 --ctx_len 16 --batch_size 4 --num_latents 64 --k 4 --save_every 3"
        data = [str(ROOT / "demo" / "lm"), str(tmp_path / "ids.bin")]
        command = [sys.executable, *script, *data, *flags.split(), "--log_with", "none"]
        command += ["--save_dir", str(tmp_path), "--run_name", name, *more]
        return subprocess.run(command, cwd=ROOT, capture_output=True, timeout=300).returncode

    script = [str(ROOT / "train_sae.py")]
    assert start(script, "straight") == 0
    assert start(["-c", DYING_SCRIPT], "killed") == -signal.SIGKILL
    assert [f.name for f in checkpoints(tmp_path / "killed")] == ["step_3", "step_6"]
    assert start(script, "killed", "--resume") == 0
    for file in ("sae.safetensors", "resume.safetensors"):
        a, b = (tmp_path / name / "step_45/layers.0" / file for name in ("straight", "killed"))
        assert a.read_bytes() == b.read_bytes()


def test_a_flag_that_an_older_version_did_not_write_means_its_default(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings
) -> None:
    """A run.json that lacks flags is resumed as if they had their defaults, and only so."""
    folder = Path(settings["save_dir"])
    straight = run(lm, tokens, settings, run_name="r", save_every=10)
    shutil.rmtree(folder / "r" / "step_20")
    record = folder / "r" / "run.json"
    flags = json.loads(record.read_text())
    lacking = {"multi_topk", "auxk_alpha", "exclude_tokens", "revision", "lr", "eval_every"}
    record.write_text(json.dumps({n: v for n, v in flags.items() if n not in lacking}))
    for name, value, default in (
        ("multi_topk", True, "False"),
        ("auxk_alpha", 0.5, "1.0"),
        ("exclude_tokens", (3,), r"\[\]"),
        ("lr", 0.1, "None"),
    ):
        with pytest.raises(UsageError, match=f"--resume: --{name} is .* now and was {default} "):
            run(lm, tokens, settings, run_name="r", resume=True, **{name: value})
    resumed = run(lm, tokens, settings, run_name="r", resume=True, save_every=10)
    assert_identical(weights(resumed), weights(straight))
    assert_identical(training_state(resumed), training_state(straight))


def test_a_run_with_the_older_recipe_goes_on_with_it(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings
) -> None:
    """Where a flag did not exist its value is what was done then, and each must be given so."""
    folder = Path(settings["save_dir"])
    older = {
        **{"steps_per_batch": 1, "lr_warmup": 5, "lr_decay": 1.0, "encoder_lr": 1.0, "lr": 2e-3},
        **{"rms_units": False, "adam_beta1": 0.9, "adam_beta2": 0.999, "wake_alpha": 0.0},
        **{"runner_ups": 0.0, "auxk_alone": False},
    }
    straight = run(lm, tokens, settings, run_name="r", save_every=10, **older)
    shutil.rmtree(folder / "r" / "step_20")
    record = folder / "r" / "run.json"
    flags = {n: v for n, v in json.loads(record.read_text()).items() if n not in older}
    record.write_text(json.dumps({**flags, "lr_warmup_steps": 5, "lr": 2e-3}))
    for name in older.keys() - {"lr"}:
        given = {n: value for n, value in older.items() if n != name}
        if name == "lr_warmup":
            given[name] = 0.05
        with pytest.raises(UsageError, match=f"--resume: --{name} is .* when the run started"):
            run(lm, tokens, settings, run_name="r", resume=True, **given)
    record.write_text(json.dumps({**flags, "lr_warmup_steps": 5, "lr": None}))
    with pytest.raises(UsageError, match="--lr is None now and was .2e-4 / sqrt"):
        given = {n: value for n, value in older.items() if n != "lr"}
        run(lm, tokens, settings, run_name="r", resume=True, **given)
    record.write_text(json.dumps({**flags, "lr_warmup_steps": 5, "lr": 2e-3}))
    resumed = run(lm, tokens, settings, run_name="r", resume=True, save_every=10, **older)
    assert_identical(weights(resumed), weights(straight))

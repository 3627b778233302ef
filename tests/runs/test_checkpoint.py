"""A run on disk: a save is whole or absent, damage is found, a folder holds one run."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_runs import (
    Killed,
    Settings,
    assert_identical,
    coder_optimizer,
    run,
    training_state,
    weights,
)
from transformers import PreTrainedModel

from sae import SparseCoder, SparseCoderConfig, UsageError, load_many
from sae.coders.bank import CoderBank
from sae.config import Widths
from sae.flag_checks import from_flags
from sae.lm.capture import Capture
from sae.placement.exchange import Exchange
from sae.placement.ranks import Ranks
from sae.runs.outcome import keep_best
from sae.training.state import TrainingState
from train_sae import TrainConfig, train


def test_resume_refuses_other_data(lm: PreTrainedModel, tokens: Tensor, settings: Settings) -> None:
    """Data that grew, shrank or changed since the run was saved are refused."""
    settings = {**settings, "max_examples": None}
    run(lm, tokens, settings, run_name="r")
    changed = tokens.clone()
    changed[0, 0] += 1
    for other in (torch.cat([tokens, tokens]), tokens[:100], changed):
        with pytest.raises(UsageError, match="--resume: the data are"):
            run(lm, other, settings, run_name="r", resume=True)
    record = Path(settings["save_dir"]) / "r" / "run.json"
    record.write_text("{}")
    with pytest.raises(UsageError, match="--resume: --"):
        run(lm, tokens, settings, run_name="r", resume=True)


def test_a_run_never_overwrites_the_model(
    tmp_path: Path, lm: PreTrainedModel, tokens: Tensor, settings: Settings
) -> None:
    """With the model's own folder as the run's folder, the model's files stay as they are."""
    lm.save_pretrained(tmp_path / "models" / "lm")
    before = (tmp_path / "models" / "lm" / "config.json").read_bytes()
    flags = {"model": str(tmp_path / "models" / "lm"), "save_dir": str(tmp_path / "models")}
    train(from_flags(TrainConfig, {**settings, **flags}), dataset=tokens)
    assert (tmp_path / "models" / "lm" / "config.json").read_bytes() == before


def test_a_full_disk_is_named_and_the_checkpoint_before_resumes(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that the disk refuses says so, and the checkpoint before it resumes."""
    run(lm, tokens, settings, run_name="r", save_every=10)
    shutil.rmtree(Path(settings["save_dir"]) / "r" / "step_20")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    # Once where the checkpoint is written, once where the best coders are.
    for writer in ("sae.runs.checkpoint.save_file", "sae.formats.sparsify.save_file"):
        flags = {"save_every": 10, "save_best": "formats" in writer, "resume": True}
        monkeypatch.setattr(writer, full)
        with pytest.raises(UsageError, match="--save_dir .*step 20 cannot be saved .*No space"):
            run(lm, tokens, settings, run_name="r", **flags)
        monkeypatch.undo()
    assert run(lm, tokens, settings, run_name="r", save_every=10, resume=True)["step"] == 20
    assert not list((Path(settings["save_dir"]) / "r").glob("*.tmp"))


def test_resuming_a_finished_run_changes_nothing(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings
) -> None:
    """--resume after the last step gives the same summary and weights."""
    done = run(lm, tokens, settings, run_name="done")
    again = run(lm, tokens, settings, run_name="done", resume=True)
    assert_identical(weights(again), weights(done))
    assert again["hookpoints"] == done["hookpoints"] and again["tokens"] == done["tokens"]


def test_resume_without_a_checkpoint_starts_the_run(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings, capsys: pytest.CaptureFixture
) -> None:
    """--resume without a checkpoint starts the run, also from other coders, and says so."""
    first = run(lm, tokens, settings, run_name="first")
    again = run(lm, tokens, settings, run_name="again", resume=True)
    assert "holds no checkpoint yet; the run starts from the beginning" in capsys.readouterr().out
    assert_identical(weights(first), weights(again))
    tuned = {"finetune": str(Path(settings["save_dir"]) / "first"), "run_name": "tuned"}
    straight = run(lm, tokens, settings, **tuned)
    assert_identical(weights(straight), weights(run(lm, tokens, settings, **tuned, resume=True)))


def test_resume_refuses_other_flags(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings
) -> None:
    """A flag that would change the run is named; one that cannot is free."""
    run(lm, tokens, settings, run_name="r")
    with pytest.raises(UsageError, match="--k is 5 now and was 4"):
        run(lm, tokens, settings, run_name="r", resume=True, **{"k": 5})
    run(lm, tokens, settings, run_name="r", resume=True, save_every=3, log_every=7)
    with pytest.raises(UsageError, match="already holds a run; add --resume"):
        run(lm, tokens, settings, run_name="r")


def test_save_best_keeps_the_lowest_held_out_fvu(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings, tmp_path: Path
) -> None:
    """best/ holds each coder as it was where its own held-out FVU was lowest."""
    run(lm, tokens, settings, run_name="r", save_best=True, save_every=4)
    best = Path(settings["save_dir"]) / "r" / "best"
    assert [f.name for f in sorted(best.iterdir())] == [f"layers.{i}" for i in range(3)]
    for name, coder in load_many(best).items():
        record = json.loads((best / name / "fvu.json").read_text())
        _, y = Capture(lm, [name])(tokens[:16])[name]
        assert record["fvu"] == pytest.approx(coder(y).fvu.item(), rel=1e-5)
        assert record["step"] % 4 == 0

    cfg = SparseCoderConfig(num_latents=32, k=4)
    bank = CoderBank({name: Widths(8, 8) for name in ("a", "b")}, cfg, (0,), "cpu")
    optimizers = {name: coder_optimizer(coder, "adam") for name, coder in bank.items()}
    exchange = Exchange(Ranks(torch.device("cpu"), 1.0), {"a": 1, "b": 1}, False)
    state = TrainingState(exchange, bank, optimizers)
    for step, fvus in ((1, (0.5, 0.5)), (2, (0.6, 0.4)), (3, (0.5, 0.3))):
        for _, coder in bank.items():
            coder.b_dec.data.fill_(step)
        keep_best(tmp_path, step, dict(zip("ab", fvus, strict=True)), state)
    kept = load_many(tmp_path / "best")
    assert kept["a"].b_dec[0] == 1 and kept["b"].b_dec[0] == 3


def test_a_killed_save_leaves_the_previous_checkpoint(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of writing, a run resumes from the save before and ends the same."""
    straight = run(lm, tokens, settings, run_name="straight", save_every=5, save_best=True)
    save = SparseCoder.save_to_disk

    def dying(self: SparseCoder, path: Path) -> None:
        if path.parent.name == "step_10.tmp" and path.name == "layers.1":
            (path / "half").parent.mkdir(parents=True, exist_ok=True)
            (path / "sae.safetensors").write_bytes(b"half")
            raise Killed
        save(self, path)

    monkeypatch.setattr(SparseCoder, "save_to_disk", dying)
    with pytest.raises(Killed):
        run(lm, tokens, settings, run_name="r", save_every=5, save_best=True)
    monkeypatch.undo()
    folder = Path(settings["save_dir"]) / "r"
    assert [f.name for f in folder.glob("step_*") if f.suffix == ""] == ["step_5"]
    assert list(load_many(folder)) == [f"layers.{i}" for i in range(3)]
    resumed = run(lm, tokens, settings, run_name="r", save_every=5, save_best=True, resume=True)
    assert_identical(training_state(resumed), training_state(straight))
    best = Path(settings["save_dir"]) / "straight" / "best"
    for path in (f for f in best.rglob("*") if f.is_file()):
        assert path.read_bytes() == (folder / "best" / path.relative_to(best)).read_bytes()


def test_damaged_checkpoints_are_passed_over(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings, capsys: pytest.CaptureFixture
) -> None:
    """A flipped bit, a missing file or a broken manifest is named and the older checkpoint used."""
    straight = run(lm, tokens, settings, run_name="r", save_every=10)
    folder = Path(settings["save_dir"]) / "r"
    shutil.copytree(folder, folder.parent / "kept")
    victim = Path("step_20/layers.1/resume.safetensors")

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    damages = {
        "is damaged": lambda: flip(folder / victim),
        "is missing": lambda: (folder / victim).unlink(),
        "cannot be read": lambda: (folder / "step_20/manifest.json").write_text("{"),
        "has format 99": lambda: (folder / "step_20/manifest.json").write_text('{"format": 99}'),
        "outside the checkpoint": lambda: (folder / "step_20/manifest.json").write_text(
            '{"format": 1, "step": 20, "wall_seconds": 1, "data": {}, '
            '"sha256": {"../run.json": "0"}}'
        ),
    }
    for message, damage in damages.items():
        shutil.rmtree(folder)
        shutil.copytree(folder.parent / "kept", folder)
        damage()
        resumed = run(lm, tokens, settings, run_name="r", save_every=10, resume=True)
        printed = capsys.readouterr().out
        assert message in printed and "step_20" in printed, message
        assert_identical(training_state(resumed), training_state(straight))
    flip(folder / victim)
    flip(folder / "step_10/layers.0/sae.safetensors")
    with pytest.raises(UsageError, match="no checkpoint in .* can be used.*step_20.*step_10"):
        run(lm, tokens, settings, run_name="r", save_every=10, resume=True)


def test_a_save_dir_that_cannot_be_written_is_refused(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings, tmp_path: Path
) -> None:
    """A folder that cannot be made is named before anything is loaded."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--save_dir .*cannot be written"):
        run(lm, tokens, {**settings, "save_dir": str(tmp_path / "file")})

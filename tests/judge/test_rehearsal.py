"""What would fail at the end of a run fails before its first step."""

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from training_runs import run
from transformers import PreTrainedModel

from sae import UsageError


def test_an_evaluation_that_cannot_work_is_known_at_the_start(
    causal_lm: PreTrainedModel,
    tokens: Tensor,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An LM that fails with a reconstruction in it is a line before training, not after it."""

    def fails(*_: Any) -> None:
        raise RuntimeError("the head wants what is not there")

    monkeypatch.setattr("sae.judge.predictions.kl_divergence", fails)
    with pytest.raises(
        UsageError, match="cannot be evaluated with reconstructions .* the head wants"
    ):
        run(causal_lm, tokens, settings, run_name="r", save_every=1)
    assert not list(Path(settings["save_dir"]).glob("r/step_*"))


def test_a_disk_without_room_is_known_at_the_start(
    lm: PreTrainedModel, tokens: Tensor, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that does not fit is refused with both sizes; what is asked for suffices."""
    folder = Path(settings["save_dir"])
    run(lm, tokens, settings, run_name="whole")
    (saved,) = folder.glob("whole/step_*")
    size = sum(file.stat().st_size for file in saved.rglob("*.safetensors"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, int(0.9 * size)))
    with pytest.raises(UsageError, match=r"--save_dir .*a checkpoint takes 0.00 GiB.* are free"):
        run(lm, tokens, settings, run_name="r")
    assert not list(folder.glob("r/step_*"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 2**40, size))
    run(lm, tokens, settings, run_name="r2")


def test_the_rehearsal_moves_no_number(
    causal_lm: PreTrainedModel,
    tokens: Tensor,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run without it ends in the same bytes."""
    found = []
    for name in ("with", "without"):
        summary = run(causal_lm, tokens, settings, run_name=name, layers=(1,), auxk_alpha=0.1)
        found.append(Path(summary["hookpoints"]["layers.1"]["path"]) / "sae.safetensors")
        monkeypatch.setattr("train_sae.rehearse_end", lambda *_: None)
    assert found[0].read_bytes() == found[1].read_bytes()

"""Laws of `python -m sae threshold`: what it writes, and that all that reads coders reads it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_runs import call
from torch import Tensor
from training_runs import Settings
from transformers import PreTrainedModel

from sae import load_many
from sae.flag_checks import from_flags
from sae.judge import threshold
from sae.lm.capture import Capture
from train_sae import TrainConfig, train


def test_thresholds_leave_k_latents_active_in_the_mean(
    causal_lm: PreTrainedModel,
    tokens: Tensor,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Mean L0 is k, at the level that sorting all pre-activations gives; files go everywhere."""
    causal_lm.save_pretrained(tmp_path / "lm")
    tokens.numpy().astype("uint16").tofile(tmp_path / "ids.bin")
    flags: dict[str, Any] = {**settings, "layers": (1, 2), "dataset": str(tmp_path / "ids.bin")}
    flags |= {"model": str(tmp_path / "lm"), "activation": "groupmax", "run_name": "r"}
    train(from_flags(TrainConfig, flags))
    folder = Path(settings["save_dir"]) / "r"
    monkeypatch.setattr(threshold, "_AT_ONCE", 5 * 128)
    capsys.readouterr()
    assert call(monkeypatch, "threshold", str(folder)) == 0
    shown = capsys.readouterr().out
    grouped, coders = load_many(folder), load_many(folder / "thresholds")
    rows = Capture(causal_lm, ["layers.1", "layers.2"])(tokens[:16])  # what the run held out
    for name, coder in coders.items():
        before, y = grouped[name], rows[name][1]
        with torch.no_grad():
            pre_acts = (y - before.b_dec) @ before.encoder.weight.T + before.encoder.bias
        level = pre_acts.clamp(min=0).flatten().sort(descending=True).values[4 * len(y)]
        assert coder.threshold.unique().item() == pytest.approx(level.item(), rel=1e-5)
        assert (coder.encode(y).top_acts > 0).sum() == 4 * len(y)
        assert (coder.cfg.activation, coder.cfg.k) == ("jumprelu", 4)
        for key, tensor in before.state_dict().items():
            assert torch.equal(coder.state_dict()[key], tensor), key
        lines = [line.split() for line in shown.splitlines() if line.startswith(name)]
        assert [line[1] for line in lines] == ["groupmax", ">"]
        assert float(lines[1][5]) == 4.0

    thresholded = str(folder / "thresholds")
    assert call(monkeypatch, "evaluate", thresholded) == 0
    figures = json.loads((folder / "thresholds" / "eval.json").read_text())
    assert figures["of"]["held_out"] and figures["coders"]["layers.2"]["l0"] == 4.0
    page = tmp_path / "page.html"
    assert call(monkeypatch, "features", thresholded, "--out", str(page)) == 0
    assert "layers.2" in page.read_text(encoding="utf-8")

    capsys.readouterr()
    assert call(monkeypatch, "threshold", str(folder)) == 2
    assert "holds coders already" in capsys.readouterr().err
    with pytest.raises(Exception, match="--finetune .*is a jumprelu coder there"):
        train(from_flags(TrainConfig, {**flags, "run_name": "t", "finetune": thresholded}))

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

from sae import UsageError, load_many
from sae.flag_checks import from_flags
from sae.judge import threshold
from sae.lm.capture import Capture
from train_sae import TrainConfig, train


def test_every_latent_is_active_as_often_as_before(
    causal_lm: PreTrainedModel,
    tokens: Tensor,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """On every other sequence; the rest is what figures are of. All commands read the files."""
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
    capture = Capture(causal_lm, ["layers.1", "layers.2"])
    held_out = tokens[:16]
    rows, others = capture(held_out[::2]), capture(held_out[1::2])
    for name, coder in coders.items():
        before, y = grouped[name], rows[name][1]
        with torch.no_grad():
            pre_acts = (y - before.b_dec) @ before.encoder.weight.T + before.encoder.bias
        active = torch.zeros_like(pre_acts).scatter_(1, *reversed(before.encode(y))) > 0
        counts = active.sum(0)
        ordered = pre_acts.sort(0, descending=True).values
        for i, count in enumerate(counts.tolist()):
            level = coder.threshold[i].item()
            above = ordered[count - 1, i] if count else torch.inf
            assert max(0, ordered[count, i] - 1e-5) <= level <= above + 1e-5, (i, count)
        now = coder.encode(y)
        fired = now.top_indices[now.top_acts > 0].bincount(minlength=128)
        assert (counts == 0).any() and 0.99 < counts.sum() / (4 * len(y)) <= 1
        # Two pre-activations may be so close that rounding decides.
        assert (fired - counts).abs().max() <= 1 and (fired - counts).abs().sum() <= 2
        assert (coder.cfg.activation, coder.cfg.k) == ("jumprelu", 4)
        for key, tensor in before.state_dict().items():
            assert torch.equal(coder.state_dict()[key], tensor), key
        lines = [line.split() for line in shown.splitlines() if line.startswith(name)]
        assert [line[1] for line in lines] == ["groupmax", "jumprelu"]
        other = others[name][1]
        l0 = (coder.encode(other).top_acts > 0).sum().item() / len(other)
        assert [float(line[4]) for line in lines] == [4.0, round(l0, 1)]
        error = (coder.decode(*coder.encode(other)) - other).square().sum()
        fvu = (error / (other - other.mean(0)).square().sum()).item()
        assert float(lines[1][2]) == pytest.approx(fvu, abs=6e-5)

    thresholded = str(folder / "thresholds")
    assert call(monkeypatch, "evaluate", thresholded) == 0
    figures = json.loads((folder / "thresholds" / "eval.json").read_text())
    assert figures["of"]["held_out"]
    whole = torch.cat([rows["layers.2"][1], others["layers.2"][1]])
    l0 = (coders["layers.2"].encode(whole).top_acts > 0).sum().item() / len(whole)
    assert figures["coders"]["layers.2"]["l0"] == pytest.approx(l0, abs=0.01)
    page = tmp_path / "page.html"
    assert call(monkeypatch, "features", thresholded, "--out", str(page)) == 0
    assert "layers.2" in page.read_text(encoding="utf-8")

    capsys.readouterr()
    one = ("--tokens", "16", "--out", str(tmp_path / "of_one"))
    assert call(monkeypatch, "threshold", str(folder), *one) == 2
    assert "--tokens 16: thresholds are made on every other" in capsys.readouterr().err
    assert call(monkeypatch, "threshold", str(folder)) == 2
    assert "holds coders already" in capsys.readouterr().err
    assert call(monkeypatch, "threshold", thresholded) == 2
    assert "is a jumprelu coder" in capsys.readouterr().err
    flags["finetune"] = thresholded
    started = {**flags, "activation": "jumprelu", "run_name": "on", "lr": 1e-30, "save_every": 1}
    train(from_flags(TrainConfig, {**started, "max_examples": 8}))
    for name, coder in load_many(folder.parent / "on").items():
        torch.testing.assert_close(coder.threshold.data, coders[name].threshold.data)
        torch.testing.assert_close(coder.b_dec.data, coders[name].b_dec.data)
    flags["group_sequences"] = 1
    for other in ("groupmax", "batchtopk"):
        with pytest.raises(UsageError, match="--finetune .*is a jumprelu coder there"):
            train(from_flags(TrainConfig, {**flags, "activation": other, "run_name": other}))

"""Prefixes of Matryoshka coders as the commands judge and show them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from command_runs import call
from torch import Tensor
from training_runs import Settings
from transformers import PreTrainedModel

from sae import SparseCoder, UsageError
from sae.flag_checks import from_flags
from sae.judge.features import FeaturesConfig, page_data
from train_sae import TrainConfig, train

NAMES = ["layers.0", "layers.1"]
PREFIXES = [16, 32, 128]


@pytest.fixture
def folder(causal_lm: PreTrainedModel, tokens: Tensor, settings: Settings, tmp_path: Path) -> Path:
    """A run of coders with prefixes, whose folder is all that the commands need."""
    causal_lm.save_pretrained(tmp_path / "lm")
    tokens.numpy().astype("uint16").tofile(tmp_path / "ids.bin")
    names = {"model": str(tmp_path / "lm"), "dataset": str(tmp_path / "ids.bin")}
    flags = {"layers": (0, 1), "matryoshka": (0.125, 0.125, 0.75), "run_name": "r"}
    train(from_flags(TrainConfig, {**settings, **names, **flags}))
    return Path(settings["save_dir"]) / "r"


def hooked(lm: PreTrainedModel, name: str, text: Tensor, rows: Tensor | None) -> tuple[Any, Tensor]:
    """Logits with `rows` in place of a layer's output, and that output, [N D]."""
    seen: list[Tensor] = []

    def hook(module: Any, args: Any, output: Any) -> Tensor:
        seen.append(output.flatten(0, 1))
        return output if rows is None else rows.view_as(output)

    handle = lm.base_model.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        logits = lm(text).logits
    handle.remove()
    return logits, seen[0]


def test_every_prefix_has_the_figures_of_its_definition(
    folder: Path,
    causal_lm: PreTrainedModel,
    tokens: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """FVU, L0, dead share and predictions by dense matrices and plain hooks; in table and JSON.

    The last prefix is the coder. Those of thresholds set for such a coder are printed too.
    """
    capsys.readouterr()
    assert call(monkeypatch, "evaluate", str(folder)) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    written = json.loads((folder / "eval.json").read_text())["coders"]
    text = tokens[:16]

    def ce(logits: Tensor) -> float:
        return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten()))

    for name in NAMES:
        clean, y = hooked(causal_lm, name, text, None)
        zero = ce(hooked(causal_lm, name, text, torch.zeros_like(y))[0])
        coder = SparseCoder.load_from_disk(folder / "step_20" / name)
        with torch.no_grad():
            top_acts, top_indices = coder.encode(y)
            acts = torch.zeros(len(y), 128).scatter(1, top_indices, top_acts)
        figures = written[name]["prefixes"]
        assert [prefix["latents"] for prefix in figures] == PREFIXES
        for m, prefix in zip(PREFIXES, figures, strict=True):
            assert coder.W_dec is not None
            out = (acts[:, :m] @ coder.W_dec[:m] + coder.b_dec).detach()
            error = (y - out).double().square().sum()
            fvu = float(error / (y - y.mean(0)).double().square().sum())
            assert prefix["fvu"] == pytest.approx(fvu, rel=1e-4)
            active = acts[:, :m] > 0
            assert prefix["l0"] == pytest.approx(float(active.sum(1).double().mean()))
            dead = float((~active.any(0)).double().mean())
            assert prefix["dead_share"] == pytest.approx(dead)
            logits, _ = hooked(causal_lm, name, text, out)
            found = prefix["predictions"]
            assert found["ce_spliced"] == pytest.approx(ce(logits), rel=1e-5)
            assert [found["ce_clean"], found["ce_zero"]] == pytest.approx([ce(clean), zero])
            recovered = (zero - ce(logits)) / (zero - ce(clean))
            assert found["ce_recovered"] == pytest.approx(recovered, rel=1e-2)
            shown = ["first", str(m), f"{prefix['fvu']:.4f}", f"{prefix['l0']:.1f}"]
            shown.append(f"{prefix['dead_share']:.2%}")
            (line,) = [line for line in lines if line[:5] == shown]
            assert f"{found['ce_recovered']:.4f}" in line
        whole = {
            "predictions": figures[-1]["predictions"],
            "fvu": pytest.approx(figures[-1]["fvu"]),
        }
        assert {figure: written[name][figure] for figure in whole} == whole
    assert call(monkeypatch, "compare", str(folder), str(folder)) == 0
    assert call(monkeypatch, "threshold", str(folder)) == 0
    assert capsys.readouterr().out.count("first 16 ") == 2 * len(NAMES)
    made = SparseCoder.load_from_disk(folder / "thresholds" / NAMES[0])
    assert made.cfg.activation == "jumprelu" and list(made.prefixes) == PREFIXES


def test_the_features_page_shows_a_prefix_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Its latents, neighbours and figures are those of the prefix; what is none is refused."""
    plain = page_data(FeaturesConfig(str(folder), latents=128))
    shown = page_data(FeaturesConfig(str(folder), latents=128, prefix=16))
    assert shown["about"].startswith("The first 16 latents of coders of ")
    summary = json.loads((folder / "summary.json").read_text())["hookpoints"]
    for whole, coder in zip(plain["coders"], shown["coders"], strict=True):
        assert coder["num_latents"] == 16 and coder["latents"]
        prefix = summary[coder["name"]]["prefixes"][0]
        for figure in ("fvu", "dead_share"):
            assert coder["figures"][figure] == prefix[figure]
        assert sum(coder["histogram"]) == coder["alive"] == len(coder["latents"])
        theirs = {latent["id"]: latent for latent in whole["latents"] if latent["id"] < 16}
        assert {latent["id"] for latent in coder["latents"]} == theirs.keys()
        for latent in coder["latents"]:
            same = theirs[latent["id"]]
            assert [latent[k] for k in ("fired", "largest")] == [same["fired"], same["largest"]]
            assert {number for number, _ in latent["neighbours"]} <= set(range(16))
    out = tmp_path / "page.html"
    arguments = (str(folder), "--out", str(out), "--prefix", "32")
    assert call(monkeypatch, "features", *arguments) == 0
    assert re.search(r'"num_latents":32\b', out.read_text())
    with pytest.raises(UsageError, match="--prefix 17: the prefixes of layers.0 are 16, 32, 128"):
        page_data(FeaturesConfig(str(folder), prefix=17))
    with pytest.raises(UsageError, match="--ids 16: layers.0 has latents 0 to 15"):
        page_data(FeaturesConfig(str(folder), prefix=16, ids=(16,)))

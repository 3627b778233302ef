"""Crosscoders over several LMs: what two models on the same tokens share."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command_runs import call
from conftest import tiny_lm
from torch import Tensor
from training_runs import Settings, assert_identical, killed_and_resumed, weights
from transformers import AutoModel, AutoTokenizer, LlamaConfig, PreTrainedModel

from sae import SparseCoder, UsageError
from sae.coders.across.crosscoder import Crosscoder, part_norms
from sae.flag_checks import from_flags
from sae.runs.dry_run import show_plan
from train_sae import TrainConfig, train

FLAGS: dict[str, Any] = {"crosscoder": True, "layers": (1, 2), "multi_topk": False}
FLAGS |= {"optimizer": "adam", "lr": 0.01, "exclude_positions": 1, "exclude_tokens": (5,)}


class Rows(list):
    """Items that say what they are."""

    fingerprint = "rows"


def other_lm(width: int = 24, vocabulary: int = 70, layers: int = 4) -> PreTrainedModel:
    """Another LM that knows the same tokens and some more, narrower and deeper."""
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=48,
        num_attention_heads=4,
        num_hidden_layers=layers,
        vocab_size=vocabulary,
        head_dim=6,
    )
    return AutoModel.from_config(config).eval()


@pytest.fixture
def at(tmp_path: Path, tokens: Tensor) -> dict[str, str]:
    """Both LMs and the token ids, as files."""
    tiny_lm().save_pretrained(tmp_path / "lm")
    other_lm().save_pretrained(tmp_path / "other")
    tokens.numpy().astype("uint16").tofile(tmp_path / "ids.bin")
    return {name: str(tmp_path / name) for name in ("lm", "other", "ids.bin")}


def flags_of(settings: Settings, at: dict[str, str]) -> dict[str, Any]:
    found = {**settings, **FLAGS, "model": at["lm"], "dataset": at["ids.bin"]}
    return found | {"models": (at["other"],)}


def rows_of(lm: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """What leaves layers 1 and 2, by plain hooks, of the tokens that have rows."""
    seen: list[Tensor] = []
    handles = [
        lm.get_submodule(f"layers.{i}").register_forward_hook(
            lambda m, a, y: seen.append(y if isinstance(y, Tensor) else y[0])
        )
        for i in (1, 2)
    ]
    with torch.no_grad():
        lm(input_ids=ids)
    for handle in handles:
        handle.remove()
    kept = ids != 5
    kept[:, 0] = False
    return [y[kept] for y in seen]


def test_figures_are_those_of_plain_hooks_on_both(
    settings: Settings,
    at: dict[str, str],
    tokens: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """FVU at the hookpoints of each LM, and whose its latents are, as run and commands say them."""
    summary = train(from_flags(TrainConfig, {**flags_of(settings, at), "run_name": "a"}))
    figures = summary["hookpoints"]["crosscoder"]
    coder = SparseCoder.load_from_disk(figures["path"])
    names = ["layers.1", "layers.2", "layers.1 of other", "layers.2 of other"]
    assert [part.hookpoint for part in coder.cfg.parts] == names
    assert [part.width for part in coder.cfg.parts] == [32, 32, 24, 24]
    rows = [y for lm in (tiny_lm().eval(), other_lm()) for y in rows_of(lm, tokens[:16])]
    out = coder(torch.cat(rows, dim=1)).sae_out.split([32, 32, 24, 24], dim=1)
    for name, y, y_hat, found in zip(names, rows, out, figures["hookpoints"], strict=True):
        right = (y - y_hat).square().sum() / (y - y.mean(0)).square().sum()
        assert found["hookpoint"] == name
        assert found["fvu"] == pytest.approx(float(right.detach()), rel=1e-4)
    assert isinstance(coder, Crosscoder)
    coder.use_scaled_rows_(coder.cfg.parts)
    norms = part_norms(coder.W_dec.detach(), coder.cfg.parts)  # type: ignore[union-attr]  # it has one
    share = norms[:, 2:].sum(1) / norms.sum(1)
    first, second = figures["models"]
    assert (first["model"], second["model"]) == ("", "other")
    assert second["decoder_share"] == pytest.approx(float(share.mean()), rel=1e-4)
    assert first["decoder_share"] + second["decoder_share"] == pytest.approx(1)
    bins = [int(((share >= i / 20) & (share < (i + 1) / 20)).sum()) for i in range(20)]
    assert second["histogram"] == bins

    folder = str(Path(settings["save_dir"]) / "a")
    assert call(monkeypatch, "evaluate", folder, "--out", str(tmp_path / "e.json")) == 0
    printed = capsys.readouterr().out
    assert re.search(rf"crosscoder +other +{second['decoder_share']:.2%}", printed)
    again = json.loads((tmp_path / "e.json").read_text())["coders"]["crosscoder"]
    assert again["fvu"] == pytest.approx(figures["fvu"], rel=1e-5)
    for ours, theirs in zip(again["models"], figures["models"], strict=True):
        assert ours["model"] == theirs["model"] and ours["histogram"] == theirs["histogram"]
        assert ours["decoder_share"] == pytest.approx(theirs["decoder_share"], rel=1e-5)
    page = tmp_path / "page.html"
    assert call(monkeypatch, "features", folder, "--latents", "4", "--out", str(page)) == 0
    data = re.search(r"<script[^>]*json[^>]*>(.*?)</script>", page.read_text(), re.S)
    assert data is not None
    for latent in json.loads(data[1])["coders"][0]["latents"]:
        assert [lm for lm, _ in latent["models"]] == ["the first", "other"]
        assert latent["models"][1][1] == pytest.approx(float(share[latent["id"]]), rel=0.01)
    # Without its run the coder says which LM it reads, by the name of its folder.
    monkeypatch.chdir(tmp_path)
    where = ("--model", at["lm"], "--dataset", at["ids.bin"], "--ctx_len", "16", "--tokens", "64")
    assert call(monkeypatch, "evaluate", str(Path(figures["path"]).parent), *where) == 0


def test_placement_and_resuming_change_nothing(
    settings: Settings, at: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Accumulated = whole; killed and resumed = straight, bit for bit."""
    flags = {**flags_of(settings, at)}

    def trained(_: Any, __: Any, given: Settings, **more: Any) -> dict[str, Any]:
        return train(from_flags(TrainConfig, {**given, **more}))

    straight = trained(None, None, flags, run_name="a", save_every=5)
    shape = {"batch_size": 2, "grad_acc_steps": 4, "run_name": "accumulated"}
    for key, tensor in weights(trained(None, None, flags, **shape)).items():
        torch.testing.assert_close(tensor, weights(straight)[key], rtol=2e-3, atol=2e-4)
    monkeypatch.setattr("training_runs.run", trained)
    resumed = killed_and_resumed(monkeypatch, None, None, flags)  # type: ignore[arg-type]  # of files
    assert_identical(weights(resumed), weights(straight))


def test_the_dry_run_counts_all_lms(
    settings: Settings, at: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Their parameters and their hookpoints."""
    show_plan(from_flags(TrainConfig, flags_of(settings, at)))
    said = re.search(r"LM +([\d,]+) parameters", capsys.readouterr().out)
    right = 0
    for lm, layers in ((tiny_lm(), 3), (other_lm(), 3)):
        right += sum(p.numel() for n, p in lm.named_parameters() if not n.startswith("norm"))
        right -= sum(p.numel() for layer in lm.layers[layers:] for p in layer.parameters())
    assert said is not None and int(said[1].replace(",", "")) == pytest.approx(right, rel=0.01)


def test_lms_that_read_other_tokens_are_refused(
    settings: Settings, at: dict[str, str], tmp_path: Path, lm: PreTrainedModel, tokens: Tensor
) -> None:
    """Fewer ids, another tokenizer, two folders of one name, no crosscoder, and given rows."""
    few, twin = tmp_path / "few", tmp_path / "x/other"
    other_lm(vocabulary=60).save_pretrained(few)
    other_lm().save_pretrained(twin)
    flags = {**flags_of(settings, at), "run_name": "r"}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"models": (str(few),)}, "knows 60 token ids, and MODEL .* 64: give the one with fewer"),
        ({"models": (at["other"], str(twin))}, "two of these folders have one name"),
        ({"models": (at["lm"] + "/",)}, "--models .*: is MODEL itself: name the others alone"),
        ({"crosscoder": False}, "--models .*: are for a crosscoder over several LMs: add"),
        (
            {"models": (str(tmp_path / "none"),)},
            "--models .*none: MODEL .*none: no such language model",
        ),
    ]
    for more, message in cases:
        with pytest.raises(UsageError, match=message):
            train(from_flags(TrainConfig, {**flags, **more}))
    given = Rows([{"a": torch.randn(16, 8), "b": torch.randn(16, 6)} for _ in range(40)])
    with pytest.raises(UsageError, match="--models: do not go with rows made elsewhere"):
        plain = {"layers": (), "exclude_tokens": (), "exclude_positions": 0}
        train(from_flags(TrainConfig, {**flags, **plain}), activations=given)
    demo = Path(__file__).parents[2] / "demo/lm"
    tokenizer = AutoTokenizer.from_pretrained(demo)
    for folder, change in ((at["lm"], False), (at["other"], True)):
        tokenizer.save_pretrained(folder)
        file = Path(folder) / "tokenizer.json"
        said = json.loads(file.read_text())
        vocabulary = said["model"]["vocab"]
        if change:
            a, b = list(vocabulary)[20:22]
            vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
            file.write_text(json.dumps(said))
    with pytest.raises(UsageError, match="its tokenizer is another: token 20 of MODEL"):
        train(from_flags(TrainConfig, flags))

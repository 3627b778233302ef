"""Runs of crosscoders, and the commands that read what they save."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command_runs import call
from conftest import tiny_lm
from tiny_lms import WITH_HEAD, make_with_head
from torch import Tensor
from training_runs import (
    Settings,
    assert_identical,
    killed_and_resumed,
    run,
    training_state,
    weights,
)
from transformers import PreTrainedModel

from sae import SaeConfig, SparseCoder, UsageError, load_many
from sae.coders.across.crosscoder import part_norms
from sae.flag_checks import from_flags
from train_sae import TrainConfig, train

FLAGS: dict[str, Any] = {"crosscoder": True, "layers": (0, 1, 2), "multi_topk": False}
FLAGS |= {"optimizer": "adam", "lr": 0.01, "auxk_alpha": 1 / 32, "dead_feature_threshold": 300}


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
def test_runs_in_pieces_and_resumed_ones_are_the_same(
    lm: PreTrainedModel,
    tokens: Tensor,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    activation: str,
) -> None:
    """Accumulated = whole; killed and resumed = straight, bit for bit, with its scales."""
    flags = {**FLAGS, "activation": activation}
    flags |= {"group_sequences": 2} if activation == "batchtopk" else {}
    straight = run(lm, tokens, settings, run_name="a", save_every=5, **flags)
    shape = {"batch_size": 2, "grad_acc_steps": 4}
    accumulated = weights(run(lm, tokens, settings, run_name="accumulated", **flags, **shape))
    for key, tensor in accumulated.items():
        torch.testing.assert_close(tensor, weights(straight)[key], rtol=2e-3, atol=2e-4)
    resumed = killed_and_resumed(monkeypatch, lm, tokens, settings, **flags)
    assert_identical(weights(resumed), weights(straight))
    assert_identical(training_state(resumed), training_state(straight))


@pytest.mark.parametrize("optimizer", ["adam", "signum", "muon", "soap"])
def test_rms_of_hookpoints_is_that_of_the_first_batch(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings, optimizer: str
) -> None:
    """About their mean; with every optimizer decoder norms on such rows sum to sqrt(H).

    Figures by hookpoint are those of a plain forward with the files.
    """
    flags = {**FLAGS, "optimizer": optimizer, "run_name": "a"}
    summary = run(lm, tokens, settings, **flags)
    figures = summary["hookpoints"]["crosscoder"]
    coder = SparseCoder.load_from_disk(figures["path"])
    names = [part.hookpoint for part in coder.cfg.parts]
    assert names == ["layers.0", "layers.1", "layers.2"]
    seen: dict[str, Tensor] = {}
    handles = [
        lm.get_submodule(n).register_forward_hook(
            lambda m, a, y, n=n: seen.__setitem__(n, y if isinstance(y, Tensor) else y[0])
        )
        for n in names
    ]
    order = 16 + torch.randperm(160, generator=torch.Generator().manual_seed(42))
    with torch.no_grad():
        lm(input_ids=tokens[order[: settings["batch_size"]]])
        for part in coder.cfg.parts:
            rms = seen[part.hookpoint].flatten(0, 1).double().var(0, unbiased=False).mean().sqrt()
            assert part.rms == pytest.approx(float(rms), rel=1e-5)
        lm(input_ids=tokens[:16])
    for handle in handles:
        handle.remove()
    rows = torch.cat([seen[n].flatten(0, 1) for n in names], dim=1)
    out = coder(rows).sae_out
    for name, y, y_hat in zip(names, rows.split(32, 1), out.split(32, 1), strict=True):
        expected = (y - y_hat).square().sum() / (y - y.mean(0)).square().sum()
        (found,) = [f for f in figures["hookpoints"] if f["hookpoint"] == name]
        assert found["fvu"] == pytest.approx(float(expected.detach()), rel=1e-4)
    fvus = [found["fvu"] for found in figures["hookpoints"]]
    assert min(fvus) < figures["fvu"] < max(fvus) < 1
    coder.use_scaled_rows_(coder.cfg.parts)
    norms = part_norms(coder.W_dec, coder.cfg.parts)  # type: ignore[arg-type]  # it has a decoder
    torch.testing.assert_close(norms.sum(1), torch.full((len(norms),), 3**0.5), rtol=1e-4, atol=0)
    assert sum(f["decoder_share"] for f in figures["hookpoints"]) == pytest.approx(1)


class Rows(list):
    """Items that say what they are."""

    fingerprint = "rows"


def test_rows_of_two_models_can_be_joined(tmp_path: Path) -> None:
    """Activations made elsewhere, of two LMs on the same tokens, are trained on as one.

    Times a power of two at one of them nothing changes but the unit there.
    """
    g = torch.Generator().manual_seed(0)
    items = [{"base": torch.randn(16, 8, generator=g), "chat": torch.randn(16, 6, generator=g)}]
    items = [{n: x + i / 9 for n, x in items[0].items()} for i in range(40)]
    found = []
    for name, scale in (("a", 1.0), ("b", 2.0**-9)):
        flags = {"save_dir": str(tmp_path), "run_name": name, "log_with": "none", "k": 3}
        flags |= {"num_latents": 32, "batch_size": 4, "eval_tokens": 16, "crosscoder": True}
        rows = Rows([{**item, "chat": item["chat"] * scale} for item in items])
        summary = train(from_flags(TrainConfig, flags), activations=rows)
        found.append(SparseCoder.load_from_disk(summary["hookpoints"]["crosscoder"]["path"]))
    plain, scaled = found
    assert torch.equal(scaled.b_dec[8:], plain.b_dec[8:] * 2.0**-9)
    assert torch.equal(scaled.encoder.weight[:, 8:], plain.encoder.weight[:, 8:] * 2.0**9)
    assert torch.equal(scaled.encoder.weight[:, :8], plain.encoder.weight[:, :8])
    uneven = Rows([{"base": torch.randn(16, 8), "chat": torch.randn(15, 6)} for _ in range(40)])
    flags |= {"run_name": "uneven"}
    with pytest.raises(
        UsageError, match="same rows at every hookpoint, not 64 at base, 60 at chat"
    ):
        train(from_flags(TrainConfig, flags), activations=uneven)


def test_commands_read_crosscoders(
    tokens: Tensor,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """evaluate's figures are the run's; features, compare, threshold and --finetune take them.

    A plain coder is no start for one, nor the other way; no other program's files hold one.
    """
    tiny_lm().save_pretrained(tmp_path / "lm")
    tokens.numpy().astype("uint16").tofile(tmp_path / "ids.bin")
    at = {"model": str(tmp_path / "lm"), "dataset": str(tmp_path / "ids.bin")}
    flags: dict[str, Any] = {**settings, **FLAGS, **at}
    summary = train(from_flags(TrainConfig, {**flags, "run_name": "a"}))
    folder = str(Path(settings["save_dir"]) / "a")
    assert call(monkeypatch, "evaluate", folder, "--out", str(tmp_path / "e.json")) == 0
    assert "decoder share" in capsys.readouterr().out
    found = json.loads((tmp_path / "e.json").read_text())["coders"]["crosscoder"]
    figures = summary["hookpoints"]["crosscoder"]
    for name in ("fvu", "l0", "cosine"):
        assert found[name] == pytest.approx(figures[name], rel=1e-5)
    for ours, theirs in zip(found["hookpoints"], figures["hookpoints"], strict=True):
        assert ours["hookpoint"] == theirs["hookpoint"]
        for name in ("fvu", "decoder_share"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5)
    page = tmp_path / "page.html"
    assert call(monkeypatch, "features", folder, "--latents", "3", "--out", str(page)) == 0
    said = re.search(r'"hookpoints": ?\[\["layers.0", ?([\d.]+)\], ?\["layers.1"', page.read_text())
    assert said is not None and 0 < float(said[1]) < 1
    step = SparseCoder.load_from_disk(figures["path"])
    # Its own twin, whose divisors are its own, fires on the same.
    other = tmp_path / "other/crosscoder"
    step.save_to_disk(other)
    said_before = json.loads((other / "cfg.json").read_text())
    said_before["parts"] = [[name, width, 2 * rms] for name, width, rms in said_before["parts"]]
    (other / "cfg.json").write_text(json.dumps(said_before))
    args = ("features", folder, "--latents", "3", "--out", str(page), "--twins", str(other.parent))
    assert call(monkeypatch, *args) == 0
    data = re.search(r"<script[^>]*json[^>]*>(.*?)</script>", page.read_text(), re.S)
    assert data is not None
    for latent in json.loads(data[1])["coders"][0]["latents"]:
        assert latent["twin"]["id"] == latent["id"]
        assert latent["twin"]["largest"] == pytest.approx(latent["largest"], rel=1e-2)
    plain = tmp_path / "plain"
    SparseCoder(96, SaeConfig(num_latents=8, k=2)).save_to_disk(plain / "crosscoder")
    args = ("features", folder, "--out", str(page), "--twins", str(plain))
    assert call(monkeypatch, *args) == 2
    assert "crosscoder reads one hookpoint, and crosscoder layers.0" in capsys.readouterr().err
    step.save_to_disk(plain / "crosscoder.seed1")
    args = ("evaluate", str(plain), "--model", at["model"], "--dataset", at["dataset"])
    assert call(monkeypatch, *args) == 2
    assert "or are beside other coders" in capsys.readouterr().err
    elsewhere = ("--hookpoint", "anywhere", "--out", str(tmp_path / "e2.json"))
    assert call(monkeypatch, "evaluate", folder, *elsewhere) == 0
    assert call(monkeypatch, "compare", folder, folder, "--out", str(tmp_path / "c.json")) == 0
    assert call(monkeypatch, "threshold", folder) == 0
    made = SparseCoder.load_from_disk(Path(folder) / "thresholds/crosscoder")
    torch.testing.assert_close(made.encoder.weight, step.encoder.weight)

    path = str(Path(figures["path"]).parent)
    tuned = {**flags, "finetune": path, "lr": 1e-9, "max_examples": 8}
    again = train(from_flags(TrainConfig, {**tuned, "run_name": "b"}))
    assert again["hookpoints"]["crosscoder"]["fvu"] == pytest.approx(figures["fvu"], rel=0.01)
    for other, message in (
        ({"layers": (0, 1)}, "is a crosscoder over layers.0, layers.1, layers.2 there"),
        ({"crosscoder": False}, "layers.0 is a crosscoder over layers.0, layers.1"),
    ):
        with pytest.raises(UsageError, match=message):
            train(from_flags(TrainConfig, {**tuned, **other, "run_name": "c"}))
    for program in ("sae_lens", "dictionary_learning", "circuit_tracer"):
        code = call(
            monkeypatch, "export", folder, "--to", program, "--out", str(tmp_path / program)
        )
        assert code == 2 and "crosscoder" in capsys.readouterr().err
        assert not (tmp_path / program).exists()
    capsys.readouterr()
    hub = tmp_path / "hub"
    assert call(monkeypatch, "push", folder, "someone/coders", "--dry_run", str(hub)) == 0
    assert "- Hookpoints: `layers.0`, `layers.1`, `layers.2`" in (hub / "README.md").read_text()
    assert torch.equal(load_many(hub)["crosscoder"].W_dec, step.W_dec)  # type: ignore[arg-type]  # both have one


@pytest.mark.parametrize("matryoshka", [(), (0.25, 0.75)])
@torch.no_grad()
def test_predictions_are_those_with_its_reconstruction_spliced_in(
    tokens: Tensor, settings: Settings, tmp_path: Path, matryoshka: tuple[float, ...]
) -> None:
    """At each hookpoint alone, and at all; its latents come from the LM as it is."""
    lm = make_with_head(WITH_HEAD["llama"][0])
    lm.save_pretrained(tmp_path / "lm")
    tokens.numpy().astype("uint16").tofile(tmp_path / "ids.bin")
    at = {"model": str(tmp_path / "lm"), "dataset": str(tmp_path / "ids.bin")}
    flags = {**settings, **FLAGS, **at, "run_name": "a", "eval_every": 1000}
    with torch.enable_grad():
        summary = train(from_flags(TrainConfig, {**flags, "matryoshka": matryoshka}))
    figures = summary["hookpoints"]["crosscoder"]
    coder, ids = SparseCoder.load_from_disk(figures["path"]), tokens[:16]
    names = [part.hookpoint for part in coder.cfg.parts]
    seen: dict[str, Tensor] = {}

    def loss(change: dict[str, Tensor]) -> float:
        def hook(name: str, y: Any) -> Any:
            rows = y if isinstance(y, Tensor) else y[0]
            seen.setdefault(name, rows)
            new = change.get(name, rows)
            return new if isinstance(y, Tensor) else (new, *y[1:])

        modules = {name: lm.base_model.get_submodule(name) for name in names}
        handles = [
            module.register_forward_hook(lambda m, a, y, name=name: hook(name, y))
            for name, module in modules.items()
        ]
        logits = lm(input_ids=ids).logits
        for handle in handles:
            handle.remove()
        targets = ids[:, 1:].flatten()
        return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets))

    clean = loss({})
    rows = torch.cat([seen[name].flatten(0, 1) for name in names], dim=1)
    out = coder(rows).sae_out.split([part.width for part in coder.cfg.parts], dim=1)
    new = {name: y.view_as(seen[name]) for name, y in zip(names, out, strict=True)}
    zero = {name: torch.zeros_like(y) for name, y in new.items()}
    sets = [(figures["predictions"], names)]
    sets += [(f["predictions"], [f["hookpoint"]]) for f in figures["hookpoints"]]
    for found, places in sets:
        spliced = loss({name: new[name] for name in places})
        zeros = loss({name: zero[name] for name in places})
        assert found["ce_clean"] == pytest.approx(clean, rel=1e-5)
        assert found["ce_spliced"] == pytest.approx(spliced, rel=1e-4)
        recovered = (zeros - spliced) / (zeros - clean)
        assert found["ce_recovered"] == pytest.approx(recovered, rel=1e-2, abs=1e-3)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"transcode": True}, "--transcode True: --crosscoder reconstructs what it reads"),
        ({"skip_connection": True}, "--skip_connection True: --crosscoder"),
        ({"normalize_decoder": False}, "--normalize_decoder False: --crosscoder selects"),
        ({"loss_fn": "kl"}, "--loss_fn kl: --crosscoder needs all hookpoints"),
        ({"exclude_norm": 2.0}, "--exclude_norm 2.0: --crosscoder needs the same rows"),
        ({"distribute_modules": True}, "--distribute_modules True: --crosscoder is one coder"),
    ],
)
def test_flags_that_do_not_go_with_it_are_refused(flags: dict[str, Any], message: str) -> None:
    """Before anything is loaded, with the reason."""
    with pytest.raises(UsageError, match=message):
        from_flags(TrainConfig, {"crosscoder": True, **flags})


def test_a_run_without_its_scales_does_not_go_on(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings
) -> None:
    """Other divisors would be another coder."""
    run(lm, tokens, settings, run_name="a", **FLAGS)
    (Path(settings["save_dir"]) / "a/crosscoder.json").unlink()
    with pytest.raises(UsageError, match="--resume: .* lacks crosscoder.json"):
        run(lm, tokens, settings, run_name="a", resume=True, **FLAGS)


def test_a_single_hookpoint_is_refused(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings
) -> None:
    """A crosscoder is over several."""
    with pytest.raises(UsageError, match="--crosscoder: .* layers.1 is one: name more"):
        run(lm, tokens, settings, **{**FLAGS, "layers": (1,)})

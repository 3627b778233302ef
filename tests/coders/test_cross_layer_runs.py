"""Runs that train cross-layer transcoders, and the commands that read them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from command_runs import call
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

from sae import SparseCoder, UsageError, load_many
from sae.flag_checks import from_flags
from sae.runs.outcome import _of_stacks
from train_sae import TrainConfig, train

FLAGS: dict[str, Any] = {"cross_layer": "all", "transcode": True, "hookpoints": ("layers.*.mlp",)}
FLAGS |= {"optimizer": "adam", "lr": 0.01, "auxk_alpha": 1 / 32, "dead_feature_threshold": 300}


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
def test_runs_in_pieces_and_resumed_ones_are_the_same(
    lm: PreTrainedModel,
    tokens: Tensor,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    activation: str,
) -> None:
    """Accumulated = whole; killed and resumed = straight, bit for bit."""
    flags = {**FLAGS, "activation": activation, "multi_topk": False}
    flags |= {"group_sequences": 2} if activation == "batchtopk" else {}
    straight = run(lm, tokens, settings, run_name="a", save_every=5, **flags)
    shape = {"batch_size": 2, "grad_acc_steps": 4, "micro_acc_steps": 2}
    # Of a fresh transcoder some gradients are rounding, which Adam divides by its own size.
    tuned = {**flags, "finetune": str(Path(straight["hookpoints"]["layers.0.mlp"]["path"]).parent)}
    whole = weights(run(lm, tokens, settings, run_name="whole", **tuned))
    accumulated = weights(run(lm, tokens, settings, run_name="accumulated", **tuned, **shape))
    for key, tensor in accumulated.items():
        torch.testing.assert_close(tensor, whole[key], rtol=2e-3, atol=2e-4)
    resumed = killed_and_resumed(monkeypatch, lm, tokens, settings, **flags)
    assert_identical(weights(resumed), weights(straight))
    assert_identical(training_state(resumed), training_state(straight))


class Rows(list):
    """Items that say what they are."""

    fingerprint = "rows"


@pytest.mark.parametrize("optimizer", ["adam", "signum", "muon", "soap"])
def test_the_scale_of_a_layer_changes_nothing_but_units(tmp_path: Path, optimizer: str) -> None:
    """What one layer reads or predicts times a power of two: the same latents, the same FVU."""
    g = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, 8, 8, generator=g)
    items = []
    for i in range(40):
        shared = torch.randn(16, 8, generator=g)
        pairs = [(shared @ maps[0, n], shared @ maps[1, n] + i / 9) for n in range(3)]
        items.append({f"l.{n}": pair for n, pair in enumerate(pairs)})
    found = []
    for name, (x_by, y_by) in (("a", (1.0, 1.0)), ("b", (2.0**5, 2.0**-9))):
        flags = {"save_dir": str(tmp_path), "run_name": name, "log_with": "none", "k": 3}
        flags |= {"num_latents": 32, "batch_size": 4, "eval_tokens": 16, "optimizer": optimizer}
        other = [(item["l.1"][0] * x_by, item["l.1"][1] * y_by) for item in items]
        rows = Rows([{**item, "l.1": pair} for item, pair in zip(items, other, strict=True)])
        flags |= {"cross_layer": 1, "transcode": True}
        found.append(train(from_flags(TrainConfig, flags), activations=rows)["hookpoints"])
    for name in ("l.0", "l.1", "l.2"):
        assert found[1][name]["fvu"] == pytest.approx(found[0][name]["fvu"], rel=1e-4)
        assert found[1][name]["frequency_histogram"] == found[0][name]["frequency_histogram"]
    plain, scaled = (load_many(Path(f["l.0"]["path"]).parent) for f in found)
    torch.testing.assert_close(
        scaled["l.1"].state_dict()["W_from.1"] * 2.0**9,
        plain["l.1"].state_dict()["W_from.1"],
        rtol=1e-3,
        atol=1e-5,
    )


def test_commands_read_cross_layer_transcoders(
    tokens: Tensor,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """evaluate's figures are the run's; features, compare, threshold and --finetune take them.

    CE recovered is that of the LM with one MLP replaced, or all, by sums over earlier layers.
    """
    lm = make_with_head(WITH_HEAD["llama"][0])
    lm.save_pretrained(tmp_path / "lm")
    tokens.numpy().astype("uint16").tofile(tmp_path / "ids.bin")
    at = {"model": str(tmp_path / "lm"), "dataset": str(tmp_path / "ids.bin")}
    flags: dict[str, Any] = {**settings, **FLAGS, **at, "multi_topk": False, "save_best": True}
    summary = train(from_flags(TrainConfig, {**flags, "run_name": "a"}))
    folder = Path(settings["save_dir"]) / "a"
    assert call(monkeypatch, "evaluate", str(folder), "--out", str(tmp_path / "e.json")) == 0
    found = json.loads((tmp_path / "e.json").read_text())
    names = list(found["coders"])
    for name, figures in summary["hookpoints"].items():
        for figure in ("fvu", "l0", "cosine"):
            assert found["coders"][name][figure] == pytest.approx(figures[figure], rel=1e-5)
    coders = load_many(Path(summary["hookpoints"][names[0]]["path"]).parent)
    right = spliced_losses(lm, tokens[:16], coders)
    for name in names:
        said = found["coders"][name]["predictions"]["ce_spliced"]
        assert said == pytest.approx(right[name], rel=1e-4)
    assert found["all_at_once"]["ce_spliced"] == pytest.approx(right[""], rel=1e-4)
    best = {json.loads((folder / "best" / n / "fvu.json").read_text())["step"] for n in names}
    assert len(best) == 1
    page = tmp_path / "page.html"
    assert call(monkeypatch, "features", str(folder), "--latents", "3", "--out", str(page)) == 0
    data = re.search(r"<script[^>]*json[^>]*>(.*?)</script>", page.read_text(), re.S)
    assert data is not None
    first = json.loads(data[1])["coders"][0]["latents"][0]
    assert [name for name, _ in first["hookpoints"]] == names
    assert sum(share for _, share in first["hookpoints"]) == pytest.approx(1, abs=0.01)
    assert [name for name, _ in first["ahead"]] == names[1:]
    args = ("compare", str(folder), str(folder), "--out", str(tmp_path / "c.json"))
    assert call(monkeypatch, *args) == 0
    args = (*args[:3], "--dataset", at["dataset"], *args[3:])
    assert call(monkeypatch, *args) == 0
    assert call(monkeypatch, "threshold", str(folder)) == 0
    made_with = load_many(folder / "thresholds")
    assert torch.equal(
        made_with[names[1]].state_dict()["W_from.1"], coders[names[1]].state_dict()["W_from.1"]
    )
    path = str(Path(summary["hookpoints"][names[0]]["path"]).parent)
    tuned = {**flags, "finetune": path, "lr": 1e-9, "max_examples": 8, "save_best": False}
    again = train(from_flags(TrainConfig, {**tuned, "run_name": "b"}))
    for name in names:
        expected = summary["hookpoints"][name]["fvu"]
        assert again["hookpoints"][name]["fvu"] == pytest.approx(expected, rel=0.01)
    with pytest.raises(
        UsageError, match="goes with other layers there .layers.1.mlp, .*: see --cross"
    ):
        train(from_flags(TrainConfig, {**tuned, "cross_layer": 0, "run_name": "c"}))
    capsys.readouterr()
    hub = tmp_path / "hub"
    assert call(monkeypatch, "push", str(folder), "someone/coders", "--dry_run", str(hub)) == 0
    assert torch.equal(
        load_many(hub)[names[1]].state_dict()["W_from.1"], coders[names[1]].state_dict()["W_from.1"]
    )
    for command in ("evaluate", "features"):
        alone = (str(folder), "--hookpoint", names[1], "--out", str(tmp_path / "e2.json"))
        assert call(monkeypatch, command, *alone) == 2
        assert "take all of them, by load_many or without" in capsys.readouterr().err


def test_layers_are_kept_together_when_their_mean_is_lowest() -> None:
    """By seed, over the layers of all ranks, whatever else a name ends with."""
    fvu = {f"layers.{i}.mlp.seed{s}": 0.1 * i + s for i in (0, 1, 10) for s in (0, 7)}
    found = _of_stacks(fvu, ["layers.0.mlp", "layers.1.mlp", "layers.10.mlp"])
    for name, value in found.items():
        assert value == pytest.approx(1.1 / 3 + (7 if name.endswith("seed7") else 0))


@torch.no_grad()
def spliced_losses(lm: Any, ids: Tensor, coders: dict[str, SparseCoder]) -> dict[str, float]:
    """Cross-entropy with each coder's MLP replaced, and with all at once, by plain hooks."""
    base = lm.base_model
    found: dict[str, float] = {}
    for replaced in ([name] for name in coders):
        found[replaced[0]] = _loss(lm, base, ids, coders, replaced)
    return found | {"": _loss(lm, base, ids, coders, list(coders))}


def _loss(
    lm: Any, base: Any, ids: Tensor, coders: dict[str, SparseCoder], replaced: list[str]
) -> float:
    dense: list[Tensor] = []

    def hook(name: str, x: Tensor, y: Tensor) -> Tensor | None:
        p = coders[name].state_dict()
        rows = x.flatten(0, 1)
        f = rows @ p["encoder.weight"].T + p["encoder.bias"]
        kept = f.topk(coders[name].cfg.k)
        dense.append(torch.zeros_like(f).scatter(1, kept.indices, kept.values.relu()))
        if name not in replaced:
            return None
        here = len(dense) - 1
        out = p["b_dec"] + dense[here] @ p["W_dec"]
        for s in range(here):
            out = out + dense[s] @ p[f"W_from.{here - s}"]
        return out.view_as(y)

    handles = [
        base.get_submodule(n).register_forward_hook(lambda m, a, y, n=n: hook(n, a[0], y))
        for n in coders
    ]
    logits = lm(input_ids=ids).logits
    for handle in handles:
        handle.remove()
    return float(
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"transcode": False}, "--transcode False: --cross_layer all is for transcoders"),
        ({"multi_topk": True}, "--multi_topk True: --cross_layer all would need"),
        ({"matryoshka": (0.5, 0.5)}, "--matryoshka .*: --cross_layer all has no prefixes"),
        ({"loss_fn": "kl"}, "--loss_fn kl: --cross_layer all is trained on the FVU"),
        ({"exclude_norm": 2.0}, "--exclude_norm 2.0: --cross_layer all needs the same rows"),
        (
            {"distribute_modules": True, "ranks_per_coder": 2},
            "--ranks_per_coder 2: --cross_layer all has a coder of each layer",
        ),
        ({"rms_units": False}, "--rms_units False: --cross_layer all weighs its layers"),
        ({"cross_layer": -1}, "--cross_layer -1: must be at least 0"),
        ({"cross_layer": "some"}, "--cross_layer 'some': is not of the type"),
    ],
)
def test_flags_that_do_not_go_with_it_are_refused(flags: dict[str, Any], message: str) -> None:
    """Before anything is loaded, with the reason."""
    with pytest.raises(UsageError, match=message):
        from_flags(TrainConfig, {"cross_layer": "all", "transcode": True, **flags})


@pytest.mark.parametrize(
    ("hookpoints", "message"),
    [
        (
            ("layers.0.mlp",),
            "--cross_layer: takes the same module of several layers, in order, not layers.0",
        ),
        (("layers.0.mlp", "layers.1.self_attn"), "not layers.0.mlp, layers.1.self_attn: name them"),
    ],
)
def test_hookpoints_that_are_no_stack_are_refused(
    lm: PreTrainedModel,
    tokens: Tensor,
    settings: Settings,
    hookpoints: tuple[str, ...],
    message: str,
) -> None:
    """Latents write ahead in the order of layers, from one module of each."""
    flags = {**FLAGS, "hookpoints": hookpoints, "multi_topk": False}
    with pytest.raises(UsageError, match=message):
        run(lm, tokens, settings, run_name="r", **flags)


def test_layers_out_of_order_are_refused(tmp_path: Path) -> None:
    """Rows made elsewhere come in the order of their names, numbers as numbers."""
    pair = (torch.randn(16, 8), torch.randn(16, 8))
    rows = Rows([{name: pair for name in ("l.0", "l.10", "l.2")} for _ in range(40)])
    flags = {"save_dir": str(tmp_path), "run_name": "a", "log_with": "none", "k": 3}
    flags |= {"cross_layer": "all", "transcode": True, "num_latents": 32, "eval_tokens": 16}
    with pytest.raises(UsageError, match="in order, not l.0, l.10, l.2"):
        train(from_flags(TrainConfig, {**flags, "batch_size": 4}), activations=rows)

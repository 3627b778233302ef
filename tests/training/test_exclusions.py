"""Rows that a run leaves out are left out of all of it, and of what judges it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_runs import call
from conftest import tiny_lm
from datasets import Dataset
from torch import Tensor
from training_runs import first_batches, run
from transformers import PreTrainedModel

import train_sae
from sae import SparseCoder, UsageError
from sae.flag_checks import from_flags
from sae.judge.trained import CodersConfig, load_trained

HOOKPOINT = "layers.1"


@pytest.fixture(scope="module")
def with_sinks() -> PreTrainedModel:
    """An LM that gives the first position, and token 3 anywhere, rows far longer than others."""
    lm = tiny_lm()
    with torch.no_grad():
        lm.get_input_embeddings().weight[3] *= 300
    return lm


def with_few_sinks(tokens: Tensor) -> Tensor:
    """The tokens with one 3 in 128."""
    few = torch.where(tokens == 3, 4, tokens)
    few[::8, 5] = 3
    return few


def rows_of(lm: PreTrainedModel, tokens: Tensor) -> Tensor:
    """The rows of the hookpoint by a plain hook, [B S D]."""
    seen: list[Any] = []
    handle = lm.base_model.get_submodule(HOOKPOINT).register_forward_hook(
        lambda module, args, output: seen.append(output)
    )
    with torch.no_grad():
        lm.base_model(input_ids=tokens)
    handle.remove()
    return seen[0] if isinstance(seen[0], Tensor) else seen[0][0]


def saved(lm: PreTrainedModel, rows: dict[str, list[Any]], folder: Path) -> dict[str, str]:
    """The flags of a run on an LM and a data set that are saved in a folder."""
    lm.save_pretrained(folder / "lm")
    Dataset.from_dict(rows).save_to_disk(folder / "data")
    return {"model": str(folder / "lm"), "dataset": str(folder / "data")}


def evaluated(monkeypatch: pytest.MonkeyPatch, run_folder: Path) -> dict[str, Any]:
    """The figures that `evaluate` writes, by coder."""
    assert call(monkeypatch, "evaluate", str(run_folder)) == 0
    return json.loads((run_folder / "eval.json").read_text())["coders"]


def fvu(coder: SparseCoder, y: Tensor) -> float:
    with torch.no_grad():
        error = (coder(y).sae_out - y).double().square().sum()
    return float(error / (y - y.mean(0)).double().square().sum())


def test_long_rows_are_no_rows_in_training_and_evaluation(
    with_sinks: PreTrainedModel, tokens: Tensor, settings: dict[str, Any], tmp_path: Path
) -> None:
    """The limit is the factor times the first step's median norm; longer rows count nowhere."""
    flags = {**settings, "hookpoints": (HOOKPOINT,), "exclude_norm": 3.0, "exclude_positions": 2}
    summary = run(with_sinks, tokens, flags, run_name="r")
    first = rows_of(with_sinks, first_batches(tokens, 8))[:, 2:].flatten(0, 1).norm(dim=1)
    limit = 3.0 * float(first.median())
    saved = json.loads((tmp_path / "runs/r/norm_limits.json").read_text())
    assert saved == {HOOKPOINT: pytest.approx(limit, rel=1e-5)}
    held_out = rows_of(with_sinks, tokens[:16])[:, 2:].flatten(0, 1)
    kept = held_out[held_out.norm(dim=1) <= limit]
    assert 0.5 * len(held_out) < len(kept) < len(held_out)
    found = summary["hookpoints"][HOOKPOINT]
    coder = SparseCoder.load_from_disk(found["path"])
    assert found["fvu"] == pytest.approx(fvu(coder, kept), rel=1e-4)
    trained_on = rows_of(with_sinks, tokens[16:176])[:, 2:].flatten(0, 1)
    assert summary["tokens"] == int((trained_on.norm(dim=1) <= limit).sum())


def test_a_resumed_run_keeps_its_limit(
    with_sinks: PreTrainedModel, tokens: Tensor, settings: dict[str, Any], tmp_path: Path
) -> None:
    """The median is that of the start, not of what the resumed run sees first."""
    flags = {**settings, "hookpoints": (HOOKPOINT,), "exclude_norm": 2.0, "run_name": "r"}
    run(with_sinks, tokens, flags)
    file = tmp_path / "runs/r/norm_limits.json"
    file.write_text(json.dumps({HOOKPOINT: 1e9}))
    resumed = run(with_sinks, tokens, flags, resume=True)
    file.rename(file.with_name("elsewhere"))
    with pytest.raises(UsageError, match="--exclude_norm 2.0: .*lacks norm_limits.json"):
        run(with_sinks, tokens, flags, resume=True)
    file.with_name("elsewhere").rename(file)
    assert json.loads(file.read_text()) == {HOOKPOINT: 1e9}
    held_out = rows_of(with_sinks, tokens[:16]).flatten(0, 1)
    found = resumed["hookpoints"][HOOKPOINT]
    expected = fvu(SparseCoder.load_from_disk(found["path"]), held_out)  # all of them
    assert found["fvu"] == pytest.approx(expected, rel=1e-4)


def test_few_rows_with_most_of_the_variance_are_named(
    with_sinks: PreTrainedModel,
    tokens: Tensor,
    settings: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A line at the start says that FVU is of 1 % of the rows; without them there is none."""
    rare = with_few_sinks(tokens)
    flags = {**settings, "hookpoints": (HOOKPOINT,), "max_examples": 16}
    run(with_sinks, rare, flags, run_name="a")
    assert f"{HOOKPOINT}: 1 % of its rows hold " in capsys.readouterr().out
    run(with_sinks, rare, flags, run_name="b", exclude_norm=5.0)
    run(with_sinks, rare, flags, run_name="c", exclude_tokens=(3,))
    assert "of its rows hold" not in capsys.readouterr().out


def test_the_command_leaves_out_what_the_run_left_out(
    with_sinks: PreTrainedModel,
    tokens: Tensor,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`evaluate` gives the run's own FVU; of a run without limits it names the sinks."""
    rows = {"input_ids": with_few_sinks(tokens).tolist()}
    flags = {**settings, **saved(with_sinks, rows, tmp_path)}
    flags |= {"hookpoints": (HOOKPOINT,), "max_examples": 16, "exclude_positions": 1}
    for name, more in (("limited", {"exclude_norm": 3.0}), ("plain", {})):
        cfg = from_flags(train_sae.TrainConfig, {**flags, **more, "run_name": name})
        summary = train_sae.train(cfg)
        capsys.readouterr()
        found = evaluated(monkeypatch, tmp_path / "runs" / name)
        assert ("1 % of its rows hold" in capsys.readouterr().out) == (name == "plain")
        theirs = summary["hookpoints"][HOOKPOINT]["fvu"]
        assert found[HOOKPOINT]["fvu"] == pytest.approx(theirs, rel=1e-5)
    (tmp_path / "runs/limited/norm_limits.json").unlink()
    with pytest.raises(UsageError, match="--exclude_norm 3.0: .*lacks norm_limits.json"):
        load_trained(CodersConfig(str(tmp_path / "runs/limited")))


def test_heads_and_inputs_are_trained_on_and_judged(
    lm: PreTrainedModel,
    tokens: Tensor,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One coder per head of what enters a module; the commands find the same places again."""
    flags = {**settings, **saved(lm, {"input_ids": tokens.tolist()}, tmp_path)}
    flags |= {"hookpoints": ("layers.1.self_attn.o_proj:input",), "max_examples": 16, "k": 2}
    for name, per_head, widths in (("heads", True, [8] * 4), ("whole", False, [32])):
        cfg = from_flags(train_sae.TrainConfig, {**flags, "per_head": per_head, "run_name": name})
        summary = train_sae.train(cfg)
        coders = SparseCoder.load_many(tmp_path / "runs" / name)
        assert [coder.d_in for coder in coders.values()] == widths
        found = evaluated(monkeypatch, tmp_path / "runs" / name)
        for coder, figures in summary["hookpoints"].items():
            assert found[coder]["fvu"] == pytest.approx(figures["fvu"], rel=1e-5)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"hookpoints": ("layers.1.mlp:input",), "transcode": True}, "--transcode True: .*:input"),
        ({"hookpoints": ("layers.1.mlp:output",)}, "behind the colon"),
        ({"per_head": True}, "--per_head True: residual streams have no heads"),
        ({"hookpoints": ("layers.1.mlp",), "per_head": True}, "--per_head: layers.1.mlp passes"),
        ({"hookpoints": ("layers.1.mlp:input",), "per_head": True}, "--per_head: layers.1.mlp:in"),
        ({"hookpoints": ("layers.1.self_attn.o_proj:input:head4",)}, "has the heads 0 to 3"),
        ({"exclude_norm": 0.5}, "--exclude_norm 0.5: must be at least 1"),
        ({"exclude_positions": 16}, "--exclude_positions 16.*leaves no token"),
    ],
)
def test_what_leaves_nothing_is_refused(
    lm: PreTrainedModel, tokens: Tensor, settings: dict[str, Any], flags: dict[str, Any], said: str
) -> None:
    """Places and exclusions that mean nothing end in a line that names the flag."""
    with pytest.raises(UsageError, match=said):
        run(lm, tokens, settings, run_name="r", **flags)


def test_padding_is_no_row_in_training_evaluation_and_pages(
    lm: PreTrainedModel,
    tokens: Tensor,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of left-padded sequences only what is read is trained on, judged, counted and shown."""
    lengths = [5 + i % 12 for i in range(len(tokens))]
    pad, ids, mask = 63, [], []
    for row, length in zip(torch.where(tokens == 63, 62, tokens).tolist(), lengths, strict=True):
        ids.append([pad] * (16 - length) + row[:length])
        mask.append([0] * (16 - length) + [1] * length)
    flags = {**settings, **saved(lm, {"input_ids": ids, "attention_mask": mask}, tmp_path)}
    flags |= {"hookpoints": (HOOKPOINT,), "run_name": "r"}
    summary = train_sae.train(from_flags(train_sae.TrainConfig, flags))
    assert summary["tokens"] == sum(lengths[16:176])
    alone = [
        rows_of(lm, torch.tensor([row[16 - length :]]))[0]
        for row, length in zip(ids[:16], lengths, strict=False)
    ]
    found = summary["hookpoints"][HOOKPOINT]
    coder = SparseCoder.load_from_disk(found["path"])
    assert found["fvu"] == pytest.approx(fvu(coder, torch.cat(alone)), rel=1e-4)
    judged = evaluated(monkeypatch, tmp_path / "runs/r")
    assert judged[HOOKPOINT]["fvu"] == pytest.approx(found["fvu"], rel=1e-5)
    page = tmp_path / "page.html"
    assert call(monkeypatch, "features", str(tmp_path / "runs/r"), "--out", str(page)) == 0
    shown = page.read_text()
    # Without a tokenizer a token is shown by its number; the signs are escaped.
    assert "\\u003c62\\u003e" in shown and "\\u003c63\\u003e" not in shown
    assert f'"rows":{sum(lengths[:16])}' in shown

"""Laws of the figures that judge a coder, and of the command that prints them."""

import argparse
import dataclasses
import inspect
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from command_runs import call
from torch import Tensor
from training_runs import Settings, run, scalars
from transformers import PreTrainedModel

from sae import SaeConfig, SparseCoder, TranscoderConfig, UsageError
from sae.batch import TokenBatch
from sae.coders.bank import CoderBank
from sae.data.blocks import TokenBlocks
from sae.flag_checks import from_flags
from sae.judge.evaluate import EvaluateConfig, evaluate, table
from sae.judge.figures import Evaluation, held_out_figures
from sae.judge.trained import CodersConfig, load_trained
from sae.lm.capture import Capture
from sae.lm.rows import RowRule
from sae.placement.exchange import Exchange
from sae.placement.ranks import Ranks
from sae.training.state import TrainingState
from train_sae import TrainConfig, train

ROOT = Path(__file__).parents[2]
ALONE = Ranks(torch.device("cpu"), 1.0)


def identity(d: int, scale: float = 1.0, transcode: bool = False) -> SparseCoder:
    """A coder of 2d latents, x and -x, whose reconstruction is `scale` times its input."""
    kind = TranscoderConfig if transcode else SaeConfig
    coder = SparseCoder(d, kind(num_latents=2 * d, k=2 * d, normalize_decoder=False))
    both = torch.cat([torch.eye(d), -torch.eye(d)])
    coder.encoder.weight.data.copy_(both)
    assert coder.W_dec is not None
    coder.W_dec.data.copy_(scale * both)
    return coder


def judge(
    lm: PreTrainedModel, coders: dict[str, SparseCoder], tokens: Tensor, **kwargs: Any
) -> Evaluation:
    """Held-out figures of coders at hookpoints of their names, on all of `tokens`."""
    bank = CoderBank.holding(coders, {name: name for name in coders}, "cpu")
    source = TokenBlocks([tokens.flatten().numpy()], tokens.shape[1])
    exchange = Exchange(ALONE, dict.fromkeys(coders, 1), distributed=False)
    capture = Capture(lm, list(coders), inputs=bank.transcode, **kwargs)
    state = TrainingState(exchange, bank)
    return held_out_figures(capture, state, source, torch.arange(len(source)))


@pytest.mark.parametrize("hookpoint", ["layers.1", "layers.1.mlp"])
def test_the_identity_recovers_everything(
    causal_lm: PreTrainedModel, tokens: Tensor, hookpoint: str
) -> None:
    """FVU 0, cosine 1, CE recovered 1, KL 0 and full agreement for a coder that changes nothing."""
    found = judge(causal_lm, {hookpoint: identity(32)}, tokens[:6])
    figures, predicted = found.coders[hookpoint], found.coders[hookpoint].predictions
    assert predicted is not None and found.together == predicted
    assert figures.fvu == pytest.approx(0, abs=1e-9) and figures.nmse == figures.fvu
    assert figures.cosine == pytest.approx(1) and figures.l0 == pytest.approx(32)
    assert predicted.ce_recovered == pytest.approx(1, abs=1e-4)
    assert predicted.kl == pytest.approx(0, abs=1e-6) and predicted.top1_agreement == 1


def test_zeros_recover_nothing(causal_lm: PreTrainedModel, tokens: Tensor) -> None:
    """CE recovered is 0 against zero-ablation for a coder that returns zeros."""
    for coder in (identity(32, scale=0.0), identity(32, scale=0.0, transcode=True)):
        found = judge(causal_lm, {"layers.1": coder}, tokens[:6]).coders["layers.1"]
        assert found.predictions is not None
        assert found.predictions.ce_spliced == pytest.approx(found.predictions.ce_zero, abs=1e-9)
        assert found.predictions.ce_recovered == pytest.approx(0, abs=1e-9)
        assert found.cosine == 0


def test_figures_equal_their_definitions(causal_lm: PreTrainedModel, tokens: Tensor) -> None:
    """Every figure equals its definition, computed from whole logits and all rows at once."""
    hookpoint, text = "layers.1", tokens[:5]
    torch.manual_seed(0)
    coder = SparseCoder(32, SaeConfig(num_latents=64, k=4))
    found = judge(causal_lm, {hookpoint: coder}, text).coders[hookpoint]
    _, y = Capture(causal_lm, [hookpoint])(text)[hookpoint]
    with torch.no_grad():
        out = coder(y)
    error = (y - out.sae_out).double().square().sum(1)
    assert found.fvu == pytest.approx(float(error.sum() / (y - y.mean(0)).double().square().sum()))
    assert found.cosine == pytest.approx(
        float(F.cosine_similarity(y, out.sae_out).mean()), rel=1e-4
    )
    counts = torch.zeros(64).index_add_(
        0, out.top_indices.flatten(), (out.top_acts > 0).float().flatten()
    )
    assert found.l0 == pytest.approx(float(counts.sum() / len(y)))
    assert found.dead_share == pytest.approx(float((counts == 0).double().mean()))
    bins = [0] * 24
    for count in counts[counts > 0].tolist():
        bins[min(23, int((math.log10(count / len(y)) + 6) * 4))] += 1
    assert found.frequency_histogram == bins

    def logits(replacement: Tensor | None) -> Tensor:
        def hook(module: Any, args: Any, output: Any) -> Tensor:
            return output if replacement is None else replacement.view_as(output)

        handle = causal_lm.base_model.get_submodule(hookpoint).register_forward_hook(hook)
        with torch.no_grad():
            result = causal_lm(text).logits
        handle.remove()
        return result

    def ce(logits: Tensor) -> float:
        return float(F.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten()))

    clean, spliced = logits(None), logits(out.sae_out.detach())
    zero, mean = logits(torch.zeros_like(y)), logits(y.mean(0).expand_as(y).contiguous())
    p = found.predictions
    assert p is not None
    expected = [ce(x) for x in (clean, spliced, zero, mean)]
    assert [p.ce_clean, p.ce_spliced, p.ce_zero, p.ce_mean] == pytest.approx(expected, rel=1e-5)
    recovered = (expected[2] - expected[1]) / (expected[2] - expected[0])
    assert p.ce_recovered == pytest.approx(recovered, rel=1e-2)
    kl = F.kl_div(spliced.log_softmax(-1), clean.log_softmax(-1), log_target=True, reduction="none")
    assert p.kl == pytest.approx(float(kl.sum(-1).mean()), rel=1e-4)
    assert p.top1_agreement == pytest.approx(
        float((clean.argmax(-1) == spliced.argmax(-1)).double().mean())
    )


def test_hookpoints_are_judged_apart_and_all_at_once(
    causal_lm: PreTrainedModel, tokens: Tensor
) -> None:
    """Several hookpoints are judged apart and spliced together; the table has a line for each."""
    torch.manual_seed(0)
    coders = {f"layers.{i}": SparseCoder(32, SaeConfig(num_latents=64, k=4)) for i in range(3)}
    found = judge(causal_lm, coders, tokens[:6], rule=RowRule((5,)))
    assert found.together is not None and list(found.coders) == list(coders)
    kls = [f.predictions.kl for f in found.coders.values() if f.predictions]
    assert len(kls) == 3 and found.together.kl != pytest.approx(max(kls))
    lines = table(found).splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == [*coders, "all at once"]
    assert {"ce_recovered/layers.1", "kl/all", "fvu/layers.2"} <= found.scalars().keys()


def test_evaluation_during_training(
    causal_lm: PreTrainedModel, tokens: Tensor, settings: Settings
) -> None:
    """--eval_every logs every figure under eval/ at its steps and at the end."""
    flags = {"eval_every": 8, "layers": (1,), "log_with": "tensorboard"}
    summary = run(causal_lm, tokens, settings, run_name="r", **flags)
    points = scalars(Path(settings["save_dir"]) / "r")
    for figure in ("fvu", "nmse", "cosine", "l0", "dead_share", "ce_recovered", "kl", "ce_zero"):
        assert [step for step, _ in points[f"eval/{figure}/layers.1"]] == [8, 16, 20], figure
    last = summary["hookpoints"]["layers.1"]["predictions"]
    assert points["eval/kl/layers.1"][-1][1] == pytest.approx(last["kl"])
    assert summary["together"]["kl"] == last["kl"]


def test_evaluating_a_run_gives_the_runs_own_figures(
    causal_lm: PreTrainedModel, tokens: Tensor, settings: Settings, tmp_path: Path
) -> None:
    """A run's folder is all it needs; it gives the run's own figures, twice the same."""
    causal_lm.save_pretrained(tmp_path / "lm")
    tokens.numpy().astype("uint16").tofile(tmp_path / "ids.bin")
    names = {"model": str(tmp_path / "lm"), "dataset": str(tmp_path / "ids.bin")}
    flags = {**settings, **names, "init_seeds": (0, 1), "layers": (1,), "eval_every": 20}
    summary = train(from_flags(TrainConfig, {**flags, "run_name": "r"}))
    folder = str(Path(settings["save_dir"]) / "r")
    first, second = evaluate(EvaluateConfig(folder)), evaluate(EvaluateConfig(folder))
    assert first == second and first.together is None
    for name, figures in first.coders.items():
        expected = summary["hookpoints"][name]
        assert figures.fvu == pytest.approx(expected["fvu"], rel=1e-6)
        assert figures.predictions is not None
        assert figures.predictions.kl == pytest.approx(expected["predictions"]["kl"], rel=1e-5)
    step = summary["hookpoints"]["layers.1.seed0"]["path"]
    fewer = evaluate(EvaluateConfig(str(Path(step).parent), tokens=32))
    assert fewer.coders.keys() == first.coders.keys() and fewer != first
    with pytest.raises(UsageError, match="--tokens 1000000: there are 256 that the run held out"):
        evaluate(EvaluateConfig(folder, tokens=10**6))
    copied = tmp_path / "coders"
    Path(step).parent.rename(copied)
    with pytest.raises(UsageError, match="--model: .*name the model"):
        evaluate(EvaluateConfig(str(copied)))
    elsewhere = evaluate(EvaluateConfig(str(copied), **names, ctx_len=16, tokens=256))
    assert elsewhere.coders["layers.1.seed0"].fvu == pytest.approx(
        first.coders["layers.1.seed0"].fvu, rel=1e-6
    )


def test_evaluate_prints_a_table_and_writes_json(
    causal_lm: PreTrainedModel,
    tokens: Tensor,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """python -m sae evaluate RUN prints a table and writes eval.json into the folder."""
    causal_lm.save_pretrained(tmp_path / "lm")
    tokens.numpy().astype("uint16").tofile(tmp_path / "ids.bin")
    names = {"model": str(tmp_path / "lm"), "dataset": str(tmp_path / "ids.bin")}
    train(from_flags(TrainConfig, {**settings, **names, "run_name": "r"}))
    folder = Path(settings["save_dir"]) / "r"
    assert call(monkeypatch, "evaluate", str(folder)) == 0
    printed = capsys.readouterr().out
    written = json.loads((folder / "eval.json").read_text())
    assert written["of"] == {
        **names,
        **{"split": "train", "ctx_len": 16, "tokens": 256, "step": "step_20", "held_out": True},
    }
    assert list(written["coders"]) == ["layers.0", "layers.1", "layers.2"]
    for name, found in written["coders"].items():
        assert name in printed and f"{found['predictions']['kl']:.4f}" in printed
    assert f"{written['all_at_once']['kl']:.4f}" in printed.split("all at once")[1]
    (tmp_path / "other.bin").write_bytes((tmp_path / "ids.bin").read_bytes()[640:])
    other = ["--dataset", str(tmp_path / "other.bin"), "--tokens", "64"]
    assert call(monkeypatch, "evaluate", str(folder), *other) == 0
    assert json.loads((folder / "eval.json").read_text()) == written
    assert not json.loads((folder / "eval_other_text.json").read_text())["of"]["held_out"]
    for bad in (["--out", str(tmp_path)], ["--tokens", "-5"], ["--model", str(ROOT / "demo/lm")]):
        assert call(monkeypatch, "evaluate", str(folder), *bad) == 2
        assert "Traceback" not in capsys.readouterr().err


def test_all_that_the_lm_reads_is_on_its_device(
    causal_lm: PreTrainedModel,
    tokens: Tensor,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every batch that a command captures rows of was moved there first: on a GPU it must be."""
    causal_lm.save_pretrained(tmp_path / "lm")
    tokens.numpy().astype("uint16").tofile(tmp_path / "ids.bin")
    names = {"model": str(tmp_path / "lm"), "dataset": str(tmp_path / "ids.bin")}
    train(from_flags(TrainConfig, {**settings, **names, "run_name": "r", "layers": (1,)}))
    made, moved, read = (list[TokenBatch]() for _ in range(3))
    to, capture, batches = TokenBatch.to, Capture.__call__, TokenBlocks.batches

    def counted(self: TokenBlocks, *arguments: Any) -> Iterator[TokenBatch]:
        for batch in batches(self, *arguments):
            made.append(batch)
            yield batch

    def noted(batch: TokenBatch, device: torch.device) -> TokenBatch:
        moved.append(to(batch, device))
        return moved[-1]

    def captured(self: Capture, batch: TokenBatch) -> Any:
        read.append(batch)
        return capture(self, batch)

    monkeypatch.setattr(TokenBlocks, "batches", counted)
    monkeypatch.setattr(TokenBatch, "to", noted)
    monkeypatch.setattr(Capture, "__call__", captured)
    folder = str(Path(settings["save_dir"]) / "r")
    assert call(monkeypatch, "evaluate", folder) == 0
    assert call(monkeypatch, "features", folder, "--out", str(tmp_path / "page.html")) == 0
    of_data = {id(batch) for batch in made} & {id(batch) for batch in read}
    assert of_data and of_data <= {id(batch) for batch in moved}


def test_text_that_was_trained_on_is_never_judged_as_held_out(
    causal_lm: PreTrainedModel, tokens: Tensor, settings: Settings, tmp_path: Path
) -> None:
    """The run's data under another spelling, split or block length is still the run's data."""
    causal_lm.save_pretrained(tmp_path / "lm")
    tokens.numpy().astype("uint16").tofile(tmp_path / "ids.bin")
    names = {"model": str(tmp_path / "lm"), "dataset": str(tmp_path / "ids.bin")}
    train(from_flags(TrainConfig, {**settings, **names, "run_name": "r", "layers": (1,)}))
    run_folder = str(Path(settings["save_dir"]) / "r")
    (tmp_path / "copy.bin").write_bytes((tmp_path / "ids.bin").read_bytes())
    held = load_trained(CodersConfig(run_folder))
    assert held.held_out and len(held.blocks) == 16
    for given in (
        {"dataset": f"{tmp_path}/../{tmp_path.name}/ids.bin"},
        {"dataset": str(tmp_path / "copy.bin")},
        {"split": "test"},
    ):
        again = load_trained(CodersConfig(run_folder, **given))
        assert again.held_out and torch.equal(again.blocks, held.blocks), given
    longer = load_trained(CodersConfig(run_folder, ctx_len=32))
    assert longer.held_out and len(longer.blocks) == 8
    (tmp_path / "other.bin").write_bytes((tmp_path / "ids.bin").read_bytes()[640:])
    other = load_trained(CodersConfig(run_folder, dataset=str(tmp_path / "other.bin")))
    assert not other.held_out and len(other.blocks) == 16


def test_a_run_from_python_does_not_name_what_it_did_not_use(
    causal_lm: PreTrainedModel, tokens: Tensor, settings: Settings
) -> None:
    """Of an LM and data that were passed as objects, evaluating asks for the names."""
    run(causal_lm, tokens, settings, run_name="r")
    folder = Path(settings["save_dir"]) / "r"
    assert json.loads((folder / "run.json").read_text())["dataset"] is None
    with pytest.raises(UsageError, match="--model|--dataset"):
        load_trained(CodersConfig(str(folder)))
    with pytest.raises(UsageError, match="is one coder.*give .*step_20"):
        load_trained(CodersConfig(str(folder / "step_20/layers.1")))


def test_a_folder_may_hold_saes_and_transcoders(causal_lm: PreTrainedModel, tokens: Tensor) -> None:
    """Each coder of a mixed folder reads what it was made for."""
    coders = {"layers.1": identity(32), "layers.2.mlp": identity(32, transcode=True)}
    both = judge(causal_lm, coders, tokens[:6])
    for name, coder in coders.items():
        alone = judge(causal_lm, {name: coder}, tokens[:6])
        assert both.coders[name] == alone.coders[name], name


def test_kl_fine_tuning_raises_what_is_recovered(tmp_path: Path) -> None:
    """On the demo LM, a coder trained on FVU recovers more cross-entropy after some steps of KL."""
    text = [Path(module.__file__).read_text() for module in (inspect, argparse, dataclasses)]
    (tmp_path / "text.txt").write_text("\n".join(text))
    common: dict[str, Any] = {
        **{"model": str(ROOT / "demo/lm"), "dataset": str(tmp_path / "text.txt"), "layers": (3,)},
        **{"ctx_len": 64, "batch_size": 8, "expansion_factor": 2, "eval_tokens": 1024},
        **{"save_dir": str(tmp_path), "log_with": "none"},
    }
    train(from_flags(TrainConfig, {**common, "run_name": "fvu", "max_examples": 240}))
    tuned = {"loss_fn": "kl", "finetune": str(tmp_path / "fvu"), "optimizer": "adam"}
    tuned |= {"lr": 5e-4, "lr_warmup": 3, "run_name": "kl", "max_examples": 120}
    train(from_flags(TrainConfig, {**common, **tuned}))
    judged = [evaluate(EvaluateConfig(str(tmp_path / run))) for run in ("fvu", "kl")]
    before, after = (found.coders["layers.3"].predictions for found in judged)
    assert before is not None and after is not None
    assert after.ce_recovered > before.ce_recovered + 0.005 and after.kl < before.kl

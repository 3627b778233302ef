"""What a run of the real script's `train` does and leaves, on a tiny LM."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from training_runs import (
    LOSSES,
    Killed,
    Settings,
    assert_identical,
    die_in_forward,
    first_batches,
    on_training_forwards,
    run,
    scalars,
    training_state,
    weights,
)
from transformers import PreTrainedModel

import train_sae
from sae import SparseCoder, UsageError, load_many
from sae.batch import TokenBatch
from sae.data.blocks import TokenBlocks
from sae.lm.capture import Capture, Pairs
from sae.lm.rows import RowRule
from sae.placement.ranks import Ranks


def test_coders_start_from_the_means_of_the_first_step(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """b_dec is the mean of all targets of the first step; a transcoder's encoder is centered."""
    started: dict[str, dict[str, Tensor]] = {}

    class Bank(train_sae.CoderBank):
        def center_(self, *args: Any) -> None:
            super().center_(*args)
            started.update(
                {n: {k: p.clone() for k, p in c.state_dict().items()} for n, c in self.items()}
            )

    monkeypatch.setattr(train_sae, "CoderBank", Bank)
    die_in_forward(monkeypatch, 0)
    flags = {"grad_acc_steps": 2, "hookpoints": ("layers.0.mlp", "layers.1.mlp.down_proj")}
    with pytest.raises(Killed):
        run(lm, tokens, settings, run_name="t", transcode=True, exclude_tokens=(1, 2), **flags)
    capture = Capture(lm, list(flags["hookpoints"]), RowRule((1, 2)))
    for hookpoint, (x, y) in capture(first_batches(tokens, 16)).items():
        p = started[hookpoint]
        torch.testing.assert_close(p["b_dec"], y.mean(0))
        torch.testing.assert_close(p["encoder.bias"], -p["encoder.weight"] @ x.mean(0))
        assert p["W_dec"].shape == (p["encoder.weight"].shape[0], y.shape[1])
    started.clear()
    die_in_forward(monkeypatch, 0)
    with pytest.raises(Killed):
        run(lm, tokens, settings, run_name="s", **flags)
    capture = Capture(lm, list(flags["hookpoints"]))
    for hookpoint, (_, y) in capture(first_batches(tokens, 16)).items():
        torch.testing.assert_close(started[hookpoint]["b_dec"], y.mean(0))
        assert started[hookpoint]["encoder.bias"].count_nonzero() == 0


def test_tensorboard_has_every_metric_once_per_step(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All metrics at every step, the histogram and the arguments; after a resume no point twice."""
    flags = {**LOSSES, "log_with": "tensorboard", "layers": (0,), "save_every": 5}
    die_in_forward(monkeypatch, 7)
    with pytest.raises(Killed):
        run(lm, tokens, settings, run_name="r", hf_token="secret", **flags)
    monkeypatch.undo()
    time.sleep(1.1)  # event files of one second are read in the order of "10" before "9"
    summary = run(lm, tokens, settings, run_name="r", hf_token="secret", resume=True, **flags)
    folder = Path(settings["save_dir"]) / "r"
    points = scalars(folder)
    per_coder = ("fvu", "auxk", "multi_topk_fvu", "dead_share", "l0", "lr", "k", "grad_norm")
    names = [f"{m}/layers.0" for m in per_coder] + ["tokens", "tokens_per_second"]
    for name in names:
        assert [step for step, _ in points[name]] == list(range(1, 21)), name
    assert points["tokens"][-1][1] == summary["tokens"] == 20 * 8 * 16
    assert max(value for _, value in points["l0/layers.0"]) <= 4
    assert points["eval/fvu/layers.0"] == [
        (20, pytest.approx(summary["hookpoints"]["layers.0"]["fvu"]))
    ]
    reader = EventAccumulator(str(folder / "tensorboard"))
    reader.Reload()
    assert "log10_firing_frequency/layers.0" in reader.Tags()["histograms"]
    table = reader.Tensors("arguments/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| auxk_alpha | 0.03125 |" in table
    # The token is in no file of the run.
    assert not [f for f in folder.rglob("*") if f.is_file() and b"secret" in f.read_bytes()]


def test_every_coder_draws_its_own_weights(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings
) -> None:
    """Hookpoints and seeds differ at the start, and a coder does not depend on its company."""
    together = run(lm, tokens, settings, run_name="both", init_seeds=(0, 7), lr=1e-9)
    names = [f"layers.{i}.seed{s}" for i in range(3) for s in (0, 7)]
    assert sorted(together["hookpoints"]) == sorted(names)
    encoders = [weights(together)[f"{n}/encoder.weight"] for n in names]
    for i, a in enumerate(encoders):
        for b in encoders[:i]:
            assert (a - b).abs().max() > 0.01
    alone = run(lm, tokens, settings, run_name="alone", layers=(1,), lr=1e-9)
    a, b = weights(alone), weights(together)
    assert torch.equal(a["layers.1/encoder.weight"], b["layers.1.seed0/encoder.weight"])


def test_seeds_in_one_run_train_as_they_would_alone(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings
) -> None:
    """A coder trained beside another seed's equals the one trained alone, bit for bit."""
    both = run(lm, tokens, settings, run_name="both", init_seeds=(3, 4), layers=(1,))
    alone = run(lm, tokens, settings, run_name="alone", init_seeds=(4,), layers=(1,))
    a = {k.replace(".seed4", ""): v for k, v in weights(both).items() if ".seed4/" in k}
    assert_identical(a, weights(alone))


def test_summary_and_folder_are_what_other_programs_read(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings
) -> None:
    """summary.json has its keys, its paths load unit-norm coders, and no file is a pickle."""
    summary = run(lm, tokens, settings, run_name="r", save_every=6)
    folder = Path(settings["save_dir"]) / "r"
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert {"step", "tokens", "wall_seconds", "tokens_per_second", "hookpoints"} == summary.keys()
    assert [f.name for f in sorted(folder.glob("step_*"))] == ["step_18", "step_20"]
    newest = folder / "step_20"
    assert sorted(f.name for f in newest.iterdir() if f.is_dir()) == [
        f"layers.{i}" for i in range(3)
    ]
    for name, coder in load_many(folder).items():
        path = Path(summary["hookpoints"][name]["path"])
        assert path.is_absolute() and path == newest.resolve() / name
        assert coder.W_dec is not None
        assert (coder.W_dec.norm(dim=1) - 1).abs().max() < 1e-5
        assert json.loads((path / "cfg.json").read_text())["k"] == 4
    suffixes = {f.suffix for f in folder.rglob("*") if f.is_file()}
    assert suffixes <= {".json", ".safetensors", ".lock"}


def test_held_out_figures_are_those_of_the_saved_coder(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings
) -> None:
    """The FVU in the summary is what the saved files give on the held-out blocks."""
    summary = run(lm, tokens, settings, run_name="r", exclude_tokens=(0,))
    for name, figures in summary["hookpoints"].items():
        _, y = Capture(lm, [name], RowRule((0,)))(tokens[:16])[name]
        coder = SparseCoder.load_from_disk(figures["path"])
        assert figures["fvu"] == pytest.approx(coder(y).fvu.item(), rel=1e-5)
        l0 = (coder.encode(y).top_acts > 0).sum(1).float().mean().item()
        assert figures["l0"] == pytest.approx(l0)


def test_every_optimizer_lowers_the_held_out_fvu(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings
) -> None:
    """Each optimizer, SAE and transcoder, ends with a lower held-out FVU than it started with."""
    for transcode in (False, True):
        kind = {"transcode": transcode, "skip_connection": transcode, "batch_size": 2}
        flags = {**kind, "hookpoints": ("layers.1",)}
        untrained = run(lm, tokens, settings, run_name=f"untrained{transcode}", lr=1e-12, **flags)
        for optimizer in ("signum", "adam", "muon"):
            rate = {"signum": 0.02, "adam": 0.01, "muon": 0.03}[optimizer]
            name = f"{optimizer}{transcode}"
            summary = run(
                lm, tokens, settings, run_name=name, optimizer=optimizer, lr=rate, **flags
            )
            fvu = summary["hookpoints"]["layers.1"]["fvu"]
            assert fvu < 0.9 * untrained["hookpoints"]["layers.1"]["fvu"], name


@pytest.mark.parametrize("loss, alone", [("auxk_alpha", 0), ("auxk_alpha", 1), ("wake_alpha", 0)])
def test_dead_latents_are_revived(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings, loss: str, alone: int
) -> None:
    """By any of the losses for them fewer latents are dead at the end than by none."""
    flags = {"dead_feature_threshold": 400, "layers": (1,), "encoder_lr": 1.0, "lr": 0.02}
    flags |= {"adam_beta1": 0.9, "adam_beta2": 0.999, "lr_decay": 1.0, "rms_units": False}
    shares, none = [], {"auxk_alpha": 0.0, "wake_alpha": 0.0}
    for alpha in (0.0, 1.0):
        flags |= none | {loss: alpha, "auxk_alone": bool(alone)}
        summary = run(lm, tokens, settings, run_name=f"a{alpha}", **flags)
        shares.append(summary["hookpoints"]["layers.1"]["dead_share"])
    assert shares[1] < shares[0]


def test_finetune_starts_from_trained_coders(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings
) -> None:
    """--finetune copies the weights and keeps their b_dec; other shapes and kinds are refused."""
    first = run(lm, tokens, settings, run_name="first")
    source = str(Path(settings["save_dir"]) / "first")
    second = run(lm, tokens, settings, run_name="second", finetune=source, lr=1e-12)
    for key, tensor in weights(second).items():
        torch.testing.assert_close(tensor, weights(first)[key], rtol=0, atol=1e-6)
    for message, flags in {
        "layers.0 has": {"num_latents": 64},
        "is an SAE": {"transcode": True},
        r"layers\.0\.mlp": {"hookpoints": ("layers.0.mlp",)},
    }.items():
        with pytest.raises(UsageError, match=f"--finetune .*{message}"):
            run(lm, tokens, settings, run_name="third", finetune=source, **flags)
    with pytest.raises(UsageError, match="--finetune no-such/repo"):
        run(lm, tokens, settings, run_name="third", finetune="no-such/repo")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_steps_with_bad_numbers_are_skipped_up_to_a_limit(
    lm: PreTrainedModel,
    tokens: Tensor,
    settings: Settings,
    value: float,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Bad steps are skipped and named with their sequences, up to a limit; then all is saved."""
    bad = {7, 9, 12}

    def spoil(forward: int, pairs: Pairs) -> None:
        if forward in bad:
            pairs["layers.1"][1][3, 4] = value

    on_training_forwards(monkeypatch, spoil)
    logged = {"log_with": "tensorboard"}
    skipped = run(lm, tokens, settings, run_name="skipped", **logged)
    said = [line for line in capsys.readouterr().err.splitlines() if "no update" in line]
    steps = [re.search(r"step (\d+): \w+ at layers\.1 is (nan|inf|-inf): no", s) for s in said]
    assert [int(found[1]) for found in steps if found] == [8, 10, 13]
    order = TokenBlocks([tokens.flatten().numpy()], 16).order(range(16, 176), 42).tolist()
    made_of = [line.rpartition("sequences ")[2].split() for line in said]
    assert made_of == [[str(n) for n in order[step * 8 :][:8]] for step in sorted(bad)]
    assert skipped["tokens"] == 17 * 8 * 16
    counted = scalars(Path(settings["save_dir"]) / "skipped")["skipped_steps"]
    assert [value for _, value in counted] == [1, 2, 3]
    for name, tensor in training_state(skipped).items():
        assert tensor.isfinite().all(), name

    on_training_forwards(monkeypatch, spoil)
    with pytest.raises(UsageError, match=r"step 10: .*more than --max_bad_steps 1; .*as step 10"):
        run(lm, tokens, settings, run_name="r", max_bad_steps=1)
    monkeypatch.undo()
    resumed = run(lm, tokens, settings, run_name="r", resume=True)
    assert resumed["tokens"] == 18 * 8 * 16
    for name, tensor in training_state(resumed).items():
        assert tensor.isfinite().all(), name


def test_bad_steps_of_one_batch_count_as_one(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a batch dealt to four steps all may be bad and the run goes on; two such end it."""
    bad = {0, 1, 2, 3}  # each of a batch's four forwards has a part for each step

    def spoil(forward: int, pairs: Pairs) -> None:
        if forward in bad:
            pairs["layers.1"][1][0] = torch.nan

    dealt = {"grad_acc_steps": 4, "steps_per_batch": 4, "max_bad_steps": 1}
    on_training_forwards(monkeypatch, spoil)
    done = run(lm, tokens, settings, run_name="one", **dealt, log_with="tensorboard")
    counted = scalars(Path(settings["save_dir"]) / "one")["skipped_steps"]
    assert [value for _, value in counted] == [1, 2, 3, 4] and done["step"] == 20
    bad |= {16}
    on_training_forwards(monkeypatch, spoil)
    with pytest.raises(UsageError, match=r"step 5: .*5 bad steps .*more than --max_bad_steps 1"):
        run(lm, tokens, settings, run_name="two", **dealt)


def test_bad_activations_at_the_start_are_refused(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Coders do not start from means that are NaN."""

    capture = Capture.__call__

    def spoiled(self: Capture, tokens: Tensor) -> Pairs:
        pairs = capture(self, tokens)
        pairs["layers.1"][1][3, 4] = float("nan")
        return pairs

    monkeypatch.setattr(Capture, "__call__", spoiled)
    with pytest.raises(UsageError, match=r"activations at layers\.1 hold NaN or Inf in the first"):
        run(lm, tokens, settings, run_name="r")


def test_a_first_step_without_a_row_is_refused(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings
) -> None:
    """Forwards without a row are fine, a first step without a row is refused."""
    rare = tokens.clone()
    rare[rare == 7] = 8
    for block in range(0, 200, 8):
        rare[block, 1 + block // 8 % 15] = 7
    every = tuple(i for i in range(64) if i != 7)
    with pytest.raises(UsageError, match="--exclude_tokens .*leaves no token"):
        run(lm, tokens, settings, run_name="none", exclude_tokens=tuple(range(64)))
    flags = {"batch_size": 1, "grad_acc_steps": 160, "auxk_alpha": 1.0, "multi_topk": True}
    summary = run(lm, rare, settings, run_name="few", exclude_tokens=every, **flags)
    assert summary["tokens"] == (rare[16:176] == 7).sum()


def test_less_common_flags_train_to_a_finite_fvu(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings
) -> None:
    """Annealed k, groupmax and bfloat16 train to a finite FVU; the saved k is the flag's."""
    for name, flags in {
        "decay": {"k_decay_steps": 10},
        "groupmax": {"activation": "groupmax", "multi_topk": True},
        "bf16": {"mixed_precision": "bf16"},
        "unnormed": {"normalize_decoder": False},
    }.items():
        summary = run(lm, tokens, settings, run_name=name, **flags)
        for figures in summary["hookpoints"].values():
            assert 0 < figures["fvu"] < 2
            assert json.loads((Path(figures["path"]) / "cfg.json").read_text())["k"] == 4


def test_what_is_fetched_or_read_is_so_by_one_rank_first(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of the LM and tokens come by turns, which no timeout of a collective ends."""
    in_turn: list[str] = []
    main_first = Ranks.main_first

    def watched(ranks: Ranks, work: Any, *arguments: Any) -> Any:
        in_turn.append(getattr(work, "func", work).__name__)
        return main_first(ranks, work, *arguments)

    monkeypatch.setattr(Ranks, "main_first", watched)
    run(lm, tokens, settings, run_name="r", max_examples=16)
    assert in_turn == ["fetch_weights", "load_tokens"]


def test_kernels_torch_leaves_linear_layers_to_pytorch(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --kernels torch the LM's linear layers are PyTorch's own, otherwise the faster ones."""
    used: set[bool] = set()
    capture = Capture.__call__

    def noted(self: Capture, tokens: Tensor) -> Pairs:
        if TokenBatch.of(tokens).ids.shape == (8, 16):
            used.add(self.fast_linear)
        return capture(self, tokens)

    monkeypatch.setattr(Capture, "__call__", noted)
    for choice, expected in (("torch", False), ("auto", True)):
        used.clear()
        run(lm, tokens, settings, run_name=choice, kernels=choice, layers=(0,), max_examples=16)
        assert used == {expected}


def test_auxk_of_weight_0_is_not_computed(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where dead latents are woken alone, no forward is told of them."""
    told, woken = [], []
    errors, wake = SparseCoder.errors, train_sae.wake_dead_

    def noted(coder: SparseCoder, *args: Any, **kwargs: Any) -> Any:
        told.extend(args[2:3])
        return errors(coder, *args, **kwargs)

    def noted_too(coder: SparseCoder, dead: Tensor | None, *args: Any) -> None:
        woken.append(dead)
        wake(coder, dead, *args)

    monkeypatch.setattr(SparseCoder, "errors", noted)
    monkeypatch.setattr(train_sae, "wake_dead_", noted_too)
    flags = {"layers": (1,), "dead_feature_threshold": 50, "auxk_alpha": 0.0}
    run(lm, tokens, settings, run_name="a", **flags)
    assert told and all(dead is None for dead in told)
    assert any(dead is not None for dead in woken)

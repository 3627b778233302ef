"""Laws of the training run, on the real script's `train` with a tiny LM."""

import json
import re
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import LOSSES, Killed, Settings, assert_identical, run, training_state, weights
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import PreTrainedModel

import train_sae
from sae import SparseCoder, UsageError, load_many
from sae.bank import CoderBank
from sae.blocks import TokenBlocks
from sae.config import SparseCoderConfig
from sae.functional import Moments
from sae.hookpoints import capture
from sae.optim import finish_gradients_
from train_sae import TrainConfig


def first_batches(tokens: Tensor, count: int, seed: int = 42) -> Tensor:
    """The blocks that the first optimizer step of `settings` consumes."""
    generator = torch.Generator().manual_seed(seed)
    return tokens[16 + torch.randperm(160, generator=generator)[:count]]


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_one_denominator(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings, optimizer: str
) -> None:
    """Accumulated = micro-batched = whole, for all losses, over a whole trajectory."""
    flags = {**LOSSES, "optimizer": optimizer, "layers": (0, 2), "exclude_tokens": (5,)}
    whole = run(lm, tokens, settings, run_name="whole", **flags)
    shapes = {
        "accumulated": {"batch_size": 2, "grad_acc_steps": 4},
        "micro": {"micro_acc_steps": 3},
        "both": {"batch_size": 4, "grad_acc_steps": 2, "micro_acc_steps": 2},
    }
    for name, shape in shapes.items():
        other = run(lm, tokens, settings, run_name=name, **flags, **shape)
        assert other["step"] == whole["step"] == 20
        assert other["tokens"] == whole["tokens"]
        for place, figures in other["hookpoints"].items():
            # Muon orthogonalises in bfloat16, which turns rounding into visible differences.
            close = {"rel": 1e-5} if optimizer == "adam" else {"rel": 1e-2}
            assert figures["fvu"] == pytest.approx(whole["hookpoints"][place]["fvu"], **close)
        for key, tensor in weights(other).items() if optimizer == "adam" else ():
            torch.testing.assert_close(tensor, weights(whole)[key], rtol=2e-3, atol=2e-4)


def test_coders_start_from_the_first_step_data(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """b_dec is the mean of all targets of the first step; a transcoder's encoder is centred."""
    started: dict[str, dict[str, Tensor]] = {}

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise Killed

    class Bank(train_sae.CoderBank):
        def center_(self, *args: Any) -> None:
            super().center_(*args)
            started.update(
                {n: {k: p.clone() for k, p in c.state_dict().items()} for n, c in self.items()}
            )

    monkeypatch.setattr(train_sae, "CoderBank", Bank)
    monkeypatch.setattr(train_sae, "capture", stop)
    flags = {"grad_acc_steps": 2, "hookpoints": ("layers.0.mlp", "layers.1.mlp.down_proj")}
    with pytest.raises(Killed):
        run(lm, tokens, settings, run_name="t", transcode=True, exclude_tokens=(1, 2), **flags)
    rows = capture(lm, first_batches(tokens, 16), list(flags["hookpoints"]), (1, 2))
    for place, (x, y) in rows.items():
        p = started[place]
        torch.testing.assert_close(p["b_dec"], y.mean(0))
        torch.testing.assert_close(p["encoder.bias"], -p["encoder.weight"] @ x.mean(0))
        assert p["W_dec"].shape == (p["encoder.weight"].shape[0], y.shape[1])
    started.clear()
    with pytest.raises(Killed):
        run(lm, tokens, settings, run_name="s", **flags)
    rows = capture(lm, first_batches(tokens, 16), list(flags["hookpoints"]))
    for place, (_, y) in rows.items():
        torch.testing.assert_close(started[place]["b_dec"], y.mean(0))
        assert started[place]["encoder.bias"].count_nonzero() == 0


def test_first_logged_step_is_the_definition_over_all_its_rows(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings
) -> None:
    """FVU and gradient norm of a step in six pieces equal those of all its rows at once."""
    flags = {"batch_size": 4, "grad_acc_steps": 3, "micro_acc_steps": 2, "layers": (1,)}
    run(lm, tokens, settings, run_name="r", log_with="tensorboard", multi_topk=True, **flags)
    logged = scalars(Path(settings["save_dir"]) / "r")
    _, y = capture(lm, first_batches(tokens, 12), ["layers.1"])["layers.1"]
    shape = SparseCoderConfig.of(TrainConfig(**settings, multi_topk=True))
    coder = CoderBank(train_sae.measure(lm, ["layers.1"]), shape, (0,), "cpu")["layers.1"]
    moments = Moments.of(y)
    coder.center_(moments.mean, moments.mean)
    out = coder(y)
    (out.fvu + out.multi_topk_fvu / 8).backward()
    norm = finish_gradients_(coder, torch.tensor(1.0))
    for name, expected in (
        ("fvu", out.fvu),
        ("multi_topk_fvu", out.multi_topk_fvu),
        ("grad_norm", norm),
    ):
        first = logged[f"{name}/layers.1"][0][1]
        assert first == pytest.approx(expected.item(), rel=1e-4), name


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) points by name, read back through TensorBoard's own reader."""
    reader = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    return {n: [(e.step, e.value) for e in reader.Scalars(n)] for n in reader.Tags()["scalars"]}


def test_tensorboard_has_every_metric_once_per_step(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All metrics at every step, the histogram and the arguments; after a resume no point twice."""
    flags = {**LOSSES, "log_with": "tensorboard", "layers": (0,), "save_every": 5}
    forwards = count()

    def dying(*args: Any, **kwargs: Any) -> Any:
        if next(forwards) == 7:
            raise Killed
        return capture(*args, **kwargs)

    monkeypatch.setattr(train_sae, "capture", dying)
    with pytest.raises(Killed):
        run(lm, tokens, settings, run_name="r", hf_token="secret", **flags)
    monkeypatch.undo()
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


def test_seeds_train_side_by_side(lm: PreTrainedModel, tokens: Tensor, settings: Settings) -> None:
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


def test_held_out_fvu_is_of_the_saved_coder(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings
) -> None:
    """The FVU in the summary is what the saved files give on the held-out blocks."""
    summary = run(lm, tokens, settings, run_name="r", exclude_tokens=(0,))
    for name, figures in summary["hookpoints"].items():
        _, y = capture(lm, tokens[:16], [name], (0,))[name]
        coder = SparseCoder.load_from_disk(figures["path"])
        assert figures["fvu"] == pytest.approx(coder(y).fvu.item(), rel=1e-5)
        l0 = (coder.encode(y).top_acts > 0).sum(1).float().mean().item()
        assert figures["l0"] == pytest.approx(l0)


def test_training_learns(lm: PreTrainedModel, tokens: Tensor, settings: Settings) -> None:
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


def test_auxk_revives_dead_latents(lm: PreTrainedModel, tokens: Tensor, settings: Settings) -> None:
    """With AuxK fewer latents are dead at the end than without."""
    flags = {"dead_feature_threshold": 400, "layers": (1,), "optimizer": "adam", "lr": 0.02}
    shares = []
    for alpha in (0.0, 1.0):
        summary = run(lm, tokens, settings, run_name=f"a{alpha}", auxk_alpha=alpha, **flags)
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
def test_bad_numbers_stop_the_run_and_lose_nothing(
    lm: PreTrainedModel,
    tokens: Tensor,
    settings: Settings,
    value: float,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Bad steps are skipped and named with their sequences, up to a limit; then all is saved."""
    seen, bad = count(), {7, 9, 12}

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        rows = capture(*args, **kwargs)
        if next(seen) in bad:
            rows["layers.1"][1][3, 4] = value
        return rows

    monkeypatch.setattr(train_sae, "capture", spoiled)
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

    seen = count()
    with pytest.raises(UsageError, match=r"step 10: .*more than --max_bad_steps 1; .*as step 10"):
        run(lm, tokens, settings, run_name="r", max_bad_steps=1)
    monkeypatch.undo()
    resumed = run(lm, tokens, settings, run_name="r", resume=True)
    assert resumed["tokens"] == 18 * 8 * 16
    for name, tensor in training_state(resumed).items():
        assert tensor.isfinite().all(), name


def test_bad_activations_at_the_start_are_refused(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Coders do not start from means that are NaN."""

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        rows = capture(*args, **kwargs)
        rows["layers.1"][1][3, 4] = float("nan")
        return rows

    monkeypatch.setattr("sae.evaluate.capture", spoiled)
    with pytest.raises(UsageError, match=r"activations at layers\.1 hold NaN or Inf in the first"):
        run(lm, tokens, settings, run_name="r")


def test_excluding_every_token_is_refused(
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


def test_k_decay_and_groupmax_and_bfloat16_run(
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

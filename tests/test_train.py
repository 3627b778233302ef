"""Laws of the training run, on the real script's `train` with a tiny LM."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import PreTrainedModel

import train_sae
from sae import SparseCoder, UsageError, load_many
from sae.bank import CoderBank
from sae.checkpoint import checkpoints, keep_best
from sae.evaluate import HeldOut
from sae.functional import Moments
from sae.hookpoints import Hookpoint, capture
from sae.optim import CoderOptimizer, finish_gradients_
from train_sae import TrainConfig, train

Settings = dict[str, Any]


def run(lm: PreTrainedModel, tokens: Tensor, settings: Settings, **flags: Any) -> dict[str, Any]:
    return train(TrainConfig(**{**settings, **flags}), lm=lm, dataset=tokens)


def weights(summary: dict[str, Any]) -> dict[str, Tensor]:
    """Every saved tensor of every coder of a run."""
    found = {}
    for name, figures in summary["hookpoints"].items():
        for key, tensor in load_file(Path(figures["path"]) / "sae.safetensors").items():
            found[f"{name}/{key}"] = tensor
    return found


def training_state(summary: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor that resuming would start from."""
    found = {}
    for name, figures in summary["hookpoints"].items():
        for key, tensor in load_file(Path(figures["path"]) / "resume.safetensors").items():
            found[f"{name}/{key}"] = tensor
    return found


def assert_identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [n for n in a if not torch.equal(a[n], b[n])] == []


def first_batches(tokens: Tensor, count: int, seed: int = 42) -> Tensor:
    """The blocks that the first optimizer step of `settings` consumes."""
    generator = torch.Generator().manual_seed(seed)
    return tokens[16 + torch.randperm(160, generator=generator)[:count]]


LOSSES = {"auxk_alpha": 1 / 32, "dead_feature_threshold": 300, "multi_topk": True}


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


class Killed(BaseException):
    """Stands for a SIGKILL: nothing catches it."""


@pytest.mark.parametrize("optimizer", ["signum", "adam", "muon"])
def test_resume_is_invisible(
    lm: PreTrainedModel,
    tokens: Tensor,
    settings: Settings,
    optimizer: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """20 steps = killed in step 13, resumed from 10: weights, moments and counters bit for bit."""
    flags = {
        **LOSSES,
        "optimizer": optimizer,
        "save_every": 5,
        "k_decay_steps": 15,
        "grad_acc_steps": 2,
        "batch_size": 4,
        "save_best": True,
    }
    straight = run(lm, tokens, settings, run_name="straight", **flags)
    forwards = 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal forwards
        forwards += 1
        if forwards == 26:  # the second forward of step 13
            raise Killed
        return capture(*args, **kwargs)

    monkeypatch.setattr(train_sae, "capture", dying)
    with pytest.raises(Killed):
        run(lm, tokens, settings, run_name="broken", **flags)
    monkeypatch.undo()
    resumed = run(lm, tokens, settings, run_name="broken", resume=True, **flags)
    assert resumed["step"] == 20 and resumed["tokens"] == straight["tokens"]
    assert_identical(weights(resumed), weights(straight))
    assert_identical(training_state(resumed), training_state(straight))
    for name, figures in resumed["hookpoints"].items():
        assert figures["fvu"] == straight["hookpoints"][name]["fvu"]
    best = Path(settings["save_dir"])
    for path in (best / "straight" / "best").rglob("*.safetensors"):
        other = best / "broken" / "best" / path.relative_to(best / "straight" / "best")
        assert path.read_bytes() == other.read_bytes()


def test_resuming_a_finished_run_changes_nothing(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings
) -> None:
    """--resume after the last step gives the same summary and weights."""
    done = run(lm, tokens, settings, run_name="done")
    again = run(lm, tokens, settings, run_name="done", resume=True)
    assert_identical(weights(again), weights(done))
    assert again["hookpoints"] == done["hookpoints"] and again["tokens"] == done["tokens"]


def test_resume_refuses_other_flags(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings
) -> None:
    """A flag that would change the run is named; one that cannot is free."""
    run(lm, tokens, settings, run_name="r")
    with pytest.raises(UsageError, match="--k is 5 now and was 4"):
        run(lm, tokens, settings, run_name="r", resume=True, **{"k": 5})
    run(lm, tokens, settings, run_name="r", resume=True, save_every=3, log_every=7)
    with pytest.raises(UsageError, match="--resume: .*holds no whole checkpoint"):
        run(lm, tokens, settings, run_name="other", resume=True)
    with pytest.raises(UsageError, match="already holds a run; add --resume"):
        run(lm, tokens, settings, run_name="r")


def test_coders_start_from_the_first_step_data(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """b_dec is the mean of all targets of the first step; a transcoder's encoder is centred."""
    started: dict[str, dict[str, Tensor]] = {}

    def stop(lm: Any, tokens: Any, places: Any, exclude: Any) -> Any:
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
    shape = TrainConfig(**settings, multi_topk=True).coder
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
    forwards: Iterator[int] = iter(range(1000))

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
    assert suffixes <= {".json", ".safetensors"}


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


def test_save_best_keeps_the_lowest_held_out_fvu(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings, tmp_path: Path
) -> None:
    """best/ holds each coder as it was where its own held-out FVU was lowest."""
    run(lm, tokens, settings, run_name="r", save_best=True, save_every=4)
    best = Path(settings["save_dir"]) / "r" / "best"
    assert [f.name for f in sorted(best.iterdir())] == [f"layers.{i}" for i in range(3)]
    for name, coder in load_many(best).items():
        record = json.loads((best / name / "fvu.json").read_text())
        _, y = capture(lm, tokens[:16], [name])[name]
        assert record["fvu"] == pytest.approx(coder(y).fvu.item(), rel=1e-5)
        assert record["step"] % 4 == 0

    places = [Hookpoint(name, 8, 8) for name in ("a", "b")]
    bank = CoderBank(places, TrainConfig(**settings).coder, (0,), "cpu")
    optimizers = {name: CoderOptimizer(coder, "adam") for name, coder in bank.items()}
    for step, fvus in ((1, (0.5, 0.5)), (2, (0.6, 0.4)), (3, (0.5, 0.3))):
        for _, coder in bank.items():
            coder.b_dec.data.fill_(step)
        figures = {n: HeldOut(fvu, 4.0) for n, fvu in zip("ab", fvus, strict=True)}
        keep_best(tmp_path, step, figures, bank, optimizers)
    kept = load_many(tmp_path / "best")
    assert kept["a"].b_dec[0] == 1 and kept["b"].b_dec[0] == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_numbers_stop_the_run_and_lose_nothing(
    lm: PreTrainedModel,
    tokens: Tensor,
    settings: Settings,
    value: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """NaN or Inf in activations ends the run before the update and names the place."""
    seen: Iterator[int] = iter(range(1000))

    def spoiled(*args: Any, **kwargs: Any) -> Any:
        rows = capture(*args, **kwargs)
        if next(seen) == 7:
            rows["layers.1"][1][3, 4] = value
        return rows

    monkeypatch.setattr(train_sae, "capture", spoiled)
    with pytest.raises(UsageError, match=r"step 7: \w+ at layers\.1 is (nan|inf|-inf).*checkpoint"):
        run(lm, tokens, settings, run_name="r", save_every=5)
    monkeypatch.undo()
    for name, tensor in weights(
        run(lm, tokens, settings, run_name="r", save_every=5, resume=True)
    ).items():
        assert tensor.isfinite().all(), name


def test_a_killed_save_leaves_the_previous_checkpoint(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the middle of writing, a run resumes from the save before and ends the same."""
    straight = run(lm, tokens, settings, run_name="straight", save_every=5)
    save = SparseCoder.save_to_disk
    calls: Iterator[int] = iter(range(1000))

    def dying(self: SparseCoder, path: Path) -> None:
        if next(calls) == 4:  # the second coder of the second checkpoint
            (path / "half").parent.mkdir(parents=True, exist_ok=True)
            (path / "sae.safetensors").write_bytes(b"half")
            raise Killed
        save(self, path)

    monkeypatch.setattr(SparseCoder, "save_to_disk", dying)
    with pytest.raises(Killed):
        run(lm, tokens, settings, run_name="r", save_every=5)
    monkeypatch.undo()
    folder = Path(settings["save_dir"]) / "r"
    assert [f.name for f in folder.glob("step_*") if f.suffix == ""] == ["step_5"]
    assert list(load_many(folder)) == [f"layers.{i}" for i in range(3)]
    resumed = run(lm, tokens, settings, run_name="r", save_every=5, resume=True)
    assert_identical(training_state(resumed), training_state(straight))


def test_damaged_checkpoints_are_passed_over(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings, capsys: pytest.CaptureFixture
) -> None:
    """A flipped bit, a missing file or a broken manifest is named and the older checkpoint used."""
    straight = run(lm, tokens, settings, run_name="r", save_every=10)
    folder = Path(settings["save_dir"]) / "r"
    shutil.copytree(folder, folder.parent / "kept")
    victim = Path("step_20/layers.1/resume.safetensors")

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    damages = {
        "is damaged": lambda: flip(folder / victim),
        "is missing": lambda: (folder / victim).unlink(),
        "cannot be read": lambda: (folder / "step_20/manifest.json").write_text("{"),
        "has format 99": lambda: (folder / "step_20/manifest.json").write_text('{"format": 99}'),
        "outside the checkpoint": lambda: (folder / "step_20/manifest.json").write_text(
            '{"format": 1, "sha256": {"../config.json": "0"}}'
        ),
    }
    for message, damage in damages.items():
        shutil.rmtree(folder)
        shutil.copytree(folder.parent / "kept", folder)
        damage()
        resumed = run(lm, tokens, settings, run_name="r", save_every=10, resume=True)
        printed = capsys.readouterr().out
        assert message in printed and "step_20" in printed, message
        assert_identical(training_state(resumed), training_state(straight))
    flip(folder / victim)
    flip(folder / "step_10/layers.0/sae.safetensors")
    with pytest.raises(UsageError, match="no checkpoint in .* can be used.*step_20.*step_10"):
        run(lm, tokens, settings, run_name="r", save_every=10, resume=True)


def test_unwritable_save_dir(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings, tmp_path: Path
) -> None:
    """A folder that cannot be made is named before anything is loaded."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--save_dir .*cannot be written"):
        run(lm, tokens, {**settings, "save_dir": str(tmp_path / "file")})


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


def test_resume_after_sigkill_of_the_script(tmp_path: Path, tokens: Tensor) -> None:
    """The real script, killed by SIGKILL after a save and resumed, ends in the same bits."""
    lm = Path(__file__).parent.parent / "demo" / "lm"
    tokens.numpy().astype("uint16").tofile(tmp_path / "ids.bin")

    def command(name: str, *more: str) -> list[str]:
        script = str(Path(__file__).parent.parent / "train_sae.py")
        flags = "--layers 0 --ctx_len 16 --batch_size 4 --num_latents 64 --k 4 --save_every 3"
        data = [str(lm), str(tmp_path / "ids.bin"), "--save_dir", str(tmp_path), "--run_name", name]
        return [sys.executable, script, *data, *flags.split(), "--log_with", "none", *more]

    subprocess.run(command("straight"), check=True, capture_output=True)
    killed = subprocess.Popen(
        command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not checkpoints(tmp_path / "killed") and killed.poll() is None:
        pass
    killed.kill()
    killed.wait()
    subprocess.run(command("killed", "--resume"), check=True, capture_output=True)
    for file in ("sae.safetensors", "resume.safetensors"):
        a, b = (
            next((tmp_path / n).glob(f"step_45/layers.0/{file}")) for n in ("straight", "killed")
        )
        assert a.read_bytes() == b.read_bytes()

"""Files of dictionary_learning, and that no pickle is opened without being asked for."""

import json
import re
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch
from command_runs import call
from other_programs import (
    JUMPRELU,
    KINDS,
    assert_same_coder,
    assert_same_function,
    dictionary_learning,
    random_coder,
    save_run,
)

from sae import SaeConfig, SparseCoder, TranscoderConfig, UsageError, load_many


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_the_same_function_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Names, shapes and types are AutoEncoderTopK's; a forward by hand agrees, and back too."""
    coder = random_coder(KINDS[kind])
    run, out = save_run(tmp_path / "run", {"layers.3": coder}), tmp_path / "out"
    (run / "run.json").write_text(json.dumps({"model": "org/lm", "dataset": "x", "ctx_len": 64}))
    flags = ("--to", "dictionary_learning", "--out", str(out))
    assert call(monkeypatch, "export", str(run), *flags) == 0
    folder = out / "layers.3"
    assert {f.name for f in folder.iterdir()} == {"ae.pt", "config.json"}
    found = torch.load(folder / "ae.pt", weights_only=True)
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in found.items()}
    f32 = torch.float32
    assert shapes == {
        "encoder.weight": ((24, 8), f32),
        "encoder.bias": ((24,), f32),
        "decoder.weight": ((8, 24), f32),
        "b_dec": ((8,), f32),
        "k": ((), torch.int32),
        "threshold": ((), f32),
    }
    assert float(found["threshold"]) == -1  # it selects by k until a threshold is set
    config = json.loads((folder / "config.json").read_text())
    trainer = config["trainer"]
    expected = {"dict_class": "AutoEncoderTopK", "trainer_class": "TopKTrainer", "k": 3}
    expected |= {"activation_dim": 8, "dict_size": 24, "layer": 3, "lm_name": "org/lm"}
    assert config["buffer"]["ctx_len"] == 64
    assert {name: trainer[name] for name in expected} == expected and "ctx_len" in config["buffer"]
    assert_same_function(coder, dictionary_learning(trainer, found))
    back = load_many(out, allow_pt=True)["layers.3"]
    if kind == "transcoder":  # its bias was folded and unfolded
        return assert_same_function(back, dictionary_learning(trainer, found))
    return assert_same_coder(coder, back)


@torch.no_grad()
def test_what_a_fold_rounds_is_said_in_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The largest difference between the bias in the file and the one in float64."""
    coder = random_coder(JUMPRELU["sae"])
    run, out = save_run(tmp_path / "run", {"layers.3": coder}), tmp_path / "out"
    flags = ("--to", "dictionary_learning", "--out", str(out))
    assert call(monkeypatch, "export", str(run), *flags) == 0
    W_enc, b_enc, b_dec = coder.encoder.weight, coder.encoder.bias, coder.b_dec
    exact = b_enc.double() - W_enc.double() @ b_dec.double()
    written = torch.load(out / "layers.3/ae.pt", weights_only=True)["b_enc"]
    said = re.search(r"which is rounded by up to (\S+)\n", capsys.readouterr().out)
    assert said is not None
    assert float(said[1]) == pytest.approx(float((written - exact).abs().max()), rel=0.05)


@pytest.mark.parametrize("kind", ["sae", "one threshold", "batchtopk", "matryoshka", "transcoder"])
def test_thresholds_are_the_same_function_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """One threshold for all fits BatchTopKSAE exactly, with prefixes the Matryoshka one.

    Several thresholds fit JumpReluAutoEncoder.
    """
    coder = random_coder(JUMPRELU["transcoder" if kind == "transcoder" else "sae"])
    if kind == "batchtopk":
        coder = random_coder(SaeConfig(num_latents=24, k=3, activation="batchtopk"))
    shares = (0.25, 0.25, 0.5)
    if kind == "matryoshka":
        cfg = SaeConfig(num_latents=24, k=3, activation="batchtopk", matryoshka=shares)
        coder = random_coder(cfg)
    if kind in ("one threshold", "batchtopk", "matryoshka"):
        coder.threshold.data.fill_(1.5)
    run, out = save_run(tmp_path / "run", {"layers.3": coder}), tmp_path / "out"
    flags = ("--to", "dictionary_learning", "--out", str(out))
    assert call(monkeypatch, "export", str(run), *flags) == 0
    trainer = json.loads((out / "layers.3/config.json").read_text())["trainer"]
    found = torch.load(out / "layers.3/ae.pt", weights_only=True)
    several = kind in ("sae", "transcoder")
    named = "JumpReluAutoEncoder" if several else "BatchTopKSAE"
    if kind == "matryoshka":
        named = "MatryoshkaBatchTopKSAE"
        shapes = {name: (tuple(t.shape), t.dtype) for name, t in found.items()}
        assert shapes["W_enc"] == ((8, 24), torch.float32) and shapes["threshold"][0] == ()
        assert found["group_sizes"].tolist() == [6, 6, 12]
        assert found["group_sizes"].dtype == torch.int64
        assert load_many(out, allow_pt=True)["layers.3"].cfg.matryoshka == shares
    assert trainer["dict_class"] == named
    if named == "JumpReluAutoEncoder":
        shapes = {name: tuple(t.shape) for name, t in found.items()}
        expected = {"W_enc": (8, 24), "b_enc": (24,), "W_dec": (24, 8), "b_dec": (8,)}
        assert shapes == {**expected, "threshold": (24,)}
    assert_same_function(coder, dictionary_learning(trainer, found))
    back = load_many(out, allow_pt=True)["layers.3"]
    if kind == "sae":  # its bias was folded and unfolded
        return assert_same_function(back, dictionary_learning(trainer, found))
    return assert_same_coder(coder, back)


@pytest.mark.parametrize(
    "kind",
    [
        *("AutoEncoder", "GatedAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE"),
        *("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"),
    ],
)
def test_every_class_is_the_same_function_here(tmp_path: Path, kind: str) -> None:
    """ReLU, gates, k and thresholds, whichever way the matrices lie."""
    found = topk_tensors()
    if kind in ("AutoEncoder", "GatedAutoEncoder"):
        del found["k"], found["threshold"]
        centre = found.pop("b_dec")
        found |= {"bias": centre} if kind == "AutoEncoder" else {"decoder_bias": centre}
    if kind == "GatedAutoEncoder":
        found["mag_bias"] = found.pop("encoder.bias")
        found |= {"gate_bias": torch.randn(24), "r_mag": torch.randn(24)}
    if kind in ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder"):
        plain = {"W_enc": found["encoder.weight"].T, "b_enc": found["encoder.bias"]}
        plain |= {"W_dec": found["decoder.weight"].T, "b_dec": found["b_dec"]}
        counts = {"k": found["k"], "threshold": found["threshold"]}
        counts["group_sizes"] = torch.tensor([8, 16])
        several = {"threshold": torch.rand(24)}
        found = plain | (several if kind == "JumpReluAutoEncoder" else counts)
    trainer = write(tmp_path / "c", kind, found)
    ours = SparseCoder.load_from_disk(tmp_path / "c", allow_pt=True)
    assert_same_function(ours, dictionary_learning(trainer, found))


def test_a_matryoshka_coder_is_read_as_batchtopk(tmp_path: Path) -> None:
    """All its groups are active, as prefixes; sizes that are not of its latents are refused."""
    found = topk_tensors()
    plain = {"W_enc": found["encoder.weight"].T, "b_enc": found["encoder.bias"]}
    plain |= {"W_dec": found["decoder.weight"].T, "b_dec": found["b_dec"]}
    plain |= {"k": found["k"], "threshold": found["threshold"]}
    for sizes in ([8, 16], [2, 22], [8, 15], [24, 0]):
        kind = {**plain, "group_sizes": torch.tensor(sizes)}
        trainer = write(tmp_path / "c", "MatryoshkaBatchTopKSAE", kind)
        if sizes == [2, 22]:  # a prefix with fewer latents than k, which none has here
            assert SparseCoder.load_from_disk(tmp_path / "c", allow_pt=True).prefixes == ()
            continue
        if sizes != [8, 16]:
            with pytest.raises(UsageError, match="group_sizes .* are not 24 latents"):
                SparseCoder.load_from_disk(tmp_path / "c", allow_pt=True)
            continue
        ours = SparseCoder.load_from_disk(tmp_path / "c", allow_pt=True)
        assert (ours.cfg.activation, ours.cfg.k) == ("batchtopk", 3)
        assert ours.prefixes == (8, 24)
        assert_same_function(ours, dictionary_learning(trainer, kind))


def test_a_threshold_that_was_never_set_is_refused(tmp_path: Path) -> None:
    """There such a coder is a plain ReLU, which is nothing that anyone trained."""
    write(tmp_path / "c", "BatchTopKSAE", {**topk_tensors(), "threshold": torch.tensor(-1.0)})
    with pytest.raises(UsageError, match="its threshold was never set"):
        SparseCoder.load_from_disk(tmp_path / "c", allow_pt=True)


def write(folder: Path, kind: str, tensors: dict[str, Any], **values: Any) -> dict[str, Any]:
    """One coder of dictionary_learning; its trainer's config."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer = {"dict_class": kind, "activation_dim": 8, "dict_size": 24, "k": 3, **values}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    torch.save(tensors, folder / "ae.pt")
    return trainer


def topk_tensors() -> dict[str, Any]:
    """Tensors of an AutoEncoderTopK."""
    torch.manual_seed(0)
    found = {"encoder.weight": torch.randn(24, 8), "encoder.bias": torch.randn(24)}
    found |= {"decoder.weight": torch.randn(8, 24), "b_dec": torch.randn(8)}
    return {**found, "k": torch.tensor(3, dtype=torch.int32), "threshold": torch.tensor(0.7)}


def test_a_pickle_is_opened_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --allow_pt the file is not touched, and the line says what to do."""
    trainer = write(tmp_path / "in" / "c", "AutoEncoderTopK", topk_tensors())
    out = ("--out", str(tmp_path / "out"))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
        with pytest.raises(UsageError, match="is a pickle, which can run code"):
            load_many(tmp_path / "in")
        assert call(monkeypatch, "export", str(tmp_path / "in"), *out) == 2
        assert "--allow_pt" in capsys.readouterr().err
    assert call(monkeypatch, "export", str(tmp_path / "in"), "--allow_pt", *out) == 0
    theirs = dictionary_learning(trainer, topk_tensors())
    assert_same_function(load_many(tmp_path / "out")["c"], theirs)


class Runs:
    """What runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return open, ("ran", "w")


def test_a_pickle_that_would_run_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --allow_pt too, what is no plain tensor is not built."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "c", "AutoEncoderTopK", {**topk_tensors(), "k": Runs()})
    with pytest.raises(UsageError, match="cannot be read as plain tensors"):
        SparseCoder.load_from_disk(tmp_path / "c", allow_pt=True)
    assert not (tmp_path / "ran").exists()


REFUSED = {
    "class": ({"dict_class": "CrossCoder"}, {}, "those that can be read are AutoEncoder"),
    "k": ({"k": 4}, {}, "k is 4 in config.json and 3 in ae.pt"),
    "width": ({"activation_dim": 9}, {}, "encoder.weight of shape"),
    "extra": ({}, {"extra": torch.zeros(2)}, "extra, which is unknown"),
    "a threshold for each": ({"dict_class": "BatchTopKSAE"}, {"threshold": torch.ones(24)}, "thre"),
    "no threshold": ({"dict_class": "BatchTopKSAE"}, {"threshold": torch.tensor(nan)}, "NaN"),
    "no k": ({}, {"k": torch.zeros(0, dtype=torch.int32)}, "k, which is unknown"),
    "no groups": ({}, {"group_sizes": torch.tensor(24)}, "group_sizes, which is unknown"),
    "whole numbers": ({}, {"b_dec": torch.zeros(8, dtype=torch.int64)}, "not floating point"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_held_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    """Unknown classes, contradictions and wrong shapes: one line each."""
    values, tensors, why = REFUSED[kind]
    values = {"dict_class": "AutoEncoderTopK", **values}
    write(tmp_path / "c", values.pop("dict_class"), {**topk_tensors(), **tensors}, **values)
    with pytest.raises(UsageError, match=why):
        load_many(tmp_path, allow_pt=True)


def test_what_has_no_class_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A skip connection has no place there: refused, with a program that has one."""
    skip = TranscoderConfig(num_latents=24, k=3, skip_connection=True)
    run = save_run(tmp_path / "run", {"c": random_coder(skip)})
    flags = ("--to", "dictionary_learning", "--out", str(tmp_path / "out"))
    assert call(monkeypatch, "export", str(run), *flags) == 2
    assert "no coder with a skip connection: try --to sae_lens" in capsys.readouterr().err

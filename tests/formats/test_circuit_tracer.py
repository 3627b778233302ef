"""Sets of transcoders for circuit-tracer, whose loader reads a TopK set as plain ReLU."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from command_runs import call
from other_programs import (
    JUMPRELU,
    KINDS,
    assert_same_coder,
    assert_same_function,
    circuit_tracer,
    random_coder,
    save_run,
)
from safetensors.torch import load_file, save_file

from sae import SparseCoder, UsageError, load_many
from sae.formats.coder_file import NeedsThreshold
from sae.share.export import ExportConfig, export

LM = str(Path(__file__).parents[2] / "demo/lm")


def run_with(folder: Path, coders: dict[str, SparseCoder]) -> Path:
    """A run on the demo LM, which has six layers."""
    run = save_run(folder, coders)
    (run / "run.json").write_text(json.dumps({"model": LM, "dataset": "x"}))
    return run


@pytest.mark.parametrize("kind", ["transcoder", "skip transcoder"])
def test_a_set_is_the_same_function_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """A file per layer with exactly circuit-tracer's keys, and config.yaml; back it is exact."""
    coders = {f"layers.{i}.mlp": random_coder(JUMPRELU[kind]) for i in range(6)}
    for i, coder in enumerate(coders.values()):
        coder.b_dec.data.add_(i)
    run, out = run_with(tmp_path / "run", coders), tmp_path / "out"
    flags = ("--to", "circuit_tracer", "--out", str(out))
    assert call(monkeypatch, "export", str(run), *flags) == 0
    files = {f.name for f in out.iterdir()}
    assert files == {"config.yaml", *(f"layer_{i}.safetensors" for i in range(6))}
    assert yaml.safe_load((out / "config.yaml").read_text()) == {
        "model_kind": "transcoder_set",
        "model_name": "lm",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "mlp.hook_out",
    }
    back = load_many(out)
    assert list(back) == list(coders)
    for i, (name, coder) in enumerate(coders.items()):
        tensors = load_file(out / f"layer_{i}.safetensors")
        shapes = {key: tuple(t.shape) for key, t in tensors.items()}
        expected = {"W_enc": (24, 8), "b_enc": (24,), "W_dec": (24, 8), "b_dec": (8,)}
        expected |= {"activation_function.threshold": (24,)}
        assert shapes == (expected | {"W_skip": (8, 8)} if "skip" in kind else expected)
        assert_same_function(coder, circuit_tracer(tensors))
        assert_same_coder(coder, back[name])
    assert call(monkeypatch, "export", str(run), *flags) == 2


def test_negative_thresholds_let_nothing_negative_through(tmp_path: Path) -> None:
    """circuit-tracer has no ReLU beside its thresholds: what is written is never below 0."""
    coders = {f"layers.{i}.mlp": random_coder(JUMPRELU["transcoder"]) for i in range(6)}
    coders["layers.2.mlp"].threshold.data[:12] = -0.5
    run, out = run_with(tmp_path / "run", coders), tmp_path / "out"
    export(ExportConfig(str(run), out=str(out), to="circuit_tracer"))
    written = load_file(out / "layer_2.safetensors")
    assert_same_function(coders["layers.2.mlp"], circuit_tracer(written))


def test_what_is_no_set_is_refused(tmp_path: Path) -> None:
    """SAEs, a layer that is missing, several widths, and coders without thresholds: by name."""
    full = {f"layers.{i}.mlp": random_coder(JUMPRELU["transcoder"]) for i in range(6)}
    other = {**full, "layers.5.mlp": random_coder(JUMPRELU["skip transcoder"])}
    topk = {name: random_coder(KINDS["transcoder"]) for name in full}
    cases = {
        "takes transcoders of MLPs": {**full, "layers.5.mlp": random_coder(JUMPRELU["sae"])},
        "takes transcoders of MLPs, of": {"layers.5": random_coder(JUMPRELU["transcoder"])},
        "a transcoder for each of 6 layers": dict([*full.items()][:5]),
        "all or none with a skip": other,
        "reads a local TopK set as plain ReLU": topk,
    }
    for i, (why, coders) in enumerate(cases.items()):
        run = run_with(tmp_path / str(i), coders)
        with pytest.raises(NeedsThreshold if coders is topk else UsageError, match=why):
            export(ExportConfig(str(run), out=str(tmp_path / "out"), to="circuit_tracer"))
    assert not (tmp_path / "out").exists()


def test_sets_of_others_are_read_as_their_config_says(tmp_path: Path) -> None:
    """On the Hub a set may have its k in config.yaml; without it, it is plain ReLU."""
    coders = {f"layers.{i}.mlp": random_coder(JUMPRELU["transcoder"]) for i in range(6)}
    run, out = run_with(tmp_path / "run", coders), tmp_path / "out"
    export(ExportConfig(str(run), out=str(out), to="circuit_tracer"))
    file, config = out / "layer_2.safetensors", yaml.safe_load((out / "config.yaml").read_text())
    tensors = load_file(file)
    del tensors["activation_function.threshold"]
    save_file(tensors, file)
    assert "layer_2" in load_many(out)
    assert_same_function(load_many(out)["layer_2"], circuit_tracer(tensors))
    (out / "config.yaml").write_text(yaml.safe_dump({**config, "activation": "topk", "k": 3}))
    assert load_many(out)["layer_2"].cfg.activation == "topk"
    save_file({**tensors, "k": torch.zeros(1)}, file)
    with pytest.raises(UsageError, match="has k, which is unknown"):
        load_many(out)
    (out / "config.yaml").write_text("model_kind: cross_layer_transcoder")
    with pytest.raises(UsageError, match="model_kind is 'cross_layer_transcoder'"):
        load_many(out)
    (out / "config.yaml").write_text("a: [")
    with pytest.raises(UsageError, match="the file is damaged"):
        load_many(out)

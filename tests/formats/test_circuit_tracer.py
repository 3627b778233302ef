"""Sets of transcoders for circuit-tracer, whose loader reads a TopK set as plain ReLU."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

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
    circuit_tracer_clt,
    cross_layer_coders,
    dense,
    random_coder,
    save_run,
)
from safetensors.torch import load_file, save_file

from sae import SparseCoder, TranscoderConfig, UsageError, load_many
from sae.formats.coder_file import NeedsThreshold
from sae.judge.trained import CodersConfig, named_coders
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
    wider = replace(JUMPRELU["transcoder"], num_latents=32)
    topk = {name: random_coder(KINDS["transcoder"]) for name in full}
    cases = {
        "takes transcoders of MLPs": {**full, "layers.5.mlp": random_coder(JUMPRELU["sae"])},
        "takes transcoders of MLPs, of": {"layers.5": random_coder(JUMPRELU["transcoder"])},
        "takes transcoders of all 6 layers, and these are of .0, 1, 2, 3, 4.: train": dict(
            [*full.items()][:5]
        ),
        "all or none with a skip": other,
        "takes transcoders of one width": {**full, "layers.5.mlp": random_coder(wider)},
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
    (out / "config.yaml").write_text(yaml.safe_dump({**config, "model_name": "org/pythia-70m"}))
    assert "layers.2.mlp" in load_many(out)  # by the LM's name and the hooks
    hooks = {"feature_input_hook": "hook_resid_mid", "model_name": "org/pythia-70m"}
    (out / "config.yaml").write_text(yaml.safe_dump({**config, **hooks}))
    assert "layer_2" in load_many(out)
    with pytest.raises(UsageError, match="a transcoder from hook_resid_mid to mlp.hook_out, as"):
        named_coders(CodersConfig(str(file), model=LM, hookpoint="layers.2.mlp"))
    with pytest.raises(UsageError, match="--hookpoint layer_9: there are .*layers.5.mlp: give one"):
        named_coders(CodersConfig(str(out), model=LM, hookpoint="layer_9"))
    below = {**tensors, "activation_function.threshold": torch.full((24,), -0.5)}
    save_file(below, file)
    with pytest.raises(UsageError, match="thresholds below 0, with which latents may be negative"):
        load_many(out)
    (out / "config.yaml").write_text(yaml.safe_dump({**config, "activation": "topk", "k": 3}))
    save_file({**tensors, "k": torch.zeros(1)}, file)
    with pytest.raises(UsageError, match="has k, which is unknown"):
        load_many(out)
    (out / "config.yaml").write_text("model_kind: cross_layer_transcoder")
    with pytest.raises(UsageError, match="is 'cross_layer_transcoder'; .* of a transcoder_set"):
        load_many(out)
    (out / "config.yaml").write_text("a: [")
    with pytest.raises(UsageError, match="the file is damaged"):
        load_many(out)


@pytest.mark.parametrize("ahead", [1, "all"])
def test_a_cross_layer_transcoder_is_the_same_function_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: Any
) -> None:
    """Two files per layer with exactly circuit-tracer's keys, and config.yaml; back it is exact."""
    cfg = TranscoderConfig(num_latents=24, k=3, activation="jumprelu", cross_layer=ahead)
    coders = cross_layer_coders(cfg)
    coders["layers.2.mlp"].threshold.data[:12] = -0.5  # there they would let negative ones through
    run, out = run_with(tmp_path / "run", coders), tmp_path / "out"
    flags = ("--to", "circuit_tracer", "--out", str(out))
    assert call(monkeypatch, "export", str(run), *flags) == 0
    names = [f"W_{kind}_{i}.safetensors" for kind in ("enc", "dec") for i in range(6)]
    assert {f.name for f in out.iterdir()} == {"config.yaml", *names}
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config == {
        "model_kind": "cross_layer_transcoder",
        "model_name": "lm",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "mlp.hook_out",
    }
    rows = list(torch.randn(6, 64, 8, generator=torch.Generator().manual_seed(1)))
    acts, outs = circuit_tracer_clt(out, rows)
    back = load_many(out)
    assert list(back) == list(coders)
    for i, (name, coder) in enumerate(coders.items()):
        shapes = {k: tuple(t.shape) for k, t in load_file(out / f"W_enc_{i}.safetensors").items()}
        expected = {f"W_enc_{i}": (24, 8), f"b_enc_{i}": (24,), f"b_dec_{i}": (8,)}
        assert shapes == expected | {f"threshold_{i}": (24,)}
        (W_dec,) = load_file(out / f"W_dec_{i}.safetensors").values()
        assert W_dec.shape == (24, 6 - i, 8)
        (latents, y), (again, y_again) = dense(coder, rows[i]), dense(back[name], rows[i])
        torch.testing.assert_close(latents, acts[i], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(y, outs[i], rtol=1e-5, atol=1e-4)
        assert torch.equal(again, latents) and torch.equal(y_again, y)
        assert back[name].cfg == coder.cfg
        for key, tensor in coder.state_dict().items():
            expected_there = tensor.clamp(min=0) if key == "threshold" else tensor
            assert torch.equal(back[name].state_dict()[key], expected_there)
    assert call(monkeypatch, "export", str(run), *flags) == 2


def test_a_set_whose_coders_lie_elsewhere_says_where(tmp_path: Path) -> None:
    """A config.yaml of the Hub may name files of other repositories: these are to be given."""
    config = {"model_kind": "transcoder_set", "model_name": "gpt2"}
    named = ["hf://org/one/layer_0.safetensors", "hf://org/one/layer_1.safetensors"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, "transcoders": named}))
    with pytest.raises(UsageError, match="only names coders in other places, as hf://org/one/la"):
        load_many(tmp_path)
    (tmp_path / "config.yaml").write_text("seed: 3\n")  # of something else
    with pytest.raises(UsageError, match="holds no sparse coders: "):
        load_many(tmp_path)


def test_cross_layer_transcoders_of_others_are_read_as_their_config_says(tmp_path: Path) -> None:
    """Modules by the LM's name where what is read and predicted is an MLP's; else refused."""
    cfg = TranscoderConfig(num_latents=24, k=3, activation="jumprelu", cross_layer="all")
    run, out = run_with(tmp_path / "run", cross_layer_coders(cfg)), tmp_path / "out"
    export(ExportConfig(str(run), out=str(out), to="circuit_tracer"))
    for i in range(6):  # without what this project writes beside the tensors, as plain ReLU
        file = out / f"W_enc_{i}.safetensors"
        save_file({k: t for k, t in load_file(file).items() if "threshold" not in k}, file)
    config = yaml.safe_load((out / "config.yaml").read_text())
    said = {**config, "model_name": "openai-community/gpt2"}
    said |= {"feature_output_hook": "hook_mlp_out"}
    (out / "config.yaml").write_text(yaml.safe_dump(said))
    theirs = load_many(out)
    assert list(theirs) == [f"h.{i}.mlp" for i in range(6)]
    rows = list(torch.randn(6, 64, 8, generator=torch.Generator().manual_seed(1)))
    acts, outs = circuit_tracer_clt(out, rows)
    for coder, x, latents, y in zip(theirs.values(), rows, acts, outs, strict=True):
        for found, expected in zip(dense(coder, x), (latents, y), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    for other in (
        {"feature_input_hook": "hook_resid_mid"},
        {"feature_input_hook": "ln2.hook_normalized"},
        {"model_name": "someone/else"},
    ):
        (out / "config.yaml").write_text(yaml.safe_dump({**said, **other}))
        with pytest.raises(UsageError, match="say which modules it reads"):
            load_many(out)
    (out / "config.yaml").write_text(yaml.safe_dump(said))
    (out / "W_dec_2.safetensors").unlink()
    with pytest.raises(UsageError, match="W_dec_2"):
        load_many(out)


def test_what_is_no_cross_layer_transcoder_there_is_refused(tmp_path: Path) -> None:
    """Layers that are missing, a skip connection, and TopK: by name."""
    cfg = TranscoderConfig(num_latents=24, k=3, activation="jumprelu", cross_layer=1)
    skip = replace(cfg, skip_connection=True)
    cases = {
        "of all 6 layers": cross_layer_coders(cfg, 5),
        "without a skip": cross_layer_coders(skip),
        "has no TopK cross-layer": cross_layer_coders(replace(cfg, activation="topk")),
    }
    for i, (why, coders) in enumerate(cases.items()):
        run = run_with(tmp_path / str(i), coders)
        kind = NeedsThreshold if "TopK" in why else UsageError
        with pytest.raises(kind, match=why):
            export(ExportConfig(str(run), out=str(tmp_path / "out"), to="circuit_tracer"))
    assert not (tmp_path / "out").exists()

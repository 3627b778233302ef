"""Coders written into SAELens' files compute the same there, and come back."""

import json
from pathlib import Path
from typing import Any

import pytest
from command_runs import call
from natsort import natsorted
from other_programs import (
    JUMPRELU,
    KINDS,
    assert_same_coder,
    assert_same_function,
    random_coder,
    sae_lens,
    save_run,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
)

from sae import SaeConfig, SparseCoder, TranscoderConfig, load_many


def exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, coders: dict[str, SparseCoder], model: str = ""
) -> Path:
    """Coders in SAELens' files, by the command."""
    run, out = save_run(tmp_path / "run", coders), tmp_path / "out"
    if model:
        flags = {"model": model, "dataset": "some/text", "ctx_len": 64, "exclude_tokens": [5]}
        (run / "run.json").write_text(json.dumps(flags))
    assert call(monkeypatch, "export", str(run), "--to", "sae_lens", "--out", str(out)) == 0
    return out


def parts(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """cfg.json and the tensors."""
    cfg = json.loads((folder / "cfg.json").read_text())
    return cfg, load_file(folder / "sae_weights.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_the_same_function_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Names, shapes and keys are SAELens'; a forward by hand agrees, and back is exact."""
    coder = random_coder(KINDS[kind])
    out = exported(tmp_path, monkeypatch, {"layers.3": coder})
    assert {f.name for f in (out / "layers.3").iterdir()} == {"cfg.json", "sae_weights.safetensors"}
    cfg, tensors = parts(out / "layers.3")
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    assert shapes == {"W_enc": (8, 24), "b_enc": (24,), "W_dec": (24, 8), "b_dec": (8,)}
    expected = {"architecture": "topk", "d_in": 8, "d_sae": 24, "k": 3, "dtype": "float32"}
    expected |= {"device": "cpu", "normalize_activations": "none", "reshape_activations": "none"}
    assert {name: cfg[name] for name in expected} == expected
    assert cfg["apply_b_dec_to_input"] is (kind != "transcoder")
    assert cfg["rescale_acts_by_decoder_norm"] is (kind != "free norms")
    assert cfg["metadata"]["sae_lens_version"] >= "6"
    assert_same_function(coder, sae_lens(cfg, tensors))
    assert_same_coder(coder, load_many(out)["layers.3"])


@pytest.mark.parametrize(
    ("config", "hookpoint", "expected"),
    [
        (
            OPTConfig(hidden_size=8, ffn_dim=16, num_attention_heads=2, num_hidden_layers=3),
            "decoder.layers.1",
            (None, "model.decoder.layers.1"),
        ),
        (LlamaConfig(), "layers.1", ("blocks.1.hook_resid_post", "model.layers.1")),
        (GPT2Config(), "h.1.mlp", ("blocks.1.hook_mlp_out", "transformer.h.1.mlp")),
        (
            Gemma2Config(),
            "layers.1.post_feedforward_layernorm",
            ("blocks.1.hook_mlp_out", "model.layers.1.post_feedforward_layernorm"),
        ),
    ],
)
def test_modules_are_named_in_every_lm(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    config: PretrainedConfig,
    hookpoint: str,
    expected: tuple[str | None, str],
) -> None:
    """As the causal LM of transformers has them; where TransformerLens has none, a note says it."""
    config.save_pretrained(tmp_path / "lm")
    coders = {hookpoint: random_coder(KINDS["sae"])}
    out = exported(tmp_path, monkeypatch, coders, model=str(tmp_path / "lm"))
    about = parts(out / hookpoint)[0]["metadata"]
    assert (about["hook_name"], about["hf_hook_name"]) == expected
    assert ("has no name in TransformerLens" in capsys.readouterr().out) is (expected[0] is None)
    lm = AutoModelForCausalLM.from_config(small(config))
    assert lm.get_submodule(about["hf_hook_name"]) is lm.base_model.get_submodule(hookpoint)


def small(config: PretrainedConfig) -> PretrainedConfig:
    """The same kind of LM, of few and narrow layers."""
    sizes = {"vocab_size": 16, "num_hidden_layers": 2, "n_layer": 2, "head_dim": 4}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "n_head": 2}
    sizes |= {"hidden_size": 8, "n_embd": 8, "intermediate_size": 16, "ffn_dim": 16}
    sizes |= {"word_embed_proj_dim": 8, "layer_types": None}
    known = config.to_dict()
    return type(config)(**{**known, **{n: v for n, v in sizes.items() if n in known}})


def test_metadata_has_the_names_of_transformer_lens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Hook names, model and data of the run stand in `metadata`; what has no clear name is said."""
    sae, transcoder = random_coder(KINDS["sae"]), random_coder(KINDS["transcoder"])
    coders = {"layers.3": sae, "layers.4.mlp": sae, "layers.1.mlp": transcoder}
    coders |= {"layers.2.mlp.act": sae, "layers.2.attention.dense:input": sae}
    coders |= {"layers.0.attention.dense:input:head1": sae}
    out = exported(tmp_path, monkeypatch, coders, model="demo/lm")
    about = {name: parts(out / name)[0]["metadata"] for name in coders}
    names = ("hook_name", "hf_hook_name", "hook_name_out", "hf_hook_name_out")
    found = {name: [about[name].get(key) for key in names] for name in coders}
    assert found == {
        "layers.3": ["blocks.3.hook_resid_post", "gpt_neox.layers.3", None, None],
        "layers.4.mlp": ["blocks.4.hook_mlp_out", "gpt_neox.layers.4.mlp", None, None],
        "layers.1.mlp": [
            *("blocks.1.mlp.hook_in", None, "blocks.1.hook_mlp_out", "gpt_neox.layers.1.mlp")
        ],
        "layers.2.mlp.act": [None, "gpt_neox.layers.2.mlp.act", None, None],
        "layers.2.attention.dense:input": ["blocks.2.attn.hook_z", None, None, None],
        "layers.0.attention.dense:input:head1": ["blocks.0.attn.hook_z", None, None, None],
    }
    heads = {name: about[name].get("hook_head_index") for name in coders}
    assert [n for n in heads if heads[n] is not None] == ["layers.0.attention.dense:input:head1"]
    assert heads["layers.0.attention.dense:input:head1"] == 1
    # TransformerLens keeps heads apart, and SAELens joins them for all heads' coder alone.
    shaped = [n for n in coders if parts(out / n)[0]["reshape_activations"] == "hook_z"]
    assert shaped == ["layers.2.attention.dense:input"]
    assert list(load_many(out)) == natsorted(coders)
    said = {"model_name": "lm", "dataset_path": "some/text", "context_size": 64}
    said |= {"prepend_bos": False, "exclude_special_tokens": [5], "neuronpedia_id": None}
    said |= {"training_architecture": "topk", "l0": 3, "model_class_name": "HookedTransformer"}
    assert {name: about["layers.3"][name] for name in said} == said
    assert about["layers.2.mlp.act"]["model_class_name"] == "AutoModelForCausalLM"
    assert "note   layers.2.mlp.act: layers.2.mlp.act has no name" in capsys.readouterr().out


def test_a_coder_with_free_norms_is_not_rescaled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of other norms: rescaling would choose other latents, so it is off, and that is said."""
    exported(tmp_path, monkeypatch, dict.fromkeys("cde", random_coder(KINDS["free norms"])))
    (note,) = (n for n in capsys.readouterr().out.splitlines() if "unit norm" in n)
    assert note.startswith("note   c and 2 more: ")
    assert note.endswith("not of unit norm, which SAEDashboard cannot fold")


@pytest.mark.parametrize("d_out", [8, 5])
@pytest.mark.parametrize("kind", JUMPRELU)
def test_thresholds_are_the_same_function_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, d_out: int
) -> None:
    """Each kind goes to the architecture that computes it, with d_out; and comes back."""
    if d_out != 8 and not JUMPRELU[kind].transcode:
        return
    coder = random_coder(JUMPRELU[kind], d_out=d_out)
    out = exported(tmp_path, monkeypatch, {"layers.3": coder})
    cfg, tensors = parts(out / "layers.3")
    names = {"sae": "jumprelu", "skip sae": "jumprelu_skip_transcoder"}
    names |= {"transcoder": "jumprelu_transcoder", "skip transcoder": "jumprelu_skip_transcoder"}
    assert cfg["architecture"] == names[kind]
    assert cfg["apply_b_dec_to_input"] is (kind == "sae") and "k" not in cfg
    assert (cfg.get("d_out") == d_out) is (kind != "sae")
    assert tensors["threshold"].shape == (24,) and ("W_skip" in tensors) is ("skip" in kind)
    assert_same_function(coder, sae_lens(cfg, tensors))
    back = load_many(out)["layers.3"]
    if kind == "skip sae":  # its bias was folded and unfolded
        return assert_same_function(back, sae_lens(cfg, tensors))
    return assert_same_coder(coder, back)


def test_batchtopk_is_exact_there_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In use it is a JumpReLU of one threshold; what it was trained as stands in the metadata."""
    coder = random_coder(SaeConfig(num_latents=24, k=3, activation="batchtopk"))
    coder.threshold.data.fill_(0.7)
    out = exported(tmp_path, monkeypatch, {"layers.3": coder})
    cfg, tensors = parts(out / "layers.3")
    assert cfg["architecture"] == "jumprelu"
    assert_same_function(coder, sae_lens(cfg, tensors))
    assert_same_coder(coder, load_many(out)["layers.3"])


@pytest.mark.parametrize(
    ("cfg", "d_out", "why"),
    [
        (TranscoderConfig(num_latents=24, k=3, skip_connection=True), 8, "a skip connection"),
        (TranscoderConfig(num_latents=24, k=3), 5, "no TopK transcoder from 8 to 5"),
        (SaeConfig(num_latents=24, k=3, activation="groupmax"), 8, "no groupmax"),
    ],
)
def test_what_would_be_read_as_plain_relu_needs_thresholds(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    cfg: Any,
    d_out: int,
    why: str,
) -> None:
    """A kind that SAELens would run without its k is not written without text for thresholds."""
    run = save_run(tmp_path / "run", {"c": random_coder(cfg, d_out=d_out)})
    flags = ("--to", "sae_lens", "--out", str(tmp_path / "out"))
    assert call(monkeypatch, "export", str(run), *flags) == 2
    said = capsys.readouterr()
    assert why in said.out and "give --model and --dataset" in said.err
    assert not list((tmp_path / "out").rglob("*.safetensors"))

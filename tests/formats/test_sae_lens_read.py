"""Coders in SAELens' files compute here what they compute there; what cannot is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from other_programs import assert_same_function, dense, sae_lens
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae import SparseCoder, UsageError, load_many

FIXTURES = Path(__file__).parents[1] / "fixtures"


def write(folder: Path, kind: str, **values: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One coder of SAELens of an architecture, and what was written."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"W_enc": (8, 24), "W_dec": (24, 8), "b_dec": (8,), "b_enc": (24,)}
    if kind == "gated":
        del shapes["b_enc"]
        shapes |= dict.fromkeys(("b_gate", "b_mag", "r_mag"), (24,))
    if "jumprelu" in kind:
        shapes["threshold"] = (24,)
    if "skip" in kind:
        shapes["W_skip"] = (8, 8)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    cfg = {"architecture": kind, "d_in": 8, "d_sae": 24, "dtype": "float32", "device": "cpu"}
    cfg |= {"apply_b_dec_to_input": False, "normalize_activations": "none"}
    cfg |= {"metadata": {"sae_lens_version": "6.54.0"}}
    cfg = {**cfg, "d_out": 8} if "transcoder" in kind else cfg
    cfg |= {"k": 3, "rescale_acts_by_decoder_norm": True} if kind == "topk" else {}
    cfg |= values
    folder.mkdir(parents=True)
    save_file(tensors, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return cfg, tensors


@pytest.mark.parametrize("apply", [True, False])
@pytest.mark.parametrize(
    "kind",
    [
        *("standard", "gated", "jumprelu", "transcoder", "skip_transcoder"),
        *("jumprelu_transcoder", "jumprelu_skip_transcoder"),
    ],
)
def test_every_architecture_is_the_same_function_here(
    tmp_path: Path, kind: str, apply: bool
) -> None:
    """ReLU, gates and thresholds, with and without b_dec at the input."""
    apply = apply and "transcoder" not in kind
    cfg, tensors = write(tmp_path / "c", kind, apply_b_dec_to_input=apply)
    assert_same_function(SparseCoder.load_from_disk(tmp_path / "c"), sae_lens(cfg, tensors))


@pytest.mark.parametrize("apply", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_topk_coders_of_sae_lens_are_the_same_function_here(
    tmp_path: Path, apply: bool, rescale: bool
) -> None:
    """With and without b_dec at the input, and with rows of any norm, rescaled or not."""
    changed = {"apply_b_dec_to_input": apply, "rescale_acts_by_decoder_norm": rescale}
    cfg, tensors = write(tmp_path / "c", "topk", **changed)
    assert_same_function(SparseCoder.load_from_disk(tmp_path / "c"), sae_lens(cfg, tensors))


SCALED = {"normalize_activations": "expected_average_only_in"}
REFUSED = {
    "k is missing": ({"k": None}, "k is None"),
    "per-row scaling": ({"normalize_activations": "constant_norm_rescale"}, "every row on its own"),
    "layer norm": ({"normalize_activations": "layer_norm"}, "every row on its own"),
    "whitening": ({"normalize_activations": "covariance_whitening"}, "fold_activation_whitening"),
    "unheard of": ({"normalize_activations": "mean"}, "'mean', which is not known here"),
    "lost scale": ({"normalize_activations": "expected_average_only_in"}, "norm_scaling_factor"),
    "no word": ({"normalize_activations": []}, "which is not known here"),
    "scale of 0": ({**SCALED, "norm_scaling_factor": 0.0}, "norm_scaling_factor is 0.0"),
    "no scale": ({**SCALED, "norm_scaling_factor": math.nan}, "norm_scaling_factor is nan"),
    "tanh": ({"activation_fn_str": "tanh-relu", "metadata": None}, "'tanh-relu' cannot be read"),
    "options that are none": (
        {"activation_fn_str": "topk", "activation_fn_kwargs": "k=3", "metadata": None},
        "k is None",
    ),
    "architecture": ({"architecture": "matching_pursuit"}, "those that can be read are standard"),
    "finetuned": ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor"),
    "other width": ({"d_in": 9}, "W_enc of shape"),
    "negative": ({"d_sae": -1}, "d_sae is -1"),
    "d_out is missing": ({"architecture": "skip_transcoder"}, "d_out is None"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_held_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    """Wrong defaults, normalizations of each row, and unknown kinds: one line each."""
    values, why = REFUSED[kind]
    write(tmp_path / "c", "topk", **values)
    with pytest.raises(UsageError, match=why):
        load_many(tmp_path)


@pytest.mark.parametrize("rescale", [True, False])
def test_a_known_scale_is_folded(tmp_path: Path, rescale: bool) -> None:
    """Activations that SAELens scaled by one factor are read as they are, with its latents."""
    scaled = {"normalize_activations": "expected_average_only_in", "norm_scaling_factor": 2.5}
    cfg, tensors = write(tmp_path / "c", "topk", apply_b_dec_to_input=True, **scaled)
    cfg["rescale_acts_by_decoder_norm"] = rescale
    (tmp_path / "c/cfg.json").write_text(json.dumps(cfg))
    inner = sae_lens(cfg, tensors)

    def theirs(x: Tensor) -> tuple[Tensor, Tensor]:
        acts, out = inner(x * 2.5)
        return acts, out / 2.5

    assert_same_function(SparseCoder.load_from_disk(tmp_path / "c"), theirs)


NAMES = {
    "hf": ({"hf_hook_name": "model.layers.7"}, "layers.7"),
    "hf output": ({"hf_hook_name": "transformer.h.7.output"}, "h.7"),
    "of transformers": (
        {"hook_name": "model.layers.7.mlp", "model_class_name": "AutoModelForCausalLM"},
        "layers.7.mlp",
    ),
    "gpt2": ({"hook_name": "blocks.7.hook_resid_post", "model_name": "gpt2-small"}, "h.7"),
    "before": ({"hook_name": "blocks.8.hook_resid_pre", "model_name": "gpt2"}, "h.7"),
    "gemma": (
        {"hook_name": "blocks.2.hook_mlp_out", "model_name": "google/gemma-2-2b"},
        "layers.2.post_feedforward_layernorm",
    ),
    "attention": (
        {"hook_name": "blocks.2.hook_attn_out", "model_name": "EleutherAI/pythia-70m"},
        "layers.2.attention",
    ),
    "heads": (
        {"hook_name": "blocks.2.attn.hook_z", "model_name": "gpt2-small", "hook_head_index": None},
        "h.2.attn.c_proj:input",
    ),
    "one head": (
        {"hook_name": "blocks.2.attn.hook_z", "model_name": "qwen2-0.5b", "hook_head_index": 3},
        "layers.2.self_attn.o_proj:input:head3",
    ),
    "a head of queries": (
        {"hook_name": "blocks.2.attn.hook_q", "model_name": "gpt2-small", "hook_head_index": 3},
        "c",
    ),
    "unknown model": ({"hook_name": "blocks.2.hook_attn_out", "model_name": "mamba"}, "c"),
    "embeddings": ({"hook_name": "blocks.0.hook_resid_pre", "model_name": "gpt2"}, "c"),
}


MLPS = {
    "what enters": (("blocks.7.mlp.hook_in", "blocks.7.hook_mlp_out", "gpt2-small"), "h.7.mlp"),
    "of Llama": (("blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out", "Llama-3"), "layers.2.mlp"),
    "before the norm's weights": (("blocks.7.ln2.hook_normalized", "blocks.7.hook_mlp_out"), "c"),
    "another layer": (("blocks.7.mlp.hook_in", "blocks.8.hook_mlp_out"), "c"),
    "behind a norm": (("blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out", "gemma-2-2b"), "c"),
    "unknown model": (("blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out", "mamba"), "c"),
}


@pytest.mark.parametrize("kind", MLPS)
def test_the_mlp_of_a_transcoder_comes_from_the_metadata(tmp_path: Path, kind: str) -> None:
    """Where it goes from what enters one MLP to what leaves it; else the folder's name stands."""
    (into, out, *model), name = MLPS[kind]
    about = {"hook_name": into, "hook_name_out": out, "model_name": (*model, "gpt2")[0]}
    write(tmp_path / "coders" / "c", "transcoder", metadata=about)
    ((found, coder),) = load_many(tmp_path / "coders").items()
    assert found == name and coder.cfg.transcode


@pytest.mark.parametrize("kind", NAMES)
def test_the_hookpoint_comes_from_the_metadata(tmp_path: Path, kind: str) -> None:
    """Names that are clear become hookpoints; else the folder's name stands."""
    about, name = NAMES[kind]
    write(tmp_path / "coders" / "c", "topk", metadata={"sae_lens_version": "6.54.0", **about})
    assert list(load_many(tmp_path / "coders")) == [name]


@torch.no_grad()
def test_an_sae_that_sae_lens_trained_gives_its_numbers() -> None:
    """On rows that SAELens itself encoded: its latents, its reconstruction, at its hookpoint."""
    ((name, coder),) = load_many(FIXTURES / "sae_lens").items()
    expected = load_file(FIXTURES / "sae_lens.expected.safetensors")
    assert (name, coder.cfg.k, coder.num_latents) == ("layers.3", 16, 128)
    theirs = expected["acts"], expected["sae_out"]
    for found, given in zip(dense(coder, expected["x"]), theirs, strict=True):
        assert float((found - given).abs().max() / given.abs().max()) < 1e-5


def test_files_of_before_version_6_are_read(tmp_path: Path) -> None:
    """There everything is in one object, and the activation is named by its function."""
    cfg, tensors = write(tmp_path / "c", "topk", rescale_acts_by_decoder_norm=False)
    theirs = sae_lens(cfg, tensors)
    old = {"d_in": 8, "d_sae": 24, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3}}
    old |= {"apply_b_dec_to_input": False, "normalize_activations": "none"}
    old |= {"hook_point": "blocks.1.hook_resid_post", "model_name": "gpt2"}
    (tmp_path / "c/cfg.json").write_text(json.dumps(old))
    assert_same_function(load_many(tmp_path)["h.1"], theirs)
    ones = {**tensors, "scaling_factor": torch.ones(24)}  # which some had
    save_file(ones, tmp_path / "c/sae_weights.safetensors")
    assert_same_function(load_many(tmp_path)["h.1"], theirs)
    save_file({**ones, "scaling_factor": ones["b_enc"] + 1}, tmp_path / "c/sae_weights.safetensors")
    with pytest.raises(UsageError, match="scaling_factor is not all ones"):
        load_many(tmp_path)


def test_a_coder_that_batchtopk_training_made_is_one_here(tmp_path: Path) -> None:
    """One threshold, and its k where the metadata say it."""
    about = {"training_architecture": "batchtopk", "training_architecture_details": {"k": 7}}
    _, theirs = write(tmp_path / "c", "jumprelu", metadata=about)
    level = {**theirs, "threshold": torch.full((24,), 0.25)}
    save_file(level, tmp_path / "c/sae_weights.safetensors")
    found = SparseCoder.load_from_disk(tmp_path / "c").cfg
    assert (found.activation, found.k) == ("batchtopk", 7)

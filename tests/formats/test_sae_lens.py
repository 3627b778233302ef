"""Files of SAELens: what is written computes the same there, what is read the same here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_runs import call
from natsort import natsorted
from other_programs import (
    JUMPRELU,
    KINDS,
    assert_same_coder,
    assert_same_function,
    dense,
    random_coder,
    sae_lens,
    save_run,
)
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    PretrainedConfig,
)

from sae import SaeConfig, SparseCoder, TranscoderConfig, UsageError, load_many

FIXTURES = Path(__file__).parents[1] / "fixtures"


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
    # As SAELens itself writes it.
    about = {"training_architecture": "batchtopk", "training_architecture_details": {"k": 7}}
    _, theirs = write(tmp_path / "theirs/c", "jumprelu", metadata=about)
    level = {**theirs, "threshold": torch.full((24,), 0.25)}
    save_file(level, tmp_path / "theirs/c/sae_weights.safetensors")
    found = SparseCoder.load_from_disk(tmp_path / "theirs/c").cfg
    assert (found.activation, found.k) == ("batchtopk", 7)


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


REFUSED = {
    "k is missing": ({"k": None}, "k is None"),
    "per-row scaling": ({"normalize_activations": "constant_norm_rescale"}, "every row on its own"),
    "layer norm": ({"normalize_activations": "layer_norm"}, "every row on its own"),
    "whitening": ({"normalize_activations": "covariance_whitening"}, "fold_activation_whitening"),
    "unheard of": ({"normalize_activations": "mean"}, "'mean', which is not known here"),
    "lost scale": ({"normalize_activations": "expected_average_only_in"}, "norm_scaling_factor"),
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

"""Published sets: Gemma Scope, Llama Scope and Qwen Scope, read as their authors define them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from other_programs import assert_same_function
from safetensors.torch import save_file
from torch import Tensor

from sae import SparseCoder, UsageError, load_many


def tensors(encoder: str = "W_enc", decoder: str = "W_dec") -> dict[str, Tensor]:
    """A JumpReLU coder [8, 24]."""
    generator = torch.Generator().manual_seed(4)
    shapes = {encoder: (8, 24), decoder: (24, 8), "b_enc": (24,), "b_dec": (8,)}
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**found, "threshold": torch.rand(24, generator=generator)}


def jumprelu(t: dict[str, Tensor], skip: Tensor | None = None) -> Any:
    """What Gemma Scope computes: nothing is subtracted."""

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        pre = x @ t["W_enc"] + t["b_enc"]
        acts = pre.relu() * (pre > t["threshold"])
        out = acts @ t["W_dec"] + t["b_dec"]
        return acts, out if skip is None else out + x @ skip

    return forward


@pytest.mark.parametrize(
    ("repo", "name", "transcode"),
    [
        ("models--google--gemma-scope-2b-pt-res", "layers.12", False),
        ("gemma-scope-2b-pt-mlp", "layers.12.post_feedforward_layernorm", False),
        ("gemma-scope-2b-pt-att", "layers.12.self_attn.o_proj:input", False),
        ("gemma-scope-2b-pt-transcoders", "layer_12.width_16k.average_l0_82", True),
        ("mine", "layer_12.width_16k.average_l0_82", False),
    ],
)
def test_gemma_scope_is_the_same_function(
    tmp_path: Path, repo: str, name: str, transcode: bool
) -> None:
    """params.npz: nothing is subtracted; where it reads is in the names of its folders."""
    folder = tmp_path / repo / "layer_12" / "width_16k" / "average_l0_82"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{n: t.numpy() for n, t in tensors().items()})
    (found,) = load_many(tmp_path / repo).items()
    assert found[0] == name and found[1].cfg.k == 24
    assert found[1].cfg.transcode is transcode
    assert_same_function(found[1], jumprelu(tensors()))


def test_a_pickle_in_npz_is_not_opened(tmp_path: Path) -> None:
    """Arrays of objects are pickles: refused, as is what is no archive."""
    objects = np.array([{}], dtype=object)
    np.savez(tmp_path / "params.npz", W_enc=objects)
    with pytest.raises(UsageError, match="cannot be read"):
        SparseCoder.load_from_disk(tmp_path)
    (tmp_path / "params.npz").write_bytes(b"PK but no archive")
    with pytest.raises(UsageError, match="the file is damaged"):
        SparseCoder.load_from_disk(tmp_path)
    np.savez(tmp_path / "params.npz", W_enc=np.zeros((8, 24), np.float32))
    with pytest.raises(UsageError, match="lacks W_dec"):
        SparseCoder.load_from_disk(tmp_path)


@pytest.mark.parametrize("kind", ["sae", "transcoder", "skip"])
def test_gemma_scope_2_is_the_same_function(tmp_path: Path, kind: str) -> None:
    """Names in small letters, and a skip connection that is transposed."""
    found, folder = tensors("w_enc", "w_dec"), tmp_path / "resid_post" / "layer_3"
    skip = torch.randn(8, 8) if kind == "skip" else None
    folder.mkdir(parents=True)
    save_file(
        found if skip is None else {**found, "affine_skip_connection": skip},
        folder / "params.safetensors",
    )
    config = {"architecture": "jump_relu", "hf_hook_point_in": "model.layers.3.output", "l0": 11.6}
    if kind != "sae":
        config["hf_hook_point_in"] = "model.layers.3.pre_feedforward_layernorm.output"
        config["hf_hook_point_out"] = "model.layers.3.post_feedforward_layernorm.output"
    (folder / "config.json").write_text(json.dumps(config))
    ((name, coder),) = load_many(tmp_path).items()
    assert name == ("layers.3" if kind == "sae" else "resid_post.layer_3")
    assert coder.cfg.transcode is (kind != "sae") and coder.cfg.k == 12
    named = {"W_enc": found["w_enc"], "W_dec": found["w_dec"], "b_enc": found["b_enc"]}
    named |= {"b_dec": found["b_dec"], "threshold": found["threshold"]}
    assert_same_function(coder, jumprelu(named, skip))
    (folder / "config.json").write_text(json.dumps({**config, "architecture": "clt"}))
    with pytest.raises(UsageError, match="architecture is 'clt', not jump_relu"):
        load_many(tmp_path)


def test_llama_scope_is_folded(tmp_path: Path) -> None:
    """Inputs are scaled to norm sqrt(D) there; here weights and threshold hold the scale."""
    found, scale = tensors(), 8**0.5 / 4.0
    folder = tmp_path / "L3R-8x"
    (folder / "checkpoints").mkdir(parents=True)
    named = {"encoder.weight": found["W_enc"].T, "encoder.bias": found["b_enc"]}
    named |= {"decoder.weight": found["W_dec"].T, "decoder.bias": found["b_dec"]}
    save_file(
        {n: t.contiguous() for n, t in named.items()}, folder / "checkpoints" / "final.safetensors"
    )
    config = {"d_model": 8, "d_sae": 24, "jump_relu_threshold": 0.6, "top_k": 50}
    config |= {"dataset_average_activation_norm": {"in": 4.0, "out": 4.0}}
    config |= {"hook_point_in": "blocks.3.hook_resid_post"}
    config |= {"hook_point_out": "blocks.3.hook_resid_post"}
    (folder / "hyperparams.json").write_text(json.dumps(config))

    def theirs(x: Tensor) -> tuple[Tensor, Tensor]:
        pre = (x * scale) @ found["W_enc"] + found["b_enc"]
        acts = pre.relu() * (pre > 0.6 * scale)
        return acts, (acts @ found["W_dec"] + found["b_dec"]) / scale

    assert_same_function(load_many(tmp_path)["layers.3"], theirs)
    for changed, why in (
        ({"dataset_average_activation_norm": None}, "scales inputs by is not known"),
        ({"hook_point_out": "blocks.3.hook_mlp_out"}, "transcoders are not read"),
        ({"dataset_average_activation_norm": {"in": math.nan}}, "activation_norm is nan"),
        ({"jump_relu_threshold": True}, "jump_relu_threshold is True"),
        ({"act_fn": "topk"}, "act_fn is 'topk', and only 'jumprelu'"),
        ({"norm_activation": "token-wise"}, "norm_activation is 'token-wise'"),
        ({"apply_decoder_bias_to_pre_encoder": True}, "apply_decoder_bias_to_pre_encoder is True"),
        ({"use_glu_encoder": True}, "use_glu_encoder is True"),
    ):
        (folder / "hyperparams.json").write_text(json.dumps({**config, **changed}))
        with pytest.raises(UsageError, match=why):
            load_many(tmp_path)


def test_qwen_scope_needs_its_k_and_a_word(tmp_path: Path) -> None:
    """A pickle, whose k is in the repository's name: neither is guessed."""
    found = tensors()
    del found["threshold"]
    turned = {
        **found,
        "W_enc": found["W_enc"].T.contiguous(),
        "W_dec": found["W_dec"].T.contiguous(),
    }
    folder = tmp_path / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_3"
    folder.mkdir()
    torch.save(turned, folder / "layer5.sae.pt")
    with pytest.raises(UsageError, match="is a pickle"):
        load_many(folder)

    def theirs(x: Tensor) -> tuple[Tensor, Tensor]:
        pre = x @ found["W_enc"] + found["b_enc"]
        top = pre.topk(3)
        acts = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
        return acts, acts @ found["W_dec"] + found["b_dec"]

    assert_same_function(load_many(folder, allow_pt=True)["layers.5"], theirs)
    other = folder.rename(tmp_path / "mine")
    with pytest.raises(UsageError, match="is in its repository's name"):
        load_many(other, allow_pt=True)


def test_openais_relu_saes_are_read_and_others_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pickle is opened only when asked; TopK SAEs are refused, by their name if it says so."""
    found = tensors("encoder.weight", "decoder.weight")
    del found["threshold"]
    named = {"encoder.weight": found["encoder.weight"].T.contiguous()}
    named |= {"decoder.weight": found["decoder.weight"].T.contiguous(), "activation": "ReLU"}
    named |= {"latent_bias": found["b_enc"], "pre_bias": found["b_dec"]}
    named |= {"stats_last_nonzero": torch.zeros(24, dtype=torch.int64)}
    for site in ("resid_delta_mlp", "mlp_post_act_v4", "resid_post_mlp_v5_32k", "mine"):
        (tmp_path / site / "autoencoders").mkdir(parents=True)
        torch.save(named, tmp_path / site / "autoencoders" / "7.pt")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle was opened"))
        with pytest.raises(UsageError, match="is a pickle"):
            load_many(tmp_path / "resid_delta_mlp")
        with pytest.raises(UsageError, match="scale every row on its own"):
            load_many(tmp_path / "resid_post_mlp_v5_32k", allow_pt=True)

    def theirs(x: Tensor) -> tuple[Tensor, Tensor]:
        acts = ((x - found["b_dec"]) @ found["encoder.weight"] + found["b_enc"]).relu()
        return acts, acts @ found["decoder.weight"] + found["b_dec"]

    for site, name in (("resid_delta_mlp", "h.7.mlp"), ("mlp_post_act_v4", "h.7.mlp.act")):
        assert_same_function(load_many(tmp_path / site, allow_pt=True)[name], theirs)
    file = tmp_path / "mine" / "autoencoders" / "7.pt"
    state = {"k": 32, "postact_fn": "ReLU"}
    torch.save({**named, "activation": "TopK", "activation_state_dict": state}, file)
    with pytest.raises(UsageError, match="scale every row on its own"):
        load_many(tmp_path / "mine", allow_pt=True)
    torch.save({"encoder.weight": named["encoder.weight"]}, file)
    with pytest.raises(UsageError, match="lacks decoder.weight"):
        load_many(tmp_path / "mine", allow_pt=True)

"""Hookpoints are found, measured and captured on every family; nothing after them runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from sae import backend, linear
from sae.bank import costs
from sae.config import TranscoderConfig, UsageError
from sae.hookpoints import (
    capture,
    choose_hookpoints,
    find_hookpoints,
    freeze,
    load_lm,
    measure,
    token_limits,
)
from sae.linear import fast_linear_layers

LAYERS = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "head_dim": 8,
}
PLAIN = {
    k: LAYERS[k] for k in ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "image_size": 28,
    "patch_size": 14,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}

# Family: config, the middle layer's residual stream, and a module inside with its (d_in, d_out).
FAMILIES: dict[str, tuple[PretrainedConfig, str, str, tuple[int, int]]] = {
    "gpt2": (
        hf.GPT2Config(
            n_embd=32, n_layer=3, n_head=4, vocab_size=64, bos_token_id=0, eos_token_id=0
        ),
        *("h.1", "h.1.mlp.c_fc", (32, 128)),
    ),
    "gpt_neox": (
        hf.GPTNeoXConfig(**PLAIN, intermediate_size=48),
        *("layers.1", "layers.1.mlp.dense_4h_to_h", (48, 32)),
    ),
    "llama": (hf.LlamaConfig(**LAYERS), "layers.1", "layers.1.self_attn", (32, 32)),
    "qwen3": (hf.Qwen3Config(**LAYERS), "layers.1", "layers.1.self_attn.v_proj", (32, 16)),
    "gemma2": (hf.Gemma2Config(**LAYERS), "layers.1", "layers.1.mlp.down_proj", (48, 32)),
    "gemma3": (hf.Gemma3TextConfig(**LAYERS), "layers.1", "layers.1.self_attn", (32, 32)),
    "opt": (
        hf.OPTConfig(**PLAIN, ffn_dim=64, word_embed_proj_dim=32),
        *("decoder.layers.1", "decoder.layers.1.fc1", (32, 64)),
    ),
    "mistral": (hf.MistralConfig(**LAYERS), "layers.1", "layers.1.mlp", (32, 32)),
    "qwen3_moe": (
        hf.Qwen3MoeConfig(**LAYERS, **EXPERTS),
        *("layers.1", "layers.1.mlp.gate", (32, 4)),
    ),
    "mixtral": (
        hf.MixtralConfig(**LAYERS, num_local_experts=4, num_experts_per_tok=2),
        *("layers.1", "layers.1.mlp", (32, 32)),
    ),
    "mamba": (
        hf.MambaConfig(hidden_size=32, num_hidden_layers=3, vocab_size=64, state_size=4),
        *("layers.1", "layers.1.mixer.in_proj", (32, 128)),
    ),
    "bert": (
        hf.BertConfig(**PLAIN, intermediate_size=48),
        *("encoder.layer.1", "encoder.layer.1.output", (48, 32)),
    ),
    # Adds the attention's output into the MLP's output in place.
    "falcon": (hf.FalconConfig(**PLAIN), "h.1", "h.1.mlp", (32, 32)),
    "llava": (
        hf.LlavaConfig(
            vision_config={"model_type": "clip_vision_model", "projection_dim": 32, **VISION},
            text_config={"model_type": "llama", **LAYERS},
        ),
        *("language_model.layers.1", "language_model.layers.1.mlp", (32, 32)),
    ),
    "gemma3_vision": (
        hf.Gemma3Config(vision_config=VISION, text_config=LAYERS),
        *("language_model.layers.1", "language_model.layers.1.mlp", (32, 32)),
    ),
}
TOKENS = torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(5))


def make(config: PretrainedConfig, folder: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    lm = AutoModel.from_config(config)
    lm.save_pretrained(folder)
    return freeze(lm)


def direct(lm: PreTrainedModel, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Input and output of a module in a whole forward, copied the moment it runs."""
    seen: list[torch.Tensor] = []

    def store(_: Any, args: Any, kwargs: Any, out: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        y = out[0] if isinstance(out, tuple) else out
        seen.extend(t.flatten(0, -2).clone() for t in (x, y))

    handle = dict(lm.named_modules())[name].register_forward_hook(store, with_kwargs=True)
    with torch.no_grad(), fast_linear_layers():
        lm(input_ids=TOKENS)
    handle.remove()
    return seen[0], seen[1]


def load(path: Path, *choose: Any, **kwargs: Any) -> tuple[hf.PreTrainedModel, list[str]]:
    """The LM of a folder as far as the chosen hookpoints need it, and their names."""
    skeleton, names = find_hookpoints(str(path), *choose)
    return load_lm(str(path), skeleton, names, **kwargs), names


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_works_unchanged(family: str, tmp_path: Path) -> None:
    """Loaded up to its middle layer, an LM gives bit for bit what the whole one gives there."""
    config, layer, inner, widths = FAMILIES[family]
    whole = make(config, tmp_path)
    assert choose_hookpoints(whole, layers=(1,)) == [layer]
    lm, names = load(tmp_path, (layer, inner))
    assert names == [layer, inner]
    assert measure(find_hookpoints(str(tmp_path), names)[0], names) == measure(lm, names)
    assert len(dict(lm.named_modules())[layer.rpartition(".")[0]]) == 2, "layer 2 was loaded"
    captured = capture(lm, TOKENS, names)
    for name in names:
        for ours, expected in zip(captured[name], direct(whole, name), strict=True):
            assert torch.equal(ours, expected), name
    assert [(h.d_in, h.d_out) for h in measure(lm, names)] == [(32, 32), widths]
    assert not lm.training and not any(p.requires_grad for p in lm.parameters())


def test_default_is_every_residual_stream(tmp_path: Path) -> None:
    """Without globs all layers are chosen in natural order, thinned by the stride."""
    lm = make(hf.LlamaConfig(**{**LAYERS, "num_hidden_layers": 11}), tmp_path)
    assert choose_hookpoints(lm) == [f"layers.{i}" for i in range(11)]
    assert choose_hookpoints(lm, layer_stride=5) == ["layers.0", "layers.5", "layers.10"]
    assert choose_hookpoints(lm, layers=(10, 2)) == ["layers.2", "layers.10"]
    globbed = choose_hookpoints(lm, ("layers.[02].mlp", "layers.10.self_attn"))
    assert globbed == ["layers.0.mlp", "layers.2.mlp", "layers.10.self_attn"]


def test_names_are_those_of_the_base_model(tmp_path: Path) -> None:
    """A model with a head has the same hookpoints, and its head does not run."""
    whole = make(hf.LlamaConfig(**LAYERS), tmp_path)
    with_head = freeze(AutoModelForCausalLM.from_pretrained(tmp_path))
    ran: list[str] = []
    with_head.lm_head.register_forward_hook(lambda *_: ran.append("head"))
    ours = capture(with_head, TOKENS, ["layers.1"])["layers.1"]
    for a, b in zip(ours, capture(whole, TOKENS, ["layers.1"])["layers.1"], strict=True):
        assert torch.equal(a, b)
    assert not ran


def test_nothing_runs_after_the_last_hookpoint(tmp_path: Path) -> None:
    """Modules after the last hookpoint do not run; hooks are gone afterwards, errors or not."""
    lm = make(hf.LlamaConfig(**LAYERS), tmp_path)
    ran: list[str] = []
    for name, module in lm.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    hooks = sum(len(m._forward_hooks) for m in lm.modules())
    capture(lm, TOKENS, ["layers.0.mlp", "layers.1.self_attn"])
    assert "layers.1.self_attn" in ran
    assert not {"layers.1", "layers.1.mlp", "layers.2", "norm"} & set(ran)
    with pytest.raises(IndexError):
        capture(lm, TOKENS + 1000, ["layers.1"])
    assert sum(len(m._forward_hooks) for m in lm.modules()) == hooks


def test_no_gradient_no_cache(tmp_path: Path) -> None:
    """Captured rows carry no graph, and no key-value cache is built."""
    make(hf.LlamaConfig(**LAYERS), tmp_path)
    lm, _ = load(tmp_path)
    assert lm.config.use_cache is False and token_limits(lm) == (64, 64)
    cached: list[bool] = []
    lm.layers[0].self_attn.register_forward_hook(
        lambda m, a, k, o: cached.append(k.get("past_key_values") is not None), with_kwargs=True
    )
    x, y = capture(lm, TOKENS, ["layers.1"])["layers.1"]
    assert cached == [False] and not x.requires_grad and not y.requires_grad


def test_excluded_tokens_leave_no_row(tmp_path: Path) -> None:
    """Rows of excluded ids are gone, the others are the same."""
    lm = make(hf.LlamaConfig(**LAYERS), tmp_path)
    every = capture(lm, TOKENS, ["layers.0"])["layers.0"]
    some = capture(lm, TOKENS, ["layers.0"], (3, 9))["layers.0"]
    keep = ~torch.isin(TOKENS.flatten(), torch.tensor([3, 9]))
    assert 0 < keep.sum() < keep.numel()
    for a, b in zip(every, some, strict=True):
        assert torch.equal(a[keep], b)


def test_later_layers_are_not_read_from_disk(tmp_path: Path) -> None:
    """A checkpoint whose later layers are gone loads; one that lacks a used weight is refused."""
    whole = make(hf.LlamaConfig(**LAYERS), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {n: t for n, t in weights.items() if not n.startswith(("layers.2", "norm"))}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    lm, names = load(tmp_path, (), (1,))
    assert torch.equal(capture(lm, TOKENS, names)[names[0]][1], direct(whole, "layers.1")[1])
    with pytest.raises(UsageError, match=r"lack layers\.2"):
        load(tmp_path)
    kept.pop("layers.1.mlp.up_proj.weight")
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"lack layers\.1\.mlp\.up_proj\.weight.*random weights"):
        load(tmp_path, (), (1,))


def test_what_cannot_be_hooked_is_named(tmp_path: Path) -> None:
    """No match, a layer beyond the last, a module that never runs, and rows that are not tokens."""
    lm = make(hf.Qwen3Config(**LAYERS), tmp_path)
    with pytest.raises(UsageError, match=r"--hookpoints layer\.1\.mlp: .*nearest.*layers\.1\.mlp"):
        choose_hookpoints(lm, ("layer.1.mlp",))
    with pytest.raises(UsageError, match="--layers 3: Qwen3Model has 3 layers, 0 to 2"):
        choose_hookpoints(lm, layers=(3,))
    with pytest.raises(UsageError, match="not one row per token"):
        measure(lm, ["layers.0.self_attn.q_norm"])
    embedding = measure(lm, ["embed_tokens"])
    assert (embedding[0].d_in, embedding[0].d_out) == (0, 32)
    with pytest.raises(UsageError, match="--transcode: embed_tokens takes token ids"):
        costs(embedding, TranscoderConfig(), (0,))
    lm.never = nn.Linear(2, 2)
    with pytest.raises(UsageError, match="never does not run"):
        measure(lm, ["never"])


def test_broken_models_are_one_clear_line(tmp_path: Path) -> None:
    """Unknown names, broken configs, damaged and pickled weights are refused by name."""
    with pytest.raises(UsageError, match="MODEL no-such/model"):
        find_hookpoints("no-such/model")
    make(hf.LlamaConfig(**LAYERS), tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(UsageError, match="weights cannot be loaded"):
        load(tmp_path)
    weights.unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match="weights cannot be loaded"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match="MODEL"):
        load(tmp_path)


def test_eight_bit_loading_says_what_it_needs(tmp_path: Path) -> None:
    """--load_in_8bit without bitsandbytes is one clear line."""
    make(hf.LlamaConfig(**LAYERS), tmp_path)
    with pytest.raises(UsageError, match="--load_in_8bit|weights cannot be loaded"):
        load(tmp_path, load_in_8bit=True)


class OneDnn(TorchDispatchMode):
    """Counts products that oneDNN was asked for by name."""

    products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func is torch.ops.mkldnn._linear_pointwise.default
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="PyTorch without oneDNN"
)
def test_linear_layers_compute_the_same_where_they_are_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN's products are MKL's but for rounding; gradients and other types stay PyTorch's.

    They are used where the processor is AMD's and PyTorch's own operators were not asked for.
    """
    lm = make(FAMILIES["llama"][0], tmp_path)
    x, layers = torch.randn(5, 7, 6), [nn.Linear(6, 9, bias=bias) for bias in (True, False)]
    half = nn.Linear(6, 9, dtype=torch.bfloat16)
    found = []
    for slow in (False, True):
        monkeypatch.setattr(linear, "_mkl_is_slow", lambda slow=slow: slow)
        with OneDnn() as seen, fast_linear_layers() as mode, torch.no_grad():
            assert (mode is not None) == slow
            out = [layer(x) for layer in layers]
            assert seen.products == 2 * slow
            out += [layers[0](x[:0]), half(x.bfloat16())]
            captured = capture(lm, TOKENS, ["layers.1"])["layers.1"]
            assert seen.products == (2 + 7 + 7) * slow  # seven linear layers in a block
        with OneDnn() as seen, fast_linear_layers():
            (gradient,) = torch.autograd.grad(layers[0](x).sum(), layers[0].weight)
            assert seen.products == 0
        found.append([*out, gradient, *captured])
    for plain, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(backend, "_choice", "torch")
    with fast_linear_layers() as mode:
        assert mode is None

"""Tiny language models of many families, and what a hook on the whole of one sees."""

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from sae.config import ModelConfig
from sae.lm.linear import fast_linear_layers
from sae.lm.loading import find_hookpoints, freeze, load_lm

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
LLAMA = hf.LlamaConfig(**LAYERS)

# Families whose LM is loaded with its head: config, and a hookpoint in the middle.
WITH_HEAD: dict[str, tuple[PretrainedConfig, str]] = {
    "llama": (hf.LlamaConfig(**PLAIN, intermediate_size=48, num_key_value_heads=2), "layers.1"),
    "gpt2": (hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4), "h.1"),
    "neox": (hf.GPTNeoXConfig(**PLAIN, intermediate_size=48), "layers.1"),
    # Caps its logits: the head is more than a product.
    "gemma2": (
        hf.Gemma2Config(
            **PLAIN,
            intermediate_size=48,
            num_key_value_heads=2,
            head_dim=8,
            final_logit_softcapping=0.1,
        ),
        "layers.1",
    ),
}


def make(config: PretrainedConfig, folder: Path) -> PreTrainedModel:
    """A random LM without its head, also saved in a folder."""
    torch.manual_seed(0)
    lm = AutoModel.from_config(config)
    lm.save_pretrained(folder)
    return freeze(lm)


def make_with_head(config: PretrainedConfig) -> PreTrainedModel:
    """A random LM with its head."""
    torch.manual_seed(0)
    return freeze(AutoModelForCausalLM.from_config(config))


def load(
    path: Path,
    hookpoints: tuple[str, ...] = (),
    layers: tuple[int, ...] = (),
    load_in_8bit: bool = False,
) -> tuple[PreTrainedModel, list[str]]:
    """The LM of a folder as far as the chosen hookpoints need it, and their names."""
    cfg = ModelConfig(str(path), hookpoints, layers, load_in_8bit=load_in_8bit)
    skeleton, names = find_hookpoints(cfg)
    return load_lm(cfg, skeleton, names), names


def hooked(lm: PreTrainedModel, name: str) -> tuple[Tensor, Tensor]:
    """Input and output of a module in a whole forward, copied the moment it runs."""
    seen: list[Tensor] = []

    def store(_: Any, args: Any, kwargs: Any, out: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        y = out[0] if isinstance(out, tuple) else out
        seen.extend(t.flatten(0, -2).clone() for t in (x, y))

    handle = dict(lm.named_modules())[name].register_forward_hook(store, with_kwargs=True)
    with torch.no_grad(), fast_linear_layers():
        lm(input_ids=TOKENS)
    handle.remove()
    return seen[0], seen[1]

"""Tiny random models of every text architecture that transformers can build small."""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

LAYERS, VOCABULARY = 4, 96

SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "d_embed", "embed_dim", "lru_width"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_decoder_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "d_inner"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 64),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "d_kv"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(("state_size", "mamba_d_state"), 4),
    **{"vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY},
    **{"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 1, "rotary_dim": 4},
    **{"attention_window_size": 8, "attention_window": 8},
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

LARGEST = 20_000_000
"""Parameters of the largest LM that is built: some have a vision tower of a fixed size."""

# Settings that some architectures need beside the sizes, each tried in turn.
VARIANTS: tuple[dict[str, Any], ...] = ({}, {"num_key_value_heads": 4})


def names() -> list[str]:
    """Model types that read text, causal or masked."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_MASKED_LM_MAPPING_NAMES})


def tiny_config(model_type: str, **more: Any) -> PretrainedConfig:
    """A small config: every size that the default one names, made tiny."""
    kind = CONFIG_MAPPING[model_type]
    default = kind()
    found: dict[str, Any] = {}
    for name, value in {**SIZES, **TOKENS, **more}.items():
        try:
            there = getattr(default, name, None)
        except NotImplementedError:  # XLNet says so of its positions
            continue
        if isinstance(there, int) and not isinstance(there, bool) and there >= 0:
            found[kind.attribute_map.get(name, name)] = value
    return kind(**found)


def parameters(config: PretrainedConfig) -> int:
    """How many parameters an LM of this config has."""
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModel.from_config(config).parameters())


def build(model_type: str) -> PreTrainedModel:
    """A tiny random model that reads text. Raises what transformers raises where there is none."""
    for last, variant in zip((False, True), VARIANTS, strict=True):
        try:
            config = tiny_config(model_type, **variant)
            if (size := parameters(config)) > LARGEST:
                raise ValueError(f"{size:,} parameters")
            torch.manual_seed(0)
            lm = AutoModel.from_config(config).eval()
            with torch.no_grad():
                lm(input_ids=torch.randint(3, VOCABULARY, (2, 8)))
            return lm
        except (RuntimeError, ValueError):
            if last:
                raise
    raise AssertionError

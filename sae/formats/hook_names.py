"""Hookpoints in TransformerLens' names and in those of causal LMs, for LMs that have clear ones.

blocks.3.hook_resid_post   what leaves block 3
blocks.3.hook_mlp_out      what its MLP adds to the residual stream
blocks.3.hook_attn_out     what its attention adds
blocks.3.attn.hook_z       what its heads give, one after the other, before W_O
"""

import re
from typing import Any, NamedTuple

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig


class _Modules(NamedTuple):
    """What one kind of LM calls its modules, below its base model."""

    types: tuple[str, ...]
    """model_type in its config."""
    named: str
    """Names of such LMs."""
    prefix: str
    """What a causal LM calls its base model."""
    blocks: str
    attn_out: str
    mlp_out: str
    """The modules in a block whose outputs are added to the residual stream."""
    W_O: str
    """The linear layer that reads what the heads give."""
    mlp: str = "mlp"
    """The MLP itself; after some a norm follows."""


_KINDS = (
    _Modules(("gpt2",), r"gpt2", "transformer", "h", "attn", "mlp", "attn.c_proj"),
    _Modules(
        *(("gpt_neox",), r"pythia|neox", "gpt_neox", "layers"),
        *("attention", "mlp", "attention.dense"),
    ),
    _Modules(
        ("gemma2", "gemma3_text"),
        r"gemma-?[23](?!b)",  # gemma-2b is of the first
        "model",
        "layers",
        "post_attention_layernorm",
        "post_feedforward_layernorm",
        "self_attn.o_proj",
    ),
    _Modules(
        ("llama", "mistral", "qwen2", "qwen3", "gemma"),
        r"llama|mistral|qwen-?[23]|smollm|gemma",
        "model",
        "layers",
        "self_attn",
        "mlp",
        "self_attn.o_proj",
    ),
)


class HookNames(NamedTuple):
    """A module's output in the names of others; None where they have no clear one."""

    transformer_lens: str | None
    huggingface: str | None
    head: int | None = None
    """The attention head, where it is one of those that TransformerLens' name stands for."""


class AboutLM(NamedTuple):
    """What the config of an LM says, as far as it is at hand."""

    kind: str | None = None
    """model_type."""
    layers: int | None = None
    """Its blocks."""
    prefix: str | None = None
    """What the LM with its head calls its base model."""


def about_lm(model: str | None) -> AboutLM:
    """The same of an LM by its name."""
    if model is None:
        return AboutLM()
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    except Exception:  # not at hand, or this transformers cannot read it
        return AboutLM()
    with_head = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    prefix = getattr(with_head, "base_model_prefix", None) or None
    return AboutLM(config.model_type, getattr(config, "num_hidden_layers", None), prefix)


def their_names(hookpoint: str, kind: str | None, prefix: str | None = None) -> HookNames:
    """The names of a hookpoint's output in an LM whose model_type is `kind`.

    `prefix`: what it calls its base model, of LMs that have no clear names in TransformerLens.
    """
    modules = next((m for m in _KINDS if kind in m.types), None)
    if modules is None:
        plain = prefix is not None and ":" not in hookpoint
        return HookNames(None, f"{prefix}.{hookpoint}" if plain else None)
    heads = rf"{modules.blocks}\.(\d+)\.{re.escape(modules.W_O)}:input(?::head(\d+))?"
    if z := re.fullmatch(heads, hookpoint):
        return HookNames(f"blocks.{z[1]}.attn.hook_z", None, int(z[2]) if z[2] else None)
    if ":" in hookpoint:
        return HookNames(None, None)
    full = f"{modules.prefix}.{hookpoint}"
    found = re.fullmatch(rf"{modules.blocks}\.(\d+)(?:\.(\w+))?", hookpoint)
    if found is None:
        return HookNames(None, full)
    inner = {
        None: "hook_resid_post",
        modules.attn_out: "hook_attn_out",
        modules.mlp_out: "hook_mlp_out",
    }.get(found[2])
    return HookNames(inner and f"blocks.{found[1]}.{inner}", full)


def input_of_mlp(hookpoint: str, kind: str | None) -> str | None:
    """The name of what enters an MLP, behind the norm and its weights, if this is one."""
    modules = next((m for m in _KINDS if kind in m.types), None)
    if modules is None:
        return None
    found = re.fullmatch(rf"{modules.blocks}\.(\d+)\.{modules.mlp}", hookpoint)
    return found and f"blocks.{found[1]}.mlp.hook_in"


def mlp_of_layer(layer: int, model: Any) -> str | None:
    """The MLP of a block by the name of its LM, where what it returns is added to the stream."""
    if not isinstance(model, str):
        return None
    modules = next((m for m in _KINDS if re.search(m.named, model.lower())), None)
    if modules is None or modules.mlp != modules.mlp_out:
        return None
    return f"{modules.blocks}.{layer}.{modules.mlp}"


def our_name(hook: Any, hf_hook: Any, model: Any, head: Any = None) -> str | None:
    """The hookpoint that others' names stand for; None where they do not say it clearly.

    `head`: the one attention head that the coder reads, if it is one.
    """
    if isinstance(hf_hook, str) and (plain := hf_hook.removesuffix(".output")):
        if plain.endswith(".input"):
            plain = f"{plain.removesuffix('.input')}:input"
        prefixes = {m.prefix for m in _KINDS}
        first, _, rest = plain.partition(".")
        return rest if first in prefixes and rest else plain
    if not isinstance(hook, str) or not isinstance(model, str):
        return None
    modules = next((m for m in _KINDS if re.search(m.named, model.lower())), None)
    sites = r"hook_(resid_pre|resid_post|mlp_out|attn_out)|attn\.hook_(z)"
    found = re.fullmatch(rf"blocks\.(\d+)\.(?:{sites})", hook)
    if modules is None or found is None or (head is not None and not found[3]):
        return None
    if found[3]:
        which = "" if head is None else f":head{head}"
        return f"{modules.blocks}.{found[1]}.{modules.W_O}:input{which}"
    block = int(found[1])
    if found[2] == "resid_pre":  # what enters a block left the one before
        return f"{modules.blocks}.{block - 1}" if block else None
    inner = {"resid_post": "", "mlp_out": f".{modules.mlp_out}", "attn_out": f".{modules.attn_out}"}
    return f"{modules.blocks}.{block}{inner[found[2]]}"

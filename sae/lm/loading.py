"""The frozen LM: from its config alone, and with its weights, no more of it than is needed."""

from collections.abc import Iterable
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from ..config import ModelConfig
from ..flag_checks import UsageError
from .capture import is_sharded, modules_in_use
from .hookpoints import choose_hookpoints, layers_needed, text_config, text_layers


def find_hookpoints(
    cfg: ModelConfig, lm: PreTrainedModel | None = None, *, with_head: bool = False
) -> tuple[PreTrainedModel, list[str]]:
    """The LM without its weights, from its config alone, and the chosen hookpoints.

    The LM keeps no more layers than the hookpoints need, and its head only `with_head`, which
    keeps all layers. Where `lm` is loaded already, it is returned, frozen. Raises UsageError for an
    unknown model, one without the head, or a hookpoint that matches nothing.
    """
    if lm is not None:
        if with_head and lm.get_output_embeddings() is None:
            raise UsageError(
                f"--loss_fn, --eval_every: {type(lm).__name__} has no head; load it by "
                f"AutoModelForCausalLM"
            )
        return freeze(lm), choose_hookpoints(lm, cfg.hookpoints, cfg.layers, cfg.layer_stride)
    auto = AutoModelForCausalLM if with_head else AutoModel
    try:
        config = AutoConfig.from_pretrained(
            cfg.model, revision=cfg.revision, token=cfg.hf_token, trust_remote_code=False
        )
        with torch.device("meta"):
            skeleton = auto.from_config(config, dtype=torch.bfloat16)
    except Exception as error:  # a config's checks raise errors of many kinds
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"MODEL {cfg.model}: no such language model here or on the Hub; give a folder with "
            f"config.json and safetensors, or a Hub id (and --hf_token if it is gated). {reason}"
        ) from None
    names = choose_hookpoints(skeleton, cfg.hookpoints, cfg.layers, cfg.layer_stride)
    needed = None if with_head else layers_needed(skeleton, names)
    if needed is not None:
        layers_left_out: Any = skeleton.base_model.get_submodule(text_layers(skeleton)[0])
        del layers_left_out[needed:]
        text_config(config).num_hidden_layers = needed
    return freeze(skeleton), names


def load_lm(
    cfg: ModelConfig,
    skeleton: PreTrainedModel,
    hookpoints: list[str],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """The frozen LM with its weights, as far as `find_hookpoints` left its config.

    Under ZeRO-3 it is read straight into shards. Raises UsageError for weights that cannot be read,
    that the hookpoints depend on but the files lack, or that are not of the wanted dtype.
    """
    quantized = BitsAndBytesConfig(load_in_8bit=True) if cfg.load_in_8bit else None
    verbosity = transformers_logging.get_verbosity()
    # Weights of layers left out are reported as unexpected; missing ones are checked below.
    transformers_logging.set_verbosity_error()
    try:
        auto: Any = AutoModel if skeleton.base_model is skeleton else AutoModelForCausalLM
        lm, report = auto.from_pretrained(
            cfg.model,
            config=skeleton.config,
            dtype=torch.float16 if cfg.load_in_8bit else dtype,
            revision=cfg.revision,
            token=cfg.hf_token,
            quantization_config=quantized,
            device_map={"": device} if cfg.load_in_8bit else None,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except ImportError as error:
        raise UsageError(f"--load_in_8bit: {' '.join(str(error).split())}") from None
    except Exception as error:  # a damaged file surfaces as any of several libraries' own errors
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"MODEL {cfg.model}: its weights cannot be loaded. {reason}") from None
    finally:
        transformers_logging.set_verbosity(verbosity)
    missing = _weights_in_use(skeleton, hookpoints, set(report["missing_keys"]))
    if missing:
        raise UsageError(
            f"MODEL {cfg.model}: its files lack {', '.join(missing[:4])}"
            f"{' and more' if len(missing) > 4 else ''}; training on random weights is refused"
        )
    if is_sharded(lm) and lm.dtype != dtype:  # DeepSpeed's own setting decides, and says nothing
        raise UsageError(f"MODEL {cfg.model}: DeepSpeed loaded it in {lm.dtype} instead of {dtype}")
    return freeze(lm if cfg.load_in_8bit or is_sharded(lm) else lm.to(device))


def token_limits(lm: PreTrainedModel) -> tuple[int, int | None]:
    """Number of token ids in the LM's embedding, and of its positions where it has a limit."""
    embedding: Any = lm.get_input_embeddings()  # sharded, its weight shows no shape
    positions = getattr(text_config(lm.config), "max_position_embeddings", None)
    return embedding.num_embeddings, positions if isinstance(positions, int) else None


def freeze(lm: PreTrainedModel) -> PreTrainedModel:
    """Put the LM in eval mode, without gradients and without a key-value cache."""
    lm.eval().requires_grad_(False)
    if hasattr(lm.config, "use_cache"):
        lm.config.use_cache = False
    return lm


def compile_blocks(lm: PreTrainedModel, hookpoints: Iterable[str]) -> None:
    """Compile the LM's blocks by torch.compile, all but those with a hookpoint inside.

    Hooks on a block run outside of what is compiled; those within would be compiled away.
    """
    prefix, depth = text_layers(lm)
    for i in range(depth):
        name = f"{prefix}.{i}"
        if not any(hookpoint.startswith(f"{name}.") for hookpoint in hookpoints):
            block = lm.base_model.get_submodule(name)
            block.forward = torch.compile(block.forward)


def _weights_in_use(lm: PreTrainedModel, hookpoints: list[str], missing: set[str]) -> list[str]:
    """Those of the missing weights that a forward up to the last hookpoint, or the head, reads."""
    if not missing or lm.base_model is not lm:
        return sorted(missing)
    used = modules_in_use(lm, hookpoints)
    return sorted(key for key in missing if key.rpartition(".")[0] in used)

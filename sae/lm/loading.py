"""The frozen LM: from its config alone, and with its weights, no more of it than is needed."""

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import update_wrapper
from typing import Any, Literal

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTextEncoding,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import __version__ as transformers_version
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import cached_file, get_checkpoint_shard_files
from transformers.utils.peft_utils import ADAPTER_SAFE_WEIGHTS_NAME

from ..config import ModelConfig
from ..flag_checks import UsageError
from .adapters import apply_adapter_, base_of_adapter, unwrapped
from .capture import by_head, is_sharded
from .hookpoints import choose_hookpoints, text_config, text_layers
from .trace import check_calls, layers_needed, trace_forward

HeadUse = Literal["no", "wanted", "needed"]


def find_hookpoints(
    cfg: ModelConfig, lm: PreTrainedModel | None = None, head: HeadUse = "no"
) -> tuple[PreTrainedModel, list[str]]:
    """The LM without its weights, from its config alone, and the chosen hookpoints.

    The LM keeps no more layers than the hookpoints need; with its head, all of them. A head that is
    `wanted` is there if the LM has one that can be used. Where `lm` is loaded already, it is
    returned, frozen. Raises UsageError for an unknown model, one without a `needed` head, or a
    hookpoint that matches nothing.
    """
    if lm is not None:
        lm = unwrapped(lm)
        if head == "needed" and lm.get_output_embeddings() is None:
            kind = type(lm).__name__
            raise UsageError(f"--loss_fn: {kind} has no head; load it by AutoModelForCausalLM")
        return freeze(lm), _names(cfg, lm)
    base = base_of_adapter(cfg)
    config = _load_config(base or cfg)
    with_head = (head != "no" or base is not None) and _predicts_next_token(config)
    if head == "needed" and not with_head:
        raise UsageError(
            f"--loss_fn: MODEL {cfg.model} has no head that predicts the next token from hidden "
            f"states alone; use fvu"
        )
    if head == "wanted" and not with_head and int(os.environ.get("RANK", "0")) == 0:
        print(f"MODEL {cfg.model} predicts no next token that could be judged: no CE, KL, top-1")
    auto = AutoModelForCausalLM if with_head else AutoModel
    if config.is_encoder_decoder and type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING:
        auto = AutoModelForTextEncoding  # its decoder would need a text of its own
    try:
        with torch.device("meta"):
            skeleton = auto.from_config(config, dtype=torch.bfloat16)
    except Exception as error:  # a config's checks raise errors of many kinds
        raise UsageError(
            f"MODEL {cfg.model}: transformers {transformers_version} cannot build it from its "
            f"config. {_in_short(error)}"
        ) from None
    names = _names(cfg, skeleton)
    try:
        trace = trace_forward(skeleton)
    except UsageError:  # some LMs only run with weights: they are loaded whole, and checked then
        return freeze(skeleton), names
    check_calls(skeleton, names, trace)
    needed = None if with_head else layers_needed(skeleton, names, trace)
    if needed is not None:
        drop_layers_(skeleton, needed)
    return freeze(skeleton), names


def _names(cfg: ModelConfig, lm: PreTrainedModel) -> list[str]:
    names = choose_hookpoints(lm, cfg.hookpoints, cfg.layers, cfg.layer_stride)
    return by_head(lm, names) if cfg.per_head else names


def _load_config(cfg: ModelConfig) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(
            cfg.model, revision=cfg.revision, token=cfg.hf_token, trust_remote_code=False
        )
    except OSError as error:
        raise UsageError(
            f"MODEL {cfg.model}: no such language model here or on the Hub; give a folder with "
            f"config.json and safetensors, or a Hub id (and --hf_token if it is gated). "
            f"{_in_short(error)}"
        ) from None
    except Exception as error:  # a config's checks raise errors of many kinds
        raise UsageError(
            f"MODEL {cfg.model}: transformers {transformers_version} cannot use its config. "
            f"{_in_short(error)}"
        ) from None
    return config


def _predicts_next_token(config: PretrainedConfig) -> bool:
    """Whether an LM was saved with a head for the next token, as far as its config says."""
    named = [name or "" for name in config.architectures or ("ForCausalLM",)]
    causal = any("CausalLM" in name or "LMHead" in name for name in named)
    return causal and type(config) in MODEL_FOR_CAUSAL_LM_MAPPING


def _in_short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def drop_layers_(lm: PreTrainedModel, needed: int) -> None:
    """Take all layers but the first `needed` out of an LM; its config stays what it is."""
    base: Any = lm.base_model
    name, _ = text_layers(lm)
    del base.get_submodule(name)[needed:]
    base.kept_layers = (name, needed)


def fetch_weights(cfg: ModelConfig, skeleton: PreTrainedModel) -> None:
    """Download what `load_lm` will read of a model on the Hub, if it is not in the cache yet.

    Loading would do it too, but where ranks load together, and wait for each other.
    """
    if not next(skeleton.parameters()).is_meta:  # loaded already
        return
    where = {"token": cfg.hf_token, "_raise_exceptions_for_missing_entries": False}
    base = base_of_adapter(cfg) or cfg
    with suppress(Exception):  # of any library; loading says what is wrong
        if not cached_file(base.model, SAFE_WEIGHTS_NAME, revision=base.revision, **where):
            index = cached_file(
                base.model, SAFE_WEIGHTS_INDEX_NAME, revision=base.revision, **where
            )
            get_checkpoint_shard_files(
                base.model, index, revision=base.revision, token=cfg.hf_token
            )
        if base is not cfg:
            cached_file(cfg.model, ADAPTER_SAFE_WEIGHTS_NAME, revision=cfg.revision, **where)


def load_lm(
    cfg: ModelConfig,
    skeleton: PreTrainedModel,
    hookpoints: list[str],
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """The frozen LM with its weights, of the layers that `find_hookpoints` left in the skeleton.

    The rest is built from the whole config, so that nothing in the leading layers knows of the
    cut. Under ZeRO-3 it is read straight into shards. Raises UsageError for weights that cannot be
    read, that the hookpoints depend on but the files lack, or that are not of the wanted dtype.
    """
    adapter = base_of_adapter(cfg)
    base = adapter or cfg
    read_in = torch.float16 if cfg.load_in_8bit else dtype
    quantized = BitsAndBytesConfig(load_in_8bit=True) if cfg.load_in_8bit else None
    verbosity = transformers_logging.get_verbosity()
    # Weights of layers left out are reported as unexpected; missing ones are checked below.
    transformers_logging.set_verbosity_error()
    try:
        lm, report = _class_as_cut(skeleton).from_pretrained(
            base.model,
            config=skeleton.config,
            dtype=read_in,
            revision=base.revision,
            token=cfg.hf_token,
            quantization_config=quantized,
            device_map={"": device} if cfg.load_in_8bit else None,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            # Applied here, an adapter's report would take the place of its base's.
            adapter_kwargs={"subfolder": "none"} if adapter is cfg else {},
        )
    except ImportError as error:
        asked = "--load_in_8bit" if cfg.load_in_8bit else f"MODEL {cfg.model}"
        raise UsageError(f"{asked}: a library is missing. {_in_short(error)}") from None
    except Exception as error:  # a damaged file surfaces as any of several libraries' own errors
        raise UsageError(
            f"MODEL {cfg.model}: its weights cannot be loaded. {_in_short(error)}"
        ) from None
    finally:
        transformers_logging.set_verbosity(verbosity)
    missing = _weights_in_use(skeleton, lm, hookpoints, set(report["missing_keys"]))
    if missing:
        raise UsageError(
            f"MODEL {base.model}: its files lack {', '.join(missing[:4])}"
            f"{' and more' if len(missing) > 4 else ''}; training on random weights is refused"
        )
    if adapter is not None:
        if is_sharded(lm):
            raise UsageError(f"MODEL {cfg.model}: an adapter cannot be sharded; merge it first")
        apply_adapter_(cfg, lm, read_in)
    if is_sharded(lm) and lm.dtype != dtype:  # DeepSpeed's own setting decides, and says nothing
        raise UsageError(f"MODEL {cfg.model}: DeepSpeed loaded it in {lm.dtype} instead of {dtype}")
    return freeze(lm if cfg.load_in_8bit or is_sharded(lm) else lm.to(device))


def _class_as_cut(skeleton: PreTrainedModel) -> Any:
    """The class of an LM, but with no more layers than the skeleton has, whatever its config says.

    Weights of layers that are not there are not read.
    """
    kind: Any = type(skeleton)
    if not hasattr(skeleton.base_model, "kept_layers"):
        return kind
    _, needed = text_layers(skeleton)

    def build(self: PreTrainedModel, config: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, config, *args, **kwargs)
        drop_layers_(self, needed)

    return type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__})


def token_limits(lm: PreTrainedModel) -> tuple[int, int | None]:
    """Number of token ids in the LM's embedding, and of its positions where it has a limit."""
    embedding: Any = lm.get_input_embeddings()  # sharded, its weight shows no shape
    positions = getattr(text_config(lm.config), "max_position_embeddings", None)
    limited = isinstance(positions, int) and positions > 0
    return embedding.num_embeddings, positions if limited else None


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
    leave_blocks_plain(lm)
    prefix, depth = text_layers(lm)
    for i in range(depth):
        name = f"{prefix}.{i}"
        if not any(hookpoint.startswith(f"{name}.") for hookpoint in hookpoints):
            block = lm.base_model.get_submodule(name)
            block.forward = _Compiled(block.forward)


def leave_blocks_plain(lm: PreTrainedModel) -> None:
    """Undo `compile_blocks`: a run before this one may have had other hookpoints."""
    for module in lm.modules():
        if isinstance(forward := vars(module).get("forward"), _Compiled):
            module.forward = forward.plain


class _Compiled:
    """A block's forward, compiled, that knows what it was."""

    def __init__(self, plain: Callable[..., Any]) -> None:
        update_wrapper(self, plain)
        self.plain, self._compiled = plain, torch.compile(plain)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._compiled(*args, **kwargs)


def _weights_in_use(
    skeleton: PreTrainedModel, lm: PreTrainedModel, hookpoints: list[str], missing: set[str]
) -> list[str]:
    """Those of the missing weights that a forward up to the last hookpoint, or the head, reads."""
    if not missing or lm.base_model is not lm:
        return sorted(missing)
    try:
        trace = trace_forward(skeleton)
    except UsageError:  # it only runs with weights, and shards of them are not enough
        if is_sharded(lm):
            return sorted(missing)
        trace = trace_forward(lm)
    used = {name for name, _ in trace.until(hookpoints)}
    return sorted(key for key in missing if key.rpartition(".")[0] in used)

"""Adapters (LoRA and the like): applied as peft does it, or refused; never passed over."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, PreTrainedModel
from transformers.utils.import_utils import is_peft_available
from transformers.utils.peft_utils import find_adapter_config_file

from ..config import ModelConfig
from ..flag_checks import UsageError


def base_of_adapter(cfg: ModelConfig) -> ModelConfig | None:
    """Where the base model of an adapter is whose id or folder MODEL is; None for a whole model.

    A revision is the adapter's; that of the base stands in the adapter's config. Raises UsageError
    where peft, which applies it, is not installed, or no base is named.
    """
    try:
        file = find_adapter_config_file(cfg.model, token=cfg.hf_token, revision=cfg.revision)
    except OSError:  # no such model, which its config will tell
        return None
    if file is None:
        return None
    if not is_peft_available():
        raise UsageError(
            f"MODEL {cfg.model}: is an adapter, or has one beside its weights "
            f"(adapter_config.json): pip install peft to apply it, or take that file away to train "
            f"on the base model"
        )
    if (Path(cfg.model) / "config.json").is_file():
        return cfg
    try:
        said = json.loads(Path(file).read_text(encoding="utf-8"))
        base, revision = said["base_model_name_or_path"], said.get("revision")
    except (ValueError, KeyError, TypeError):
        base = revision = None
    if not base:
        raise UsageError(
            f"MODEL {cfg.model}: its adapter_config.json names no base_model_name_or_path: write "
            f"there the id or folder of the base model"
        )
    return replace(cfg, model=base, revision=revision)


def apply_adapter_(cfg: ModelConfig, lm: PreTrainedModel, dtype: torch.dtype) -> None:
    """Put the adapter of MODEL into its base model; no part of it may be missing."""
    where: dict[str, Any] = {"revision": cfg.revision, "token": cfg.hf_token}
    try:
        missing = lm.load_adapter(cfg.model, dtype=dtype, adapter_kwargs=where).missing_keys
        reason = f"it lacks {sorted(missing)[0]}" if missing else ""
    except Exception as error:  # peft and safetensors have errors of their own
        reason = " ".join(str(error).split())[:300]
    if reason:
        raise UsageError(
            f"MODEL {cfg.model}: its adapter cannot be applied to {type(lm).__name__}: {reason}; "
            f"merge it into its base (merge_and_unload of peft) and give that"
        )


def unwrapped(lm: Any) -> PreTrainedModel:
    """The language model inside what was passed from Python, with its adapters applied.

    Raises UsageError for what is none.
    """
    if hasattr(lm, "peft_config") and hasattr(lm, "get_base_model"):
        if lm.active_peft_config.is_prompt_learning:
            raise UsageError(
                f"lm: {type(lm).__name__} puts tokens of its own before the text, which have no "
                f"rows here: pass the model without them"
            )
        lm = lm.get_base_model()
    if not isinstance(lm, PreTrainedModel):
        inside = next((n for n in ("module", "_orig_mod") if hasattr(lm, n)), None)
        raise UsageError(
            f"lm: {type(lm).__name__} is no model of transformers"
            + (f": pass its .{inside}" if inside else "")
        )
    if type(lm.config) in MODEL_FOR_TEXT_ENCODING_MAPPING and hasattr(lm.base_model, "decoder"):
        raise UsageError(
            f"lm: the decoder of {type(lm).__name__} needs a text of its own: pass get_encoder()"
        )
    return lm

"""Adapters (LoRA and the like): applied as peft does it, or refused; never passed over."""

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils.import_utils import is_peft_available
from transformers.utils.peft_utils import find_adapter_config_file

from ..config import ModelConfig
from ..flag_checks import UsageError


def base_of_adapter(cfg: ModelConfig) -> str | None:
    """Where the base model of an adapter is whose id or folder MODEL is; None for a whole model.

    Raises UsageError where peft, which applies it, is not installed.
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
        return cfg.model
    return json.loads(Path(file).read_text(encoding="utf-8"))["base_model_name_or_path"]


def check_applied(cfg: ModelConfig, lm: PreTrainedModel, missing: set[str]) -> None:
    """Raise UsageError where an adapter's weights did not come into the LM."""
    if not getattr(lm, "_hf_peft_config_loaded", False) or missing:
        lacking = f": it lacks {sorted(missing)[0]}" if missing else ""
        raise UsageError(
            f"MODEL {cfg.model}: its adapter cannot be applied to {type(lm).__name__}{lacking}; "
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
    return lm

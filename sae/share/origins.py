"""Where coders come from, as the folder of their run says it."""

from pathlib import Path
from typing import Any

from ..config import ModelConfig
from ..data.tokenizing import leading_tokens, load_tokenizer
from ..flag_checks import UsageError
from ..formats.hook_names import about_lm
from ..formats.origin import Origin, without_folder
from ..runs.json_files import read_json
from ..runs.provenance import flags_of_run


def origin_of(run: Path, model: str | None = None, said: dict[str, Any] | None = None) -> Origin:
    """What a run's folder, or one of its checkpoints, says of its LM and text; or its `model`.

    Of coders without their run it is what their files have `said`.
    """
    flags = flags_of_run(run)
    summary = next((f for f in (run, run.parent) if (f / "summary.json").is_file()), None)
    tokens = read_json(summary / "summary.json").get("tokens") if summary and flags else None
    said = {n: v for n, v in (said or {}).items() if v is not None and not flags}
    model = model or flags.get("model") or said.get("model")
    lm, dataset = about_lm(model), flags.get("dataset", said.get("dataset"))
    return Origin(
        model=model and without_folder(model),
        model_type=lm.kind,
        prefix=lm.prefix,
        layers=lm.layers,
        dataset=dataset and without_folder(dataset),
        ctx_len=flags.get("ctx_len", said.get("ctx_len")),
        tokens=tokens or said.get("tokens"),
        begins_with_bos=(_begins_with_bos(flags, model) if flags else said.get("begins_with_bos")),
        excluded=list(flags.get("exclude_tokens") or ()) or None,
    )


def _begins_with_bos(flags: dict[str, Any], model: str | None) -> bool | None:
    """Whether a run put what the tokenizer puts first before every sequence of its text."""
    are_ids = str(flags.get("dataset")).endswith((".bin", ".npy"))
    if model is None or are_ids or flags.get("text_column") == "input_ids":
        return None
    try:
        tokenizer = load_tokenizer(model, ModelConfig(model))
    except UsageError:  # an LM that was trained on token ids may have none
        return None
    return bool(leading_tokens(tokenizer)) and not flags.get("bos_per_document")

"""What a run left about itself: its flags, its data, and which text it held out."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import DataConfig, MachineConfig, ModelConfig
from ..data.blocks import TokenSource, split_blocks
from ..flag_checks import UsageError, flags_of, from_flags
from .folder import checkpoints
from .json_files import read_json


def is_text_of_run(given: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether the data set is the run's own; `--split` is a mere label for a file here."""
    theirs, asked = before["dataset"], given.get("dataset", before["dataset"])
    if theirs is None or asked is None:
        return False
    here = Path(asked).exists()
    same = Path(asked).resolve() == Path(theirs).resolve() if here else asked == theirs
    is_file = Path(asked).is_file()
    split = given.get("split", before["split"]) == before["split"]
    return (
        same
        and (is_file or split)
        and given.get("text_column", before["text_column"]) == (before["text_column"])
    )


def held_out_blocks(
    source: TokenSource, data: DataConfig, before: dict[str, Any], saved: dict[str, Any]
) -> int:
    """Leading blocks that the run held out, whatever the length of a block is now."""
    if not saved or saved.get("block_len") == source.block_len:
        then = replace(data, eval_tokens=before["eval_tokens"])
        held, _ = split_blocks(source, then, per_batch=1)
        return len(held)
    then = saved["block_len"]
    tokens = then * min(-(-before["eval_tokens"] // then), max(1, saved["blocks"] // 10))
    return max(1, tokens // source.block_len)


def data_of_run(folder: Path) -> dict[str, Any]:
    """The fingerprint of what a run trained on."""
    found = [folder, *checkpoints(folder)][-1] / "manifest.json"
    data = read_json(found).get("data") if found.is_file() else None
    return data if isinstance(data, dict) else {}


def flags_of_run(folder: Path) -> dict[str, Any]:
    """The flags of the run whose folder this is, or one of whose checkpoints; else nothing.

    A flag that is newer than the run has its default. Raises UsageError for a damaged file.
    """
    for candidate in (folder / "run.json", folder.parent / "run.json"):
        if candidate.is_file():
            flags = read_json(candidate)
            groups = (ModelConfig, DataConfig, MachineConfig)
            named = {n: v for n, v in flags.items() if v is not None}
            try:
                defaults = [flags_of(from_flags(group, named)) for group in groups]
            except UsageError as error:
                raise UsageError(f"{candidate}: {error}: the file is damaged") from None
            known = {name: value for group in defaults for name, value in group.items()}
            if "pack" not in flags and flags.get("text_column") == "text":
                flags["text_column"] = None  # what the default was once
            return {**known, **flags}
    return {}

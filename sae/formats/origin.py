"""What is known of where coders come from, for the files of programs that ask."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def without_folder(name: str) -> str:
    """A name without the folders of this machine, which mean nothing elsewhere."""
    here = Path(name).is_absolute() or ("/" in name and Path(name).exists())
    return Path(name).name if here else name


def without_seed(name: str) -> str:
    """The hookpoint of a coder of this name: one of several seeds has its seed behind it."""
    return re.sub(r"\.seed-?\d+$", "", name)


@dataclass(frozen=True)
class Origin:
    """The LM and the text that coders were trained on; None where it is not known."""

    model: str | None = None
    model_type: str | None = None
    """What the LM's config says it is."""
    prefix: str | None = None
    """What the LM with its head calls its base model."""
    dataset: str | None = None
    ctx_len: int | None = None
    tokens: int | None = None
    """Tokens that were trained on."""
    begins_with_bos: bool | None = None
    """Whether every sequence begins with what the tokenizer puts first."""
    excluded: list[int] | None = None
    """Token ids that were left out."""
    layers: int | None = None
    """Blocks of the LM."""
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By coder, figures that its files name."""

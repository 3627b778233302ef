"""Texts for the tests of data, and what `load_tokens` makes of them with the demo tokenizer."""

import json
from pathlib import Path
from typing import Any

import datasets
import torch

from sae.config import DataConfig, ModelConfig
from sae.data.blocks import TokenSource
from sae.data.text import load_tokens

LM = Path(__file__).parents[1] / "demo" / "lm"
VOCAB = 4096


def documents() -> list[str]:
    """Texts with everything that text can hold: nothing, emoji, right-to-left, null bytes."""
    odd = ["", "\x00\x00", "😀 emoji", "עברית ושלום", "<|endoftext|>", "tab\tend", " "]
    return odd + [f"def f_{i}(x):\n    return x + {i}\n" * (1 + i % 7) for i in range(300)]


def jsonl(folder: Path, texts: list[str] | None = None, column: str = "text") -> str:
    path = folder / "docs.jsonl"
    rows = [json.dumps({column: t}) for t in (documents() if texts is None else texts)]
    path.write_text("\n".join(rows) + "\n")
    return str(path)


def load(
    dataset: str | datasets.Dataset | torch.Tensor,
    limits: tuple[int, int | None] = (VOCAB, 10**7),
    tokenizer: str | None = None,
    model: str | None = str(LM),
    exclude_tokens: tuple[int, ...] = (),
    **flags: Any,
) -> TokenSource:
    """What `load_tokens` makes of a name or of data; one block is held out of a stream."""
    name = {"dataset": dataset} if isinstance(dataset, str) else {}
    cfg = DataConfig(**{"ctx_len": 32, "eval_tokens": 1, **name, **flags})
    data = None if isinstance(dataset, str) else dataset
    of = ModelConfig(exclude_tokens=exclude_tokens)
    if model is not None:
        of = ModelConfig(model, exclude_tokens=exclude_tokens)
    return load_tokens(cfg, of, limits, tokenizer, data)

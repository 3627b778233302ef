"""Documents to token ids, each with an end token behind it, packed one behind the other."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..config import ModelConfig
from ..flag_checks import UsageError

DOCUMENTS_PER_CALL = 1000


def load_tokenizer(name: str, model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the LM. Raises UsageError for one that cannot read text."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=model.revision, token=model.hf_token, trust_remote_code=False
        )
    except Exception as error:  # each tokenizer's backend has errors of its own
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"MODEL {name}: its tokenizer cannot be loaded. {reason}") from None
    if not tokenizer("text").input_ids:
        raise UsageError(f"MODEL {name}: it has no tokenizer; give token ids (.bin, input_ids)")
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is None:
        raise UsageError(f"MODEL {name}: its tokenizer has no end token to put between documents")
    return tokenizer


@contextmanager
def reading_utf8(column: str) -> Iterator[None]:
    """Files are checked to be text only when they are read."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--text_column {column}: a document is not UTF-8 ({error.reason} at byte "
            f"{error.start} of it); convert the files, for example with iconv"
        ) from None


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer puts before a text: nothing, BOS, or several tokens."""
    bare = tokenizer("text", add_special_tokens=False).input_ids
    whole = tokenizer("text").input_ids
    before = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), None)
    if before is None:  # its first tokens change the ones behind them
        special = set(tokenizer.all_special_ids)
        before = next((i for i, token in enumerate(whole) if token not in special), 0)
    return tuple(whole[:before])


def tokenize(
    batch: dict[str, list[str | None]], *, tokenizer: PreTrainedTokenizerBase, column: str
) -> dict[str, list[Any]]:
    """Token ids of every document that is not empty, each with one end token behind it."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    texts = [text for text in batch[column] if text]
    if strange := next((text for text in texts if not isinstance(text, str)), None):
        raise UsageError(f"--text_column {column}: holds {repr(strange)[:80]}, which is not text")
    if not texts:
        return {"input_ids": []}
    # Long documents are the point of packing: the tokenizer's length warning does not apply.
    ids: Any = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return {"input_ids": [[*document, end] for document in ids]}


def pack(
    dataset: Any, encode: partial[dict[str, list[list[int]]]], ctx_len: int, prefix: tuple[int, ...]
) -> Iterator[np.ndarray]:
    rest, stride = np.empty(0, dtype=np.int64), ctx_len - len(prefix)
    batches = iter(dataset.iter(batch_size=DOCUMENTS_PER_CALL))
    while True:
        with reading_utf8(encode.keywords["column"]):
            batch = next(batches, None)
        if batch is None:
            return
        if "input_ids" in batch:
            for row in batch["input_ids"]:
                if len(row) != ctx_len:
                    raise UsageError(f"--ctx_len {ctx_len}: the stream has input_ids of {len(row)}")
                yield np.asarray(row, dtype=np.int64)
            continue
        documents = encode(batch)["input_ids"]
        rest = np.concatenate([rest, *(np.asarray(d, dtype=np.int64) for d in documents)])
        whole = len(rest) // stride * stride
        for row in rest[:whole].reshape(-1, stride):
            yield np.concatenate([np.asarray(prefix, dtype=np.int64), row])
        rest = rest[whole:]

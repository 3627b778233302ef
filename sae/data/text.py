"""Text or token ids to blocks, checked against the LM."""

from functools import partial
from typing import Any

import datasets
from torch import Tensor

from ..config import DataConfig, ModelConfig
from ..flag_checks import UsageError
from .blocks import TokenBlocks, TokenSource, TokenStream, check_ids
from .files import cache_file, open_dataset
from .ids import flat_ids, from_file, from_rows, from_tensor
from .tokenizing import (
    DOCUMENTS_PER_CALL,
    leading_tokens,
    load_tokenizer,
    pack,
    reading_utf8,
    tokenize,
)


def load_tokens(
    cfg: DataConfig,
    model: ModelConfig,
    limits: tuple[int, int | None],
    tokenizer: str | None = None,
    dataset: datasets.Dataset | Tensor | None = None,
) -> TokenSource:
    """Blocks of `ctx_len` tokens from the Hub, a folder or file here, a `Dataset` or a tensor.

    Text is joined with the end-of-document token between documents and cut into blocks; no token
    is lost but those of the last partial block. A set with `input_ids` is used as it is.
    `limits` are the LM's vocabulary size and positions; `tokenizer` (default: the model's) and
    `dataset` take the place of names in the configs. A stream has the blocks that `eval_tokens` and
    `max_examples` take. Raises UsageError where the data cannot be found, read, or do not fit the
    LM.
    """
    if isinstance(dataset, Tensor):
        return _checked(from_tensor(dataset), "dataset", limits)
    name = cfg.dataset if dataset is None else "dataset"
    if dataset is None and name.endswith((".bin", ".npy")):
        return _checked(from_file(name, cfg.ctx_len, limits[0], cfg.token_dtype), name, limits)
    data: Any = open_dataset(cfg, model.hf_token) if dataset is None else dataset
    with reading_utf8(cfg.text_column):
        columns = data.column_names or list(next(iter(data), {}))
    if "input_ids" in columns and not cfg.streaming:
        return _checked(from_rows(data, name), name, limits)
    if "input_ids" not in columns and cfg.text_column not in columns:
        raise UsageError(
            f"--text_column {cfg.text_column}: DATASET {name} has the columns "
            f"{', '.join(columns)}; name the one that holds text"
        )
    _check_length(cfg.ctx_len, limits[1])  # before hours of tokenizing
    words = load_tokenizer(tokenizer or model.model, model)
    # The reference lets the tokenizer start every block (with BOS, say); LMs trained so need it.
    prefix = leading_tokens(words)
    if cfg.ctx_len <= len(prefix):
        raise UsageError(f"--ctx_len {cfg.ctx_len}: what the tokenizer puts first fills a sequence")
    encode = partial(tokenize, tokenizer=words, column=cfg.text_column)
    if cfg.streaming:
        stream_blocks = -(-cfg.eval_tokens // cfg.ctx_len) + (cfg.max_examples or 0)
        if isinstance(data, datasets.Dataset):
            data = data.to_iterable_dataset()
        mixed = data.shuffle(seed=cfg.shuffle_seed, buffer_size=10_000)
        return TokenStream(
            lambda: pack(mixed, encode, cfg.ctx_len, prefix),
            *(stream_blocks, cfg.ctx_len, limits[0]),
        )
    # `datasets` caches the result under a fingerprint of the text, the tokenizer and the column.
    processes = min(cfg.data_preprocessing_num_proc, max(1, len(data) // DOCUMENTS_PER_CALL))
    with reading_utf8(cfg.text_column):
        ids = data.map(
            encode,
            batched=True,
            batch_size=DOCUMENTS_PER_CALL,
            remove_columns=columns,
            features=datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))}),
            num_proc=processes,
            desc="Tokenizing",
            cache_file_name=cache_file(data, encode),
        )
    return _checked(TokenBlocks(flat_ids(ids), cfg.ctx_len - len(prefix), prefix), name, limits)


def _check_length(length: int, positions: int | None) -> None:
    if positions is not None and length > positions:
        raise UsageError(
            f"--ctx_len {length}: MODEL has {positions} positions; lower --ctx_len, or give "
            f"shorter rows of input_ids"
        )


def _checked(blocks: TokenBlocks, name: str, limits: tuple[int, int | None]) -> TokenBlocks:
    _check_length(blocks.block_len, limits[1])
    if len(blocks) == 0:
        raise UsageError(
            f"DATASET {name}: {blocks.tokens} tokens are less than one block of "
            f"{blocks.stride}: lower --ctx_len or give more data"
        )
    check_ids(f"DATASET {name}", *blocks.token_range(), limits[0])
    return blocks

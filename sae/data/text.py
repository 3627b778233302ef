"""Text or token ids to blocks, checked against the LM."""

from dataclasses import replace
from typing import Any

import datasets
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..config import DataConfig, ModelConfig
from ..flag_checks import UsageError
from .blocks import TokenBlocks, TokenSource, TokenStream, check_ids
from .files import cache_file, open_dataset, reading
from .ids import (
    IdRows,
    are_ragged,
    flat_ids,
    flat_masks,
    from_file,
    from_rows,
    from_tensor,
    left_out,
)
from .streams import blocks_of_stream
from .tokenizing import (
    CHAT_COLUMNS,
    DOCUMENTS_PER_CALL,
    Encoder,
    end_token,
    leading_tokens,
    load_tokenizer,
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
    is lost but those of the last partial block. Token ids are used as they are, or joined where
    they are of unlike lengths. `limits` are the LM's vocabulary size and positions; `tokenizer`
    (default: the model's) and `dataset` take the place of names in the configs. A stream has the
    blocks that `eval_tokens` and `max_examples` take. Raises UsageError where the data cannot be
    found, read, or do not fit the LM.
    """
    for token in model.exclude_tokens:
        if not 0 <= token < limits[0]:
            raise UsageError(f"--exclude_tokens {token}: MODEL has tokens 0 to {limits[0] - 1}")
    if isinstance(dataset, Tensor):
        return _checked(from_tensor(dataset), "dataset", limits)
    name = cfg.dataset if dataset is None else "dataset"
    if dataset is None and name.endswith((".bin", ".npy")):
        return _checked(from_file(name, cfg.ctx_len, limits[0], cfg.token_dtype), name, limits)
    data: Any = open_dataset(cfg, model.hf_token) if dataset is None else dataset
    if cfg.streaming and isinstance(data, datasets.Dataset):
        data = data.to_iterable_dataset()
    column = _column(cfg, name, data)
    are_ids = column == "input_ids"
    if are_ids and not cfg.streaming and (cfg.pack or not are_ragged(data, name)):
        return _checked(from_rows(data, name, cfg.ctx_len), name, limits)
    _check_length(cfg.ctx_len, limits[1])  # before hours of tokenizing
    encode, prefix = IdRows(name, None if cfg.pack else cfg.ctx_len), ()
    if not are_ids:
        encode, prefix = _encoder(cfg, _words(tokenizer, model), column)
    if cfg.streaming:
        count = -(-cfg.eval_tokens // cfg.ctx_len) + (cfg.max_examples or 0)
        mixed = data.shuffle(seed=cfg.shuffle_seed, buffer_size=10_000)
        return TokenStream(
            lambda: blocks_of_stream(mixed, encode, cfg, prefix), count, cfg.ctx_len, limits[0]
        )
    left_out(data, column, name)
    ids = _tokenized(cfg, data, encode)
    if not cfg.pack:
        return _checked(from_rows(ids, name, cfg.ctx_len, tuple(encode.masks)), name, limits)
    counted = flat_masks(ids, "counted") if "counted" in encode.masks else None
    blocks = TokenBlocks(flat_ids(ids), cfg.ctx_len - len(prefix), prefix, counted=counted)
    return _checked(blocks, name, limits)


def _words(tokenizer: str | None, model: ModelConfig) -> PreTrainedTokenizerBase:
    """The LM's tokenizer. Raises UsageError for an LM from Python that does not say its name."""
    if tokenizer == "" and model.model == ModelConfig.model:
        raise UsageError(
            "lm: was not loaded from a folder or the Hub, so its tokenizer is not known: give "
            "token ids, or name by --model (ModelConfig.model) where the tokenizer is"
        )
    name = tokenizer or model.model
    return load_tokenizer(name, model if name == model.model else replace(model, revision=None))


def _column(cfg: DataConfig, name: str, data: Any) -> str:
    """The column to read: the one asked for, else the first of those that are known."""
    with reading(cfg):
        columns = data.column_names or list(next(iter(data), {}))
    wanted = (cfg.text_column,) if cfg.text_column else ("input_ids", "text", *CHAT_COLUMNS)
    found = next((column for column in wanted if column in columns), None)
    if found is None:
        raise UsageError(
            f"--text_column {cfg.text_column or 'text'}: DATASET {name} has the columns "
            f"{', '.join(columns)}; name the one that holds text"
        )
    if cfg.chat_roles and found not in CHAT_COLUMNS:
        raise UsageError(
            f"--chat_roles {' '.join(cfg.chat_roles)}: column {found} of DATASET {name} holds no "
            f"chats; they are in columns called {' or '.join(CHAT_COLUMNS)}"
        )
    return found


def _encoder(
    cfg: DataConfig, words: PreTrainedTokenizerBase, column: str
) -> tuple[Encoder, tuple[int, ...]]:
    """How documents become ids, and what comes before every block.

    The reference lets the tokenizer start every block (with BOS, say); LMs trained so need it.
    """
    lead = leading_tokens(words)
    if cfg.ctx_len <= len(lead):
        raise UsageError(f"--ctx_len {cfg.ctx_len}: what the tokenizer puts first fills a sequence")
    if cfg.chat_roles and not words.is_fast:
        raise UsageError(
            f"--chat_roles {' '.join(cfg.chat_roles)}: {type(words).__name__} does not say which "
            f"characters a token stands for; leave the flag out"
        )
    by_document = cfg.bos_per_document or not cfg.pack
    encode = Encoder(
        words,
        column,
        end_token(words, cfg),
        lead if by_document else (),
        cfg.chat_roles,
        None if cfg.pack else cfg.ctx_len,
    )
    return encode, () if by_document else lead


def _tokenized(
    cfg: DataConfig, data: datasets.Dataset, encode: Encoder | IdRows
) -> datasets.Dataset:
    """Documents as token ids; `datasets` caches them by a fingerprint of text and encoder."""
    processes = min(cfg.data_preprocessing_num_proc, max(1, len(data) // DOCUMENTS_PER_CALL))
    kinds = {name: datasets.List(datasets.Value("bool")) for name in encode.masks}
    kinds["input_ids"] = datasets.List(datasets.Value("int32"))
    with reading(cfg):
        return data.map(
            encode,
            batched=True,
            batch_size=DOCUMENTS_PER_CALL,
            remove_columns=data.column_names,
            features=datasets.Features(kinds),
            num_proc=processes,
            desc="Tokenizing",
            cache_file_name=cache_file(data, encode),
        )


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

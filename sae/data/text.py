"""Text to token blocks: find it, tokenize it, check it against the LM."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..config import DataConfig, ModelConfig
from ..flag_checks import UsageError
from .blocks import TokenBlocks, TokenSource, TokenStream, check_ids

_READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
_DOCUMENTS_PER_CALL = 1000


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
        return _checked(_from_tensor(dataset), "dataset", limits)
    name = cfg.dataset if dataset is None else "dataset"
    if dataset is None and name.endswith(".bin"):
        return _checked(_from_bin(name, cfg.ctx_len, limits[0], cfg.token_dtype), name, limits)
    data: Any = _open(cfg, model.hf_token) if dataset is None else dataset
    with _of_text(cfg.text_column):
        columns = data.column_names or list(next(iter(data), {}))
    if "input_ids" in columns and not cfg.streaming:
        return _checked(_from_rows(data, name), name, limits)
    if "input_ids" not in columns and cfg.text_column not in columns:
        raise UsageError(
            f"--text_column {cfg.text_column}: DATASET {name} has the columns "
            f"{', '.join(columns)}; name the one that holds text"
        )
    _check_length(cfg.ctx_len, limits[1])  # before hours of tokenizing
    words = _tokenizer(tokenizer or model.model, model)
    # The reference lets the tokenizer start every block (with BOS, say); LMs trained so need it.
    prefix = _leading_tokens(words)
    if cfg.ctx_len <= len(prefix):
        raise UsageError(
            f"--ctx_len {cfg.ctx_len}: the tokenizer's first token alone fills a sequence"
        )
    encode = partial(_tokenize, tokenizer=words, column=cfg.text_column)
    if cfg.streaming:
        stream_blocks = -(-cfg.eval_tokens // cfg.ctx_len) + (cfg.max_examples or 0)
        if isinstance(data, datasets.Dataset):
            data = data.to_iterable_dataset()
        mixed = data.shuffle(seed=cfg.shuffle_seed, buffer_size=10_000)
        return TokenStream(
            lambda: _packed(mixed, encode, cfg.ctx_len, prefix),
            *(stream_blocks, cfg.ctx_len, limits[0]),
        )
    # `datasets` caches the result under a fingerprint of the text, the tokenizer and the column.
    processes = min(cfg.data_preprocessing_num_proc, max(1, len(data) // _DOCUMENTS_PER_CALL))
    with _of_text(cfg.text_column):
        ids = data.map(
            encode,
            batched=True,
            batch_size=_DOCUMENTS_PER_CALL,
            remove_columns=columns,
            features=datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))}),
            num_proc=processes,
            desc="Tokenizing",
        )
    return _checked(TokenBlocks(_flat(ids), cfg.ctx_len - len(prefix), prefix), name, limits)


def _open(cfg: DataConfig, token: str | None) -> Any:
    name, split, streaming = cfg.dataset, cfg.split, cfg.streaming
    path = Path(name)
    arguments: dict[str, Any] = {**parse_data_args(cfg.data_args)}
    try:
        if path.is_dir() and (path / "dataset_info.json").exists():
            return datasets.load_from_disk(str(path))
        if path.is_dir() and (path / "dataset_dict.json").exists():
            return datasets.load_from_disk(str(path))[split]
        if path.exists():
            files = [path] if path.is_file() else sorted(f for f in path.iterdir() if f.is_file())
            files = [f for f in files if f.suffix in _READERS]
            if not files:
                raise UsageError(
                    f"DATASET {name}: nothing here that can be read; give a folder saved by "
                    f"datasets, or {', '.join(_READERS)} or .bin files"
                )
            for file in files:
                if file.stat().st_size == 0:
                    raise UsageError(f"DATASET {file}: the file is empty")
            kinds = sorted({f.suffix for f in files})
            if len({_READERS[kind] for kind in kinds}) > 1:
                raise UsageError(
                    f"DATASET {name}: holds {' and '.join(kinds)} files; give a folder of one "
                    f"kind, or one file"
                )
            reader = _READERS[files[0].suffix]
            if reader == "text":  # a file is a document
                arguments = {"sample_by": "document", **arguments}
            names = [str(f) for f in files]
            return datasets.load_dataset(
                reader, data_files={split: names}, split=split, streaming=streaming, **arguments
            )
        return datasets.load_dataset(
            name, split=split, streaming=streaming, token=token, **arguments
        )
    except UsageError:
        raise
    except Exception as error:  # each format's reader has errors of its own
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"DATASET {name} (--split {split}): cannot be read here or from the Hub. {reason}"
        ) from None


def _tokenizer(name: str, model: ModelConfig) -> PreTrainedTokenizerBase:
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
def _of_text(column: str) -> Iterator[None]:
    """Files are checked to be text only when they are read."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--text_column {column}: a document is not UTF-8 ({error.reason} at byte "
            f"{error.start} of it); convert the files, for example with iconv"
        ) from None


def _leading_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer puts before a text: nothing, or one token such as BOS."""
    bare = tokenizer("text", add_special_tokens=False).input_ids
    whole = tokenizer("text").input_ids
    return () if whole[: len(bare)] == bare else tuple(whole[:1])


def _tokenize(
    batch: dict[str, list[str | None]], *, tokenizer: PreTrainedTokenizerBase, column: str
) -> dict[str, list[Any]]:
    """Token ids of every document that is not empty, each with one end token behind it."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    texts = [text for text in batch[column] if text]
    if strange := next((text for text in texts if not isinstance(text, str)), None):
        raise UsageError(f"--text_column {column}: holds {strange!r}, which is not text")
    if not texts:
        return {"input_ids": []}
    # Long documents are the point of packing: the tokenizer's length warning does not apply.
    ids: Any = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return {"input_ids": [[*document, end] for document in ids]}


def _packed(
    dataset: Any, encode: partial[dict[str, list[list[int]]]], ctx_len: int, prefix: tuple[int, ...]
) -> Iterator[np.ndarray]:
    rest, stride = np.empty(0, dtype=np.int64), ctx_len - len(prefix)
    batches = iter(dataset.iter(batch_size=_DOCUMENTS_PER_CALL))
    while True:
        with _of_text(encode.keywords["column"]):
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


def _from_tensor(tokens: Tensor) -> TokenBlocks:
    if tokens.ndim != 2 or tokens.is_floating_point() or not tokens.numel():
        raise UsageError(
            f"dataset: a tensor of shape {tuple(tokens.shape)} and type {tokens.dtype}; give "
            f"integer token ids of shape [blocks, ctx_len]"
        )
    return TokenBlocks([tokens.cpu().contiguous().view(-1).numpy()], tokens.shape[1])


def _from_bin(name: str, ctx_len: int, vocab_size: int, token_dtype: str | None) -> TokenBlocks:
    dtype = np.dtype(token_dtype or ("uint16" if vocab_size <= 2**16 else "uint32"))
    path = Path(name)
    if not path.is_file():
        raise UsageError(f"DATASET {name}: no such file")
    size = path.stat().st_size
    if size == 0 or size % dtype.itemsize:
        raise UsageError(
            f"DATASET {name}: {size} bytes are not whole {dtype} tokens; set --token_dtype to what "
            f"the file holds"
        )
    blocks = TokenBlocks([np.memmap(path, dtype=dtype, mode="r")], ctx_len)
    if rest := blocks.tokens % ctx_len:
        print(f"{name}: the last {rest} tokens do not fill a block of {ctx_len} and are left out")
    return blocks


def _from_rows(dataset: datasets.Dataset, name: str) -> TokenBlocks:
    kind = dataset.features["input_ids"]
    ids = getattr(kind, "feature", None)
    if not isinstance(ids, datasets.Value) or "int" not in ids.dtype:
        raise UsageError(f"DATASET {name}: its input_ids are {kind}, not lists of integers")
    if dataset._indices is not None:  # a selection or shuffle is a view until it is flattened
        dataset = dataset.flatten_indices()
    chunks = dataset.data.column("input_ids").chunks
    lengths = {int(n) for chunk in chunks for n in np.unique(chunk.value_lengths().to_numpy())}
    if len(lengths) != 1 or 0 in lengths:
        raise UsageError(
            f"DATASET {name}: its input_ids have lengths {sorted(lengths)[:5]}; give "
            f"rows of one length, or a text column to be packed"
        )
    return TokenBlocks(_flat(dataset), lengths.pop())


def _flat(dataset: datasets.Dataset) -> list[np.ndarray]:
    """The tokens of all rows as arrays over the data set's memory map, without copying them."""
    chunks = dataset.data.column("input_ids").chunks if len(dataset) else []
    return [chunk.flatten().to_numpy() for chunk in chunks if len(chunk.flatten())]


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


def parse_data_args(text: str) -> dict[str, str | int | float | bool | None]:
    """`"a=b,c=1"` as keyword arguments of `datasets.load_dataset`, numbers and booleans typed."""
    parsed: dict[str, str | int | float | bool | None] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = item.partition("=")
        if not equals or not name.strip().isidentifier():
            raise UsageError(f'--data_args "{text}": {item!r} is not of the form name=value')
        parsed[name.strip()] = _literal(value.strip())
    return parsed


def _literal(text: str) -> str | int | float | bool | None:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text

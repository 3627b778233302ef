"""Text to token blocks: load, pack, hold out, order.

Every source ends as a sequence of blocks [S] of token ids, read by number. Which blocks a step sees
is a pure function of the seed and the step, so a resumed run needs no state but its step.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import datasets
import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .config import UsageError, parse_data_args

_READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
_DOCUMENTS_PER_CALL = 1000


class TokenSource(Protocol):
    """What the trainer reads from: numbered blocks of `block_len` token ids."""

    @property
    def block_len(self) -> int: ...

    def __len__(self) -> int: ...

    def order(self, numbers: range, seed: int) -> Int[Tensor, " n"]: ...

    def batches(self, order: Tensor, batch_size: int) -> Iterator[Int[Tensor, "B S"]]: ...


@dataclass(frozen=True)
class TokenBlocks:
    """Blocks of tokens cut from arrays that may stay on disk, as if the arrays were joined.

    A block is `prefix` (none, or the token that the LM expects at the start) and `stride` tokens.
    """

    arrays: list[np.ndarray]
    stride: int
    prefix: tuple[int, ...] = ()

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([len(a) for a in self.arrays])

    @property
    def block_len(self) -> int:
        """Tokens in a block."""
        return len(self.prefix) + self.stride

    @property
    def tokens(self) -> int:
        """Tokens in the arrays, those of a last partial block too."""
        return sum(len(a) for a in self.arrays)

    def __len__(self) -> int:
        return self.tokens // self.stride

    def __getitem__(self, index: int) -> np.ndarray:
        """Block number `index`, [S] int64."""
        begin, missing = index * self.stride, self.stride
        pieces = [np.asarray(self.prefix, dtype=np.int64)]
        which = int(np.searchsorted(self._ends, begin, side="right"))
        while missing:
            offset = begin - (self._ends[which] - len(self.arrays[which]))
            pieces.append(self.arrays[which][offset : offset + missing])
            begin, missing, which = begin + len(pieces[-1]), missing - len(pieces[-1]), which + 1
        return np.concatenate(pieces).astype(np.int64)

    def order(self, numbers: range, seed: int) -> Int[Tensor, " n"]:
        """The numbers in an order that depends on the seed alone."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(len(numbers), generator=generator) + numbers.start

    def batches(self, order: Tensor, batch_size: int) -> Iterator[Int[Tensor, "B S"]]:
        """Batches of the blocks numbered by `order`; the last one may be smaller."""
        for numbers in order.split(batch_size):
            yield torch.from_numpy(np.stack([self[int(i)] for i in numbers]))

    def largest_token(self) -> int:
        """The largest token id."""
        return max(int(a.max()) for a in self.arrays if len(a))


@dataclass(frozen=True)
class TokenStream:
    """Blocks read in the order of a stream; asking for a block means reading all before it."""

    blocks: Callable[[], Iterator[np.ndarray]]
    length: int
    block_len: int

    def __len__(self) -> int:
        return self.length

    def order(self, numbers: range, seed: int) -> Int[Tensor, " n"]:
        """The numbers as they come: the seed that the stream was opened with shuffled it."""
        return torch.arange(numbers.start, numbers.stop)

    def batches(self, order: Tensor, batch_size: int) -> Iterator[Int[Tensor, "B S"]]:
        """Batches of consecutive blocks from number `order[0]` on; the last one may be smaller."""
        first = int(order[0]) if len(order) else 0
        stream = islice(self.blocks(), first, first + len(order))
        read = 0
        while rows := list(islice(stream, batch_size)):
            read += len(rows)
            yield torch.from_numpy(np.stack(rows))
        if read < len(order):
            raise UsageError(
                f"--streaming: the data set ended after {first + read:,} sequences of "
                f"{self.block_len} tokens, those held out included: lower --max_examples"
            )


def load_tokens(
    dataset: str | datasets.Dataset | Tensor,
    *,
    tokenizer: str,
    limits: tuple[int, int | None],
    ctx_len: int,
    split: str = "train",
    text_column: str = "text",
    data_args: str = "",
    num_proc: int = 1,
    stream_blocks: int | None = None,
    shuffle_seed: int = 42,
    token_dtype: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> TokenSource:
    """Blocks of `ctx_len` tokens from the Hub, a folder or file here, a `Dataset` or a tensor.

    Text is joined with the end-of-document token between documents and cut into blocks; no token
    is lost but those of the last partial block. A set with `input_ids` is used as it is.
    `limits` are the LM's vocabulary size and positions. `stream_blocks` asks for a stream, of that
    many blocks. Raises UsageError where the data cannot be found, read, or do not fit the LM.
    """
    streaming = stream_blocks is not None
    if isinstance(dataset, Tensor):
        return _checked(_from_tensor(dataset), "dataset", limits)
    name = dataset if isinstance(dataset, str) else "dataset"
    if isinstance(dataset, str) and dataset.endswith(".bin"):
        return _checked(_from_bin(dataset, ctx_len, limits[0], token_dtype), name, limits)
    arguments = parse_data_args(data_args)
    data: Any = dataset
    if isinstance(dataset, str):
        data = _open(dataset, split, arguments, streaming, token)
    columns = data.column_names or list(next(iter(data), {}))
    if "input_ids" in columns and not streaming:
        return _checked(_from_rows(data, name), name, limits)
    if "input_ids" not in columns and text_column not in columns:
        raise UsageError(
            f"--text_column {text_column}: DATASET {name} has the columns {', '.join(columns)}; "
            f"name the one that holds text"
        )
    _check_length(ctx_len, limits[1])  # before hours of tokenizing
    words = _tokenizer(tokenizer, revision, token)
    # The reference lets the tokenizer start every block (with BOS, say); LMs trained so need it.
    prefix = tuple(words("")["input_ids"][:1])
    encode = partial(_tokenize, tokenizer=words, column=text_column)
    if stream_blocks is not None:
        if isinstance(data, datasets.Dataset):
            data = data.to_iterable_dataset()
        mixed = data.shuffle(seed=shuffle_seed, buffer_size=10_000)
        return TokenStream(lambda: _packed(mixed, encode, ctx_len, prefix), stream_blocks, ctx_len)
    # `datasets` caches the result under a fingerprint of the text, the tokenizer and the column.
    ids = data.map(
        encode,
        batched=True,
        batch_size=_DOCUMENTS_PER_CALL,
        remove_columns=columns,
        features=datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))}),
        num_proc=min(num_proc, max(1, len(data) // _DOCUMENTS_PER_CALL)),
        desc="Tokenizing",
    )
    return _checked(TokenBlocks(_flat(ids), ctx_len - len(prefix), prefix), name, limits)


def hold_out(
    source: TokenSource, eval_tokens: int, max_examples: int | None, per_step: int
) -> tuple[Int[Tensor, " held"], range]:
    """Numbers of the blocks that are held out, the first of the data, and of those that train.

    `eval_tokens` are held out, in whole blocks, but at most a tenth of the data. `per_step` blocks
    are what one optimizer step consumes. Raises UsageError where less than one step is left.
    """
    held = min(-(-eval_tokens // source.block_len), max(1, len(source) // 10))
    rest = len(source) - held
    if max_examples is not None and max_examples > rest:
        raise UsageError(
            f"--max_examples {max_examples}: the data has {rest} sequences of {source.block_len} "
            f"tokens beside the {held} held out; leave the flag out to use them all"
        )
    used = rest if max_examples is None else max_examples
    if used < per_step:
        raise UsageError(
            f"--batch_size times --grad_acc_steps is {per_step} sequences of {source.block_len} "
            f"tokens, and there are {used} beside the {held} held out: lower --batch_size or "
            f"--ctx_len, or give more data"
        )
    return torch.arange(held), range(held, held + used)


def _open(
    name: str, split: str, arguments: dict[str, Any], streaming: bool, token: str | None
) -> Any:
    path = Path(name)
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
            reader = _READERS[files[0].suffix]
            if reader == "text":  # a file is a document
                arguments = {"sample_by": "document", **arguments}
            names = [str(f) for f in files if _READERS[f.suffix] == reader]
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


def _tokenizer(name: str, revision: str | None, token: str | None) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, token=token)
    except Exception as error:  # each tokenizer's backend has errors of its own
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"MODEL {name}: its tokenizer cannot be loaded. {reason}") from None
    if not tokenizer("text").input_ids:
        raise UsageError(f"MODEL {name}: it has no tokenizer; give token ids (.bin, input_ids)")
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is None:
        raise UsageError(f"MODEL {name}: its tokenizer has no end token to put between documents")
    return tokenizer


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
    dataset: Any,
    encode: Callable[..., dict[str, list[list[int]]]],
    ctx_len: int,
    prefix: tuple[int, ...],
) -> Iterator[np.ndarray]:
    rest, stride = np.empty(0, dtype=np.int64), ctx_len - len(prefix)
    for batch in dataset.iter(batch_size=_DOCUMENTS_PER_CALL):
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
    largest = blocks.largest_token()
    if largest >= limits[0]:
        raise UsageError(
            f"DATASET {name}: holds token {largest}, and MODEL has {limits[0]} tokens: the data "
            f"were made with another tokenizer (or --token_dtype is wrong)"
        )
    return blocks

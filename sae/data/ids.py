"""Token ids that are there already: tensors, .bin and .npy files, columns of input_ids."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import datasets
import numpy as np
import pyarrow.compute as pc
from torch import Tensor

from ..flag_checks import UsageError
from .blocks import TokenBlocks

# llm.c and its relatives: 256 int32 of header, the first of which says the type of the ids.
_LLM_C = {20240520: "uint16", 20240801: "uint32"}
_LLM_C_BYTES = 1024
_LOOKED_AT = 1 << 20  # ids from the start of a file, to tell the width of its ids


def from_tensor(tokens: Tensor) -> TokenBlocks:
    """A tensor of token ids [blocks, ctx_len] as it is."""
    if tokens.ndim != 2 or tokens.is_floating_point() or not tokens.numel():
        raise UsageError(
            f"dataset: a tensor of shape {tuple(tokens.shape)} and type {tokens.dtype}; give "
            f"integer token ids of shape [blocks, ctx_len]"
        )
    return TokenBlocks([tokens.cpu().contiguous().view(-1).numpy()], tokens.shape[1])


def from_file(name: str, ctx_len: int, vocab_size: int, token_dtype: str | None) -> TokenBlocks:
    """Blocks of `ctx_len` ids from a .bin or .npy file, which stays on disk.

    Raises UsageError for a file that is not there, or whose ids are of another width.
    """
    path = Path(name)
    if not path.is_file():
        raise UsageError(f"DATASET {name}: no such file")
    ids = _read_npy(path) if path.suffix == ".npy" else _read_bin(path, vocab_size, token_dtype)
    if ids.ndim == 2:
        return TokenBlocks([ids.reshape(-1)], ids.shape[1])
    blocks = TokenBlocks([ids], ctx_len)
    if rest := blocks.tokens % ctx_len:
        print(f"{name}: the last {rest} tokens do not fill a block of {ctx_len} and are left out")
    return blocks


def _read_npy(path: Path) -> np.ndarray:
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"DATASET {path}: cannot be read ({error})") from None
    if ids.ndim not in (1, 2) or ids.dtype.kind not in "iu" or not ids.size:
        raise UsageError(
            f"DATASET {path}: holds {ids.dtype} of shape {ids.shape}; give integer token ids, in a "
            f"row or of shape [blocks, ctx_len]"
        )
    return ids


def _read_bin(path: Path, vocab_size: int, token_dtype: str | None) -> np.ndarray:
    size, header = path.stat().st_size, np.fromfile(path, dtype="<i4", count=1)
    known = _LLM_C.get(int(header[0])) if len(header) and size > _LLM_C_BYTES else None
    offset = _LLM_C_BYTES if known else 0
    smallest = "uint16" if vocab_size <= 2**16 else "uint32"
    dtype = np.dtype(token_dtype or known or smallest)
    if size <= offset or (size - offset) % dtype.itemsize:
        raise UsageError(
            f"DATASET {path}: {size - offset} bytes are not whole {dtype} tokens; set "
            f"--token_dtype to what the file holds"
        )
    ids = np.memmap(path, dtype=dtype, mode="r", offset=offset)
    if token_dtype is None and known is None:
        _check_width(path, ids)
    return ids


def _check_width(path: Path, ids: np.ndarray) -> None:
    """Raise UsageError where most ids are the zeros that fill up wider ones."""
    bits = 8 * ids.dtype.itemsize
    for wider in (4, 2):
        some = np.asarray(ids[: _LOOKED_AT // wider * wider])
        if bits * wider > 64 or len(some) < 2 * wider or len(ids) % wider:
            continue
        parts = some[: len(some) // wider * wider].reshape(-1, wider)
        if parts[:, 0].any() and not parts[:, wider // 2 :].any():
            raise UsageError(
                f"DATASET {path}: read as {ids.dtype}, its ids come with {wider - 1} zeros behind "
                f"each: they are {bits * wider} bits wide. Set --token_dtype int{bits * wider} (or "
                f"--token_dtype {ids.dtype} if the zeros are meant)"
            )


@dataclass(frozen=True)
class IdRows:
    """How rows of input_ids are read one by one, as an `Encoder` reads documents."""

    name: str
    length: int | None
    """Without packing, the length that rows are cut and padded to."""
    column: ClassVar[str] = "input_ids"
    roles: ClassVar[tuple[str, ...]] = ()
    masks: ClassVar[list[str]] = ["attention_mask"]

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Ids and what of them is no padding, of all rows that hold a token that is read.

        Raises UsageError for ids that are no integers and masks that do not fit them.
        """
        columns: dict[str, list[Any]] = {"input_ids": [], "attention_mask": []}
        masks = batch.get("attention_mask")
        for i, row in enumerate(batch["input_ids"]):
            ids = np.asarray([] if row is None else row)
            if not ids.size:
                continue
            if ids.ndim != 1 or ids.dtype.kind not in "iu":
                raise UsageError(
                    f"DATASET {self.name}: a row of its input_ids holds {repr(row)[:80]}, which is "
                    f"no list of integers"
                )
            mask = np.ones(len(ids), dtype=bool) if masks is None else np.asarray(masks[i])
            if mask.shape != ids.shape:
                raise _other_length(self.name, "attention_mask")
            mask = mask.astype(bool)
            if self.length is not None:  # padding of its own takes no room from a row
                ids, mask = self._fitted(ids[mask]), self._fitted(mask[mask])
            if mask.any():
                columns["input_ids"].append(ids)
                columns["attention_mask"].append(mask)
        return columns

    def _fitted(self, values: np.ndarray) -> np.ndarray:
        assert self.length is not None
        return np.pad(values[: self.length], (0, max(0, self.length - len(values))))


def _other_length(name: str, column: str) -> UsageError:
    return UsageError(
        f"DATASET {name}: its {column} is not as long as its input_ids: give one number per token, "
        f"or take the column out"
    )


def left_out(dataset: datasets.Dataset, column: str, name: str) -> np.ndarray:
    """Which rows hold null in a column, and so are left out; says how many."""
    missing = dataset.data.column(column).is_null()
    if dataset._indices is not None:
        missing = missing.take(dataset._indices.column(0))
    rows = np.asarray(missing.to_numpy(), dtype=bool)
    if rows.any():
        print(f"DATASET {name}: {rows.sum()} of its {len(rows)} rows have no {column}: left out")
    return rows


def are_ragged(dataset: datasets.Dataset, name: str) -> bool:
    """Whether rows of input_ids that are not null are of unlike lengths."""
    _check_type(dataset, name)
    lengths = pc.call_function("list_value_length", [dataset.data.column("input_ids")])
    if dataset._indices is not None:
        lengths = lengths.take(dataset._indices.column(0))
    return len(lengths.drop_null().unique()) > 1


def _check_type(dataset: datasets.Dataset, name: str) -> None:
    """Raise UsageError unless input_ids are lists of integers."""
    kind = dataset.features["input_ids"]
    ids = getattr(kind, "feature", None)
    if not isinstance(ids, datasets.Value) or "int" not in ids.dtype:
        raise UsageError(f"DATASET {name}: its input_ids are {kind}, not lists of integers")


def from_rows(
    dataset: datasets.Dataset, name: str, ctx_len: int, masks: tuple[str, ...] = ("attention_mask",)
) -> TokenBlocks:
    """Rows of input_ids as they are; those of unlike lengths joined, and cut into `ctx_len`.

    Where an `attention_mask` says what is padding, it is no token. Null rows are left out.
    """
    _check_type(dataset, name)
    if (missing := left_out(dataset, "input_ids", name)).any():
        dataset = dataset.select(np.flatnonzero(~missing))
    if dataset._indices is not None:  # a selection or shuffle is a view until it is flattened
        dataset = dataset.flatten_indices()
    chunks = dataset.data.column("input_ids").chunks
    if any(chunk.flatten().null_count for chunk in chunks):
        raise UsageError(f"DATASET {name}: a row of its input_ids holds null instead of an id")
    lengths = {int(n) for chunk in chunks for n in np.unique(chunk.value_lengths().to_numpy())}
    flat = flat_ids(dataset)
    found = {column: _mask(dataset, column, name) for column in masks}
    attended, counted = found.get("attention_mask"), found.get("counted")
    if len(lengths) == 1 and 0 not in lengths:
        return TokenBlocks(flat, lengths.pop(), (), attended, counted)
    if attended is not None:  # joined rows need no padding
        read = [np.asarray(mask, dtype=bool) for mask in attended]
        flat = [a[mask] for a, mask in zip(flat, read, strict=True)]
        if counted is not None:
            counted = [a[mask] for a, mask in zip(counted, read, strict=True)]
    return TokenBlocks(flat, ctx_len, (), counted=counted)


def _mask(dataset: datasets.Dataset, column: str, name: str) -> list[np.ndarray] | None:
    """A mask beside input_ids, token by token; None for one that is not there or hides none."""
    if column not in dataset.column_names:
        return None
    if getattr(dataset.features[column], "feature", None) is None:
        raise _other_length(name, column)
    masks = flat_masks(dataset, column)
    if [len(mask) for mask in masks] != [len(ids) for ids in flat_ids(dataset)]:
        raise _other_length(name, column)
    return None if all(mask.all() for mask in masks) else masks


def flat_masks(dataset: datasets.Dataset, column: str) -> list[np.ndarray]:
    """A mask's values for all tokens, as arrays that lie as those of `flat_ids`."""
    chunks = dataset.data.column(column).chunks if len(dataset) else []
    flat = [chunk.flatten() for chunk in chunks if len(chunk.flatten())]
    return [np.asarray(part.to_numpy(zero_copy_only=False), dtype=bool) for part in flat]


def flat_ids(dataset: datasets.Dataset) -> list[np.ndarray]:
    """The tokens of all rows as arrays over the data set's memory map, without copying them."""
    chunks = dataset.data.column("input_ids").chunks if len(dataset) else []
    return [chunk.flatten().to_numpy() for chunk in chunks if len(chunk.flatten())]

"""Streams of documents or token ids to blocks, one after the other."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..config import DataConfig
from .blocks import Block
from .files import reading
from .ids import IdRows
from .tokenizing import DOCUMENTS_PER_CALL, Encoder

_MASKS = ("attention_mask", "counted")


def blocks_of_stream(
    dataset: Any, encode: Encoder | IdRows, cfg: DataConfig, prefix: tuple[int, ...]
) -> Iterator[Block]:
    """The blocks of a stream: rows of `ctx_len` as they are, others joined and cut."""
    before = np.asarray(prefix, dtype=np.int64)
    stride = cfg.ctx_len - len(prefix)
    rest = {"input_ids": np.empty(0, dtype=np.int64)}
    rest |= {name: np.empty(0, dtype=bool) for name in _MASKS}
    for batch in _batches(dataset, cfg, encode.column):
        columns = encode(batch)
        for i, ids in enumerate(columns["input_ids"]):
            row = {"input_ids": np.asarray(ids, dtype=np.int64)}
            for name in _MASKS:
                mask = columns[name][i] if name in columns else np.ones(len(ids), dtype=bool)
                row[name] = np.asarray(mask, dtype=bool)
            if len(ids) == cfg.ctx_len and not prefix and not len(rest["input_ids"]):
                yield Block(row["input_ids"], row["attention_mask"], row["counted"])
                continue
            read = row["attention_mask"]  # joined rows need no padding
            rest = {name: np.concatenate([rest[name], row[name][read]]) for name in rest}
            while len(rest["input_ids"]) >= stride:
                cut = {name: values[:stride] for name, values in rest.items()}
                rest = {name: values[stride:] for name, values in rest.items()}
                counted = np.concatenate([np.zeros(len(before), dtype=bool), cut["counted"]])
                yield Block(
                    np.concatenate([before, cut["input_ids"]]),
                    None,
                    counted if encode.roles else None,
                )


def _batches(dataset: Any, cfg: DataConfig, column: str) -> Iterator[dict[str, list[Any]]]:
    """The stream's rows, many at a time; says once if some have nothing in the column.

    An error of its reader names the file and the line.
    """
    batches = iter(dataset.iter(batch_size=DOCUMENTS_PER_CALL))
    said = False
    while True:
        with reading(cfg):
            batch = next(batches, None)
        if batch is None:
            return
        if not said and None in batch[column]:
            missing = sum(row is None for row in batch[column])
            print(
                f"--streaming: {missing} of {len(batch[column])} rows read together have no "
                f"{column}: such rows are left out"
            )
            said = True
        yield batch

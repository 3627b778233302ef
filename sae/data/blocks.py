"""Token blocks: numbered, held out, ordered, batched.

Which blocks a step sees is a pure function of the seed and the step, so a resumed run needs no
state but its step.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from ..batch import TokenBatch
from ..config import DataConfig
from ..flag_checks import UsageError


class TokenSource(Protocol):
    """What the trainer reads from: numbered blocks of `block_len` token ids."""

    @property
    def block_len(self) -> int: ...

    @property
    def masked(self) -> bool:
        """Whether a mask may hide tokens, whatever a batch happens to hold."""
        ...

    @property
    def fingerprint(self) -> dict[str, int]: ...

    def __len__(self) -> int: ...

    def order(self, numbers: range, seed: int) -> Int[Tensor, " n"]: ...

    def batches(self, order: Tensor, batch_size: int) -> Iterator[TokenBatch]: ...


class Block(NamedTuple):
    """One sequence of tokens, [S]; a mask that hides nothing is None."""

    ids: np.ndarray
    attended: np.ndarray | None = None
    """False for padding."""
    counted: np.ndarray | None = None
    """False for tokens that are context alone."""


def batch_of(blocks: list[Block]) -> TokenBatch:
    """Blocks of one length as a batch, with padding behind what is read."""

    def stacked(masks: list[np.ndarray | None]) -> Tensor | None:
        if all(mask is None or mask.all() for mask in masks):
            return None
        rows = [np.ones(len(blocks[0].ids), dtype=bool) if mask is None else mask for mask in masks]
        return torch.from_numpy(np.stack(rows))

    ids = torch.from_numpy(np.stack([block.ids for block in blocks]).astype(np.int64))
    attended = stacked([block.attended for block in blocks])
    counted = stacked([block.counted for block in blocks])
    return TokenBatch(ids, attended, counted).padding_last()


@dataclass(frozen=True)
class TokenBlocks:
    """Blocks of tokens cut from arrays that may stay on disk, as if the arrays were joined.

    A block is `prefix` (none, or the tokens that the LM expects at the start) and `stride` tokens.
    """

    arrays: list[np.ndarray]
    stride: int
    prefix: tuple[int, ...] = ()
    attended: list[np.ndarray] | None = None
    """0 for padding; arrays of the same lengths."""
    counted: list[np.ndarray] | None = None
    """0 for tokens that are context alone."""

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.cumsum([len(a) for a in self.arrays])

    @property
    def block_len(self) -> int:
        """Tokens in a block."""
        return len(self.prefix) + self.stride

    @property
    def masked(self) -> bool:
        """Whether there are masks."""
        return self.attended is not None or self.counted is not None

    @property
    def tokens(self) -> int:
        """Tokens in the arrays, those of a last partial block too."""
        return sum(len(a) for a in self.arrays)

    def __len__(self) -> int:
        return self.tokens // self.stride

    def __getitem__(self, index: int) -> Block:
        """Block number `index`, of int64 ids."""
        ids = self._cut(self.arrays, index, np.asarray(self.prefix, dtype=np.int64))
        read = np.ones(len(self.prefix), dtype=bool)
        attended = None if self.attended is None else self._cut(self.attended, index, read)
        # What the LM expects at the start was said by nobody.
        counted = None if self.counted is None else self._cut(self.counted, index, ~read)
        return Block(ids, attended, counted)

    def _cut(self, arrays: list[np.ndarray], index: int, prefix: np.ndarray) -> np.ndarray:
        """Block number `index` of arrays that lie as the ids do, in the type of its prefix."""
        begin, missing = index * self.stride, self.stride
        pieces = [prefix]
        which = int(np.searchsorted(self._ends, begin, side="right"))
        while missing:
            offset = begin - (self._ends[which] - len(arrays[which]))
            pieces.append(arrays[which][offset : offset + missing])
            begin, missing, which = begin + len(pieces[-1]), missing - len(pieces[-1]), which + 1
        return np.concatenate(pieces).astype(prefix.dtype)

    def order(self, numbers: range, seed: int) -> Int[Tensor, " n"]:
        """The numbers in an order that depends on the seed alone."""
        return shuffled(numbers, seed)

    def batches(self, order: Tensor, batch_size: int) -> Iterator[TokenBatch]:
        """Batches of the blocks numbered by `order`; the last one may be smaller."""
        for numbers in order.split(batch_size):
            yield batch_of([self[int(i)] for i in numbers])

    @property
    def fingerprint(self) -> dict[str, int]:
        """What must be equal for a run to be resumed: sizes, and the first and last block."""
        arrays = [a for block in (self[0], self[len(self) - 1]) for a in block if a is not None]
        ends = zlib.crc32(b"".join(a.tobytes() for a in arrays))
        return {"blocks": len(self), "block_len": self.block_len, "ends": ends}

    def token_range(self) -> tuple[int, int]:
        """The smallest and the largest token id."""
        filled = [a for a in self.arrays if len(a)]
        return min(int(a.min()) for a in filled), max(int(a.max()) for a in filled)


@dataclass(frozen=True)
class TokenStream:
    """Blocks read in the order of a stream; asking for a block means reading all before it."""

    blocks: Callable[[], Iterator[Block]]
    length: int
    block_len: int
    vocab_size: int

    @property
    def masked(self) -> bool:
        """True: what a stream will bring is not known."""
        return True

    @property
    def fingerprint(self) -> dict[str, int]:
        """What must be equal for a run to be resumed: a stream's content is not looked at."""
        return {"blocks": self.length, "block_len": self.block_len}

    def __len__(self) -> int:
        return self.length

    def order(self, numbers: range, seed: int) -> Int[Tensor, " n"]:
        """The numbers as they come: the seed that the stream was opened with shuffled it."""
        return torch.arange(numbers.start, numbers.stop)

    def batches(self, order: Tensor, batch_size: int) -> Iterator[TokenBatch]:
        """Batches of the blocks whose numbers `order` gives, ascending; the last may be smaller."""
        first = int(order[0]) if len(order) else 0
        stream = enumerate(islice(self.blocks(), first, None), first)
        number, block = -1, Block(np.empty(0))
        for numbers in order.split(batch_size) if len(order) else ():
            rows = []
            for wanted in numbers.tolist():
                while number < wanted:
                    number, block = next(stream, (-1, block))
                    if number < 0:
                        raise UsageError(
                            f"--streaming: the data set ended before sequence {wanted:,} of "
                            f"{self.block_len} tokens, those held out included: lower "
                            f"--max_examples"
                        )
                rows.append(block)
            batch = batch_of(rows)
            smallest, largest = int(batch.ids.min()), int(batch.ids.max())
            check_ids("the stream", smallest, largest, self.vocab_size)
            yield batch


def shuffled(numbers: range, seed: int) -> Int[Tensor, " n"]:
    """The numbers in an order that depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(len(numbers), generator=generator) + numbers.start


@dataclass(frozen=True)
class BatchPlan:
    """Which sequences the steps of a run are made of: `per_batch` of `order` for each `steps`."""

    order: Int[Tensor, " n"]
    per_batch: int
    steps: int
    """Optimizer steps that the rows of a batch are dealt to."""
    group: int | None = None
    """Neighbouring sequences whose rows of a step share a selection; None: each row has its own."""
    seed: int = 0
    """Of the order in which they are dealt."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps of all whole batches."""
        return len(self.order) // self.per_batch * self.steps

    @property
    def first(self) -> Int[Tensor, " per_batch"]:
        """The first batch."""
        return self.order[: self.per_batch]

    def sequences(self, step: int) -> Int[Tensor, " per_batch"]:
        """The batch that holds the rows of a step."""
        return self.order[step // self.steps * self.per_batch :][: self.per_batch]

    def from_step(self, step: int) -> Int[Tensor, " n"]:
        """The batches from that of a step to the last whole one."""
        batches = len(self.order) // self.per_batch
        return self.order[step // self.steps * self.per_batch : batches * self.per_batch]


def dealt(number: int, rows: int, steps: int, seed: int) -> Int[Tensor, " rows"]:
    """For each row of block `number` the step, of `steps`, that trains on it.

    Rows are dealt in an order that depends on the seed and the number alone. Every step gets
    rows / steps of them, rounded up or down.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {number}".encode()))
    first = torch.randint(steps, (1,), generator=generator)
    return (torch.randperm(rows, generator=generator) + first) % steps


def split_blocks(
    source: TokenSource, cfg: DataConfig, per_batch: int
) -> tuple[Int[Tensor, " held"], range]:
    """Numbers of the blocks that are held out, the first of the data, and of those that train.

    `--eval_tokens` are held out, in whole blocks, but at most a tenth of the data. `per_batch`
    blocks are a batch. Raises UsageError where less than one is left.
    """
    max_examples = cfg.max_examples
    held = min(-(-cfg.eval_tokens // source.block_len), max(1, len(source) // 10))
    rest = len(source) - held
    if max_examples is not None and max_examples > rest:
        raise UsageError(
            f"--max_examples {max_examples}: the data has {rest} sequences of {source.block_len} "
            f"tokens beside the {held} held out; leave the flag out to use them all"
        )
    used = rest if max_examples is None else max_examples
    if used < per_batch:
        batch = f"a batch is {per_batch} sequences of {source.block_len} tokens"
        if used < rest:
            raise UsageError(
                f"--max_examples {max_examples}: {batch} (--batch_size times --grad_acc_steps, on "
                f"all ranks): raise it, or lower --batch_size"
            )
        raise UsageError(
            f"--batch_size times --grad_acc_steps: {batch}, and there are {used} beside the {held} "
            f"held out: lower --batch_size or --ctx_len, or give more data"
        )
    return torch.arange(held), range(held, held + used)


def check_ids(name: str, smallest: int, largest: int, vocab_size: int) -> None:
    """Raise UsageError for token ids outside [0, vocab_size)."""
    if smallest < 0 or largest >= vocab_size:
        raise UsageError(
            f"{name}: holds token {smallest if smallest < 0 else largest}, and MODEL has "
            f"{vocab_size} tokens: the data were made with another tokenizer (or --token_dtype is "
            f"wrong)"
        )

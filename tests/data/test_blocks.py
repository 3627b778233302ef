"""Blocks are numbered, held out and ordered; which ones a step sees depends on the seed alone."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from sae import UsageError
from sae.config import DataConfig
from sae.data.blocks import BatchPlan, Block, TokenBlocks, TokenStream, dealt, split_blocks


def test_order_is_a_permutation_by_seed() -> None:
    """Every training block once, in an order that the seed decides."""
    source = TokenBlocks([np.arange(640)], 32)
    held, numbers = split_blocks(source, DataConfig(eval_tokens=64), 1)
    assert held.tolist() == [0, 1]
    order = source.order(numbers, 7)
    assert sorted(order.tolist()) == list(range(2, 20))
    assert torch.equal(order, source.order(numbers, 7))
    assert not torch.equal(order, source.order(numbers, 8))


def test_held_out_blocks_never_train() -> None:
    """At most a tenth and at least one block is held out, and training blocks are others."""
    source = TokenBlocks([np.arange(3200)], 32)
    for asked, expected in ((1, 1), (150, 5), (10**6, 10)):
        held, numbers = split_blocks(source, DataConfig(eval_tokens=asked), 4)
        assert len(held) == expected and set(held.tolist()).isdisjoint(numbers)
    _, numbers = split_blocks(source, DataConfig(eval_tokens=160, max_examples=20), 4)
    assert numbers == range(5, 25)


def test_a_sequence_gives_its_share_to_every_step() -> None:
    """Rows / steps of them each, rounded, by seed and number; remainders go to no step always."""
    for rows, steps in ((64, 8), (13, 4), (3, 8), (0, 2)):
        counts = [dealt(n, rows, steps, 42).bincount(minlength=steps) for n in range(300)]
        shares = torch.stack(counts)
        assert set(shares.flatten().tolist()) <= {rows // steps, -(-rows // steps)}
        expected = 300 * rows / steps
        assert (shares.sum(0) - expected).abs().max() < 6 * max(1, expected) ** 0.5
    assert torch.equal(dealt(5, 64, 8, 1), dealt(5, 64, 8, 1))
    assert not torch.equal(dealt(5, 64, 8, 1), dealt(5, 64, 8, 2))
    assert not torch.equal(dealt(5, 64, 8, 1), dealt(6, 64, 8, 1))


def test_a_plan_says_which_batch_a_step_is_made_of() -> None:
    """Every whole batch makes as many steps; a run goes on from the batch of its step."""
    plan = BatchPlan(torch.arange(10, 27), per_batch=5, steps=4)
    assert plan.total_steps == 12 and plan.first.tolist() == [10, 11, 12, 13, 14]
    assert plan.sequences(7).tolist() == [15, 16, 17, 18, 19]
    assert plan.from_step(7).tolist() == list(range(15, 25))
    assert plan.from_step(12).tolist() == []


def test_arrays_are_joined_without_a_seam() -> None:
    """A block that lies across several arrays reads as if they were one."""
    whole = np.arange(100)
    source = TokenBlocks([whole[:3], whole[3:4], whole[4:4], whole[4:50], whole[50:]], 7)
    blocks = torch.cat([batch.ids for batch in source.batches(torch.arange(len(source)), 7)])
    assert blocks.flatten().tolist() == list(range(98))


def test_a_stream_is_read_once_from_the_first_block_asked_for() -> None:
    """Blocks before are passed over, those between as well, and the rest of the stream stays."""
    read: list[int] = []

    def blocks() -> Iterator[Block]:
        for i in range(20):
            read.append(i)
            yield Block(np.full(4, i))

    stream = TokenStream(blocks, 20, 4, vocab_size=20)
    batches = list(stream.batches(torch.tensor([3, 4, 9]), 2))
    assert [b.ids[:, 0].tolist() for b in batches] == [[3, 4], [9]]
    assert read == list(range(10))
    assert list(stream.batches(torch.tensor([], dtype=torch.int64), 2)) == []


def test_a_step_needs_as_many_blocks_as_it_takes() -> None:
    """Less data than a step or --max_examples needs is refused by flag."""
    source = TokenBlocks([np.arange(320)], 32)
    with pytest.raises(
        UsageError, match="--batch_size times --grad_acc_steps: a batch is 64 sequences"
    ):
        split_blocks(source, DataConfig(eval_tokens=1), 64)
    with pytest.raises(UsageError, match="--max_examples 99: the data has 9"):
        split_blocks(source, DataConfig(eval_tokens=1, max_examples=99), 1)

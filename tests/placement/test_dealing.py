"""Laws of the rows that a step sees; many processes are in tests/laws."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from sae.batch import TokenBatch
from sae.data.blocks import BatchPlan, dealt
from sae.lm.capture import Pairs
from sae.lm.rows import HookpointRows, RowRule
from sae.placement.dealing import Dealer
from sae.placement.exchange import Exchange
from sae.placement.ranks import Ranks

ALONE = Ranks(torch.device("cpu"), 1.0)
S = 12


@dataclass(frozen=True)
class Written:
    """A reader whose rows say which token they are: (sequence, position), and twice as much."""

    rule: RowRule = field(default_factory=RowRule)
    lm = None
    hookpoints = ("a", "b")

    def with_rule(self, rule: RowRule) -> "Written":
        return replace(self, rule=rule)

    def find(self, batch: TokenBatch) -> dict[str, HookpointRows]:
        kept = self.rule.kept(batch)
        position = torch.arange(S).expand_as(batch.ids)
        rows = torch.stack([batch.ids, position], dim=2).flatten(0, 1).float()
        found = {
            name: self.rule.find(name, rows, factor * rows, batch, kept, inputs=name == "b")
            for name, factor in (("a", 1), ("b", 2))
        }
        return self.rule.leave_out_long(found)

    def __call__(self, batch: TokenBatch) -> Pairs:
        return {name: (x, y) for name, (x, y, _) in self.find(batch).items()}


def read(reader: Written, per_forward: int, steps: int, start: int = 0) -> list[Pairs]:
    """The rows of every step of 12 sequences, numbered from 100, in batches of 6."""
    plan = BatchPlan(torch.arange(100, 112), 6, steps, seed=3)

    def forwards() -> Iterator[TokenBatch]:
        for numbers in plan.from_step(start).split(per_forward):
            yield TokenBatch(numbers.unsqueeze(1).expand(-1, S), numbers=numbers)

    exchange = Exchange(ALONE, {"a": 1, "b": 1}, distributed=False)
    dealer = Dealer(reader, exchange, plan, forwards())
    found: list[Pairs] = []
    for step in range(start, plan.total_steps):
        parts = list(dealer.rows(step))
        whole: Pairs = {}
        for name in reader.hookpoints:
            x = torch.cat([pairs[name][0] for *_, pairs in parts])
            y = torch.cat([pairs[name][1] for *_, pairs in parts])
            assert sum(rows[name] for _, rows, _ in parts) == len(x) == len(y)
            whole[name] = (x, y)
        found.append(whole)
    return found


def tokens_of(rows: Tensor) -> list[tuple[int, int]]:
    return sorted((int(sequence), int(position)) for sequence, position in rows.tolist())


@pytest.mark.parametrize("steps", [1, 2, 4, 5])
@pytest.mark.parametrize("per_forward", [6, 2])
def test_every_row_of_a_batch_is_in_the_step_that_it_is_dealt_to(
    steps: int, per_forward: int
) -> None:
    """By sequence and position, however many forwards read the batch; x and y stay together."""
    found = read(Written(), per_forward, steps)
    expected: list[list[tuple[int, int]]] = [[] for _ in found]
    for number in range(100, 112):
        batch = (number - 100) // 6
        for position, step in enumerate(dealt(number, S, steps, 3).tolist()):
            expected[batch * steps + step].append((number, position))
    assert [tokens_of(pairs["a"][1]) for pairs in found] == [sorted(e) for e in expected]
    for pairs in found:
        assert torch.equal(pairs["b"][1], 2 * pairs["b"][0])
        assert torch.equal(pairs["b"][0], pairs["a"][1])


def test_rows_left_out_are_dealt_to_no_step() -> None:
    """What is excluded is missing where it would have been, and moves no other row."""
    whole = read(Written(), 3, 4)
    limited = RowRule((103,), 2, norm_limits={"b": 2 * 108.0})
    found = read(Written(limited), 3, 4)
    for before, after in zip(whole, found, strict=True):
        left = [(n, p) for n, p in tokens_of(before["a"][1]) if n != 103 and p >= 2]
        assert tokens_of(after["a"][1]) == left
        short = [(n, p) for n, p in left if n * n + p * p <= 108 * 108]
        assert (tokens_of(after["b"][0]) == short and short != left) or len(short) == len(left)
    assert sum(len(pairs["b"][0]) for pairs in found) < sum(len(pairs["a"][0]) for pairs in found)


@pytest.mark.parametrize("per_forward", [6, 2])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_groups_are_what_neighbouring_sequences_give_to_a_step(
    steps: int, per_forward: int
) -> None:
    """Rows lie by sequence, two of them a group, however many a step gets, and some left out."""
    reader = Written(RowRule((103,), 2, norm_limits={"b": 2 * 108.0}))
    plan = BatchPlan(torch.arange(100, 106), 6, steps, 2, seed=3)
    batches = plan.first.split(per_forward)
    forwards = (TokenBatch(n.unsqueeze(1).expand(-1, S), numbers=n) for n in batches)
    exchange = Exchange(ALONE, {"a": 1, "b": 1}, distributed=False)
    dealer = Dealer(reader, exchange, plan, forwards)
    for step in range(steps):
        found: dict[str, tuple[list[int], list[int]]] = {"a": ([], []), "b": ([], [])}
        for groups, _, pairs in dealer.rows(step):
            for name, (x, _) in pairs.items():
                found[name][0].extend(groups[name])
                found[name][1].extend(x[:, 0].int().tolist())
        for sizes, sequences in found.values():
            assert sequences == sorted(sequences)
            assert sizes == [
                sum(n in pair for n in sequences) for pair in ((100, 101), (102, 103), (104, 105))
            ]


def test_a_batch_is_dealt_once_more_from_within() -> None:
    """A run that goes on at any step sees the rows that it would have seen."""
    whole = read(Written(), 2, 4)
    for start in range(9):
        rest = read(Written(), 2, 4, start)
        for before, after in zip(whole[start:], rest, strict=True):
            assert torch.equal(before["a"][1], after["a"][1])


def test_one_tensor_twice_stays_one() -> None:
    """Rows that are both input and target are kept once."""
    for steps in (1, 3):
        for pairs in read_parts(steps):
            assert pairs["a"][0] is pairs["a"][1] and pairs["b"][0] is not pairs["b"][1]


def read_parts(steps: int) -> list[Pairs]:
    plan = BatchPlan(torch.arange(100, 104), 4, steps, seed=3)
    batch = TokenBatch(plan.first.unsqueeze(1).expand(-1, S), numbers=plan.first)
    exchange = Exchange(ALONE, {"a": 1, "b": 1}, distributed=False)
    dealer = Dealer(Written(), exchange, plan, iter([batch]))
    return [pairs for step in range(steps) for *_, pairs in dealer.rows(step)]

"""From batches to the rows of each optimizer step, on the ranks that train on them."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..batch import TokenBatch, copied
from ..data.blocks import BatchPlan, dealt
from ..lm.capture import Pairs, RowReader, count_rows
from .exchange import Exchange

Groups = dict[str, list[int]]
"""Rows of each group at a hookpoint, in the order of the rows; none where rows share nothing."""


class _Order(NamedTuple):
    """Where the rows of a forward go."""

    rows: Tensor
    """Their numbers, those of each step together."""
    groups: list[list[int]]
    """By step how many of them each group has; all are one group where rows share nothing."""


class Dealer:
    """Reads batches and deals the rows of each to several optimizer steps.

    The LM reads whole sequences, whose rows are much alike; a coder learns more from rows that have
    little to do with each other. So every sequence of a batch gives its share to each of the
    batch's steps, by `dealt`. Which rows a step sees depends neither on ranks nor on how many
    forwards read the batch, and a run that goes on within a batch deals it once more.

    Rows of one sequence stay together. Where rows share a selection, a group is what
    `plan.group` sequences give to one step, however many rows that is.
    """

    def __init__(
        self,
        reader: RowReader,
        exchange: Exchange,
        plan: BatchPlan,
        forwards: Iterator[TokenBatch],
        on_host: bool = False,
    ) -> None:
        """`forwards` are what this rank reads, from the batch of the first step on.

        `on_host`: rows that wait for their step do so in pinned memory of the host.
        """
        self._reader, self._exchange, self._forwards = reader, exchange, forwards
        self._steps, self._seed, self._group = plan.steps, plan.seed, plan.group
        self._on_host = on_host
        self._sequences = plan.per_batch // exchange.ranks.world
        self._hands: list[_Hand] = []

    def rows(self, step: int) -> Iterator[tuple[Groups, dict[str, int], Pairs]]:
        """Of a step: groups, this rank's rows by hookpoint, counted, and rows to train on here.

        The groups are those of the rows that are trained on here, by how many rows they have. Steps
        are asked for in order. Their rows come at once or, where a batch is one step, as each
        forward has read them.
        """
        if self._steps == 1:
            for tokens in self._batch():
                ((counts, groups, pairs),) = self._read(tokens)
                yield groups, counts, pairs
            return
        if not self._hands:
            self._hands = self._deal()[step % self._steps :]
        hand = self._hands.pop(0)
        yield hand.groups, hand.rows, hand.joined(self._exchange.ranks.device)

    def _batch(self) -> Iterator[TokenBatch]:
        """The forwards that read this rank's sequences of one batch."""
        left = self._sequences
        while left:
            tokens = next(self._forwards)
            left -= len(tokens.ids)
            yield tokens

    def _deal(self) -> list["_Hand"]:
        """Read a batch; the rows for each of its steps."""
        hands = [_Hand(self._on_host) for _ in range(self._steps)]
        for tokens in self._batch():
            for hand, read in zip(hands, self._read(tokens), strict=True):
                hand.add(*read)
        return hands

    def _read(self, tokens: TokenBatch) -> Iterator[tuple[dict[str, int], Groups, Pairs]]:
        """For each step what one forward brings: counts, and groups and rows to train on here."""
        if self._steps == 1 and self._group is None:
            parts, groups = [self._reader(tokens)], list[Groups]()
        else:
            parts, groups = self._parts(tokens)
        counts = [count_rows(part) for part in parts]
        groups = [{} for _ in parts] if self._group is None else self._groups_here(groups)
        yield from zip(counts, groups, self._exchange.to_owners(parts), strict=True)

    def _groups_here(self, groups: list[Groups]) -> list[Groups]:
        """The groups of this rank and of others whose rows are trained on here."""
        number = len(next(iter(groups[0].values())))
        found = self._exchange.of_readers(
            [n for part in groups for ns in part.values() for n in ns]
        )
        of_all = [torch.tensor(values).view(len(groups), -1, number) for values in found]
        return [
            dict(zip(part, sizes.tolist(), strict=True))
            for part, sizes in zip(groups, torch.cat(of_all, dim=2), strict=True)
        ]

    def _parts(self, tokens: TokenBatch) -> tuple[list[Pairs], list[Groups]]:
        """The rows that one forward reads, by the step that they are for, and their groups."""
        rule, kept = self._reader.rule, self._reader.rule.kept(tokens.on_host)
        parts: list[Pairs] = [{} for _ in range(self._steps)]
        groups: list[Groups] = [{} for _ in range(self._steps)]
        orders: dict[tuple[bool, str, tuple[int, ...]], _Order] = {}
        for name, (x, y, mask) in self._reader.find(tokens).items():
            lengths, limited = tuple(tokens.lengths(name)), name in rule.norm_limits
            if not limited:  # known without asking a GPU
                mask = None if kept is None else kept.mask
            key = (limited, name if limited else "", lengths)
            if key not in orders:
                orders[key] = self._order(tokens, lengths, mask, y.device)
            order, by_group = orders[key]
            sizes = [sum(found) for found in by_group]
            ys = y[order].split(sizes)
            xs = ys if x is y else x[order].split(sizes)
            for step, pair in enumerate(zip(xs, ys, strict=True)):
                parts[step][name], groups[step][name] = pair, by_group[step]
        return parts, groups

    def _order(
        self,
        tokens: TokenBatch,
        lengths: tuple[int, ...],
        mask: Tensor | None,
        device: torch.device,
    ) -> _Order:
        """An order that brings the rows of each step together, and how many they are."""
        assert tokens.numbers is not None, "a batch that is trained on knows its sequences"
        sequences = zip(tokens.numbers.tolist(), lengths, strict=True)
        step = torch.cat([dealt(n, rows, self._steps, self._seed) for n, rows in sequences])
        each = self._group or len(lengths)
        group = (torch.arange(len(lengths)) // each).repeat_interleave(torch.tensor(lengths))
        if mask is not None:
            step, group = step[mask.cpu()], group[mask.cpu()]
        number = -(-len(lengths) // each)
        sizes = (step * number + group).bincount(minlength=self._steps * number)
        order = copied(step.argsort(stable=True), device)
        return _Order(order, sizes.view(self._steps, number).tolist())


class _Hand:
    """The rows for one step, from several forwards."""

    def __init__(self, on_host: bool) -> None:
        self.rows: Counter[str] = Counter()
        self.groups: Groups = {}
        self._on_host = on_host
        self._parts: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def add(self, rows: dict[str, int], groups: Groups, pairs: Pairs) -> None:
        """Add what a forward brought: its rows on this rank, and those to be trained on here."""
        self.rows.update(rows)
        for name, sizes in groups.items():
            self.groups.setdefault(name, []).extend(sizes)
        for name, (x, y) in pairs.items():
            kept = self._waiting(y)
            pair = (kept if x is y else self._waiting(x), kept)
            self._parts.setdefault(name, []).append(pair)

    def joined(self, device: torch.device) -> Pairs:
        """All rows, on the device."""
        found: Pairs = {}
        for name in list(self._parts):
            xs, ys = zip(*self._parts.pop(name), strict=True)
            y = torch.cat([copied(rows, device) for rows in ys])
            same = all(x is y_rows for x, y_rows in zip(xs, ys, strict=True))
            found[name] = (y if same else torch.cat([copied(rows, device) for rows in xs]), y)
        return found

    def _waiting(self, rows: Tensor) -> Tensor:
        """The rows where they wait."""
        if not (self._on_host and rows.is_cuda):
            return rows
        host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        return host.copy_(rows, non_blocking=True)

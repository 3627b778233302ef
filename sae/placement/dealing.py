"""From batches to the rows of each optimizer step, on the ranks that train on them."""

from collections import Counter
from collections.abc import Iterator

import torch
from torch import Tensor

from ..batch import TokenBatch, copied
from ..data.blocks import BatchPlan, dealt
from ..lm.capture import Pairs, RowReader, count_rows
from .exchange import Exchange


class Dealer:
    """Reads batches and deals the rows of each to several optimizer steps.

    The LM reads whole sequences, whose rows are much alike; a coder learns more from rows that have
    little to do with each other. So every sequence of a batch gives its share to each of the
    batch's steps, by `dealt`. Which rows a step sees depends neither on ranks nor on how many
    forwards read the batch, and a run that goes on within a batch deals it once more.
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
        self._steps, self._seed, self._on_host = plan.steps, plan.seed, on_host
        self._sequences = plan.per_batch // exchange.ranks.world
        self._hands: list[_Hand] = []

    def rows(self, step: int) -> Iterator[tuple[int, dict[str, int], Pairs]]:
        """Of a step: sequences, this rank's rows by hookpoint, counted, and rows to train on here.

        The sequences are those of which rows are trained on here. Steps are asked for in order.
        Their rows come at once or, where a batch is one step, as each forward has read them.
        """
        if self._steps == 1:
            for tokens in self._batch():
                pairs = self._reader(tokens)
                sequences = len(tokens.ids) * self._exchange.readers
                yield sequences, count_rows(pairs), self._exchange.to_owners([pairs])[0]
            return
        if not self._hands:
            self._hands = self._deal()[step % self._steps :]
        hand = self._hands.pop(0)
        sequences = self._sequences * self._exchange.readers
        yield sequences, hand.rows, hand.joined(self._exchange.ranks.device)

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
            parts = self._parts(tokens)
            counts = [count_rows(part) for part in parts]
            for hand, rows, part in zip(
                hands, counts, self._exchange.to_owners(parts), strict=True
            ):
                hand.add(rows, part)
        return hands

    def _parts(self, tokens: TokenBatch) -> list[Pairs]:
        """The rows that one forward reads, by the step that they are for."""
        rule, kept = self._reader.rule, self._reader.rule.kept(tokens.on_host)
        parts: list[Pairs] = [{} for _ in range(self._steps)]
        orders: dict[tuple[bool, str, tuple[int, ...]], tuple[Tensor, list[int]]] = {}
        for name, (x, y, mask) in self._reader.find(tokens).items():
            lengths, limited = tuple(tokens.lengths(name)), name in rule.norm_limits
            if not limited:  # known without asking a GPU
                mask = None if kept is None else kept.mask
            key = (limited, name if limited else "", lengths)
            if key not in orders:
                orders[key] = self._order(tokens, lengths, mask, y.device)
            order, sizes = orders[key]
            ys = y[order].split(sizes)
            xs = ys if x is y else x[order].split(sizes)
            for part, x_rows, y_rows in zip(parts, xs, ys, strict=True):
                part[name] = (x_rows, y_rows)
        return parts

    def _order(
        self,
        tokens: TokenBatch,
        lengths: tuple[int, ...],
        mask: Tensor | None,
        device: torch.device,
    ) -> tuple[Tensor, list[int]]:
        """An order that brings the rows of each step together, and how many they are."""
        assert tokens.numbers is not None, "a batch that is trained on knows its sequences"
        sequences = zip(tokens.numbers.tolist(), lengths, strict=True)
        step = torch.cat([dealt(n, rows, self._steps, self._seed) for n, rows in sequences])
        if mask is not None:
            step = step[mask.cpu()]
        sizes = step.bincount(minlength=self._steps).tolist()
        return copied(step.argsort(stable=True), device), sizes


class _Hand:
    """The rows for one step, from several forwards."""

    def __init__(self, on_host: bool) -> None:
        self.rows: Counter[str] = Counter()
        self._on_host = on_host
        self._parts: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def add(self, rows: dict[str, int], pairs: Pairs) -> None:
        """Add what a forward brought: its rows on this rank, and those to be trained on here."""
        self.rows.update(rows)
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

"""Rows that were made elsewhere, in place of a language model and text."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..batch import TokenBatch, copied
from ..config import Widths
from ..data.blocks import shuffled
from ..flag_checks import UsageError
from ..lm.capture import Pairs
from ..lm.rows import HookpointRows, RowRule

Rows = Float[Tensor, "*rows D"] | tuple[Float[Tensor, "*rows D"], Float[Tensor, "*rows D_out"]]
"""What a coder is trained on, or what a transcoder reads and what it predicts."""


class Activations(Protocol):
    """Items of rows by hookpoint, which can be gone through again; `fingerprint` is any JSON.

    Where items can be had by number, as those of a list, they are trained on in shuffled order.
    """

    @property
    def fingerprint(self) -> Any: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Mapping[str, Rows]]: ...


@dataclass(frozen=True)
class GivenBatch(TokenBatch):
    """The rows of some items; their `ids` are the items' numbers, [B 1]."""

    pairs: Pairs | None = None
    sizes: dict[str, list[int]] = field(default_factory=dict)
    """Rows of each item by hookpoint."""

    def lengths(self, hookpoint: str) -> list[int]:
        """Rows of each item at a hookpoint, or at each of several that are joined."""
        return self.sizes.get(hookpoint, next(iter(self.sizes.values())))

    def to(self, device: torch.device) -> "GivenBatch":
        """The batch on a device."""
        assert self.pairs is not None
        moved: Pairs = {}
        for name, (x, y) in self.pairs.items():
            there = copied(y, device)
            moved[name] = (there if x is y else copied(x, device), there)
        return replace(self, ids=copied(self.ids, device), pairs=moved)


@dataclass(frozen=True)
class GivenRows:
    """Both the blocks that a run reads, of which an item is one, and the rows in them."""

    activations: Activations
    rule: RowRule
    inputs: bool
    """Whether items are pairs of what a transcoder reads and predicts."""
    lm = None

    @classmethod
    def of(cls, activations: Any, cfg: Any) -> "GivenRows":
        """The rows for the script's `TrainConfig`. Raises UsageError for what cannot be used."""
        if not hasattr(activations, "__len__") or not hasattr(activations, "fingerprint"):
            raise UsageError(
                f"activations: {type(activations).__name__} needs a length, the number of its "
                f"items, and a fingerprint, which tells a resumed run that they are the same"
            )
        try:
            json.dumps(activations.fingerprint)
        except (TypeError, ValueError) as error:
            raise UsageError(f"activations: the fingerprint cannot be JSON ({error})") from None
        if iter(activations) is activations:
            raise UsageError(
                "activations: can be gone through only once; a run does it several times: give an "
                "object whose __iter__ begins anew"
            )
        if not len(activations):
            raise UsageError("activations: hold no item")
        if cfg.training.loss_fn != "fvu":
            raise UsageError(
                f"--loss_fn {cfg.training.loss_fn}: is a loss of an LM, and activations have none"
            )
        if cfg.model.exclude_tokens or cfg.model.exclude_positions:
            raise UsageError(
                "--exclude_tokens, --exclude_positions: activations have no tokens; leave out the "
                "rows themselves"
            )
        return cls(activations, RowRule(), cfg.coder.transcode)

    def with_rule(self, rule: RowRule) -> "GivenRows":
        """The same rows under another rule."""
        return replace(self, rule=rule)

    @cached_property
    def _first(self) -> Pairs:
        first = self._pairs(next(iter(self.activations)))
        if not all(len(y) for _, y in first.values()):
            raise UsageError("activations: the first item has no rows, which a batch is counted by")
        return first

    @property
    def hookpoints(self) -> list[str]:
        """The names of the first item's rows, which all items have."""
        return list(self._first)

    @property
    def widths(self) -> dict[str, Widths]:
        """The widths of the first item's rows, which are those of all items."""
        return {name: Widths(x.shape[1], y.shape[1]) for name, (x, y) in self._first.items()}

    @property
    def block_len(self) -> int:
        """Rows in the first item."""
        return len(next(iter(self._first.values()))[1])

    @property
    def masked(self) -> bool:
        """Rows have no masks."""
        return False

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What must be equal for a run to be resumed."""
        return {
            "blocks": len(self),
            "block_len": self.block_len,
            "of": json.loads(json.dumps(self.activations.fingerprint)),
        }

    def __len__(self) -> int:
        return len(self.activations)

    def order(self, numbers: range, seed: int) -> Int[Tensor, " n"]:
        """The numbers in an order that depends on the seed alone, or as the items come."""
        if hasattr(self.activations, "__getitem__"):
            return shuffled(numbers, seed)
        return torch.arange(numbers.start, numbers.stop)

    def batches(self, order: Tensor, batch_size: int) -> Iterator[GivenBatch]:
        """Batches of the items numbered by `order`; the last one may be smaller."""
        items = self._items(order.tolist())
        for numbers in order.split(batch_size) if len(order) else ():
            found = [self._pairs(item) for item in islice(items, len(numbers))]
            if len(found) < len(numbers):
                raise UsageError(
                    f"activations: ended before item {int(numbers[len(found)])} of {len(self)}"
                )
            pairs: Pairs = {}
            sizes: dict[str, list[int]] = {}
            for name in self.hookpoints:
                sizes[name] = [len(item[name][1]) for item in found]
                y = torch.cat([item[name][1] for item in found])
                pairs[name] = (torch.cat([i[name][0] for i in found]) if self.inputs else y, y)
            yield GivenBatch(numbers.unsqueeze(1), pairs=pairs, sizes=sizes)

    def __call__(self, batch: TokenBatch) -> Pairs:
        """The rows of a batch that the rule keeps."""
        return {name: (x, y) for name, (x, y, _) in self.find(batch).items()}

    def find(self, batch: TokenBatch) -> dict[str, HookpointRows]:
        """The rows of a batch that the rule keeps, and which they are."""
        assert isinstance(batch, GivenBatch) and batch.pairs is not None
        rows = {name: HookpointRows(x, y, None) for name, (x, y) in batch.pairs.items()}
        return self.rule.leave_out_long(rows)

    def _items(self, numbers: list[int]) -> Iterator[Mapping[str, Rows]]:
        """The items of these numbers, which ascend where items cannot be had by number."""
        by_number: Any = getattr(self.activations, "__getitem__", None)
        if by_number is not None:
            yield from map(by_number, numbers)
            return
        left = iter(numbers)
        wanted = next(left, None)
        for number, item in enumerate(self.activations):
            while number == wanted:  # the last block is read twice where ranks wait for each other
                yield item
                wanted = next(left, None)
            if wanted is None:
                return

    def _pairs(self, item: Mapping[str, Rows]) -> Pairs:
        """An item's rows, [N D] each. Raises UsageError for what is no item."""
        known = self.__dict__.get("_first")
        if known is not None and item.keys() != known.keys():
            raise UsageError(
                f"activations: an item has rows of {', '.join(item)}, and the first one of "
                f"{', '.join(known)}"
            )
        found: Pairs = {}
        for name, rows in item.items():
            x, y = rows if isinstance(rows, tuple) else (rows, rows)
            if isinstance(rows, tuple) != self.inputs:
                raise UsageError(
                    f"activations: {name} has {'a pair of' if not self.inputs else 'no pair of'} "
                    f"rows; transcoders (--transcode) take pairs of input and output, SAEs do not"
                )
            widths = [*x.shape[-1:], *y.shape[-1:]]
            expected = widths if known is None else [t.shape[1] for t in known[name]]
            floats = x.is_floating_point() and y.is_floating_point()
            if y.ndim < 2 or x.shape[:-1] != y.shape[:-1] or widths != expected or not floats:
                raise UsageError(
                    f"activations: {name} has rows of shapes {tuple(x.shape)} and "
                    f"{tuple(y.shape)}, {y.dtype}; give floating-point rows [N D] of one width in "
                    f"all items"
                )
            flat = y.reshape(-1, y.shape[-1])
            found[name] = (flat if x is y else x.reshape(-1, x.shape[-1]), flat)
        return found

"""The rows of several hookpoints as those of one, for crosscoders."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from ..batch import TokenBatch
from ..config import Columns, Widths
from ..flag_checks import UsageError
from .beside import read_beside
from .capture import Pairs, RowReader
from .rows import HookpointRows, RowRule

CROSSCODER = "crosscoder"
"""The name of the hookpoint that all hookpoints make together, and of the coder there."""


@dataclass(frozen=True)
class Joined:
    """Reads rows side by side in one, each hookpoint's divided by its rms."""

    reader: RowReader
    parts: tuple[Columns, ...]

    @property
    def lm(self) -> PreTrainedModel | None:
        """The LM that is read, if any."""
        return self.reader.lm

    @property
    def hookpoints(self) -> list[str]:
        """The one that all are joined to."""
        return [CROSSCODER]

    @property
    def rule(self) -> RowRule:
        """Which tokens are rows, at every hookpoint the same."""
        return self.reader.rule

    def with_rule(self, rule: RowRule) -> "Joined":
        """The same rows under another rule."""
        return replace(self, reader=self.reader.with_rule(rule))

    def __call__(self, batch: TokenBatch) -> Pairs:
        """The joined rows of a batch."""
        return {name: (found.x, found.y) for name, found in self.find(batch).items()}

    def find(self, batch: TokenBatch) -> dict[str, HookpointRows]:
        """The joined rows of a batch, and the tokens that they belong to.

        Raises UsageError where hookpoints have different numbers of rows.
        """
        found = self.reader.find(batch)
        rows = [found[part.hookpoint].y.float() / part.rms for part in self.parts]
        if len({len(y) for y in rows}) > 1:
            sizes = ", ".join(
                f"{len(y)} at {p.hookpoint}" for y, p in zip(rows, self.parts, strict=True)
            )
            raise UsageError(f"--crosscoder: needs the same rows at every hookpoint, not {sizes}")
        y = torch.cat(rows, dim=1)
        return {CROSSCODER: HookpointRows(y, y, found[self.parts[0].hookpoint].kept)}


def join(
    reader: RowReader,
    widths: dict[str, Widths],
    cfg: Any,
    dtype: torch.dtype,
    main_first: Callable[..., Any],
) -> tuple[RowReader, dict[str, Widths]]:
    """A reader of all hookpoints as one, of all LMs, and its widths; else what is given.

    `cfg` is the script's `TrainConfig`; for the rest see `read_beside`. Raises UsageError for a
    single hookpoint.
    """
    if not cfg.coder.crosscoder:
        return reader, widths
    how = cfg.model, cfg.data.ctx_len, dtype, main_first
    reader, widths = read_beside(reader, widths, *how)
    return Joined(reader, parts_of(widths)), joined_widths(widths)


def parts_of(widths: dict[str, Widths]) -> tuple[Columns, ...]:
    """The parts of a crosscoder over these hookpoints. Raises UsageError for a single one."""
    if len(widths) < 2:
        raise UsageError(
            f"--crosscoder: is over several hookpoints, and {', '.join(widths)} is one: name more "
            f"by --hookpoints or --layers, or train an SAE"
        )
    return tuple(Columns(name, width.d_out) for name, width in widths.items())


def joined_widths(widths: dict[str, Widths]) -> dict[str, Widths]:
    """The width of all hookpoints together."""
    total = sum(width.d_out for width in widths.values())
    return {CROSSCODER: Widths(total, total)}

"""How often each latent fires, and how many tokens ago it last did."""

from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

if TYPE_CHECKING:
    from .sparse_coder import SparseCoder


class FiringRecord:
    """Counts of one coder's active latents; a latent is active where its activation is above 0.

    `since_fired` [L] counts the tokens trained on since each latent was last active, and ticks
    once per optimizer step. Tokens are the rows that the coder saw, over all forwards and ranks. A
    latent is dead after `threshold` tokens of silence.
    """

    def __init__(
        self, num_latents: int, threshold: int, device: str | torch.device = "cpu"
    ) -> None:
        self.threshold = threshold
        self.since_fired = torch.zeros(num_latents, dtype=torch.int64, device=device)
        self.tokens = 0
        """Rows seen since the start of the run."""
        self.recent = torch.zeros_like(self.since_fired)
        """Times each latent was active since `clear_recent`, over `recent_rows` rows."""
        self.recent_rows = 0
        self.dead_count: int | None = None
        """How many latents are dead, where that has been asked of the device."""

    @classmethod
    def of(cls, coder: "SparseCoder", threshold: int) -> "FiringRecord":
        """A record of a coder's latents, on its device."""
        return cls(coder.num_latents, threshold, coder.device)

    def add_step_(self, counts: Int[Tensor, " L"], rows: int, dead: int | None = None) -> None:
        """Count an optimizer step of `rows` rows, of which `counts` activated each latent.

        `dead` is how many are dead then, if it is known.
        """
        self.since_fired = self._since_fired_after(counts, rows)
        self.dead_count = dead
        self.tokens += rows
        self.recent += counts
        self.recent_rows += rows

    def dead_after(self, counts: Int[Tensor, " L"], rows: int) -> Int[Tensor, ""]:
        """How many latents will be dead once such a step is counted."""
        return (self._since_fired_after(counts, rows) > self.threshold).sum()

    def _since_fired_after(self, counts: Tensor, rows: int) -> Tensor:
        return (self.since_fired + rows).masked_fill_(counts > 0, 0)

    def dead_mask(self) -> Bool[Tensor, " L"]:
        """Latents that have not fired in more than `threshold` tokens: those AuxK may revive."""
        return self.since_fired > self.threshold

    def dead_share(self) -> Tensor:
        """Share of latents silent for `threshold` tokens, or since the start of a shorter run."""
        return (self.since_fired >= max(1, min(self.threshold, self.tokens))).double().mean()

    def frequencies(self) -> Tensor:
        """log10 of each latent's recent firing frequency, for those that fired at all."""
        fired = self.recent[self.recent > 0].double()
        return torch.log10(fired / max(1, self.recent_rows))

    def clear_recent(self) -> None:
        """Start the frequency count again."""
        self.recent.zero_()
        self.recent_rows = 0

    def state_tensors(self) -> dict[str, Int[Tensor, "..."]]:
        """What resuming needs."""
        return {
            "firing.since_fired": self.since_fired,
            "firing.tokens": torch.tensor(self.tokens),
            "firing.recent": self.recent,
            "firing.recent_rows": torch.tensor(self.recent_rows),
            "firing.threshold": torch.tensor(self.threshold),
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state_tensors` returned."""
        self.since_fired.copy_(tensors["firing.since_fired"])
        self.recent.copy_(tensors["firing.recent"])
        self.dead_count = None
        self.tokens = int(tensors["firing.tokens"])
        self.recent_rows = int(tensors["firing.recent_rows"])
        # The default's rule may be another one since; runs of before did not write it.
        self.threshold = int(tensors.get("firing.threshold", self.threshold))


def dead_latents(records: dict[str, FiringRecord]) -> dict[str, Int[Tensor, " M"] | None]:
    """Numbers of each coder's dead latents, None where none are.

    Where it is not known how many they are, one transfer from the device tells of all coders.
    """
    unknown = [record for record in records.values() if record.dead_count is None]
    counts = torch.stack([r.dead_mask().sum() for r in unknown]).tolist() if unknown else []
    for record, count in zip(unknown, counts, strict=True):
        record.dead_count = count
    return {
        name: record.dead_mask().nonzero_static(size=record.dead_count).squeeze(1)
        if record.dead_count
        else None
        for name, record in records.items()
    }

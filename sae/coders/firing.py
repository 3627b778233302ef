"""How often each latent fires, and how many tokens ago it last did."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor


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

    def add_step_(self, counts: Int[Tensor, " L"], rows: int) -> None:
        """Count an optimizer step of `rows` rows, of which `counts` activated each latent."""
        self.since_fired += rows
        self.since_fired[counts > 0] = 0
        self.tokens += rows
        self.recent += counts
        self.recent_rows += rows

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
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state_tensors` returned."""
        self.since_fired.copy_(tensors["firing.since_fired"])
        self.recent.copy_(tensors["firing.recent"])
        self.tokens = int(tensors["firing.tokens"])
        self.recent_rows = int(tensors["firing.recent_rows"])


def dead_latents(records: dict[str, FiringRecord]) -> dict[str, Int[Tensor, " M"] | None]:
    """Numbers of each coder's dead latents, None where none are; one transfer from the device."""
    masks = [record.dead_mask() for record in records.values()]
    counts = torch.stack([mask.sum() for mask in masks]).tolist() if masks else []
    found = zip(records, masks, counts, strict=True)
    return {
        name: mask.nonzero_static(size=count).squeeze(1) if count else None
        for name, mask, count in found
    }

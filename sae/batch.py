"""A batch of token sequences, and which of its tokens are read and which are rows."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor


def copied(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device; from the CPU to a GPU it is copied while the GPU is at work."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


@dataclass(frozen=True)
class TokenBatch:
    """Token ids, padding, and tokens that are context alone; None for a mask that hides none."""

    ids: Int[Tensor, "B S"]
    attended: Bool[Tensor, "B S"] | None = None
    """False for padding, which the LM does not see."""
    counted: Bool[Tensor, "B S"] | None = None
    """False for tokens that the LM reads and no coder is trained on."""
    numbers: Int[Tensor, " B"] | None = None
    """The numbers of the sequences in their source, on the CPU; None where nobody asks."""
    host: "TokenBatch | None" = None
    """Of a batch on a GPU the one on the CPU that it was copied from."""

    @property
    def on_host(self) -> "TokenBatch":
        """The same batch where looking at it does not wait for a GPU, if there is such a one."""
        return self if self.host is None else self.host

    @classmethod
    def of(cls, tokens: "TokenBatch | Tensor") -> "TokenBatch":
        """Ids without masks as a batch; a batch as it is."""
        return tokens if isinstance(tokens, TokenBatch) else cls(tokens)

    def to(self, device: torch.device) -> "TokenBatch":
        """The batch on a device; to a GPU it is copied while the GPU is at work."""
        if device.type == self.ids.device.type:
            return self
        attended = None if self.attended is None else copied(self.attended, device)
        counted = None if self.counted is None else copied(self.counted, device)
        return TokenBatch(copied(self.ids, device), attended, counted, self.numbers, host=self)

    def lengths(self, hookpoint: str) -> list[int]:
        """Rows of each sequence at a hookpoint, those that will be left out among them."""
        return [self.ids.shape[1]] * len(self.ids)

    def rows(self) -> Bool[Tensor, "B S"] | None:
        """Which tokens may be rows: those read and counted; None for all of them."""
        if self.attended is None or self.counted is None:
            return self.counted if self.attended is None else self.attended
        return self.attended & self.counted

    def padding_last(self) -> "TokenBatch":
        """The same sequences with padding behind what is read.

        An LM then gives each token the position that it has without padding.
        """
        if self.attended is None:
            return self
        order = self.attended.to(torch.int8).argsort(dim=1, descending=True, stable=True)
        counted = None if self.counted is None else self.counted.gather(1, order)
        return TokenBatch(self.ids.gather(1, order), self.attended.gather(1, order), counted)

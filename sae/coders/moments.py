"""Count, sum and sum of squares of rows: what FVU is divided by, and the scale of a hookpoint."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Moments(NamedTuple):
    """Count, sum and sum of squares of rows, in float64; they add over forwards and ranks."""

    count: Tensor
    total: Float[Tensor, " D"]
    total_sq: Tensor

    @classmethod
    def of(cls, rows: Float[Tensor, "N D"]) -> "Moments":
        """The moments of one set of rows."""
        count = torch.full((), len(rows), dtype=torch.float64, device=rows.device)
        if rows.is_cuda:  # one launch each, no copy in float64
            total_sq = torch.linalg.vector_norm(rows, dtype=torch.float64).square()
            return cls(count, rows.sum(0, dtype=torch.float64), total_sq)
        total, total_sq = count.new_zeros(rows.shape[1]), count.new_zeros(())
        for block in rows.split(1024):  # the float64 copy stays small
            wide = block.double()
            total += wide.sum(0)
            total_sq += torch.dot(wide.flatten(), wide.flatten())
        return cls(count, total, total_sq)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def mean(self) -> Float[Tensor, " D"]:
        """sum / count."""
        return self.total / self.count

    @property
    def total_variance(self) -> Tensor:
        """sum ||y - y_mean||^2 = sum ||y||^2 - ||sum y||^2 / count, the denominator of FVU.

        0 where that is rounding: of rows that are equal.
        """
        found = self.total_sq - self.total.square().sum() / self.count
        return torch.where(found > 1e-12 * self.total_sq, found, 0)


class Scale(NamedTuple):
    """The rms of what a coder reads and of what it predicts, each about its mean."""

    x: float = 1.0
    y: float = 1.0

    @classmethod
    def of(cls, x: Moments, y: Moments) -> "Scale":
        """The scale of rows with these moments; 1 where all rows are equal."""
        found = [float((m.total_variance / (m.count * len(m.total))).sqrt()) for m in (x, y)]
        return cls(*(rms if rms > 0 else 1.0 for rms in found))


def accumulate(moments: dict[str, Moments], key: str, rows: Float[Tensor, "N D"]) -> None:
    """Add the moments of `rows` to `moments[key]`."""
    seen = Moments.of(rows)
    moments[key] = moments[key] + seen if key in moments else seen

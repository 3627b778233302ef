"""BatchTopK: the k B largest latents of B rows are active; in use, those above a threshold."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kernels.entries import Entries, group_of_rows
from ...kernels.twins import Latents
from ..functional import k_dead
from .family import Selected, WithThreshold

if TYPE_CHECKING:
    from ..sparse_coder import SparseCoder

_KEPT = 0.9  # at .99, which others take, half of the first step would be left after 69 steps


class BatchTopK(WithThreshold):
    """acts = relu(the k B largest pre_acts of B rows) in training; in use those above a threshold.

    threshold' = .9 threshold + .1 (mean over the step's groups of the smallest positive act)

    B rows are those that some sequences give to a step: the same ones in every placement.

    Source: Bussmann et al., "BatchTopK Sparse Autoencoders" (arXiv 2412.06410), section 3.
    """

    candidates = 4
    in_groups = True

    def select(
        self,
        coder: "SparseCoder",
        rows: Tensor,
        k: int,
        dead: Tensor | None,
        groups: list[int] | None,
    ) -> Selected:
        """The k B largest of groups of rows, and AuxK's; without groups those above threshold."""
        if groups is None:
            return Selected(self.encode(coder, rows, k))
        encoder = coder.encoder
        arguments = (rows, encoder.weight, encoder.bias, k, groups, coder.pre_bias)
        of_dead = (dead, k_dead(coder.d_out, dead))
        found = coder.kernels.encode_in_groups(*arguments, coder.matmul_dtype, *of_dead)
        return Selected(*found, levels=_levels(found[0], groups))

    def no_levels(self, coder: "SparseCoder") -> Tensor:
        """Of no group yet."""
        return torch.zeros(2, dtype=torch.float64, device=coder.device)

    def update_threshold_(self, coder: "SparseCoder", levels: Tensor | None) -> None:
        """Move the threshold towards the mean of the step; the first step sets it."""
        assert levels is not None, "levels are summed where thresholds are learned"
        (total, groups), known = levels, coder.level
        mean = total / groups.clamp(min=1)
        moved = torch.where(known.isinf(), mean, _KEPT * known + (1 - _KEPT) * mean)
        known.copy_(torch.where(groups > 0, moved, known))
        coder.threshold.copy_(known)  # to all latents


def _levels(latents: Latents, groups: list[int]) -> Tensor:
    """The sum over groups of the smallest positive activation, and how many have one, [2]."""
    assert isinstance(latents.by_latent, Entries), "rows have numbers of latents of their own"
    acts, lengths = latents.acts.detach().double(), latents.by_latent.starts.diff()
    of_row = group_of_rows(groups, acts.device)
    of_entry = of_row.repeat_interleave(lengths, output_size=len(acts))
    positive = acts.where(acts > 0, torch.inf)
    least = acts.new_full((len(groups),), torch.inf).scatter_reduce(0, of_entry, positive, "amin")
    there = least.isfinite()
    return torch.stack([least.where(there, 0).sum(), there.sum().double()])


FAMILY = BatchTopK()

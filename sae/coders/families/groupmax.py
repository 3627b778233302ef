"""GroupMax: the largest latent of each of k groups is active."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...config import SparseCoderConfig
from ...flag_checks import UsageError, refuse
from ...kernels.twins import Latents
from ..prefixes import prefixes_of
from .topk import TopK

if TYPE_CHECKING:
    from ..sparse_coder import SparseCoder


class GroupMax(TopK):
    """acts = relu(the largest pre_act of each of k runs of L / k neighbouring latents)."""

    def check(self, cfg: SparseCoderConfig, d_in: int, where: str) -> None:
        """Raise UsageError unless the latents fall into k groups, and 4k with Multi-TopK."""
        latents = cfg.latents(d_in)
        widths = [cfg.k, 4 * cfg.k] if cfg.multi_topk else [cfg.k]
        if cfg.k <= latents and any(latents % k for k in widths):
            raise UsageError(
                f"--activation groupmax splits the {latents} latents at {where} into equal groups, "
                f"which --k {cfg.k} does not allow: give a --k "
                + ("whose fourfold divides" if cfg.multi_topk else "that divides")
                + f" {latents}"
            )
        super().check(cfg, d_in, where)
        for prefix in prefixes_of(cfg, d_in):
            if prefix * cfg.k % latents:
                raise UsageError(
                    f"--activation groupmax: a prefix of {prefix} latents at {where} cuts one of "
                    f"the {cfg.k} groups of {latents // cfg.k}: give --matryoshka shares of whole "
                    f"groups, multiples of 1 / {cfg.k}"
                )

    def check_flags(self, cfg: Any) -> None:
        """Raise UsageError for a k that changes: not every one divides the latents."""
        super().check_flags(cfg)
        if cfg.training.k_decay_steps:
            refuse(cfg.training, "k_decay_steps", "--activation groupmax needs a k that divides")

    def narrow(self, coder: "SparseCoder", rows: Tensor, wide: Latents, k: int) -> Latents:
        """The largest of k groups, which those of 4k groups do not tell: a second product."""
        return self.encode(coder, rows, k)

    def shared_by_ranks(self, cfg: SparseCoderConfig, num_latents: int) -> tuple[int, str]:
        """Whole groups of latents."""
        return cfg.k, f"k = {cfg.k} groups of latents (groupmax)"


FAMILY = GroupMax()

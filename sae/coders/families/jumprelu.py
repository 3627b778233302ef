"""JumpReLU: latents above a threshold of their own are active."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...config import SparseCoderConfig
from ...flag_checks import UsageError, refuse
from ...kernels.twins import Latents
from .family import Family, Selected

if TYPE_CHECKING:
    from ..sparse_coder import SparseCoder


class JumpReLU(Family):
    """acts = relu(pre_acts) 1[pre_acts > threshold]; k is the mean number that they were set to.

    Source: Rajamanoharan et al., "Jumping Ahead" (arXiv 2407.14435), equations 3 and 4.
    """

    def check(self, cfg: SparseCoderConfig, d_in: int, where: str) -> None:
        """Raise UsageError for a loss of 4k latents: no number of them is chosen."""
        super().check(cfg, d_in, where)
        if cfg.multi_topk:
            refuse(cfg, "multi_topk", f"--activation {cfg.activation} has no 4k latents: drop it")

    def check_flags(self, cfg: Any) -> None:
        """Raise UsageError: such coders are not trained here."""
        refuse(
            cfg.coder,
            "activation",
            "such coders are not trained here but made of trained ones: train topk, and then "
            "python -m sae threshold RUN",
        )

    def encode(
        self,
        coder: "SparseCoder",
        rows: Tensor,
        k: int,
        dead: Tensor | None = None,
        groups: list[int] | None = None,
    ) -> Selected:
        """The latents above their thresholds, whatever k is; none for AuxK."""
        encoder = coder.encoder
        arguments = (rows, encoder.weight, encoder.bias, coder.threshold)
        found = coder.kernels.encode_above(*arguments, coder.pre_bias, coder.matmul_dtype)
        return Selected(found)

    def narrow(self, coder: "SparseCoder", rows: Tensor, wide: Latents, k: int) -> Latents:
        """Not asked for: `check` refuses Multi-TopK."""
        raise AssertionError("a coder with --multi_topk cannot be of this kind")

    def shared_by_ranks(self, cfg: SparseCoderConfig, num_latents: int) -> tuple[int, str]:
        """Raise UsageError: how many latents of a row each rank would send is not known."""
        raise UsageError(
            f"--ranks_per_coder or --layer_to_rank: ranks cannot share a coder of --activation "
            f"{cfg.activation}: give it one rank"
        )


FAMILY = JumpReLU()

"""TopK: the k largest latents of every row are active."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ...config import SparseCoderConfig
from ...kernels.twins import Latents
from ..functional import k_dead
from .family import Family, Selected

if TYPE_CHECKING:
    from ..sparse_coder import SparseCoder


class TopK(Family):
    """acts = relu(the k largest pre_acts of a row).

    Source: Gao et al., "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093), section
    2.3.
    """

    def encode(self, coder: "SparseCoder", rows: Tensor, k: int) -> Latents:
        """The k active latents."""
        return coder.kernels.encode(*self._arguments(coder, rows, k))

    def select(
        self,
        coder: "SparseCoder",
        rows: Tensor,
        k: int,
        dead: Tensor | None,
        groups: list[int] | None,
    ) -> Selected:
        """The k active latents, and the k_aux largest of the `dead` out of the same product."""
        if dead is None:
            return Selected(self.encode(coder, rows, k))
        arguments, of_dead = self._arguments(coder, rows, k), k_dead(coder.d_out, dead)
        return Selected(*coder.kernels.encode_with_dead(*arguments, dead=dead, k_dead=of_dead))

    def _arguments(self, coder: "SparseCoder", rows: Tensor, k: int) -> tuple[Any, ...]:
        encoder, activation = coder.encoder, coder.cfg.activation
        arguments = (rows, encoder.weight, encoder.bias, k, activation)
        return (*arguments, coder.pre_bias, coder.matmul_dtype)

    def narrow(self, coder: "SparseCoder", rows: Tensor, wide: Latents, k: int) -> Latents:
        """The k largest of the 4k."""
        top_acts, position = wide.acts.topk(k, dim=1)
        return coder.kernels.Latents(top_acts, wide.indices.gather(1, position))

    def shared_by_ranks(self, cfg: SparseCoderConfig, num_latents: int) -> tuple[int, str]:
        """Latents."""
        return num_latents, f"{num_latents} latents"


FAMILY = TopK()

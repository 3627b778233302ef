"""AuxK: how well dead latents reconstruct what a coder misses, e = y - sae_out."""

import torch
from jaxtyping import Float
from torch import Tensor

from .dense_products import AllOf
from .sparse_products import ByLatent, square_sum


class AuxK:
    """One of two errors, of which e gets no gradient:

        sum_n ||e_n - sum_j acts_nj W_dec_j||^2                                      together
        sum_n ||e_n||^2 - sum_nj (||e_n||^2 - ||e_n - acts_nj W_dec_j||^2)           alone

    Alone a latent learns the activation with which it alone would explain most of e, which is as
    large as an active one's; together hundreds share it.
    """

    def __init__(
        self,
        order: ByLatent | AllOf,
        acts: Float[Tensor, "N K"],
        W_dec: Float[Tensor, "L D"],
        difference: Float[Tensor, "N D"],
        alone: bool,
    ) -> None:
        """`difference` is -e, which the gradients need as it is here."""
        self._order, self.alone = order, alone
        if not alone:
            self._missing = order.weighted_rows(acts, W_dec).add_(difference)
            self.error = square_sum(self._missing)
            return
        # ||e - a W||^2 - ||e||^2 = 2 a slope - a^2 ||W||^2, slope = a ||W||^2 - <e, W>, which is
        # half the derivative by a. Nothing else of the size of the activations is held on the way.
        norms = torch.linalg.vector_norm(W_dec, dim=1).square()
        self._squares = order.sum(order.sort(acts.square()))
        self._slope = order.sampled_product(difference, W_dec)
        self._slope.addcmul_(order.of_entries(norms.to(acts.dtype)), acts)
        gains = (norms * self._squares).sum() - 2 * (acts * self._slope).sum(dtype=norms.dtype)
        self.error = square_sum(difference) - gains

    def gradients(
        self,
        grad: Tensor,
        acts: Float[Tensor, "N K"],
        W_dec: Float[Tensor, "L D"],
        difference: Float[Tensor, "N D"],
        of_weights: bool,
        d_W: Float[Tensor, "L D"] | None = None,
    ) -> tuple[Float[Tensor, "N K"], Float[Tensor, "L D"] | None]:
        """Those of the activations and, if wanted, of W_dec, added to `d_W`; to be taken once."""
        order, factor = self._order, 2 * grad
        if not self.alone:
            rows = self._missing.mul_(factor)
            d_acts, weights = order.sampled_product(rows, W_dec), acts
        else:
            rows = difference
            d_acts, weights = self._slope.mul_(factor), acts * factor
        if not of_weights:
            return d_acts, d_W
        d_W = order.sum_rows(order.sort(weights), rows.contiguous(), add_to=d_W)
        if self.alone:
            d_W.addcmul_(W_dec, (self._squares * factor).unsqueeze(1))
        return d_acts, d_W

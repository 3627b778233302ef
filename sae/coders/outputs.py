"""What coders return."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor


class EncoderOutput(NamedTuple):
    """The active latents of every row, in no order; shorter rows end in zeros of latent 0."""

    top_acts: Float[Tensor, "*rows K"]
    top_indices: Int[Tensor, "*rows K"]


class CoderOutput(NamedTuple):
    """What one forward of a coder returns."""

    sae_out: Float[Tensor, "*rows D"]
    """The reconstruction of the target."""

    top_acts: Float[Tensor, "*rows K"]
    """Activations of the active latents, 0 where a row has fewer."""

    top_indices: Int[Tensor, "*rows K"]
    """Their indices in [0, num_latents)."""

    fvu: Float[Tensor, ""]
    """sum ||y - sae_out||^2 / total_variance."""

    auxk_loss: Float[Tensor, ""]
    """AuxK over the same denominator; 0 without dead latents."""

    multi_topk_fvu: Float[Tensor, ""]
    """FVU of the reconstruction from 4k latents; 0 unless `multi_topk`."""


class CoderErrors(NamedTuple):
    """What training needs of a forward: errors that add up over rows, and are divided once."""

    sae_out: Float[Tensor, "N D"]
    top_acts: Float[Tensor, "N K"] | Float[Tensor, " E"]
    """Where rows have numbers of latents of their own, those of all rows, row after row."""

    top_indices: Int[Tensor, "N K"] | Int[Tensor, " E"]

    squared_error: Float[Tensor, ""]
    """sum ||y - sae_out||^2."""

    auxk_error: Float[Tensor, ""]
    """min(n_dead / k_aux, 1) sum ||e - e_hat||^2; 0 without dead latents."""

    multi_topk_error: Float[Tensor, ""]
    """sum ||y - sae_out_4k||^2; 0 unless `multi_topk`."""

    row_starts: Int[Tensor, " N+1"] | None = None
    """Where the latents of each row start, if they are [E]."""

    levels: Tensor | None = None
    """What a step adds up to learn thresholds from."""

    prefix_errors: Float[Tensor, " M"] | None = None
    """sum ||y - sae_out_m||^2 of every prefix, where the coder has some."""

    @property
    def objective(self) -> Float[Tensor, ""]:
        """The squared error that training lowers: that of all latents, or the prefixes' mean."""
        return self.squared_error if self.prefix_errors is None else self.prefix_errors.mean()

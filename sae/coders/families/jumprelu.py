"""JumpReLU: latents above a threshold of their own are active."""

import math
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...flag_checks import UsageError, refuse
from ..functional import k_dead, l0_gradient
from .family import Selected, WithThreshold

if TYPE_CHECKING:
    from ..sparse_coder import SparseCoder

_BANDWIDTH = 0.03  # at .001, which is published, 16 % of latents died in 304 steps
_WEIGHT = 1.0


class JumpReLU(WithThreshold):
    """acts = pre_acts 1[pre_acts > threshold], where thresholds are trained as well.

    loss = FVU + (L0 / k - 1)^2,   L0 the mean number of active latents over all rows of a step

    Thresholds get gradients of both by the slope of a ramp in place of the step: `encode_jumping`,
    `l0_gradient`. All other parameters get those of FVU. Thresholds start where L0 is about k, so
    the penalty needs no warm-up.

    Source: Rajamanoharan et al., "Jumping Ahead" (arXiv 2407.14435); the bandwidth in
    units of norms: Lieberum et al., "Gemma Scope" (arXiv 2408.05147), section 3.2; the penalty:
    dictionary_learning's JumpReLU trainer, with a weight that fits FVU.
    """

    candidates = 8
    trains_threshold = True

    def check_flags(self, cfg: Any) -> None:
        """Raise UsageError for what is not trained so."""
        super().check_flags(cfg)
        if not cfg.training.rms_units:
            raise UsageError(
                "--no-rms_units: --activation jumprelu has thresholds in that unit: leave it out"
            )
        if cfg.training.k_decay_steps:
            refuse(cfg.training, "k_decay_steps", "--activation jumprelu starts at an L0 of k")

    def select(
        self,
        coder: "SparseCoder",
        rows: Tensor,
        k: int,
        dead: Tensor | None,
        groups: list[int] | None,
    ) -> Selected:
        """Without gradients those in use; in training at most 8 k of a row, and AuxK's."""
        if dead is None and not torch.is_grad_enabled():
            return Selected(self.encode(coder, rows, k))
        encoder = coder.encoder
        arguments = (rows, encoder.weight, encoder.bias, coder.threshold, bandwidth(coder))
        most = min(self.candidates * k, coder.num_latents)
        others = (coder.pre_bias, coder.matmul_dtype, dead, k_dead(coder.d_out, dead))
        return Selected(*coder.kernels.encode_jumping(*arguments, most, *others))

    @torch.no_grad()
    def start_(self, coder: "SparseCoder") -> None:
        """Thresholds above which k / L of the rows are, if rows are normal in all directions.

        threshold_l = -quantile(k / L) ||W_enc_l|| rms,   of what the encoder reads
        """
        share = min(0.5, coder.cfg.k / coder.num_latents)
        rms = coder.scale.x if coder.cfg.transcode else coder.scale.y
        norms = torch.linalg.vector_norm(coder.encoder.weight, dim=1)
        coder.threshold.copy_(norms * (-NormalDist().inv_cdf(share) * rms))

    def no_levels(self, coder: "SparseCoder") -> Tensor:
        """No row is near a threshold."""
        return torch.zeros(coder.num_latents, dtype=torch.int64, device=coder.device)

    @torch.no_grad()
    def add_penalty_(
        self,
        coder: "SparseCoder",
        levels: Tensor | None,
        fired: Tensor,
        rows: int,
        k: int,
        variance: Tensor,
    ) -> None:
        """That of (L0 / k - 1)^2, L0 being that of the step, of thresholds alone."""
        assert levels is not None, "levels are summed where thresholds are learned"
        if not rows:
            return
        gradient = l0_gradient(levels, fired, rows, k, bandwidth(coder))
        assert coder.threshold.grad is not None, "gradients() comes first"
        coder.threshold.grad += _WEIGHT * variance * gradient

    @torch.no_grad()
    def update_threshold_(self, coder: "SparseCoder", levels: Tensor | None) -> None:
        """Below 0 all thresholds are as 0, and no row would draw them back."""
        coder.threshold.clamp_(min=0)


def bandwidth(coder: "SparseCoder") -> float:
    """Of the ramp whose slope thresholds get: 0.03 of the root mean square norm of targets."""
    return _BANDWIDTH * math.sqrt(coder.d_out) * coder.scale.y


FAMILY = JumpReLU()

"""The learning rate and k as pure functions of the step."""

import math

from ..coders.sparse_coder import SparseCoder
from ..config import OptimizerName, TrainingConfig
from ..flag_checks import refuse


def default_lr(name: OptimizerName, num_latents: int) -> float:
    """The reference's peak rates: signum 5e-3 and adam 2e-4 over sqrt(L / 2^14), muon 2e-3."""
    scale = 1 / math.sqrt(num_latents / 2**14)
    return {"signum": 5e-3 * scale, "adam": 2e-4 * scale, "muon": 2e-3}[name]


def lr_scale(name: OptimizerName, step: int, total_steps: int, warmup_steps: int) -> float:
    """The learning rate of optimizer step `step` (from 0) over its peak.

    signum: 1 always, its averaging stands in for a schedule. Otherwise linear from 1 / warmup_steps
    to 1 over the warm-up, then linear to 0 at total_steps.
    """
    if name == "signum":
        return 1.0
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))


def check_warmup(cfg: TrainingConfig, total_steps: int) -> None:
    """Raise UsageError for a warm-up after which nothing of the run is left."""
    if cfg.optimizer != "signum" and cfg.lr_warmup_steps >= total_steps:
        refuse(
            cfg,
            "lr_warmup_steps",
            f"the run has {total_steps} steps, so the learning rate of --optimizer "
            f"{cfg.optimizer} would not come to its peak: give fewer, a tenth say",
        )


def k_at(step: int, k_decay_steps: int, coder: SparseCoder) -> int:
    """Active latents at `step`: from min(L, 10 d_in) linearly down to k over `k_decay_steps`."""
    k = coder.cfg.k
    if step >= k_decay_steps:
        return k
    start, progress = max(k, min(coder.num_latents, 10 * coder.d_in)), step / k_decay_steps
    return round(start * (1 - progress) + k * progress)

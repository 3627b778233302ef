"""What depends on the step, and on how long a run is: pure functions of both."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..coders.families.family import family_of
from ..coders.sparse_coder import SparseCoder
from ..config import TrainingConfig
from ..flag_checks import UsageError, refuse

# Measured, docs/recipes.md; in long runs fewer rows are hardly better, and cost more on a GPU.
_STEPS_PER_BATCH, _ROWS_PER_STEP, _ROWS_PER_GROUP = 16, 4096, 256
_SHORT_RUN = 500 * _ROWS_PER_STEP  # tokens, of which steps of half as many rows make more
_SHORTEST_SILENCE, _LONGEST_SILENCE = 150, 10_000_000  # in L / k tokens, in tokens


class Dealing(NamedTuple):
    """What becomes of the rows of a batch."""

    steps: int
    """Optimizer steps that they are dealt to."""
    group: int | None
    """Sequences whose rows of a step share a selection; None: each row has its own."""


def sequences_per_batch(cfg: Any, world: int, length: int) -> int:
    """Sequences of a batch on all ranks; `cfg` is the script's flags.

    Raises UsageError where `dealing` would of sequences of this length.
    """
    sequences = cfg.training.batch_size * cfg.training.grad_acc_steps * world
    dealing(cfg, sequences, length)
    return sequences


def dealing(cfg: Any, sequences: int, length: int, in_run: int | None = None) -> Dealing:
    """How a batch of `sequences` of `length` tokens is dealt; `cfg` is the script's flags.

    `in_run`: sequences of the whole run, if that is known.

    By default a group is the power of two of sequences that comes nearest to 256 rows. That depends
    on how long they are and on how many steps they are dealt to, and on no placement. Raises
    UsageError where a forward has no whole groups, or a batch fewer rows than steps need.
    """
    training, steps = cfg.training, cfg.training.steps_per_batch
    in_groups = family_of(cfg.coder).in_groups
    if steps is None:
        short = in_run is not None and in_run * length < _SHORT_RUN and not in_groups
        rows = _ROWS_PER_STEP // 2 if short else _ROWS_PER_STEP
        most = 1 if training.uses_lm_loss else _STEPS_PER_BATCH * _ROWS_PER_STEP // rows
        steps = min(most, max(1, sequences * length // rows))
    elif steps > 1 and 2 * steps > sequences * length:
        raise UsageError(
            f"--steps_per_batch {steps}: a batch has {sequences * length} tokens, and a step needs "
            f"two rows: give at most {max(1, sequences * length // 2)}, or raise --batch_size"
        )
    if not in_groups:
        return Dealing(steps, None)
    group = training.group_sequences
    if group is None:
        group = 2 ** max(0, round(math.log2(_ROWS_PER_GROUP * steps / length)))
    if training.batch_size % group:
        whose = "" if training.group_sequences else ", the default for groups of 256 rows"
        raise UsageError(
            f"--group_sequences {group}{whose}: so many sequences share a selection, and "
            f"--batch_size {training.batch_size} is no multiple: change one of the two"
        )
    return Dealing(steps, group)


@dataclass(frozen=True)
class Schedule:
    """The learning rate, k, and the silence of dead latents in a run of `total_steps` steps."""

    cfg: TrainingConfig
    total_steps: int
    rows: int
    """Rows of a step on all ranks, where none is left out."""

    def check(self) -> None:
        """Raise UsageError for a warm-up or decay that the run is too short for."""
        cfg, warmup = self.cfg, self._warmup
        if cfg.optimizer == "signum":
            return
        if warmup >= self.total_steps:
            refuse(
                cfg,
                "lr_warmup",
                f"the run has {self.total_steps} steps, so the learning rate of --optimizer "
                f"{cfg.optimizer} would not come to its peak: give fewer, a share of 0.05 say",
            )
        if self._decay > self.total_steps - warmup:
            refuse(
                cfg,
                "lr_decay",
                f"after the warm-up the run has {self.total_steps - warmup} steps: give fewer, or "
                f"a share such as 0.2",
            )

    def peak_lr(self, num_latents: int, transcode: bool = False) -> float:
        """The flag, or by optimizer, where s = sqrt(L / 2^14):

            adam and soap 4.25e-3 / s^1.2 sqrt(700 / steps), at most 1.2e-2;
                          of transcoders 3.5e-3 / s in place of 4.25e-3 / s^1.2
            signum 5e-3 / s;   muon 2e-2

        For an end-to-end loss, which is for finetuning, adam 2e-4 / s. signum's and that one are
        the reference's; the others were measured: docs/recipes.md.
        """
        if self.cfg.lr is not None:
            return self.cfg.lr
        s = math.sqrt(num_latents / 2**14)
        of_700_steps = 3.5e-3 / s if transcode else 4.25e-3 / s**1.2
        adam = min(of_700_steps * math.sqrt(700 / self.total_steps), 1.2e-2)
        adam = 2e-4 / s if self.cfg.uses_lm_loss else adam
        others = {"signum": 5e-3 / s, "muon": 2e-2}
        return others.get(self.cfg.optimizer, adam)

    def lr_scale(self, step: int) -> float:
        """The learning rate of optimizer step `step` (from 0) over its peak.

        signum: 1 always, its averaging stands in for a schedule. Otherwise linear from 1 / W to 1
        over the W steps of the warm-up, then 1, then linear to 0 at the end of the run.
        """
        if self.cfg.optimizer == "signum":
            return 1.0
        if step < self._warmup:
            return (step + 1) / self._warmup
        return max(0.0, min(1.0, (self.total_steps - step) / max(1, self._decay)))

    def encoder_lr(self, transcode: bool) -> float:
        """The rate of W_enc over that of the others; more of a transcoder's latents would die."""
        given = self.cfg.encoder_lr
        return given if given is not None else 0.25 if transcode else 0.5

    @property
    def _warmup(self) -> int:
        return _steps(self.cfg.lr_warmup, self.total_steps)

    @property
    def _decay(self) -> int:
        return _steps(self.cfg.lr_decay, self.total_steps - self._warmup)

    def k(self, step: int, coder: SparseCoder) -> int:
        """Active latents: from min(L, 10 d_in) linearly down to k over `k_decay_steps`."""
        k, steps = coder.cfg.k, self.cfg.k_decay_steps
        if step >= steps:
            return k
        start, progress = max(k, min(coder.num_latents, 10 * coder.d_in)), step / steps
        return round(start * (1 - progress) + k * progress)

    def dead_threshold(self, coder: SparseCoder) -> int:
        """Tokens of silence after which a latent is dead.

        A share of the run's, but no fewer than 150 L / k: a latent fires once in L / k tokens on
        average, and where many that merely fire rarely are revived, they crowd out the others.
        """
        amount = self.cfg.dead_feature_threshold
        if amount > 1:
            return round(amount)
        shortest = _SHORTEST_SILENCE * coder.num_latents / coder.cfg.k if amount else 1
        share = max(amount * self.total_steps * self.rows, shortest)
        return round(min(share, _LONGEST_SILENCE))


def _steps(amount: float, total: int) -> int:
    """Steps that a flag means: up to 1 a share of `total`, above it steps."""
    return round(amount * total) if amount <= 1 else round(amount)

"""What every kind of coder has, and how a kind is found by its name."""

from abc import ABC, abstractmethod
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ...config import Activation, SparseCoderConfig
from ...flag_checks import UsageError, refuse
from ...kernels.twins import Latents
from .. import own_losses, prefixes
from ..across.flags import check_flags as check_across

if TYPE_CHECKING:
    from ..sparse_coder import SparseCoder


class Selected(NamedTuple):
    """What `select` finds."""

    latents: Latents
    of_dead: Latents | None = None
    """Those that AuxK takes."""
    levels: Tensor | None = None
    """What a step adds up to learn thresholds from, in the shape that `no_levels` has."""


class Family(ABC):
    """A kind of coder; one object stands for all coders of the kind and holds no state."""

    candidates = 1
    """Latents that a row proposes, over k, where more are looked at than are active."""

    in_groups = False
    """Whether rows share a selection in training."""

    trains_threshold = False
    """Whether latents have thresholds with gradients; others are estimated, one for all."""

    def check(self, cfg: SparseCoderConfig, d_in: int, where: str) -> None:
        """Raise UsageError for a coder `d_in` wide that cannot be; `where` says which it is."""
        cfg.check(d_in, where)
        prefixes.check_prefixes(cfg, d_in, where)

    def check_flags(self, cfg: Any) -> None:
        """Raise UsageError for flags of the script's `TrainConfig` that exclude each other."""
        check_together(cfg)
        prefixes.check_flags(cfg)
        own_losses.check_flags(cfg)
        check_across(cfg)

    @abstractmethod
    def encode(self, coder: "SparseCoder", rows: Tensor, k: int) -> Latents:
        """The active latents of `rows` [N D], in use."""

    @abstractmethod
    def select(
        self,
        coder: "SparseCoder",
        rows: Tensor,
        k: int,
        dead: Tensor | None,
        groups: list[int] | None,
    ) -> Selected:
        """Those that an error is taken of, and in training what else is learned from them.

        `groups`: in training, how many neighbouring rows share a selection, in kinds where they do.
        """

    def start_(self, coder: "SparseCoder") -> None:
        """Set what starts from the scale of the data, in kinds that have such."""
        return

    def no_levels(self, coder: "SparseCoder") -> Tensor | None:
        """The `levels` of no rows, to which a step adds; None: thresholds are not learned."""
        return None

    def update_threshold_(self, coder: "SparseCoder", levels: Tensor | None) -> None:
        """Learn the threshold from the `levels` of a step, behind the step of the optimizer."""
        assert levels is None, "this kind learns none"

    def add_penalty_(
        self,
        coder: "SparseCoder",
        levels: Tensor | None,
        fired: Tensor,
        rows: int,
        k: int,
        variance: Tensor,
    ) -> None:
        """Add what is beside the FVU of a step to the gradients, in units of squared error.

        All are those of the whole step, on all ranks: `levels`, how many rows each latent fired on
        [L], rows, and the `variance` that squared errors will be divided by.
        """
        return

    @abstractmethod
    def narrow(self, coder: "SparseCoder", rows: Tensor, wide: Latents, k: int) -> Latents:
        """The latents of k, where `wide` are those of 4k (Multi-TopK)."""

    @abstractmethod
    def shared_by_ranks(self, cfg: SparseCoderConfig, num_latents: int) -> tuple[int, str]:
        """What ranks that hold a coder together divide among them: how much, and its name.

        Raises UsageError for a kind that they cannot hold together.
        """


class WithThreshold(Family):
    """A kind whose latents in use are those above a threshold of their own."""

    def check(self, cfg: SparseCoderConfig, d_in: int, where: str) -> None:
        """Raise UsageError for a loss of 4k latents: no number of them is chosen."""
        super().check(cfg, d_in, where)
        if cfg.multi_topk:
            refuse(cfg, "multi_topk", f"--activation {cfg.activation} has no 4k latents: drop it")

    def check_flags(self, cfg: Any) -> None:
        """Raise UsageError for losses that such coders do not go with."""
        super().check_flags(cfg)
        name = f"--activation {cfg.coder.activation}"
        if cfg.coder.multi_topk:
            refuse(cfg.coder, "multi_topk", f"{name} has no 4k latents: drop it")
        if cfg.training.uses_lm_loss:
            refuse(cfg.training, "loss_fn", f"{name} is trained on fvu")
        if cfg.machine.sharing:
            self.shared_by_ranks(cfg.coder, 0)

    def encode(self, coder: "SparseCoder", rows: Tensor, k: int) -> Latents:
        """The latents above their thresholds, whatever k is."""
        encoder = coder.encoder
        arguments = (rows, encoder.weight, encoder.bias, coder.threshold)
        return coder.kernels.encode_above(*arguments, coder.pre_bias, coder.matmul_dtype)

    def narrow(self, coder: "SparseCoder", rows: Tensor, wide: Latents, k: int) -> Latents:
        """Not asked for: `check` refuses Multi-TopK."""
        raise AssertionError("a coder with --multi_topk cannot be of this kind")

    def shared_by_ranks(self, cfg: SparseCoderConfig, num_latents: int) -> tuple[int, str]:
        """Raise UsageError: how many latents of a row each rank would send is not known."""
        raise UsageError(
            f"--shard_latents, --ranks_per_coder or --layer_to_rank: ranks cannot share a coder of "
            f"--activation {cfg.activation}: give it one rank"
        )


@cache
def _named(activation: Activation) -> Family:
    return import_module(f".{activation}", __package__).FAMILY


def family_of(cfg: SparseCoderConfig) -> Family:
    """The kind of a coder, from the file of its name."""
    return _named(cfg.activation)


def check_flags(cfg: Any) -> None:
    """Raise UsageError for flags that exclude each other, or do not go with the kind of coder.

    `cfg` is the script's `TrainConfig`; everything here is known before anything is loaded.
    """
    family_of(cfg.coder).check_flags(cfg)


def check_together(cfg: Any) -> None:
    """Raise UsageError for flags of several groups that cannot go together.

    `cfg` is the script's `TrainConfig`; everything here is known before anything is loaded.
    """
    if cfg.training.adam_8bit and (sharing := cfg.machine.sharing):
        refuse(cfg.training, "adam_8bit", f"needs whole parameters: leave out --{sharing}")
    if cfg.run.resume and cfg.training.adam_8bit:
        refuse(cfg.run, "resume", "the state of --adam_8bit is not kept: start a new --finetune")
    inputs = [pattern for pattern in cfg.model.hookpoints if ":" in pattern]
    if cfg.coder.transcode and (inputs or cfg.model.per_head):
        refuse(
            cfg.coder,
            "transcode",
            f"predicts what leaves a module from what enters it; "
            f"{inputs[0] if inputs else '--per_head'} is for SAEs",
        )
    if cfg.training.loss_fn != "fvu" and cfg.machine.owning:
        refuse(
            cfg.machine,
            cfg.machine.owning,
            f"with --loss_fn {cfg.training.loss_fn} the gradient of one coder runs through the LM "
            f"and through the coders above it, so each rank needs all of them: drop it",
        )

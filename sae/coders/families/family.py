"""What every kind of coder has, and how a kind is found by its name."""

from abc import ABC, abstractmethod
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ...config import Activation, SparseCoderConfig, check_together
from ...kernels.twins import Latents

if TYPE_CHECKING:
    from ..sparse_coder import SparseCoder


class Selected(NamedTuple):
    """What `encode` finds."""

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

    def check(self, cfg: SparseCoderConfig, d_in: int, where: str) -> None:
        """Raise UsageError for a coder `d_in` wide that cannot be; `where` says which it is."""
        cfg.check(d_in, where)

    def check_flags(self, cfg: Any) -> None:
        """Raise UsageError for flags of the script's `TrainConfig` that exclude each other."""
        check_together(cfg)

    @abstractmethod
    def encode(
        self,
        coder: "SparseCoder",
        rows: Tensor,
        k: int,
        dead: Tensor | None = None,
        groups: list[int] | None = None,
    ) -> Selected:
        """The active latents of `rows` [N D], and those that AuxK takes where any are `dead`.

        `groups`: in training, how many neighbouring rows share a selection, in kinds where they do.
        """

    def no_levels(self, coder: "SparseCoder") -> Tensor | None:
        """The `levels` of no rows, to which a step adds; None: thresholds are not learned."""
        return None

    def update_threshold_(self, coder: "SparseCoder", levels: Tensor | None) -> None:
        """Learn the threshold from the `levels` of a step, behind the step of the optimizer."""
        assert levels is None, "this kind learns none"

    @abstractmethod
    def narrow(self, coder: "SparseCoder", rows: Tensor, wide: Latents, k: int) -> Latents:
        """The latents of k, where `wide` are those of 4k (Multi-TopK)."""

    @abstractmethod
    def shared_by_ranks(self, cfg: SparseCoderConfig, num_latents: int) -> tuple[int, str]:
        """What ranks that hold a coder together divide among them: how much, and its name.

        Raises UsageError for a kind that they cannot hold together.
        """


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

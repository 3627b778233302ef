"""What a run changes as it trains."""

from dataclasses import dataclass, field

from ..coders.bank import CoderBank
from ..coders.firing import FiringRecord
from ..placement.exchange import Exchange
from .optim import CoderOptimizer


@dataclass(frozen=True)
class TrainingState:
    """The coders of this rank with what trains them, and the table that says who owns which."""

    exchange: Exchange
    bank: CoderBank
    optimizers: dict[str, CoderOptimizer] = field(default_factory=dict)
    firing: dict[str, FiringRecord] = field(default_factory=dict)
    """How often each coder's latents fire, over all steps."""

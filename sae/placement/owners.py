"""The owner table: which ranks train, save and restore the coders of which hookpoint.

Owners are neighbours, a range of ranks: one that has the coder whole, or several that share it.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ..config import MachineConfig
from ..flag_checks import UsageError, refuse


class Placement(NamedTuple):
    """Where coders live in a run whose number of ranks is known."""

    distributed: bool
    """Whether each is on its owners alone; otherwise all ranks have replicas."""
    fixed: tuple[str, ...]
    """Hookpoints that are placed by hand, as `read_owners` reads them."""
    ranks_per_coder: int
    """Ranks that share each coder of the others."""

    @classmethod
    def of(cls, machine: MachineConfig, world: int) -> "Placement":
        """What the flags mean for so many ranks; UsageError if these cannot be divided so."""
        if world % machine.ranks_per_coder:
            refuse(machine, "ranks_per_coder", f"does not divide the number of ranks, {world}")
        each = world if machine.sharing == "shard_latents" else machine.ranks_per_coder
        return cls(machine.owning is not None, machine.layer_to_rank, each)


def plan_owners(
    costs: dict[str, int],
    world: int,
    fixed: dict[str, range] | None = None,
    ranks_per_coder: int = 1,
) -> dict[str, range]:
    """Hookpoint -> its ranks: the heaviest first, each onto the ranks with the least so far.

    `fixed` places some by hand, the others get `ranks_per_coder` each, which divides `world`.
    Raises UsageError for one that names no hookpoint or no rank.
    """
    assert world % ranks_per_coder == 0, "Placement.of refuses others"
    owner = dict(fixed or {})
    for hookpoint, ranks in owner.items():
        if hookpoint not in costs:
            raise UsageError(
                f"--layer_to_rank {hookpoint}={shown(ranks)}: no coder is trained there; the "
                f"hookpoints are {', '.join(costs)}"
            )
        if ranks.stop > world:
            raise UsageError(
                f"--layer_to_rank {hookpoint}={shown(ranks)}: there are {world} ranks, 0 to "
                f"{world - 1}"
            )
    load = [sum(costs[p] / len(r) for p, r in owner.items() if rank in r) for rank in range(world)]
    starts = range(0, world, ranks_per_coder)
    groups = [range(start, start + ranks_per_coder) for start in starts]
    for hookpoint in sorted((p for p in costs if p not in owner), key=lambda p: -costs[p]):
        owner[hookpoint] = min(groups, key=lambda group: max(load[rank] for rank in group))
        for rank in owner[hookpoint]:
            load[rank] += costs[hookpoint] / ranks_per_coder
    return {hookpoint: owner[hookpoint] for hookpoint in costs}


def read_owners(items: Iterable[str]) -> dict[str, range]:
    """`layers.0=0 layers.1=1-3`, or the path of a JSON file `{"layers.0": 0}`, as a dictionary."""
    items = tuple(items)
    if len(items) == 1 and items[0].endswith(".json"):
        try:
            found = json.loads(Path(items[0]).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"--layer_to_rank {items[0]}: cannot be read ({error})") from None
        pairs = list(found.items()) if isinstance(found, dict) else [(items[0], None)]
    else:
        pairs = [(name, ranks) for name, _, ranks in (item.rpartition("=") for item in items)]
    fixed: dict[str, range] = {}
    for name, ranks in pairs:
        ends = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", str(ranks), re.ASCII)
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (0, -1)
        if not name or name in fixed or last < first:
            raise UsageError(
                f"--layer_to_rank {' '.join(items)}: give each hookpoint one rank or neighbours, "
                f"as in layers.0=0 layers.1=1-3, or a .json file with such an object"
            )
        fixed[name] = range(first, last + 1)
    return fixed


def shown(ranks: range) -> str:
    """A range of ranks as `read_owners` reads it."""
    return f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"


def owned_by(owner: dict[str, range], rank: int) -> list[str]:
    """The hookpoints that a rank owns, in words: of those that it shares, which part."""
    return [
        name if len(ranks) == 1 else f"{name} ({rank - ranks.start + 1} of {len(ranks)})"
        for name, ranks in owner.items()
        if rank in ranks
    ]

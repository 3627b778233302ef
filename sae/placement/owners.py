"""The owner table: which rank trains, saves and restores the coders of which hookpoint."""

import json
from collections.abc import Iterable
from pathlib import Path

from ..flag_checks import UsageError


def plan_owners(
    costs: dict[str, int], world: int, fixed: dict[str, int] | None = None
) -> dict[str, int]:
    """Hookpoint -> owning rank: the heaviest first, each onto the rank with the least so far.

    `fixed` places some by hand. Raises UsageError for one that names no hookpoint or no rank.
    """
    owner = dict(fixed or {})
    for hookpoint, rank in owner.items():
        if hookpoint not in costs:
            raise UsageError(
                f"--layer_to_rank {hookpoint}={rank}: no coder is trained there; the hookpoints "
                f"are {', '.join(costs)}"
            )
        if not 0 <= rank < world:
            raise UsageError(
                f"--layer_to_rank {hookpoint}={rank}: there are {world} ranks, 0 to {world - 1}"
            )
    load = [sum(costs[p] for p, r in owner.items() if r == rank) for rank in range(world)]
    for hookpoint in sorted((p for p in costs if p not in owner), key=lambda p: -costs[p]):
        owner[hookpoint] = load.index(min(load))
        load[owner[hookpoint]] += costs[hookpoint]
    return {hookpoint: owner[hookpoint] for hookpoint in costs}


def read_owners(items: Iterable[str]) -> dict[str, int]:
    """`layers.0=0 layers.1=1`, or the path of a JSON file `{"layers.0": 0}`, as a dictionary."""
    items = tuple(items)
    if len(items) == 1 and items[0].endswith(".json"):
        try:
            found = json.loads(Path(items[0]).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UsageError(f"--layer_to_rank {items[0]}: cannot be read ({error})") from None
        pairs = list(found.items()) if isinstance(found, dict) else [(items[0], None)]
    else:
        pairs = [(name, rank) for name, _, rank in (item.rpartition("=") for item in items)]
    fixed: dict[str, int] = {}
    for name, rank in pairs:
        if not name or name in fixed or not str(rank).isdecimal():
            raise UsageError(
                f"--layer_to_rank {' '.join(items)}: give each hookpoint one rank, as in "
                f"layers.0=0 layers.1=1, or a .json file with such an object"
            )
        fixed[name] = int(str(rank))
    return fixed

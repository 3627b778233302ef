"""What a run comes to: its best coders so far, and its summary.

RUN/best/<coder>/   with --save_best: cfg.json, sae.safetensors, fvu.json
RUN/summary.json    at the end of the run
"""

import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from statistics import fmean
from typing import Any

from ..formats.pieces import is_first
from ..training.state import TrainingState
from .json_files import disk_errors, read_json, write_json


def keep_best(run: Path, step: int, fvu: dict[str, float], state: TrainingState) -> None:
    """Put each coder whose held-out `fvu` is its lowest so far into `RUN/best/<coder>`.

    Of the layers of a cross-layer transcoder, which work together alone, it is the mean that
    decides for all. Raises UsageError, on all ranks, if the disk does not take it.
    """
    exchange, bank = state.exchange, state.bank
    if any(coder.cfg.sources or coder.cfg.targets for _, coder in bank.items()):
        fvu = _of_stacks(fvu, list(exchange.owner))
    mine = [name for name, hookpoint in bank.hookpoint.items() if exchange.owns(hookpoint)]
    # Ranks that share a coder write together; the first of them decides nothing alone.
    first = {name for name in mine if is_first(bank[name].piece)}
    with exchange.ranks.together(), disk_errors(run, step):
        for name in first:
            _tidy(run, name)
    with exchange.ranks.together():
        better = [name for name in mine if fvu[name] < _lowest(run, name)]
    with ExitStack() as stack:
        trained = {n: stack.enter_context(state.optimizers[n].trained()) for n in better}
        with exchange.ranks.together(), disk_errors(run, step):
            for name, coder in trained.items():
                coder.save_to_disk(_aside(run, name))
                if name in first:
                    write_json(_aside(run, name) / "fvu.json", {"step": step, "fvu": fvu[name]})
    with exchange.ranks.together(), disk_errors(run, step):
        for name in first & {*better}:
            final, old = run / "best" / name, _old(run, name)
            final.parent.mkdir(exist_ok=True)
            if final.exists():
                final.rename(old)
            _aside(run, name).rename(final)
            shutil.rmtree(old, ignore_errors=True)


def _of_stacks(fvu: dict[str, float], hookpoints: list[str]) -> dict[str, float]:
    """By coder the mean FVU of the layers that it works with: those of its seed."""
    ends = {name: name.removeprefix(h) for h in hookpoints for name in fvu if _is_at(name, h)}
    stacks = {
        end: fmean(fvu[n] for n, other in ends.items() if other == end) for end in ends.values()
    }
    return {name: stacks[ends[name]] for name in fvu}


def _is_at(name: str, hookpoint: str) -> bool:
    return re.fullmatch(re.escape(hookpoint) + r"(\.seed-?\d+)?", name) is not None


def _aside(run: Path, name: str) -> Path:
    # Not inside best/, which holds one folder per coder and nothing else.
    return run / f"best_{name}.tmp"


def _old(run: Path, name: str) -> Path:
    return run / f"best_{name}.old.tmp"


def _tidy(run: Path, name: str) -> None:
    """Clear away what was left where `keep_best` was cut off."""
    final, old = run / "best" / name, _old(run, name)
    if old.exists() and not final.exists():  # between the two renames
        old.rename(final)
    shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(_aside(run, name), ignore_errors=True)


def _lowest(run: Path, name: str) -> float:
    """The lowest held-out FVU of a coder so far."""
    record = run / "best" / name / "fvu.json"
    return read_json(record)["fvu"] if record.exists() else float("inf")


def summarize(
    run: Path,
    step: int,
    seconds: float,
    figures: dict[str, dict[str, Any]],
    together: dict[str, float] | None,
    state: TrainingState,
) -> dict[str, Any]:
    """Write `summary.json`, what the run came to, and return it.

    `figures` are the held-out ones by coder, `together` those of all spliced in at once.
    """
    exchange, firing, ranks = state.exchange, state.firing, state.exchange.ranks
    dead = exchange.merge({name: float(record.dead_share()) for name, record in firing.items()})
    tokens = max(ranks.gather(max((record.tokens for record in firing.values()), default=0)))
    seconds = ranks.merge({"seconds": seconds} if ranks.main else {})["seconds"]
    summary = {
        "step": step,
        "tokens": tokens,
        "wall_seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "hookpoints": {
            name: {
                **found,
                "dead_share": dead[name],
                "path": str((run / f"step_{step}" / name).resolve()),
            }
            for name, found in figures.items()
        },
    }
    if together is not None:
        summary["together"] = together
    if ranks.main:
        write_json(run / "summary.json", summary)
    return summary

"""What a run comes to: its best coders so far, and its summary.

RUN/best/<coder>/   with --save_best: cfg.json, sae.safetensors, fvu.json
RUN/summary.json    at the end of the run
"""

import shutil
from pathlib import Path
from typing import Any

from ..training.state import TrainingState
from .json_files import disk_errors, read_json, write_json


def keep_best(run: Path, step: int, fvu: dict[str, float], state: TrainingState) -> None:
    """Put each coder whose held-out `fvu` is its lowest so far into `RUN/best/<coder>`.

    Raises UsageError, on all ranks, if the disk does not take it.
    """
    exchange, bank = state.exchange, state.bank
    with exchange.ranks.together(), disk_errors(run, step):
        for name, coder in bank.items():
            if not exchange.owns(bank.hookpoint[name]):
                continue
            final = run / "best" / name
            aside, old = run / f"best_{name}.tmp", run / f"best_{name}.old.tmp"
            if old.exists() and not final.exists():  # cut off between the two renames
                old.rename(final)
            shutil.rmtree(old, ignore_errors=True)
            record = final / "fvu.json"
            if record.exists() and read_json(record)["fvu"] <= fvu[name]:
                continue
            # Not inside best/, which holds one folder per coder and nothing else.
            shutil.rmtree(aside, ignore_errors=True)
            with state.optimizers[name].trained():
                coder.save_to_disk(aside)
            write_json(aside / "fvu.json", {"step": step, "fvu": fvu[name]})
            final.parent.mkdir(exist_ok=True)
            if final.exists():
                final.rename(old)
            aside.rename(final)
            shutil.rmtree(old, ignore_errors=True)


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

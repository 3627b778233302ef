"""Runs side by side: what they came to, what they were given, and which latents they share.

python -m sae compare checkpoints/A checkpoints/B ...
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Float
from torch import Tensor
from tyro.conf import Positional, arg

from ..coders.sparse_coder import SparseCoder
from ..flag_checks import UsageError
from ..runs.json_files import read_json

_FIGURES = ("fvu", "l0", "ce_recovered", "kl", "dead_share")


@dataclass(frozen=True)
class CompareConfig:
    """Which runs to compare."""

    runs: Annotated[tuple[str, ...], Positional, arg(metavar="RUN_A RUN_B ...")]
    """Folders of finished runs."""
    near: float = 0.7
    """Cosine of decoder rows from which two latents count as twins."""


@torch.no_grad()
def nearest_twins(a: SparseCoder, b: SparseCoder) -> Float[Tensor, " L"]:
    """For each latent i of `a`, max_j cos(W_dec_a[i], W_dec_b[j]): 1 for the same direction."""
    assert a.W_dec is not None and b.W_dec is not None
    directions = torch.nn.functional.normalize(b.W_dec, dim=1)
    rows = torch.nn.functional.normalize(a.W_dec, dim=1).split(1024)
    return torch.cat([(part @ directions.T).amax(1) for part in rows])


def summary_of(run: str) -> dict[str, Any]:
    """What a finished run wrote about itself. Raises UsageError for another folder."""
    if not (Path(run) / "summary.json").is_file():
        raise UsageError(f"{run}: has no summary.json; give the folder of a finished run")
    summary = read_json(Path(run) / "summary.json")
    if missing := {"step", "tokens", "wall_seconds", "hookpoints"} - summary.keys():
        raise UsageError(f"{run}/summary.json lacks {', '.join(sorted(missing))}: it is damaged")
    return summary


def figures_of(run: str) -> dict[str, dict[str, float | None]]:
    """FVU, CE recovered, KL and dead share of every coder of a run, on what it held out.

    They are those of `eval.json`, which `python -m sae evaluate` writes, if it is of the run's last
    step; else the run's own. The dead share is that of training.
    """
    summary, judged = summary_of(run), Path(run) / "eval.json"
    evaluated = read_json(judged) if judged.is_file() else {}
    of = evaluated.get("of", {})
    fits = of.get("held_out") is True and of.get("step") == f"step_{summary['step']}"
    found = {}
    for name, figures in summary["hookpoints"].items():
        theirs = evaluated["coders"].get(name, {}) if fits else {}
        predictions = theirs.get("predictions") or figures.get("predictions") or {}
        found[name] = {f: {**predictions, **figures, **theirs}.get(f) for f in _FIGURES}
        found[name]["dead_share"] = figures["dead_share"]
    return found


def differing_flags(runs: tuple[str, ...]) -> dict[str, list[Any]]:
    """The flags that are not the same in all runs, and what each run was given."""
    given = [read_json(Path(run) / "run.json") for run in runs]
    names = dict.fromkeys(name for flags in given for name in flags)
    values = {name: [flags.get(name) for flags in given] for name in names}
    return {name: row for name, row in values.items() if any(v != row[0] for v in row)}


def comparison(runs: tuple[str, ...], near: float) -> str:
    """All of it as text. Raises UsageError for fewer than two runs, or folders that are none."""
    if len(runs) < 2:
        raise UsageError("RUN_A RUN_B: give the folders of two runs or more")
    summaries = [summary_of(run) for run in runs]
    names = [Path(run).name for run in runs]
    rows = [["", *names]]
    for figure, form in (("tokens", ",d"), ("wall_seconds", ",.0f"), ("tokens_per_second", ",.0f")):
        rows.append([figure.replace("_", " "), *(f"{s[figure]:{form}}" for s in summaries)])
    figures = [figures_of(run) for run in runs]
    for coder in dict.fromkeys(name for found in figures for name in found):
        for figure in _FIGURES:
            values = [found.get(coder, {}).get(figure) for found in figures]
            if any(value is not None for value in values):
                cells = ("" if value is None else f"{value:.4f}" for value in values)
                rows.append([f"{coder} {figure.replace('_', ' ')}", *cells])
    for name, values in differing_flags(runs).items():
        rows.append([f"--{name}", *(json.dumps(value) for value in values)])
    first = SparseCoder.load_many(runs[0])
    others = [SparseCoder.load_many(run) for run in runs[1:]]
    for coder, ours in first.items():
        cells = [f"of {ours.num_latents:,}"]
        for other in others:
            theirs = other.get(coder)
            if theirs is None or theirs.d_out != ours.d_out:
                cells.append("")
                continue
            twins = nearest_twins(ours, theirs)
            cells.append(f"{int((twins >= near).sum()):,} (mean {float(twins.mean()):.3f})")
        rows.append([f"{coder} latents with a twin", *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def main(cfg: CompareConfig) -> None:
    """Print the comparison that the command line asks for."""
    print(comparison(cfg.runs, cfg.near))

"""Runs side by side: what they came to, what they were given, and which latents they share.

python -m sae compare checkpoints/A checkpoints/B ...
python -m sae compare checkpoints/A CODERS_OF_OTHERS --dataset DATA     all on the same text
"""

import json
import time
from dataclasses import asdict, dataclass, field
from html import escape
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from tyro.conf import Positional, arg

from ..coders.sparse_coder import SparseCoder
from ..flag_checks import UsageError
from ..runs.folder import NOT_FLAGS
from ..runs.json_files import check_target, read_json, write_json
from ..runs.provenance import flags_of_run
from .evaluate import evaluate_loaded
from .figures import CoderFigures
from .trained import CodersConfig, TrainedCoders, load_trained
from .twins import NEAR, nearest_twins

_SEQUENCES_TIMED = 4
_FIGURES = ("fvu", "l0", "ce_recovered", "kl", "dead_share")


@dataclass(frozen=True)
class CompareConfig:
    """Which runs to compare."""

    runs: Annotated[tuple[str, ...], Positional, arg(metavar="RUN_A RUN_B ...")]
    """Folders of finished runs; or, with --dataset, coders of any program."""
    model: str | None = None
    """Language model to judge them all in; default: that of the first run."""
    dataset: str | None = None
    """Text to judge them all on; without it the figures are those that runs wrote."""
    ctx_len: int | None = None
    """Tokens per sequence; default: that of the first run, or 2048."""
    tokens: int | None = None
    """Tokens to read; default: what each run held out of this text, or the first 131,072."""
    hookpoint: str | None = None
    """Where coders read whose files do not say it."""
    allow_pt: bool = False
    """Open coder files that are pickles (.pt), which can run code: only of people you trust."""
    out: str = "comparison.json"
    """With --dataset: file for the figures; a plot of the same name ends in .svg."""
    near: float = NEAR
    """Cosine of decoder rows from which two latents count as twins."""
    hf_token: str | None = field(default=None, repr=False)
    """Hub token."""


def summary_of(run: str) -> dict[str, Any]:
    """What a finished run wrote about itself. Raises UsageError for another folder."""
    if not (Path(run) / "summary.json").is_file():
        raise UsageError(f"{run}: has no summary.json; give the folder of a finished run")
    summary = read_json(Path(run) / "summary.json")
    if missing := {"step", "tokens", "wall_seconds", "hookpoints"} - summary.keys():
        raise UsageError(f"{run}/summary.json lacks {', '.join(sorted(missing))}: it is damaged")
    return summary


def figures_of(run: str, prefix: int | None = None) -> dict[str, dict[str, float | None]]:
    """FVU, CE recovered, KL and dead share of every coder of a run, on what it held out.

    They are those of `eval.json`, which `python -m sae evaluate` writes, if it is of the run's last
    step; else the run's own. The dead share is that of training; with `prefix`, all are those of
    the coders' first so many latents, held out.
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
        for one in (theirs or figures).get("prefixes") or ():
            if one["latents"] == prefix:
                values = {**(one["predictions"] or {}), **one}
                found[name] = {figure: values.get(figure) for figure in _FIGURES}
    return found


def _said(value: Any) -> str:
    return ", ".join(map(" ".join, value.items())) if isinstance(value, dict) else json.dumps(value)


def differing_flags(runs: tuple[str, ...]) -> dict[str, list[Any]]:
    """The flags that are not the same in all runs, processes and versions, and what each had."""
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
        label = name.replace("_", " ") if name in NOT_FLAGS else f"--{name}"
        rows.append([label, *map(_said, values)])
    first = SparseCoder.load_many(runs[0])
    others = [SparseCoder.load_many(run) for run in runs[1:]]
    for coder, ours in first.items():
        cells = [f"of {ours.num_latents:,}"]
        for other in others:
            theirs = other.get(coder)
            if theirs is None or theirs.d_out != ours.d_out:
                cells.append("")
                continue
            twins = nearest_twins(ours, theirs).cosine
            cells.append(f"{int((twins >= near).sum()):,} (mean {float(twins.mean()):.3f})")
        rows.append([f"{coder} latents with a twin", *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join("  ".join(line).rstrip() for line in lines)


class Judged(NamedTuple):
    """One coder of several that were judged on the same text."""

    source: str
    name: str
    hookpoint: str
    coder: SparseCoder
    figures: CoderFigures
    tokens_per_second: float
    """Of the coder alone, without the LM."""


def judged(cfg: CompareConfig) -> list[Judged]:
    """All coders that `cfg` names on the same text. Raises UsageError for what does not fit."""
    known = (flags_of_run(Path(run)) for run in cfg.runs)
    before = next((flags for flags in known if flags), {})
    shared: dict[str, Any] = {"model": cfg.model or before.get("model"), "dataset": cfg.dataset}
    shared |= {"ctx_len": cfg.ctx_len or before.get("ctx_len"), "tokens": cfg.tokens}
    found, first = list[Judged](), None
    # The first run says which rows of the text are read; of coders without one it is all.
    for source in sorted(cfg.runs, key=lambda run: not flags_of_run(Path(run))):
        of_one = {"hookpoint": cfg.hookpoint, "allow_pt": cfg.allow_pt, "hf_token": cfg.hf_token}
        trained = load_trained(CodersConfig(source, **shared, **of_one), like=first)
        first = first or trained
        # Without --tokens a run held out a number of its own: the others read the same.
        shared["tokens"] = shared["tokens"] or len(trained.blocks) * trained.source.block_len
        evaluation, rate = evaluate_loaded(trained), rates(trained)
        for name, coder in trained.state.bank.items():
            where = trained.state.bank.hookpoint[name]
            found.append(Judged(source, name, where, coder, evaluation.coders[name], rate[name]))
    return sorted(found, key=lambda one: cfg.runs.index(one.source))


@torch.no_grad()
def rates(trained: TrainedCoders) -> dict[str, float]:
    """Rows of the text that each coder alone reconstructs in a second; the best of three."""
    bank, found = trained.state.bank, dict[str, float]()
    first = next(trained.source.batches(trained.blocks, _SEQUENCES_TIMED))
    for _ in range(3):
        pairs = trained.capture(first.to(trained.lm.device))
        for name, coder in bank.items():
            x, y = pairs[bank.hookpoint[name]]
            start = time.monotonic()
            errors = coder.errors(x if coder.cfg.transcode else y, y)
            float(errors.squared_error)  # waits for the device
            rate = len(y) / (time.monotonic() - start)
            found[name] = max(rate, found.get(name, 0.0))
    return found


def shared_latents(coders: list[Judged], near: float) -> list[dict[str, Any]]:
    """For each pair at one hookpoint, the shares of latents of either with a twin in the other."""
    found = []
    for (i, a), (j, b) in combinations(enumerate(coders), 2):
        if a.hookpoint == b.hookpoint and a.coder.d_out == b.coder.d_out:
            ways = nearest_twins(a.coder, b.coder), nearest_twins(b.coder, a.coder)
            shares = [way.share(near) for way in ways]
            found.append({"a": i, "b": j, "of_a": shares[0], "of_b": shares[1]})
    return found


def judged_table(coders: list[Judged], shared: list[dict[str, Any]]) -> str:
    """The figures, a line for each coder, and the latents that pairs share."""
    rows = [["", "coders", "at", "latents", "FVU", "L0", "dead", "recovered", "KL", "tokens/s"]]
    for i, one in enumerate(coders):
        f, p = one.figures, one.figures.predictions
        cells = [f"{one.coder.num_latents:,}", f"{f.fvu:.4f}", f"{f.l0:.1f}", f"{f.dead_share:.2%}"]
        cells += [f"{p.ce_recovered:.4f}", f"{p.kl:.4f}"] if p else ["", ""]
        cells.append(f"{one.tokens_per_second:,.0f}")
        rows.append([str(i + 1), Path(one.source).name, one.name, *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    for pair in shared:
        a, b = pair["a"] + 1, pair["b"] + 1
        lines.append(
            f"latents with a twin: {pair['of_a']:.1%} of {a} in {b}, "
            f"{pair['of_b']:.1%} of {b} in {a}"
        )
    return "\n".join(lines)


def plot(coders: list[Judged]) -> str:
    """CE recovered and FVU against L0 as SVG; a point for each coder, with its number."""
    panels = [("FVU", [c.figures.fvu for c in coders])]
    recovered = [c.figures.predictions.ce_recovered for c in coders if c.figures.predictions]
    if len(recovered) == len(coders):
        panels.insert(0, ("CE recovered", recovered))
    l0 = [c.figures.l0 for c in coders]
    drawn = [_panel(i * 360, title, l0, values) for i, (title, values) in enumerate(panels)]
    names = [f"{i + 1}: {Path(c.source).name} {c.name}" for i, c in enumerate(coders)]
    lines = [(310 + 16 * i, escape(name)) for i, name in enumerate(names)]
    key = "".join(f'<text x="50" y="{y}">{name}</text>' for y, name in lines)
    size = f'width="{360 * len(panels)}" height="{320 + 16 * len(names)}"'
    style = 'font-family="sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{"".join(drawn)}{key}</svg>\n'


def _panel(left: int, title: str, xs: list[float], ys: list[float]) -> str:
    (x0, x1), (y0, y1) = _around(xs), _around(ys)

    def place(x: float, y: float) -> tuple[float, float]:
        return left + 60 + 270 * (x - x0) / (x1 - x0), 250 - 220 * (y - y0) / (y1 - y0)

    parts = [f'<rect x="{left + 60}" y="30" width="270" height="220" fill="none" stroke="#999"/>']
    parts.append(f'<text x="{left + 60}" y="20">{title}</text>')
    parts.append(f'<text x="{left + 180}" y="285">L0</text>')
    for value, (x, y) in ((x0, place(x0, y0)), (x1, place(x1, y0))):
        parts.append(f'<text x="{x:.1f}" y="{y + 16:.1f}" text-anchor="middle">{value:.3g}</text>')
    for value, (x, y) in ((y0, place(x0, y0)), (y1, place(x0, y1))):
        parts.append(f'<text x="{x - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for i, point in enumerate(zip(xs, ys, strict=True)):
        x, y = place(*point)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#36c"/>')
        parts.append(f'<text x="{x + 6:.1f}" y="{y - 6:.1f}">{i + 1}</text>')
    return "".join(parts)


def _around(values: list[float]) -> tuple[float, float]:
    """A range that holds all values with some room."""
    low, high = min(values), max(values)
    room = 0.1 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + room


def main(cfg: CompareConfig) -> None:
    """Print the comparison that the command line asks for; on one text, write it too."""
    if cfg.dataset is None:
        print(comparison(cfg.runs, cfg.near))
        return
    if len(cfg.runs) < 2:
        raise UsageError("RUN_A RUN_B: give two folders of coders or more")
    if Path(cfg.out).suffix == ".svg":
        raise UsageError(f"--out {cfg.out}: is for figures, a plot goes beside it: give a .json")
    check_target("--out", Path(cfg.out))
    coders = judged(cfg)
    shared = shared_latents(coders, cfg.near)
    print(judged_table(coders, shared))
    as_json = [
        {"source": c.source, "name": c.name, "latents": c.coder.num_latents, **asdict(c.figures)}
        | {"tokens_per_second": c.tokens_per_second}
        for c in coders
    ]
    write_json(Path(cfg.out), {"dataset": cfg.dataset, "coders": as_json, "twins": shared})
    drawing = Path(cfg.out).with_suffix(".svg")
    drawing.write_text(plot(coders), encoding="utf-8")
    print(f"figures  {Path(cfg.out).resolve()}\nplot     {drawing.resolve()}")

"""RUN/norm_limits.json: above which length a run leaves rows out, fixed on its first step.

A resumed run and the commands read it.
"""

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ..batch import TokenBatch
from ..flag_checks import UsageError
from ..lm.capture import RowReader
from ..lm.rows import far_share
from ..placement.ranks import Ranks
from .json_files import read_json, write_json

_FILE = "norm_limits.json"
_MUCH = 0.5  # of the variance, in one row of a hundred


def limit_norms(
    capture: RowReader,
    factor: float | None,
    batches: Iterable[TokenBatch],
    run: Path,
    resumes: bool,
    ranks: Ranks,
) -> RowReader:
    """The capture, leaving out rows longer than `factor` times the median norm of their hookpoint.

    The median is over all rows of all ranks' `batches`, those of the first step; a run that
    `resumes` keeps its own. Prints a line for hookpoints where few rows hold most of the variance.
    """
    batches = list(batches)
    if factor is not None:
        if resumes:
            limits = norm_limits_of(run, factor)
        else:
            limits = _measure(capture, factor, batches, ranks)
        capture = capture.with_rule(replace(capture.rule, norm_limits=limits))
        if ranks.main and not resumes:
            write_json(run / _FILE, limits)
    found = sinks(capture, batches[:1])  # on all ranks, since the LM may be sharded
    for line in found if ranks.main else ():
        print(line)
    return capture


def _measure(
    capture: RowReader, factor: float, batches: list[TokenBatch], ranks: Ranks
) -> dict[str, float]:
    lengths: dict[str, list[Tensor]] = {name: [] for name in capture.hookpoints}
    for batch in batches:
        for name, (_, y) in capture(batch).items():
            lengths[name].append(torch.linalg.vector_norm(y.float(), dim=1).cpu())
    limits = {}
    for name, found in lengths.items():
        everyones = torch.cat(ranks.everyones(torch.cat(found)))
        limits[name] = factor * float(everyones.median()) if len(everyones) else float("nan")
        if not math.isfinite(limits[name]):
            raise UsageError(
                f"--exclude_norm {factor}: the first step has no median at {name}: no token is "
                f"left, or its activations hold NaN or Inf"
            )
    return limits


def norm_limits_of(run: Path, factor: float | None) -> dict[str, float]:
    """Hookpoint -> the length above which a run, or that of a checkpoint, leaves rows out.

    Raises UsageError where the run was given a `factor` and its limits are not there.
    """
    if factor is None:
        return {}
    found = [folder / _FILE for folder in (run, run.parent) if (folder / _FILE).is_file()]
    if not found:
        raise UsageError(
            f"--exclude_norm {factor}: {run} lacks {_FILE}, where the run keeps its limits: put it "
            f"back, or other rows would count"
        )
    return read_json(found[0])


def sinks(capture: RowReader, batches: Iterable[TokenBatch]) -> list[str]:
    """A line for each hookpoint where 1 % of the batches' rows hold most of the variance."""
    rows: dict[str, list[Tensor]] = {name: [] for name in capture.hookpoints}
    for batch in batches:
        for name, (_, y) in capture(batch).items():
            rows[name].append(y)
    shares = {name: far_share(torch.cat(found)) for name, found in rows.items() if found}
    return [
        f"{name}: 1 % of its rows hold {share:.0%} of the variance, and FVU tells of little else "
        f"(attention sinks?); see --exclude_positions and --exclude_norm"
        for name, share in shares.items()
        if share > _MUCH
    ]

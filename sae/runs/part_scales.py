"""RUN/crosscoder.json: the rms of every hookpoint, which a crosscoder's rows are divided by.

It is fixed on the first batch; a resumed run reads it.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ..batch import TokenBatch
from ..coders.moments import Scale
from ..config import Columns, SparseCoderConfig
from ..flag_checks import UsageError
from ..lm.capture import RowReader
from ..lm.joined import Joined
from ..placement.ranks import Ranks
from ..training.start import first_moments
from .json_files import read_json, write_json

_FILE = "crosscoder.json"


def scale_parts(
    capture: RowReader, batches: Iterable[TokenBatch], run: Path, resumes: bool, ranks: Ranks
) -> RowReader:
    """The capture of a crosscoder, its rows divided by their rms; any other as it is.

    The rms is over all rows of all ranks' `batches` about their mean, by hookpoint; a run that
    `resumes` keeps its own. Raises UsageError where that is not there.
    """
    if not isinstance(capture, Joined):
        return capture
    if resumes:
        if not (run / _FILE).is_file():
            raise UsageError(f"--resume: {run} lacks {_FILE}, the scales of its rows: put it back")
        parts = tuple(Columns(*part) for part in read_json(run / _FILE)["parts"])
    else:
        _, seen = first_moments(capture.reader, batches, ranks)
        rms = {name: Scale.of(moments, moments).y for name, moments in seen.items()}
        parts = tuple(part._replace(rms=rms[part.hookpoint]) for part in capture.parts)
        if ranks.main:
            write_json(run / _FILE, {"parts": parts})
    return replace(capture, parts=parts)


def coder_config(cfg: SparseCoderConfig, capture: RowReader) -> SparseCoderConfig:
    """What the coders on the rows of `capture` are."""
    return replace(cfg, parts=capture.parts) if isinstance(capture, Joined) else cfg

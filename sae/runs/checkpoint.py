"""Checkpoints: complete or absent, and nothing in them is a pickle.

RUN/step_1000/manifest.json            format, step, and the SHA-256 of every file
RUN/step_1000/<coder>/cfg.json         what other programs read, with
RUN/step_1000/<coder>/sae.safetensors  the coder's weights
RUN/step_1000/<coder>/resume.safetensors   the training point, optimizer state, firing record

Of a coder on several ranks both are in pieces, which `formats/pieces.py` describes.
"""

import hashlib
import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..coders.sparse_coder import SparseCoder
from ..data.blocks import TokenSource
from ..flag_checks import UsageError
from ..formats.pieces import Piece, Stored, file_name, own_files, write_index
from ..placement.ranks import Ranks
from ..training.optim import state_bytes
from ..training.state import TrainingState
from .folder import checkpoints
from .json_files import disk_errors, flush, read_json, write_json

FORMAT = 2
"""Format 1 had no checksum of the manifest itself."""

_RESUME = "resume"  # before .safetensors

_HARMLESS = {".json", ".html", ".md", ".txt"}  # what people and commands put beside coders


def save(
    run: Path,
    step: int,
    seconds: float,
    source: TokenSource,
    state: TrainingState,
    keep_last: int = 2,
) -> None:
    """Write one checkpoint aside, rename it into place when whole, then drop all but the last few.

    Every rank writes the coders it owns; the first one begins and ends. `source` is what the run
    trains on. Raises UsageError, on all ranks, if the disk does not take it or if
    replicas of a coder differ; the checkpoints before stay.
    """
    exchange, bank, optimizers, firing = state.exchange, state.bank, state.optimizers, state.firing
    ranks = exchange.ranks
    if not exchange.distributed:
        ranks.same({f"the sum of the weights of {n}": _sum(coder) for n, coder in bank.items()})
    final, aside = run / f"step_{step}", run / f"step_{step}.tmp"
    with ranks.together(), disk_errors(run, step):
        if ranks.main:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
    digests: dict[str, str] = {}
    mine = [name for name in bank.hookpoint if exchange.owns(bank.hookpoint[name])]
    with ExitStack() as stack:
        # Ranks that share a coder compute this together, which a full disk must not cut short.
        trained = {name: stack.enter_context(optimizers[name].trained()) for name in mine}
        with ranks.together(), disk_errors(run, step):
            if not aside.is_dir():
                raise UsageError(
                    f"--save_dir {run.parent}: {aside} was made by rank 0 and is not there on this "
                    f"rank: give a folder that all machines share"
                )
            for name, coder in trained.items():
                coder.save_to_disk(aside / name)
    with ranks.together(), disk_errors(run, step):
        for name in mine:
            found = {**optimizers[name].state_tensors(), **firing[name].state_tensors()}
            found |= bank[name].state_tensors()
            _write_state(aside / name, found, optimizers[name].piece)
            for file in own_files(aside / name, bank[name].piece):
                digests[file.relative_to(aside).as_posix()] = _digest(file)
                flush(file)
            flush(aside / name)
    digests = ranks.merge(digests)
    with ranks.together(), disk_errors(run, step):
        if ranks.main:
            manifest = {"format": FORMAT, "step": step, "wall_seconds": seconds}
            manifest["data"] = source.fingerprint
            manifest["sha256"] = dict(sorted(digests.items()))
            manifest["manifest_sha256"] = _digest_of(manifest)
            write_json(aside / "manifest.json", manifest)
            flush(aside)
            if final.exists():
                shutil.rmtree(final)
            aside.rename(final)
            flush(run)
            for old in checkpoints(run)[:-keep_last]:
                # First a name that nothing takes for a checkpoint: half deleted it must not be
                # found.
                shutil.rmtree(old.rename(old.with_name(old.name + ".tmp")))


def _write_state(folder: Path, found: dict[str, Tensor], piece: Piece | None) -> None:
    tensors = {key: t.detach().cpu().contiguous() for key, t in found.items()}
    save_file(piece.cut(tensors) if piece else tensors, folder / file_name(_RESUME, piece))
    if piece is not None:
        write_index(folder, _RESUME, tensors, piece)


def read_state(folder: Path, piece: Piece | None) -> dict[str, Tensor]:
    """What was saved to resume a coder from, or what a rank with this piece of it needs."""
    with Stored(folder, _RESUME) as stored:
        return stored.read_all(piece)


def check_room(run: Path, state: TrainingState) -> None:
    """Raise UsageError where the disk has no room for what all ranks save, who must all ask."""
    here = 0
    for name, coder in state.bank.items():
        if state.exchange.owns(state.bank.hookpoint[name]):
            # For other programs, and as the training point.
            weights = 2 * sum(4 * p.numel() for p in coder.parameters())
            here += weights + state_bytes(coder, state.optimizers[name].name)
    need, free = sum(state.exchange.ranks.everyones(here)), shutil.disk_usage(run).free
    if free < need:
        raise UsageError(
            f"--save_dir {run.parent}: a checkpoint takes {need / 2**30:.2f} GiB, and "
            f"{free / 2**30:.2f} GiB are free: make room, or give another folder"
        )


def _sum(coder: SparseCoder) -> float:
    return sum(float(p.detach().sum(dtype=torch.float64)) for p in coder.parameters())


def restore(run: Path, source: TokenSource, state: TrainingState) -> tuple[int, float]:
    """Restore what `save` wrote last; return its step and the wall seconds until then.

    Every rank reads the coders that it trains, whoever wrote them. Raises UsageError for files
    that are missing or damaged, or a run on other data.
    """
    ranks = state.exchange.ranks
    folder, manifest = newest_checkpoint(run, ranks)
    if manifest["data"] != source.fingerprint:
        raise UsageError(
            f"--resume: the data are {source.fingerprint} now and were {manifest['data']} when "
            f"{folder} was saved; give the same data, or start a new run with --finetune"
        )
    with ranks.together():
        for name, coder in state.bank.items():
            tensors = read_state(folder / name, state.optimizers[name].piece)
            state.optimizers[name].load_state_tensors(tensors)
            state.firing[name].load_state_tensors(tensors)
            coder.load_state_tensors(tensors)
    return manifest["step"], manifest["wall_seconds"]


def newest_checkpoint(run: Path, ranks: Ranks) -> tuple[Path, dict[str, Any]]:
    """The newest checkpoint whose files are all as they were written, and its manifest.

    Every rank checks a part of the files. A damaged checkpoint is named and passed over. Raises
    UsageError if none is left.
    """
    problems: list[str] = []
    for folder in reversed(checkpoints(run)):
        problem, manifest = _verify(folder, ranks.rank, ranks.world)
        found = ranks.merge({} if problem is None else {folder.name: problem})
        if not found:
            for line in problems if ranks.main else ():
                print(f"{line}; using {folder}")
            return folder, manifest
        problems.extend(found.values())
    why = "; ".join(problems) or "none is whole"
    raise UsageError(f"--resume: no checkpoint in {run} can be used: {why}")


def _verify(folder: Path, part: int, parts: int) -> tuple[str | None, dict[str, Any]]:
    """What is wrong with a checkpoint, and its manifest; of its files every parts-th is read."""
    try:
        manifest = read_json(folder / "manifest.json")
    except UsageError as error:
        return str(error), {}
    if manifest.get("format") not in (1, FORMAT):
        return (
            f"{folder} has format {manifest.get('format')}, and this version reads 1 to {FORMAT}: "
            f"resume with the version that wrote it, or start a new run with --finetune"
        ), {}
    written = manifest.pop("manifest_sha256", None)
    if manifest.get("format") != 1 and written != _digest_of(manifest):
        return f"{folder}/manifest.json is damaged (its SHA-256 is not the recorded one)", {}
    digests = manifest.get("sha256")
    if not isinstance(digests, dict) or not {"step", "wall_seconds", "data"} <= manifest.keys():
        return f"{folder}/manifest.json is incomplete", {}
    for name, digest in list(digests.items())[part::parts]:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            return f"{folder}/manifest.json names {name}, which is outside the checkpoint", {}
        path = folder / name
        if not path.is_file() or path.is_symlink():
            return f"{path} is missing", {}
        if _digest(path) != digest:
            return f"{path} is damaged (its SHA-256 is not the recorded one)", {}
    for path in folder.rglob("*"):
        known = path.name == "manifest.json" or path.relative_to(folder).as_posix() in digests
        if path.is_file() and not known and path.suffix not in _HARMLESS:
            return f"{path} was not written by the run", {}
    return None, manifest


def _digest_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""Coder files as the reference writes them: one folder a coder, and folders of such folders.

CODERS/<name>/cfg.json          what the coder is
CODERS/<name>/sae.safetensors   encoder.weight, encoder.bias, W_dec, b_dec and, if any, W_skip;
                                W_from.1 [L D_out], W_from.2 ... of cross-layer transcoders;
                                of the kinds that have thresholds also threshold [L], float32

A coder that several ranks hold is in pieces, as `pieces.py` says.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from natsort import natsorted
from safetensors.torch import save_file
from torch import Tensor

from ..config import Columns, SparseCoderConfig
from ..flag_checks import UsageError
from .coder_file import check_floats
from .pieces import Part, Piece, Stored, file_name, is_first, write_index

FILES = "cfg.json, sae.safetensors"

_BLOCK_BYTES = 1 << 26
_DTYPES = {"F64", "F32", "F16", "BF16"}


def is_coder(path: Path) -> bool:
    """Whether this is the folder of one coder, whole or in pieces."""
    weights = (path / f"sae.safetensors{end}" for end in ("", ".index.json"))
    return (path / "cfg.json").is_file() and any(file.is_file() for file in weights)


def write(
    folder: Path,
    cfg: SparseCoderConfig,
    d_in: int,
    d_out: int,
    tensors: dict[str, Tensor],
    piece: Piece | None = None,
) -> None:
    """Write one coder's two files, or the files of the rank that holds this `piece` of it."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file(piece.cut(plain) if piece else plain, folder / file_name("sae", piece))
    if is_first(piece):
        write_config(folder / "cfg.json", cfg, d_in, d_out)
    if piece is not None:
        write_index(folder, "sae", plain, piece)


def read_config(path: Path) -> tuple[SparseCoderConfig, dict[str, Any]]:
    """What a `cfg.json` says a coder is, and the keys that are not the config's own.

    Raises UsageError for a file that is not JSON, lacks `d_in`, or holds impossible values.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path} does not exist: give the folder of one coder") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not JSON ({error}): the file is damaged") from None
    if not isinstance(values, dict) or type(values.get("d_in")) is not int:
        raise UsageError(f"{path} has no integer d_in: it does not describe a sparse coder")
    known = {f.name: values.pop(f.name) for f in fields(SparseCoderConfig) if f.name in values}
    for name in [name for name, value in known.items() if isinstance(value, list)]:
        known[name] = tuple(Columns(*v) if name == "parts" else v for v in known[name])
    for name, value in values.items():
        if name not in ("d_in", "d_out") and value not in (None, False):
            raise UsageError(
                f"{path}: {name} is {value!r}, which this version does not know: the coder "
                f"may compute something else; take it out if it does not"
            )
    try:
        return SparseCoderConfig(**known), values
    except UsageError as error:
        raise UsageError(f"{path} describes no coder: {error}") from None


def write_config(path: Path, cfg: SparseCoderConfig, d_in: int, d_out: int) -> None:
    """Write `cfg.json`: the config, with the number of latents itself, and the widths."""
    sizes = {"num_latents": cfg.latents(d_in), "d_in": d_in, "d_out": d_out}
    said = {name: value for name, value in asdict(cfg).items() if value != ()}
    said = {n: v for n, v in said.items() if v or n not in ("crosscoder", "cross_layer")}
    text = json.dumps({**said, **sizes}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


@contextmanager
def opened(folder: Path) -> Iterator[tuple[SparseCoderConfig, int, int, Stored]]:
    """Config, d_in, d_out and the tensors of one coder, which fit each other.

    Raises UsageError for a folder that is not a coder's, a damaged file, or shapes that do not fit
    `cfg.json`; no tensor is read before the shapes are known to fit.
    """
    cfg, rest = read_config(folder / "cfg.json")
    d_in = rest["d_in"]
    with Stored(folder, "sae") as stored:
        file, shapes = stored.path, stored.shapes
        if strange := stored.types - _DTYPES:
            raise UsageError(f"{file} holds {', '.join(strange)}, not floating point")
        d_out = (*shapes.get("b_dec", ()), d_in)[0]
        expected = shapes_of(cfg, d_in, d_out)
        if shapes != expected:
            raise UsageError(
                f"{file} holds {shapes}, but {folder / 'cfg.json'} describes {expected}: "
                f"it is not a sparse coder of this kind, or one of the two was changed"
            )
        yield cfg, d_in, d_out, stored


def read(
    folder: Path, *, decoder: bool = True
) -> tuple[SparseCoderConfig, int, int, dict[str, Tensor]]:
    """Config, d_in, d_out and tensors of one coder, which `opened` checks; W_dec with `decoder`."""
    with opened(folder) as (cfg, d_in, d_out, stored):
        wanted = [name for name in stored.shapes if decoder or not is_decoder(name)]
        tensors = {name: stored.read(name) for name in wanted}
        check_floats(stored.path, tensors)
        return cfg, d_in, d_out, tensors


def shapes_of(cfg: SparseCoderConfig, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors of a coder."""
    latents = cfg.latents(d_in)
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (latents, d_in),
        "encoder.bias": (latents,),
        "W_dec": (latents, d_out),
        "b_dec": (d_out,),
    }
    for distance in range(1, len(cfg.sources) + 1):
        shapes[f"W_from.{distance}"] = (latents, d_out)
    if cfg.skip_connection:
        shapes["W_skip"] = (d_out, d_in)
    if cfg.has_threshold:
        shapes["threshold"] = (latents,)
    return shapes


def is_decoder(tensor: str) -> bool:
    """Whether a tensor of this name is what only decoding needs."""
    return tensor == "W_dec" or tensor.startswith("W_from.")


def newest_coders(folder: Path) -> Path:
    """`folder` itself if it holds coders, else its newest `step_*` checkpoint.

    A checkpoint is renamed into place when it is whole.
    """
    steps = natsorted((f for f in folder.glob("step_*") if f.suffix == ""), key=lambda f: f.name)
    return steps[-1] if steps else folder


def check_name(hookpoint: str) -> None:
    """Raise UsageError for the name of a coder that is a path out of its folder."""
    if Path(hookpoint).is_absolute() or ".." in Path(hookpoint).parts:
        raise UsageError(f"hookpoint {hookpoint}: names a folder of coders, not a path out of it")


def copy_whole(target: Path, folder: Path) -> None:
    """Write a coder's two files anew, in one piece; no more is in memory than a block of rows.

    Raises UsageError as `opened` does, and OSError or SafetensorError for a full disk.
    """
    with opened(folder) as (coder, d_in, d_out, stored):
        aside = target / "sae.safetensors.tmp"
        _write_whole(aside, stored)
        write_config(target / "cfg.json", coder, d_in, d_out)
        os.replace(aside, target / "sae.safetensors")


def _write_whole(path: Path, stored: Stored) -> None:
    """Write stored tensors as one safetensors file: a length, a header of JSON, and the numbers."""
    header, end = {}, 0
    for name, shape in stored.shapes.items():
        start, end = end, end + stored.read(name, Part(0, range(1))).nbytes * shape[0]
        entry = {"dtype": stored.dtype(name), "shape": shape, "data_offsets": [start, end]}
        header[name] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in stored.shapes:
            for block in _blocks(stored, name):
                file.write(block.numpy().data)


def _blocks(stored: Stored, name: str) -> Iterator[UInt8[Tensor, " bytes"]]:
    rows = stored.shapes[name][0]
    of_one = stored.read(name, Part(0, range(1))).nbytes
    at_once = max(1, _BLOCK_BYTES // max(1, of_one))
    for start in range(0, rows, at_once):
        block = stored.read(name, Part(0, range(start, min(start + at_once, rows))))
        yield block.contiguous().flatten().view(torch.uint8)

"""Coders in one file each, for other programs; of pieces no more is in memory than a block of rows.

python -m sae export checkpoints/RUN --to sparsify --out DIR
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from jaxtyping import UInt8
from safetensors import SafetensorError
from torch import Tensor
from tyro.conf import Positional, arg

from ..flag_checks import UsageError
from .hub import coders_folder
from .pieces import Part, Stored
from .sparsify import list_coders, opened

_BLOCK_BYTES = 1 << 26


@dataclass(frozen=True)
class ExportConfig:
    """Which coders to write, and how."""

    coders: Annotated[str, Positional, arg(metavar="RUN_OR_PATH_OR_HUB_ID")]
    """A run's folder, a folder of coders, or a Hub id."""
    out: str
    """Folder to write one folder per coder into."""
    to: Literal["sparsify"] = "sparsify"
    """sparsify: cfg.json and sae.safetensors, which Sparsify and `load_many` read."""


def export(cfg: ExportConfig) -> list[Path]:
    """Write every coder that `cfg` names; return their folders.

    Raises UsageError for what is no coder, a target that is there already, or a full disk.
    """
    written = []
    for name, folder in list_coders(coders_folder(cfg.coders)).items():
        target = Path(cfg.out) / name
        if (target / "sae.safetensors").exists() or target.resolve() == folder.resolve():
            raise UsageError(f"--out {cfg.out}: already holds {name}; give another folder")
        try:
            target.mkdir(parents=True, exist_ok=True)
            with opened(folder) as (coder, d_in, d_out, stored):
                aside = target / "sae.safetensors.tmp"
                _write_whole(aside, stored)
                coder.to_json(target / "cfg.json", d_in, d_out)
                os.replace(aside, target / "sae.safetensors")
        except (OSError, SafetensorError) as error:
            raise UsageError(
                f"--out {cfg.out}: {name} cannot be written ({error}); make room, or give another "
                f"folder"
            ) from None
        written.append(target)
    return written


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


def main(cfg: ExportConfig) -> None:
    """Write what the command line names."""
    for folder in export(cfg):
        print(f"coder  {folder.resolve()}")

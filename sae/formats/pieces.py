"""Tensors in one file, or in pieces over several files, read as if they lay in one.

STEM.safetensors              all tensors whole, or
STEM-1-of-4.safetensors       of each tensor that is cut, some indices along one dimension; the
                              first file also has the tensors that are not cut
STEM.safetensors.index.json   {"metadata": {"dims": {name: dim}}, "weight_map": {name: [files]}}
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..flag_checks import UsageError


class Part(NamedTuple):
    """Some neighbouring indices of a tensor along one of its dimensions."""

    dim: int
    indices: range


@dataclass(frozen=True)
class Piece:
    """What one rank of several holds of a coder: of each parameter that is cut, a part."""

    number: int
    """From 0."""
    of: int
    parts: Mapping[str, Part | None]
    """By name; None: whole."""

    def part_of(self, tensor: str) -> Part | None:
        """The part of a parameter, or of what an optimizer keeps of it as `....NAME....`.

        Of several names in it the longest tells.
        """
        named = [name for name in self.parts if f".{name}." in f".{tensor}."]
        return self.parts[max(named, key=len)] if named else None

    def cut(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors that the file of this piece holds: those that are cut, the first one all."""
        return {
            name: t
            for name, t in tensors.items()
            if is_first(self) or (t.ndim and self.part_of(name))
        }


def is_first(piece: Piece | None) -> bool:
    """Whether this is all, or the piece whose rank writes what there is once."""
    return piece is None or piece.number == 0


def file_name(stem: str, piece: Piece | None) -> str:
    """The name of a file of whole tensors, or of a piece."""
    number = "" if piece is None else f"-{piece.number + 1}-of-{piece.of}"
    return f"{stem}{number}.safetensors"


def own_files(folder: Path, piece: Piece | None) -> list[Path]:
    """The files in a coder's folder that the rank with this piece wrote."""
    files = sorted(folder.iterdir())
    if piece is None:
        return files
    mine = file_name("", piece)  # beside it other ranks may be writing
    once = [f for f in files if f.suffix == ".json"] if is_first(piece) else []
    return [*once, *(f for f in files if f.name.endswith(mine))]


def write_index(folder: Path, stem: str, tensors: Mapping[str, Tensor], piece: Piece) -> None:
    """Say which files hold which tensors, on the rank with the first piece."""
    if not is_first(piece):
        return
    files = [file_name(stem, Piece(i, piece.of, {})) for i in range(piece.of)]
    dims = {
        name: part.dim
        for name, tensor in tensors.items()
        if tensor.ndim and (part := piece.part_of(name))
    }
    weight_map = {name: files if name in dims else files[:1] for name in tensors}
    index = {"metadata": {"dims": dims}, "weight_map": weight_map}
    text = json.dumps(index, indent=2) + "\n"
    (folder / f"{stem}.safetensors.index.json").write_text(text, encoding="utf-8")


class Stored:
    """The tensors of `folder` / `stem`, in one file or in pieces; a context that keeps them open.

    Raises UsageError for files that are missing or damaged.
    """

    def __init__(self, folder: Path, stem: str) -> None:
        whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
        self.path = index if index.exists() and not whole.exists() else whole
        """The file that stands for all, for messages."""
        with ExitStack() as self._stack:
            try:
                self._open(folder)
            except (SafetensorError, OSError) as error:
                raise UsageError(
                    f"{self.path} cannot be read ({error}): the file is damaged"
                ) from None
            self._stack = self._stack.pop_all()

    def _open(self, folder: Path) -> None:
        self._dims: dict[str, int] = {}
        self._pieces: dict[str, list[Any]] = {}
        if self.path.suffix == ".json":
            self._dims, weight_map = _read_index(self.path)
            names = dict.fromkeys(name for files in weight_map.values() for name in files)
            opened = {name: self._opened(folder / name) for name in names}
            for tensor, files in weight_map.items():
                self._pieces[tensor] = [opened[name].get_slice(tensor) for name in files]
        else:
            file = self._opened(self.path)
            self._pieces = {name: [file.get_slice(name)] for name in list(file.keys())}
        self.types = {p.get_dtype() for pieces in self._pieces.values() for p in pieces}
        """What safetensors calls the types of the numbers."""
        self.shapes = {name: self._shape(name) for name in self._pieces}
        """The shapes of the whole tensors."""

    def _opened(self, path: Path) -> Any:
        return self._stack.enter_context(safe_open(path, framework="pt", device="cpu"))

    def __enter__(self) -> "Stored":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _shape(self, name: str) -> tuple[int, ...]:
        shapes = [list(piece.get_shape()) for piece in self._pieces[name]]
        if len(shapes) == 1:
            return tuple(shapes[0])
        dim, sizes = self._dims[name], []
        for shape in shapes:
            sizes.append(shape[dim] if dim < len(shape) else -1)
            shape[dim : dim + 1] = [0]
        if any(shape != shapes[0] for shape in shapes) or min(sizes) < 0:
            raise UsageError(f"{self.path}: the pieces of {name} do not fit: it is damaged")
        return tuple(sum(sizes) if i == dim else n for i, n in enumerate(shapes[0]))

    def dtype(self, name: str) -> str:
        """What safetensors calls the type of a tensor's numbers."""
        return self._pieces[name][0].get_dtype()

    def read(self, name: str, part: Part | None = None) -> Tensor:
        """A tensor, or only a part of it; one without dimensions has no parts."""
        shape, pieces = self.shapes[name], self._pieces[name]
        if not shape:
            return pieces[0][...]
        dim = self._dims.get(name, 0)
        wanted = [slice(0, size) for size in shape]
        if part is not None:
            wanted[part.dim] = slice(part.indices.start, part.indices.stop)
        found, start = [], 0
        for piece in pieces:
            stop = start + piece.get_shape()[dim]
            first, last = max(start, wanted[dim].start), min(stop, wanted[dim].stop)
            if first < last:
                here = [*wanted]
                here[dim] = slice(first - start, last - start)
                found.append(piece[tuple(here)])
            start = stop
        return found[0] if len(found) == 1 else torch.cat(found, dim)

    def read_all(self, piece: Piece | None) -> dict[str, Tensor]:
        """All tensors, or what one rank holds of them."""
        parts = {name: piece and piece.part_of(name) for name in self.shapes}
        return {name: self.read(name, part) for name, part in parts.items()}


def _read_index(path: Path) -> tuple[dict[str, int], dict[str, list[str]]]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        dims, weight_map = index["metadata"]["dims"], index["weight_map"]
        plain = [_are_names(files) for files in weight_map.values()]
        fits = all(plain) and all(
            type(dims.get(name, 0)) is int and 0 <= dims.get(name, 0) < 2 and len(files) > 0
            for name, files in weight_map.items()
        )
        cut = {name for name, files in weight_map.items() if len(files) > 1}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UsageError(f"{path} is no index of tensors: the file is damaged") from None
    if not fits or not cut <= dims.keys():
        raise UsageError(f"{path} is no index of files beside it: the file is damaged")
    return dims, weight_map


def _are_names(files: Any) -> bool:
    """Whether these are names of files in one folder."""
    return isinstance(files, list) and all(
        isinstance(f, str) and f == Path(f).name and f.endswith(".safetensors") for f in files
    )

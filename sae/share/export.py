"""Coders in the files of other programs, or of any program in ours.

python -m sae export checkpoints/RUN --to sae_lens --out DIR
python -m sae export CODERS_OF_OTHERS --out DIR
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from safetensors import SafetensorError
from tyro.conf import Positional, arg

from ..flag_checks import UsageError
from ..formats import dictionary_learning, kinds, sae_lens, sparsify
from ..formats.coder_file import CoderFile
from ..formats.hub import coders_folder
from ..formats.origin import Origin
from .origins import origin_of

Program = Literal["sparsify", "sae_lens", "dictionary_learning"]


@dataclass(frozen=True)
class ExportConfig:
    """Which coders to write, and how."""

    coders: Annotated[str, Positional, arg(metavar="RUN_OR_PATH_OR_HUB_ID")]
    """A run's folder, a folder of coders of any program, or a Hub id."""
    out: str
    """Folder to write one folder per coder into."""
    to: Program = "sparsify"
    """The program that shall read them; sparsify is what a run itself writes."""
    hookpoint: str | None = None
    """Where the one coder reads, if its files do not say it; or the only one to take."""
    allow_pt: bool = False
    """Open coder files that are pickles (.pt), which can run code: only of people you trust."""


WRITERS: dict[str, Callable[[Path, str, CoderFile, Origin], list[str]]] = {
    "sae_lens": sae_lens.write,
    "dictionary_learning": dictionary_learning.write,
}


def export(cfg: ExportConfig) -> tuple[list[Path], list[str]]:
    """Write every coder that `cfg` names; return their folders, and notes on what is lost.

    Raises UsageError for what is no coder or cannot be held there, a target that is there already,
    or a full disk.
    """
    folder = coders_folder(cfg.coders, allow_pt=cfg.allow_pt)
    paths = kinds.chosen(kinds.list_coders(folder), cfg.hookpoint)
    origin, written, notes = origin_of(Path(cfg.coders)), [], []
    for name, path in paths.items():
        target = Path(cfg.out) / name
        if kinds.kind_of(target) is not None or target.resolve() == path.resolve():
            raise UsageError(f"--out {cfg.out}: already holds {name}; give another folder")
        try:
            target.mkdir(parents=True, exist_ok=True)
            notes += _write(cfg, target, name, path, origin)
        except (OSError, SafetensorError) as error:
            raise UsageError(
                f"--out {cfg.out}: {name} cannot be written ({error}); make room, or give another "
                f"folder"
            ) from None
        written.append(target)
    return written, notes


def _write(cfg: ExportConfig, target: Path, name: str, path: Path, origin: Origin) -> list[str]:
    if cfg.to != "sparsify":
        return WRITERS[cfg.to](target, name, kinds.read(path, cfg.allow_pt), origin)
    if kinds.kind_of(path) in ("sparsify", None):
        sparsify.copy_whole(target, path)
        return []
    coder = kinds.read(path, cfg.allow_pt)
    sparsify.write(target, coder.cfg, coder.d_in, coder.d_out, coder.tensors)
    return []


def main(cfg: ExportConfig) -> None:
    """Write what the command line names."""
    written, notes = export(cfg)
    for folder in written:
        print(f"coder  {folder.resolve()}")
    for note in notes:
        print(f"note   {note}")

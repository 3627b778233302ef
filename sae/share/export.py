"""Coders in the files of other programs, or of any program in ours.

python -m sae export checkpoints/RUN --to sae_lens --out DIR
python -m sae export CODERS_OF_OTHERS --out DIR
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError

from ..flag_checks import UsageError
from ..formats import (
    circuit_tracer,
    circuit_tracer_clt,
    dictionary_learning,
    kinds,
    sae_lens,
    sparsify,
)
from ..formats.coder_file import CoderFile, NeedsThreshold
from ..formats.hub import coders_folder
from ..formats.origin import Origin
from ..judge.threshold import make_thresholds, of_coders
from ..judge.trained import CodersConfig, load_trained
from ..runs.provenance import flags_of_run
from .origins import origin_of

Program = Literal["sparsify", "sae_lens", "dictionary_learning", "circuit_tracer"]


@dataclass(frozen=True)
class ExportConfig(CodersConfig):
    """Which coders to write, and how; the LM and the data are read where thresholds are made."""

    out: str = field(kw_only=True)
    """Folder to write one folder per coder into."""
    to: Program = "sparsify"
    """The program that shall read them; sparsify is what a run itself writes."""


WRITERS: dict[str, Callable[[Path | None, str, CoderFile, Origin], list[str]]] = {
    "sae_lens": sae_lens.write,
    "dictionary_learning": dictionary_learning.write,
}


def export(cfg: ExportConfig) -> tuple[list[Path], list[str]]:
    """Write every coder that `cfg` names; return their folders, and notes on what is lost.

    Raises UsageError for what is no coder or cannot be held there, a target that is there already,
    or a full disk; NeedsThreshold where thresholds would do, before anything is written.
    """
    paths = _paths(cfg)
    for name, path in paths.items():
        target = Path(cfg.out) / name
        if kinds.kind_of(target) is not None or target.resolve() == path.resolve():
            raise UsageError(f"--out {cfg.out}: already holds {name}; give another folder")
    if cfg.to != "sparsify":
        coders = {name: kinds.read(path, cfg.allow_pt) for name, path in paths.items()}
        return write(cfg, coders, _origin(cfg))
    for name, path in paths.items():
        with _disk_errors(cfg, name):
            (Path(cfg.out) / name).mkdir(parents=True, exist_ok=True)
            if kinds.kind_of(path) in ("sparsify", None):
                sparsify.copy_whole(Path(cfg.out) / name, path)
                continue
            found = kinds.read(path, cfg.allow_pt)
            sparsify.write(Path(cfg.out) / name, *found[:4])
    return [Path(cfg.out) / name for name in paths], []


def _origin(cfg: ExportConfig) -> Origin:
    paths = _paths(cfg)
    return origin_of(Path(cfg.coders), cfg.model, kinds.trained_on(next(iter(paths.values()))))


def _paths(cfg: ExportConfig) -> dict[str, Path]:
    folder = coders_folder(cfg.coders, allow_pt=cfg.allow_pt, token=cfg.hf_token)
    return kinds.chosen(kinds.list_coders(folder), cfg.hookpoint)


def export_as_can_be(cfg: ExportConfig) -> tuple[list[Path], list[str]]:
    """`export`, through thresholds where the program holds the coders only so, which is printed."""
    try:
        return export(cfg)
    except NeedsThreshold as error:
        print(f"{error}; so thresholds are made on text")
        return through_thresholds(cfg)


def write(
    cfg: ExportConfig, coders: dict[str, CoderFile], origin: Origin
) -> tuple[list[Path], list[str]]:
    """Write coders into the files of another program; their folders, and notes.

    Raises UsageError where one cannot be held there; then none of them is left.
    """
    out, notes = Path(cfg.out), []
    across_layers = any(coder.cfg.sources or coder.cfg.targets for coder in coders.values())
    held = across_layers and cfg.to == "circuit_tracer"
    for name, coder in coders.items():
        if coder.cfg.crosscoder or (across_layers and not held):
            kind = "crosscoder" if coder.cfg.crosscoder else "layer of a cross-layer transcoder"
            raise UsageError(
                f"--to {cfg.to}: {name} is a {kind}, which its files cannot hold: keep it as it "
                f"is, or --to sparsify" + (" or circuit_tracer" if across_layers else "")
            )
    if cfg.to == "circuit_tracer":
        if (out / "config.yaml").exists():
            raise UsageError(f"--out {out}: already holds a set; give another folder")
        with _disk_errors(cfg, "the set"):
            program = circuit_tracer_clt if across_layers else circuit_tracer
            return [out], program.write(out, coders, origin)
    for name, coder in coders.items():  # what cannot be held is said before any is written
        WRITERS[cfg.to](None, name, coder, origin)
    for name, coder in coders.items():
        with _disk_errors(cfg, name):
            notes += WRITERS[cfg.to](out / name, name, coder, origin)
    return [out / name for name in coders], notes


@contextmanager
def _disk_errors(cfg: ExportConfig, name: str) -> Iterator[None]:
    """Inside, what the disk does not take becomes a UsageError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"--out {cfg.out}: {name} cannot be written ({error}); make room, or give another "
            f"folder"
        ) from None


def through_thresholds(cfg: ExportConfig) -> tuple[list[Path], list[str]]:
    """Write JumpReLU coders in place of those that the program holds only so; the rest as it is.

    Their thresholds are made as python -m sae threshold does, on text that a run held out; the
    figures before and after are printed, and written where the program's files have a place.
    """
    if not flags_of_run(Path(cfg.coders)) and (cfg.model is None or cfg.dataset is None):
        raise UsageError(
            f"--to {cfg.to}: takes thresholds in place of k, which are made on text: give --model "
            f"and --dataset, or the folder of a run"
        )
    names = (f.name for f in fields(CodersConfig))
    trained = load_trained(CodersConfig(**{name: getattr(cfg, name) for name in names}))
    coders = {name: kinds.read(path, cfg.allow_pt) for name, path in _paths(cfg).items()}
    origin, bank = _origin(cfg), trained.state.bank
    lacking = {n: bank[n] for n, coder in coders.items() if _lacks_threshold(cfg, n, coder, origin)}
    made, before, after = found = make_thresholds(of_coders(trained, lacking))
    activation = {name: coder.cfg.activation for name, coder in lacking.items()}
    print(found.table(activation))
    figures = {
        name: {
            "training_architecture": activation[name],
            "l0": after.coders[name].l0,
            "l0_before_threshold": before.coders[name].l0,
            "fvu": after.coders[name].fvu,
            "fvu_before_threshold": before.coders[name].fvu,
        }
        for name in made
    }
    for name, coder in made.items():
        tensors = {key: t.cpu() for key, t in coder.state_dict().items()}
        coders[name] = CoderFile(coder.cfg, coder.d_in, coder.d_out, tensors)
    return write(cfg, coders, replace(origin, figures=figures))


def _lacks_threshold(cfg: ExportConfig, name: str, coder: CoderFile, origin: Origin) -> bool:
    """Whether the program holds a coder only with a threshold for every latent."""
    if cfg.to == "circuit_tracer":
        return not coder.cfg.has_threshold
    try:
        WRITERS[cfg.to](None, name, coder, origin)
    except NeedsThreshold:
        return True
    return False


def main(cfg: ExportConfig) -> None:
    """Write what the command line names."""
    written, notes = export_as_can_be(cfg)
    for folder in written:
        print(f"coder  {folder.resolve()}")
    by_text: dict[str, list[str]] = {}
    for note in notes:
        name, _, text = note.partition(": ")
        by_text.setdefault(text, []).append(name)
    for text, names in by_text.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        print(f"note   {names[0]}{others}: {text}")

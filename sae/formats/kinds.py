"""Which program wrote the files of a coder: recognized from the files, never guessed."""

from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from natsort import natsorted

from ..flag_checks import UsageError
from . import circuit_tracer, circuit_tracer_clt, dictionary_learning, sae_lens, scopes, sparsify
from .coder_file import CoderFile
from .origin import without_seed

_DEPTH = 4


class Kind(NamedTuple):
    """The coder files of one program."""

    files: str
    """What lies in the folder of a coder."""
    is_coder: Callable[[Path], bool]
    read: Callable[[Path, bool, bool], CoderFile]
    """From a path, whether a pickle may be opened, and whether W_dec is wanted."""
    hookpoint: Callable[[Path], str | None]
    """What its files say of where it reads; of our own the folder's name says it."""
    trained_on: Callable[[Path], dict[str, Any]] = lambda path: {}
    """What its files say of the LM and the text, by the names that `Origin` has for it."""
    between: Callable[[Path], str | None] = lambda path: None
    """Of a coder that does not go from one module's input to its output, what it is."""
    note: Callable[[Path], str | None] = lambda path: None
    """What its activations have that those of the LM as it is do not."""


KINDS = {
    "sparsify": Kind(
        sparsify.FILES,
        sparsify.is_coder,
        lambda path, _, decoder: CoderFile(*sparsify.read(path, decoder=decoder)),
        lambda path: path.name,
    ),
    "sae_lens": Kind(
        sae_lens.FILES,
        sae_lens.is_coder,
        lambda path, *_: sae_lens.read(path),
        sae_lens.hookpoint_of,
        sae_lens.trained_on,
        note=sae_lens.changed_lm,
    ),
    "dictionary_learning": Kind(
        dictionary_learning.FILES,
        dictionary_learning.is_coder,
        lambda path, allow_pt, _: dictionary_learning.read(path, allow_pt),
        dictionary_learning.hookpoint_of,
        dictionary_learning.trained_on,
    ),
    "circuit_tracer": Kind(
        circuit_tracer.FILES,
        circuit_tracer.is_coder,
        lambda path, *_: circuit_tracer.read(path),
        circuit_tracer.hookpoint_of,
        circuit_tracer.trained_on,
        between=circuit_tracer.elsewhere_in_lm,
    ),
    "circuit_tracer's cross-layer transcoders": Kind(
        circuit_tracer_clt.FILES,
        circuit_tracer_clt.is_coder,
        lambda path, _, decoder: circuit_tracer_clt.read(path, decoder),
        circuit_tracer_clt.hookpoint_of,
        circuit_tracer.trained_on,
    ),
    "Gemma Scope": Kind(
        scopes.GEMMA_1,
        scopes.is_gemma_1,
        lambda path, *_: scopes.read_gemma_1(path),
        scopes.hookpoint_of_gemma_1,
        between=scopes.gemma_1_between_norms,
    ),
    "Gemma Scope 2": Kind(
        scopes.GEMMA_2,
        scopes.is_gemma_2,
        lambda path, *_: scopes.read_gemma_2(path),
        scopes.hookpoint_of_gemma_2,
        between=scopes.gemma_2_between_norms,
    ),
    "Llama Scope": Kind(
        scopes.LLAMA,
        scopes.is_llama,
        lambda path, *_: scopes.read_llama(path),
        scopes.hookpoint_of_llama,
    ),
    "Qwen Scope": Kind(
        scopes.QWEN,
        scopes.is_qwen,
        lambda path, allow_pt, _: scopes.read_qwen(path, allow_pt),
        scopes.hookpoint_of_qwen,
    ),
    "OpenAI": Kind(
        scopes.OPENAI,
        scopes.is_openai,
        lambda path, allow_pt, _: scopes.read_openai(path, allow_pt),
        scopes.hookpoint_of_openai,
    ),
}


def kind_of(path: Path) -> str | None:
    """The program whose files of one coder these are; None where they are none.

    Raises UsageError for the files of two programs in one folder.
    """
    found = [name for name, kind in KINDS.items() if kind.is_coder(path)]
    if len(found) > 1:
        raise UsageError(f"{path} has the files of {' and of '.join(found)}: keep one of them")
    return found[0] if found else None


def read(path: Path, allow_pt: bool = False, *, decoder: bool = True) -> CoderFile:
    """One coder of any program; of pickles only with `allow_pt`; W_dec only with `decoder`.

    Raises UsageError for what is no coder of a known program, damaged, or not to be held here.
    """
    name = kind_of(path)
    if name is None and (path / "cfg.json").is_file():
        name = "sparsify"  # which says what is missing
    if name is None:
        raise UsageError(f"{path} is no coder: {_known()}")
    found = KINDS[name].read(path, allow_pt, decoder)
    if not decoder:
        kept = {n: t for n, t in found.tensors.items() if not sparsify.is_decoder(n)}
        return found._replace(tensors=kept)
    return found


def list_coders(
    folder: Path, names: list[str] | None = None, pattern: str | None = None
) -> dict[str, Path]:
    """Name -> folder of every coder in a folder, in natural order; `names`, or those of a glob.

    A coder is named by its hookpoint where its files say it, else by its folder. Raises UsageError
    where there is none, where one that is asked for is missing, where two have one name, or one
    has a name that leads out of a folder.
    """
    if not folder.is_dir() and kind_of(folder) is None:
        raise UsageError(f"{folder} is not a folder: give a folder of coders")
    for name in names or ():
        sparsify.check_name(name)
    found: dict[str, Path] = {}
    for path in _coders_below(folder, 0):
        name = _name_of(path, folder)
        try:
            sparsify.check_name(name)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
        if name in found:
            raise UsageError(
                f"{folder} holds two coders of {name}, {found[name].name} and {path.name}: give "
                f"the folder of one"
            )
        found[name] = path
    if names is not None:
        # Whatever is wrong with a folder of this name is said when it is read.
        found = {n: folder / n for n in names if (folder / n).is_dir()} | found
        if absent := [name for name in names if name not in found]:
            raise UsageError(f"{folder} has no coder {absent[0]}; it has {', '.join(found)}")
        return {name: found[name] for name in natsorted(names)}
    if not found and (named := circuit_tracer.elsewhere(folder)):
        raise UsageError(
            f"{folder / 'config.yaml'} only names coders in other places, as {named[0]}: give one "
            f"of these, or its repository"
        )
    kept = [name for name in found if pattern is None or fnmatch(name, pattern)]
    if not kept:
        matching = "" if pattern is None else f" that match {pattern!r}"
        raise UsageError(f"{folder} holds no sparse coders{matching}: {_known()}")
    return {name: found[name] for name in natsorted(kept)}


def holds_coders(folder: Path) -> bool:
    """Whether a folder, if it is there, has any coder in it."""
    return folder.is_dir() and any(True for _ in _coders_below(folder, 0))


def chosen(paths: dict[str, Path], hookpoint: str | None) -> dict[str, Path]:
    """Of coders by name that at one hookpoint, or the only one under that name; without it all.

    Raises UsageError where there are several, and none is at the hookpoint, or where the files of
    the only one say that it is elsewhere.
    """
    if hookpoint is None:
        return paths
    sparsify.check_name(hookpoint)
    if hookpoint in paths:
        return {hookpoint: paths[hookpoint]}
    if len(paths) != 1:
        named = [name for name, path in paths.items() if _is_ours(path) or says_hookpoint(path)]
        which = f"there are {', '.join(named)}: give one of these, or" if named else "give"
        raise UsageError(f"--hookpoint {hookpoint}: {which} the path of one coder")
    ((name, path),) = paths.items()
    if says_hookpoint(path):
        raise UsageError(
            f"--hookpoint {hookpoint}: the files of {path.name} say {name}: leave it out"
        )
    return {hookpoint: path}


def trained_on(path: Path) -> dict[str, Any]:
    """What the files of a coder say of its LM and text, by the names that `Origin` has for it."""
    return KINDS[kind_of(path) or "sparsify"].trained_on(path)


def says_hookpoint(path: Path) -> bool:
    """Whether the files of a coder, or the name of its folder in a run, say where it reads."""
    kind = kind_of(path)
    return kind is not None and kind != "sparsify" and KINDS[kind].hookpoint(path) is not None


def _name_of(path: Path, below: Path) -> str:
    hookpoint = None if (kind := kind_of(path)) is None else KINDS[kind].hookpoint(path)
    inner = path.relative_to(below).as_posix()
    plain = path.absolute().name if inner == "." else inner.replace("/", ".")
    if hookpoint and without_seed(plain) != hookpoint:  # one of several seeds keeps its seed
        return hookpoint
    return plain.removesuffix(".safetensors").removesuffix(".pt")


def _coders_below(folder: Path, depth: int) -> Iterator[Path]:
    """Folders or files of coders; of our own only those that lie directly in a folder."""
    if kind_of(folder) is not None or _is_ours(folder):
        if depth < 2 or not _is_ours(folder):
            yield folder
    elif depth < _DEPTH:
        below = natsorted(folder.iterdir(), key=lambda path: path.name)
        below = [path for path in below if not path.name.startswith(".")]
        below = [path for path in below if path.is_dir() or kind_of(path) is not None]
        if depth == 0 and any(_is_ours(path) for path in below):
            # In a pushed run folders beside its coders hold the same ones for other programs.
            below = [path for path in below if _is_ours(path) or kind_of(path) is not None]
        for path in below:
            yield from _coders_below(path, depth + 1)


def _is_ours(folder: Path) -> bool:
    """Whether this is a coder of ours, or what is left of one."""
    return kind_of(folder) in ("sparsify", None) and (folder / "cfg.json").is_file()


def _known() -> str:
    kinds = "; ".join(f"{name} ({kind.files})" for name, kind in KINDS.items())
    return f"give a folder with the files of {kinds}"

"""Data sets by name: the Hub, folders saved by datasets, files and folders of files."""

import glob
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import fsspec
from datasets.config import HF_DATASETS_CACHE
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from ..config import DataConfig
from ..flag_checks import UsageError

_READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
_READERS |= {".csv": "csv", ".tsv": "csv", ".arrow": "arrow"}
_PACKED = (".gz", ".zst", ".bz2", ".xz")
"""Ends of compressed files, which `datasets` unpacks."""


def open_dataset(cfg: DataConfig, token: str | None) -> Any:
    """The data set that `cfg` names, as far as `split` wants it.

    A folder has the splits that its files' names say, as `datasets` reads them; of a file, or files
    that a glob matches, all rows are one split of any name. Raises UsageError for what is not there
    or cannot be read.
    """
    with reading(cfg):
        return _open(cfg, token)


@contextmanager
def reading(cfg: DataConfig) -> Iterator[None]:
    """Inside, rows are read, which is when files are found to be damaged, or no text."""
    try:
        yield
    except UsageError:
        raise
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--text_column {cfg.text_column or 'text'}: a document is not UTF-8 ({error.reason} "
            f"at byte {error.start} of it); convert the files, for example with iconv"
        ) from None
    except Exception as error:  # each format's reader has errors of its own
        raise unreadable(cfg, error) from None


def unreadable(cfg: DataConfig, error: Exception) -> UsageError:
    """What to say of data whose reader failed: the file and line, if it is one of JSON."""
    for file in _files(cfg.dataset, quiet=True):
        if found := _damage(file):
            return UsageError(f"DATASET {file}: {found}")
    if isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = Exception(error.__cause__)  # the outer one says no more than that there is one
    reason = " ".join(str(error).split())[:300]
    return UsageError(
        f"DATASET {cfg.dataset} (--split {cfg.split}): cannot be read here or from the Hub. "
        f"{reason}"
    )


def _open(cfg: DataConfig, token: str | None) -> Any:
    name, path = cfg.dataset, Path(cfg.dataset)
    arguments: dict[str, Any] = {**parse_data_args(cfg.data_args)}
    saved = (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists()
    files = [] if saved else _files(name)
    if cfg.skip_bad_rows and not files:
        raise _skips_lines_alone()
    if saved:
        return _slice(datasets.load_from_disk(str(path)), cfg.split)
    if not files:
        return datasets.load_dataset(
            name, split=cfg.split, streaming=cfg.streaming, token=token, **arguments
        )
    reader = _reader(name, files)
    if reader == "text":  # a file is a document
        arguments = {"sample_by": "document", **arguments}
    if any(_kind(file) == ".tsv" for file in files):
        arguments = {"sep": "\t", **arguments}
    split = str(re.split(r"[\[+]", cfg.split)[0])
    data_files = _splits(path, files) if path.is_dir() else {split: files}
    if path.is_dir() and split not in data_files:
        raise UsageError(
            f"--split {cfg.split}: the files of {name} are of the splits {', '.join(data_files)}; "
            f"name one of them"
        )
    if cfg.skip_bad_rows:
        return _good_rows(cfg, data_files[split])
    return datasets.load_dataset(
        *(reader,),
        data_files={split: [str(file) for file in data_files[split]]},
        split=cfg.split,
        streaming=cfg.streaming,
        **arguments,
    )


def cache_file(data: Any, function: Any) -> str | None:
    """Where `map` keeps what `function` makes of a data set; None: beside the data, as usual.

    A set saved by `datasets` may lie where nothing can be written: then in its cache, under a name
    that changes with the data and the function.
    """
    where = [Path(file["filename"]).parent for file in data.cache_files]
    if not where or os.access(where[0], os.W_OK):
        return None
    digest = Hasher.hash((data._fingerprint, function))
    return str(Path(HF_DATASETS_CACHE) / f"cache-{digest}.arrow")


def _kind(file: Path) -> str:
    """What a file's name ends in, compressed or not."""
    return Path(file.stem).suffix if file.suffix in _PACKED else file.suffix


def _opened(file: str | Path) -> Any:
    """A file of text to read, unpacked if its name says that it is compressed."""
    return fsspec.open(str(file), "rt", compression="infer", encoding="utf-8", errors="replace")


def _is_of_lines(file: Path) -> bool:
    """Whether a file has a JSON object in each line: a .jsonl, or a .json that begins so."""
    if _kind(file) != ".json":
        return _kind(file) == ".jsonl"
    with _opened(file) as lines:
        return _object(next(filter(str.strip, lines), "")) is not None


def _damage(file: Path) -> str | None:
    """What is wrong with a file of JSON, and in which line."""
    try:
        if _is_of_lines(file):
            for number, line in _bad_lines(file):
                return (
                    f"line {number} is no JSON object ({line[:80]!r}); mend it, or leave such "
                    f"lines out by --skip_bad_rows"
                )
        elif _kind(file) == ".json":
            with _opened(file) as text:
                json.load(text)
    except json.JSONDecodeError as error:
        return f"line {error.lineno} is no JSON ({error.msg}, column {error.colno}); mend it"
    except (OSError, EOFError, ValueError, RecursionError):  # damaged otherwise
        return None
    return None


def _bad_lines(file: Path) -> Iterator[tuple[int, str]]:
    """(number, text) of the lines of a file that are no JSON objects, empty ones aside."""
    with _opened(file) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip() and _object(line) is None:
                yield number, line


def _object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _skips_lines_alone() -> UsageError:
    return UsageError(
        "--skip_bad_rows: is for files here with a JSON object in each line, not for a part of a "
        "split: leave it out"
    )


def _good_rows(cfg: DataConfig, files: list[Path]) -> Any:
    """The lines of .jsonl files that are JSON objects; says how many are not.

    Raises UsageError for files of another kind, and where --split wants a part of them.
    """
    if "[" in cfg.split or not all(map(_is_of_lines, files)):
        raise _skips_lines_alone()
    bad = {str(file): [number for number, _ in _bad_lines(file)] for file in files}
    for file, numbers in bad.items():
        if numbers:
            first = ", ".join(map(str, numbers[:5]))
            print(f"{file}: {len(numbers)} lines that are no JSON objects left out: {first} ...")
    # `datasets` caches what a generator gives by its arguments: the files' times are among them.
    of_files = [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    if cfg.streaming:
        return datasets.IterableDataset.from_generator(_objects, gen_kwargs={"files": of_files})
    return datasets.Dataset.from_generator(_objects, gen_kwargs={"files": of_files})


def _objects(files: list[tuple[str, int, int]]) -> Iterator[dict[str, Any]]:
    for name, _, _ in files:
        with _opened(name) as lines:
            yield from filter(None, map(_object, lines))


def _files(name: str, quiet: bool = False) -> list[Path]:
    """The files that a path or a glob stands for; those of a folder and the folders in it."""
    path = Path(name)
    if path.is_file():
        return [path]
    if not path.is_dir():
        return [Path(file) for file in sorted(glob.glob(name, recursive=True))]
    inside = (file.relative_to(path) for file in sorted(path.rglob("*")) if file.is_file())
    kept = [file for file in inside if not any(part.startswith(".") for part in file.parts)]
    files = [path / file for file in kept if _kind(file) in _READERS]
    if not files and not quiet:
        raise UsageError(
            f"DATASET {name}: nothing here that can be read; give a folder saved by datasets, or "
            f"{', '.join(_READERS)}, .npy or .bin files"
        )
    return files


def _reader(name: str, files: list[Path]) -> str:
    for file in files:
        if _kind(file) not in _READERS:
            raise UsageError(
                f"DATASET {file}: files that end in {_kind(file) or 'nothing'} cannot be read; "
                f"give {', '.join(_READERS)}, .npy or .bin files"
            )
        if file.stat().st_size == 0:
            raise UsageError(f"DATASET {file}: the file is empty")
    if any(file.suffix == ".zst" for file in files) and find_spec("zstandard") is None:
        raise UsageError(f"DATASET {name}: .zst files need zstandard: pip install zstandard")
    kinds = sorted({_kind(file) for file in files})
    if len({_READERS[kind] for kind in kinds}) > 1:
        raise UsageError(
            f"DATASET {name}: holds {' and '.join(kinds)} files; give a folder of one kind, or one "
            f"file"
        )
    return _READERS[kinds[0]]


def _splits(folder: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Split -> files of a folder, by the names of files and folders, as `datasets` infers them.

    Raises UsageError where some files name a split and others do not.
    """
    found = get_data_patterns(str(folder))
    resolved = DataFilesDict.from_patterns(found, base_path=str(folder))
    known = {Path(file).resolve() for paths in resolved.values() for file in paths}
    splits = {
        str(split): [file for file in files if file.resolve() in {Path(p).resolve() for p in paths}]
        for split, paths in resolved.items()
    }
    if left := [file for file in files if file.resolve() not in known]:
        raise UsageError(
            f"DATASET {folder}: {left[0].relative_to(folder)} names no split and others of its "
            f"files do ({', '.join(splits)}): name it so, take it out, or give files or a quoted "
            f"glob"
        )
    return {split: paths for split, paths in splits.items() if paths}


def _slice(saved: Any, split: str) -> Any:
    """A split, or a part of one such as `train[:50%]`, of a data set saved by `datasets`."""
    name = re.split(r"[\[+]", split)[0]
    whole = saved if isinstance(saved, datasets.DatasetDict) else {name: saved}
    lengths = {key: len(rows) for key, rows in whole.items()}
    parts = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    pieces = [
        whole[part.splitname]
        if (part.from_, part.to) in ((None, None), (0, lengths[part.splitname]))
        else whole[part.splitname].select(range(part.from_ or 0, part.to or 0))
        for part in parts
    ]
    return pieces[0] if len(pieces) == 1 else datasets.concatenate_datasets(pieces)


def parse_data_args(text: str) -> dict[str, str | int | float | bool | None]:
    """`"a=b,c=1"` as keyword arguments of `datasets.load_dataset`, numbers and booleans typed."""
    parsed: dict[str, str | int | float | bool | None] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = item.partition("=")
        if not equals or not name.strip().isidentifier():
            raise UsageError(f'--data_args "{text}": {item!r} is not of the form name=value')
        parsed[name.strip()] = _literal(value.strip())
    return parsed


def _literal(text: str) -> str | int | float | bool | None:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text

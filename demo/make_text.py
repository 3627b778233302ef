"""Write the source text of this Python's standard library as one JSON document per file.

    python demo/make_text.py [FOLDER]        # default: demo/text

`train.jsonl` is what the demo LM and the quickstart's coders train on; `heldout.jsonl` is every
file whose path hashes into the last twentieth, which the LM never saw.
"""

import json
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path


def stdlib_documents() -> Iterator[tuple[str, str]]:
    """Yield (relative path, text) of every source file of the standard library, in path order."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        # Installed packages are not the standard library, and the codec tables are all digits.
        if name.startswith(("site-packages/", "dist-packages/", "encodings/", "pydoc_data/")):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # some test files are deliberately not UTF-8
            continue
        if text.strip():
            yield name, text


def is_held_out(name: str) -> bool:
    """One file in twenty, chosen by its path so that every Python agrees."""
    return zlib.crc32(name.encode()) % 20 == 0


def write_text(folder: Path) -> None:
    """Write `train.jsonl` and `heldout.jsonl`, each line `{"name", "text"}`."""
    folder.mkdir(parents=True, exist_ok=True)
    with (
        open(folder / "train.jsonl", "w", encoding="utf-8") as train,
        open(folder / "heldout.jsonl", "w", encoding="utf-8") as heldout,
    ):
        for name, text in stdlib_documents():
            line = json.dumps({"name": name, "text": text}) + "\n"
            (heldout if is_held_out(name) else train).write(line)


if __name__ == "__main__":
    write_text(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "text")

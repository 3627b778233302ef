"""English text that is on every machine where this project is installed.

    python benchmarks/english.py english.jsonl

Docstrings of the installed Python packages and of the standard library, and their documentation
and licences, one paragraph once. What is too short or mostly symbols is left out. The same packages
give the same text in the same order; those of `requirements.txt` give 30 MB.
"""

import ast
import json
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

_PAGES, _NAMES = (".md", ".rst", ".txt"), ("METADATA", "LICENSE", "NOTICE")
_DOCUMENTED = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module


def _texts(file: Path) -> Iterator[str]:
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".py":
            with warnings.catch_warnings(action="ignore"):  # of escapes in other people's strings
                nodes = ast.walk(ast.parse(text))
            documented = (node for node in nodes if isinstance(node, _DOCUMENTED))
            yield from filter(None, map(ast.get_docstring, documented))
        else:
            yield text
    except (UnicodeDecodeError, SyntaxError, ValueError):
        return  # tests of parsers bring files that are no text or no Python


def _is_prose(paragraph: str) -> bool:
    words = re.findall(r"[A-Za-z][a-z']+", paragraph)
    return len(words) >= 12 and sum(map(len, words)) >= 0.7 * len(paragraph.replace(" ", ""))


def write_english(to: Path) -> int:
    """Write JSON lines of `text`, one for each file that has some; return the characters."""
    seen: set[str] = set()
    characters = 0
    to.parent.mkdir(parents=True, exist_ok=True)
    with to.open("w", encoding="utf-8") as lines:
        for root in (sysconfig.get_path("purelib"), sysconfig.get_path("stdlib")):
            for file in sorted(Path(root).rglob("*")):
                if file.suffix not in (".py", *_PAGES) and file.name not in _NAMES:
                    continue
                if not file.is_file():
                    continue
                parts = (p for text in _texts(file) for p in re.split(r"\n\s*\n", text))
                found = [p for p in dict.fromkeys(" ".join(p.split()) for p in parts)]
                found = [p for p in found if p not in seen and _is_prose(p)]
                seen.update(found)
                if found:
                    text = "\n\n".join(found)
                    characters += len(text)
                    lines.write(json.dumps({"text": text}) + "\n")
    return characters


if __name__ == "__main__":
    print(f"{write_english(Path(sys.argv[1])) / 1e6:.1f} MB")

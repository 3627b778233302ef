"""Laws of the repository itself: sizes, imports, files, style."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*ROOT.glob("sae/**/*.py"), ROOT / "train_sae.py"])

# Room -> the rooms that its files may import.
ALLOWED = {
    "flag_checks": set(),
    "config": {"flag_checks"},
    "batch": set(),
    "kernels.cpu": set(),
    "kernels.cuda": set(),
    "kernels": {"config", "flag_checks", "kernels.cpu", "kernels.cuda"},
    "formats": {"config", "flag_checks"},
    "coders": {"config", "flag_checks", "formats", "kernels"},
    "data": {"config", "flag_checks", "batch"},
    "lm": {"config", "flag_checks", "batch"},
    "placement": {"config", "flag_checks", "batch", "data", "lm"},
    "training": {
        *("config", "flag_checks", "batch", "kernels", "kernels.cpu", "coders", "data", "lm"),
        *("formats", "placement"),
    },
    "runs": {
        *("config", "flag_checks", "batch", "formats", "coders", "data", "lm", "placement"),
        "training",
    },
    "judge": {
        *(
            "config",
            "flag_checks",
            "batch",
            "coders",
            "data",
            "lm",
            "placement",
            "training",
            "runs",
        ),
        "formats",
    },
    "share": {"config", "flag_checks", "formats", "coders", "data", "judge", "runs"},
    "__main__": {"flag_checks", "judge", "placement"},
    "__init__": {"config", "flag_checks", "coders"},
}
# Files that must not know of each other: each is tested against the other.
STRANGERS = [("coders/functional.py", "kernels"), ("kernels/twins.py", "coders")]


def room_of(module: str) -> str:
    """The room that a module of the package (named below `sae`) belongs to."""
    parts = module.split(".")
    if parts[:2] in (["kernels", "cpu"], ["kernels", "cuda"]):
        return ".".join(parts[:2])
    return parts[0]


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it, named below `sae`."""
    here = path.relative_to(ROOT / "sae").with_suffix("").parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.removeprefix("sae.") for a in node.names if a.name.startswith("sae.")}
        if isinstance(node, ast.ImportFrom):
            parts = list(here[: len(here) - node.level]) if node.level else []
            names = (node.module or "").split(".") if node.module else []
            if not node.level and names[:1] != ["sae"]:
                continue
            base = [*parts, *(names if node.level else names[1:])]
            for alias in node.names:
                inner = ROOT.joinpath("sae", *base, f"{alias.name}.py").exists()
                inner |= ROOT.joinpath("sae", *base, alias.name).is_dir()
                found.add(".".join([*base, alias.name] if inner else base))
    return found


def test_rooms_import_only_what_is_allowed() -> None:
    """Every import of one room by another is in the table, and the table names every room."""
    rooms = set()
    for path in ROOT.glob("sae/**/*.py"):
        own = ".".join(path.relative_to(ROOT / "sae").with_suffix("").parts)
        room = room_of(own)
        rooms.add(room)
        for module in imports(path):
            other = room_of(module)
            assert other == room or other in ALLOWED[room], f"{own} imports {module}"
    assert rooms == ALLOWED.keys()


def test_imports_of_rooms_have_no_cycle() -> None:
    """The allowed imports only go one way."""
    left = {room: set(others) for room, others in ALLOWED.items()}
    while left:
        free = [room for room, others in left.items() if not others & left.keys()]
        assert free, f"a cycle among {sorted(left)}"
        for room in free:
            del left[room]


def test_definitions_and_kernels_are_strangers() -> None:
    """What is tested against each other does not share code; flags need no torch."""
    for file, room in STRANGERS:
        assert not any(room_of(module) == room for module in imports(ROOT / "sae" / file)), file
    for file in ("config.py", "flag_checks.py"):
        assert "import torch" not in (ROOT / "sae" / file).read_text()


def test_rooms_are_neither_lonely_nor_crowded() -> None:
    """A room has two to twelve files beside its docstring, which says what it may import."""
    folders = [f for f in (ROOT / "sae").rglob("*") if f.is_dir() and f.name != "__pycache__"]
    for folder in folders:
        files = [f for f in folder.iterdir() if f.is_file() and f.name != "__init__.py"]
        files += [f for f in folder.iterdir() if f.is_dir() and f.name != "__pycache__"]
        assert 2 <= len(files) <= 12, folder.name
        said = ast.get_docstring(ast.parse((folder / "__init__.py").read_text())) or ""
        assert "\n" in said and ("mports" in said or "tands on" in said), folder.name
    assert not list((ROOT / "sae").rglob("utils*"))


def test_tests_mirror_the_rooms() -> None:
    """Every room has tests in a folder of its name, and no other folder has, but three."""
    rooms = {f.name for f in (ROOT / "sae").iterdir() if f.is_dir() and f.name != "__pycache__"}
    folders = {f.parent.name for f in (ROOT / "tests").rglob("test_*.py")}
    assert folders == rooms | {"laws", "repository"}


def test_files_stay_readable() -> None:
    """The script has at most 260 lines, and no file more than 400."""
    assert len((ROOT / "train_sae.py").read_text().splitlines()) <= 260
    for path in SOURCES:
        assert len(path.read_text().splitlines()) <= 400, path.name


def test_no_pickle_anywhere() -> None:
    """No source reads or writes a pickle, and none runs code that came with a model.

    The one format that is a pickle is read by its own file alone, and as plain tensors.
    """
    banned = re.compile(
        r"\bpickle\b|torch\.load\b|torch\.save\b|weights_only|trust_remote_code=True"
    )
    for path in SOURCES:
        code = ast.unparse(_without_docstrings(ast.parse(path.read_text())))
        if path.name == "dictionary_learning.py":
            calls = re.findall(r"torch\.load\([^)]*\)", code)
            assert calls == ["torch.load(path, map_location='cpu', weights_only=True)"]
            continue
        assert not banned.search(code), path.name


def test_coders_never_pass_through_accelerate() -> None:
    """prepare() is for a sharded LM alone: it would overwrite one rank's coder by another's."""
    calls = {
        (path.name, node.func.attr)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if node.func.attr in ("prepare", "prepare_model", "save_state", "load_state", "accumulate")
    }
    assert calls == {("launch.py", "prepare")}


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            strings = (ast.Expr,)
            node.body = [
                n
                for n in node.body
                if not (isinstance(n, strings) and isinstance(n.value, ast.Constant))
            ] or [ast.Pass()]
    return tree


def test_public_functions_say_what_they_do() -> None:
    """Every public function, class and method has a docstring and annotations."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name}"
                for item in node.body:
                    if isinstance(item, ast.FunctionDef) and not item.name.startswith("_"):
                        stub = isinstance(item.body[0], ast.Expr) and len(item.body) == 1
                        short = item.name in ("device", "dtype") or stub
                        assert short or ast.get_docstring(item), f"{path.name}: {item.name}"
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                assert node.returns is not None, f"{path.name}: {node.name}"


def test_style() -> None:
    """ruff finds nothing, in rules or in format."""
    for arguments in (["check", "--output-format", "concise"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *arguments, "."],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_requirements_are_bounded_and_reasoned() -> None:
    """Every direct dependency has a bound and a reason above it; torch is pinned."""
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    assert "torch==2.13.0" in lines
    # A reason stands above each line, or above the one before it that it shares it with.
    for paragraph in " ".join(lines).split("#")[1:]:
        named = re.findall(r"(?<= )[\w.]+(?=[=<>])", paragraph)
        assert 1 <= len(named) <= 3, paragraph
    for line in lines:
        assert line.startswith("#") or re.search(r"==\d|>=\d[\d.]*,<\d", line), line
    wanted = [
        "accelerate",
        "deepspeed",
        "transformers",
        "datasets",
        "safetensors",
        "tyro",
        "tensorboard",
        "pytest",
    ]
    assert all(any(line.startswith(name) for line in lines) for name in wanted)


def test_demo_lm_is_small_and_holds_no_pickle() -> None:
    """The demo LM is safetensors of at most 10 MB."""
    files = list((ROOT / "demo/lm").iterdir())
    assert {f.suffix for f in files} == {".json", ".safetensors"}
    assert sum(f.stat().st_size for f in files) < 10 * 2**20

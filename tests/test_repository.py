"""Laws of the repository itself: sizes, imports, files, style."""

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("sae/*.py"), ROOT / "train_sae.py"])

# What each room may import of the others: only what lies below it.
BELOW = {
    "config": set(),
    "functional": {"config"},
    "kernels": {"backend", "config", "selection", "sparse_sums"},
    "backend": {"config", "native"},
    "selection": {"backend", "config", "native"},
    "sparse_sums": {"backend", "native", "triton_kernels"},
    "native": set(),
    "updates": {"backend", "native", "triton_updates"},
    "triton_kernels": set(),
    "triton_updates": {"triton_kernels"},
    "blocks": {"config"},
    "data": {"blocks", "config"},
    "hookpoints": {"config", "linear"},
    "linear": {"backend"},
    "dead_latents": set(),
    "sparse_coder": {"config", "functional", "kernels", "updates"},
    "optim": {"config", "native", "sparse_coder", "updates"},
    "watch": {"config"},
    "ranks": {"blocks", "config", "watch"},
    "exchange": {"config", "hookpoints", "ranks"},
    "launch": {"backend", "config", "hookpoints", "linear", "ranks"},
    "bank": {"config", "functional", "hookpoints", "sparse_coder"},
    "sums": {"bank", "dead_latents", "functional", "sparse_coder"},
    "end_to_end": {"bank", "config", "exchange", "hookpoints", "sums"},
    "predictions": {"blocks", "end_to_end", "ranks", "sparse_coder"},
    "evaluate": {
        *("bank", "blocks", "config", "exchange", "functional", "hookpoints", "optim"),
        *("predictions", "ranks", "run_folder", "sparse_coder", "trained", "watch"),
    },
    "trained": {
        *("bank", "blocks", "config", "data", "exchange", "hookpoints", "launch", "ranks"),
        *("run_folder", "sparse_coder"),
    },
    "contexts": set(),
    "latents": {"contexts", "end_to_end", "sparse_coder"},
    "features": {
        *("compare", "config", "contexts", "evaluate", "hookpoints", "latents", "run_folder"),
        *("trained", "watch"),
    },
    "checkpoint": {
        *("bank", "config", "dead_latents", "evaluate", "exchange", "optim", "ranks"),
        *("run_folder", "sparse_coder"),
    },
    "logs": {*("bad_steps", "config", "evaluate", "exchange", "run_folder", "sums", "watch")},
    "bad_steps": {"config", "ranks"},
    "run_folder": {"config", "ranks"},
    "dry_run": {"bank", "config", "exchange", "hookpoints", "launch", "optim"},
    "compare": {"config", "run_folder", "sparse_coder", "watch"},
    "__init__": {"config", "sparse_coder"},
}


def siblings(path: Path) -> set[str]:
    """Names of the package's own modules that a module imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            found |= {node.module} if node.module else {a.name for a in node.names}
    return found  # type: ignore[return-value]


def test_imports_only_go_down() -> None:
    """Modules import only what lies below them; functional and kernels are strangers."""
    assert {p.stem for p in ROOT.glob("sae/*.py")} == BELOW.keys()
    for path in ROOT.glob("sae/*.py"):
        assert siblings(path) <= BELOW[path.stem], path.name
    assert "import torch" not in (ROOT / "sae/config.py").read_text()


def test_files_stay_readable() -> None:
    """The script is a page of under 300 lines, and no file passes 400."""
    assert len((ROOT / "train_sae.py").read_text().splitlines()) < 300
    for path in SOURCES:
        assert len(path.read_text().splitlines()) <= 400, path.name


def test_no_pickle_anywhere() -> None:
    """No source reads or writes a pickle, and none runs code that came with a model."""
    banned = re.compile(
        r"\bpickle\b|torch\.load\b|torch\.save\b|weights_only|trust_remote_code=True"
    )
    for path in SOURCES:
        code = ast.unparse(_without_docstrings(ast.parse(path.read_text())))
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
    for arguments in (["check"], ["format", "--check"]):
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

"""The project installs as a package: with its C, its page template and its command."""

import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

CHECKS = """
import torch
from pathlib import Path
import sae, train_sae
from sae import Sae, SaeConfig, load_many
from sae.kernels.cpu import compiled
from sae.judge import features

installed = Path(sae.__file__).parent
assert installed.is_relative_to(Path(HOME)), installed
assert Path(train_sae.__file__).is_relative_to(Path(HOME)), train_sae.__file__
Sae(8, SaeConfig(num_latents=16, k=2)).save_to_disk("coders/layers.0")
(coder,) = load_many("coders").values()
assert coder.encode(torch.randn(3, 8)).top_acts.shape == (3, 2)
assert (compiled.library() is None) == (COMPILER is None)
if COMPILER is not None:
    assert list(Path("cache/sae").glob("*.so")), "compiled kernels are kept in the user's cache"
assert not list(installed.rglob("*.so")) and features.page({"a": "<"}).count("a")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the tree as it is."""
    out = tmp_path_factory.mktemp("wheel")
    # Built from a copy, so that the build leaves nothing in the tree.
    copy = out / "tree"
    files = subprocess.run(
        [
            *("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--"),
            *("sae", "train_sae.py", "pyproject.toml", "README.md"),
        ],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, files.split("\0")):
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    done = subprocess.run(
        [*command, "-w", str(out), str(copy)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return next(out.glob("*.whl"))


def test_wheel_holds_what_is_not_python(wheel: Path) -> None:
    """C sources, headers and the page template are in the wheel; tests are not."""
    names = zipfile.ZipFile(wheel).namelist()
    for file in [*ROOT.glob("sae/**/*.c"), *ROOT.glob("sae/**/*.h"), *ROOT.glob("sae/**/*.html")]:
        assert file.relative_to(ROOT).as_posix() in names
    assert "train_sae.py" in names and not any(name.startswith("tests") for name in names)


def test_installed_package_works_from_any_folder(wheel: Path, tmp_path: Path) -> None:
    """A fresh environment loads coders, compiles kernels, and has the command train-sae."""
    home = tmp_path / "environment"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    install = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)]
    done = subprocess.run(install, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    # The dependencies of the environment that runs the tests, behind what was just installed.
    site = Path(subprocess.check_output([python, "-c", SITE], text=True).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    compiler = "import shutil; COMPILER = shutil.which('cc') or shutil.which('gcc')\n"
    code = f"{compiler}HOME = {str(home)!r}\n{CHECKS}"
    environment = {n: v for n, v in os.environ.items() if n != "PYTHONPATH"}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(
        [python, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    for command in (["train-sae", "--help"], ["python", "-m", "sae", "--help"]):
        done = subprocess.run(
            [home / "bin" / command[0], *command[1:]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


SITE = "import sysconfig; print(sysconfig.get_path('purelib'))"


def test_dependencies_are_those_that_were_tried() -> None:
    """What the package requires has the bounds of requirements.txt, torch a wider one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    tried = [
        line.split(";")[0].strip()
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    required = project["dependencies"] + project["optional-dependencies"]["zero3"]
    for requirement in required:
        assert requirement in tried or requirement.startswith("torch>="), requirement


def test_the_torch_for_cuda_is_of_the_pinned_version() -> None:
    """What --fake-cuda installs is the release that everything else was tried with."""
    files = (ROOT / "requirements.txt", ROOT / "tests/requirements-cuda.txt")
    found = [re.findall(r"^torch={2,3}(\S+)$", file.read_text(), re.MULTILINE) for file in files]
    assert found[0] == found[1] and len(found[0]) == 1

"""Tiny language models and texts, made once per test session."""

import datetime
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Read when the libraries are imported: without it an unknown name is retried for a minute.
os.environ["HF_HUB_OFFLINE"] = "1"
# Runs of the tests are so small that threads mostly wait for each other; kernels have several.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Threads that wait give way to the other process of tests.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

if not torch.cuda.is_available() and "--fake-cuda" not in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
elif "--fake-cuda" not in sys.argv:  # runs are tested on the CPU, kernels on the GPU too
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")
from tiny_lms import WITH_HEAD, make_with_head
from transformers import AutoModel, LlamaConfig, PreTrainedModel

ROOT = Path(__file__).parent.parent
FIGURES = pytest.StashKey[list[tuple[str, str]]]()
# What takes long to make: two workers would each make it. Runs of the law tests, kernels for every
# GPU, a run on the demo's text, the package.
MADE_ONCE = {"runs", "found", "demo_run", "wheel"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--faults`: only what is marked so, which takes about an hour."""
    parser.addoption("--faults", action="store_true", help="the long faults, and their figures")
    parser.addoption("--architectures", action="store_true", help="every module of every LM")
    parser.addoption("--formats", action="store_true", help="files opened by other programs")
    parser.addoption("--fake-cuda", action="store_true", help="runs on a GPU that is not there")


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups in a hook of this name, too
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The long tests run only when they are asked for, and then only they and their kind run."""
    config.stash[FIGURES] = []
    kept = []
    for item in items:
        fault = item.path.name in ("test_faults.py", "test_hostile.py", "test_interruptions.py")
        long_fault = item.get_closest_marker("faults") is not None
        architecture = item.get_closest_marker("architectures") is not None
        on_fake_gpu = item.get_closest_marker("fake_cuda") is not None
        by_others = item.get_closest_marker("formats") is not None
        if config.getoption("--faults"):
            wanted = fault
        elif config.getoption("--formats"):
            wanted = by_others
        elif config.getoption("--architectures"):
            wanted = architecture
        elif config.getoption("--fake-cuda"):
            wanted = on_fake_gpu
        else:
            special = long_fault or architecture or on_fake_gpu or by_others
            wanted = not special
        if wanted:
            kept.append(item)
        for name in MADE_ONCE.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group(name))
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """Put a line into the table that is printed at the end."""
    return lambda fault, outcome: request.config.stash[FIGURES].append((fault, outcome))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the table of the long tests, and keep it beside what was not tried this time."""
    figures = config.stash.get(FIGURES, [])
    kinds = [
        kind for kind in ("faults", "architectures", "fake-cuda") if config.getoption(f"--{kind}")
    ]
    if not kinds or not figures:
        return
    width = max(len(fault) for fault, _ in figures)
    for fault, outcome in figures:
        terminalreporter.write_line(f"{fault:{width}}  {outcome}")
    file = ROOT / f"benchmarks/results/{kinds[0]}.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    machine = f"{len(os.sched_getaffinity(0))} CPU cores, torch {torch.__version__}"
    when = f"{datetime.date.today()}, {machine}"
    kept |= {fault: {"outcome": outcome, "measured": when} for fault, outcome in figures}
    file.write_text(json.dumps(kept, indent=2) + "\n")


def tiny_lm() -> PreTrainedModel:
    """A random three-layer Llama with 64 tokens and width 32."""
    torch.manual_seed(0)
    return AutoModel.from_config(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_hidden_layers=3,
            vocab_size=64,
            head_dim=8,
        )
    )


@pytest.fixture(scope="session")
def lm() -> PreTrainedModel:
    return tiny_lm()


@pytest.fixture(scope="session")
def causal_lm() -> PreTrainedModel:
    """A tiny LM with its head."""
    return make_with_head(WITH_HEAD["llama"][0])


@pytest.fixture(scope="session")
def tokens() -> torch.Tensor:
    """200 blocks of 16 token ids."""
    return torch.randint(0, 64, (200, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """Arguments of a TrainConfig for a run of 20 steps on `lm` and `tokens`."""
    return {
        "model": "tiny",
        "save_dir": str(tmp_path / "runs"),
        "ctx_len": 16,
        "batch_size": 8,
        "max_examples": 160,
        "eval_tokens": 256,
        "k": 4,
        "expansion_factor": 4,
        "lr_warmup": 0.25,
        "log_with": "none",
    }


@pytest.fixture
def script() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python train_sae.py` with arguments, from the repository, as a user would."""

    def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "train_sae.py"), *arguments]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)

    return run

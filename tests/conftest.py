"""Tiny language models and texts, made once per test session."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Read when the libraries are imported: without it an unknown name is retried for a minute.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from transformers import AutoModel, LlamaConfig, PreTrainedModel

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


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
        "lr_warmup_steps": 5,
        "log_with": "none",
    }


@pytest.fixture
def script() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python train_sae.py` with arguments, from the repository, as a user would."""

    def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "train_sae.py"), *arguments]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)

    return run

"""Runs of the real script's `train`, and what they leave, for the tests."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from train_sae import TrainConfig, train

Settings = dict[str, Any]


def run(lm: PreTrainedModel, tokens: Tensor, settings: Settings, **flags: Any) -> dict[str, Any]:
    return train(TrainConfig(**{**settings, **flags}), lm=lm, dataset=tokens)


def weights(summary: dict[str, Any], file: str = "sae.safetensors") -> dict[str, Tensor]:
    """Every tensor of one file of every coder of a run."""
    found = {}
    for name, figures in summary["hookpoints"].items():
        for key, tensor in load_file(Path(figures["path"]) / file).items():
            found[f"{name}/{key}"] = tensor
    return found


def training_state(summary: dict[str, Any]) -> dict[str, Tensor]:
    """Every tensor that resuming would start from."""
    return weights(summary, "resume.safetensors")


def assert_identical(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [n for n in a if not torch.equal(a[n], b[n])] == []


LOSSES = {"auxk_alpha": 1 / 32, "dead_feature_threshold": 300, "multi_topk": True}


class Killed(BaseException):
    """Stands for a SIGKILL: nothing catches it."""

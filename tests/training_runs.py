"""Runs of the real script's `train`, and what they leave, for the tests."""

import json
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import PreTrainedModel

from sae.coders.sparse_coder import SparseCoder
from sae.config import TrainingConfig
from sae.flag_checks import from_flags
from sae.lm.capture import Pairs, count_rows
from sae.placement import dealing
from sae.training.optim import CoderOptimizer
from sae.training.schedules import Schedule
from train_sae import TrainConfig, train

Settings = dict[str, Any]


def run(lm: PreTrainedModel, tokens: Tensor, settings: Settings, **flags: Any) -> dict[str, Any]:
    return train(from_flags(TrainConfig, {**settings, **flags}), lm=lm, dataset=tokens)


def first_batches(tokens: Tensor, count: int) -> Tensor:
    """The first `count` blocks that a run with `settings` trains on."""
    generator = torch.Generator().manual_seed(42)
    return tokens[16 + torch.randperm(160, generator=generator)[:count]]


def on_training_forwards(
    monkeypatch: pytest.MonkeyPatch, act: Callable[[int, Pairs], None]
) -> None:
    """Call `act` with the number (from 0) and the rows of every forward that coders train on.

    The rows of these forwards are counted, and of no others (widths, means, evaluation).
    """
    numbers = count()

    def counted(pairs: Pairs) -> dict[str, int]:
        act(next(numbers), pairs)
        return count_rows(pairs)

    monkeypatch.setattr(dealing, "count_rows", counted)


def die_in_forward(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the run die in its training forward of this number (from 0)."""

    def die(forward: int, pairs: Pairs) -> None:
        if forward == number:
            raise Killed

    on_training_forwards(monkeypatch, die)


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) points by name, read back through TensorBoard's own reader."""
    reader = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    return {n: [(e.step, e.value) for e in reader.Scalars(n)] for n in reader.Tags()["scalars"]}


def weights(summary: dict[str, Any], file: str = "sae.safetensors") -> dict[str, Tensor]:
    """Every tensor of one file of every coder of a run."""
    found = {}
    for name, figures in summary["hookpoints"].items():
        for key, tensor in tensors_of(Path(figures["path"]), file).items():
            found[f"{name}/{key}"] = tensor
    return found


def tensors_of(folder: Path, file: str) -> dict[str, Tensor]:
    """The tensors of a file, put together where an index says that they are in pieces."""
    if (folder / file).exists():
        return load_file(folder / file)
    index = json.loads((folder / f"{file}.index.json").read_text())
    names = sorted({name for files in index["weight_map"].values() for name in files})
    opened = {name: load_file(folder / name) for name in names}
    dims, found = index["metadata"]["dims"], {}
    for key, files in index["weight_map"].items():
        pieces = [opened[name][key] for name in files]
        found[key] = torch.cat(pieces, dims[key]) if key in dims else pieces[0]
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


def coder_optimizer(coder: SparseCoder, name: str, steps: int = 10, **flags: Any) -> CoderOptimizer:
    """The optimizer of a coder in a run of `steps` steps."""
    return CoderOptimizer(coder, Schedule(TrainingConfig(optimizer=name, **flags), steps, rows=1))  # type: ignore[arg-type]


class SignDescent(torch.optim.Optimizer):
    """p -= lr sign(g), for schedulefree's wrapper to average."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad.sign())


def killed_and_resumed(
    monkeypatch: pytest.MonkeyPatch,
    lm: PreTrainedModel,
    tokens: Tensor,
    settings: Settings,
    **flags: Any,
) -> dict[str, Any]:
    """The summary of a run that died behind its second checkpoint, and went on from there."""
    flags |= {"run_name": "killed", "save_every": 5}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_in_forward(patch, 13)
        run(lm, tokens, settings, **flags)
    return run(lm, tokens, settings, resume=True, **flags)

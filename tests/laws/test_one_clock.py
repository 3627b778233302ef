"""Law 2: one step is one update of every coder; all else counts steps, or tokens of all forwards.

Schedules are pure functions of the step. Whether a latent is dead depends on tokens alone.
"""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_runs import LOSSES, Settings, run, scalars
from transformers import PreTrainedModel

import train_sae
from sae import SaeConfig, SparseCoder
from sae.coders.firing import FiringRecord, dead_latents
from sae.config import TrainingConfig
from sae.training.optim import CoderOptimizer
from sae.training.schedules import Schedule


def test_learning_rate_is_a_function_of_the_step() -> None:
    """Adam warms up linearly, then falls linearly to 0 at the end; signum stays at its rate."""
    for warmup, decay in ((10, 1.0), (0.1, 90)):
        rates = [rate("adam", s, 100, warmup, decay) for s in range(101)]
        assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0 and rates[100] == 0.0
        assert math.isclose(rates[55], 0.5)
    late = [rate("adam", s, 100, 0.1, 0.2) for s in range(101)]
    assert set(late[9:83]) == {1.0} and late[100] == 0.0 and math.isclose(late[91], 0.5)
    assert {rate("signum", s, 100, 10, 1.0) for s in range(101)} == {1.0}
    assert rate("muon", 0, 100, 0, 1.0) == 1.0


def rate(optimizer: Any, step: int, steps: int, warmup: float, decay: float) -> float:
    cfg = TrainingConfig(optimizer=optimizer, lr_warmup=warmup, lr_decay=decay)
    return Schedule(cfg, steps, 1).lr_scale(step)


def test_k_is_a_function_of_the_step() -> None:
    """k falls linearly from min(L, 10 d) to its value and stays there; the config keeps its k."""
    wide, narrow = (SparseCoder(8, SaeConfig(num_latents=n, k=4)) for n in (1000, 50))
    falling, fixed = (Schedule(TrainingConfig(k_decay_steps=n), 100, 1) for n in (10, 0))
    assert [falling.k(s, wide) for s in (0, 5, 10, 99)] == [80, 42, 4, 4]
    assert falling.k(0, narrow) == 50
    assert fixed.k(0, narrow) == 4
    assert wide.cfg.k == 4


def test_dead_latents_are_counted_in_tokens() -> None:
    """A latent is dead after more than `threshold` tokens of silence, in steps of any size."""
    record = FiringRecord(4, threshold=2)
    record.add_step_(torch.tensor([2, 0, 1, 0]), 3)
    assert record.since_fired.tolist() == [0, 3, 0, 3]
    assert record.dead_mask().tolist() == [False, True, False, True]
    record.threshold = 3
    assert not record.dead_mask().any()
    record.threshold = 10_000
    assert record.dead_share() == 0.5  # a short run: never fired so far
    record.add_step_(torch.tensor([0, 0, 0, 1]), 5)
    assert record.tokens == 8
    assert record.since_fired.tolist() == [5, 8, 5, 0]
    record.threshold = 5
    assert record.dead_share() == 0.75
    torch.testing.assert_close(
        record.frequencies(), torch.log10(torch.tensor([2 / 8, 1 / 8, 1 / 8], dtype=torch.float64))
    )


@pytest.mark.parametrize(
    "shape",
    [
        {"batch_size": 8},
        {"batch_size": 2, "grad_acc_steps": 4},
        {"batch_size": 4, "grad_acc_steps": 2, "micro_acc_steps": 3},
    ],
    ids=["whole", "accumulated", "micro"],
)
def test_everything_in_a_run_counts_the_same_steps(
    lm: PreTrainedModel,
    tokens: Tensor,
    settings: Settings,
    shape: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Updates, rates, k, tokens and dead latents of a run follow from its steps alone."""
    updates: dict[int, list[int]] = {}
    fired: dict[int, list[tuple[Tensor, int]]] = {}
    dead: list[dict[str, Tensor | None]] = []
    update, add_step_ = CoderOptimizer.step, FiringRecord.add_step_

    def counted_update(self: CoderOptimizer, step: int, *args: Any) -> None:
        updates.setdefault(id(self), []).append(step)
        update(self, step, *args)

    def counted_add_step_(self: FiringRecord, counts: Tensor, rows: int, *known: Any) -> None:
        fired.setdefault(id(self), []).append((counts.clone(), rows))
        add_step_(self, counts, rows, *known)

    def noted_dead_latents(records: dict[str, FiringRecord]) -> dict[str, Tensor | None]:
        dead.append(dead_latents(records))
        return dead[-1]

    monkeypatch.setattr(CoderOptimizer, "step", counted_update)
    monkeypatch.setattr(FiringRecord, "add_step_", counted_add_step_)
    monkeypatch.setattr(train_sae, "dead_latents", noted_dead_latents)
    flags = {**LOSSES, "optimizer": "adam", "lr": 0.01, "k_decay_steps": 10, "layers": (0, 2)}
    flags |= {"log_with": "tensorboard", **shape}
    run(lm, tokens, settings, run_name="r", **flags)

    assert list(updates.values()) == [list(range(20))] * 2
    assert [[rows for _, rows in steps] for steps in fired.values()] == [[128] * 20] * 2
    logged = scalars(Path(settings["save_dir"]) / "r")
    coder = SparseCoder(32, SaeConfig(expansion_factor=4, k=4))
    falling = Schedule(TrainingConfig(k_decay_steps=10), 20, 1)
    expected = {
        "lr/layers.0": [0.01 * rate("adam", step, 20, 5, 0.2) for step in range(20)],
        "k/layers.2": [falling.k(step, coder) for step in range(20)],
        "tokens": [128 * (step + 1) for step in range(20)],
    }
    for name, values in expected.items():
        assert logged[name] == [(i + 1, pytest.approx(value)) for i, value in enumerate(values)]

    silent = [torch.zeros(128, dtype=torch.int64) for _ in fired]
    revived = 0
    for step, found in enumerate(dead):
        for since, (counts, rows), known in zip(
            silent, (steps[step] for steps in fired.values()), found.values(), strict=True
        ):
            numbers = (since > LOSSES["dead_feature_threshold"]).nonzero().squeeze(1)
            assert numbers.tolist() == ([] if known is None else known.tolist()), step
            since += rows
            revived += int((counts[numbers] > 0).sum())
            since[counts > 0] = 0
    assert len(dead) == 20 and revived > 0

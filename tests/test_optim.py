"""Optimizers and schedules equal what their sources say."""

import math

import pytest
import schedulefree
import torch

from sae import SaeConfig, SparseCoder, TranscoderConfig
from sae.dead_latents import FiringRecord
from sae.optim import (
    CoderOptimizer,
    ScheduleFreeSignum,
    default_lr,
    finish_gradients_,
    k_at,
    lr_scale,
)


class SignDescent(torch.optim.Optimizer):
    """p -= lr sign(g), for schedulefree's wrapper to average."""

    def __init__(self, params, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad.sign(), alpha=group["lr"])


def test_signum_is_schedulefree_sign_descent() -> None:
    """Ours and schedulefree's wrapper around sign descent pass through the same points y and x."""
    start = torch.randn(300, 7, dtype=torch.float64)
    ours, theirs = start.clone().requires_grad_(), start.clone().requires_grad_()
    mine = ScheduleFreeSignum([ours], lr=0.01)
    wrapped = schedulefree.ScheduleFreeWrapper(SignDescent([theirs], lr=0.01), momentum=0.95)
    wrapped.train()
    for step in range(25):
        for group in (*mine.param_groups, *wrapped.param_groups):
            group["lr"] = 0.01 * min(1, (step + 1) / 10)
        grad = torch.randn(300, 7, dtype=torch.float64)
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        mine.step()
        wrapped.step()
        torch.testing.assert_close(ours, theirs)
    mine.average_()
    wrapped.eval()
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["signum", "adam", "muon"])
def test_trained_coder_is_unit_norm_and_training_point_comes_back(name: str) -> None:
    """Inside trained() W_dec is unit-norm to 1e-5; outside, the point is back, bit for bit."""
    torch.manual_seed(0)
    coder = SparseCoder(16, SaeConfig(num_latents=64, k=4))
    optimizer = CoderOptimizer(coder, name)  # type: ignore[arg-type]
    for step in range(12):
        coder(torch.randn(50, 16)).fvu.backward()
        optimizer.step(step, 100, 3)
    assert coder.W_dec is not None
    before = {n: p.detach().clone() for n, p in coder.named_parameters()}
    with optimizer.trained():
        assert (coder.W_dec.norm(dim=1) - 1).abs().max() < 1e-5
        averaged = not torch.equal(coder.encoder.weight, before["encoder.weight"])
    assert averaged == (name == "signum")
    for n, p in coder.named_parameters():
        assert torch.equal(p, before[n])


def test_muon_updates_matrices_and_adam_the_rest() -> None:
    """muon gives matrices to torch's Muon and biases to Adam, each in a fixed order."""
    coder = SparseCoder(8, TranscoderConfig(num_latents=16, k=2, skip_connection=True))
    optimizer = CoderOptimizer(coder, "muon")
    assert [type(o).__name__ for o in optimizer.optimizers] == ["Muon", "Adam"]
    assert sorted(optimizer.names[0]) == ["W_dec", "W_skip", "encoder.weight"]
    assert sorted(optimizer.names[1]) == ["b_dec", "encoder.bias"]
    assert optimizer.peak_lr == 2e-3


def test_default_learning_rates() -> None:
    """Signum 5e-3 and adam 2e-4 over sqrt(L / 2^14)."""
    assert default_lr("signum", 2**14) == 5e-3
    assert math.isclose(default_lr("adam", 2**16), 1e-4)
    assert default_lr("muon", 2**10) == 2e-3


def test_schedule_is_a_function_of_the_step() -> None:
    """Adam warms up linearly, then falls linearly to 0 at the end; signum stays at its rate."""
    rates = [lr_scale("adam", s, 100, 10) for s in range(101)]
    assert rates[0] == 0.1 and rates[9] == rates[10] == 1.0 and rates[100] == 0.0
    assert math.isclose(rates[55], 0.5)
    assert {lr_scale("signum", s, 100, 10) for s in range(101)} == {1.0}
    assert lr_scale("muon", 0, 100, 0) == 1.0


def test_k_anneals_without_touching_the_config() -> None:
    """k falls linearly from min(L, 10 d) to its value and stays there."""
    wide, narrow = (SparseCoder(8, SaeConfig(num_latents=n, k=4)) for n in (1000, 50))
    assert [k_at(s, 10, wide) for s in (0, 5, 10, 99)] == [80, 42, 4, 4]
    assert k_at(0, 10, narrow) == 50
    assert k_at(0, 0, narrow) == 4
    assert wide.cfg.k == 4


@pytest.mark.parametrize("normalize", [True, False])
def test_gradients_are_scaled_and_lose_what_the_norm_would_undo(normalize: bool) -> None:
    """Gradients are divided by the variance; unit-norm decoders lose the part along a row."""
    coder = SparseCoder(6, SaeConfig(num_latents=20, k=3, normalize_decoder=normalize))
    coder(torch.randn(30, 6), total_variance=1.0).fvu.backward()
    assert coder.W_dec is not None
    raw = {n: p.grad.clone() for n, p in coder.named_parameters()}  # type: ignore[union-attr]
    norm = finish_gradients_(coder, torch.tensor(4.0, dtype=torch.float64))
    grads = {n: p.grad for n, p in coder.named_parameters()}
    torch.testing.assert_close(grads["encoder.weight"], raw["encoder.weight"] / 4)
    along = (raw["W_dec"] * coder.W_dec).sum(1, keepdim=True) * coder.W_dec if normalize else 0
    torch.testing.assert_close(grads["W_dec"], (raw["W_dec"] - along) / 4)
    square = sum(g.square().sum() for g in grads.values())  # type: ignore[union-attr]
    torch.testing.assert_close(norm, torch.as_tensor(square).sqrt())


@pytest.mark.parametrize("name", ["signum", "adam", "muon"])
def test_optimizer_state_survives_a_round_trip(name: str) -> None:
    """A coder and optimizer restored from their tensors continue bit for bit."""
    torch.manual_seed(0)
    first = SparseCoder(8, SaeConfig(num_latents=32, k=3))
    a = CoderOptimizer(first, name)  # type: ignore[arg-type]
    batches = [torch.randn(20, 8) for _ in range(10)]

    def go(coder: SparseCoder, optimizer: CoderOptimizer, steps: range) -> None:
        for step in steps:
            coder(batches[step]).fvu.backward()
            optimizer.step(step, 10, 2)

    go(first, a, range(5))
    second = SparseCoder(8, SaeConfig(num_latents=32, k=3))
    b = CoderOptimizer(second, name)  # type: ignore[arg-type]
    b.load_state_tensors({n: t.clone() for n, t in a.state_tensors().items()})
    go(first, a, range(5, 10))
    go(second, b, range(5, 10))
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


def test_firing_counts_active_latents_over_tokens() -> None:
    """Only activations above 0 count; the clock is tokens and ticks once per step."""
    record = FiringRecord(4, threshold=2)
    record.observe(torch.tensor([[1.0, 0.0], [2.0, 0.5]]), torch.tensor([[0, 1], [0, 2]]))
    record.observe(torch.tensor([[0.0, 0.0]]), torch.tensor([[1, 3]]))
    assert record.end_step(3) == 1.0  # 3 active in 3 rows
    assert record.since_fired.tolist() == [0, 3, 0, 3]
    assert record.dead_mask().tolist() == [False, True, False, True]
    record.threshold = 3
    assert not record.dead_mask().any()
    record.threshold = 10_000
    assert record.dead_share() == 0.5  # a short run: never fired so far
    record.observe(torch.tensor([[1.0]]), torch.tensor([[3]]))
    record.end_step(5)
    assert record.since_fired.tolist() == [5, 8, 5, 0]
    record.threshold = 5
    assert record.dead_share() == 0.75
    torch.testing.assert_close(
        record.frequencies(), torch.log10(torch.tensor([2 / 8, 1 / 8, 1 / 8], dtype=torch.float64))
    )

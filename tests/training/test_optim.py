"""Optimizers equal what their sources say; a trained coder is what they average."""

import math
import re
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
from ranks_in_threads import Alike
from torch.profiler import ProfilerActivity, profile
from training_runs import SignDescent, coder_optimizer

from sae import SaeConfig, SparseCoder, TrainingConfig, TranscoderConfig, UsageError
from sae.coders.firing import FiringRecord
from sae.coders.moments import Moments, Scale
from sae.coders.sharded import ShardedCoder
from sae.config import OptimizerName
from sae.flag_checks import from_flags
from sae.training.losses import divide_gradients_, wake_dead_
from sae.training.optim import CoderOptimizer, state_bytes, update_bytes
from sae.training.optimizers.signum import ScheduleFreeSignum
from sae.training.optimizers.soap import Soap
from sae.training.schedules import Schedule, dealing
from train_sae import TrainConfig


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


@pytest.mark.parametrize("name", ["signum", "adam", "muon", "soap"])
def test_trained_coder_is_unit_norm_and_training_point_comes_back(name: str) -> None:
    """Inside trained() W_dec is unit-norm to 1e-5; outside, the point is back, bit for bit."""
    torch.manual_seed(0)
    coder = SparseCoder(16, SaeConfig(num_latents=64, k=4))
    optimizer = coder_optimizer(coder, name, 100)
    for step in range(12):
        coder(torch.randn(50, 16)).fvu.backward()
        optimizer.step(step)
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
    optimizer = coder_optimizer(coder, "muon")
    assert [type(o).__name__ for o in optimizer.optimizers] == ["Muon", "Adam"]
    assert sorted(optimizer.names[0]) == ["W_dec", "W_skip", "encoder.weight"]
    assert sorted(optimizer.names[1]) == ["b_dec", "encoder.bias"]
    assert optimizer.peak_lr == 2e-2


def test_soap_is_adam_in_the_eigenbasis_of_the_columns() -> None:
    """30 steps equal the equations, whatever signs eigenvectors have; biases get adam."""
    torch.manual_seed(0)
    W = torch.randn(40, 6, dtype=torch.float64)
    ours = torch.nn.Parameter(W.clone())
    optimizer = Soap([{"params": [ours]}], lr=0.01, betas=(0.8, 0.95))
    C = Q = m = v = torch.zeros(0)
    for t in range(30):
        sizes = torch.tensor([9.0, 5, 3, 2, 1, 0.1])  # which change their order
        G = torch.randn(40, 6, dtype=torch.float64) * (sizes if t < 8 else sizes.flip(0))
        ours.grad = G.clone()
        optimizer.step()
        if t == 0:
            C, m, v = 0.05 * G.T @ G, torch.zeros_like(G), torch.zeros_like(G)
            Q = torch.linalg.eigh(G.T @ G).eigenvectors
            continue
        m = 0.8 * m + 0.2 * G
        v = 0.95 * v + 0.05 * (G @ Q) ** 2
        W -= 0.01 * ((m @ Q / (1 - 0.8**t)) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)) @ Q.T
        C = 0.95 * C + 0.05 * G.T @ G
        torch.testing.assert_close(ours.detach(), W)
        if t % 10 == 0:
            order = (Q.T @ C @ Q).diagonal().argsort(descending=True)
            Q, v = torch.linalg.qr(C @ Q[:, order]).Q, v[:, order]
    coder = SparseCoder(8, SaeConfig(num_latents=32, k=3))
    made = coder_optimizer(coder, "soap")
    assert [type(o).__name__ for o in made.optimizers] == ["Soap", "Adam"]
    assert [*map(sorted, made.names)] == [["W_dec", "encoder.weight"], ["b_dec", "encoder.bias"]]
    for step in range(2):
        coder(torch.randn(20, 8)).fvu.backward()
        made.step(step)
    held = sum(t.nbytes for n, t in made.state_tensors().items() if n.startswith("state."))
    assert held == pytest.approx(state_bytes(coder, "soap"), abs=64)  # steps are counted, too


@pytest.mark.parametrize("name", ["signum", "adam", "muon", "soap"])
@pytest.mark.parametrize("shared", [False, True])
def test_what_an_update_holds_is_counted(name: OptimizerName, shared: bool) -> None:
    """The peak beside weights, gradients and state, of a whole coder and of a quarter."""
    cfg, largest = SaeConfig(num_latents=8192, k=2), 4 * 8192 * 64 // (4 if shared else 1)
    coder = ShardedCoder(Alike(4), 64, cfg) if shared else SparseCoder(64, cfg)
    rule = coder_optimizer(coder, name)
    held = 0
    for step in range(3):
        for p in coder.parameters():
            p.grad = torch.randn_like(p)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            divide_gradients_(coder, torch.tensor(1.0))
            rule.step(step)
        events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
        changes = [e.nbytes() for e in sorted(events, key=lambda event: event.start_ns())]
        held = max(accumulate(changes))  # the first step makes the state
    assert held <= update_bytes(coder, name) + 0.15 * largest
    assert held >= 0.8 * update_bytes(coder, name)


def test_short_runs_take_steps_of_fewer_rows() -> None:
    """Below 500 steps of 4,096 rows there are twice as many steps, where their number is free."""

    def steps(in_run: int | None, sequences: int = 256, **flags: Any) -> int:
        cfg = from_flags(TrainConfig, {"model": "m", "dataset": "d", **flags})
        return dealing(cfg, sequences, 256, in_run).steps

    assert (steps(8000), steps(7999), steps(None)) == (16, 32, 16)
    assert (steps(8000, 16), steps(7999, 16), steps(7999, 8), steps(7999, 4)) == (1, 2, 1, 1)
    assert steps(7999, steps_per_batch=4) == 4
    assert steps(7999, activation="batchtopk", group_sequences=2) == 16
    assert steps(7999, loss_fn="ce") == 1


def test_the_default_recipe_is_the_one_that_was_measured() -> None:
    """What docs/recipes.md says of a run without flags is what it does."""
    cfg, told = TrainingConfig(), Path(__file__).parents[2] / "docs/recipes.md"
    rows = re.findall(r"^\| (`--.*?`) \| (.*?) \|", told.read_text(), flags=re.MULTILINE)
    said = dict(
        rows[: rows.index(("`--rms_units`", "on: the scale of activations changes nothing"))]
    )
    betas = f"{cfg.adam_beta1}, {cfg.adam_beta2}"
    assert said["`--optimizer`"] == f"`{cfg.optimizer}`" and cfg.rms_units
    assert said["`--adam_beta1`, `--adam_beta2`"] == betas == "0.8, 0.95"
    assert said["`--lr_warmup`, `--lr_decay`"].startswith(f"{cfg.lr_warmup}, {cfg.lr_decay}:")
    assert said["`--auxk_alpha`"] == f"{cfg.auxk_alpha:g}" == "1"
    assert said["`--wake_alpha`"].startswith(f"{cfg.wake_alpha:g}:")
    assert said["`--dead_feature_threshold`"].startswith(f"{cfg.dead_feature_threshold}:")
    assert cfg.encoder_lr is None and said["`--encoder_lr`"].startswith("0.5:")


def test_default_learning_rates() -> None:
    """By latents and steps as docs/recipes.md says; a rate that is given is taken."""
    for optimizer in ("adam", "soap"):
        cfg = TrainingConfig(optimizer=optimizer)
        of_transcoders = Schedule(cfg, 700, 1).peak_lr(12288, transcode=True)
        assert of_transcoders == pytest.approx(4.04e-3, rel=2e-3)
        for latents, steps, expected in (
            *((3072, 700, 1.16e-2), (12288, 700, 5.05e-3), (2**14, 2800, 2.125e-3)),
            *((3072, 100, 1.2e-2), (2**20, 70000, 3.51e-5)),
        ):
            assert Schedule(cfg, steps, 1).peak_lr(latents) == pytest.approx(expected, rel=2e-3)
    assert Schedule(TrainingConfig(optimizer="signum"), 9, 1).peak_lr(2**14) == 5e-3
    assert math.isclose(Schedule(TrainingConfig(optimizer="signum"), 9, 1).peak_lr(2**16), 2.5e-3)
    assert Schedule(TrainingConfig(lr=0.5), 9, 1).peak_lr(7) == 0.5


@pytest.mark.parametrize("normalize", [True, False])
def test_gradients_are_divided_and_lose_the_part_along_unit_rows(normalize: bool) -> None:
    """Gradients are divided by the variance; unit-norm decoders lose the part along a row."""
    coder = SparseCoder(6, SaeConfig(num_latents=20, k=3, normalize_decoder=normalize))
    coder(torch.randn(30, 6), total_variance=1.0).fvu.backward()
    assert coder.W_dec is not None
    raw = {n: p.grad.clone() for n, p in coder.named_parameters()}  # type: ignore[union-attr]
    norm = divide_gradients_(coder, torch.tensor(4.0, dtype=torch.float64))
    grads = {n: p.grad for n, p in coder.named_parameters()}
    torch.testing.assert_close(grads["encoder.weight"], raw["encoder.weight"] / 4)
    along = (raw["W_dec"] * coder.W_dec).sum(1, keepdim=True) * coder.W_dec if normalize else 0
    torch.testing.assert_close(grads["W_dec"], (raw["W_dec"] - along) / 4)
    square = sum(g.square().sum() for g in grads.values())  # type: ignore[union-attr]
    torch.testing.assert_close(norm, torch.as_tensor(square).sqrt())


@pytest.mark.parametrize("transcode", [False, True])
def test_dead_latents_get_the_gradient_of_their_pre_activations(transcode: bool) -> None:
    """wake_dead_ adds what autograd finds for -wake_alpha (k / L) rms(y) sum of pre_acts.

    The rows may come in pieces; a coder that has not read any is left alone.
    """
    cfg = (TranscoderConfig if transcode else SaeConfig)(num_latents=20, k=3)
    coder = SparseCoder(6, cfg).requires_grad_(True)
    with torch.no_grad():
        coder.b_dec.normal_()
    coder.scale = Scale(0.5, 4.0)
    rows, dead = torch.randn(30, 6) + 2, torch.tensor([2, 3, 19])
    W, b = (
        p.detach().double().requires_grad_() for p in (coder.encoder.weight, coder.encoder.bias)
    )
    read = rows.double() - (0 if transcode else coder.b_dec.detach().double())
    term = -0.7 * 3 / 20 * 4.0 * (read @ W[dead].T + b[dead]).sum()
    expected = torch.autograd.grad(term, [W, b])
    start = [torch.randn(20, 6), torch.randn(20)]
    coder.encoder.weight.grad, coder.encoder.bias.grad = (t.clone() for t in start)
    wake_dead_(coder, None, Moments.of(rows), 0.7)
    wake_dead_(coder, dead, None, 0.7)
    wake_dead_(coder, dead, Moments.of(rows[:11]) + Moments.of(rows[11:]), 0.7)
    for p, before, more in zip(coder.encoder.parameters(), start, expected, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, before + more.float())


def test_a_warm_up_that_the_run_does_not_outlast_is_refused() -> None:
    """Where an optimizer warms up, both numbers are named; a longer run comes to its peak."""
    for name in ("adam", "muon"):
        for total in (3, 1000):
            message = f"--lr_warmup 1000: the run has {total} steps, .*--optimizer {name}"
            with pytest.raises(UsageError, match=message):
                Schedule(TrainingConfig(optimizer=name, lr_warmup=1000), total, 1).check()
            with pytest.raises(UsageError, match="--lr_warmup"):
                Schedule(TrainingConfig(optimizer=name, lr_warmup=total), total, 1).check()
            Schedule(TrainingConfig(optimizer=name), total, 1).check()
        schedule = Schedule(TrainingConfig(optimizer=name, lr_warmup=1000), 1001, 1)
        schedule.check()
        assert max(map(schedule.lr_scale, range(1001))) == 1
        with pytest.raises(UsageError, match="--lr_decay 90: after .* 80 steps"):
            Schedule(TrainingConfig(optimizer=name, lr_warmup=20, lr_decay=90), 100, 1).check()
    Schedule(TrainingConfig(optimizer="signum", lr_warmup=9), 3, 1).check()


@pytest.mark.parametrize("name", ["signum", "adam", "muon", "soap"])
def test_optimizer_state_survives_a_round_trip(name: str) -> None:
    """A coder and optimizer restored from their tensors continue bit for bit."""
    torch.manual_seed(0)
    first = SparseCoder(8, SaeConfig(num_latents=32, k=3))
    a = coder_optimizer(first, name)
    batches = [torch.randn(20, 8) for _ in range(10)]

    def go(coder: SparseCoder, optimizer: CoderOptimizer, steps: range) -> None:
        for step in steps:
            coder(batches[step]).fvu.backward()
            optimizer.step(step)

    go(first, a, range(5))
    second = SparseCoder(8, SaeConfig(num_latents=32, k=3))
    b = coder_optimizer(second, name)
    b.load_state_tensors({n: t.clone() for n, t in a.state_tensors().items()})
    go(first, a, range(5, 10))
    go(second, b, range(5, 10))
    for p, q in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_resumed_run_keeps_its_rates_and_silence_when_the_rules_change() -> None:
    """Rates and the dead threshold come from the checkpoint; one that has none takes the rules."""
    coder = SparseCoder(8, SaeConfig(num_latents=32, k=3))
    then = Schedule(TrainingConfig(lr=0.02, encoder_lr=0.9, dead_feature_threshold=200), 100, 64)
    now = Schedule(TrainingConfig(lr_warmup=0), 100, 64)
    began = CoderOptimizer(coder, then), FiringRecord.of(coder, then.dead_threshold(coder))
    coder(torch.randn(20, 8)).fvu.backward()
    began[0].step(0)
    tensors = {**began[0].state_tensors(), **began[1].state_tensors()}

    def resumed(tensors: dict[str, torch.Tensor]) -> tuple[float, float, int]:
        coder = SparseCoder(8, SaeConfig(num_latents=32, k=3))
        optimizer, firing = CoderOptimizer(coder, now), FiringRecord.of(coder, 7)
        optimizer.load_state_tensors(tensors)
        firing.load_state_tensors(tensors)
        coder(torch.randn(20, 8)).fvu.backward()
        optimizer.step(1)
        (of_encoder,) = [
            group["lr"] / coder.unit("encoder.weight")
            for name, group in zip(
                optimizer.names[0], optimizer.optimizers[0].param_groups, strict=True
            )
            if name == "encoder.weight"
        ]
        return optimizer.lr, of_encoder, firing.threshold

    assert resumed(tensors) == (0.02, pytest.approx(0.9 * 0.02), 200)
    older = {n: t for n, t in tensors.items() if n not in ("rates", "firing.threshold")}
    rule = now.peak_lr(32)
    assert resumed(older) == (rule, pytest.approx(0.5 * rule), 7)


def test_the_silence_of_a_dead_latent_is_a_share_of_the_run_within_bounds() -> None:
    """150 L / k tokens at least, in which a latent fires 150 times on average, and 10 million."""
    coder = SparseCoder(6, SaeConfig(num_latents=3072, k=32))
    for steps, tokens in {700: 14_400, 7000: 0.005 * 7000 * 4096, 10**6: 10_000_000}.items():
        assert Schedule(TrainingConfig(), steps, 4096).dead_threshold(coder) == tokens
    given = TrainingConfig(dead_feature_threshold=200)
    assert Schedule(given, 700, 4096).dead_threshold(coder) == 200
    wider = SparseCoder(6, SaeConfig(num_latents=6144, k=32))
    assert Schedule(TrainingConfig(), 700, 4096).dead_threshold(wider) == 2 * 14_400

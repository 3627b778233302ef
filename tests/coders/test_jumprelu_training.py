"""JumpReLU in training: gradients of thresholds, the penalty on L0, and runs in any pieces.

The right values are computed from the paper's equations in float64.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from training_runs import (
    Killed,
    Settings,
    assert_identical,
    die_in_forward,
    run,
    training_state,
    weights,
)
from transformers import PreTrainedModel

from sae import SaeConfig, SparseCoder, TranscoderConfig
from sae.coders import functional
from sae.coders.bank import CoderBank
from sae.coders.families import jumprelu
from sae.coders.moments import Moments, Scale
from sae.config import KernelChoice, Widths
from sae.kernels import selection
from sae.kernels.twins import Kernels
from sae.training.losses import divide_gradients_
from sae.training.step_sums import StepSums

FLAGS = {"activation": "jumprelu", "optimizer": "adam", "lr": 0.01, "layers": (0, 2)}
FLAGS |= {"auxk_alpha": 1 / 32, "dead_feature_threshold": 300}


def ramp(pre_acts: Tensor, threshold: Tensor, width: float) -> Tensor:
    """The step function 1[pre_acts > threshold] smoothed by a rectangle."""
    return ((pre_acts - threshold) / width + 0.5).clamp(0, 1)


def of_loss(values: Tensor, slopes: Tensor) -> Tensor:
    """Values whose gradients are those of `slopes`."""
    return values.detach() + slopes - slopes.detach()


def jumped(pre_acts: Tensor, threshold: Tensor, width: float, most: int) -> Tensor:
    """acts = h 1[h > threshold], of a row the `most` farthest above; gradients as of the ramp."""
    above = pre_acts - threshold
    kept = torch.zeros_like(above)
    for n, row in enumerate(above.tolist()):
        order = sorted(range(len(row)), key=lambda j, row=row: (-row[j], j))
        kept[n, order[:most]] = 1
    jumps = threshold.detach() * ramp(pre_acts.detach(), threshold, width)
    active = ((above > 0) & (pre_acts > 0)).to(pre_acts.dtype)
    return (of_loss(pre_acts * active, pre_acts * active) + jumps - jumps.detach()) * kept


@pytest.mark.parametrize("choice", ["torch", "auto"])
@pytest.mark.parametrize(("n", "most"), [(37, 70), (37, 12), (37, 1), (0, 5)])
def test_gradients_equal_those_of_the_smoothed_definition(
    n: int, most: int, choice: KernelChoice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Definition and twin: outputs, all gradients, and how many rows are near each threshold."""
    monkeypatch.setattr(selection, "_CHUNK_ROWS", 10)
    g = torch.Generator().manual_seed(0)
    sizes = [(n, 9), (70, 9), (70,), (70, 9), (9,)]
    leaves = [torch.randn(s, dtype=torch.float64, generator=g) for s in sizes]
    leaves.append(torch.rand(70, dtype=torch.float64, generator=g).mul(2).round(decimals=1))
    weights_of_out = torch.arange(n * 9, dtype=torch.float64).view(n, 9).cos()
    width = 0.8
    x, W_enc, b_enc, W_dec, bias, threshold = moved = [t.clone().requires_grad_() for t in leaves]
    pre_acts = (x - bias) @ W_enc.T + b_enc
    acts = jumped(pre_acts, threshold, width, most)
    ((acts @ W_dec * weights_of_out).sum() + acts.square().sum()).backward()
    near = ((pre_acts - threshold).abs() < width / 2).sum(0)
    expected = [(acts @ W_dec).detach(), *(t.grad for t in moved)]
    assert n == 0 or (near > 0).sum() > 30
    dtype = torch.float64 if choice == "torch" else torch.float32
    for ops in (functional, Kernels(choice)):
        moved = [t.to(dtype, copy=True).requires_grad_() for t in leaves]
        x, W_enc, b_enc, W_dec, bias, threshold = moved
        found, _, counts = ops.encode_jumping(x, W_enc, b_enc, threshold, width, most, bias)
        out = ops.decode(found, W_dec)
        ((out * weights_of_out).sum() + found.acts.square().sum()).backward()
        assert counts.tolist() == near.tolist()
        close = 1e-9 if dtype == torch.float64 else 2e-4
        for ours, right in zip([out.detach(), *(t.grad for t in moved)], expected, strict=True):
            assert ours is not None and right is not None
            scale = float(right.abs().max()) if right.numel() else 1.0
            torch.testing.assert_close(ours.double(), right, rtol=close, atol=close * scale)


def test_the_penalty_has_the_gradient_of_a_smoothed_l0() -> None:
    """(L0 / k - 1)^2, at the L0 that is, with the slope of the ramp: by autograd in float64."""
    g = torch.Generator().manual_seed(0)
    pre_acts = torch.randn(50, 20, dtype=torch.float64, generator=g)
    threshold = torch.rand(20, dtype=torch.float64, generator=g).requires_grad_()
    active = (pre_acts > threshold).double()
    l0 = of_loss(active, ramp(pre_acts, threshold, 0.3)).sum() / 50
    (l0 / 3 - 1).square().backward()
    near = ((pre_acts - threshold).abs() < 0.15).sum(0)
    found = functional.l0_gradient(near, active.sum(0).long(), 50, 3, 0.3)
    assert threshold.grad is not None and l0 > 4
    torch.testing.assert_close(found.double(), threshold.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("made", [SaeConfig, TranscoderConfig])
def test_ten_steps_equal_the_equations(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten steps of Adam with AuxK, unit-norm decoders and the penalty, on data of another scale."""
    monkeypatch.setattr(jumprelu, "_BANDWIDTH", 0.1)
    torch.manual_seed(0)
    cfg = made(num_latents=40, k=2, activation="jumprelu")
    bank = CoderBank({"h": Widths(7, 7)}, cfg, (0,), "cpu", kernels=Kernels("torch"))
    coder = bank["h"].double()
    coder.scale = Scale(3.0, 3.0)
    assert coder.W_dec is not None
    coder.W_dec.data.copy_(torch.randn(40, 7))
    coder.normalize_decoder_()
    coder.family.start_(coder)
    width = 0.1 * 7**0.5 * 3
    theirs = {n: p.detach().clone().requires_grad_() for n, p in coder.named_parameters()}
    ours = torch.optim.Adam(coder.parameters(), lr=0.05)
    right = torch.optim.Adam(theirs.values(), lr=0.05)
    dead, before = torch.arange(0, 40, 3), coder.threshold.detach().clone()
    for _ in range(10):
        x = torch.randn(30, 7, dtype=torch.float64) @ torch.randn(7, 7, dtype=torch.float64)
        variance = (x - x.mean(0)).square().sum()
        ours.zero_grad()
        sums = StepSums(bank)
        sums.add_rows("h", x, x)
        for rows in x.split(11):
            found = coder.errors(rows, rows, dead)
            (found.squared_error + found.auxk_error / 32).backward()
            sums.add("h", found)
        sums.add_penalty_("h", coder, {"h": 30}, 2)
        divide_gradients_(coder, sums.variance("h"))
        ours.step()
        coder.normalize_decoder_()
        coder.family.update_threshold_(coder, sums.levels["h"])

        right.zero_grad()
        W_enc, b_enc, W_dec, b_dec, threshold = (
            theirs[n] for n in ("encoder.weight", "encoder.bias", "W_dec", "b_dec", "threshold")
        )
        pre_acts = (x if cfg.transcode else x - b_dec) @ W_enc.T + b_enc
        acts = jumped(pre_acts, threshold, width, 16)
        out = acts @ W_dec + b_dec
        of_dead = pre_acts[:, dead].relu()
        third = of_dead.topk(3, dim=1).values[:, -1:]  # k_aux = 7 // 2
        e_hat = (of_dead * (of_dead >= third)) @ W_dec[dead]
        aux = ((x - out).detach() - e_hat).square().sum()
        l0 = of_loss((acts > 0).double(), ramp(pre_acts.detach(), threshold, width)).sum() / 30
        penalty = (l0 / 2 - 1).square()
        (((x - out).square().sum() + aux / 32) / variance + penalty).backward()
        with torch.no_grad():
            assert W_dec.grad is not None
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
            for name in ("encoder.bias", "b_dec", "threshold"):
                gradient = theirs[name].grad
                assert gradient is not None
                gradient *= 3  # its unit
        right.step()
        with torch.no_grad():
            W_dec /= W_dec.norm(dim=1, keepdim=True)
            threshold.clamp_(min=0)
    for name, parameter in coder.named_parameters():
        torch.testing.assert_close(parameter, theirs[name], rtol=1e-5, atol=1e-7)
    assert (coder.threshold - before).abs().max() > 0.2


def test_thresholds_start_where_k_latents_are_active() -> None:
    """On normal rows mean L0 is k at the start, at every scale, also of transcoders."""
    g = torch.Generator().manual_seed(0)
    for made in (SaeConfig, TranscoderConfig):
        cfg = made(num_latents=512, k=16, activation="jumprelu")
        bank = CoderBank({"h": Widths(64, 64)}, cfg, (0,), "cpu")
        x = 50 * torch.randn(2000, 64, generator=g) + 7
        y = x if made is SaeConfig else 1e-3 * torch.randn(2000, 64, generator=g)
        bank.center_({"h": Moments.of(x)}, {"h": Moments.of(y)}, rms_units=True)
        active = (bank["h"].encode(x).top_acts > 0).sum(1).double().mean()
        assert active == pytest.approx(16, rel=0.05)


def test_a_row_has_no_more_than_eight_k_in_training() -> None:
    """Where thresholds are too low the memory of a step is bounded; in use nothing is left out."""
    coder = SparseCoder(8, SaeConfig(num_latents=128, k=2, activation="jumprelu"))
    coder.threshold.data.zero_()
    x = torch.randn(50, 8)
    with torch.no_grad():
        whole = coder.errors(x, x)
    found = coder.errors(x, x)
    for errors, most in ((whole, 128), (found, 16)):
        assert errors.row_starts is not None
        lengths = errors.row_starts.diff()
        assert lengths.max() == most if most == 16 else lengths.max() > 50
    assert found.levels is not None and found.levels.sum() > 0
    assert ((coder(x).top_acts > 0).sum(1) == whole.row_starts.diff()).all()


def test_steps_in_pieces_equal_whole_ones(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings
) -> None:
    """Accumulated = micro-batched = whole, thresholds too, with batches dealt to steps."""
    flags = {**FLAGS, "steps_per_batch": 4, "exclude_tokens": (5,), "max_examples": 40}
    whole = weights(run(lm, tokens, settings, run_name="whole", **flags))
    for name, shape in {
        "accumulated": {"batch_size": 2, "grad_acc_steps": 4},
        "micro": {"micro_acc_steps": 3},
    }.items():
        found = weights(run(lm, tokens, settings, run_name=name, **flags, **shape))
        assert "layers.0/threshold" in found
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, whole[key], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("optimizer", ["adam", "signum", "muon"])
def test_a_resumed_run_ends_in_the_same_bits(
    lm: PreTrainedModel,
    tokens: Tensor,
    settings: Settings,
    optimizer: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed in step 13 and resumed from 10, within a batch: weights, thresholds, state by bits."""
    flags = {**FLAGS, "steps_per_batch": 4, "max_examples": 40, "save_every": 5}
    flags["optimizer"] = optimizer
    straight = run(lm, tokens, settings, run_name="a", **flags)
    die_in_forward(monkeypatch, 3 * 4)  # a forward is counted once for each of its steps
    with pytest.raises(Killed):
        run(lm, tokens, settings, run_name="b", **flags)
    monkeypatch.undo()
    resumed = run(lm, tokens, settings, run_name="b", resume=True, **flags)
    assert_identical(weights(resumed), weights(straight))
    assert_identical(training_state(resumed), training_state(straight))


def test_a_run_starts_from_coders_with_thresholds(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings, tmp_path: Path
) -> None:
    """--finetune takes weights and thresholds of another coder of the kind."""
    first = run(lm, tokens, settings, run_name="a", **FLAGS)
    folder = Path(first["hookpoints"]["layers.0"]["path"]).parent
    flags = {**FLAGS, "finetune": str(folder), "lr": 1e-30}
    second = run(lm, tokens, settings, run_name="b", **flags)
    file = Path(second["hookpoints"]["layers.0"]["path"]) / "sae.safetensors"
    for name, tensor in load_file(file).items():
        expected = weights(first)[f"layers.0/{name}"]
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-6)

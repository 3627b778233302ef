"""Latents next to the active ones learn what is left of the target, and change nothing else."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sae import SaeConfig, SparseCoder, SparseCoderConfig, TranscoderConfig, UsageError
from sae.coders.bank import CoderBank
from sae.config import TrainingConfig, Widths
from train_sae import TrainConfig

D, L, K, WEIGHT = 12, 40, 3, 0.3


def by_definition(coder: SparseCoder, x: Tensor, y: Tensor) -> Tensor:
    """The squared error and the loss of the runner-ups, without a kernel."""
    assert coder.W_dec is not None
    inputs = x if coder.cfg.transcode else x - coder.b_dec
    pre_acts = (inputs @ coder.encoder.weight.T + coder.encoder.bias).relu()
    acts, latents = pre_acts.topk(2 * K, dim=1)
    active = torch.zeros_like(pre_acts).scatter(1, latents[:, :K], acts[:, :K])
    missing = y - active @ coder.W_dec - coder.b_dec
    alone = acts[:, K:, None] * coder.W_dec.detach()[latents[:, K:]]
    return missing.square().sum() + WEIGHT * (missing.detach()[:, None] - alone).square().sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    "cfg",
    [
        SaeConfig(num_latents=L, k=K),
        SaeConfig(num_latents=L, k=K, normalize_decoder=False),
        TranscoderConfig(num_latents=L, k=K),
    ],
    ids=["sae", "rows of any length", "transcoder"],
)
def test_each_runner_up_alone_explains_what_is_left(
    cfg: SparseCoderConfig, dtype: torch.dtype
) -> None:
    """Every gradient is that of the definition; the error and the active latents are as without."""
    torch.manual_seed(0)
    coder = SparseCoder(D, cfg, dtype=dtype)
    assert coder.W_dec is not None
    with torch.no_grad():
        for parameter in (coder.W_dec, coder.encoder.bias, coder.b_dec):
            parameter.normal_()
        coder.normalize_decoder_()
    x, y = torch.randn(2, 50, D, dtype=dtype)
    y = y if cfg.transcode else x
    without = coder.errors(x, y)
    coder.runner_ups = WEIGHT
    found = coder.errors(x, y)
    close = {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(found.squared_error, without.squared_error)
    torch.testing.assert_close(found.sae_out, without.sae_out)
    assert (found.top_acts > 0).sum() == (without.top_acts > 0).sum()
    parameters = [p for _, p in coder.named_parameters()]
    ours = torch.autograd.grad(found.objective, parameters)
    expected = torch.autograd.grad(by_definition(coder, x, y), parameters)
    for grad, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(grad, right, **close)


def test_runner_ups_are_of_training_alone(tmp_path: Path) -> None:
    """A coder by itself, and without gradients, gives what one without them gives."""
    cfg, x = SaeConfig(num_latents=L, k=K, runner_ups=WEIGHT), torch.randn(9, D)
    assert SparseCoder(D, cfg)(x).top_acts.shape == (9, K)
    SparseCoder(D, cfg).save_to_disk(tmp_path)
    assert SparseCoder.load_from_disk(tmp_path).cfg == replace(cfg, runner_ups=0.0)
    assert "runner_ups" not in (tmp_path / "cfg.json").read_text()
    coder = CoderBank({"a": Widths(D, D)}, cfg, (0,), "cpu")["a"]
    assert coder.errors(x, x).top_acts.shape == (9, 2 * K)
    with torch.no_grad():
        assert coder.errors(x, x).top_acts.shape == (9, K)
    few = CoderBank({"a": Widths(D, D)}, SaeConfig(num_latents=4, k=K, runner_ups=1), (0,), "cpu")
    few["a"].errors(x, x).objective.backward()


@pytest.mark.parametrize(
    "flags",
    [
        {"activation": "batchtopk"},
        {"activation": "jumprelu"},
        {"activation": "groupmax", "num_latents": L, "k": 4},
        {"multi_topk": True},
        {"matryoshka": (0.5, 0.5)},
        {"transcode": True, "cross_layer": 1},
    ],
)
def test_kinds_without_runner_ups_are_refused(flags: dict) -> None:
    """The line names the flag, its value, and what it does not go with."""
    with pytest.raises(UsageError, match=r"--runner_ups 0.3: does not go with --\w+"):
        TrainConfig(SparseCoderConfig(runner_ups=0.3, **flags), model="m")
    with pytest.raises(UsageError, match="--runner_ups 0.3: is a part of the FVU loss"):
        training = TrainingConfig(loss_fn="kl")
        TrainConfig(SparseCoderConfig(runner_ups=0.3), model="m", training=training)

"""Latents next to the active ones learn what is left of the target, and change nothing else."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from sae import SaeConfig, SparseCoder, SparseCoderConfig, TranscoderConfig, UsageError
from sae.coders import functional
from sae.coders.bank import CoderBank
from sae.coders.own_losses import OwnLosses
from sae.config import KernelChoice, TrainingConfig, Widths
from sae.kernels.twins import Kernels
from sae.training.losses import own_losses
from train_sae import TrainConfig

D, L, K, WEIGHT = 12, 40, 3, 0.3
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
ON_A_GPU = pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])


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


def bank_of(cfg: SparseCoderConfig) -> CoderBank:
    return CoderBank({"a": Widths(D, D)}, cfg, (0,), "cpu", losses=OwnLosses(WEIGHT))


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
    coder.own_losses = OwnLosses(WEIGHT)
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
    cfg, x = SaeConfig(num_latents=L, k=K), torch.randn(9, D)
    coder = bank_of(cfg)["a"]
    assert coder.errors(x, x).top_acts.shape == (9, 2 * K)
    with torch.no_grad():
        assert coder.errors(x, x).top_acts.shape == (9, K)
    coder.save_to_disk(tmp_path)
    assert SparseCoder.load_from_disk(tmp_path)(x).top_acts.shape == (9, K)


def test_there_are_no_more_runner_ups_than_latents() -> None:
    """Where fewer than k are left those are all."""
    x = torch.randn(9, D)
    bank_of(SaeConfig(num_latents=4, k=K))["a"].errors(x, x).objective.backward()


def test_runner_ups_weigh_what_the_flag_says() -> None:
    """By default 0.3 where there are such, and nothing elsewhere."""
    assert own_losses(SaeConfig(), TrainingConfig()).runner_ups == 0.3
    assert own_losses(TranscoderConfig(), TrainingConfig()).runner_ups == 0.3
    assert own_losses(SaeConfig(), TrainingConfig(runner_ups=0)).runner_ups == 0
    assert own_losses(SaeConfig(), TrainingConfig(runner_ups=0.1)).runner_ups == 0.1
    assert own_losses(SaeConfig(), TrainingConfig(loss_fn="ce")).runner_ups == 0


@pytest.mark.parametrize(
    "flags",
    [
        {"activation": "batchtopk"},
        {"activation": "jumprelu"},
        {"activation": "groupmax", "num_latents": L, "k": 4},
        {"multi_topk": True},
        {"matryoshka": (0.5, 0.5)},
        {"cross_layer": 1, "transcode": True},
    ],
)
def test_kinds_without_runner_ups_are_refused(flags: dict) -> None:
    """The line names the flag, its value, and what it does not go with."""
    cfg = SparseCoderConfig(**flags)
    with pytest.raises(
        UsageError, match=rf"--runner_ups 0.3: does not go with --{next(iter(flags))}"
    ):
        TrainConfig(cfg, training=TrainingConfig(runner_ups=0.3))
    assert own_losses(cfg, TrainConfig(cfg).training).runner_ups == 0


def test_an_lms_own_loss_has_no_runner_ups() -> None:
    """They learn from what is left at the hookpoint."""
    with pytest.raises(UsageError, match="--runner_ups 0.3: does not go with --loss_fn kl"):
        TrainConfig(training=TrainingConfig(runner_ups=0.3, loss_fn="kl"))


@pytest.mark.parametrize("device", ["cpu", ON_A_GPU])
@pytest.mark.parametrize("choice", ["native", "torch"])
@pytest.mark.parametrize(("width", "k"), [(1, 1), (6, 3), (64, 32), (130, 65), (128, 1)])
def test_the_active_columns_are_those_of_the_k_largest(
    choice: KernelChoice, width: int, k: int, device: str
) -> None:
    """By every backend, and by the definition."""
    values = torch.rand(37, width, generator=torch.Generator().manual_seed(0)).to(device)
    expected = values.sort(dim=1, descending=True).values[:, :k]
    for kernels in (functional, Kernels(choice)):
        found = values.gather(1, kernels.largest_columns(values, k))
        assert torch.equal(found.sort(dim=1, descending=True).values, expected)

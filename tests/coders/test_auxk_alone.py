"""Dead latents that learn alone: each what it would explain of what is left."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sae import SaeConfig, SparseCoder, SparseCoderConfig, TranscoderConfig
from sae.coders.bank import CoderBank
from sae.coders.moments import Moments
from sae.coders.own_losses import OwnLosses, dead_learn_alone
from sae.config import TrainingConfig, Widths
from sae.training.losses import divide_gradients_, own_losses

D, L, K, DEAD, ALONE = 12, 40, 3, torch.arange(1, 40, 4), OwnLosses(auxk_alone=True)
KINDS: dict[str, SparseCoderConfig] = {
    "sae": SaeConfig(num_latents=L, k=K),
    "rows of any length": SaeConfig(num_latents=L, k=K, normalize_decoder=False),
    "transcoder": TranscoderConfig(num_latents=L, k=K),
    "with a skip connection": TranscoderConfig(num_latents=L, k=K, skip_connection=True),
    "prefixes": SaeConfig(num_latents=L, k=K, matryoshka=(0.25, 0.75)),
    "groups of rows": SaeConfig(num_latents=L, k=K, activation="batchtopk"),
    "thresholds": SaeConfig(num_latents=L, k=K, activation="jumprelu"),
}


def made(cfg: SparseCoderConfig) -> SparseCoder:
    """A coder with weights at random."""
    torch.manual_seed(0)
    bank = CoderBank({"a": Widths(D, D)}, cfg, (0,), "cpu", torch.float64, losses=ALONE).double()
    rows = {"a": Moments.of(torch.randn(50, D, dtype=torch.float64))}
    bank.center_(rows, rows, rms_units=True)
    coder = bank["a"]
    assert coder.W_dec is not None
    with torch.no_grad():
        for parameter in (coder.W_dec, coder.encoder.bias, coder.b_dec):
            parameter.normal_()
        coder.encoder.bias.abs_()
        coder.normalize_decoder_()
    return coder


def by_definition(coder: SparseCoder, x: Tensor, missing: Tensor) -> Tensor:
    """sum ||e - acts_i W_dec_i||^2 over rows and each row's D / 2 largest of the dead."""
    assert coder.W_dec is not None
    inputs = x if coder.cfg.transcode else x - coder.b_dec
    pre_acts = (inputs @ coder.encoder.weight.T + coder.encoder.bias)[:, DEAD]
    acts, places = pre_acts.topk(D // 2, dim=1)
    alone = acts.relu()[:, :, None] * coder.W_dec[DEAD][places]
    return (missing[:, None] - alone).square().sum()


@pytest.mark.parametrize("kind", KINDS)
def test_each_dead_latent_alone_explains_what_is_left(kind: str) -> None:
    """Every gradient is that of the definition, which knows no kernel."""
    coder = made(KINDS[kind])
    x, y = torch.randn(2, 50, D, dtype=torch.float64)
    y = y if coder.cfg.transcode else x
    found: Any = coder.errors(x, y, DEAD, groups=[25, 25])
    parameters = dict(coder.named_parameters())
    expected = by_definition(coder, x, (y - found.sae_out).detach())
    ours = torch.autograd.grad(found.auxk_error, [*parameters.values()], allow_unused=True)
    theirs = torch.autograd.grad(expected, [*parameters.values()], allow_unused=True)
    assert any(grad is not None and grad.abs().max() > 1 for grad in ours)
    for name, grad, right in zip(parameters, ours, theirs, strict=True):
        right = torch.zeros_like(parameters[name]) if right is None else right
        grad = torch.zeros_like(right) if grad is None else grad
        torch.testing.assert_close(grad, right, rtol=1e-9, atol=1e-9, msg=name)


def test_a_latent_alone_learns_as_if_it_were_the_only_dead_one() -> None:
    """More dead latents leave the gradient of the first as it is; together they change it."""
    coder = made(KINDS["sae"])
    x = torch.randn(50, D, dtype=torch.float64)
    found = dict[bool, list[Tensor]]()
    for alone in (False, True):
        coder.own_losses, found[alone] = OwnLosses(auxk_alone=alone), []
        for dead in (DEAD[:1], DEAD[: D // 2]):
            error = coder.errors(x, x, dead).auxk_error * max(1, D // 2 // len(dead))
            error.backward()
            divide_gradients_(coder, torch.tensor(1.0, dtype=torch.float64))
            grad = coder.encoder.weight.grad
            assert grad is not None
            found[alone].append(grad[DEAD[0]])
            coder.zero_grad()
    torch.testing.assert_close(*found[True])
    assert not torch.allclose(*found[False], rtol=0.1)


@pytest.mark.parametrize("latents, expected", [(1535, False), (1536, True)])
def test_where_latents_are_many_they_learn_alone(latents: int, expected: bool) -> None:
    """By default, and of TopK alone: from 512 latents per active one on."""
    by_default = own_losses(SaeConfig(), TrainingConfig())
    for activation, alone in (("topk", expected), ("batchtopk", False)):
        cfg = SaeConfig(num_latents=latents, k=K, activation=activation)
        coder = CoderBank({"a": Widths(D, D)}, cfg, (0,), "cpu", losses=by_default)["a"]
        assert dead_learn_alone(coder) == alone
    for given in (False, True):
        coder.own_losses = own_losses(SaeConfig(), TrainingConfig(auxk_alone=given))
        assert dead_learn_alone(coder) == given
    assert not dead_learn_alone(SparseCoder(D, SaeConfig(num_latents=latents, k=K)))

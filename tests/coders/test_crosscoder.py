"""Crosscoders: one space of latents over several hookpoints.

The right values are computed from the equations in float64, hookpoint by hookpoint.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae import SaeConfig, SparseCoder
from sae.coders.across.crosscoder import part_norms
from sae.coders.bank import CoderBank
from sae.config import Columns, KernelChoice, Widths
from sae.kernels.twins import Kernels
from sae.training.losses import auxiliary_loss, divide_gradients_

PARTS = (Columns("a", 5, 0.3), Columns("b", 3, 20.0), Columns("c", 4, 1.5))
CFG = SaeConfig(num_latents=40, k=3, crosscoder=True, parts=PARTS)
DEAD = torch.arange(0, 40, 3)
ALPHA = 0.3


def rows_of(seed: int) -> list[Tensor]:
    """24 rows of each hookpoint at its own scale, off the origin."""
    g = torch.Generator().manual_seed(seed)
    shared = torch.randn(24, 6, dtype=torch.float64, generator=g)
    maps = [torch.randn(6, part.width, dtype=torch.float64, generator=g) for part in PARTS]
    return [part.rms * (shared @ m + 1) for part, m in zip(PARTS, maps, strict=True)]


def in_training(rows: list[Tensor]) -> Tensor:
    """What the coder is given in training."""
    return torch.cat([x / part.rms for x, part in zip(rows, PARTS, strict=True)], dim=1)


def made(dtype: torch.dtype, choice: KernelChoice) -> SparseCoder:
    """A coder in training with numbers in all parameters."""
    widths = {"crosscoder": Widths(12, 12)}
    coder = CoderBank(widths, CFG, (0,), "cpu", torch.float32)["crosscoder"].to(dtype)
    g = torch.Generator().manual_seed(2)
    for name, parameter in coder.named_parameters():
        if name != "encoder.weight":
            parameter.data += torch.randn(parameter.shape, generator=g).to(dtype) / 4
    coder.normalize_decoder_()
    coder.matmul_dtype = None
    coder.use(Kernels(choice))
    return coder


Weights = dict[str, list[Tensor]]
"""By parameter, of each hookpoint its own; b_enc is shared by all."""


def apart(tensors: dict[str, Tensor]) -> Weights:
    widths = [part.width for part in PARTS]
    found = {
        n: list(tensors[n].split(widths, dim=-1)) for n in ("encoder.weight", "W_dec", "b_dec")
    }
    return found | {"encoder.bias": [tensors["encoder.bias"]]}


def right_losses(p: Weights, rows: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Squared error, AuxK's, and y_hat of each hookpoint, of rows that are of rms 1.

    f = relu(sum_h W_enc^h (x^h - b_dec^h) + b_enc); the k largest f sum_h ||W_dec^h|| stay.
    """
    inputs = zip(rows, p["b_dec"], p["encoder.weight"], strict=True)
    f = sum((x - b) @ W.T for x, b, W in inputs) + p["encoder.bias"][0]
    assert isinstance(f, Tensor)
    norms = sum(W.detach().norm(dim=1) for W in p["W_dec"])
    ranked = f.detach() * norms
    acts = (f * (ranked >= ranked.topk(CFG.k).values[:, -1:])).relu()
    outs = [acts @ W + b for W, b in zip(p["W_dec"], p["b_dec"], strict=True)]
    errors = [(y - out) for y, out in zip(rows, outs, strict=True)]
    of_dead = f[:, DEAD].relu()
    most = of_dead.topk(sum(part.width for part in PARTS) // 2).values[:, -1:]
    of_dead = of_dead * (of_dead >= most)
    left = zip(errors, p["W_dec"], strict=True)
    aux = torch.stack([(e.detach() - of_dead @ W[DEAD]).square().sum() for e, W in left]).sum()
    return torch.stack([e.square().sum() for e in errors]).sum(), aux, outs


@pytest.mark.parametrize(("dtype", "choice"), [(torch.float64, "torch"), (torch.float32, "auto")])
def test_losses_and_gradients_equal_the_equations(dtype: torch.dtype, choice: KernelChoice) -> None:
    """Outputs at every hookpoint, AuxK, and the gradient of every parameter."""
    coder = made(dtype, choice)
    leaves = {n: p.detach().double().requires_grad_() for n, p in coder.named_parameters()}
    scaled = in_training(rows_of(0)).to(dtype)
    error, aux, outs = right_losses(apart(leaves), list(scaled.double().split([5, 3, 4], dim=1)))
    (error + ALPHA * aux).backward()
    found = coder.errors(scaled, scaled, DEAD)
    (found.objective + auxiliary_loss(found, ALPHA)).backward()
    pairs: list[Any] = [(found.sae_out, torch.cat(outs, dim=1)), (found.squared_error, error)]
    pairs += [(found.auxk_error, aux)]
    pairs += [(p.grad, leaves[n].grad) for n, p in coder.named_parameters()]
    close = 1e-9 if dtype == torch.float64 else 2e-4
    for ours, right in pairs:
        scale = float(right.detach().abs().max())
        torch.testing.assert_close(ours.double(), right, rtol=close, atol=close * scale)


def test_ten_steps_equal_the_equations() -> None:
    """Adam on FVU with AuxK; steps keep the sum of decoder norms, so none is spent on it."""
    coder = made(torch.float64, "torch")
    theirs = {n: p.detach().clone().requires_grad_() for n, p in coder.named_parameters()}
    ours = torch.optim.Adam(coder.parameters(), lr=0.01)
    right = torch.optim.Adam(theirs.values(), lr=0.01)
    widths = [part.width for part in PARTS]
    for step in range(10):
        y = in_training(rows_of(step))
        variance = (y - y.mean(0)).square().sum()
        ours.zero_grad()
        found = coder.errors(y, y, DEAD)
        (found.objective + auxiliary_loss(found, ALPHA)).backward()
        divide_gradients_(coder, variance)
        ours.step()
        coder.normalize_decoder_()

        right.zero_grad()
        error, aux, _ = right_losses(apart(theirs), list(y.split(widths, dim=1)))
        ((error + ALPHA * aux) / variance).backward()
        W_dec = theirs["W_dec"]
        assert W_dec.grad is not None
        # The gradient of the sum of norms, by autograd, is the direction that is projected out.
        again = W_dec.detach().clone().requires_grad_()
        torch.stack([W.norm(dim=1) for W in again.split(widths, dim=1)]).sum().backward()
        assert again.grad is not None
        normal = again.grad / again.grad.norm(dim=1, keepdim=True)
        W_dec.grad -= (W_dec.grad * normal).sum(1, keepdim=True) * normal
        right.step()
        with torch.no_grad():
            total = torch.stack([W.norm(dim=1) for W in W_dec.split(widths, dim=1)]).sum(0)
            W_dec *= 3**0.5 / total[:, None]
    for name, parameter in coder.named_parameters():
        torch.testing.assert_close(parameter, theirs[name])
    total = part_norms(coder.W_dec, PARTS).sum(1)  # type: ignore[arg-type]  # it has a decoder
    torch.testing.assert_close(total, torch.full_like(total, 3**0.5))


def test_files_hold_weights_for_plain_rows(tmp_path: Path) -> None:
    """A coder from disk does with rows as the LM has them what training did with divided ones."""
    coder = made(torch.float64, "torch")
    coder.save_to_disk(tmp_path / "crosscoder")
    back = SparseCoder.load_from_disk(tmp_path / "crosscoder")
    assert back.cfg.parts == PARTS and not back.on_scaled_rows
    plain, rms = (
        torch.cat(rows_of(0), dim=1),
        torch.cat([torch.full((p.width,), p.rms) for p in PARTS]),
    )
    expected = coder(in_training(rows_of(0)))
    found = back(plain)
    torch.testing.assert_close(found.sae_out, expected.sae_out * rms)
    assert torch.equal(found.top_indices.sort().values, expected.top_indices.sort().values)
    back.use_scaled_rows_(PARTS)
    torch.testing.assert_close(back(in_training(rows_of(0))).sae_out, expected.sae_out)
    back.save_to_disk(tmp_path / "again")
    again = SparseCoder.load_from_disk(tmp_path / "again")
    torch.testing.assert_close(again(plain).sae_out, found.sae_out)


def test_a_start_from_rows_of_other_scales_is_the_same_function(tmp_path: Path) -> None:
    """--finetune where the first batch has other rms: activations take up what norms lose."""
    coder = made(torch.float32, "torch")
    coder.save_to_disk(tmp_path / "crosscoder")
    plain = SparseCoder.load_from_disk(tmp_path / "crosscoder")
    other = tuple(part._replace(rms=rms) for part, rms in zip(PARTS, (2.0, 5.0, 0.1), strict=True))
    widths, cfg = {"crosscoder": Widths(12, 12)}, replace(CFG, parts=other)
    bank = CoderBank(widths, cfg, (0,), "cpu", torch.float32)
    bank.load_pretrained(str(tmp_path))
    bank.normalize_decoders_()
    rms = torch.cat([torch.full((part.width,), part.rms) for part in other])
    x = torch.cat(rows_of(0), dim=1).float()
    found = bank["crosscoder"](x / rms, k=40).sae_out * rms  # all latents: no selection differs
    torch.testing.assert_close(found, plain(x, k=40).sae_out, rtol=1e-4, atol=1e-4)

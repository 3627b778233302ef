"""A cross-layer transcoder of four layers, its rows, and the right losses and gradients."""

from typing import Any, Literal

import torch
from torch import Tensor

from sae import TranscoderConfig
from sae.coders.bank import CoderBank
from sae.coders.moments import Scale
from sae.config import KernelChoice, Widths
from sae.kernels.twins import Kernels
from sae.training.losses import auxiliary_loss

Ahead = int | Literal["all"]
NAMES = [f"layers.{i}.mlp" for i in range(4)]
SCALES = [Scale(1.0, 0.5), Scale(2.0, 3.0), Scale(0.1, 8.0), Scale(4.0, 0.25)]
DEAD = torch.arange(0, 40, 3)
ALPHA = 0.3


def made(dtype: torch.dtype, choice: KernelChoice, ahead: Ahead, **flags: Any) -> CoderBank:
    """Coders of four layers in training, with numbers in all parameters."""
    cfg = TranscoderConfig(**{"num_latents": 40, "k": 3, "cross_layer": ahead, **flags})
    bank = CoderBank(dict.fromkeys(NAMES, Widths(6, 5)), cfg, (0,), "cpu", torch.float32)
    bank.to(dtype)
    g = torch.Generator().manual_seed(2)
    for (_, coder), scale in zip(bank.items(), SCALES, strict=True):
        for name, parameter in coder.named_parameters():
            if name != "encoder.weight":
                parameter.data += torch.randn(parameter.shape, generator=g).to(dtype) / 4
        coder.scale, coder.matmul_dtype = scale, None
        coder.use(Kernels(choice))
    return bank


def rows_of(seed: int) -> list[tuple[Tensor, Tensor]]:
    """24 rows of every layer, what it reads and what it predicts, each at its own scale."""
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(4, 24, d, dtype=torch.float64, generator=g) + 0.2 for d in (6, 5))
    return [(x[i] * scale.x, y[i] * scale.y) for i, scale in enumerate(SCALES)]


Weights = list[dict[str, Tensor]]
"""The parameters of every layer."""


def leaves(bank: CoderBank) -> Weights:
    return [
        {n: p.detach().double().requires_grad_() for n, p in coder.named_parameters()}
        for _, coder in bank.items()
    ]


def reach(ahead: Ahead) -> int:
    return 3 if ahead == "all" else ahead


def right_losses(
    layers: Weights, rows: list[tuple[Tensor, Tensor]], ahead: Ahead
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Squared errors, AuxK's, and y_hat of every layer: y_hat^t = b^t + sum over s of a^s W^st."""
    inputs = zip(layers, rows, strict=True)
    pre = [x @ p["encoder.weight"].T + p["encoder.bias"] for p, (x, _) in inputs]
    acts = []
    for f in pre:
        acts.append((f * (f >= f.topk(3).values[:, -1:])).relu())
    outs, errors, aux = [], [], []
    for t, (p, (x, y)) in enumerate(zip(layers, rows, strict=True)):
        out = p["b_dec"] + acts[t] @ p["W_dec"]
        if "W_skip" in p:
            out = out + x @ p["W_skip"].T
        for s in range(max(0, t - reach(ahead)), t):
            out = out + acts[s] @ p[f"W_from.{t - s}"]
        of_dead = pre[t][:, DEAD].relu()
        of_dead = of_dead * (of_dead >= of_dead.topk(5 // 2).values[:, -1:])
        outs.append(out)
        errors.append((y - out).square().sum())
        aux.append(((y - out).detach() - of_dead @ p["W_dec"][DEAD]).square().sum())
    return errors, aux, outs


def right_gradients(layers: Weights, rows: list[tuple[Tensor, Tensor]], ahead: Ahead) -> Weights:
    """By layer those of its own error, and of those ahead in units of its variance."""
    errors, aux, _ = right_losses(layers, rows, ahead)
    found = []
    for s, p in enumerate(layers):
        loss = errors[s] + ALPHA * aux[s]
        for t in range(s + 1, min(s + reach(ahead), 3) + 1):
            loss = loss + errors[t] * (SCALES[s].y / SCALES[t].y) ** 2
        grads = torch.autograd.grad(loss, list(p.values()), retain_graph=True)
        found.append(dict(zip(p, grads, strict=True)))
    return found


def take_gradients(bank: CoderBank, rows: list[tuple[Tensor, Tensor]], pieces: int = 1) -> Any:
    """As the loop does: layer by layer, each loss with a backward of its own."""
    results = []
    for (_, coder), (x, y) in zip(bank.items(), rows, strict=True):
        dtype = coder.dtype
        for x_rows, y_rows in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
            found = coder.errors(x_rows.to(dtype), y_rows.to(dtype), DEAD)
            (found.objective + auxiliary_loss(found, ALPHA)).backward()
            results.append((found.squared_error, found.auxk_error, found.sae_out))
    return results

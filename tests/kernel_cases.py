"""Inputs, and what is computed of them, for holding kernels against their definitions."""

from types import ModuleType

import torch
from torch import Tensor

from sae.kernels.twins import Kernels

Functions = ModuleType | Kernels
"""`functional`, or an object with functions of the same names."""

SHAPES = [  # N, D, L, k, activation
    (37, 13, 67, 5, "topk"),
    (5, 8, 16, 16, "topk"),
    (7, 9, 33, 1, "topk"),
    (64, 32, 1031, 7, "topk"),
    (130, 6, 4099, 3, "topk"),
    (33, 8, 64, 8, "groupmax"),
    (9, 5, 12, 12, "groupmax"),
    (1, 3, 4, 2, "topk"),
    (0, 3, 4, 2, "topk"),
]


def leaves(n: int, d: int, latents: int, shift: float = 0.0) -> list[Tensor]:
    """x, W_enc, b_enc, W_dec and pre_bias in float64; `shift` moves the pre-activations."""
    g = torch.Generator().manual_seed(n + 1000 * latents)
    shapes = [(n, d), (latents, d), (latents,), (latents, d), (d,)]
    x, W_enc, b_enc, W_dec, pre_bias = (
        torch.randn(s, dtype=torch.float64, generator=g) for s in shapes
    )
    return [t.requires_grad_() for t in (x, W_enc, b_enc + shift, W_dec, pre_bias)]


def outputs_and_gradients(
    ops: Functions,
    tensors: list[Tensor],
    k: int,
    activation: str,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """The reconstruction, and the gradients of a loss that weighs every output differently."""
    moved = [t.detach().to(device, copy=True).requires_grad_() for t in tensors]
    x, W_enc, b_enc, W_dec, pre_bias = moved
    latents = ops.encode(x, W_enc, b_enc, k, activation, pre_bias)
    out = ops.decode(latents, W_dec)
    weights = torch.arange(out.numel(), dtype=out.dtype, device=device).view_as(out).cos()
    # The square depends on the activations whatever their order within a row.
    ((out * weights).sum() + latents.acts.pow(2).sum()).backward()
    return [out.detach(), *(t.grad for t in moved)]  # type: ignore[misc]  # each has one


def losses_and_gradients(
    ops: Functions,
    tensors: list[Tensor],
    k: int,
    dead: Tensor,
    k_dead: int,
    device: torch.device | str = "cpu",
    offset_by_row: bool = False,
    through_out: bool = False,
    alone: bool = False,
) -> list[Tensor]:
    """sae_out, both errors, and the gradients of their weighted sum.

    `through_out`: a loss of sae_out itself is added, as in end-to-end training. `alone`: of dead
    latents that learn alone.
    """
    moved = [t.detach().to(device, copy=True).requires_grad_() for t in tensors]
    x, W_enc, b_enc, W_dec, pre_bias = moved
    k_dead = min(k_dead, len(dead))
    latents, of_dead = ops.encode_with_dead(
        x, W_enc, b_enc, k, "topk", pre_bias, None, dead, k_dead
    )
    offset = (x * 0.3 + pre_bias) if offset_by_row else pre_bias
    y = (2 * x + 1).detach()
    out, error, dead_error, _ = ops.reconstruct(latents, W_dec, offset, y, of_dead, alone=alone)
    loss = error + dead_error / 32
    if through_out:
        loss = loss + (out * torch.arange(out.numel(), device=device).view_as(out).cos()).sum()
    loss.backward()
    return [out.detach(), error.detach(), dead_error.detach(), *(t.grad for t in moved)]


UPDATED_SHAPES = [s for d in (1, 7, 16, 40, 100) for s in ((9, d), (d,))]


def update_inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """A training point y, its z and a gradient; some zeros, in matrices a whole row of them."""
    g = torch.Generator().manual_seed(sum(shape))
    y, z, grad = (torch.randn(shape, generator=g, dtype=dtype) for _ in range(3))
    grad[..., 0] = 0.0
    y[0] = z[0] = 0.0
    return [y, z, grad]


def updated(
    ops: Functions, tensors: list[Tensor], device: torch.device | str = "cpu"
) -> list[Tensor]:
    """y, z, the gradient and its squared norm after one optimizer step; of a matrix unit rows."""
    y, z, grad = (t.to(device, copy=True) for t in tensors)
    matrix = y.ndim == 2
    if matrix:
        ops.normalize_rows_(y)
    scale = torch.tensor(0.3, dtype=y.dtype, device=device)
    square = ops.scale_and_project_(grad, scale, y if matrix else None)
    ops.signum_step_(y, z, grad, 0.1, 0.95, 0.25, unit_norm=matrix)
    return [y, z, grad, square]

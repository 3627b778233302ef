"""Twins of coders/functional.py, with gradients of their own.

What makes them fast:

- `pre_acts` never exist whole: the backward needs the indices and the values of the active latents
  alone (selection.py).
- The gradient of `top_acts` is a sampled product; N x K x D is never built (sparse_products.py).
- Both weight gradients are sums of rows by latent, over one sort of `top_indices`.
- AuxK's latents come out of the encoder's own product, and their gradients are added to what the
  active latents' sums have written.

Every sum has a fixed order, so a step repeats bit for bit.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..config import Activation, KernelChoice
from . import updates
from .backend import Backend
from .selection import active_latents
from .sparse_products import ByLatent, sampled_product, weighted_rows


class Latents(NamedTuple):
    """Twin of `functional.Latents`."""

    acts: Float[Tensor, "N K"]
    indices: Int[Tensor, "N K"]
    by_latent: ByLatent | None = None
    """The entries sorted by latent, which the gradients of encoder and decoder share."""


class Kernels:
    """The functions of `functional` as they run in training, all by one backend."""

    Latents = Latents

    def __init__(self, choice: KernelChoice = "auto") -> None:
        self.backend = Backend(choice)

    def describe(self, device: torch.device) -> str:
        """What runs on the device, in words. Raises UsageError where the choice cannot be had."""
        return self.backend.describe(device)

    def encode(
        self,
        x: Float[Tensor, "N D"],
        W_enc: Float[Tensor, "L D"],
        b_enc: Float[Tensor, " L"],
        k: int,
        activation: Activation = "topk",
        pre_bias: Float[Tensor, " D"] | None = None,
        matmul_dtype: torch.dtype | None = None,
    ) -> Latents:
        """Twin of `functional.encode`."""
        arguments = (x, W_enc, b_enc, k, activation, pre_bias, matmul_dtype, None, 0)
        return Latents(*_apply(_Encode, self.backend, *arguments))

    def encode_with_dead(
        self,
        x: Float[Tensor, "N D"],
        W_enc: Float[Tensor, "L D"],
        b_enc: Float[Tensor, " L"],
        k: int,
        activation: Activation,
        pre_bias: Float[Tensor, " D"] | None,
        matmul_dtype: torch.dtype | None,
        dead: Int[Tensor, " M"],
        k_dead: int,
    ) -> tuple[Latents, Latents]:
        """Twin of `functional.encode_with_dead`: of one product both selections."""
        arguments = (x, W_enc, b_enc, k, activation, pre_bias, matmul_dtype, dead, k_dead)
        found = _apply(_Encode, self.backend, *arguments)
        return Latents(*found[:3]), Latents(*found[3:])

    def decode(self, latents: Latents, W_dec: Float[Tensor, "L D"]) -> Float[Tensor, "N D"]:
        """Twin of `functional.decode`."""
        return _apply(_Decode, self.backend, W_dec, *latents)[0]

    def decode_with_dead(
        self, latents: Latents, dead_latents: Latents, W_dec: Float[Tensor, "L D"]
    ) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N D"]]:
        """Twin of `functional.decode_with_dead`: both share the gradient of W_dec."""
        return _apply(_Decode, self.backend, W_dec, *latents, *dead_latents)

    def squared_error(
        self, y: Float[Tensor, "N D"], y_hat: Float[Tensor, "N D"]
    ) -> Float[Tensor, ""]:
        """Twin of `functional.squared_error`; the gradient is of y_hat alone."""
        return _apply(_SquaredError, y, y_hat)

    def scale_and_project_(
        self, grad: Tensor, scale: Tensor, unit_rows: Tensor | None = None
    ) -> Tensor:
        """Twin of `functional.scale_and_project_`."""
        return updates.scale_and_project_(self.backend, grad, scale, unit_rows)

    def signum_step_(
        self,
        y: Tensor,
        z: Tensor,
        grad: Tensor,
        lr: float,
        beta: float,
        c: float,
        unit_norm: bool = False,
    ) -> None:
        """Twin of `functional.signum_step_`."""
        updates.signum_step_(self.backend, y, z, grad, lr, beta, c, unit_norm)

    def normalize_rows_(self, rows: Float[Tensor, "R D"]) -> None:
        """Twin of `functional.normalize_rows_`."""
        updates.normalize_rows_(self.backend, rows)


def _apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    return function.apply(*arguments)  # untyped


class _Encode(torch.autograd.Function):
    """Rows to (top_acts, top_indices, their order by latent), and the same of dead latents."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: Backend,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        k: int,
        activation: Activation,
        pre_bias: Tensor | None,
        matmul_dtype: torch.dtype | None,
        dead: Tensor | None,
        k_dead: int,
    ) -> tuple[Tensor | ByLatent, ...]:
        inputs = (x if pre_bias is None else x - pre_bias).to(matmul_dtype or W_enc.dtype)
        inputs = inputs.contiguous()
        widths = (k,) if dead is None else (k, k_dead)
        tops, indices = active_latents(backend, inputs, W_enc, b_enc, activation, widths, dead)
        ctx.save_for_backward(inputs, W_enc, *tops)
        ctx.backend = backend
        ctx.orders = [ByLatent(backend, i, len(W_enc)) for i in indices]
        ctx.mark_non_differentiable(*indices)
        ctx.set_materialize_grads(False)
        return tuple(t for found in zip(tops, indices, ctx.orders, strict=True) for t in found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, W_enc, *tops = ctx.saved_tensors
        _, grad_x, grad_W, grad_b, _, _, grad_bias, *_ = ctx.needs_input_grad
        d_x = d_W = d_latents = None
        for top_acts, by_latent, grad_acts in zip(tops, ctx.orders, grads[::3], strict=True):
            if grad_acts is None:
                continue
            grad = torch.where(top_acts > 0, grad_acts, 0).to(W_enc.dtype)
            sorted_grad = by_latent.sort(grad)
            if grad_b or grad_bias:
                d_latents = _add(d_latents, by_latent.sum(sorted_grad))
            if grad_x:
                d_x = _add(d_x, weighted_rows(ctx.backend, grad, by_latent.indices, W_enc))
            if grad_W:
                d_W = by_latent.sum_rows(sorted_grad, inputs, add_to=d_W)
        # Gao et al., appendix D: sum the latents' gradients over rows, then multiply once.
        d_bias = -(d_latents @ W_enc) if d_latents is not None and grad_bias else None
        d_b = d_latents if grad_b else None
        return None, d_x, d_W, d_b, None, None, d_bias, None, None, None


def _add(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.add_(more)


class _Decode(torch.autograd.Function):
    """One or two `Latents`, of as many rows, to a reconstruction each."""

    @staticmethod
    def forward(ctx: Any, backend: Backend, W_dec: Tensor, *latents: Any) -> tuple[Tensor, ...]:
        acts, indices, orders = latents[::3], latents[1::3], latents[2::3]
        ctx.backend = backend
        ctx.orders = [
            order or ByLatent(backend, i, len(W_dec))
            for i, order in zip(indices, orders, strict=True)
        ]
        ctx.save_for_backward(W_dec, *acts)
        ctx.set_materialize_grads(False)
        for i in indices:  # PyTorch's operators check what they index
            if backend.in_c(W_dec, *acts) and not _within(i, len(W_dec)):
                raise IndexError(f"top_indices must be at least 0 and below {len(W_dec)}")
        pairs = zip(acts, indices, strict=True)
        return tuple(weighted_rows(backend, a, i, W_dec) for a, i in pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        W_dec, *acts = ctx.saved_tensors
        d_W, d_latents = None, list[Tensor | None]()
        for i, (top_acts, by_latent, grad) in enumerate(zip(acts, ctx.orders, grads, strict=True)):
            d_acts = None
            if grad is not None and ctx.needs_input_grad[2 + 3 * i]:
                d_acts = sampled_product(ctx.backend, grad, W_dec, by_latent.indices)
            if grad is not None and ctx.needs_input_grad[1]:
                d_W = by_latent.sum_rows(by_latent.sort(top_acts), grad.contiguous(), add_to=d_W)
            d_latents += [d_acts, None, None]
        return None, d_W, *d_latents


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, y_hat: Tensor) -> Tensor:
        difference = (y_hat - y).flatten()
        ctx.save_for_backward(difference)
        ctx.shape = y_hat.shape
        return torch.dot(difference, difference)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (difference,) = ctx.saved_tensors
        return None, difference.mul_(2 * grad).view(ctx.shape)  # its last use


def _within(indices: Tensor, limit: int) -> bool:
    return not indices.numel() or bool(indices.min() >= 0 and indices.max() < limit)

"""Fast twins of what functional.py defines: same signatures, numbers and gradients.

What makes them fast:

- `pre_acts` never exist whole: the backward needs the indices and the values of the active latents
  alone (selection.py).
- The gradient of `top_acts` is a sampled product; N x K x D is never built (sparse_sums.py).
- Both weight gradients are sums of rows by latent, over one sort of `top_indices`.
- AuxK's latents come out of the encoder's own product, and their gradients are added to what the
  active latents' sums have written.

Every sum has a fixed order, so a step repeats bit for bit.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from .backend import in_c
from .config import Activation
from .selection import active_latents
from .sparse_sums import ByLatent, sampled_product, weighted_rows


def encode(
    x: Float[Tensor, "N D"],
    W_enc: Float[Tensor, "L D"],
    b_enc: Float[Tensor, " L"],
    k: int,
    activation: Activation = "topk",
    pre_bias: Float[Tensor, " D"] | None = None,
    matmul_dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, "N K"], Int[Tensor, "N K"]]:
    """Twin of `functional.encode`."""
    found = _Encode.apply(x, W_enc, b_enc, k, activation, pre_bias, matmul_dtype, None, 0)
    return found[:2]  # type: ignore[index]  # apply() is untyped


def encode_with_dead(
    x: Float[Tensor, "N D"],
    W_enc: Float[Tensor, "L D"],
    b_enc: Float[Tensor, " L"],
    k: int,
    activation: Activation,
    pre_bias: Float[Tensor, " D"] | None,
    matmul_dtype: torch.dtype | None,
    dead: Int[Tensor, " M"],
    k_dead: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Twin of `functional.encode_with_dead`: of one product both selections."""
    return _Encode.apply(  # type: ignore[return-value]  # apply() is untyped
        x, W_enc, b_enc, k, activation, pre_bias, matmul_dtype, dead, k_dead
    )


def decode(
    top_acts: Float[Tensor, "N K"], top_indices: Int[Tensor, "N K"], W_dec: Float[Tensor, "L D"]
) -> Float[Tensor, "N D"]:
    """Twin of `functional.decode`."""
    return _Decode.apply(W_dec, top_acts, top_indices)[0]  # type: ignore[index]  # as above


def decode_with_dead(
    top_acts: Float[Tensor, "N K"],
    top_indices: Int[Tensor, "N K"],
    W_dec: Float[Tensor, "L D"],
    dead_acts: Float[Tensor, "N M"],
    dead_indices: Int[Tensor, "N M"],
) -> tuple[Float[Tensor, "N D"], Float[Tensor, "N D"]]:
    """Twin of `functional.decode_with_dead`: both share the gradient of W_dec."""
    return _Decode.apply(  # type: ignore[return-value]  # as above
        W_dec, top_acts, top_indices, dead_acts, dead_indices
    )


def squared_error(y: Float[Tensor, "N D"], y_hat: Float[Tensor, "N D"]) -> Float[Tensor, ""]:
    """Twin of `functional.squared_error`; the gradient is of y_hat alone."""
    return _SquaredError.apply(y, y_hat)  # type: ignore[return-value]  # as above


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        k: int,
        activation: Activation,
        pre_bias: Tensor | None,
        matmul_dtype: torch.dtype | None,
        dead: Tensor | None,
        k_dead: int,
    ) -> tuple[Tensor, ...]:
        inputs = (x if pre_bias is None else x - pre_bias).to(matmul_dtype or W_enc.dtype)
        inputs = inputs.contiguous()
        widths = (k,) if dead is None else (k, k_dead)
        tops, indices = active_latents(inputs, W_enc, b_enc, activation, widths, dead)
        ctx.save_for_backward(inputs, W_enc, *tops)
        ctx.indices = indices
        ctx.mark_non_differentiable(*indices)
        ctx.set_materialize_grads(False)
        return tuple(t for pair in zip(tops, indices, strict=True) for t in pair)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, W_enc, *tops = ctx.saved_tensors
        grad_x, grad_W, grad_b, _, _, grad_bias, *_ = ctx.needs_input_grad
        d_x = d_W = d_latents = None
        for top_acts, indices, grad_acts in zip(tops, ctx.indices, grads[::2], strict=True):
            if grad_acts is None:
                continue
            grad = torch.where(top_acts > 0, grad_acts, 0).to(W_enc.dtype)
            by_latent = ByLatent.of(indices, len(W_enc))
            sorted_grad = by_latent.sort(grad)
            if grad_b or grad_bias:
                d_latents = _add(d_latents, by_latent.sum(sorted_grad))
            if grad_x:
                d_x = _add(d_x, weighted_rows(grad, indices, W_enc))
            if grad_W:
                d_W = by_latent.sum_rows(sorted_grad, inputs, add_to=d_W)
        # Gao et al., appendix D: sum the latents' gradients over rows, then multiply once.
        d_bias = -(d_latents @ W_enc) if d_latents is not None and grad_bias else None
        return d_x, d_W, d_latents if grad_b else None, None, None, d_bias, None, None, None


def _add(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.add_(more)


class _Decode(torch.autograd.Function):
    """One or two sets of (top_acts, top_indices), of as many rows, to a reconstruction each."""

    @staticmethod
    def forward(ctx: Any, W_dec: Tensor, *latents: Tensor) -> tuple[Tensor, ...]:
        acts, ctx.indices = latents[::2], latents[1::2]
        ctx.save_for_backward(W_dec, *acts)
        ctx.set_materialize_grads(False)
        for indices in ctx.indices:  # PyTorch's operators check what they index
            if in_c(W_dec, *acts) and not _within(indices, len(W_dec)):
                raise IndexError(f"top_indices must be at least 0 and below {len(W_dec)}")
        pairs = zip(acts, ctx.indices, strict=True)
        return tuple(weighted_rows(a, indices, W_dec) for a, indices in pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        W_dec, *acts = ctx.saved_tensors
        d_W, d_latents = None, list[Tensor | None]()
        for i, (top_acts, indices, grad) in enumerate(zip(acts, ctx.indices, grads, strict=True)):
            d_acts = None
            if grad is not None and ctx.needs_input_grad[1 + 2 * i]:
                d_acts = sampled_product(grad, W_dec, indices)
            if grad is not None and ctx.needs_input_grad[0]:
                by_latent = ByLatent.of(indices, len(W_dec))
                d_W = by_latent.sum_rows(by_latent.sort(top_acts), grad.contiguous(), add_to=d_W)
            d_latents += [d_acts, None]
        return d_W, *d_latents


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

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

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..config import Activation, KernelChoice
from . import updates
from .auxk import AuxK
from .backend import Backend
from .dense_products import AllOf, Linear
from .entries import Around
from .latents import Latents, above, around, in_groups, largest
from .prefixes import ReconstructPrefixes
from .selection import largest_columns
from .sparse_products import ByLatent, reconstruct


class Reconstruction(NamedTuple):
    """Twin of `functional.Reconstruction`."""

    sae_out: Float[Tensor, "N D"]
    squared_error: Float[Tensor, ""]
    dead_error: Float[Tensor, ""] | None
    prefix_errors: Float[Tensor, " M"] | None = None


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
        select = partial(largest, self.backend, activation, (k,), None)
        (found,) = self._active(select, x, W_enc, b_enc, pre_bias, matmul_dtype)
        return found

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
        select = partial(largest, self.backend, activation, (k, k_dead), dead)
        found, of_dead = self._active(select, x, W_enc, b_enc, pre_bias, matmul_dtype)
        return found, of_dead

    def encode_above(
        self,
        x: Float[Tensor, "N D"],
        W_enc: Float[Tensor, "L D"],
        b_enc: Float[Tensor, " L"],
        threshold: Float[Tensor, " L"],
        pre_bias: Float[Tensor, " D"] | None = None,
        matmul_dtype: torch.dtype | None = None,
    ) -> Latents:
        """Twin of `functional.encode_above`, in `Entries`."""
        select = partial(above, self.backend, threshold)
        (found,) = self._active(select, x, W_enc, b_enc, pre_bias, matmul_dtype)
        return found

    def encode_in_groups(
        self,
        x: Float[Tensor, "N D"],
        W_enc: Float[Tensor, "L D"],
        b_enc: Float[Tensor, " L"],
        k: int,
        groups: list[int],
        pre_bias: Float[Tensor, " D"] | None = None,
        matmul_dtype: torch.dtype | None = None,
        dead: Int[Tensor, " M"] | None = None,
        k_dead: int = 0,
    ) -> tuple[Latents, Latents | None]:
        """Twin of `functional.encode_in_groups`, in `Entries`; of one product both selections."""
        select = partial(in_groups, self.backend, k, groups, dead, k_dead)
        found, *of_dead = self._active(select, x, W_enc, b_enc, pre_bias, matmul_dtype)
        return found, next(iter(of_dead), None)

    def encode_jumping(
        self,
        x: Float[Tensor, "N D"],
        W_enc: Float[Tensor, "L D"],
        b_enc: Float[Tensor, " L"],
        threshold: Float[Tensor, " L"],
        bandwidth: float,
        most: int,
        pre_bias: Float[Tensor, " D"] | None = None,
        matmul_dtype: torch.dtype | None = None,
        dead: Int[Tensor, " M"] | None = None,
        k_dead: int = 0,
    ) -> tuple[Latents, Latents | None, Int[Tensor, " L"]]:
        """Twin of `functional.encode_jumping`, in `Around`; those of the dead by their product."""
        where = (threshold.detach(), bandwidth, most)
        select = partial(around, self.backend, where, dead, k_dead)
        found, *of_dead = self._active(select, x, W_enc, b_enc, pre_bias, matmul_dtype)
        acts = _apply(_Jump, found.acts, threshold, found.by_latent, bandwidth)
        assert isinstance(found.by_latent, Around)
        return found._replace(acts=acts), next(iter(of_dead), None), found.by_latent.counts

    @staticmethod
    def _active(
        select: Callable[[Tensor, Tensor, Tensor], list[Latents]], *arguments: Tensor | Any
    ) -> list[Latents]:
        """Those selected, with a gradient."""
        found = _apply(_Encode, select, *arguments)
        return [Latents(*found[i : i + 3]) for i in range(0, len(found), 3)]

    def largest_columns(self, values: Float[Tensor, "N W"], k: int) -> Int[Tensor, "N K"]:
        """Twin of `functional.largest_columns`."""
        return largest_columns(self.backend, values, k)

    def decode(self, latents: Latents, W_dec: Float[Tensor, "L D"]) -> Float[Tensor, "N D"]:
        """Twin of `functional.decode`."""
        return _apply(_Decode, self.backend, W_dec, *latents)

    def reconstruct(
        self,
        latents: Latents,
        W_dec: Float[Tensor, "L D"],
        offset: Float[Tensor, "*N D"],
        y: Float[Tensor, "N D"],
        dead_latents: Latents | None = None,
        prefixes: tuple[int, ...] = (),
        alone: bool = False,
    ) -> Reconstruction:
        """Twin of `functional.reconstruct`: both share the gradient of W_dec."""
        arguments: tuple[Any, ...] = (W_dec, offset, y.detach(), *latents, *(dead_latents or ()))
        if prefixes:
            found = _apply(ReconstructPrefixes, self.backend, alone, prefixes, *arguments)
            return Reconstruction(found[0], found[1], (*found, None)[3], found[2])
        found = _apply(_Reconstruct, self.backend, alone, *arguments)
        return Reconstruction(found[0], found[1], found[2] if dead_latents else None)

    def linear(
        self,
        x: Float[Tensor, "N D"],
        W: Float[Tensor, "D_out D"],
        matmul_dtype: torch.dtype | None = None,
    ) -> Float[Tensor, "N D_out"]:
        """Twin of `functional.linear`; the factors are in `matmul_dtype` on CUDA alone."""
        if matmul_dtype in (None, x.dtype) or not x.is_cuda:
            return x @ W.mT
        return _apply(Linear, x, W, matmul_dtype)

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
    """Rows to (top_acts, top_indices, their order by latent) of each of the selected latents."""

    @staticmethod
    def forward(
        ctx: Any,
        select: Callable[[Tensor, Tensor, Tensor], list[Latents]],
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        pre_bias: Tensor | None,
        matmul_dtype: torch.dtype | None,
    ) -> tuple[Tensor | ByLatent | AllOf | None, ...]:
        inputs = (x if pre_bias is None else x - pre_bias).to(matmul_dtype or W_enc.dtype)
        inputs = inputs.contiguous()
        found = select(inputs, W_enc, b_enc)
        ctx.save_for_backward(inputs, W_enc, *(latents.acts for latents in found))
        ctx.orders = [latents.by_latent for latents in found]
        ctx.mark_non_differentiable(*(latents.indices for latents in found))
        ctx.set_materialize_grads(False)
        return tuple(part for latents in found for part in latents)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs, W_enc, *tops = ctx.saved_tensors
        _, grad_x, grad_W, grad_b, grad_bias, _ = ctx.needs_input_grad
        d_x = d_W = d_latents = None
        for top_acts, by_latent, grad_acts in zip(tops, ctx.orders, grads[::3], strict=True):
            if grad_acts is None:
                continue
            grad = torch.where(top_acts > 0, grad_acts, 0).to(top_acts.dtype)
            sorted_grad = by_latent.sort(grad)
            if grad_b or grad_bias:
                d_latents = _add(d_latents, by_latent.sum(sorted_grad))
            if grad_x:
                d_x = _add(d_x, by_latent.weighted_rows(grad, W_enc))
            if grad_W:
                d_W = by_latent.sum_rows(sorted_grad, inputs, add_to=d_W)
        # Gao et al., appendix D: sum the latents' gradients over rows, then multiply once.
        d_bias = -(d_latents @ W_enc) if d_latents is not None and grad_bias else None
        d_b = d_latents if grad_b else None
        return None, d_x, d_W, d_b, d_bias, None


class _Jump(torch.autograd.Function):
    """Activations as they are; their gradient goes on to the thresholds that they are near."""

    @staticmethod
    def forward(
        ctx: Any, acts: Tensor, threshold: Tensor, order: Around, bandwidth: float
    ) -> Tensor:
        ctx.save_for_backward(threshold)
        ctx.order, ctx.bandwidth = order, bandwidth
        return acts.view_as(acts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (threshold,) = ctx.saved_tensors
        near = torch.where(ctx.order.near, grad, 0).to(grad.dtype)
        total = ctx.order.sum(ctx.order.sort(near))
        return grad, (threshold / -ctx.bandwidth * total).to(threshold.dtype), None, None


def _add(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.add_(more)


class _Decode(torch.autograd.Function):
    """`Latents` to what they add up to."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: Backend,
        W_dec: Tensor,
        acts: Tensor,
        indices: Tensor,
        order: ByLatent | None,
    ) -> Tensor:
        # PyTorch's operators check what they index.
        if backend.in_c(W_dec, acts) and not _within(indices, len(W_dec)):
            raise IndexError(f"top_indices must be at least 0 and below {len(W_dec)}")
        ctx.order = order or ByLatent(backend, indices, len(W_dec))
        ctx.save_for_backward(W_dec, acts)
        return ctx.order.weighted_rows(acts, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        W_dec, acts = ctx.saved_tensors
        d_W = d_acts = None
        if ctx.needs_input_grad[2]:
            d_acts = ctx.order.sampled_product(grad, W_dec)
        if ctx.needs_input_grad[1]:
            d_W = ctx.order.sum_rows(ctx.order.sort(acts), grad.contiguous())
        return None, d_W, d_acts, None, None


class _Reconstruct(torch.autograd.Function):
    """One or two `Latents`, of as many rows, to sae_out and the errors of each."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: Backend,
        alone: bool,
        W_dec: Tensor,
        offset: Tensor,
        y: Tensor,
        acts: Tensor,
        indices: Tensor,
        order: ByLatent | None,
        dead_acts: Tensor | None = None,
        dead_indices: Tensor | None = None,
        dead_order: ByLatent | AllOf | None = None,
    ) -> tuple[Tensor, ...]:
        ctx.order, ctx.auxk = order or ByLatent(backend, indices, len(W_dec)), None
        found = reconstruct(ctx.order, acts, W_dec, offset, y)
        errors = [found.squared_error]
        if dead_acts is not None:
            assert dead_indices is not None
            dead_order = dead_order or ByLatent(backend, dead_indices, len(W_dec))
            ctx.auxk = AuxK(dead_order, dead_acts, W_dec, found.difference, alone)
            errors.append(ctx.auxk.error)
        ctx.save_for_backward(W_dec, acts, dead_acts)
        ctx.difference, ctx.products, ctx.offset = found.difference, found.products, offset.ndim
        ctx.set_materialize_grads(False)
        return found.sae_out, *errors

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_out: Tensor | None,
        grad_error: Tensor | None,
        grad_dead: Tensor | None = None,
    ) -> tuple[Tensor | None, ...]:
        W_dec, acts, dead_acts = ctx.saved_tensors
        grad_W, grad_offset, _, grad_acts, *_ = ctx.needs_input_grad[2:]
        d_W = d_offset = d_acts = d_dead = None
        difference, ctx.difference, auxk, ctx.auxk = ctx.difference, None, ctx.auxk, None
        if grad_dead is not None and auxk.alone:  # of the difference as it is
            d_dead, d_W = auxk.gradients(grad_dead, dead_acts, W_dec, difference, grad_W)
        if not grad_out is grad_error is None:
            # The gradient of sae_out is factor * rows.
            rows, products, factor = grad_out, None, 1.0
            if grad_error is not None:
                assert difference is not None, "the gradient of an error is taken once"
                rows, factor = difference, 2 * grad_error
                products = ctx.products if grad_out is None else None
                if products is None:
                    rows, factor = rows.mul_(factor), 1.0
                    rows = rows if grad_out is None else rows.add_(grad_out)
            assert rows is not None
            if grad_acts:
                d_acts = (
                    ctx.order.sampled_product(rows, W_dec)
                    if products is None
                    else products * factor
                )
            if grad_W:
                weights = acts if products is None else acts * factor
                d_W = ctx.order.sum_rows(ctx.order.sort(weights), rows.contiguous(), add_to=d_W)
            if grad_offset:
                d_offset = rows if ctx.offset == 2 else rows.sum(0)
                d_offset = d_offset if products is None else d_offset * factor
        if grad_dead is not None and not auxk.alone:
            d_dead, d_W = auxk.gradients(grad_dead, dead_acts, W_dec, difference, grad_W, d_W)
        return None, None, d_W, d_offset, None, d_acts, None, None, d_dead, None, None


def _within(indices: Tensor, limit: int) -> bool:
    return not indices.numel() or bool(indices.min() >= 0 and indices.max() < limit)

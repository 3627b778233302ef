"""Reconstructions from the first latents alone, in one pass over the entries in prefix order.

The prefixes cut the latents into G groups. With S_g, the sum of a row's active latents in group g,

    sae_out_m = offset + sum_{g <= m} S_g          of prefix m
    d / d S_g = sum_{m >= g} d / d sae_out_m

so every entry is decoded once, and the gradient of its activation is one product.
"""

from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from .auxk import AuxK
from .backend import Backend
from .dense_products import AllOf
from .entries import Entries
from .sparse_products import ByLatent, Sorted, square_sum


class ByGroup(ByLatent):
    """Entries in G times as many rows: those of row n in group g are in row g N + n.

    `ends` are the prefixes. Weights and products are in the order of the entries that it is of.
    """

    def __init__(self, order: ByLatent, ends: tuple[int, ...]) -> None:
        super().__init__(order.backend, order.indices, order.num_latents)
        self._order, n = order, order.num_rows
        latents = order.indices.flatten()
        groups = torch.zeros_like(latents)
        for end in ends[:-1]:  # which a table of them on a GPU would wait for
            groups += latents >= end
        self._row = groups.mul_(n).add_(order.rows())
        self._by_row = ByLatent(order.backend, self._row.unsqueeze(1), len(ends) * n)
        starts, self._place, _ = self._by_row._sorted
        self._place = self._place.long()
        entries = latents[self._place]
        self._entries = Entries(order.backend, entries, starts.long(), order.num_latents)

    @cached_property
    def _sorted(self) -> Sorted:
        starts, order, _ = self._order._sorted
        return Sorted(starts, order, self._row[order.long()].int())

    def weighted_rows(
        self, weights: Float[Tensor, "..."], table: Float[Tensor, "L D"]
    ) -> Float[Tensor, "GN D"]:
        """out_{gN+n} = sum of weights_e table[indices_e] over the entries e of row n in group g."""
        return self._entries.weighted_rows(self._by_row.sort(weights), table)

    def sampled_product(
        self, rows: Float[Tensor, "GN D"], table: Float[Tensor, "L D"]
    ) -> Float[Tensor, "..."]:
        """out_e = <rows_{gN+n}, table[indices_e]> of the entries e of row n in group g."""
        found = self._entries.sampled_product(rows, table)
        return torch.empty_like(found).scatter_(0, self._place, found).view_as(self.indices)


class ReconstructPrefixes(torch.autograd.Function):
    """One or two `Latents`, of as many rows, to sae_out, its error, all prefixes' errors, AuxK's.

    The second ones are dead latents, which reconstruct what all prefixes together leave.
    """

    @staticmethod
    def forward(
        ctx: Any,
        backend: Backend,
        alone: bool,
        ends: tuple[int, ...],
        W_dec: Float[Tensor, "L D"],
        offset: Float[Tensor, "*N D"],
        y: Float[Tensor, "N D"],
        acts: Tensor,
        indices: Int[Tensor, "..."],
        order: ByLatent | None,
        dead_acts: Tensor | None = None,
        dead_indices: Tensor | None = None,
        dead_order: ByLatent | AllOf | None = None,
    ) -> tuple[Tensor, ...]:
        """`ends` are the prefixes, the last of which holds all latents."""
        order = ByGroup(order or ByLatent(backend, indices, len(W_dec)), ends)
        differences = order.weighted_rows(acts, W_dec).view(len(ends), *y.shape)
        differences[0].add_(offset)
        for shorter, longer in pairwise(differences):
            longer.add_(shorter)
        sae_out = differences[-1].clone()
        differences.sub_(y)
        errors = torch.stack([square_sum(difference) for difference in differences])
        found, auxk = [sae_out, errors[-1].clone(), errors], None
        if dead_acts is not None:
            assert dead_indices is not None
            dead_order = dead_order or ByLatent(backend, dead_indices, len(W_dec))
            auxk = AuxK(dead_order, dead_acts, W_dec, differences[-1], alone)
            found.append(auxk.error)
        ctx.save_for_backward(W_dec, acts, dead_acts)
        ctx.order, ctx.auxk, ctx.differences, ctx.offset = order, auxk, differences, offset.ndim
        ctx.set_materialize_grads(False)
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        grad_out: Tensor | None,
        grad_error: Tensor | None,
        grad_errors: Tensor | None,
        grad_dead: Tensor | None = None,
    ) -> tuple[Any, ...]:
        """The gradients of W_dec, the offset and activations."""
        W_dec, acts, dead_acts = ctx.saved_tensors
        order, differences, auxk = ctx.order, ctx.differences, ctx.auxk
        assert differences is not None, "the gradient of an error is taken once"
        ctx.differences = ctx.auxk = None
        grad_W, grad_offset, _, grad_acts, *_ = ctx.needs_input_grad[3:]
        d_W = d_offset = d_acts = d_dead = None
        left = differences[-1]
        if grad_dead is not None and auxk.alone:  # of the differences as they are
            d_dead, d_W = auxk.gradients(grad_dead, dead_acts, W_dec, left, grad_W)
        if not grad_out is grad_error is grad_errors is None:
            factors = differences.new_zeros(len(differences))
            factors += 0 if grad_errors is None else grad_errors
            factors[-1] += 0 if grad_error is None else grad_error
            differences.mul_(2 * factors.view(-1, 1, 1))
            if grad_out is not None:
                differences[-1].add_(grad_out)
            for longer, shorter in pairwise(reversed(differences.unbind())):
                shorter.add_(longer)
            rows = differences.flatten(0, 1)
            d_acts = order.sampled_product(rows, W_dec) if grad_acts else None
            if grad_W:
                d_W = order.sum_rows(order.sort(acts), rows, add_to=d_W)
            if grad_offset:
                d_offset = differences[0] if ctx.offset == 2 else differences[0].sum(0)
        if grad_dead is not None and not auxk.alone:
            d_dead, d_W = auxk.gradients(grad_dead, dead_acts, W_dec, left, grad_W, d_W)
        return None, None, None, d_W, d_offset, None, d_acts, None, None, d_dead, None, None

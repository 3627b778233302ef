"""Active latents with the order of their entries, as each kind of selection finds them."""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from ..config import Activation
from .backend import Backend
from .dense_products import AllOf
from .entries import Entries, entries_above, entries_around, largest_in_groups
from .selection import active_latents
from .sparse_products import ByLatent

_CANDIDATES = 4  # per row, over k, of which most rows of a group have fewer active


class Latents(NamedTuple):
    """Twin of `functional.Latents`."""

    acts: Float[Tensor, "N K"]
    indices: Int[Tensor, "N K"]
    by_latent: ByLatent | AllOf | None = None
    """The entries sorted by latent, which the gradients of encoder and decoder share.

    Of dead latents it may be `AllOf`: then `acts` are of all of them [N P], and `indices` [M].
    Where each row has a number of entries of its own, it is `Entries`: both are [E].
    """


def largest(
    backend: Backend,
    activation: Activation,
    widths: tuple[int, ...],
    dead: Tensor | None,
    inputs: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
) -> list[Latents]:
    """The active latents of rows that have equally many, and those among the dead."""
    tops, indices = active_latents(backend, inputs, W_enc, b_enc, activation, widths, dead)
    orders = [
        ByLatent(backend, i, len(W_enc)) if i.ndim == 2 else AllOf(i, len(W_enc), inputs.dtype)
        for i in indices
    ]
    return [Latents(*found) for found in zip(tops, indices, orders, strict=True)]


def above(
    backend: Backend, threshold: Tensor, inputs: Tensor, W_enc: Tensor, b_enc: Tensor
) -> list[Latents]:
    acts, entries = entries_above(backend, inputs, W_enc, b_enc, threshold)
    return [Latents(acts, entries.indices, entries)]


def around(
    backend: Backend,
    where: tuple[Tensor, float, int],
    dead: Tensor | None,
    k_dead: int,
    inputs: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
) -> list[Latents]:
    acts, entries = entries_around(backend, inputs, W_enc, b_enc, *where)
    found = [Latents(acts, entries.indices, entries)]
    if dead is not None:
        (among,) = largest(backend, "topk", (k_dead,), None, inputs, W_enc[dead], b_enc[dead])
        numbers = dead[among.indices]
        found.append(Latents(among.acts, numbers, ByLatent(backend, numbers, len(W_enc))))
    return found


def in_groups(
    backend: Backend,
    k: int,
    groups: list[int],
    dead: Tensor | None,
    k_dead: int,
    inputs: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
) -> list[Latents]:
    """Rows propose candidates, twice as many again where a row has all of its own chosen."""
    candidates = min(_CANDIDATES * k, len(W_enc))
    while True:
        widths = (candidates,) if dead is None else (candidates, k_dead)
        found = largest(backend, "topk", widths, dead, inputs, W_enc, b_enc)
        whole = candidates == len(W_enc)
        chosen = largest_in_groups(found[0].acts, found[0].indices, k, groups, whole)
        if chosen is not None:
            acts, indices, starts = chosen
            entries = Entries(backend, indices, starts, len(W_enc))
            return [Latents(acts, indices, entries), *found[1:]]
        candidates = min(2 * candidates, len(W_enc))

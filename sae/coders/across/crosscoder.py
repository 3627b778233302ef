"""Crosscoders: one space of latents over several hookpoints, each a part of the columns.

In training the rows of every hookpoint are divided by their rms, so that none outweighs another.
The rows of W_dec have norms by hookpoint whose sum is that of H equal ones in a row of norm 1:

    sum over h of ||W_dec_l^h|| = sqrt(H)

So the k largest activations are the k largest products of activation and sum of decoder norms: the
selection is that of a plain coder. On disk the divisors are folded into the weights.

Source: Lindsey et al., "Sparse Crosscoders for Cross-Layer Features and Model Diffing"
(transformer-circuits.pub/2024/crosscoders).
"""

from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from ...config import Columns
from ...formats import sparsify
from ..sparse_coder import SparseCoder


def part_norms(W_dec: Float[Tensor, "L D"], parts: tuple[Columns, ...]) -> Float[Tensor, "L H"]:
    """||W_dec_l^h|| of every latent at every hookpoint."""
    columns = W_dec.split([part.width for part in parts], dim=1)
    return torch.stack([torch.linalg.vector_norm(of_one, dim=1) for of_one in columns], dim=1)


def shares_by_lm(
    W_dec: Float[Tensor, "L D"], parts: tuple[Columns, ...]
) -> dict[str, Float[Tensor, " L"]]:
    """By LM the part that it has in every latent's decoder norms; nothing where all are of one."""
    if len(lms := dict.fromkeys(part.lm for part in parts)) < 2:
        return {}
    norms = part_norms(W_dec, parts)
    of_one = {lm: [i for i, part in enumerate(parts) if part.lm == lm] for lm in lms}
    return {lm: norms[:, mine].sum(1) / norms.sum(1) for lm, mine in of_one.items()}


def normalize_parts_(W_dec: Float[Tensor, "L D"], parts: tuple[Columns, ...]) -> None:
    """Scale every row so that the sum of its norms by hookpoint is sqrt(H); zeros stay."""
    total = part_norms(W_dec, parts).sum(1, keepdim=True)
    W_dec.mul_(len(parts) ** 0.5 / total.where(total > 0, 1))


def normals(W_dec: Float[Tensor, "L D"], parts: tuple[Columns, ...]) -> Float[Tensor, "L D"]:
    """Of every row the unit direction in which the sum of its norms by hookpoint grows fastest."""
    norms = part_norms(W_dec, parts)
    scale = torch.where(norms > 0, 1 / norms, 0)
    scale = scale / (norms > 0).sum(1, keepdim=True).clamp(min=1).sqrt()
    columns = W_dec.split([part.width for part in parts], dim=1)
    pairs = zip(columns, scale.split(1, dim=1), strict=True)
    return torch.cat([of_one * factor for of_one, factor in pairs], dim=1)


def divisors(parts: tuple[Columns, ...], like: Tensor) -> Float[Tensor, " D"]:
    """The rms that each column is divided by in training."""
    found = [like.new_full((part.width,), part.rms) for part in parts]
    return torch.cat(found)


def folded(tensors: dict[str, Tensor], parts: tuple[Columns, ...]) -> dict[str, Tensor]:
    """The weights that do with plain rows what `tensors` do with those divided by their rms."""
    rms = divisors(parts, tensors["b_dec"])
    changed = {"encoder.weight": tensors["encoder.weight"] / rms, "b_dec": tensors["b_dec"] * rms}
    if "W_dec" in tensors:
        changed["W_dec"] = tensors["W_dec"] * rms
    return {**tensors, **changed}


def unfolded(tensors: dict[str, Tensor], parts: tuple[Columns, ...]) -> dict[str, Tensor]:
    """What `folded` was given, but for rounding."""
    return folded(tensors, tuple(part._replace(rms=1 / part.rms) for part in parts))


def balanced(tensors: dict[str, Tensor], parts: tuple[Columns, ...]) -> dict[str, Tensor]:
    """The same function with decoder norms that sum to sqrt(H): activations take up the rest."""
    W_dec = tensors["W_dec"].clone()
    normalize_parts_(W_dec, parts)
    before, after = (part_norms(W, parts).sum(1) for W in (tensors["W_dec"], W_dec))
    factor = torch.where(after > 0, before / after, 1)
    scaled = {n: tensors[n] * factor for n in ("encoder.bias", "threshold") if n in tensors}
    weight = tensors["encoder.weight"] * factor.unsqueeze(1)
    return {**tensors, **scaled, "encoder.weight": weight, "W_dec": W_dec}


class Crosscoder(SparseCoder):
    """A coder whose columns are those of several hookpoints, `cfg.parts`."""

    on_scaled_rows: bool = False
    """Whether its rows come divided by their rms, as in training; not of a coder from disk."""

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """Scale every row so that its norms by hookpoint sum to sqrt(H); zeros stay."""
        if self.W_dec is not None and not self.W_dec.is_meta:
            normalize_parts_(self.W_dec, self.cfg.parts)

    @torch.no_grad()
    def fixed_directions(self) -> Float[Tensor, "L D"] | None:
        """Of every row of W_dec the unit direction that normalizing undoes steps along."""
        return None if self.W_dec is None else normals(self.W_dec, self.cfg.parts)

    def use_scaled_rows_(self, parts: tuple[Columns, ...]) -> None:
        """Make a coder from disk one for rows that are divided by the rms of `parts`."""
        if not self.on_scaled_rows:
            self.load_state_dict(unfolded(self.state_dict(), parts))
            self.cfg, self.on_scaled_rows = replace(self.cfg, parts=parts), True

    def balance_(self) -> None:
        """Give decoder rows norms that sum to sqrt(H); activations take up the rest."""
        self.load_state_dict(balanced(self.state_dict(), self.cfg.parts))

    def save_to_disk(self, path: Path | str) -> None:
        """Write its two files, with the weights for plain rows."""
        tensors = self.state_dict()
        if self.on_scaled_rows:
            tensors = folded(tensors, self.cfg.parts)
        sparsify.write(Path(path), self.cfg, self.d_in, self.d_out, tensors)

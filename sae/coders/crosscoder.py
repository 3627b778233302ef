"""Crosscoders: one space of latents over several hookpoints, each a part of the columns.

In training the rows of every hookpoint are divided by their rms, so that none outweighs another.
The rows of W_dec have norms by hookpoint whose sum is that of H equal ones in a row of norm 1:

    sum over h of ||W_dec_l^h|| = sqrt(H)

So the k largest activations are the k largest products of activation and sum of decoder norms: the
selection is that of a plain coder. On disk the divisors are folded into the weights.

Source: Lindsey et al., "Sparse Crosscoders for Cross-Layer Features and Model Diffing"
(transformer-circuits.pub/2024/crosscoders).
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..config import Columns
from ..flag_checks import refuse


def part_norms(W_dec: Float[Tensor, "L D"], parts: tuple[Columns, ...]) -> Float[Tensor, "L H"]:
    """||W_dec_l^h|| of every latent at every hookpoint."""
    columns = W_dec.split([part.width for part in parts], dim=1)
    return torch.stack([torch.linalg.vector_norm(of_one, dim=1) for of_one in columns], dim=1)


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


def check_flags(cfg: Any) -> None:
    """Raise UsageError for flags of the script's `TrainConfig` that crosscoders do not go with."""
    coder, training = cfg.coder, cfg.training
    if not coder.crosscoder:
        return
    name = "--crosscoder"
    if coder.transcode:
        refuse(coder, "transcode", f"{name} reconstructs what it reads: drop one of the two")
    if coder.skip_connection:
        refuse(coder, "skip_connection", f"{name} reconstructs what it reads: drop it")
    if not coder.normalize_decoder:
        refuse(coder, "normalize_decoder", f"{name} selects latents by decoder norms: drop it")
    if training.uses_lm_loss:
        refuse(training, "loss_fn", f"{name} needs all hookpoints before it can replace one: fvu")
    if cfg.model.exclude_norm is not None:
        why = f"{name} needs the same rows at every hookpoint: use --exclude_positions"
        refuse(cfg.model, "exclude_norm", why)
    if cfg.machine.distribute_modules:
        why = f"{name} is one coder, which one rank would train while the others wait: drop it"
        refuse(cfg.machine, "distribute_modules", why)

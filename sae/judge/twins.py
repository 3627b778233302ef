"""Latents of two coders that write in the same direction, and what to show beside a latent."""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ..coders.across.crosscoder import Crosscoder
from ..coders.bank import CoderBank
from ..coders.sparse_coder import SparseCoder
from ..flag_checks import UsageError
from ..formats.origin import without_seed
from .trained import CodersConfig, TrainedCoders, named_coders

NEAR = 0.7
"""Cosine of decoder rows from which two latents count as twins."""


class Twins(NamedTuple):
    """For each of C latents of one coder the nearest of another."""

    cosine: Float[Tensor, " C"]
    latent: Int[Tensor, " C"]

    def share(self, near: float) -> float:
        """The share of them that have a twin."""
        return float((self.cosine >= near).double().mean())


@torch.no_grad()
def nearest_twins(
    a: SparseCoder, b: SparseCoder, latents: Int[Tensor, " C"] | None = None
) -> Twins:
    """max_j cos(W_dec_a[i], W_dec_b[j]) and that j, for the given latents i of `a` or for all."""
    ours, theirs = a.directions().float(), b.directions().float()
    if ours.shape[1] != theirs.shape[1]:  # one of them writes further ahead
        ours, theirs = ours[:, : a.d_out], theirs[:, : a.d_out]
    directions = F.normalize(theirs, dim=1)
    rows = F.normalize(ours if latents is None else ours[latents], dim=1).split(1024)
    found = [(part @ directions.T).max(dim=1) for part in rows]
    cosine, latent = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Twins(cosine, latent)


class Beside(NamedTuple):
    """A coder that is looked at beside one of another set."""

    name: str
    coder: SparseCoder


def coders_beside(trained: TrainedCoders, cfg: CodersConfig) -> dict[str, Beside]:
    """By coder of `trained` the one of `cfg` of its name, or else the first at its hookpoint.

    Raises UsageError where there is none, or one that does not read and write the same modules.
    """
    theirs, found = named_coders(cfg), dict[str, Beside]()
    for name, where in trained.state.bank.hookpoint.items():
        fitting = [n for n in theirs if without_seed(n) == where]
        if fitting:
            chosen = name if name in fitting else fitting[0]
            found[name] = Beside(chosen, theirs[chosen])
    if not found:
        raise UsageError(
            f"--twins {cfg.coders}: has coders of {', '.join(theirs)}, and none of "
            f"{', '.join(dict.fromkeys(trained.state.bank.hookpoint.values()))}"
        )
    for name, (other, coder) in found.items():
        ours = trained.state.bank[name]
        if _read_at(coder) != _read_at(ours):
            raise UsageError(
                f"--twins {cfg.coders}: {other} reads {_read_at(coder)}, and {name} "
                f"{_read_at(ours)}: give a coder of the same"
            )
        if isinstance(coder, Crosscoder):
            coder.use_scaled_rows_(ours.cfg.parts)
        if coder.d_out != ours.d_out or (coder.cfg.transcode, coder.d_in) not in (
            (ours.cfg.transcode, ours.d_in),
            (False, ours.d_out),
        ):
            raise UsageError(
                f"--twins {cfg.coders}: {other} goes from {coder.d_in} to {coder.d_out}, and "
                f"{name} from {ours.d_in} to {ours.d_out}: give coders of the same modules"
            )
    return found


def _read_at(coder: SparseCoder) -> str:
    """The hookpoints of a crosscoder, in words."""
    return ", ".join(part.hookpoint for part in coder.cfg.parts) or "one hookpoint"


def joined(trained: TrainedCoders, beside: dict[str, Beside]) -> TrainedCoders:
    """Both sets on the same text; a coder beside another has its name and `beside`."""
    bank, ranks = trained.state.bank, trained.state.exchange.ranks
    coders, hookpoint = dict(bank.items()), dict(bank.hookpoint)
    dtype = next(iter(coders.values())).matmul_dtype or torch.float32
    for name, (_, coder) in beside.items():
        coders[beside_name(name)], hookpoint[beside_name(name)] = coder, bank.hookpoint[name]
    both = CoderBank.holding(coders, hookpoint, ranks.device, dtype)
    return replace(trained, state=replace(trained.state, bank=both))


def beside_name(name: str) -> str:
    """What the coder beside one of this name is called."""
    return f"{name} beside"

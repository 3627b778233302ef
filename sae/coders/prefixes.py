"""The prefixes of Matryoshka coders: how many latents each has, and what goes with them."""

from itertools import accumulate
from typing import Any

from ..config import SparseCoderConfig
from ..flag_checks import UsageError, refuse

_CLOSE = 1e-2  # latents that a share may be off, which is typed with a few digits


def prefixes_of(cfg: SparseCoderConfig, d_in: int) -> tuple[int, ...]:
    """Latents of each prefix of a coder `d_in` wide, the last has all; none without --matryoshka.

    Source: Bussmann et al., "Learning Multi-Level Features with Matryoshka Sparse Autoencoders"
    (arXiv 2503.17547).
    """
    latents = cfg.latents(d_in)
    return tuple(round(latents * share) for share in accumulate(cfg.matryoshka))


def check_prefixes(cfg: SparseCoderConfig, d_in: int, where: str) -> None:
    """Raise UsageError unless prefixes are whole latents, and the first has k of them."""
    latents, said = cfg.latents(d_in), f"--matryoshka {' '.join(map(str, cfg.matryoshka))}"
    for share in cfg.matryoshka:
        if abs(latents * share - round(latents * share)) > _CLOSE:
            raise UsageError(
                f"{said}: {share:g} of the {latents} latents at {where} are {latents * share:g}: "
                f"give shares that are whole numbers of latents"
            )
    first = next(iter(prefixes_of(cfg, d_in)), cfg.k)
    if first < cfg.k:
        raise UsageError(
            f"{said}: the first prefix at {where} has {first} latents, fewer than --k {cfg.k}: "
            f"give it a larger share"
        )


def check_flags(cfg: Any) -> None:
    """Raise UsageError for flags of the script's `TrainConfig` that prefixes do not go with."""
    if cfg.coder.num_latents:
        check_prefixes(cfg.coder, 0, "every hookpoint")
    if cfg.coder.matryoshka and cfg.training.uses_lm_loss:
        why = "with --matryoshka every prefix would need a forward of the LM of its own: use fvu"
        refuse(cfg.training, "loss_fn", why)

"""The hookpoints of a cross-layer transcoder: one of each layer, in order."""

import re
from dataclasses import replace

from natsort import natsorted

from ...config import SparseCoderConfig, Widths
from ...flag_checks import UsageError


def at(cfg: SparseCoderConfig, layers: list[str], hookpoint: str) -> SparseCoderConfig:
    """What the coder at one of these is: with --cross_layer, whose latents it takes and who its.

    Its decoders are not normalized: see `cross_layer`.
    """
    if not cfg.cross_layer:
        return cfg
    ahead = len(layers) if cfg.cross_layer == "all" else cfg.cross_layer
    here = layers.index(hookpoint)
    sources, targets = layers[max(0, here - ahead) : here], layers[here + 1 : here + 1 + ahead]
    of_layer = {"sources": tuple(sources), "targets": tuple(targets)}
    return replace(cfg, normalize_decoder=False, **of_layer)


def check(widths: dict[str, Widths]) -> None:
    """Raise UsageError unless these are one module of several layers, in order, of one width."""
    names = list(widths)
    kinds = {re.sub(r"\d+", "N", name, count=1) for name in names}
    if len(kinds) > 1 or len(names) < 2 or names != natsorted(names):
        raise UsageError(
            f"--cross_layer: takes the same module of several layers, in order, not "
            f"{', '.join(names)}: "
            f'name them by one pattern, such as --hookpoints "layers.*.mlp"'
        )
    if len({width.d_out for width in widths.values()}) > 1:
        sizes = ", ".join(f"{name} {width.d_out}" for name, width in widths.items())
        raise UsageError(f"--cross_layer: needs hookpoints of one width to write to, not {sizes}")

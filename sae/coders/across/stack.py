"""The hookpoints of a cross-layer transcoder: one of each layer, in order."""

import re
from collections.abc import Iterable
from dataclasses import replace

from ...config import SparseCoderConfig, Widths
from ...flag_checks import UsageError


def at(cfg: SparseCoderConfig, widths: dict[str, Widths], hookpoint: str) -> SparseCoderConfig:
    """What the coder at one hookpoint is: with --cross_layer, whose latents it takes and who its.

    Its decoders are not normalized: see `cross_layer`.
    Raises UsageError where the hookpoints are not one of each layer, all of one width.
    """
    if not cfg.cross_layer:
        return cfg
    names = list(widths)
    check_stack(names)
    if len({width.d_out for width in widths.values()}) > 1:
        sizes = ", ".join(f"{name} {width.d_out}" for name, width in widths.items())
        raise UsageError(
            f"--cross_layer: latents write at every hookpoint, which differ in width: {sizes}"
        )
    ahead = len(names) if cfg.cross_layer == "all" else cfg.cross_layer
    here = names.index(hookpoint)
    sources, targets = names[max(0, here - ahead) : here], names[here + 1 : here + 1 + ahead]
    of_layer = {"sources": tuple(sources), "targets": tuple(targets)}
    return replace(cfg, normalize_decoder=False, **of_layer)


def check_stack(hookpoints: Iterable[str]) -> None:
    """Raise UsageError unless the names differ in the number of the layer alone, two or more."""
    names = list(hookpoints)
    kinds = {re.sub(r"\d+", "N", name, count=1) for name in names}
    if len(kinds) > 1 or len(names) < 2:
        raise UsageError(
            f"--cross_layer: takes the same module of several layers, not {', '.join(names)}: "
            f'name them by one pattern, such as --hookpoints "layers.*.mlp"'
        )

"""Names of modules: those that globs or layers choose, and how much of the LM they need."""

import difflib
import re
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from natsort import natsorted
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from ..flag_checks import UsageError


class Place(NamedTuple):
    """Where in the LM a hookpoint is: `module[:input][:headN]`."""

    module: str
    enters: bool = False
    """What enters the module, instead of what leaves it."""
    head: int | None = None
    """One head of it."""


def parse(hookpoint: str) -> Place:
    """The place that the name of a hookpoint stands for."""
    module, *parts = hookpoint.split(":")
    head = next((part.removeprefix("head") for part in parts if part.startswith("head")), None)
    return Place(module, "input" in parts, None if head is None else int(head))


def attention_heads(lm: PreTrainedModel) -> int:
    """The LM's number of attention heads."""
    return getattr(text_config(lm.config), "num_attention_heads", None) or 1


_WHERE = re.compile(r"(:input)?(:head\d+)?")


def choose_hookpoints(
    lm: PreTrainedModel,
    patterns: tuple[str, ...] = (),
    layers: tuple[int, ...] = (),
    layer_stride: int = 1,
) -> list[str]:
    """Module names of the base model that match the globs, in natural order.

    A glob that ends in `:input` stands for what enters its modules. Without globs: the residual
    stream after every layer in `layers`, or after every `layer_stride`-th one.
    """
    names = [name for name, _ in lm.base_model.named_modules() if name]
    if patterns:
        chosen: set[str] = set()
        for pattern in patterns:
            glob, colon, rest = pattern.partition(":")
            if not _WHERE.fullmatch(colon + rest):
                raise UsageError(
                    f"--hookpoints {pattern}: behind the colon there can be input, for what enters "
                    f"the module"
                )
            found = [name + colon + rest for name in names if fnmatchcase(name, glob)]
            if not found:
                near = difflib.get_close_matches(glob, names, n=5, cutoff=0.4) or names[:5]
                raise UsageError(
                    f"--hookpoints {pattern}: no module of {type(lm).__name__} has such a name; "
                    f"the nearest are {', '.join(natsorted(near))}"
                )
            chosen.update(found)
        return natsorted(chosen)
    prefix, depth = text_layers(lm)
    for layer in layers:
        if not 0 <= layer < depth:
            raise UsageError(
                f"--layers {layer}: {type(lm).__name__} has {depth} layers, 0 to {depth - 1}"
            )
    return [f"{prefix}.{i}" for i in sorted(set(layers)) or range(0, depth, layer_stride)]


def text_layers(lm: PreTrainedModel) -> tuple[str, int]:
    """Name and length of the list of transformer blocks that text goes through.

    An LM whose last layers were taken out says so itself.
    """
    if hasattr(lm.base_model, "kept_layers"):
        kept: Any = lm.base_model.kept_layers
        return kept
    depth = text_config(lm.config).num_hidden_layers
    lists = [
        name
        for name, module in lm.base_model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == depth
        # A multimodal model's other towers can be just as deep.
        and not re.search(r"vision|visual|audio|image|speech", name)
        # Lists inside a block (a mixture's experts) can be just as long.
        and not re.search(r"\.\d+\.", name)
    ]
    if not lists:
        raise UsageError(
            f"{type(lm).__name__} has no list of {depth} layers: name the modules by --hookpoints"
        )
    return lists[0], depth


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The part of a config that describes what reads text."""
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config

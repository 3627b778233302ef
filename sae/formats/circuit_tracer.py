"""Sets of transcoders of circuit-tracer: one for the MLP of every layer.

CODERS/config.yaml            model_kind: transcoder_set, model_name, feature_input_hook and so on
CODERS/layer_3.safetensors    W_enc [L D], b_enc, W_dec [L D], b_dec, and if any W_skip [D D] and
                              activation_function.threshold [L]

Its loader drops `activation` and `k` of a local config.yaml, and reads a TopK set as plain ReLU
without a word. So only coders with thresholds are written.
"""

import re
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..flag_checks import UsageError
from .coder_file import (
    CoderFile,
    NeedsThreshold,
    check_floats,
    check_shapes,
    coder_file,
    mean_l0,
    whole_number,
)
from .hook_names import input_of_mlp, mlp_of_layer
from .origin import Origin, without_seed
from .pieces import Stored

FILES = "config.yaml, layer_0.safetensors"

INPUT, OUTPUT = "mlp.hook_in", "mlp.hook_out"
"""What its transcoders here read and predict, in its words."""
_KIND = "transcoder_set"
_THRESHOLD = "activation_function.threshold"


def is_coder(path: Path) -> bool:
    """Whether this is the file of one layer of a set."""
    named = re.fullmatch(r"layer_\d+\.safetensors", path.name) is not None
    return named and path.is_file() and (path.parent / "config.yaml").is_file()


def hookpoint_of(path: Path) -> str | None:
    """The MLP of a coder: as this project wrote it, or by the hooks and the LM of its config."""
    if "hookpoint" in (said := said_in(path)):
        return said["hookpoint"]
    return mlp_of_config(read_config(path.parent / "config.yaml", _KIND), _layer(path))


def trained_on(path: Path) -> dict[str, Any]:
    """What config.yaml says of the LM, by the name that `Origin` has for it."""
    config = _parsed(path.parent / "config.yaml")
    return {"model": config.get("model_name")} if isinstance(config, dict) else {}


def _layer(path: Path) -> int:
    return int(path.stem.removeprefix("layer_"))


def mlp_of_config(config: dict[str, Any], layer: int) -> str | None:
    """The MLP of a layer, where a config.yaml says that its input and output are what is meant."""
    return None if other_hooks(config) else mlp_of_layer(layer, config.get("model_name"))


def other_hooks(config: dict[str, Any]) -> str | None:
    """What a config.yaml says instead of the input and output of an MLP."""
    hooks = [config.get(name) for name in ("feature_input_hook", "feature_output_hook")]
    # ln2.hook_normalized is before the weights of an RMSNorm, and so not what an MLP reads.
    meant = hooks[0] == INPUT and hooks[1] in (OUTPUT, "hook_mlp_out")
    return None if meant else f"{hooks[0]} to {hooks[1]}"


def elsewhere_in_lm(path: Path) -> str | None:
    """Why what a coder reads and writes is no one module's, if it is not."""
    config = read_config(path.parent / "config.yaml", _KIND)
    hooks = None if "hookpoint" in said_in(path) else other_hooks(config)
    return hooks and f"a transcoder from {hooks}, as its config.yaml says"


def said_in(path: Path) -> dict[str, str]:
    """What the header of a file says beside the tensors; circuit-tracer reads past it."""
    with Stored(path.parent, path.stem), safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def read(path: Path) -> CoderFile:
    """The transcoder of one layer. Raises UsageError for files that are damaged or unknown."""
    config = read_config(path.parent / "config.yaml", _KIND)
    with Stored(path.parent, path.stem) as stored:
        shapes = stored.shapes
        latents, d_in = (*shapes.get("W_enc", ()), 0, 0)[:2]
        expected: dict[str, tuple[int, ...]] = {"W_enc": (latents, d_in), "b_enc": (latents,)}
        expected |= {"W_dec": (latents, d_in), "b_dec": (d_in,)}
        optional = {"W_skip": (d_in, d_in), _THRESHOLD: (latents,)}
        expected |= {name: shape for name, shape in optional.items() if name in shapes}
        check_shapes(path, shapes, expected)
        found = stored.read_all(None)
        check_floats(path, found)
    l0 = said_in(path).get("l0", "")
    threshold, k = found.get(_THRESHOLD), mean_l0(int(l0) if l0.isdecimal() else None)
    if threshold is None and config.get("activation") == "topk":
        k = whole_number(path.parent / "config.yaml", config, "k")
    elif threshold is None:
        threshold = torch.zeros(latents)
    check_not_negative(path, threshold)
    return coder_file(
        *(found["W_enc"], found["b_enc"], found["W_dec"], found["b_dec"]),
        k=k,
        threshold=threshold,
        one_level=said_in(path).get("activation") == "batchtopk",
        centred=False,
        transcode=True,
        W_skip=found.get("W_skip"),
        hookpoint=hookpoint_of(path),
    )


def check_not_negative(path: Path, threshold: Tensor | None) -> None:
    """Raise UsageError for thresholds below 0, above which negative latents are active there."""
    if threshold is not None and bool((threshold < 0).any()):
        raise UsageError(
            f"{path}: has thresholds below 0, with which latents may be negative in "
            f"circuit-tracer, and here they are not"
        )


def read_config(path: Path, kind: str) -> dict[str, Any]:
    """A config.yaml for coders of this `model_kind`. Raises UsageError for any other."""
    config = _parsed(path)
    said = config.get("model_kind") if isinstance(config, dict) else None
    if said != kind:
        raise UsageError(f"{path}: model_kind is {said!r}; the files beside it are of a {kind}")
    return config


def _parsed(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"{path} cannot be read ({reason}): the file is damaged") from None


def elsewhere(folder: Path) -> list[str]:
    """The coders in other repositories that the config.yaml of a set names, if it does."""
    try:
        named = read_config(folder / "config.yaml", _KIND).get("transcoders")
    except UsageError:  # there is none, or it is of something else
        return []
    return [name for name in named if isinstance(name, str)] if isinstance(named, list) else []


def coders_by_layer(
    coders: dict[str, CoderFile], origin: Origin, what: str, instead: str
) -> dict[int, str]:
    """Layer -> the name of the coder of its MLP, of all layers.

    Raises UsageError, which calls them `what`, unless there is one for each and no other.
    """
    found: dict[int, str] = {}
    if origin.model_type is None:
        raise UsageError(
            f"--model: circuit-tracer takes {what} of MLPs, and which modules these are the LM's "
            f"config says, which is not at hand: name the LM, or {instead}"
        )
    for name, coder in coders.items():
        hook = input_of_mlp(without_seed(name), origin.model_type)
        if not coder.cfg.transcode or hook is None or coder.d_in != coder.d_out:
            raise UsageError(
                f"{name}: circuit-tracer takes {what} of MLPs, of equal widths: {instead}"
            )
        found[int(hook.split(".")[1])] = name
    layers = origin.layers or len(found)
    if len(coders) != len(found) or sorted(found) != list(range(layers)):
        raise UsageError(
            f"circuit-tracer takes {what} of all {layers} layers, and these are of "
            f"{sorted(found)}: train the others, too, with one seed, or {instead}"
        )
    return found


def write(folder: Path, coders: dict[str, CoderFile], origin: Origin) -> list[str]:
    """Write a set into `folder`; return notes.

    Raises NeedsThreshold for coders without thresholds, and UsageError where they are no set: not
    one transcoder for the MLP of every layer, all of one width.
    """
    by_layer = coders_by_layer(coders, origin, "transcoders", "try --to sae_lens")
    kinds = {(c.cfg.latents(c.d_in), c.cfg.skip_connection) for c in coders.values()}
    if len(kinds) > 1:
        raise UsageError("circuit-tracer takes transcoders of one width, all or none with a skip")
    if bare := [name for name, coder in coders.items() if not coder.cfg.has_threshold]:
        raise NeedsThreshold(f"{bare[0]}: circuit-tracer reads a local TopK set as plain ReLU")
    folder.mkdir(parents=True, exist_ok=True)
    for layer, name in by_layer.items():
        cfg, found = coders[name].cfg, coders[name].tensors
        tensors = {"W_enc": found["encoder.weight"], "b_enc": found["encoder.bias"]}
        tensors |= {"W_dec": found["W_dec"], "b_dec": found["b_dec"]}
        # It lets negative latents through where a threshold does: here none is active.
        tensors[_THRESHOLD] = found["threshold"].clamp(min=0)
        if cfg.skip_connection:
            tensors["W_skip"] = found["W_skip"]
        about = {"hookpoint": without_seed(name), "l0": str(cfg.k)}
        about["activation"] = cfg.activation
        plain = {key: t.contiguous() for key, t in tensors.items()}
        save_file(plain, folder / f"layer_{layer}.safetensors", metadata=about)
    config = {"model_kind": _KIND, "model_name": origin.model}
    config |= {"feature_input_hook": INPUT, "feature_output_hook": OUTPUT}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    lost = "the sizes of its prefixes have no place in circuit-tracer's files"
    return [f"{name}: {lost}" for name, coder in coders.items() if coder.cfg.matryoshka]

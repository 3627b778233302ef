"""Cross-layer transcoders of circuit-tracer: one over the MLPs of all layers.

CODERS/config.yaml            model_kind: cross_layer_transcoder, model_name and so on
CODERS/W_enc_3.safetensors    W_enc_3 [L D], b_enc_3 [L], b_dec_3 [D], and if any threshold_3 [L]
CODERS/W_dec_3.safetensors    W_dec_3 [L n-3 D], to layer 3 and each of the n - 4 behind it

A latent is active above its threshold or, without one, above 0. Layers that ours do not write to
have zeros there.
"""

import re
from pathlib import Path

import torch
import yaml
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from ..config import SparseCoderConfig
from ..flag_checks import UsageError
from .circuit_tracer import (
    INPUT,
    OUTPUT,
    check_not_negative,
    coders_by_layer,
    mlp_of_config,
    read_config,
    said_in,
)
from .coder_file import CoderFile, NeedsThreshold, check_floats, check_shapes, mean_l0
from .origin import Origin, without_seed
from .pieces import Part, Stored

FILES = "config.yaml, W_enc_0.safetensors, W_dec_0.safetensors"
_KIND = "cross_layer_transcoder"


def is_coder(path: Path) -> bool:
    """Whether this is the encoder's file of one layer."""
    named = re.fullmatch(r"W_enc_\d+\.safetensors", path.name) is not None
    return named and path.is_file() and (path.parent / "config.yaml").is_file()


def hookpoint_of(path: Path) -> str | None:
    """The MLP that a layer reads: as this project wrote it, or by the name of the LM."""
    if "hookpoint" in (said := said_in(path)):
        return said["hookpoint"]
    return mlp_of_config(read_config(path.parent / "config.yaml", _KIND), _layer(path))


def _layer(path: Path) -> int:
    return int(path.stem.removeprefix("W_enc_"))


def read(path: Path, decoder: bool = True) -> CoderFile:
    """The coder of one layer. Raises UsageError for files that are damaged or unknown."""
    read_config(path.parent / "config.yaml", _KIND)
    layer, count = _layer(path), len(list(path.parent.glob("W_enc_*.safetensors")))
    if layer >= count:
        raise UsageError(f"{path}: of the layers before it some are not there: {count} files")
    names = [hookpoint_of(path.with_name(f"W_enc_{i}.safetensors")) for i in range(count)]
    hookpoints = [name for name in names if name is not None]
    if len(hookpoints) < count:
        raise UsageError(
            f"{path.parent}: neither its files nor its config.yaml say which modules it reads: "
            f"only what goes from the input of an MLP to its output can be held"
        )
    W_enc, b_enc, b_dec, threshold = (
        f"{name}_{layer}" for name in ("W_enc", "b_enc", "b_dec", "threshold")
    )
    with Stored(path.parent, path.stem) as stored:
        latents, d_in = (*stored.shapes.get(W_enc, ()), 0, 0)[:2]
        expected: dict[str, tuple[int, ...]] = {W_enc: (latents, d_in), b_enc: (latents,)}
        expected[b_dec] = (d_in,)
        if threshold in stored.shapes:
            expected[threshold] = (latents,)
        check_shapes(path, stored.shapes, expected)
        found = stored.read_all(None)
        check_floats(path, found)
    said = said_in(path)
    ahead = said.get("ahead", "")
    targets = hookpoints[layer + 1 :][: int(ahead) if ahead.isdecimal() else None]
    sources = hookpoints[:layer][-int(ahead) if ahead.isdecimal() else None :]
    tensors = {"encoder.weight": found[W_enc], "encoder.bias": found[b_enc]}
    tensors |= {"b_dec": found[b_dec]}
    # ReLU is a threshold of 0.
    tensors["threshold"] = found.get(threshold, torch.zeros(latents)).float()
    check_not_negative(path, tensors["threshold"])
    for distance in range(len(sources) + 1 if decoder else 0):
        W = _decoder(path, layer - distance, distance, (latents, count - layer + distance, d_in))
        tensors[f"W_from.{distance}" if distance else "W_dec"] = W
    l0 = said.get("l0", "")
    cfg = SparseCoderConfig(
        num_latents=latents,
        activation="batchtopk" if said.get("activation") == "batchtopk" else "jumprelu",
        k=min(latents, mean_l0(int(l0) if l0.isdecimal() else None)),
        normalize_decoder=False,
        transcode=True,
        cross_layer=int(ahead) if ahead.isdecimal() else "all",
        sources=tuple(sources),
        targets=tuple(targets),
    )
    return CoderFile(cfg, d_in, d_in, tensors, hookpoints[layer])


def _decoder(path: Path, source: int, ahead: int, shape: tuple[int, ...]) -> Float[Tensor, "L D"]:
    """What latents of one layer write so many layers ahead."""
    name = f"W_dec_{source}"
    with Stored(path.parent, name) as stored:
        check_shapes(path.with_name(f"{name}.safetensors"), stored.shapes, {name: shape})
        found = {name: stored.read(name, Part(1, range(ahead, ahead + 1)))}
        check_floats(path, found)
    return found[name].squeeze(1).contiguous()


def write(folder: Path, coders: dict[str, CoderFile], origin: Origin) -> list[str]:
    """Write a cross-layer transcoder into `folder`; return notes.

    Raises NeedsThreshold for coders without thresholds, and UsageError where some of its layers
    are not there, or one has what these files cannot hold.
    """
    instead = "keep it as it is, or --to sparsify"
    by_layer = coders_by_layer(coders, origin, "cross-layer transcoders", instead)
    if skips := [name for name, coder in coders.items() if coder.cfg.skip_connection]:
        raise UsageError(
            f"{skips[0]}: circuit-tracer takes cross-layer transcoders without a skip: {instead}"
        )
    if bare := [name for name, coder in coders.items() if not coder.cfg.has_threshold]:
        raise NeedsThreshold(f"{bare[0]}: circuit-tracer has no TopK cross-layer transcoders")
    folder.mkdir(parents=True, exist_ok=True)
    for layer, name in by_layer.items():
        cfg, found = coders[name].cfg, coders[name].tensors
        W_enc = {f"W_enc_{layer}": found["encoder.weight"], f"b_enc_{layer}": found["encoder.bias"]}
        W_enc |= {f"b_dec_{layer}": found["b_dec"]}
        W_enc[f"threshold_{layer}"] = found["threshold"].clamp(min=0)
        about = {"hookpoint": without_seed(name), "l0": str(cfg.k)}
        about |= {"activation": cfg.activation, "ahead": str(cfg.cross_layer)}
        plain = {key: t.contiguous() for key, t in W_enc.items()}
        save_file(plain, folder / f"W_enc_{layer}.safetensors", metadata=about)
        W_dec = [found["W_dec"]]
        for i in range(1, len(by_layer) - layer):
            there = coders[by_layer[layer + i]].tensors
            W_dec.append(there.get(f"W_from.{i}", torch.zeros_like(W_dec[0])))
        stacked = {f"W_dec_{layer}": torch.stack(W_dec, dim=1)}
        save_file(stacked, folder / f"W_dec_{layer}.safetensors")
    config = {"model_kind": _KIND, "model_name": origin.model}
    config |= {"feature_input_hook": INPUT, "feature_output_hook": OUTPUT}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return []

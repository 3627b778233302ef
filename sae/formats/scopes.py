"""Published sets of SAEs with files of their own; read only.

Gemma Scope 1   params.npz: W_enc [D L], b_enc, W_dec [L D], b_dec, threshold [L]
Gemma Scope 2   config.json, params.safetensors: the same as w_enc and w_dec, and if any
                affine_skip_connection [D D_out]
Llama Scope     hyperparams.json, checkpoints/final.safetensors: encoder.weight [L D], encoder.bias,
                decoder.weight [D L], decoder.bias
Qwen Scope      layer3.sae.pt, a pickle: W_enc [L D], b_enc, W_dec [D L], b_dec
OpenAI          resid_delta_mlp/autoencoders/3.pt, a pickle: encoder.weight [L D], latent_bias,
                decoder.weight [D L], pre_bias, activation

None but OpenAI's subtracts b_dec from what it reads. Llama Scope's scale of inputs is folded as
SAELens does.

Sources: Lieberum et al., "Gemma Scope" (arXiv 2408.05147); He et al., "Llama Scope" (arXiv
2410.20526); Gao et al., "Scaling and evaluating sparse autoencoders" (arXiv 2406.04093), with the
code of github.com/openai/sparse_autoencoder.
"""

import re
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor

from ..flag_checks import UsageError
from .coder_file import (
    CoderFile,
    check_floats,
    check_shapes,
    coder_file,
    json_object,
    mean_l0,
    positive_number,
    whole_number,
)
from .dictionary_learning import load_pt, open_pt
from .hook_names import our_name
from .pieces import Stored

GEMMA_1, GEMMA_2 = "params.npz", "config.json, params.safetensors"
LLAMA, QWEN = "hyperparams.json, checkpoints/final.safetensors", "layer0.sae.pt"
OPENAI = "autoencoders/0.pt"

_BETWEEN_NORMS = (
    "a transcoder of Gemma Scope, from what pre_feedforward_layernorm gives to what "
    "post_feedforward_layernorm gives"
)
# What published coders have; with anything else a coder computes another function.
_LLAMA_KNOWN = {"act_fn": "jumprelu", "norm_activation": "dataset-wise"}
_LLAMA_KNOWN |= dict.fromkeys(("apply_decoder_bias_to_pre_encoder", "use_glu_encoder"), False)
_SITES = {"res": "hook_resid_post", "mlp": "hook_mlp_out", "att": "attn.hook_z"}


def is_gemma_1(path: Path) -> bool:
    """Whether this is the folder of one coder of Gemma Scope 1."""
    return (path / "params.npz").is_file()


def hookpoint_of_gemma_1(path: Path) -> str | None:
    """Where a coder reads, as far as the names of its repository and folders say it."""
    site, layer = _site_of_gemma_1(path)
    hook = None if site is None or layer is None else _SITES.get(site)
    return our_name(f"blocks.{layer}.{hook}", None, "gemma-2") if hook else None


def _site_of_gemma_1(path: Path) -> tuple[str | None, int | None]:
    where = path.absolute().as_posix()
    site = re.search(r"gemma-scope-[\w-]+?-(res|mlp|att|transcoders)(?:/|$)", where)
    layer = re.search(r"/layer_(\d+)(?:/|$)", where)
    return site and site[1], int(layer[1]) if layer else None


def gemma_1_between_norms(path: Path) -> str | None:
    """What a transcoder of Gemma Scope 1 is; None for an SAE."""
    return _BETWEEN_NORMS if _site_of_gemma_1(path)[0] == "transcoders" else None


def read_gemma_1(path: Path) -> CoderFile:
    """One coder of Gemma Scope 1; no pickle inside is opened."""
    file = path / "params.npz"
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, TypeError, EOFError, KeyError, BadZipFile) as error:
        raise UsageError(f"{file} cannot be read ({error}): the file is damaged") from None
    d_in, latents = (*found.get("W_enc", torch.empty(0)).shape, 0, 0)[:2]
    _check(file, found, {"W_enc": (d_in, latents), "W_dec": (latents, d_in)}, latents, d_in)
    l0 = re.search(r"average_l0_(\d+)", path.absolute().as_posix())
    return coder_file(
        *(found["W_enc"].T, found["b_enc"], found["W_dec"], found["b_dec"]),
        k=mean_l0(int(l0[1]) if l0 else None),
        threshold=found["threshold"],
        centred=False,
        transcode=_site_of_gemma_1(path)[0] == "transcoders",
        hookpoint=hookpoint_of_gemma_1(path),
    )


def is_gemma_2(path: Path) -> bool:
    """Whether this is the folder of one coder of Gemma Scope 2."""
    return (path / "config.json").is_file() and (path / "params.safetensors").is_file()


def hookpoint_of_gemma_2(path: Path) -> str | None:
    """Where an SAE reads, as its config says."""
    config = json_object(path / "config.json")
    hook = config.get("hf_hook_point_in")
    return None if _is_transcoder(config) else our_name(None, hook, None)


def _is_transcoder(config: dict[str, Any]) -> bool:
    out = config.get("hf_hook_point_out")
    return out is not None and out != config.get("hf_hook_point_in")


def gemma_2_between_norms(path: Path) -> str | None:
    """What a transcoder of Gemma Scope 2 is; None for an SAE."""
    return _BETWEEN_NORMS if _is_transcoder(json_object(path / "config.json")) else None


def read_gemma_2(path: Path) -> CoderFile:
    """One coder of Gemma Scope 2."""
    file, config = path / "config.json", json_object(path / "config.json")
    if config.get("architecture") != "jump_relu":
        raise UsageError(f"{file}: architecture is {config.get('architecture')!r}, not jump_relu")
    with Stored(path, "params") as stored:
        shapes = stored.shapes
        d_in, latents = (*shapes.get("w_enc", ()), 0, 0)[:2]
        d_out = (0, *shapes.get("w_dec", ()))[-1]
        expected: dict[str, tuple[int, ...]] = {"w_enc": (d_in, latents), "w_dec": (latents, d_out)}
        expected |= {"b_enc": (latents,), "b_dec": (d_out,), "threshold": (latents,)}
        if "affine_skip_connection" in shapes:
            expected["affine_skip_connection"] = (d_in, d_out)
        check_shapes(stored.path, shapes, expected)
        found = stored.read_all(None)
        check_floats(stored.path, found)
    skip = found.get("affine_skip_connection")
    return coder_file(
        *(found["w_enc"].T, found["b_enc"], found["w_dec"], found["b_dec"]),
        k=mean_l0(config.get("l0")),
        threshold=found["threshold"],
        centred=False,
        transcode=_is_transcoder(config),
        W_skip=None if skip is None else skip.T,
        hookpoint=hookpoint_of_gemma_2(path),
    )


def is_llama(path: Path) -> bool:
    """Whether this is the folder of one coder of Llama Scope."""
    weights = path / "checkpoints" / "final.safetensors"
    return (path / "hyperparams.json").is_file() and weights.is_file()


def hookpoint_of_llama(path: Path) -> str | None:
    """Where a coder reads, as its config says."""
    return our_name(json_object(path / "hyperparams.json").get("hook_point_in"), None, "llama")


def read_llama(path: Path) -> CoderFile:
    """One coder of Llama Scope; what scales its inputs to norm sqrt(D) is folded into it."""
    file, config = path / "hyperparams.json", json_object(path / "hyperparams.json")
    d_in, latents = (whole_number(file, config, name) for name in ("d_model", "d_sae"))
    norms, level = config.get("dataset_average_activation_norm"), config.get("jump_relu_threshold")
    norm = norms.get("in") if isinstance(norms, dict) else None
    if norm is None or level is None:
        raise UsageError(
            f"{file} gives no jump_relu_threshold, or no dataset_average_activation_norm: what it "
            f"scales inputs by is not known"
        )
    norm = positive_number(file, "dataset_average_activation_norm", norm)
    level = positive_number(file, "jump_relu_threshold", level)
    for name, known in _LLAMA_KNOWN.items():
        if config.get(name, known) != known:
            raise UsageError(f"{file}: {name} is {config[name]!r}, and only {known!r} can be read")
    if config.get("hook_point_out", config.get("hook_point_in")) != config.get("hook_point_in"):
        raise UsageError(f"{file}: hook_point_out is another one, and transcoders are not read")
    with Stored(path / "checkpoints", "final") as stored:
        expected: dict[str, tuple[int, ...]] = {"encoder.weight": (latents, d_in)}
        expected |= {"decoder.weight": (d_in, latents), "encoder.bias": (latents,)}
        check_shapes(stored.path, stored.shapes, expected | {"decoder.bias": (d_in,)})
        found = {name: t.float() for name, t in stored.read_all(None).items()}
        check_floats(stored.path, found)
    scale = d_in**0.5 / norm
    return coder_file(
        found["encoder.weight"] * scale,
        found["encoder.bias"],
        found["decoder.weight"].T / scale,
        found["decoder.bias"] / scale,
        k=mean_l0(config.get("top_k")),
        threshold=torch.full((latents,), level * scale),
        centred=False,
        hookpoint=hookpoint_of_llama(path),
    )


def is_qwen(path: Path) -> bool:
    """Whether this is the file of one coder of Qwen Scope."""
    return path.is_file() and re.fullmatch(r"layer\d+\.sae\.pt", path.name) is not None


def hookpoint_of_qwen(path: Path) -> str | None:
    """The residual stream after the layer that the file's name says."""
    layer = re.search(r"\d+", path.name)
    return layer and f"layers.{layer[0]}"


def read_qwen(path: Path, allow_pt: bool) -> CoderFile:
    """One coder of Qwen Scope; its k stands in the name of its repository only."""
    k = re.search(r"-L0_(\d+)(?:/|$)", path.absolute().parent.as_posix() + "/")
    if k is None:
        raise UsageError(
            f"{path}: the k of a coder of Qwen Scope is in its repository's name, -L0_50: keep it "
            f"in the name of a folder above"
        )
    found = load_pt(path, allow_pt)
    latents, d_in = (*found.get("W_enc", torch.empty(0)).shape, 0, 0)[:2]
    expected: dict[str, tuple[int, ...]] = {"W_enc": (latents, d_in), "W_dec": (d_in, latents)}
    _check(path, found, expected, latents, d_in, threshold=False)
    return coder_file(
        *(found["W_enc"], found["b_enc"], found["W_dec"].T, found["b_dec"]),
        k=int(k[1]),
        centred=False,
        hookpoint=hookpoint_of_qwen(path),
    )


def is_openai(path: Path) -> bool:
    """Whether this is the file of one of OpenAI's SAEs of GPT-2."""
    inside = path.parent.name == "autoencoders"
    return inside and re.fullmatch(r"\d+\.pt", path.name) is not None and path.is_file()


def hookpoint_of_openai(path: Path) -> str | None:
    """Where an SAE reads, as far as the name of the folder above says it."""
    site = path.absolute().parent.parent.name.removesuffix("_v4")
    module = {"mlp_post_act": "mlp.act", "resid_delta_mlp": "mlp"}.get(site)
    return module and f"h.{path.stem}.{module}"


def read_openai(path: Path, allow_pt: bool) -> CoderFile:
    """One ReLU SAE of OpenAI's.

    Raises UsageError for their TopK SAEs, which bring every row to mean 0 and norm 1.
    """
    per_row = f"{path}: OpenAI's TopK SAEs scale every row on its own: no weights do the same"
    if "_v5_" in path.absolute().parent.parent.name:  # they need not be opened
        raise UsageError(per_row)
    found = open_pt(path, allow_pt)
    if not isinstance(found, dict) or found.get("activation", "ReLU") != "ReLU":
        raise UsageError(per_row)
    names = ("encoder.weight", "latent_bias", "decoder.weight", "pre_bias")
    found = {name: t for name in names if isinstance(t := found.get(name), Tensor)}
    latents, d_in = (*found.get("encoder.weight", torch.empty(0)).shape, 0, 0)[:2]
    expected: dict[str, tuple[int, ...]] = {"encoder.weight": (latents, d_in)}
    expected |= {"decoder.weight": (d_in, latents), "latent_bias": (latents,), "pre_bias": (d_in,)}
    check_shapes(path, {name: tuple(t.shape) for name, t in found.items()}, expected)
    check_floats(path, found)
    return coder_file(
        *(found["encoder.weight"], found["latent_bias"]),
        *(found["decoder.weight"].T, found["pre_bias"]),
        k=1,
        threshold=torch.zeros(latents),
        centred=True,
        hookpoint=hookpoint_of_openai(path),
    )


def _check(
    file: Path,
    found: dict[str, Tensor],
    matrices: dict[str, tuple[int, ...]],
    latents: int,
    d_in: int,
    threshold: bool = True,
) -> None:
    expected = {**matrices, "b_enc": (latents,), "b_dec": (d_in,)}
    if threshold:
        expected["threshold"] = (latents,)
    check_shapes(file, {name: tuple(t.shape) for name, t in found.items()}, expected)
    check_floats(file, found)

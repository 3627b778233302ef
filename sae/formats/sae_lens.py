"""Coder files of SAELens 6: a folder per coder.

CODERS/<name>/cfg.json                  what the coder is, with `metadata`
CODERS/<name>/sae_weights.safetensors   W_enc [D L], b_enc, W_dec [L D_out], b_dec, and by kind
                                        threshold [L], W_skip [D_out D]
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..flag_checks import UsageError
from .coder_file import (
    CoderFile,
    NeedsThreshold,
    at_least_float32,
    check_floats,
    check_shapes,
    coder_file,
    fold_b_dec,
    has_unit_rows,
    json_object,
    mean_l0,
    positive_number,
    whole_number,
)
from .hook_names import input_of_mlp, mlp_of_layer, our_name, their_names
from .origin import Origin, without_seed
from .pieces import Stored

FILES = "cfg.json, sae_weights.safetensors"
VERSION = "6.54.0"
"""The version of SAELens whose files these are."""

_SAES = ("standard", "gated", "topk", "jumprelu")
_TRANSCODERS = (
    *("transcoder", "skip_transcoder"),
    *("jumprelu_transcoder", "jumprelu_skip_transcoder"),
)


# Of what TransformerLens may do to an LM's weights, what changes activations at its hooks.
_CHANGES = (
    "fold_ln",
    "center_writing_weights",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
)
_UNUSED = "scaling_factor"  # in files of early versions, where it is 1
_PER_ROW = "which scales every row on its own: no weights do the same"
_FOLD = "fold it in SAELens, by {}, and save again"
_LOST = f"without its norm_scaling_factor: {_FOLD.format('fold_activation_norm_scaling_factor')}"
_NORMALIZATIONS = {
    True: _LOST,
    "expected_average_only_in": _LOST,
    "constant_norm_rescale": _PER_ROW,
    "layer_norm": _PER_ROW,
    "covariance_whitening": "without its matrix: " + _FOLD.format("fold_activation_whitening"),
}
"""Of activations, and why a coder with it cannot be read."""


def is_coder(path: Path) -> bool:
    """Whether this is the folder of one coder."""
    return (path / "cfg.json").is_file() and (path / "sae_weights.safetensors").is_file()


def hookpoint_of(path: Path) -> str | None:
    """Where a coder reads, as far as its `cfg.json` says."""
    return _place(_config(path / "cfg.json"))[0]


def trained_on(path: Path) -> dict[str, Any]:
    """What a `cfg.json` says of the LM and the text, by the names that `Origin` has for it."""
    about = _config(path / "cfg.json")["metadata"]
    names = {"model": "model_name", "dataset": "dataset_path", "ctx_len": "context_size"}
    names |= {"tokens": "training_tokens", "begins_with_bos": "prepend_bos"}
    return {ours: about.get(theirs) for ours, theirs in names.items()}


def changed_lm(path: Path) -> str | None:
    """What TransformerLens did to the LM that a coder was trained on, where its files say it."""
    given = _config(path / "cfg.json")["metadata"].get("model_from_pretrained_kwargs")
    changes = [name for name in _CHANGES if isinstance(given, dict) and given.get(name)]
    return (
        f"was trained on an LM with {', '.join(changes)} of TransformerLens, whose activations "
        f"are others than those of the LM as it is: figures here may be worse than its own"
        if changes
        else None
    )


def _place(cfg: dict[str, Any]) -> tuple[str | None, bool]:
    """The hookpoint of a coder, and whether it is a transcoder."""
    about = cfg["metadata"]
    names = about.get("hook_name"), about.get("hf_hook_name")
    if about.get("model_class_name") == "AutoModelForCausalLM" and names[1] is None:
        names = None, names[0]
    outs = about.get("hook_name_out"), about.get("hf_hook_name_out")
    differ = any(o and o != n for n, o in zip(names, outs, strict=True))
    transcode = cfg["architecture"] in _TRANSCODERS or differ
    if isinstance(said := about.get("transcode"), bool):  # an SAE with a skip connection, too
        transcode = said
    if isinstance(ours := about.get("hookpoint"), str):
        return ours, transcode
    head, model = about.get("hook_head_index"), about.get("model_name")
    if not transcode:
        return our_name(*names, model, head), False
    layer = re.fullmatch(r"blocks\.(\d+)\.mlp\.hook_in", str(names[0]))
    if layer is None or outs[0] != f"blocks.{layer[1]}.hook_mlp_out":
        return None, True
    return mlp_of_layer(int(layer[1]), model), True


def read(path: Path) -> CoderFile:
    """One coder. Raises UsageError for an architecture or normalization that cannot be held."""
    file, cfg = path / "cfg.json", _config(path / "cfg.json")
    kind, (hookpoint, transcode) = cfg["architecture"], _place(cfg)
    d_in, latents = (whole_number(file, cfg, name) for name in ("d_in", "d_sae"))
    d_out = whole_number(file, cfg, "d_out") if kind in _TRANSCODERS else d_in
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, latents), "W_dec": (latents, d_out)}
    biases = ("b_gate", "b_mag", "r_mag") if kind == "gated" else ("b_enc",)
    shapes |= {"b_dec": (d_out,), **dict.fromkeys(biases, (latents,))}
    if "jumprelu" in kind:
        shapes["threshold"] = (latents,)
    if "skip" in kind:
        shapes["W_skip"] = (d_out, d_in)
    with Stored(path, "sae_weights") as stored:
        if _UNUSED in stored.shapes:
            shapes[_UNUSED] = (latents,)
        check_shapes(stored.path, stored.shapes, shapes)
        found = stored.read_all(None)
        check_floats(stored.path, found)
        if bool((found.pop(_UNUSED, torch.ones(1)) != 1).any()):
            raise UsageError(f"{stored.path}: {_UNUSED} is not all ones, which cannot be read")
    norms = torch.linalg.vector_norm(found["W_dec"], dim=1)  # before they are scaled
    _fold_scaling_(file, cfg, found)
    W_enc, b_enc, threshold = found["W_enc"].T, found.get("b_enc"), found.get("threshold")
    about = cfg["metadata"]
    details = about.get("training_architecture_details")
    said = details.get("k") if isinstance(details, dict) else None
    W_dec, k = found["W_dec"], mean_l0(about.get("l0") or said)
    if kind == "gated":
        W_enc, b_enc, threshold = _without_gate(W_enc, found)
    assert b_enc is not None
    if kind in ("standard", "transcoder", "skip_transcoder"):
        threshold = torch.zeros_like(b_enc)
    if kind == "topk":
        k = whole_number(file, cfg, "k")  # where it is missing, SAELens takes 100
        if cfg.get("rescale_acts_by_decoder_norm", False) and not _are_ones(norms):
            W_enc, b_enc, W_dec = W_enc * norms[:, None], b_enc * norms, W_dec / norms[:, None]
    return coder_file(
        *(W_enc, b_enc, W_dec, found["b_dec"]),
        k=k,
        threshold=threshold,
        one_level=_is_batchtopk(cfg, threshold),
        centred=kind in _SAES and bool(cfg.get("apply_b_dec_to_input", True)),
        transcode=transcode,
        W_skip=found.get("W_skip"),
        hookpoint=hookpoint,
    )


def _are_ones(norms: Tensor) -> bool:
    return has_unit_rows(norms[:, None])


def _is_batchtopk(cfg: dict[str, Any], threshold: Tensor | None) -> bool:
    """Whether one threshold is what BatchTopK training found."""
    trained = str(cfg["metadata"].get("training_architecture")).endswith("batchtopk")
    return trained and threshold is not None and bool((threshold == threshold[0]).all())


def _config(path: Path) -> dict[str, Any]:
    """`cfg.json` of version 6; files of versions before have all in one object."""
    cfg = json_object(path)
    about = cfg.get("metadata")
    if not isinstance(about, dict):
        about = {**cfg, "hook_name": cfg.get("hook_name", cfg.get("hook_point"))}
        cfg.setdefault("architecture", "standard")
        cfg.setdefault("activation_fn", cfg.get("activation_fn_str", "relu"))
        if cfg["activation_fn"] == "topk":
            of_topk = cfg.get("activation_fn_kwargs")
            k = of_topk.get("k") if isinstance(of_topk, dict) else None
            cfg |= {"architecture": "topk", "k": k}
    cfg["metadata"] = about
    if cfg.get("architecture") not in (*_SAES, *_TRANSCODERS):
        raise UsageError(
            f"{path}: architecture is {cfg.get('architecture')!r}; those that can be read are "
            f"{', '.join((*_SAES, *_TRANSCODERS))}"
        )
    if cfg.get("finetuning_scaling_factor"):
        raise UsageError(f"{path}: finetuning_scaling_factor is set, which cannot be read")
    if cfg.get("activation_fn", "relu") not in ("relu", "topk"):
        raise UsageError(f"{path}: activation_fn {cfg['activation_fn']!r} cannot be read")
    return cfg


def _fold_scaling_(path: Path, cfg: dict[str, Any], found: dict[str, Tensor]) -> None:
    """Take activations as they are, instead of scaled; other normalizations cannot be folded."""
    kind = cfg.get("normalize_activations")
    if kind in (None, False, "none"):
        return
    factor = cfg.get("norm_scaling_factor")
    if kind not in (True, "expected_average_only_in") or factor is None:
        why = _NORMALIZATIONS.get(kind) if isinstance(kind, (str, bool)) else None
        why = why or "which is not known here"
        raise UsageError(f"{path}: normalize_activations is {kind!r}, {why}")
    factor = positive_number(path, "norm_scaling_factor", factor)
    found["W_enc"] = found["W_enc"] * factor
    found["W_dec"], found["b_dec"] = found["W_dec"] / factor, found["b_dec"] / factor


def _without_gate(W_enc: Tensor, found: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """A gated encoder as one with thresholds.

    With h = e^r W x + b_mag, the gate W x + b_gate > 0 is h > b_mag - e^r b_gate.

    Source: Rajamanoharan et al., "Improving Dictionary Learning with Gated Sparse Autoencoders"
    (arXiv 2404.16014), section 3.2.
    """
    scale = found["r_mag"].exp()
    threshold = found["b_mag"] - scale * found["b_gate"]
    return W_enc * scale[:, None], found["b_mag"], threshold


def write(folder: Path | None, name: str, coder: CoderFile, origin: Origin) -> list[str]:
    """Write one coder, or without a `folder` see if it can be held; notes on what is lost.

    Raises NeedsThreshold for a coder that SAELens holds through thresholds only.
    """
    cfg, found, hookpoint = coder.cfg, coder.tensors, without_seed(name)
    if why := _needs_threshold(coder):
        raise NeedsThreshold(f"{name}: {why}")
    if cfg.has_threshold:  # in fewer bits it would be another one
        found = at_least_float32(found)
    unit, bias = has_unit_rows(found["W_dec"]), found["encoder.bias"]
    kind, apply_b_dec, notes = "topk", not cfg.transcode, list[str]()
    if cfg.has_threshold and not cfg.transcode and not cfg.skip_connection:
        kind = "jumprelu"
    elif cfg.has_threshold:
        kind = f"jumprelu{'_skip' if cfg.skip_connection else ''}_transcoder"
        if apply_b_dec:  # such a coder reads x as it is
            bias, note = fold_b_dec(found, adds=False)
            apply_b_dec = False
            notes.append(f"{name}: {note}")
    tensors = {"W_enc": found["encoder.weight"].T, "b_enc": bias}
    tensors |= {"W_dec": found["W_dec"], "b_dec": found["b_dec"]}
    if cfg.has_threshold:
        tensors["threshold"] = found["threshold"].to(bias.dtype)
    if cfg.skip_connection:
        tensors["W_skip"] = found["W_skip"]
    about = _metadata(name, coder, origin)
    if about.get("hook_name") is None:
        lacking = "has no name in TransformerLens that is known here"
        if origin.model_type is None:
            lacking = "has no name in TransformerLens as long as the LM's config is not at hand"
        notes.append(f"{name}: {hookpoint} {lacking}")
    values: dict[str, Any] = {"architecture": kind, "d_in": coder.d_in}
    values |= {"d_sae": len(bias), "dtype": str(bias.dtype).removeprefix("torch.")}
    values |= {"device": "cpu", "apply_b_dec_to_input": apply_b_dec}
    z = str(about.get("hook_name")).endswith("hook_z") and "hook_head_index" not in about
    values |= {"normalize_activations": "none", "reshape_activations": "hook_z" if z else "none"}
    if kind == "topk":
        values |= {"k": cfg.k, "rescale_acts_by_decoder_norm": unit}
        if not unit:
            rows = "decoder rows are not of unit norm"
            notes.append(f"{name}: {rows}, which SAEDashboard cannot fold")
    if cfg.matryoshka:
        notes.append(f"{name}: the sizes of its prefixes have no place in SAELens' files")
    if kind in _TRANSCODERS:
        values["d_out"] = coder.d_out
    if folder is None:
        return notes
    folder.mkdir(parents=True, exist_ok=True)
    plain = {key: t.contiguous() for key, t in tensors.items()}
    save_file(plain, folder / "sae_weights.safetensors")
    text = json.dumps({**values, "metadata": about}, indent=2) + "\n"
    (folder / "cfg.json").write_text(text, encoding="utf-8")
    return notes


def _needs_threshold(coder: CoderFile) -> str | None:
    """Why SAELens cannot hold a coder by its k; None if it can."""
    if coder.cfg.has_threshold:
        return None
    if coder.cfg.activation != "topk":
        return f"SAELens has no {coder.cfg.activation}"
    if coder.cfg.skip_connection:
        return "SAELens has no TopK coder with a skip connection"
    if coder.d_in != coder.d_out:
        return f"SAELens has no TopK transcoder from {coder.d_in} to {coder.d_out}"
    return None


def _metadata(name: str, coder: CoderFile, origin: Origin) -> dict[str, Any]:
    hookpoint = without_seed(name)
    there = their_names(hookpoint, origin.model_type, origin.prefix)
    about = {"sae_lens_version": VERSION, "sae_lens_training_version": None}
    about |= {"model_name": origin.model}
    outs = {"hook_name": there.transformer_lens, "hf_hook_name": there.huggingface}
    if coder.cfg.transcode:
        ins = input_of_mlp(hookpoint, origin.model_type)
        about |= {"hook_name": ins, "hook_name_out": outs["hook_name"]}
        about |= {"hf_hook_name_out": outs["hf_hook_name"]}
    else:
        about |= outs if there.head is None else {**outs, "hook_head_index": there.head}
    # What SAELens loads to find a module of that name in.
    with_names = "AutoModelForCausalLM" if about["hook_name"] is None else "HookedTransformer"
    about |= {"model_class_name": with_names}
    about |= {"hookpoint": hookpoint, "transcode": coder.cfg.transcode}
    about |= {"dataset_path": origin.dataset, "context_size": origin.ctx_len}
    about |= {"prepend_bos": origin.begins_with_bos, "training_tokens": origin.tokens}
    about |= {"exclude_special_tokens": origin.excluded, "neuronpedia_id": None}
    about |= {"training_architecture": coder.cfg.activation, "l0": coder.cfg.k}
    return {**about, **origin.figures.get(name, {})}

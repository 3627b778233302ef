"""Coder files of dictionary_learning 0.1: a folder per coder.

CODERS/<name>/config.json   {"trainer": {"dict_class", "k", ...}, "buffer": {"ctx_len"}}
CODERS/<name>/ae.pt         a dict of tensors, as PyTorch pickles it

A pickle can run code when it is opened. PyTorch's weights_only lets it build tensors and plain
containers only; what it does not keep out is a file that fills the memory, or a fault in PyTorch's
own reader. So `ae.pt` is read only where that was asked for.
"""

import json
from pathlib import Path
from typing import Any

import torch
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
    json_object,
    mean_l0,
    whole_number,
)
from .hook_names import our_name
from .origin import Origin, without_seed

FILES = "config.json, ae.pt"

_LINEAR = ("AutoEncoder", "GatedAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE")
_PLAIN = ("MatryoshkaBatchTopKSAE", "JumpReluAutoEncoder")
_TRAINERS = {
    "AutoEncoderTopK": "TopKTrainer",
    "BatchTopKSAE": "BatchTopKTrainer",
    "MatryoshkaBatchTopKSAE": "MatryoshkaBatchTopKTrainer",
    "JumpReluAutoEncoder": "JumpReluTrainer",
}
_ONE_LEVEL: dict[str, str] = dict.fromkeys(("BatchTopKSAE", "MatryoshkaBatchTopKSAE"), "batchtopk")
_COUNTS = {"k": 0, "threshold": 0, "group_sizes": 1}
"""What is no weight, and its dimensions."""


def is_coder(path: Path) -> bool:
    """Whether this is the folder of one coder."""
    return (path / "config.json").is_file() and (path / "ae.pt").is_file()


def hookpoint_of(path: Path) -> str | None:
    """Where a coder reads, as far as its `config.json` says."""
    trainer = _trainer(path)
    if isinstance(ours := trainer.get("hookpoint"), str):
        return ours
    module = trainer.get("submodule_name")
    if not isinstance(module, str) or not module.startswith("resid_post"):
        return None
    return our_name(f"blocks.{trainer.get('layer')}.hook_resid_post", None, trainer.get("lm_name"))


def trained_on(path: Path) -> dict[str, Any]:
    """What a `config.json` says of the LM and the text, by the names that `Origin` has for it."""
    buffer = json_object(path / "config.json").get("buffer")
    ctx_len = buffer.get("ctx_len") if isinstance(buffer, dict) else None
    return {"model": _trainer(path).get("lm_name"), "ctx_len": ctx_len}


def _trainer(path: Path) -> dict[str, Any]:
    trainer = json_object(path / "config.json").get("trainer")
    kind = trainer.get("dict_class") if isinstance(trainer, dict) else None
    if not isinstance(trainer, dict) or kind not in (*_LINEAR, *_PLAIN):
        raise UsageError(
            f"{path / 'config.json'}: dict_class is {kind!r}; those that can be read are "
            f"{', '.join((*_LINEAR, *_PLAIN))}"
        )
    return trainer


def read(path: Path, allow_pt: bool = False) -> CoderFile:
    """One coder. Raises UsageError without `allow_pt`, or for a class that cannot be held."""
    trainer = _trainer(path)
    kind = trainer["dict_class"]
    found = load_pt(path / "ae.pt", allow_pt)
    d_in = whole_number(path / "config.json", trainer, "activation_dim")
    latents = whole_number(path / "config.json", trainer, "dict_size")
    dims = dict(_COUNTS)
    if kind == "JumpReluAutoEncoder":
        del dims["threshold"]  # a weight for every latent
    counts = {n: found.pop(n) for n, ndim in dims.items() if n in found and found[n].ndim == ndim}
    check_floats(path / "ae.pt", {n: t for n, t in counts.items() if n == "threshold"})
    threshold = found.get("threshold")
    shapes = _shapes(kind, d_in, latents)
    check_shapes(path / "ae.pt", {name: tuple(t.shape) for name, t in found.items()}, shapes)
    check_floats(path / "ae.pt", found)
    encoder = found["encoder.weight"] if kind in _LINEAR else found["W_enc"].T
    decoder = found["decoder.weight"].T if kind in _LINEAR else found["W_dec"]
    bias = found.get("encoder.bias", found.get("b_enc"))
    b_dec = found[next(n for n in ("b_dec", "bias", "decoder_bias") if n in found)]
    k, shares = mean_l0(trainer.get("k")), tuple[float, ...]()
    if kind == "AutoEncoderTopK":
        k = whole_number(path / "config.json", trainer, "k")
        if "k" in counts and int(counts["k"]) != k:
            raise UsageError(f"{path}: k is {k} in config.json and {int(counts['k'])} in ae.pt")
        threshold = None  # it selects by k unless it is told otherwise
    elif kind in _ONE_LEVEL:
        threshold = counts.get("threshold", torch.tensor(-1.0)).float()
        if threshold < 0:
            raise UsageError(
                f"{path}: its threshold was never set, so that it is a plain ReLU there: train it "
                f"on, or set the threshold in dictionary_learning"
            )
        threshold = threshold.expand(latents)
        groups = counts.get("group_sizes", torch.tensor([latents]))
        if int(groups.sum()) != latents or int(groups.min()) < 1:
            raise UsageError(f"{path}: group_sizes {groups.tolist()} are not {latents} latents")
        # A prefix here has no fewer latents than are active in the mean.
        if len(groups) > 1 and int(groups[0]) >= k:
            shares = tuple(size / latents for size in groups.tolist())
    elif kind == "AutoEncoder":
        threshold = torch.zeros(latents)
    elif kind == "GatedAutoEncoder":
        scale = found["r_mag"].exp()
        encoder, bias = encoder * scale[:, None], found["mag_bias"]
        threshold = bias - scale * found["gate_bias"]
    assert bias is not None
    return coder_file(
        *(encoder, bias, decoder, b_dec),
        k=k,
        threshold=threshold,
        one_level=trainer.get("activation", _ONE_LEVEL.get(kind)) == "batchtopk",
        centred=kind != "JumpReluAutoEncoder",
        matryoshka=shares,
        hookpoint=hookpoint_of(path),
        transcode=trainer.get("transcode") is True,
    )


def load_pt(path: Path, allow_pt: bool) -> dict[str, Tensor]:
    """The tensors of a file that PyTorch pickled. Raises UsageError without `allow_pt`."""
    found = open_pt(path, allow_pt)
    if not isinstance(found, dict) or not all(isinstance(t, Tensor) for t in found.values()):
        raise UsageError(f"{path} is no dict of tensors")
    return dict(found)


def open_pt(path: Path, allow_pt: bool) -> Any:
    """What PyTorch's reader builds of a pickle. Raises UsageError without `allow_pt`."""
    if not allow_pt:
        raise UsageError(
            f"{path} is a pickle, which can run code when it is opened: if you trust it, give "
            f"--allow_pt, or write safetensors of it once and for all by "
            f"python -m sae export {path.parent} --allow_pt --out DIR"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file surfaces as any of several errors
        reason = str(error).splitlines()[0][:200]
        raise UsageError(f"{path} cannot be read as plain tensors ({reason})") from None


def _shapes(kind: str, d_in: int, latents: int) -> dict[str, tuple[int, ...]]:
    if kind not in _LINEAR:
        shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, latents), "b_enc": (latents,)}
        shapes |= {"W_dec": (latents, d_in), "b_dec": (d_in,)}
        return {**shapes, "threshold": (latents,)} if kind == "JumpReluAutoEncoder" else shapes
    shapes = {"encoder.weight": (latents, d_in), "decoder.weight": (d_in, latents)}
    if kind == "GatedAutoEncoder":
        shapes |= dict.fromkeys(("gate_bias", "mag_bias", "r_mag"), (latents,))
        return {**shapes, "decoder_bias": (d_in,)}
    centre = "bias" if kind == "AutoEncoder" else "b_dec"
    return {**shapes, "encoder.bias": (latents,), centre: (d_in,)}


def write(folder: Path | None, name: str, coder: CoderFile, origin: Origin) -> list[str]:
    """Write one coder, or without a `folder` see if it can be held; notes on what is not exact.

    Raises NeedsThreshold or UsageError for one that no class there can hold.
    """
    cfg, found, hookpoint = coder.cfg, coder.tensors, without_seed(name)
    if cfg.skip_connection or coder.d_in != coder.d_out:
        what = "a skip connection" if cfg.skip_connection else f"d_out {coder.d_out}"
        raise UsageError(f"{name}: dictionary_learning has no coder with {what}: try --to sae_lens")
    if not cfg.has_threshold and cfg.activation != "topk":
        raise NeedsThreshold(f"{name}: dictionary_learning has no {cfg.activation}")
    kind, centred = "AutoEncoderTopK", True
    if cfg.has_threshold:
        level = found["threshold"]
        is_one = bool((level == level[0]).all()) and float(level[0]) >= 0
        kind = "JumpReluAutoEncoder"
        if is_one and not cfg.transcode:
            kind = "MatryoshkaBatchTopKSAE" if cfg.matryoshka else "BatchTopKSAE"
        centred = kind in _ONE_LEVEL
    if cfg.has_threshold or centred == cfg.transcode:
        found = at_least_float32(found)
    bias, notes = found["encoder.bias"], []
    if centred == cfg.transcode:  # what is subtracted there is not here, or the other way round
        bias, note = fold_b_dec(found, adds=centred)
        notes.append(f"{name}: {note}")
    if cfg.matryoshka and kind != "MatryoshkaBatchTopKSAE":
        notes.append(f"{name}: the sizes of its prefixes have no place in {kind}")
    if kind in _PLAIN:
        tensors = {"W_enc": found["encoder.weight"].T, "b_enc": bias, "W_dec": found["W_dec"]}
        tensors |= {"b_dec": found["b_dec"]}
    else:
        tensors = {"encoder.weight": found["encoder.weight"], "encoder.bias": bias}
        tensors |= {"decoder.weight": found["W_dec"].T, "b_dec": found["b_dec"]}
    if kind == "JumpReluAutoEncoder":
        tensors["threshold"] = found["threshold"]
    else:
        level = found["threshold"][0] if cfg.has_threshold else torch.tensor(-1.0)
        tensors |= {"k": torch.tensor(cfg.k, dtype=torch.int32), "threshold": level.clone()}
    if kind == "MatryoshkaBatchTopKSAE":
        sizes = [round(share * len(bias)) for share in cfg.matryoshka]
        tensors["group_sizes"] = torch.tensor(sizes)
    layer = next((int(part) for part in hookpoint.split(".") if part.isdigit()), None)
    trainer = {
        **{"trainer_class": _TRAINERS[kind], "dict_class": kind, "k": cfg.k},
        **{"activation_dim": coder.d_in, "dict_size": len(bias), "layer": layer},
        **{"lm_name": origin.model, "submodule_name": hookpoint, "hookpoint": hookpoint},
        **{"activation": cfg.activation, "transcode": cfg.transcode},
        **{"lr": None, "steps": None, "seed": None},
    }
    if folder is None:
        return notes
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({key: t.contiguous() for key, t in tensors.items()}, folder / "ae.pt")
    values = {"trainer": trainer, "buffer": {"ctx_len": origin.ctx_len}}
    text = json.dumps(values, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    return notes

"""One coder as any program's files describe it, in the names that this project computes with."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..config import Activation, SparseCoderConfig
from ..flag_checks import UsageError

_UNIT = 1e-5
_TOO_LARGE = 2**40
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class CoderFile(NamedTuple):
    """A coder, and what its files say of where it belongs."""

    cfg: SparseCoderConfig
    d_in: int
    d_out: int
    tensors: dict[str, Tensor]
    """encoder.weight [L D], encoder.bias [L], W_dec [L D_out], b_dec [D_out], W_skip [D_out D]."""
    hookpoint: str | None = None
    """The module of the base model that it reads, where its files say so clearly."""


class NeedsThreshold(UsageError):
    """A program can hold a coder only with a threshold for every latent, instead of its k."""


def coder_file(
    W_enc: Float[Tensor, "L D"],
    b_enc: Float[Tensor, " L"],
    W_dec: Float[Tensor, "L D_out"],
    b_dec: Float[Tensor, " D_out"],
    *,
    k: int,
    threshold: Float[Tensor, " L"] | None = None,
    one_level: bool = False,
    centred: bool,
    transcode: bool = False,
    W_skip: Float[Tensor, "D_out D"] | None = None,
    matryoshka: tuple[float, ...] = (),
    hookpoint: str | None = None,
) -> CoderFile:
    """A coder of another program: the `k` largest latents of a row, or those above thresholds.

    With thresholds `k` is how many are active in the mean, as far as it is known. `one_level`: they
    are one number that BatchTopK training found.

    An SAE here reads x - b_dec, and a transcoder x. Where the other program does not (`centred`
    says whether it reads x - b_dec), the same pre-activations come from b_enc + W_enc b_dec or
    b_enc - W_enc b_dec, which is computed in float32.
    """
    tensors = {"encoder.weight": W_enc, "encoder.bias": b_enc, "W_dec": W_dec, "b_dec": b_dec}
    if W_skip is not None:
        tensors["W_skip"] = W_skip
    folded = centred == transcode
    if folded or len({t.dtype for t in tensors.values()}) > 1:
        tensors = at_least_float32(tensors)
    if folded:
        W_enc, b_dec = tensors["encoder.weight"], tensors["b_dec"]
        shift = W_enc @ b_dec
        tensors["encoder.bias"] = tensors["encoder.bias"] + (-shift if centred else shift)
    with_threshold: Activation = "batchtopk" if one_level else "jumprelu"
    cfg = SparseCoderConfig(
        num_latents=len(W_enc),
        activation="topk" if threshold is None else with_threshold,
        k=k if threshold is None else min(k, len(W_enc)),
        normalize_decoder=has_unit_rows(W_dec),
        skip_connection=W_skip is not None,
        transcode=transcode,
        matryoshka=matryoshka,
    )
    if threshold is not None:
        tensors["threshold"] = threshold.float()
    plain = {name: t.contiguous() for name, t in tensors.items()}
    return CoderFile(cfg, W_enc.shape[1], W_dec.shape[1], plain, hookpoint)


def fold_b_dec(tensors: dict[str, Tensor], adds: bool) -> tuple[Float[Tensor, " L"], str]:
    """The encoder's bias with W_enc b_dec added or subtracted, and what that rounds, as a note."""
    W_enc, bias, b_dec = (tensors[n] for n in ("encoder.weight", "encoder.bias", "b_dec"))
    sign = 1 if adds else -1
    folded = bias + sign * (W_enc @ b_dec)
    exact = bias.double() + sign * (W_enc.double() @ b_dec.double())
    moved = float((folded - exact).abs().max())
    return folded, f"b_dec is folded into the encoder's bias, which is rounded by up to {moved:.1e}"


def has_unit_rows(W_dec: Float[Tensor, "L D"]) -> bool:
    """Whether every row of a decoder has unit norm, but for rounding."""
    norms = torch.linalg.vector_norm(W_dec.float(), dim=1)
    return bool(((norms - 1).abs() < _UNIT).all())


def at_least_float32(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of fewer bits than float32 in float32, which changes no number."""
    wide = {t.dtype: torch.promote_types(t.dtype, torch.float32) for t in tensors.values()}
    return {name: t.to(wide[t.dtype]) for name, t in tensors.items()}


def mean_l0(said: Any) -> int:
    """How many latents are active in the mean, where a file says it; else 1."""
    number = isinstance(said, (int, float)) and not isinstance(said, bool)
    return round(said) if number and 1 <= said < _TOO_LARGE else 1


def json_object(path: Path) -> dict[str, Any]:
    """What a JSON file says. Raises UsageError for one that is damaged, or no object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read ({error}): the file is damaged") from None
    if not isinstance(found, dict):
        raise UsageError(f"{path} is not a JSON object: the file is damaged")
    return found


def whole_number(path: Path, values: dict[str, Any], name: str) -> int:
    """A positive whole number that a file must give. Raises UsageError where it does not."""
    value = values.get(name)
    if type(value) is not int or not 0 < value < _TOO_LARGE:
        raise UsageError(f"{path}: {name} is {value!r}, not a number above 0")
    return value


def check_shapes(
    path: Path, shapes: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]
) -> None:
    """Raise UsageError unless a file's tensors have the names and shapes of a coder of its kind."""
    if shapes == expected:
        return
    lacking, extra = sorted(expected.keys() - shapes.keys()), sorted(shapes.keys() - expected)
    other = [n for n in expected if n in shapes and shapes[n] != expected[n]]
    found = [f"lacks {n}" for n in lacking] + [f"has {n}, which is unknown" for n in extra]
    found += [f"has {n} of shape {shapes[n]}, not {expected[n]}" for n in other]
    raise UsageError(f"{path} {', '.join(found)}: it is no coder of this kind, or damaged")


def positive_number(path: Path, name: str, value: Any) -> float:
    """A finite number above 0 that a file must give. Raises UsageError for anything else."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise UsageError(f"{path}: {name} is {value!r}, not a number above 0")
    return float(value)


def check_floats(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raise UsageError for tensors of other types than weights have, or with NaN or Inf in them.

    A threshold may be infinite: its latent never fires.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATS:
            raise UsageError(
                f"{path}: {name} holds {tensor.dtype}, not floating point of 16, 32 or 64 bits"
            )
        wrong = tensor.isnan() if "threshold" in name else ~tensor.isfinite()
        if bool(wrong.any()):
            raise UsageError(f"{path}: {name} holds NaN or Inf: the coder is of no use")

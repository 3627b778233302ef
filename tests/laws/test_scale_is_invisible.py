"""Law 8: the scale of a module's activations changes nothing but the units of what is learned.

Hookpoints of one run differ by orders of magnitude; no flag should have to know.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from sae import SparseCoder
from sae.flag_checks import from_flags
from train_sae import TrainConfig, train


class Rows(list):
    """Items that say what they are."""

    fingerprint = "rows"


def items(kind: str, x_scale: float, y_scale: float) -> Any:
    """40 items of 24 rows: 12 directions, three at a time, off the origin, with a linear map."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(12, 16, generator=generator)
    heads = torch.randn(16, 10, generator=generator)
    found = Rows()
    for _ in range(40):
        chosen = torch.rand(24, 12, generator=generator).topk(3).indices
        acts = torch.zeros(24, 12).scatter(1, chosen, 1 + torch.rand(24, 3, generator=generator))
        x = acts @ directions + 3
        pair = (x * x_scale, (x @ heads).relu() * y_scale)
        found.append({"site": x * x_scale if kind == "sae" else pair})
    return found


def trained(
    folder: Any, kind: str, optimizer: str, scales: tuple[float, float], **more: Any
) -> tuple[dict[str, float], SparseCoder]:
    flags: dict[str, Any] = {"save_dir": str(folder), "run_name": f"{scales}", "log_with": "none"}
    flags |= {"k": 3, "num_latents": 48, "batch_size": 4, "eval_tokens": 24, "steps_per_batch": 2}
    flags |= {"optimizer": optimizer, "dead_feature_threshold": 200, "multi_topk": True}
    if kind != "sae":
        flags |= {"transcode": True, "skip_connection": kind == "skip transcoder"}
    flags |= more
    summary = train(from_flags(TrainConfig, flags), activations=items(kind, *scales))
    figures = summary["hookpoints"]["site"]
    return figures, SparseCoder.load_from_disk(figures["path"])


@pytest.mark.parametrize("optimizer", ["adam", "signum", "muon", "soap"])
@pytest.mark.parametrize("kind", ["sae", "transcoder", "skip transcoder"])
def test_scaled_activations_make_the_same_coder(tmp_path: Any, kind: str, optimizer: str) -> None:
    """Times powers of two: the same figures bit for bit, and parameters in the new units."""
    plain, coder = trained(tmp_path, kind, optimizer, (1.0, 1.0))
    for x, y in ((2.0**-13, 2.0**-13), (2.0**9, 2.0**9), (2.0**-6, 2.0**5)):
        if kind == "sae" and x != y:
            continue
        figures, other = trained(tmp_path, kind, optimizer, (x, y))
        for name in ("fvu", "l0", "dead_share", "cosine"):
            assert figures[name] == pytest.approx(plain[name], rel=1e-6), (name, x, y)
        units = {"encoder.weight": y / x if kind != "sae" else 1.0, "W_dec": 1.0}
        units |= {"encoder.bias": y, "b_dec": y, "W_skip": y / x}
        for name, tensor in coder.named_parameters():
            expected: Tensor = tensor.detach() * units[name]
            assert torch.equal(dict(other.named_parameters())[name].detach(), expected), name


@pytest.mark.parametrize("kind", ["sae", "transcoder"])
@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu"])
def test_thresholds_are_in_the_unit_of_the_targets(
    tmp_path: Any, activation: str, kind: str
) -> None:
    """Learned or estimated: the same figures, and thresholds times what targets were multiplied by.

    So it is where they start, how fast they move, and what is near them.
    """
    flags = {"activation": activation, "multi_topk": False, "group_sequences": 2}
    plain, coder = trained(tmp_path, kind, "adam", (1.0, 1.0), **flags)
    scale = (2.0**-13, 2.0**-13) if kind == "sae" else (2.0**-6, 2.0**5)
    figures, other = trained(tmp_path, kind, "adam", scale, **flags)
    for name in ("fvu", "l0", "dead_share"):
        assert figures[name] == pytest.approx(plain[name], rel=1e-6), name
    for ours, theirs, unit in (
        (coder.threshold, other.threshold, scale[1]),
        (coder.encoder.weight, other.encoder.weight, scale[1] / scale[0]),
    ):
        assert torch.equal(theirs.detach(), ours.detach() * unit)
    assert coder.threshold.min() > 0 and figures["l0"] > 1


@pytest.mark.parametrize("optimizer", ["adam", "signum", "muon", "soap"])
def test_small_targets_are_learned(tmp_path: Any, optimizer: str) -> None:
    """A transcoder of targets of rms 1e-3 beside inputs of rms 5 explains most of them."""
    figures, _ = trained(tmp_path, "transcoder", optimizer, (1.0, 2.0**-14))
    assert figures["fvu"] < 0.9

"""How latents are mixed: every figure against one computed from whole matrices."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from command_runs import call
from torch import Tensor
from training_runs import Settings
from transformers import PreTrainedModel

from sae import SaeConfig, SparseCoder, TranscoderConfig
from sae.flag_checks import from_flags
from sae.judge.mixing import explained, firing_entropy, mixing, nearest_cosines
from sae.lm.capture import Capture
from train_sae import TrainConfig, train


def largest_of_others(W: Tensor) -> Tensor:
    cosines = F.cosine_similarity(W[:, None].double(), W[None].double(), dim=2)
    return cosines.fill_diagonal_(-2).amax(1)


@pytest.mark.parametrize("block", [1, 7, 64])
def test_nearest_cosines_are_those_of_the_whole_matrix(block: int) -> None:
    """In blocks of any size; of a sample, values of rows that are there."""
    W = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    W[7] = 3 * W[31]
    right = largest_of_others(W)
    found = nearest_cosines(W, block=block)
    torch.testing.assert_close(found.double(), right, rtol=1e-5, atol=1e-6)
    assert float(found[7]) == pytest.approx(1) == float(found[31])
    some = nearest_cosines(W, sample=9, block=block)
    assert len(some) == 9 and all(bool((right - value).abs().min() < 1e-5) for value in some)
    assert not len(nearest_cosines(W[:1])) and not len(nearest_cosines(W[:0]))


def test_no_matrix_of_all_pairs_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The products have as many rows as a block."""
    seen: list[tuple[int, ...]] = []
    scatter = Tensor.scatter_

    def noted(tensor: Tensor, *args: object) -> Tensor:
        seen.append(tuple(tensor.shape))
        return scatter(tensor, *args)  # type: ignore[call-overload]

    monkeypatch.setattr(Tensor, "scatter_", noted)
    nearest_cosines(torch.randn(50, 6), block=8)
    assert seen == [(8, 50)] * 6 + [(2, 50)]


def test_entropy_is_1_where_all_fire_alike() -> None:
    """And log n / log L where n of L latents do; 0 for one alone."""
    assert firing_entropy(torch.full((8,), 5.0)) == pytest.approx(1)
    few = torch.tensor([3.0, 3, 0, 0, 0, 0, 0, 0])
    assert firing_entropy(few) == pytest.approx(math.log(2) / math.log(8))
    assert firing_entropy(torch.tensor([0.0, 9, 0])) == pytest.approx(0)
    assert explained(0.2, 0.6) == pytest.approx(0.5) and explained(1.0, 1.5) is None


def test_only_latents_that_fire_count() -> None:
    """Dead rows are no copies; a transcoder's rows are of two spaces, so no cosine is taken."""
    coder = SparseCoder(6, SaeConfig(num_latents=20, k=2))
    assert coder.W_dec is not None
    coder.W_dec.data[3] = coder.W_dec.data[11]
    fired = torch.arange(20.0).where(torch.arange(20) != 11, 0)
    found, alive = mixing(coder, fired, 60.0), (fired > 0)
    right = largest_of_others(coder.W_dec.detach()[alive])
    assert found.nearest_cosine == pytest.approx(float(right.mean()), rel=1e-5)
    assert found.copies == pytest.approx(float((right > 0.9).double().mean()))
    assert sum(found.nearest_cosine_histogram) == 18
    assert found.dense_share == pytest.approx(12 / 20)  # more than 6 of 60 rows, and not 11
    of_transcoder = mixing(SparseCoder(6, TranscoderConfig(num_latents=20, k=2)), fired, 60.0)
    assert of_transcoder.alignment is None and of_transcoder.misaligned is None


def test_evaluate_says_how_latents_are_mixed(
    causal_lm: PreTrainedModel,
    tokens: Tensor,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every figure in the table and in the JSON, by whole matrices; not in a run's own figures."""
    causal_lm.save_pretrained(tmp_path / "lm")
    tokens.numpy().astype("uint16").tofile(tmp_path / "ids.bin")
    names = {"model": str(tmp_path / "lm"), "dataset": str(tmp_path / "ids.bin")}
    flags = {**settings, **names, "run_name": "r", "layers": (1,), "k": 10}
    summary = train(from_flags(TrainConfig, flags))
    assert summary["hookpoints"]["layers.1"]["mixing"] is None
    folder = Path(settings["save_dir"]) / "r"
    capsys.readouterr()
    assert call(monkeypatch, "evaluate", str(folder)) == 0
    line = capsys.readouterr().out.split("misaligned")[1].splitlines()[1].split()
    found = json.loads((folder / "eval.json").read_text())["coders"]["layers.1"]["mixing"]
    coder = SparseCoder.load_from_disk(folder / "step_20/layers.1")
    assert coder.W_dec is not None
    _, y = Capture(causal_lm, ["layers.1"])(tokens[:16])["layers.1"]
    with torch.no_grad():
        top_acts, top_indices = coder.encode(y)
    acts = torch.zeros(len(y), 128).scatter(1, top_indices, top_acts)
    W_dec, b_dec = coder.W_dec.detach(), coder.b_dec.detach()
    fired = (acts > 0).sum(0).double()
    alive, dense = fired > 0, fired > 0.1 * len(y)
    assert 0 < dense.sum() < 128
    nearest = largest_of_others(W_dec[alive])
    aligned = F.cosine_similarity(coder.encoder.weight.detach()[alive], W_dec[alive], dim=1)
    p = fired[alive] / fired.sum()
    variance = (y - y.mean(0)).double().square().sum()
    fvu, without = (
        float((y - acts * kept @ W_dec - b_dec).double().square().sum() / variance)
        for kept in (torch.ones(128), (~dense).float())
    )
    expected = {
        "nearest_cosine": float(nearest.mean()),
        "copies": float((nearest > 0.9).double().mean()),
        "alignment": float(aligned.double().mean()),
        "misaligned": float((aligned < 0.5).double().mean()),
        "firing_entropy": float(-(p * p.log()).sum() / math.log(128)),
        "dense_share": float(dense.double().mean()),
        "dense_explains": (without - fvu) / (1 - fvu),
    }
    bins = [0] * 20
    for cosine in nearest.clamp(0, 1).tolist():
        bins[min(19, int(cosine * 20))] += 1
    assert found.pop("nearest_cosine_histogram") == bins
    assert found == pytest.approx(expected, rel=1e-4)
    shown = [
        f"{v:.2%}" if n in ("copies", "misaligned") or "dense" in n else f"{v:.4f}"
        for n, v in found.items()
    ]
    assert line == ["layers.1", *shown]

"""Cross-layer transcoders: latents of a layer write to the layers ahead of it, too.

The right values are computed from the equations in float64, layer by layer.
"""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cross_layer_stack import (
    ALPHA,
    DEAD,
    NAMES,
    SCALES,
    Ahead,
    leaves,
    made,
    right_gradients,
    right_losses,
    rows_of,
    take_gradients,
)
from torch import Tensor

from sae import SparseCoder, UsageError, load_many
from sae.coders.across.cross_layer import CrossLayerTranscoder
from sae.coders.moments import Scale
from sae.config import KernelChoice
from sae.training.losses import auxiliary_loss, divide_gradients_


@pytest.mark.parametrize("ahead", [1, 2, "all"])
@pytest.mark.parametrize(("dtype", "choice"), [(torch.float64, "torch"), (torch.float32, "auto")])
@pytest.mark.parametrize("skip", [False, True])
def test_losses_and_gradients_equal_the_equations(
    dtype: torch.dtype, choice: KernelChoice, ahead: Ahead, skip: bool
) -> None:
    """Outputs of every layer, AuxK, and the gradient of every parameter; in pieces too."""
    bank = made(dtype, choice, ahead, skip_connection=skip)
    rows = [(x.to(dtype).double(), y.to(dtype).double()) for x, y in rows_of(0)]
    layers = leaves(bank)
    errors, aux, outs = right_losses(layers, rows, ahead)
    expected = right_gradients(layers, rows, ahead)
    found = take_gradients(bank, rows)
    ours = [t for one in found for t in one]
    right = [t for one in zip(errors, aux, outs, strict=True) for t in one]
    pairs: list[Any] = [*zip(ours, right, strict=True)]
    close = 1e-9 if dtype == torch.float64 else 2e-4
    for _ in range(2):
        for (_, coder), grads in zip(bank.items(), expected, strict=True):
            pairs += [(p.grad, grads[n]) for n, p in coder.named_parameters()]
        for mine, theirs in pairs:
            scale = float(theirs.detach().abs().max())
            torch.testing.assert_close(mine.double(), theirs, rtol=close, atol=close * scale)
        bank.zero_grad()
        take_gradients(bank, rows, pieces=3)
        pairs = []


def test_ten_steps_equal_the_equations() -> None:
    """Adam on FVU with AuxK, each parameter in its own unit; no decoder is normalized."""
    bank = made(torch.float64, "torch", "all")
    theirs = leaves(bank)
    ours = torch.optim.Adam(bank.parameters(), lr=0.01)
    right = torch.optim.Adam([p for layer in theirs for p in layer.values()], lr=0.01)
    for step in range(10):
        rows = rows_of(step)
        variances = [(y - y.mean(0)).square().sum() for _, y in rows]
        ours.zero_grad()
        take_gradients(bank, rows)
        for (_, coder), variance in zip(bank.items(), variances, strict=True):
            divide_gradients_(coder, variance)
        ours.step()

        for s, grads in enumerate(right_gradients(theirs, rows, "all")):
            units = {"encoder.weight": SCALES[s].y / SCALES[s].x, "W_dec": 1.0}
            units |= {f"W_from.{d}": SCALES[s].y / SCALES[s - d].y for d in range(1, s + 1)}
            for name, p in theirs[s].items():
                p.grad = grads[name] * units.get(name, SCALES[s].y) / variances[s]
        right.step()
    for (_, coder), layer in zip(bank.items(), theirs, strict=True):
        for name, parameter in coder.named_parameters():
            torch.testing.assert_close(parameter, layer[name])


def test_memory_is_that_of_one_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a layer's backward nothing as wide as its output is left, but the rows given."""
    bank = made(torch.float32, "torch", "all")
    rows = [(x[:, :6].float(), y.float()) for x, y in rows_of(0)]
    rows = [(x.repeat(3, 1)[:71], y.repeat(3, 1)[:71]) for x, y in rows]
    given = {id(y) for _, y in rows}

    def left() -> int:
        found = (t for t in gc.get_objects() if type(t) is Tensor and t.shape == (71, 5))
        return sum(id(t) not in given for t in found)

    for (_, coder), (x, y) in zip(bank.items(), rows, strict=True):
        found = coder.errors(x, y, DEAD)
        assert left() > 0
        (found.objective + auxiliary_loss(found, ALPHA)).backward()
        del found
        gc.collect()
        assert left() == 0


def test_a_backward_that_comes_too_late_is_an_error() -> None:
    """One backward for the losses of all layers would lose gradients: it is not done."""
    bank = made(torch.float32, "torch", 1)
    rows = [(x.float(), y.float()) for x, y in rows_of(0)]
    pairs = zip(bank.items(), rows, strict=True)
    losses = [coder.errors(x, y).objective for (_, coder), (x, y) in pairs]
    with pytest.raises(AssertionError, match="has its backward before the next's"):
        torch.stack(losses).sum().backward()


def test_files_hold_every_decoder(tmp_path: Path) -> None:
    """Coders from disk, given the same rows in the order of layers, do what they did in training.

    One alone, or out of order, says what is missing.
    """
    bank = made(torch.float64, "torch", 2)
    for name, coder in bank.items():
        coder.save_to_disk(tmp_path / "coders" / name)
    back = load_many(tmp_path / "coders")
    assert back[NAMES[3]].cfg.sources == tuple(NAMES[1:3])
    assert back[NAMES[0]].cfg.targets == tuple(NAMES[1:3])
    rows = rows_of(0)
    for name, (x, y) in zip(NAMES, rows, strict=True):
        expected, found = bank[name](x, y), back[name](x, y)
        assert torch.equal(found.sae_out, expected.sae_out) and torch.equal(found.fvu, expected.fvu)
    with pytest.raises(UsageError, match="take the same rows, one after the other in the order"):
        back[NAMES[1]](*rows[1])
    for name, (x, y) in zip(NAMES[:1] * 3 + NAMES[1:2], [rows_of(1)[0]] * 2 + rows, strict=False):
        found = back[name](x, y)  # only what the layer before left last is read
    bank[NAMES[0]](*rows[0])
    assert torch.equal(found.sae_out, bank[NAMES[1]](*rows[1]).sae_out)
    alone = SparseCoder.load_from_disk(tmp_path / "coders" / NAMES[1])
    linked = back[NAMES[1]].encode(rows[1][0]).top_acts
    assert torch.equal(alone.encode(rows[1][0]).top_acts, linked)
    with pytest.raises(UsageError, match="goes with those of layers.0.mlp"):
        alone(*rows[1])
    without = SparseCoder.load_from_disk(tmp_path / "coders" / NAMES[1], decoder=False)
    assert isinstance(without, CrossLayerTranscoder) and not len(without.W_from)
    said = json.loads((tmp_path / "coders" / NAMES[2] / "cfg.json").read_text())
    said["sources"] = said["sources"][:1]
    (tmp_path / "coders" / NAMES[2] / "cfg.json").write_text(json.dumps(said))
    with pytest.raises(UsageError, match="W_from.2"):
        load_many(tmp_path / "coders")


def test_a_start_from_trained_coders_is_the_same_function(tmp_path: Path) -> None:
    """--finetune where the first batch has other rms: weights are plain, whatever the scale."""
    bank = made(torch.float32, "torch", "all")
    for name, coder in bank.items():
        coder.save_to_disk(tmp_path / name)
    other = made(torch.float32, "torch", "all")
    for i, (_, coder) in enumerate(other.items()):
        coder.scale = Scale(1.0, 2.0**i)
    other.load_pretrained(str(tmp_path))
    other.normalize_decoders_()
    for name, (x, y) in zip(NAMES, rows_of(0), strict=True):
        x, y = x.float(), y.float()
        assert torch.equal(other[name](x, y).sae_out, bank[name](x, y).sae_out)

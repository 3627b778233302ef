"""Law 1: FVU divides by the variance of all rows of a step, whatever pieces they come in.

Gradients of squared errors and moments of targets are summed over pieces, forwards and ranks, and
divided once. (Ranks: test_placement_is_invisible.py.)
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_runs import LOSSES, Settings, first_batches, run, scalars, weights
from transformers import PreTrainedModel

from sae.coders.bank import CoderBank
from sae.coders.moments import Moments
from sae.coders.sparse_coder import SparseCoder
from sae.flag_checks import from_flags
from sae.lm.capture import Capture, measure_widths
from sae.training.losses import divide_gradients_
from train_sae import TrainConfig

PIECES = {
    "accumulated": {"batch_size": 2, "grad_acc_steps": 4},
    "micro": {"micro_acc_steps": 3},
    "both": {"batch_size": 4, "grad_acc_steps": 2, "micro_acc_steps": 2},
}


@pytest.mark.parametrize(
    ("optimizer", "dealt"), [("adam", 1), ("muon", 1), ("soap", 1), ("adam", 4)]
)
def test_accumulated_and_micro_batched_steps_equal_whole_ones(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings, optimizer: str, dealt: int
) -> None:
    """Accumulated = micro-batched = whole, for all losses, over a whole trajectory.

    So it is with batches that are dealt to several steps.
    """
    flags = {**LOSSES, "optimizer": optimizer, "layers": (0, 2), "exclude_tokens": (5,)}
    flags |= {"steps_per_batch": dealt, "max_examples": 160 // dealt}
    whole = run(lm, tokens, settings, run_name="whole", **flags)
    for name, shape in PIECES.items():
        other = run(lm, tokens, settings, run_name=name, **flags, **shape)
        assert other["step"] == whole["step"] == 20
        assert other["tokens"] == whole["tokens"]
        for hookpoint, figures in other["hookpoints"].items():
            # Muon orthogonalizes in bfloat16, which turns rounding into visible differences.
            close = {"rel": 1e-5} if optimizer == "adam" else {"rel": 1e-2}
            assert figures["fvu"] == pytest.approx(whole["hookpoints"][hookpoint]["fvu"], **close)
        for key, tensor in weights(other).items() if optimizer == "adam" else ():
            torch.testing.assert_close(tensor, weights(whole)[key], rtol=2e-3, atol=2e-4)


@pytest.mark.parametrize("loss_fn", ["ce", "kl"])
def test_end_to_end_steps_in_pieces_equal_whole_ones(
    causal_lm: PreTrainedModel, tokens: Tensor, settings: Settings, loss_fn: str
) -> None:
    """Accumulated = whole, with AuxK and Multi-TopK added, excluded tokens, several hookpoints."""
    flags = {
        **{"loss_fn": loss_fn, "layers": (0, 2), "optimizer": "adam", "exclude_tokens": (5,)},
        **{**LOSSES, "lr": 1e-3},
    }
    whole = run(causal_lm, tokens, settings, run_name="whole", **flags)
    for name in ("accumulated", "both"):
        pieces = run(causal_lm, tokens, settings, run_name=name, **flags, **PIECES[name])
        assert pieces["step"] == whole["step"] and pieces["tokens"] == whole["tokens"]
        for key, tensor in weights(pieces).items():
            torch.testing.assert_close(tensor, weights(whole)[key], rtol=2e-3, atol=2e-4)


def untrained(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings, **flags: Any
) -> tuple[SparseCoder, Tensor]:
    """The coder at layers.1 as a run starts it, and all target rows of the first step."""
    _, y = Capture(lm, ["layers.1"])(tokens)["layers.1"]
    cfg = from_flags(TrainConfig, {**settings, **flags})
    coder = CoderBank(measure_widths(lm, ["layers.1"]), cfg.coder, (0,), "cpu")["layers.1"]
    mean = Moments.of(y).mean
    coder.center_(mean, mean)
    return coder, y


def test_first_logged_step_is_the_definition_over_all_its_rows(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings
) -> None:
    """FVU and gradient norm of a step in six pieces equal those of all its rows at once."""
    flags = {"batch_size": 4, "grad_acc_steps": 3, "micro_acc_steps": 2, "layers": (1,)}
    flags |= {"rms_units": False}
    run(lm, tokens, settings, run_name="r", log_with="tensorboard", multi_topk=True, **flags)
    logged = scalars(Path(settings["save_dir"]) / "r")
    coder, y = untrained(lm, first_batches(tokens, 12), settings, multi_topk=True)
    out = coder(y)
    (out.fvu + out.multi_topk_fvu / 8).backward()
    norm = divide_gradients_(coder, torch.tensor(1.0))
    for name, expected in (
        ("fvu", out.fvu),
        ("multi_topk_fvu", out.multi_topk_fvu),
        ("grad_norm", norm),
    ):
        first = logged[f"{name}/layers.1"][0][1]
        assert first == pytest.approx(expected.item(), rel=1e-4), name


@pytest.mark.parametrize("loss_fn", ["ce", "kl"])
def test_first_logged_end_to_end_loss_is_the_definition_over_all_positions(
    causal_lm: PreTrainedModel, tokens: Tensor, settings: Settings, loss_fn: str
) -> None:
    """CE and KL of a step in three pieces are means over all its positions, FVU over all rows."""
    flags = {"batch_size": 4, "grad_acc_steps": 3, "layers": (1,), "loss_fn": loss_fn}
    run(causal_lm, tokens, settings, run_name="r", log_with="tensorboard", **flags)
    logged = scalars(Path(settings["save_dir"]) / "r")
    blocks = first_batches(tokens, 12)
    coder, y = untrained(causal_lm, blocks, settings)

    def reconstructed(_: Any, __: Any, output: Any) -> Any:
        y = output[0] if isinstance(output, tuple) else output
        out = coder(y).sae_out
        return (out, *output[1:]) if isinstance(output, tuple) else out

    with torch.no_grad():
        clean = causal_lm(blocks).logits.log_softmax(-1)
        handle = causal_lm.base_model.layers[1].register_forward_hook(reconstructed)
        spliced = causal_lm(blocks).logits.log_softmax(-1)
        handle.remove()
        next_tokens = blocks[:, 1:].unsqueeze(-1)
        expected = {
            "ce": -spliced[:, :-1].gather(-1, next_tokens).mean(),
            "kl": (clean.exp() * (clean - spliced)).sum(-1).mean(),
        }[loss_fn]
        fvu = coder(y).fvu
    assert logged[loss_fn][0][1] == pytest.approx(expected.item(), rel=1e-4)
    assert logged["fvu/layers.1"][0][1] == pytest.approx(fvu.item(), rel=1e-4)

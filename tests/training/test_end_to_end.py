"""Training on the LM's own loss: all coders learn, the LM does not."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from training_runs import Settings, assert_identical, run, scalars, weights
from transformers import PreTrainedModel

from sae import TranscoderConfig, UsageError
from sae.batch import TokenBatch
from sae.coders.bank import CoderBank
from sae.config import TrainingConfig, Widths
from sae.flag_checks import from_flags
from sae.lm.capture import Capture
from sae.lm.rows import RowRule
from sae.training.end_to_end import EndToEnd
from sae.training.step_sums import StepSums
from train_sae import TrainConfig


@pytest.mark.parametrize("loss_fn", ["ce", "kl"])
@pytest.mark.parametrize("transcode", [False, True])
def test_every_coder_parameter_learns_from_the_lms_own_loss(
    causal_lm: PreTrainedModel,
    tokens: Tensor,
    settings: Settings,
    loss_fn: str,
    transcode: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every coder parameter gets a gradient, no LM parameter does, and the loss falls."""
    reached: set[str] = set()
    losses: list[float] = []
    combine = EndToEnd.combine_gradients_

    def spy(self: EndToEnd, sums: StepSums) -> None:
        losses.append(float(sums.mean_lm_loss()))
        combine(self, sums)
        for name, parameter in self.bank.named_parameters():
            if parameter.grad is not None and parameter.grad.count_nonzero():
                reached.add(name)
        assert all(p.grad is None for p in self.lm.parameters())

    monkeypatch.setattr(EndToEnd, "combine_gradients_", spy)
    hookpoints = ("layers.0.mlp", "layers.2.mlp") if transcode else ("layers.0", "layers.2")
    flags = {
        **{"loss_fn": loss_fn, "hookpoints": hookpoints, "transcode": transcode},
        **{"skip_connection": transcode, "lr": 3e-3, "lr_decay": 1.0, "encoder_lr": 1.0},
        **{
            "adam_beta1": 0.9,
            "adam_beta2": 0.999,
            "rms_units": False,
            "auxk_alpha": 0.0,
            "wake_alpha": 0.0,
        },
    }
    before = {n: p.clone() for n, p in causal_lm.named_parameters()}
    if loss_fn == "ce":  # something to learn: which tokens there are at all
        tokens = tokens % 8
    run(causal_lm, tokens, settings, run_name="r", **flags)
    per_coder = {"encoder.weight", "encoder.bias", "W_dec", "b_dec"}
    per_coder |= {"W_skip"} if transcode else set()
    assert len(reached) == 2 * len(per_coder)
    assert sum(losses[-3:]) < sum(losses[:3]) and min(losses) > 0
    assert_identical(before, dict(causal_lm.named_parameters()))


@pytest.mark.parametrize("excluded", [(), (3,)])
def test_what_ranks_sum_does_not_depend_on_their_batches(
    causal_lm: PreTrainedModel, tokens: Tensor, excluded: tuple[int, ...]
) -> None:
    """With and without an excluded token in the batch, a rank has tensors of the same shapes."""
    hookpoint, cfg = "layers.1.mlp", TranscoderConfig(num_latents=64, k=4)
    bank = CoderBank({hookpoint: Widths(32, 32)}, cfg, (0,), "cpu")
    capture = Capture(causal_lm, [hookpoint], RowRule(excluded))
    # AuxK would need the rows that modules give whatever the batch holds.
    training = TrainingConfig(loss_fn="ce", auxk_alpha=0.0, wake_alpha=0.0)
    end_to_end = EndToEnd(capture, bank, training, masked=False)
    without, having = tokens[:2].where(tokens[:2] != 3, 4), tokens[:2].clone()
    having[0, 5] = 3
    found: list[StepSums] = []
    for batches in ([without], [having], [without, having]):
        found.append(StepSums(bank))
        for batch in batches:
            end_to_end.backward(TokenBatch(batch), found[-1], {hookpoint: None}, {hookpoint: 4})
    shapes = [[(t.shape, t.dtype) for t in sums.tensors()] for sums in found]
    assert shapes[0] == shapes[1] == shapes[2]
    if not excluded:
        return
    # Accumulated, the denominator is of all rows that the step saw.
    _, y = Capture(causal_lm, [hookpoint])(torch.cat([without, having]))[hookpoint]
    y = y[(torch.cat([without, having]) != 3).flatten()].double()
    expected = (y - y.mean(0)).square().sum()
    torch.testing.assert_close(found[2].variance(hookpoint), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("loss_fn", ["ce", "kl"])
def test_padding_in_some_forwards_changes_no_number(
    causal_lm: PreTrainedModel, tokens: Tensor, settings: Settings, loss_fn: str
) -> None:
    """Forwards without padding make the sums of those with it: one forward equals four."""
    mask = [[1] * 11 + [0] * 5 if i % 4 == 0 else [1] * 16 for i in range(len(tokens))]
    data = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": mask})
    flags = {"hookpoints": ("layers.1.mlp",), "transcode": True, "loss_fn": loss_fn}
    flags |= {"max_examples": 32, "auxk_alpha": 0, "multi_topk": False, "eval_tokens": 256}
    flags |= {"log_with": "tensorboard", "log_every": 1}
    whole, parts = (
        run(causal_lm, data, {**settings, **how}, run_name=name, **flags)
        for name, how in (
            ("whole", {"batch_size": 4}),
            ("parts", {"batch_size": 1, "grad_acc_steps": 4}),
        )
    )
    found, expected = weights(parts), weights(whole)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-4)
    curves = [
        scalars(Path(settings["save_dir"]) / n)["fvu/layers.1.mlp"] for n in ("whole", "parts")
    ]
    assert [v for _, v in curves[1]] == pytest.approx([v for _, v in curves[0]], rel=1e-4)


def test_what_cannot_train_end_to_end_is_refused(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings
) -> None:
    """Owners, several seeds, and an LM without a head are refused with the reason."""
    with pytest.raises(UsageError, match="--distribute_modules True: with --loss_fn kl .*drop it"):
        from_flags(TrainConfig, {"loss_fn": "kl", "distribute_modules": True})
    with pytest.raises(UsageError, match="--init_seeds .*one coder per hookpoint"):
        from_flags(TrainConfig, {"loss_fn": "ce", "init_seeds": (0, 1)})
    with pytest.raises(UsageError, match="--loss_fn.*LlamaModel has no head"):
        run(lm, tokens, settings, run_name="r", loss_fn="ce")

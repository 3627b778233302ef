"""Training on the LM's own loss: all coders learn, the LM does not."""

import pytest
from torch import Tensor
from training_runs import Settings, assert_identical, run
from transformers import PreTrainedModel

from sae import UsageError
from sae.flag_checks import from_flags
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
        **{"skip_connection": transcode, "optimizer": "adam", "lr": 3e-3},
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

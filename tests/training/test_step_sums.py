"""The sums of a step add over pieces, and divide by nothing but the variance of all of them."""

import pytest
import torch

from sae import SaeConfig
from sae.coders.bank import CoderBank
from sae.coders.outputs import CoderErrors
from sae.config import Widths
from sae.training.step_sums import StepSums


def errors(acts: list[list[float]], indices: list[list[int]], *losses: float) -> CoderErrors:
    """Errors of a coder with these active latents."""
    numbers = (torch.tensor(loss) for loss in losses or (0.0, 0.0, 0.0))
    return CoderErrors(torch.zeros(0), torch.tensor(acts), torch.tensor(indices), *numbers)


@pytest.fixture
def bank() -> CoderBank:
    return CoderBank({"h": Widths(3, 3)}, SaeConfig(num_latents=4, k=2), (0, 1), "cpu")


def test_only_activations_above_zero_are_counted(bank: CoderBank) -> None:
    """A latent that was selected with an activation of 0 has not fired."""
    sums = StepSums(bank)
    sums.add("h.seed0", errors([[1.0, 0.0], [2.0, 0.5]], [[0, 1], [0, 2]]))
    sums.add("h.seed0", errors([[0.0, 0.0]], [[1, 3]]))
    assert sums.fired["h.seed0"].tolist() == [2, 0, 1, 0]
    assert sums.fired["h.seed1"].tolist() == [0, 0, 0, 0]


def test_losses_are_sums_over_the_variance_of_all_rows(bank: CoderBank) -> None:
    """Errors and targets of two pieces give the losses of both; without targets there are none."""
    sums, y = StepSums(bank), torch.randn(10, 3) + 5
    assert sums.losses("h.seed0") == {} and sums.variance("h.seed0") == 1
    for piece, scale in zip(y.split(7), (1, 2), strict=True):
        sums.add_rows("h", piece, piece)
        sums.add("h.seed0", errors([[1.0]], [[0]], 2.0 * scale, 4.0 * scale, 8.0 * scale))
    variance = float((y - y.mean(0)).double().square().sum())
    assert float(sums.variance("h.seed0")) == pytest.approx(variance, rel=1e-6)
    found = {name: float(value) for name, value in sums.losses("h.seed0").items()}
    inputs = sums.inputs("h.seed0")
    assert inputs is not None
    torch.testing.assert_close(inputs.total, y.sum(0).double())
    expected = {"fvu": 6, "auxk": 12, "multi_topk_fvu": 24}
    assert found == {
        f"{name}/h.seed0": pytest.approx(total / variance, rel=1e-6)
        for name, total in expected.items()
    }


def test_what_a_transcoder_reads_is_counted_beside_what_it_predicts(bank: CoderBank) -> None:
    """Inputs have moments of their own, which sum over ranks; before rows come there are none."""
    sums, x, y = StepSums(bank), torch.randn(10, 5) + 3, torch.randn(10, 3)
    assert sums.inputs("h.seed0") is None
    for part_x, part_y in zip(x.split(7), y.split(7), strict=True):
        sums.add_rows("h", part_x, part_y)
    for tensor in sums.tensors():
        tensor *= 2  # two ranks with the same rows
    inputs = sums.inputs("h.seed0")
    assert inputs is not None and inputs.count == 20
    torch.testing.assert_close(inputs.total, 2 * x.sum(0).double())
    variance = 2 * (y - y.mean(0)).double().square().sum()
    torch.testing.assert_close(sums.variance("h.seed0"), variance, rtol=1e-6, atol=0)

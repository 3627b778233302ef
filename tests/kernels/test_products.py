"""Products and sums whose size or precision only a GPU meets."""

import pytest
import torch

from sae.kernels import dense_products, sparse_products
from sae.kernels.twins import Kernels


def test_sums_of_squares_take_any_number_of_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.dot gets no more at once than it takes, and no element is left out."""
    taken: list[int] = []

    def dot(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        taken.append(len(one))
        return (one * other).sum()

    monkeypatch.setattr(sparse_products, "_DOT", 16)
    monkeypatch.setattr(torch, "dot", dot)
    rows = torch.arange(55.0).view(5, 11)
    assert sparse_products.square_sum(rows) == rows.square().sum()
    assert max(taken) <= 16 and sum(taken) == 55


class OnGpu(torch.Tensor):
    """A tensor that says that it is on a GPU."""

    @property
    def is_cuda(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return True


def test_a_skip_connection_is_multiplied_in_the_precision_of_the_encoder(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On CUDA W_skip's product and its gradients have factors in bfloat16; elsewhere none has."""

    def wide_product(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return one.as_subclass(torch.Tensor).float() @ other.as_subclass(torch.Tensor).float()

    monkeypatch.setattr(dense_products, "wide_product", wide_product)  # cuBLAS has no other here
    g = torch.Generator().manual_seed(0)
    x, W, grad = (torch.randn(*shape, generator=g) for shape in ((9, 40), (7, 40), (9, 7)))
    rounded = [t.bfloat16().double() for t in (x, W, grad)]
    for data, (rows, weights, above) in (
        (x, [t.double() for t in (x, W, grad)]),
        (x.as_subclass(OnGpu), rounded),
    ):
        leaf = W.clone().requires_grad_()
        found = Kernels().linear(data, leaf, torch.bfloat16).as_subclass(torch.Tensor)
        found.backward(grad)
        assert leaf.grad is not None and found.dtype == leaf.grad.dtype == torch.float32
        close = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(found.double(), rows @ weights.mT, **close)
        torch.testing.assert_close(leaf.grad.double(), above.mT @ rows, **close)

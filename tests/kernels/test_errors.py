"""Errors, their gradients, and AuxK's products, by entries and dense."""

import pytest
import torch
from kernel_cases import leaves, losses_and_gradients

from sae.coders import functional
from sae.config import KernelChoice
from sae.kernels import dense_products, sparse_products
from sae.kernels.twins import Kernels

BOTH = pytest.mark.parametrize("choice", ["torch", "auto"])


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("offset_by_row", [False, True])
@pytest.mark.parametrize("through_out", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_errors_and_their_gradients_equal_the_definitions(
    alone: bool, through_out: bool, offset_by_row: bool, dtype: torch.dtype, choice: KernelChoice
) -> None:
    """FVU's and both AuxK errors, one offset or one per row, with or without a loss of sae_out."""
    tensors = [t.to(dtype) for t in leaves(37, 13, 67)]
    arguments = (tensors, 5, torch.arange(0, 67, 3), 6, "cpu", offset_by_row, through_out, alone)
    plain = losses_and_gradients(functional, *arguments)
    fast = losses_and_gradients(Kernels(choice), *arguments)
    close = 1e-9 if dtype == torch.float64 else 2e-4
    for ours, expected in zip(fast, plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=close, atol=close)


def test_the_error_has_one_gradient() -> None:
    """Its backward runs in place, so a second one is an error, not a wrong number."""
    latents, W = Kernels.Latents(torch.ones(3, 1), torch.zeros(3, 1).long()), torch.randn(4, 5)
    W.requires_grad_()
    found = Kernels().reconstruct(latents, W, torch.zeros(5), torch.randn(3, 5))
    found.squared_error.backward(retain_graph=True)
    with pytest.raises(AssertionError, match="taken once"):
        found.squared_error.backward()


@pytest.mark.parametrize("shared", [False, True])
def test_dense_products_equal_sums_of_entries(shared: bool) -> None:
    """Of latents that may all be active, every product is that of their entries."""
    g = torch.Generator().manual_seed(0)
    latents, acts = torch.tensor([1, 2, 5, 8]), torch.rand(7, 4, generator=g)
    rows, table = torch.randn(7, 5, generator=g), torch.randn(10, 5, generator=g)
    add_to = torch.randn(10, 5, generator=g) if shared else None
    dense = dense_products.AllOf(latents, 10, torch.float32)
    sparse = sparse_products.ByLatent(Kernels("torch").backend, latents.repeat(7, 1), 10)
    padded = torch.zeros(7, dense.padded(4))
    padded[:, :4] = acts
    found = [
        [
            which.weighted_rows(a, table),
            which.sampled_product(rows, table)[:, :4],
            which.sum(which.sort(a)),
            which.of_entries(table[:, 0]).expand(7, -1)[:, :4],
            which.sum_rows(which.sort(a), rows, None if add_to is None else add_to.clone()),
        ]
        for which, a in ((dense, padded), (sparse, acts))
    ]
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected)

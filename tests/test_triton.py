"""The Triton kernels compute what the definitions say: on CUDA, or in Triton's interpreter."""

import importlib.util
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from test_kernels import SHAPES, leaves

from sae import backend, functional, kernels, sparse_sums, updates

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs tests/requirements.txt"
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def triton_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The kernels, cutting long sums into pieces of 8 and rows into blocks of 16 columns.

    What they do not write is NaN.
    """
    from sae import triton_kernels as module

    monkeypatch.setattr(sparse_sums, "_triton", lambda device: module)
    monkeypatch.setattr(module, "_LONG", 8)
    monkeypatch.setattr(module, "_BLOCK", 16)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    yield module
    torch.use_deterministic_algorithms(False)


def through(ops: ModuleType, tensors: list[torch.Tensor], k: int, activation: str) -> list:
    """The reconstruction, and the gradient of every input."""
    moved = [t.detach().to(DEVICE).requires_grad_() for t in tensors]
    x, W_enc, b_enc, W_dec, pre_bias = moved
    acts, indices = ops.encode(x, W_enc, b_enc, k, activation, pre_bias)
    out = ops.decode(acts, indices, W_dec)
    scale = torch.arange(out.numel(), dtype=out.dtype, device=DEVICE).view_as(out).cos()
    ((out * scale).sum() + acts.pow(2).sum()).backward()
    return [out.detach(), *(t.grad for t in moved)]


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] < 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_twins_agree(triton_kernels: ModuleType, shape: tuple, dtype: torch.dtype) -> None:
    """Outputs and every gradient equal the plain definition's, at odd shapes, with no NaN left."""
    n, d, latents, k, activation = shape
    tensors = [t.to(dtype) for t in leaves(n, d, latents)]
    close = 1e-9 if dtype == torch.float64 else 2e-4
    plain, fast = (through(ops, tensors, k, activation) for ops in (functional, kernels))
    for ours, expected in zip(fast, plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=close, atol=close)


def test_sums_by_hand(triton_kernels: ModuleType) -> None:
    """Latents in no entry, in few, in many, and twice in a row sum to what they should."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, 9, (60, 5), generator=generator)
    indices[indices == 4] = 3  # 4 is never active, 3 twice in some rows
    indices[:, 0] = 7  # in every row: 60 entries and more
    weights = torch.randn(60, 5, generator=generator)
    rows, table = torch.randn(60, 37, generator=generator), torch.randn(9, 37, generator=generator)
    order = sparse_sums.ByLatent(indices.to(DEVICE), 9)
    in_order = order.sort(weights.to(DEVICE))
    ours = triton_kernels.sum_by_latent(
        in_order, order.rows, order.starts, order.counts, rows.to(DEVICE)
    )
    expected = torch.zeros(9, 37, dtype=torch.float64)
    products = weights.double()[:, :, None] * rows.double()[:, None, :]
    expected.index_add_(0, indices.flatten(), products.flatten(0, 1))
    torch.testing.assert_close(ours.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours[4].cpu(), torch.zeros(37))
    again = triton_kernels.sum_by_latent(
        in_order, order.rows, order.starts, order.counts, rows.to(DEVICE)
    )
    assert torch.equal(ours, again)
    ours = triton_kernels.weighted_rows(weights.to(DEVICE), indices.to(DEVICE), table.to(DEVICE))
    torch.testing.assert_close(ours.cpu(), functional.decode(weights, indices, table))
    ours = triton_kernels.sampled_product(rows.to(DEVICE), table.to(DEVICE), indices.to(DEVICE))
    torch.testing.assert_close(ours.cpu(), (rows[:, None] * table[indices]).sum(2))


@pytest.mark.parametrize("width", [1, 7, 16, 40, 100])
def test_updates_are_those_of_pytorch(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, steps and unit norms in Triton, over one block of columns and over many."""
    from sae import triton_updates

    monkeypatch.setattr(triton_updates, "_BLOCK", 16)
    monkeypatch.setattr(backend, "_choice", "torch")
    generator = torch.Generator().manual_seed(width)
    scale = torch.tensor(0.3, device=DEVICE)
    for shape in ((9, width), (width,)):
        y, z, grad = (torch.randn(shape, generator=generator).to(DEVICE) for _ in range(3))
        grad[..., 0] = 0.0
        y[0] = z[0] = 0.0
        found = []
        for module in (None, triton_updates):
            monkeypatch.setattr(updates, "_triton", lambda tensor, module=module: module)
            own = [t.clone() for t in (y, z, grad)]
            matrix = y.ndim == 2
            if matrix:
                updates.normalize_rows_(own[0])
            square = updates.finish_gradient_(own[2], scale, own[0] if matrix else None)
            updates.signum_step_(*own, 0.1, 0.95, 0.25, unit_norm=matrix)
            found.append([*own, square])
        for plain, ours in zip(*found, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
        if y.ndim == 2:
            assert found[1][0].norm(dim=1)[1:].sub(1).abs().max() < 1e-5

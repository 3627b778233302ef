"""The Triton kernels compute what the definitions say: on CUDA, or in Triton's interpreter."""

import importlib.util
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from kernel_cases import (
    SHAPES,
    UPDATED_SHAPES,
    leaves,
    losses_and_gradients,
    outputs_and_gradients,
    update_inputs,
    updated,
)

from sae.coders import functional
from sae.kernels import dense_products, selection, sparse_products, updates
from sae.kernels.backend import Backend
from sae.kernels.entries import Entries
from sae.kernels.twins import Kernels

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs tests/requirements.txt"
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def of_dtype(module: ModuleType, W: torch.Tensor) -> ModuleType | None:
    return module if W.dtype in module.DTYPES else None


@pytest.fixture
def triton_products(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The sparse products in Triton, also on the CPU, where every backend now takes them.

    Long sums are cut into pieces of 8 and rows into blocks of 16 columns. What the kernels do not
    write is NaN.
    """
    from sae.kernels.cuda import selection as largest
    from sae.kernels.cuda import sparse_products as module

    monkeypatch.setattr(sparse_products, "_triton", lambda backend, device: module)
    monkeypatch.setattr(module, "_LONG", 8)
    monkeypatch.setattr(module, "_BLOCK", 16)
    monkeypatch.setattr(module, "_TILE", 64)
    monkeypatch.setattr(selection, "_triton", lambda backend, W: of_dtype(largest, W))
    monkeypatch.setattr(largest, "_BLOCK", 64)
    monkeypatch.setattr(largest, "_TILE", 64)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    yield module
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] < 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_products_equal_their_definitions(
    triton_products: ModuleType, shape: tuple, dtype: torch.dtype
) -> None:
    """Outputs and every gradient equal the definition's, at odd shapes, with no NaN left."""
    n, d, latents, k, activation = shape
    tensors = [t.to(dtype) for t in leaves(n, d, latents)]
    close = 1e-9 if dtype == torch.float64 else 2e-4
    plain, fast = (
        outputs_and_gradients(ops, tensors, k, activation, DEVICE)
        for ops in (functional, Kernels())
    )
    for ours, expected in zip(fast, plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=close, atol=close)


def test_sums_equal_those_of_index_add(triton_products: ModuleType) -> None:
    """Latents in no entry, in few, in many, and twice in a row sum to what they should."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, 9, (60, 5), generator=generator)
    indices[indices == 4] = 3  # 4 is never active, 3 twice in some rows
    indices[:, 0] = 7  # in every row: 60 entries and more
    weights = torch.randn(60, 5, generator=generator)
    rows, table = torch.randn(60, 37, generator=generator), torch.randn(9, 37, generator=generator)
    by_latent = sparse_products.ByLatent(Backend(), indices.to(DEVICE), 9)
    in_order = by_latent.sort(weights.to(DEVICE))
    starts, _, entry_rows = by_latent._sorted
    arguments = (in_order, entry_rows, starts, by_latent._counts, by_latent._pieces)
    ours = triton_products.sum_by_latent(*arguments, rows.to(DEVICE))
    expected = torch.zeros(9, 37, dtype=torch.float64)
    products = weights.double()[:, :, None] * rows.double()[:, None, :]
    expected.index_add_(0, indices.flatten(), products.flatten(0, 1))
    torch.testing.assert_close(ours.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours[4].cpu(), torch.zeros(37))
    again = triton_products.sum_by_latent(*arguments, rows.to(DEVICE))
    assert torch.equal(ours, again)
    more = triton_products.sum_by_latent(*arguments, rows.to(DEVICE), again)
    torch.testing.assert_close(more.cpu().double(), 2 * expected, rtol=1e-5, atol=1e-5)
    ours = triton_products.weighted_rows(weights.to(DEVICE), indices.to(DEVICE), table.to(DEVICE))
    plain = functional.decode(functional.Latents(weights, indices), table)
    torch.testing.assert_close(ours.cpu(), plain)
    ours = triton_products.sampled_product(rows.to(DEVICE), table.to(DEVICE), indices.to(DEVICE))
    torch.testing.assert_close(ours.cpu(), (rows[:, None] * table[indices]).sum(2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[3, 0, 20, 1, 9, 0], [0, 0], [17], [8, 9]])
def test_products_of_entries_equal_their_definitions(
    triton_products: ModuleType, lengths: list[int], dtype: torch.dtype
) -> None:
    """Rows of no entry, of few, and of so many that their sum is cut into pieces."""
    generator = torch.Generator().manual_seed(0)
    count, starts = sum(lengths), torch.tensor([0, *lengths]).cumsum(0)
    indices = torch.randint(0, 9, (count,), generator=generator)
    shapes = [(count,), (9, 37), (len(lengths), 37)]
    given = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    entries = Entries(Backend(), indices.to(DEVICE), starts.to(DEVICE), 9)
    weights, table, rows = (t.to(DEVICE) for t in given)
    summed, products = entries.weighted_rows(weights, table), entries.sampled_product(rows, table)
    assert (summed.dtype, products.dtype) == (dtype, dtype)
    weights, table, rows = (t.double() for t in given)
    of_row = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    out = torch.zeros(len(lengths), 37).double()
    out.index_add_(0, of_row, weights[:, None] * table[indices])
    close = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(summed.cpu().double(), out, rtol=close, atol=close)
    out = (rows[of_row] * table[indices]).sum(1)
    torch.testing.assert_close(products.cpu().double(), out, rtol=close, atol=close)


@pytest.mark.parametrize("shape", UPDATED_SHAPES)
def test_updates_equal_their_definitions(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients, steps and unit norms in Triton, over one block of columns and over many."""
    from sae.kernels.cuda import updates as module

    monkeypatch.setattr(module, "_BLOCK", 16)
    monkeypatch.setattr(updates, "_triton", lambda backend, tensor: module)
    tensors = update_inputs(shape)
    # In C, "auto" would not come to Triton on the CPU.
    found, plain = (updated(ops, tensors, DEVICE) for ops in (Kernels("torch"), functional))
    for ours, expected in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)
    if len(shape) == 2:
        assert found[0].norm(dim=1)[1:].sub(1).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 16, 67, 640, 1031])
def test_the_largest_are_exact(triton_products: ModuleType, width: int, dtype: torch.dtype) -> None:
    """The k largest of every row, of equal ones the first, also among infinities and NaN."""
    from sae.kernels.cuda.selection import keep_largest_, largest

    values = torch.randn(7, width, generator=torch.Generator().manual_seed(width))
    values[::2] = (4 * values[::2]).round() / 4  # many ties
    values[1] = -values[1].abs()
    values[2, ::3], values[3, ::5] = -torch.inf, torch.inf
    values[4, 1::4] = torch.nan
    values[5] = torch.nan
    values = values.to(dtype)
    for k in {1, min(5, width), min(40, width), width} if width < 1000 else {1, 40, width}:
        order = values.float().sort(dim=1, descending=True, stable=True).indices  # NaN come first
        expected = order[:, :k].sort(dim=1).values
        top, columns = torch.full((7, k), 9.0), torch.full((7, k), -1)
        top, columns = top.to(DEVICE), columns.to(DEVICE)
        largest(values.to(DEVICE), k, top, columns)
        assert torch.equal(columns.cpu(), expected)
        torch.testing.assert_close(top.cpu(), values.float().gather(1, expected), equal_nan=True)
        kept = values.nan_to_num(0.5).to(DEVICE)
        order = kept.cpu().float().sort(dim=1, descending=True, stable=True).indices[:, :k]
        of_order = kept.cpu().gather(1, order).relu()
        keep_largest_(kept, k)
        assert torch.equal(kept.cpu(), torch.zeros_like(values).scatter(1, order, of_order))


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("dead", [3, 40])
@pytest.mark.parametrize("alone", [False, True])
def test_losses_with_auxk_equal_the_definitions(
    triton_products: ModuleType,
    dense: bool,
    dead: int,
    alone: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """FVU, both kinds of AuxK and every gradient, with AuxK by entries and by dense products."""
    monkeypatch.setattr(dense_products, "pays", lambda *_: dense)
    monkeypatch.setattr(dense_products, "ALIGNED", 16)
    tensors = [t.float() for t in leaves(37, 13, 67)]
    numbers = torch.arange(0, 67)[:dead] if dead == 40 else torch.tensor([5, 7, 66])
    plain = losses_and_gradients(functional, tensors, 5, numbers, 6, alone=alone)
    kernels = Kernels("auto" if DEVICE.type == "cuda" else "torch")  # C would search by itself
    fast = losses_and_gradients(kernels, tensors, 5, numbers.to(DEVICE), 6, DEVICE, alone=alone)
    for ours, expected in zip(fast, plain, strict=True):
        torch.testing.assert_close(ours.cpu(), expected, rtol=2e-4, atol=2e-4)


def test_bfloat16_rows_are_summed_in_float32(triton_products: ModuleType) -> None:
    """What a weight's gradient loses to bfloat16 is the rounding of the rows alone."""
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(0, 9, (200, 5), generator=generator)
    weights = torch.randn(200, 5, generator=generator)
    rows = torch.randn(200, 37, generator=generator).bfloat16()
    expected = torch.zeros(9, 37, dtype=torch.float64)
    products = weights.double()[:, :, None] * rows.double()[:, None, :]
    expected.index_add_(0, indices.flatten(), products.flatten(0, 1))
    by_latent = sparse_products.ByLatent(Backend(), indices.to(DEVICE), 9)
    ours = by_latent.sum_rows(by_latent.sort(weights.to(DEVICE)), rows.to(DEVICE))
    assert ours.dtype == torch.float32
    assert (ours.cpu() - expected).norm() < 1e-6 * expected.norm()

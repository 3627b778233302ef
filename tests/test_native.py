"""The C functions, each beside what PyTorch's operators say."""

import re
from pathlib import Path

import pytest
import torch

from sae import SparseCoder, SparseCoderConfig, native

pytestmark = pytest.mark.skipif(native.library() is None, reason="needs a C compiler")


def largest(values: torch.Tensor, bias: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    top = torch.full((len(values), k), torch.nan)
    columns = torch.full(top.shape, -1)
    native.select_largest(values, native.Wanted(None, bias, top, columns))
    return top, columns


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(5, 64, 64), (7, 100, 3), (3, 1031, 7), (33, 12288, 32), (9, 4099, 192), (3, 70, 1)]
)
def test_selection_in_c_is_exact(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """The positive ones among the k largest are torch.topk's, each from a column of its own."""
    n, width, k = shape
    g = torch.Generator().manual_seed(k)
    for shift in (3.0, 0.0, -2.0, -9.0):  # from all to none positive, with many ties in bfloat16
        values = torch.randn(n, width, generator=g).to(dtype)
        for bias in (torch.full((width,), shift), torch.randn(width, generator=g) + shift):
            scores = values.float() + bias
            top, columns = largest(values, bias, k)
            assert torch.equal(top, scores.gather(1, columns).relu())
            assert all(len(set(row)) == k for row in columns.tolist())
            expected = scores.topk(k, dim=1).values.relu()
            assert torch.equal(top.sort(1).values, expected.sort(1).values)


def test_two_selections_in_c_from_one_look() -> None:
    """One is of all columns, the other of those listed; at -inf is nothing, and is 0."""
    values, k = torch.randn(11, 700, generator=torch.Generator().manual_seed(0)), 20
    for dtype in (torch.float32, torch.bfloat16):
        scores = values.to(dtype).float()
        listed = torch.randperm(700)[:300].sort().values
        found = [
            native.Wanted(i, torch.randn(m), torch.empty(11, k), torch.empty(11, k).long())
            for i, m in ((None, 700), (listed.int(), 300))
        ]
        native.select_largest(values.to(dtype), *found)
        for w, among in zip(found, (torch.arange(700), listed), strict=True):
            biased = torch.full_like(scores, -torch.inf)
            biased[:, among] = scores[:, among] + w.bias
            expected = biased.topk(k, dim=1).values
            assert torch.equal(w.top.sort(1).values, expected.sort(1).values)
            assert torch.equal(biased.gather(1, w.columns), w.top)
    bias = torch.full((700,), -torch.inf)
    bias[:10] = 0.5
    top, columns = largest(values, bias, k)
    assert torch.equal(top.count_nonzero(1), (values + bias > 0).sum(1))
    assert columns.max() < 10


def test_selection_in_c_does_not_hide_bad_numbers() -> None:
    """NaN and infinity count as the largest, so that they reach the loss."""
    for dtype in (torch.float32, torch.bfloat16):
        for width in (40, 300, 4000):
            values = torch.randn(4, width).to(dtype)
            values[1, 27], values[2, width - 1] = float("nan"), float("inf")
            values[1, 5] = values[1, width - 2] = -values[1, 27]  # the sign of inf - inf
            top, _ = largest(values, torch.zeros(width), 5)
            assert top[1].isnan().sum() == 3 and top[2].isinf().sum() == 1
            assert top[[0, 3]].isfinite().all()


@pytest.mark.parametrize("shape", [(37, 13, 67, 5), (300, 200, 40, 9), (64, 130, 9000, 3)])
def test_sums_in_c_are_the_plain_ones(shape: tuple[int, int, int, int]) -> None:
    """Rows are summed in strips and without, over odd widths, with latents that repeat or rest."""
    n, d, latents, k = shape
    g = torch.Generator().manual_seed(0)
    table, rows = torch.randn(latents, d, generator=g), torch.randn(n, d, generator=g)
    weights = torch.randn(n, k, generator=g)
    indices = torch.randint(latents // 2, (n, k), generator=g)
    starts = torch.arange(0, n * k + 1, k, dtype=torch.int32)
    for dtype in (torch.float32, torch.bfloat16):
        ours = native.sum_rows(starts, indices.flatten().int(), weights, table.to(dtype))
        plain = torch.einsum("nk,nkd->nd", weights, table.to(dtype).float()[indices])
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    ours = native.sampled_product(rows, indices, table)
    plain = torch.einsum("nd,nkd->nk", rows, table[indices])
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    starts, order, from_rows = native.sort_by_column(indices, latents)
    assert torch.equal(order, indices.flatten().sort(stable=True).indices.int())
    assert torch.equal(from_rows, order // k)
    assert torch.equal(native.take(weights, order), weights.flatten()[order])
    assert torch.equal(starts.diff(), torch.bincount(indices.flatten(), minlength=latents).int())


def test_large_tensors_lie_in_huge_pages() -> None:
    """Large memory is marked for pages of 2 MB, small is not, and neither changes."""
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("the system has no huge pages")
    for touched in (False, True):
        large, small = torch.full((2**24,), 3.0), torch.full((2**12,), 3.0)
        for tensor in (large, small):
            assert native.in_huge_pages(tensor, touched) is tensor and tensor.eq(3).all()
        middle = large.data_ptr() + large.nbytes // 2
        regions = re.split(r"^(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text(), flags=re.M)[1:]
        spans = [[int(end, 16) for end in r.split()[0].split("-")] for r in regions]
        (ours,) = (
            r for r, (start, end) in zip(regions, spans, strict=True) if start <= middle < end
        )
        flags = next(line for line in ours.splitlines() if line.startswith("VmFlags"))
        assert "hg" in flags.split()


def test_threads_do_not_change_the_bits() -> None:
    """One thread and two compute the same bits."""
    coder = SparseCoder(48, SparseCoderConfig(num_latents=2048, k=16))
    x, dead = torch.randn(700, 48), torch.arange(2048) % 5 == 0
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            coder.zero_grad(set_to_none=True)
            acts, indices, *of_dead = coder._encode_rows(x, 16, dead.nonzero().squeeze(1))
            assert coder.W_dec is not None
            coder.ops.decode(acts.detach(), indices, coder.W_dec).square().sum().backward()
            found.append([acts, indices, *of_dead, coder.W_dec.grad])
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)

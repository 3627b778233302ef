"""Each C function equals what PyTorch's operators compute."""

import re
from pathlib import Path

import pytest
import torch

from sae import SparseCoder, SparseCoderConfig
from sae.kernels.cpu import compiled, native

pytestmark = pytest.mark.skipif(compiled.library() is None, reason="needs a C compiler")


def largest(values: torch.Tensor, bias: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    top = torch.full((len(values), k), torch.nan)
    columns = torch.full(top.shape, -1)
    native.select_largest(values, native.Wanted(None, bias, top, columns))
    return top, columns


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(5, 64, 64), (7, 100, 3), (3, 1031, 7), (33, 12288, 32), (9, 4099, 192), (3, 70, 1)]
)
def test_selection_in_c_finds_the_largest(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
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


def test_one_call_selects_among_all_columns_and_among_listed_ones() -> None:
    """Both selections are exact, and what is at -inf is 0."""
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


def test_selection_in_c_passes_on_nan_and_infinity() -> None:
    """NaN and infinity count as the largest, so that they reach the loss."""
    for dtype in (torch.float32, torch.bfloat16):
        for width in (40, 300, 4000):
            values = torch.randn(4, width).to(dtype)
            values[1, 27], values[2, width - 1] = float("nan"), float("inf")
            values[1, 5] = values[1, width - 2] = -values[1, 27]  # the sign of inf - inf
            top, _ = largest(values, torch.zeros(width), 5)
            assert top[1].isnan().sum() == 3 and top[2].isinf().sum() == 1
            assert top[[0, 3]].isfinite().all()


@pytest.mark.parametrize(
    "shape",
    [
        *[(37, 13, 67, 5), (300, 200, 40, 9)],  # in blocks of the table
        *[(700, 100, 500, 3), (7000, 40, 4200, 3)],  # in strips, wide and narrow
        (64, 130, 9000, 3),  # as rows lie
    ],
)
def test_sums_in_c_equal_those_of_einsum(shape: tuple[int, int, int, int]) -> None:
    """Sums of table rows, sampled products, and the sort by column that gradients are summed in.

    In blocks, in strips and as rows lie; over odd widths, with latents that repeat or are unused.
    """
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


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    """One thread and two compute the same bits, forward and backward."""
    coder = SparseCoder(48, SparseCoderConfig(num_latents=2048, k=16))
    x, dead = torch.randn(700, 48), torch.arange(2048) % 5 == 0
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            coder.zero_grad(set_to_none=True)
            numbers = dead.nonzero().squeeze(1)
            latents, of_dead, _ = coder.family.select(coder, x, 16, numbers, None)
            assert coder.W_dec is not None and of_dead is not None
            alone = coder.kernels.Latents(latents.acts.detach(), latents.indices)
            coder.kernels.decode(alone, coder.W_dec).square().sum().backward()
            found.append([*latents[:2], *of_dead[:2], coder.W_dec.grad])
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


KINDS = [torch.float32, torch.bfloat16, torch.int8]


def searched(
    kind: torch.dtype,
    x: torch.Tensor,
    W: torch.Tensor,
    bias: torch.Tensor,
    k: int,
    dead: torch.Tensor | None = None,
    k_dead: int = 0,
) -> list[torch.Tensor]:
    """What a search finds: activations and columns, then those of the dead.

    Where it writes nothing there are NaN and -1.
    """
    if not native.searches(kind):
        pytest.skip(f"this processor does not search in {kind}")
    widths = [k] if dead is None else [k, k_dead]
    tops = [torch.full((len(x), width), torch.nan) for width in widths]
    columns = [torch.full(top.shape, -1) for top in tops]
    native.search(x, W, bias, kind, tops, columns, dead)
    return [t for pair in zip(tops, columns, strict=True) for t in pair]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape",
    [
        (37, 13, 67, 5),
        (5, 8, 16, 16),
        (7, 9, 33, 1),
        (205, 50, 3000, 9),
        (3, 70, 4100, 192),
        (130, 5, 9000, 8000),
    ],
)
def test_search_in_c_finds_the_largest(shape: tuple[int, int, int, int], kind: torch.dtype) -> None:
    """Of a product of rounded numbers the k largest are found, and the largest among the dead.

    For odd numbers of rows, columns and latents, with all to none of the scores positive, also
    where the largest come last or tie.
    """
    n, d, latents, k = shape
    g = torch.Generator().manual_seed(k)
    x, W = torch.randn(n, d, generator=g), torch.randn(latents, d, generator=g)
    dead = torch.randperm(latents, generator=g)[: max(1, latents // 3)].sort().values
    rows, weights = x, W
    if kind == torch.bfloat16:
        x = rows = x.bfloat16()
        weights = W.bfloat16().float()
    if kind == torch.int8:
        steps = [torch.tensor(127.0) / t.abs().amax(1, keepdim=True) for t in (x, W)]
        rows, weights = ((t * s).round() / s for t, s in zip((x, W), steps, strict=True))
    for shift in (40.0, 0.0, -12.0, -1e4):
        for bias in (torch.randn(latents, generator=g), torch.arange(latents) / 9.0, 0 * W[:, 0]):
            scores = (rows.double() @ weights.double().T).float() + bias + shift
            for among, k_among in ((None, 0), (dead, min(len(dead), 7))):
                found = searched(kind, x, W, bias + shift, k, among, k_among)
                for i, limit in enumerate([k] if among is None else [k, k_among]):
                    top, columns = found[2 * i], found[2 * i + 1]
                    of = scores if i == 0 else torch.full_like(scores, -torch.inf)
                    if i:
                        of[:, dead] = scores[:, dead]
                    close = {"rtol": 1e-5, "atol": 2e-3 if shift < -1e3 else 1e-4}
                    torch.testing.assert_close(top, of.gather(1, columns).relu(), **close)
                    expected = of.topk(limit, dim=1).values.relu()
                    torch.testing.assert_close(top.sort(1).values, expected.flip(1), **close)
                    assert all(len(set(row)) == limit for row in columns.tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_search_in_c_passes_on_nan_and_infinity(kind: torch.dtype) -> None:
    """NaN and infinity in a row or a latent reach the activations; every column is a latent's."""
    x, W, bias = torch.randn(30, 20), torch.randn(333, 20), torch.zeros(333)
    x[3, 7], x[5, 1], W[300, 4] = torch.nan, torch.inf, torch.nan
    dead = torch.arange(0, 333, 2)
    rows = x.bfloat16() if kind == torch.bfloat16 else x
    for i, found in enumerate(searched(kind, rows, W, bias, 6, dead, 9)):
        if i % 2:
            assert found.min() >= 0 and found.max() < 333
        else:
            assert found[3].isnan().all() and not found[5].isfinite().all()
            assert found.isnan().any(1).all()  # of latent 300, in every row


@pytest.mark.parametrize("kind", KINDS)
def test_latents_of_a_row_do_not_depend_on_the_other_rows(kind: torch.dtype) -> None:
    """A search writes the same bits for a row in a small batch, in a large one, on any threads.

    In int8 the bits are those of the rough scores.
    """
    g = torch.Generator().manual_seed(0)
    x, W = torch.randn(401, 33, generator=g), torch.randn(500, 33, generator=g)
    x = x.bfloat16() if kind == torch.bfloat16 else x
    threads = torch.get_num_threads()
    in_full = searched(kind, x, W, W[:, 0].contiguous(), 8)
    try:
        torch.set_num_threads(1)
        for rows in (slice(0, 1), slice(190, 200), slice(17, 401)):
            alone = searched(kind, x[rows], W, W[:, 0].contiguous(), 8)
            assert all(torch.equal(a, b[rows]) for a, b in zip(alone, in_full, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_sums_are_written_or_added_to_a_given_tensor() -> None:
    """Sums over blocks, strips or rows as they lie equal those of einsum, written or added.

    Entries are sorted by column or not, are many or few, and some rows of the table have none.
    """
    g = torch.Generator().manual_seed(0)
    for n, k, table_rows, d in (
        (700, 90, 900, 400),
        (50, 3, 9000, 70),
        (700, 3, 500, 100),
        (7000, 3, 4200, 40),
        (0, 3, 5, 9),
    ):
        table = torch.randn(table_rows, d, generator=g)
        for dtype in (torch.float32, torch.bfloat16):
            for ordered in (True, False):
                columns = torch.randint(table_rows // 2, (n, k), generator=g)
                columns = columns.sort(1).values if ordered else columns
                weights = torch.randn(n, k, generator=g)
                starts = torch.arange(0, n * k + 1, k, dtype=torch.int32)
                arguments = (starts, columns.flatten().int(), weights, table.to(dtype))
                plain = torch.einsum("nk,nkd->nd", weights, table.to(dtype).float()[columns])
                torch.testing.assert_close(native.sum_rows(*arguments), plain, rtol=1e-4, atol=1e-3)
                there = torch.randn(n, d, generator=g)
                total = native.sum_rows(*arguments, there.clone())
                torch.testing.assert_close(total, there + plain, rtol=1e-4, atol=1e-3)
                rows = torch.randn(n, d, generator=g)
                products = native.sampled_product(rows, columns, table)
                plain = torch.einsum("nd,nkd->nk", rows, table[columns])
                torch.testing.assert_close(products, plain, rtol=1e-4, atol=1e-3)

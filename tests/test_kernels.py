"""The fast twins compute what the plain definitions say, and build nothing large."""

import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sae import (
    SparseCoder,
    SparseCoderConfig,
    backend,
    functional,
    kernels,
    native,
    selection,
    sparse_sums,
)

SHAPES = [  # N, D, L, k, activation
    (37, 13, 67, 5, "topk"),
    (5, 8, 16, 16, "topk"),
    (7, 9, 33, 1, "topk"),
    (64, 32, 1031, 7, "topk"),
    (130, 6, 4099, 3, "topk"),
    (33, 8, 64, 8, "groupmax"),
    (9, 5, 12, 12, "groupmax"),
    (1, 3, 4, 2, "topk"),
    (0, 3, 4, 2, "topk"),
]


def leaves(n: int, d: int, latents: int, shift: float = 0.0) -> list[torch.Tensor]:
    """x, W_enc, b_enc, W_dec and pre_bias in float64; `shift` moves the pre-activations."""
    g = torch.Generator().manual_seed(n + 1000 * latents)
    shapes = [(n, d), (latents, d), (latents,), (latents, d), (d,)]
    x, W_enc, b_enc, W_dec, pre_bias = (
        torch.randn(s, dtype=torch.float64, generator=g) for s in shapes
    )
    return [t.requires_grad_() for t in (x, W_enc, b_enc + shift, W_dec, pre_bias)]


def outputs_and_gradients(
    ops: ModuleType, tensors: list[torch.Tensor], k: int, activation: str
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The reconstruction, and the gradients of a loss that weighs every output differently."""
    x, W_enc, b_enc, W_dec, pre_bias = (t.detach().clone().requires_grad_() for t in tensors)
    acts, indices = ops.encode(x, W_enc, b_enc, k, activation, pre_bias)
    out = ops.decode(acts, indices, W_dec)
    weights = torch.arange(out.numel(), dtype=out.dtype).view_as(out).cos()
    # The square depends on top_acts whatever their order within a row.
    ((out * weights).sum() + acts.pow(2).sum()).backward()
    return out.detach(), [t.grad for t in (x, W_enc, b_enc, W_dec, pre_bias)]  # type: ignore[misc]


@pytest.mark.parametrize("shift", [0.0, -4.0, -100.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_twins_agree(shape: tuple, shift: float) -> None:
    """Outputs and all gradients equal the plain definition's, also with few or no positives."""
    n, d, latents, k, activation = shape
    tensors = leaves(n, d, latents, shift)
    out, grads = outputs_and_gradients(functional, tensors, k, activation)
    fast_out, fast_grads = outputs_and_gradients(kernels, tensors, k, activation)
    torch.testing.assert_close(fast_out, out, rtol=1e-10, atol=1e-10)
    for fast, plain in zip(fast_grads, grads, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("multi_topk", [False, True])
def test_encoder_and_decoder_share_one_sort(
    multi_topk: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward and backward sorts each set of top_indices once."""
    sorts = []
    build = sparse_sums.ByLatent.__init__
    monkeypatch.setattr(sparse_sums.ByLatent, "__init__", lambda *a: sorts.append(1) or build(*a))
    coder = SparseCoder(8, SparseCoderConfig(num_latents=32, k=2, multi_topk=multi_topk))
    out = coder(torch.randn(9, 8), dead_mask=torch.arange(0, 32, 3))
    (out.fvu + out.auxk_loss + out.multi_topk_fvu).backward()
    assert len(sorts) == 2 + multi_topk


def test_silent_latents_get_no_gradient() -> None:
    """A selected latent whose activation is 0 moves nothing."""
    tensors = leaves(6, 4, 8, shift=-100.0)
    _, grads = outputs_and_gradients(kernels, tensors, 3, "topk")
    assert all(g.count_nonzero() == 0 for g in grads)


@pytest.mark.parametrize("width", [1, 5, 16, 17, 100, 512, 1031, 12288])
def test_top_k_is_exact(width: int) -> None:
    """The tournament finds the k largest entries, also among ties, for every k that fits."""
    values = torch.randn(50, width, generator=torch.Generator().manual_seed(width))
    values[::3] = values[::3].round()  # many ties
    for k in {1, min(3, width), min(32, width), width}:
        top, indices = selection._top_k(values, k)
        torch.testing.assert_close(top.sort(1).values, values.topk(k, dim=1).values.flip(1))
        assert torch.equal(values.gather(1, indices), top)
        assert all(len(row.unique()) == k for row in indices)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_unwritten_memory_is_never_read(shape: tuple, dtype: torch.dtype) -> None:
    """With every fresh buffer full of NaN the results stay the same, in C and in PyTorch."""
    n, d, latents, k, activation = shape
    tensors = [t.to(dtype) for t in leaves(n, d, latents)]
    clean = outputs_and_gradients(kernels, tensors, k, activation)
    was = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        poisoned = outputs_and_gradients(kernels, tensors, k, activation)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = was
    assert torch.equal(poisoned[0], clean[0])
    assert all(torch.equal(a, b) for a, b in zip(poisoned[1], clean[1], strict=True))


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor, in elements, that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = (t for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        sizes = [t.numel() for t in found if t.layout == torch.strided]
        self.numel = max(self.numel, *sizes, 0)
        return out


def test_nothing_large_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither pre_acts of all rows [N L] nor the gathered decoder rows [N K D] ever exist."""
    monkeypatch.setattr(backend, "_choice", "torch")
    n, d, latents, k = 4096, 64, 4096, 64
    assert n > selection._CHUNK_ROWS
    cfg = SparseCoderConfig(num_latents=latents, k=k)
    coder = SparseCoder(d, cfg)
    x = torch.randn(n, d)
    with LargestTensor() as seen:
        coder(x).fvu.backward()
    assert seen.numel <= selection._CHUNK_ROWS * latents
    assert seen.numel < n * k * d and seen.numel < n * latents


@pytest.mark.skipif(native.library() is None, reason="needs a C compiler")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_nothing_large_is_built_in_c() -> None:
    """A step's memory at its most is far below pre_acts, and below the gathered decoder rows."""

    def bytes_of(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(f"{field}:"))

    n, d, latents, k = 16384, 64, 8192, 64
    coder, x = SparseCoder(d, SparseCoderConfig(num_latents=latents, k=k)), torch.randn(n, d)
    coder(x[:64]).fvu.backward()
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is forgotten
    before = bytes_of("VmRSS")
    coder(x, dead_mask=torch.arange(0, latents, 4)).fvu.backward()
    assert bytes_of("VmHWM") - before < min(n * latents, n * k * d) * 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transcode", [False, True])
@pytest.mark.parametrize("n_dead", [0, 3, 40])
@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_losses_reach_every_parameter_as_the_definition_says(
    transcode: bool, n_dead: int, activation: str, dtype: torch.dtype
) -> None:
    """FVU + AuxK + Multi-TopK / 8 differentiates as the plain definitions do, in C and PyTorch."""
    d, d_out = (11, 7) if transcode else (11, 11)
    cfg = SparseCoderConfig(
        activation=activation,  # type: ignore[arg-type]
        num_latents=48,
        k=3,
        multi_topk=True,
        transcode=transcode,
        skip_connection=transcode,
    )
    g = torch.Generator().manual_seed(1)
    coder = SparseCoder(d, cfg, dtype=dtype, d_out=d_out)
    for p in coder.parameters():
        p.data = torch.randn(p.shape, dtype=p.dtype, generator=g)
    x = torch.randn(29, d, dtype=dtype, generator=g)
    y = torch.randn(29, d_out, dtype=dtype, generator=g) if transcode else x
    dead = torch.zeros(48, dtype=torch.bool)
    dead[torch.randperm(48, generator=g)[:n_dead]] = True

    def gradients(which: SparseCoder, loss: torch.Tensor) -> dict[str, torch.Tensor]:
        which.zero_grad()
        loss.backward()
        return {n: p.grad.clone() for n, p in which.named_parameters() if p.grad is not None}

    close = 1e-9 if dtype == torch.float64 else 1e-5
    out = coder(x, y, dead)
    fast = gradients(coder, out.fvu + out.auxk_loss / 32 + out.multi_topk_fvu / 8)
    loss, parts = plain_losses(coder, x, y, dead)
    plain = gradients(coder, loss)
    for measured, expected in zip(out[3:], parts, strict=True):
        torch.testing.assert_close(measured, expected, rtol=close, atol=close)
    assert fast.keys() == dict(coder.named_parameters()).keys()
    for name in fast:
        torch.testing.assert_close(fast[name], plain[name], rtol=close, atol=close)


def plain_losses(
    coder: SparseCoder, x: torch.Tensor, y: torch.Tensor, dead: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The three losses from dense latents [N L], written without any of the package's functions."""
    cfg, p = coder.cfg, dict(coder.named_parameters())
    inputs = x if cfg.transcode else x - p["b_dec"]
    pre = inputs @ p["encoder.weight"].T + p["encoder.bias"]

    def keep(pre: torch.Tensor, k: int, groups: bool) -> torch.Tensor:
        mask = torch.zeros_like(pre)
        if groups:
            runs = pre.unflatten(1, (k, -1))
            mask = (runs == runs.max(2, keepdim=True).values).to(pre.dtype).flatten(1)
        else:
            mask.scatter_(1, pre.topk(k, dim=1).indices, 1.0)
        return pre.clamp(min=0) * mask

    groups = cfg.activation == "groupmax"
    offset = p["b_dec"] + (x @ p["W_skip"].T if "W_skip" in p else 0)
    out = keep(pre, cfg.k, groups) @ p["W_dec"] + offset
    wide = keep(pre, 4 * cfg.k, groups) @ p["W_dec"] + offset
    variance = (y - y.mean(0)).pow(2).sum()
    fvu = (y - out).pow(2).sum() / variance
    multi = (y - wide).pow(2).sum() / variance
    aux = torch.zeros_like(fvu)
    if n_dead := int(dead.sum()):
        k_aux = y.shape[1] // 2
        acts = keep(pre.masked_fill(~dead, -torch.inf), min(k_aux, n_dead), False)
        residual = (y - out).detach()
        e_hat = acts.nan_to_num(0) @ p["W_dec"]
        aux = min(n_dead / k_aux, 1) * (residual - e_hat).pow(2).sum() / variance
    return fvu + aux / 32 + multi / 8, [fvu, aux, multi]


@pytest.mark.parametrize("choice", ["torch", "auto"])
def test_bfloat16_selection_is_exact(choice: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a bfloat16 product the active latents are exactly those of its own pre-activations."""
    monkeypatch.setattr(backend, "_choice", choice)
    x, W_enc, b_enc, _, _ = (t.detach().float() for t in leaves(64, 32, 2048, shift=-9.0))
    fast, indices = kernels.encode(x, W_enc, b_enc, 32, matmul_dtype=torch.bfloat16)
    plain, _ = functional.encode(x, W_enc, b_enc, 32, matmul_dtype=torch.bfloat16)
    if backend.in_c(x):  # the bias keeps its precision there, and where C multiplies the sums too
        factors = [x.bfloat16(), W_enc.bfloat16().T]
        if native.searches(torch.bfloat16):
            factors = [factor.float() for factor in factors]
        pre_acts = torch.mm(*factors).float() + b_enc
        plain = pre_acts.topk(32, dim=1).values.relu()
        torch.testing.assert_close(fast, pre_acts.gather(1, indices).relu(), rtol=1e-5, atol=1e-5)
    assert 0 < (plain > 0).float().mean() < 1  # some rows have fewer than k positives
    close = 1e-5 if choice == "auto" and native.searches(torch.bfloat16) else 0
    plain, fast = plain.sort(1).values, fast.sort(1).values
    torch.testing.assert_close(fast, plain, rtol=close, atol=close)


def test_bfloat16_products_are_close() -> None:
    """With the product in bfloat16 activations agree to its precision; the rest is float32."""
    x, W_enc, b_enc, W_dec, _ = (t.detach().float() for t in leaves(64, 32, 256))
    acts, indices = kernels.encode(x, W_enc, b_enc, 8, matmul_dtype=torch.bfloat16)
    exact = (x @ W_enc.T + b_enc).gather(1, indices)
    assert acts.dtype == torch.float32
    torch.testing.assert_close(acts, exact, rtol=2e-2, atol=5e-2)
    assert kernels.decode(acts, indices, W_dec).dtype == torch.float32


def test_a_step_repeats_bit_for_bit() -> None:
    """Two runs of the same forward and backward give the same bits."""
    coder = SparseCoder(48, SparseCoderConfig(num_latents=2048, k=16, multi_topk=True))
    again = copy.deepcopy(coder)
    x = torch.randn(700, 48)
    for c in (coder, again):
        out = c(x, dead_mask=torch.arange(2048) % 5 == 0)
        (out.fvu + out.auxk_loss + out.multi_topk_fvu).backward()
    for a, b in zip(coder.parameters(), again.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("shape", SHAPES)
def test_twins_agree_on_a_gpu(shape: tuple) -> None:
    """On a GPU the fast twins equal the plain definition on the CPU."""
    n, d, latents, k, activation = shape
    tensors = leaves(n, d, latents)
    out, grads = outputs_and_gradients(functional, tensors, k, activation)
    on_gpu = [t.detach().cuda() for t in tensors]
    x, W_enc, b_enc, W_dec, pre_bias = (t.requires_grad_() for t in on_gpu)
    acts, indices = kernels.encode(x, W_enc, b_enc, k, activation, pre_bias)
    fast_out = kernels.decode(acts, indices, W_dec)
    weights = torch.arange(out.numel(), dtype=out.dtype).view_as(out).cos().cuda()
    ((fast_out * weights).sum() + acts.pow(2).sum()).backward()
    torch.testing.assert_close(fast_out.cpu(), out, rtol=1e-9, atol=1e-9)
    for fast, plain in zip((x, W_enc, b_enc, W_dec, pre_bias), grads, strict=True):
        torch.testing.assert_close(fast.grad.cpu(), plain, rtol=1e-8, atol=1e-8)  # type: ignore[union-attr]


def test_indices_out_of_range_are_refused() -> None:
    """An index that no latent has is an error, not memory that is read."""
    coder = SparseCoder(8, SparseCoderConfig(num_latents=16, k=2))
    for wrong in (-1, 16):
        with pytest.raises((IndexError, RuntimeError)):
            coder.decode(torch.ones(3, 2), torch.tensor([[0, 1], [2, wrong], [3, 4]]))


def test_what_does_not_fit_is_an_error() -> None:
    """More active latents than there are, or rows of another width, are refused, not read."""
    coder = SparseCoder(8, SparseCoderConfig(num_latents=16, k=2))
    with pytest.raises(IndexError, match="k = 20 is more than the 16 latents"):
        coder.encode(torch.randn(3, 8), k=20)
    with pytest.raises((AssertionError, RuntimeError)):
        kernels.encode(torch.randn(3, 9), coder.encoder.weight, coder.encoder.bias, 2)


def test_rows_and_weights_may_lie_as_they_like() -> None:
    """Transposed inputs and weights give what their copies give, and gradients."""
    x, W, b = torch.randn(8, 30).T, torch.randn(8, 16).T, torch.zeros(16)
    found = []
    for leaves_ in ((x, W), (x.contiguous(), W.contiguous())):
        rows, weight = (t.detach().requires_grad_() for t in leaves_)
        acts, indices = kernels.encode(rows, weight, b, 3)
        acts.square().sum().backward()
        found.append([acts, indices, rows.grad, weight.grad])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)

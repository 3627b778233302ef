"""The fast twins compute what the definitions say, and build nothing large."""

import copy
from itertools import product
from pathlib import Path

import pytest
import torch
from kernel_cases import (
    SHAPES,
    UPDATED_SHAPES,
    leaves,
    outputs_and_gradients,
    update_inputs,
    updated,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sae import SparseCoder, SparseCoderConfig
from sae.coders import functional
from sae.config import KernelChoice
from sae.kernels import selection, sparse_products, updates
from sae.kernels.cpu import compiled, native
from sae.kernels.twins import Kernels

BOTH = pytest.mark.parametrize("choice", ["torch", "auto"])
"""PyTorch's operators, and C where there is a compiler."""


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shift", [0.0, -4.0, -100.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_twins_equal_their_definitions(
    shape: tuple, shift: float, dtype: torch.dtype, choice: KernelChoice
) -> None:
    """Outputs and all gradients equal the definition's, also with few or no positives."""
    n, d, latents, k, activation = shape
    tensors = [t.to(dtype) for t in leaves(n, d, latents, shift)]
    plain = outputs_and_gradients(functional, tensors, k, activation)
    fast = outputs_and_gradients(Kernels(choice), tensors, k, activation)
    if dtype == torch.float64:
        torch.testing.assert_close(fast[0], plain[0], rtol=1e-10, atol=1e-10)
    close = 1e-9 if dtype == torch.float64 else 2e-4
    for ours, expected in zip(fast, plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=close, atol=close)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [*UPDATED_SHAPES, (700, 300)])
def test_updates_equal_their_definitions(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    choice: KernelChoice,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Gradients, steps and unit norms, of vectors and of matrices in one block or in many."""
    monkeypatch.setattr(updates, "_BLOCK", 1 << 7)
    tensors = update_inputs(shape, dtype)
    plain, fast = (updated(ops, tensors) for ops in (functional, Kernels(choice)))
    close = 1e-12 if dtype == torch.float64 else 1e-5
    for ours, expected in zip(fast, plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=close, atol=close)
    if len(shape) == 2:
        assert fast[0].norm(dim=1)[1:].sub(1).abs().max() < 1e-5


@BOTH
def test_unit_norm_leaves_rows_of_zeros(choice: KernelChoice) -> None:
    """Every other row gets unit norm."""
    rows = torch.randn(20, 9)
    rows[::3] = 0.0
    ours, plain = rows.clone(), rows.clone()
    Kernels(choice).normalize_rows_(ours)
    functional.normalize_rows_(plain)
    torch.testing.assert_close(ours, plain)
    assert ours[::3].eq(0).all()
    torch.testing.assert_close(ours.norm(dim=1), (torch.arange(20) % 3 > 0).float())


@BOTH
@pytest.mark.parametrize("multi_topk", [False, True])
def test_encoder_and_decoder_share_one_sort(
    multi_topk: bool, choice: KernelChoice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A forward and backward sorts each set of top_indices once."""
    sorts = []
    cached = sparse_products.ByLatent._sorted
    sort = cached.func
    monkeypatch.setattr(cached, "func", lambda self: sorts.append(1) or sort(self))
    coder = SparseCoder(8, SparseCoderConfig(num_latents=32, k=2, multi_topk=multi_topk))
    coder.kernels = Kernels(choice)
    out = coder(torch.randn(9, 8), dead_mask=torch.arange(0, 32, 3))
    assert not sorts  # a forward needs none
    (out.fvu + out.auxk_loss + out.multi_topk_fvu).backward()
    assert len(sorts) == 2 + multi_topk


def test_latents_whose_activation_is_0_get_no_gradient() -> None:
    """Where all pre-activations are negative the selected latents move nothing."""
    tensors = leaves(6, 4, 8, shift=-100.0)
    _, *grads = outputs_and_gradients(Kernels(), tensors, 3, "topk")
    assert all(g.count_nonzero() == 0 for g in grads)


@pytest.mark.parametrize("width", [1, 5, 16, 17, 100, 512, 1031, 12288])
def test_top_k_in_pytorch_is_exact(width: int) -> None:
    """The tournament finds the k largest entries, of equal ones the first, for every k."""
    values = torch.randn(50, width, generator=torch.Generator().manual_seed(width))
    values[::3] = values[::3].round()  # many ties, of 0 and -0 too
    for dtype, k in product(
        (torch.float32, torch.float64, torch.bfloat16), {1, min(3, width), min(32, width), width}
    ):
        rows = values.to(dtype)
        first = rows.sort(dim=1, descending=True, stable=True).indices[:, :k]
        columns = selection._top_k(rows, k)[1]
        assert torch.equal(columns.sort(1).values, first.sort(1).values)
    for k in {1, min(3, width), min(32, width), width}:
        top, indices = selection._top_k(values, k)
        torch.testing.assert_close(top.sort(1).values, values.topk(k, dim=1).values.flip(1))
        assert torch.equal(values.gather(1, indices), top)
        assert all(len(row.unique()) == k for row in indices)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_unwritten_memory_is_never_read(
    shape: tuple, dtype: torch.dtype, choice: KernelChoice
) -> None:
    """With every fresh buffer full of NaN the results stay the same, in C and in PyTorch."""
    n, d, latents, k, activation = shape
    tensors = [t.to(dtype) for t in leaves(n, d, latents)]
    clean = outputs_and_gradients(Kernels(choice), tensors, k, activation)
    was = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        poisoned = outputs_and_gradients(Kernels(choice), tensors, k, activation)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = was
    assert all(torch.equal(a, b) for a, b in zip(poisoned, clean, strict=True))


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor, in elements, that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = (t for t in tree_leaves(out) if isinstance(t, torch.Tensor))
        sizes = [t.numel() for t in found if t.layout == torch.strided]
        self.numel = max(self.numel, *sizes, 0)
        return out


def test_no_tensor_in_pytorch_holds_all_pre_activations() -> None:
    """Neither pre_acts of all rows [N L] nor the gathered decoder rows [N K D] ever exist."""
    n, d, latents, k = 4096, 64, 4096, 64
    assert n > selection._CHUNK_ROWS
    cfg = SparseCoderConfig(num_latents=latents, k=k)
    coder = SparseCoder(d, cfg)
    coder.kernels = Kernels("torch")
    x = torch.randn(n, d)
    with LargestTensor() as seen:
        coder(x).fvu.backward()
    assert seen.numel <= selection._CHUNK_ROWS * latents
    assert seen.numel < n * k * d and seen.numel < n * latents


@pytest.mark.skipif(compiled.library() is None, reason="needs a C compiler")
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_in_c_is_below_all_pre_activations() -> None:
    """A step's peak memory is below that of pre_acts [N L] and of the gathered rows [N K D]."""

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


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transcode", [False, True])
@pytest.mark.parametrize("n_dead", [0, 3, 40])
@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_gradients_of_the_losses_equal_those_of_dense_latents(
    transcode: bool, n_dead: int, activation: str, dtype: torch.dtype, choice: KernelChoice
) -> None:
    """Losses and gradients of FVU + AuxK / 32 + Multi-TopK / 8, in C and in PyTorch."""
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
    coder.kernels = Kernels(choice)
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


@BOTH
def test_bfloat16_selection_is_exact(choice: KernelChoice) -> None:
    """With a bfloat16 product the active latents are exactly those of its own pre-activations."""
    kernels = Kernels(choice)
    x, W_enc, b_enc, _, _ = (t.detach().float() for t in leaves(64, 32, 2048, shift=-9.0))
    fast, indices, _ = kernels.encode(x, W_enc, b_enc, 32, matmul_dtype=torch.bfloat16)
    plain, _ = functional.encode(x, W_enc, b_enc, 32, matmul_dtype=torch.bfloat16)
    if kernels.backend.in_c(x):  # the bias stays float32 there, and where C multiplies sums do too
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


@BOTH
def test_bfloat16_products_are_close(choice: KernelChoice) -> None:
    """With the product in bfloat16 activations agree to its precision; the rest is float32."""
    kernels = Kernels(choice)
    x, W_enc, b_enc, W_dec, _ = (t.detach().float() for t in leaves(64, 32, 256))
    latents = kernels.encode(x, W_enc, b_enc, 8, matmul_dtype=torch.bfloat16)
    exact = (x @ W_enc.T + b_enc).gather(1, latents.indices)
    assert latents.acts.dtype == torch.float32
    torch.testing.assert_close(latents.acts, exact, rtol=2e-2, atol=5e-2)
    assert kernels.decode(latents, W_dec).dtype == torch.float32


@BOTH
def test_a_step_repeats_bit_for_bit(choice: KernelChoice) -> None:
    """Two runs of the same forward and backward give the same bits."""
    coder = SparseCoder(48, SparseCoderConfig(num_latents=2048, k=16, multi_topk=True))
    coder.kernels = Kernels(choice)
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
def test_twins_on_a_gpu_equal_the_definitions(shape: tuple) -> None:
    """On a GPU the fast twins equal the definition on the CPU."""
    n, d, latents, k, activation = shape
    tensors = leaves(n, d, latents)
    plain = outputs_and_gradients(functional, tensors, k, activation)
    fast = outputs_and_gradients(Kernels(), tensors, k, activation, "cuda")
    torch.testing.assert_close(fast[0].cpu(), plain[0], rtol=1e-9, atol=1e-9)
    for ours, expected in zip(fast, plain, strict=True):
        torch.testing.assert_close(ours.cpu(), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@BOTH
@pytest.mark.parametrize("shape", UPDATED_SHAPES)
def test_updates_on_a_gpu_equal_the_definitions(
    shape: tuple[int, ...], choice: KernelChoice
) -> None:
    """On a GPU gradients, steps and unit norms equal the definition on the CPU."""
    tensors = update_inputs(shape)
    fast = updated(Kernels(choice), tensors, "cuda")
    for ours, expected in zip(fast, updated(functional, tensors), strict=True):
        torch.testing.assert_close(ours.cpu(), expected, rtol=1e-5, atol=1e-6)


@BOTH
def test_indices_out_of_range_are_refused(choice: KernelChoice) -> None:
    """An index that no latent has is an error; memory outside of the table is never read."""
    coder = SparseCoder(8, SparseCoderConfig(num_latents=16, k=2))
    coder.kernels = Kernels(choice)
    for wrong in (-1, 16):
        with pytest.raises((IndexError, RuntimeError)):
            coder.decode(torch.ones(3, 2), torch.tensor([[0, 1], [2, wrong], [3, 4]]))


@BOTH
def test_too_large_k_and_rows_of_another_width_are_refused(choice: KernelChoice) -> None:
    """Both are errors, and no memory outside of the tensors is read."""
    coder = SparseCoder(8, SparseCoderConfig(num_latents=16, k=2))
    coder.kernels = Kernels(choice)
    with pytest.raises(IndexError, match="k = 20 is more than the 16 latents"):
        coder.encode(torch.randn(3, 8), k=20)
    with pytest.raises((AssertionError, RuntimeError)):
        coder.kernels.encode(torch.randn(3, 9), coder.encoder.weight, coder.encoder.bias, 2)


@BOTH
def test_transposed_inputs_and_weights_are_taken(choice: KernelChoice) -> None:
    """Results and gradients are those of contiguous copies."""
    x, W, b = torch.randn(8, 30).T, torch.randn(8, 16).T, torch.zeros(16)
    found = []
    for inputs, weights in ((x, W), (x.contiguous(), W.contiguous())):
        rows, weight = (t.detach().requires_grad_() for t in (inputs, weights))
        acts, indices, _ = Kernels(choice).encode(rows, weight, b, 3)
        acts.square().sum().backward()
        found.append([acts, indices, rows.grad, weight.grad])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)

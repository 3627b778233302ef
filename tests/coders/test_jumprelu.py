"""JumpReLU coders: what they compute, their files, and what uses them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae import SaeConfig, SparseCoder, SparseCoderConfig, TranscoderConfig, UsageError, load_many
from sae.coders import functional
from sae.config import KernelChoice
from sae.flag_checks import from_flags
from sae.kernels import entries, selection
from sae.kernels.twins import Kernels
from train_sae import TrainConfig


def made(cfg: SparseCoderConfig, dtype: torch.dtype = torch.float32) -> SparseCoder:
    """A coder of width 6 with thresholds around what its latents reach, some below 0."""
    generator = torch.Generator().manual_seed(1)
    coder = SparseCoder(6, cfg, dtype=dtype, generator=generator)
    for parameter in coder.parameters():
        parameter.data.normal_(generator=generator)
    return coder


def dense(coder: SparseCoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """Activations [N L] and reconstruction by the paper's equations, in float64."""
    assert coder.W_dec is not None
    parameters = coder.encoder.weight, coder.encoder.bias, coder.W_dec, coder.b_dec
    W, b, W_dec, b_dec = (p.detach().double() for p in parameters)
    threshold = coder.threshold.double()
    inputs = x.double() if coder.cfg.transcode else x.double() - b_dec
    pre_acts = inputs @ W.T + b
    acts = pre_acts * torch.heaviside(pre_acts - threshold, torch.zeros(()).double())
    acts = acts * (pre_acts > 0)
    return acts, acts @ W_dec + b_dec


@pytest.mark.parametrize("choice", ["torch", "auto"])
@pytest.mark.parametrize("cfg", [SaeConfig, TranscoderConfig])
def test_a_coder_computes_the_equations(
    cfg: type[SparseCoderConfig], choice: KernelChoice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """acts = h 1[h > threshold], padded by zeros of latent 0; reconstruction and FVU of them."""
    monkeypatch.setattr(selection, "_CHUNK_ROWS", 7)
    coder = made(cfg(num_latents=40, k=3, activation="jumprelu"))
    coder.use(Kernels(choice))
    x = torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(2))
    x[2, 1] = -3 * coder.encoder.weight.sum(0).detach()  # a row with few
    acts, expected = dense(coder, x.view(20, 6))
    lengths = (acts > 0).sum(1)
    assert len(lengths.unique()) > 3
    with torch.no_grad():
        found, out = coder.encode(x), coder(x)
    for top_acts, top_indices in (found, out[1:3]):
        assert top_acts.shape == (5, 4, int(lengths.max()))
        flat = top_acts.view(20, -1)
        scattered = torch.zeros(20, 40).scatter_add_(1, top_indices.view(20, -1), flat)
        torch.testing.assert_close(scattered.double(), acts, rtol=1e-5, atol=1e-5)
        beyond = torch.arange(flat.shape[1]) >= lengths.unsqueeze(1)
        assert not flat[beyond].any() and not top_indices.view(20, -1)[beyond].any()
    for sae_out in (out.sae_out, coder.decode(*found)):
        torch.testing.assert_close(sae_out.view(20, 6).double(), expected, rtol=1e-5, atol=1e-4)
    rows = x.view(20, 6).double()
    fvu = (rows - expected).square().sum() / (rows - rows.mean(0)).square().sum()
    torch.testing.assert_close(out.fvu.double(), fvu, rtol=1e-5, atol=0)


@pytest.mark.parametrize("choice", ["torch", "auto"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shift", [0.0, -100.0])
@pytest.mark.parametrize("rows", [37, 0])
def test_twins_equal_the_definition(
    rows: int, shift: float, dtype: torch.dtype, choice: KernelChoice
) -> None:
    """Outputs and all gradients of encoding and decoding, also where nothing is active."""
    g = torch.Generator().manual_seed(0)
    shapes = [(rows, 9), (70, 9), (70,), (70, 9), (9,)]
    leaves = [torch.randn(s, dtype=dtype, generator=g) for s in shapes]
    leaves[2] += shift
    threshold = torch.rand(70, generator=g) * 2
    results = []
    for ops in (functional, Kernels(choice)):
        x, W_enc, b_enc, W_dec, bias = moved = [t.clone().requires_grad_() for t in leaves]
        latents = ops.encode_above(x, W_enc, b_enc, threshold, bias)
        out = ops.decode(latents, W_dec)
        again = ops.reconstruct(latents, W_dec, bias, x.detach())
        weights = torch.arange(out.numel(), dtype=dtype).view_as(out).cos()
        (again.squared_error + (out * weights).sum() + latents.acts.pow(2).sum()).backward()
        results.append([out.detach(), again.sae_out.detach(), *(t.grad for t in moved)])
    close = 1e-9 if dtype == torch.float64 else 2e-4
    for ours, expected in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, expected, rtol=close, atol=close)


def test_entries_are_in_rows_of_the_longest_one() -> None:
    """Entries come back as rows, in their order, the rest zeros of latent 0."""
    acts, indices = torch.arange(1.0, 5.0), torch.tensor([7, 5, 6, 2])
    found = entries.in_rows(acts, indices, torch.tensor([0, 1, 1, 4]))
    assert found[0].tolist() == [[1, 0, 0], [0, 0, 0], [2, 3, 4]]
    assert found[1].tolist() == [[7, 0, 0], [0, 0, 0], [5, 6, 2]]


def test_files_hold_the_threshold(tmp_path: Path) -> None:
    """One more tensor, float32 [L]; a file without it, or with it for topk, is refused."""
    coder = made(SaeConfig(num_latents=40, k=3, activation="jumprelu"))
    coder.save_to_disk(tmp_path / "layers.0")
    file = tmp_path / "layers.0" / "sae.safetensors"
    tensors = load_file(file)
    assert {*tensors} == {"encoder.weight", "encoder.bias", "W_dec", "b_dec", "threshold"}
    assert tensors["threshold"].dtype == torch.float32 and tensors["threshold"].shape == (40,)
    cfg = json.loads((tmp_path / "layers.0" / "cfg.json").read_text())
    assert cfg["activation"] == "jumprelu" and cfg["k"] == 3
    (read,) = load_many(tmp_path).values()
    x = torch.randn(9, 6)
    with torch.no_grad():
        for ours, theirs in zip(coder(x), read(x), strict=True):
            assert torch.equal(ours, theirs)
    without = {name: t for name, t in tensors.items() if name != "threshold"}
    save_file(without, file)
    with pytest.raises(UsageError, match="it is not a sparse coder of this kind"):
        SparseCoder.load_from_disk(file.parent)
    save_file(tensors, file)
    cfg["activation"] = "topk"
    (file.parent / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(UsageError, match="it is not a sparse coder of this kind"):
        SparseCoder.load_from_disk(file.parent)


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    """Multi-TopK, losses of the LM, weights without units, a k that falls."""
    for flags, message in (
        ({"multi_topk": True}, "^--multi_topk True: --activation jumprelu has no 4k latents"),
        ({"loss_fn": "kl"}, "^--loss_fn kl: --activation jumprelu"),
        ({"rms_units": False}, "^--no-rms_units: --activation jumprelu"),
        ({"k_decay_steps": 5}, "^--k_decay_steps 5: --activation jumprelu"),
    ):
        with pytest.raises(UsageError, match=message):
            from_flags(TrainConfig, {"activation": "jumprelu", **flags})
    with pytest.raises(UsageError, match="^--multi_topk True: --activation jumprelu"):
        SparseCoder(6, SaeConfig(num_latents=40, k=3, activation="jumprelu", multi_topk=True))


@pytest.mark.parametrize("choice", ["torch", "auto"])
def test_rows_without_active_latents_are_the_bias(choice: KernelChoice) -> None:
    """Where no row of a batch has any, K is 0, and what is decoded is b_dec."""
    coder = SparseCoder(6, SaeConfig(num_latents=20, k=2, activation="jumprelu"))
    coder.use(Kernels(choice))
    coder.b_dec.data.copy_(torch.arange(6.0))
    found = coder.encode(torch.randn(2, 5, 6))  # thresholds are infinite
    assert found.top_acts.shape == (2, 5, 0)
    out = coder.decode(*found)
    assert torch.equal(out, coder.b_dec.expand(2, 5, 6))

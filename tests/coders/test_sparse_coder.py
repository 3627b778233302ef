"""One coder: how it starts, what it computes, and which widths fit together."""

import pytest
import torch

from sae import SaeConfig, SparseCoder, SparseCoderConfig, TranscoderConfig, UsageError
from sae.coders.moments import Moments


def test_sae_starts_as_its_unit_normed_encoder() -> None:
    """An SAE's decoder rows are the encoder's, scaled to norm 1; its biases are 0."""
    coder = SparseCoder(12, SaeConfig(expansion_factor=4, k=2))
    assert coder.W_dec is not None
    weight = coder.encoder.weight
    torch.testing.assert_close(coder.W_dec, weight / weight.norm(dim=1, keepdim=True))
    assert weight.abs().max() <= 12**-0.5
    assert coder.encoder.bias.count_nonzero() == coder.b_dec.count_nonzero() == 0


def test_transcoder_starts_at_zero_and_centered() -> None:
    """A transcoder's decoder and skip are 0; centering makes the mean input's pre-activations 0."""
    coder = SparseCoder(12, TranscoderConfig(num_latents=30, k=2, skip_connection=True), d_out=5)
    assert coder.W_dec is not None and coder.W_skip is not None
    assert coder.W_dec.shape == (30, 5) and coder.W_skip.shape == (5, 12)
    assert coder.W_dec.count_nonzero() == coder.W_skip.count_nonzero() == 0
    x, y = torch.randn(50, 12) + 3, torch.randn(50, 5) - 2
    coder.center_(Moments.of(x).mean, Moments.of(y).mean)
    pre_acts = coder.encoder(x.mean(0))
    torch.testing.assert_close(pre_acts, torch.zeros(30), atol=1e-5, rtol=0)
    torch.testing.assert_close(coder.b_dec.data, y.mean(0))
    # With a decoder of zeros the reconstruction is the mean, so FVU is 1.
    torch.testing.assert_close(coder(x, y).fvu, torch.tensor(1.0))


def test_only_an_sae_subtracts_b_dec() -> None:
    """Encoding is of x - b_dec for an SAE and of x for a transcoder."""
    x = torch.randn(4, 6)
    for cfg, shift in (
        (SaeConfig(num_latents=9, k=9), 1.0),
        (TranscoderConfig(num_latents=9, k=9), 0.0),
    ):
        coder = SparseCoder(6, cfg)
        coder.b_dec.data.fill_(1.0)
        expected = coder.encoder(x - shift).relu().sum(1)
        torch.testing.assert_close(coder.encode(x).top_acts.sum(1), expected)


def test_multi_topk_changes_no_other_output() -> None:
    """With Multi-TopK the output, latents and FVU are those of k latents; its own FVU is of 4k."""
    torch.manual_seed(0)
    plain = SparseCoder(10, SaeConfig(num_latents=64, k=3))
    multi = SparseCoder(10, SaeConfig(num_latents=64, k=3, multi_topk=True))
    wide = SparseCoder(10, SaeConfig(num_latents=64, k=12))
    for coder in (multi, wide):
        coder.load_state_dict(plain.state_dict())
    x = torch.randn(20, 10)
    a, b = plain(x), multi(x)
    torch.testing.assert_close(a.sae_out, b.sae_out)
    torch.testing.assert_close(a.fvu, b.fvu)
    assert b.top_indices.shape == (20, 3)
    torch.testing.assert_close(b.multi_topk_fvu, wide(x).fvu)
    assert a.multi_topk_fvu == 0


def test_fvu_of_parts_over_the_whole_variance_adds_up() -> None:
    """FVU of parts over the variance of the whole adds up to FVU of the whole."""
    coder = SparseCoder(10, SaeConfig(num_latents=64, k=3, multi_topk=True))
    x, dead = torch.randn(24, 10) + 5, torch.arange(64) < 9
    whole = coder(x, dead_mask=dead)
    variance = Moments.of(x).total_variance
    torch.testing.assert_close(variance, (x - x.mean(0)).double().pow(2).sum(), rtol=1e-6, atol=0)
    parts = [coder(piece, dead_mask=dead, total_variance=variance) for piece in x.split(7)]
    for i in (3, 4, 5):
        torch.testing.assert_close(sum(p[i] for p in parts).float(), whole[i])


def test_errors_are_fvu_before_it_is_divided() -> None:
    """`errors` of rows, over the variance of the targets, are what a forward of the coder gives."""
    coder = SparseCoder(10, TranscoderConfig(num_latents=64, k=3, multi_topk=True), d_out=6)
    coder.W_dec.data.normal_()  # type: ignore[union-attr]  # it has a decoder
    x, y, dead = torch.randn(24, 10), torch.randn(24, 6), torch.arange(0, 64, 3)
    out, errors = coder(x, y, dead), coder.errors(x, y, dead)
    variance = Moments.of(y).total_variance
    for loss, error in zip(out[3:], errors[3:6], strict=True):
        assert error > 0
        torch.testing.assert_close(loss, (error / variance).float())
    assert torch.equal(out.sae_out, errors.sae_out)
    torch.testing.assert_close(errors.squared_error, (y - errors.sae_out).square().sum())


def test_other_precisions_and_devices_are_accepted() -> None:
    """A float32 coder takes bfloat16 rows; a coder can live in bfloat16."""
    coder = SparseCoder(8, SaeConfig(num_latents=16, k=2))
    assert coder(torch.randn(4, 8).bfloat16()).sae_out.dtype == torch.float32
    half = SparseCoder(8, SaeConfig(num_latents=16, k=2), dtype=torch.bfloat16)
    out = half(torch.randn(4, 8))
    assert out.sae_out.dtype == torch.bfloat16
    out.fvu.backward()
    assert half.encoder.weight.grad is not None


def test_k_must_fit_the_number_of_latents() -> None:
    """k above the number of latents, and groups that do not divide it, are refused by name."""
    with pytest.raises(UsageError, match="--k 9 .*8 latents"):
        SparseCoder(4, SaeConfig(num_latents=8, k=9))
    with pytest.raises(UsageError, match="groupmax.*--k 3"):
        SparseCoder(4, SaeConfig(num_latents=8, k=3, activation="groupmax"))
    with pytest.raises(UsageError, match="--multi_topk"):
        SparseCoder(4, SaeConfig(num_latents=8, k=3, multi_topk=True))


def test_a_config_cannot_be_changed() -> None:
    """The config of a coder is frozen."""
    with pytest.raises(AttributeError):
        SparseCoderConfig().k = 3  # type: ignore[misc]  # that is the test


def test_equal_rows_have_no_variance() -> None:
    """What the difference of two large sums leaves is rounding; far from 0 small ones stay."""
    for value in (0.1, 1e-20, 3e7):
        rows = torch.full((5000, 7), value)
        assert Moments.of(rows).total_variance == 0
        rows[:, 2] += torch.linspace(0, 0.01 * value, 5000)
        expected = rows.double().var(0, unbiased=False).sum() * 5000
        torch.testing.assert_close(Moments.of(rows).total_variance, expected)

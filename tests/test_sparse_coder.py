"""A coder has the reference's names, shapes and files, and refuses what is not a coder's."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sae.sparse_coder as sparse_coder_module
from sae import (
    Sae,
    SaeConfig,
    SparseCoder,
    SparseCoderConfig,
    TranscoderConfig,
    UsageError,
    functional,
    load_many,
)

REFERENCE = Path(__file__).parent / "fixtures" / "reference"


@pytest.mark.parametrize("kind", ["sae", "transcoder", "groupmax"])
def test_coders_of_the_reference_load_with_their_numbers(kind: str) -> None:
    """A file of eai-sparsify 1.3.3 gives the latents, reconstruction and FVU it gave there."""
    coder = Sae.load_from_disk(REFERENCE / kind)
    expected = load_file(REFERENCE / f"{kind}.expected.safetensors")
    out = coder(expected["x"], expected["y"] if coder.cfg.transcode else None)
    torch.testing.assert_close(out.sae_out, expected["sae_out"])
    torch.testing.assert_close(out.fvu, expected["fvu"])
    ours, theirs = out.top_indices.sort(1).values, expected["latent_indices"].sort(1).values
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["sae", "transcoder", "groupmax"])
def test_files_have_the_reference_format(kind: str, tmp_path: Path) -> None:
    """What is saved has the reference's tensor names, shapes, types and config keys."""
    Sae.load_from_disk(REFERENCE / kind).save_to_disk(tmp_path)
    ours, theirs = (load_file(p / "sae.safetensors") for p in (tmp_path, REFERENCE / kind))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor)
    ours, theirs = (json.loads((p / "cfg.json").read_text()) for p in (tmp_path, REFERENCE / kind))
    assert ours == {**theirs, "d_out": theirs["d_in"]}


def test_readme_loading_examples(tmp_path: Path) -> None:
    """The reference README's ways to build, save, load and use a coder work with these imports."""
    for name in ("layers.10", "layers.2"):
        SparseCoder(8, SaeConfig(num_latents=16, k=2), device="cpu").save_to_disk(tmp_path / name)
    coders = load_many(tmp_path, local=True)
    assert list(coders) == ["layers.2", "layers.10"]
    assert list(Sae.load_many(str(tmp_path), layers=["layers.10"])) == ["layers.10"]
    assert list(Sae.load_many(str(tmp_path), pattern="*.2")) == ["layers.2"]
    coder = coders["layers.2"]
    x = torch.randn(3, 5, 8)
    latents = coder.encode(x)
    assert latents.top_acts.shape == latents.top_indices.shape == (3, 5, 2)
    out = coder(x)
    torch.testing.assert_close(coder.decode(*latents), out.sae_out)
    assert out.sae_out.shape == x.shape and out.top_acts.shape == (3, 5, 2)


def test_load_from_hub_asks_for_one_hookpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a repository only the hookpoint's folder is fetched, and a missing one is named."""
    SparseCoder(8, SaeConfig(num_latents=16, k=2)).save_to_disk(tmp_path / "layers.3")
    asked = []

    def snapshot(name: str, allow_patterns: str | None = None) -> str:
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(sparse_coder_module, "snapshot_download", snapshot)
    assert Sae.load_from_hub("org/repo", hookpoint="layers.3").num_latents == 16
    assert list(Sae.load_many("org/repo", pattern="layers.*")) == ["layers.3"]
    assert asked == [("org/repo", "layers.3/*"), ("org/repo", "layers.*/*")]
    with pytest.raises(UsageError, match=r"layers\.4"):
        Sae.load_from_hub("org/repo", hookpoint="layers.4")


def test_sae_starts_as_its_unit_normed_encoder() -> None:
    """An SAE's decoder rows are the encoder's, scaled to norm 1; its biases are 0."""
    coder = SparseCoder(12, SaeConfig(expansion_factor=4, k=2))
    assert coder.W_dec is not None
    weight = coder.encoder.weight
    torch.testing.assert_close(coder.W_dec, weight / weight.norm(dim=1, keepdim=True))
    assert weight.abs().max() <= 12**-0.5
    assert coder.encoder.bias.count_nonzero() == coder.b_dec.count_nonzero() == 0


def test_transcoder_starts_at_zero_and_centred() -> None:
    """A transcoder's decoder and skip are 0; centring makes the mean input's pre-activations 0."""
    coder = SparseCoder(12, TranscoderConfig(num_latents=30, k=2, skip_connection=True), d_out=5)
    assert coder.W_dec is not None and coder.W_skip is not None
    assert coder.W_dec.shape == (30, 5) and coder.W_skip.shape == (5, 12)
    assert coder.W_dec.count_nonzero() == coder.W_skip.count_nonzero() == 0
    x, y = torch.randn(50, 12) + 3, torch.randn(50, 5) - 2
    coder.center_(functional.Moments.of(x).mean, functional.Moments.of(y).mean)
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


def test_multi_topk_replaces_nothing() -> None:
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


def test_the_denominator_can_be_given() -> None:
    """FVU of parts over the variance of the whole adds up to FVU of the whole."""
    coder = SparseCoder(10, SaeConfig(num_latents=64, k=3, multi_topk=True))
    x, dead = torch.randn(24, 10) + 5, torch.arange(64) < 9
    whole = coder(x, dead_mask=dead)
    variance = functional.Moments.of(x).total_variance
    torch.testing.assert_close(variance, (x - x.mean(0)).double().pow(2).sum(), rtol=1e-6, atol=0)
    parts = [coder(piece, dead_mask=dead, total_variance=variance) for piece in x.split(7)]
    for i in (3, 4, 5):
        torch.testing.assert_close(sum(p[i] for p in parts).float(), whole[i])


def test_other_precisions_and_devices_are_accepted() -> None:
    """A float32 coder takes bfloat16 rows; a coder can live in bfloat16."""
    coder = SparseCoder(8, SaeConfig(num_latents=16, k=2))
    assert coder(torch.randn(4, 8).bfloat16()).sae_out.dtype == torch.float32
    half = SparseCoder(8, SaeConfig(num_latents=16, k=2), dtype=torch.bfloat16)
    out = half(torch.randn(4, 8))
    assert out.sae_out.dtype == torch.bfloat16
    out.fvu.backward()
    assert half.encoder.weight.grad is not None


def test_decoder_can_be_left_out() -> None:
    """With decoder=False a coder encodes and has no W_dec."""
    coder = Sae.load_from_disk(REFERENCE / "sae", decoder=False)
    assert coder.W_dec is None
    assert coder.encode(torch.randn(2, 10)).top_acts.shape == (2, 3)


def _damage(folder: Path, kind: str) -> None:
    cfg, weights = folder / "cfg.json", folder / "sae.safetensors"
    values = json.loads(cfg.read_text())
    tensors = load_file(weights)
    if kind == "not json":
        cfg.write_text("{")
    elif kind == "no d_in":
        cfg.write_text("{}")
    elif kind == "wrong type":
        cfg.write_text(json.dumps({**values, "k": "3"}))
    elif kind == "huge":
        cfg.write_text(json.dumps({**values, "num_latents": 10**30}))
    elif kind == "other width":
        cfg.write_text(json.dumps({**values, "num_latents": 999_999_999}))
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-40])
    elif kind == "no weights":
        weights.unlink()
    elif kind == "foreign":
        save_file({"W_enc": torch.zeros(3, 3)}, weights)
    elif kind == "extra tensor":
        save_file({**tensors, "threshold": torch.zeros(3)}, weights)


@pytest.mark.parametrize(
    "kind",
    [
        "not json",
        "no d_in",
        "wrong type",
        "huge",
        "other width",
        "truncated",
        "no weights",
        "foreign",
        "extra tensor",
    ],
)
def test_damaged_and_foreign_files_are_refused(kind: str, tmp_path: Path) -> None:
    """A file that is damaged or another tool's gives one readable line that names it."""
    Sae.load_from_disk(REFERENCE / "sae").save_to_disk(tmp_path / "c")
    _damage(tmp_path / "c", kind)
    with pytest.raises(UsageError, match="cfg.json|sae.safetensors"):
        Sae.load_from_disk(tmp_path / "c")


def test_k_must_fit() -> None:
    """k above the number of latents, and groups that do not divide it, are refused by name."""
    with pytest.raises(UsageError, match="--k 9 .*8 latents"):
        SparseCoder(4, SaeConfig(num_latents=8, k=9))
    with pytest.raises(UsageError, match="groupmax.*--k 3"):
        SparseCoder(4, SaeConfig(num_latents=8, k=3, activation="groupmax"))
    with pytest.raises(UsageError, match="--multi_topk"):
        SparseCoder(4, SaeConfig(num_latents=8, k=3, multi_topk=True))


def test_config_is_frozen() -> None:
    """A coder's config cannot be changed behind its back."""
    with pytest.raises(AttributeError):
        SparseCoderConfig().k = 3  # type: ignore[misc]

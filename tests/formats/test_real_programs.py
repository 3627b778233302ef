"""The files that are written, opened by the programs that they are for: run by --formats."""

from pathlib import Path
from typing import Any

import pytest
import torch
from other_programs import JUMPRELU, KINDS, dense, random_coder, save_run
from torch import Tensor

from sae import SparseCoder
from sae.share.export import ExportConfig, export

pytestmark = pytest.mark.formats
ROWS = torch.randn(4096, 32, generator=torch.Generator().manual_seed(5))


def exported(tmp_path: Path, coder: SparseCoder, program: Any) -> Path:
    run = save_run(tmp_path / "run", {"layers.3": coder})
    (folder,) = export(ExportConfig(str(run), out=str(tmp_path / "out"), to=program))[0]
    return folder


def assert_same(coder: SparseCoder, acts: Tensor, out: Tensor) -> None:
    """Same latents and reconstructions on 4,096 rows to 1e-5, relative to the largest."""
    for found, expected in zip((acts, out), dense(coder, ROWS), strict=True):
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_sae_lens_computes_the_same(tmp_path: Path, kind: str) -> None:
    """encode and decode of SAE.load_from_disk, also folded, as SAEDashboard does."""
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]

    coder = random_coder(KINDS[kind], 32)
    theirs = SAE.load_from_disk(str(exported(tmp_path, coder, "sae_lens")))
    acts = theirs.encode(ROWS)
    assert_same(coder, acts, theirs.decode(acts))
    if kind == "free norms":
        with pytest.raises(NotImplementedError):
            theirs.fold_W_dec_norm()
        return
    theirs.fold_W_dec_norm()
    acts = theirs.encode(ROWS)
    assert_same(coder, acts, theirs.decode(acts))


@pytest.mark.parametrize("kind", JUMPRELU)
@torch.no_grad()
def test_sae_lens_computes_the_same_with_thresholds(tmp_path: Path, kind: str) -> None:
    """The same of JumpReLU coders, skip connection and all, before and after folding."""
    from sae_lens import SAE  # pyright: ignore[reportMissingImports]

    coder = random_coder(JUMPRELU[kind], 32)
    theirs = SAE.load_from_disk(str(exported(tmp_path, coder, "sae_lens")))
    assert_same(coder, theirs.encode(ROWS), theirs(ROWS))
    theirs.fold_W_dec_norm()
    assert_same(coder, theirs.encode(ROWS), theirs(ROWS))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_dictionary_learning_computes_the_same(tmp_path: Path, kind: str) -> None:
    """load_dictionary, encode and decode."""
    from dictionary_learning.utils import load_dictionary  # pyright: ignore[reportMissingImports]

    coder = random_coder(KINDS[kind], 32)
    folder = exported(tmp_path, coder, "dictionary_learning")
    theirs, config = load_dictionary(str(folder), "cpu")
    acts = theirs.encode(ROWS)
    assert_same(coder, acts, theirs.decode(acts))
    assert config["trainer"]["layer"] == 3


@pytest.mark.parametrize("kind", ["sae", "one threshold", "transcoder"])
@torch.no_grad()
def test_dictionary_learning_computes_the_same_with_thresholds(tmp_path: Path, kind: str) -> None:
    """BatchTopKSAE and JumpReluAutoEncoder, as load_dictionary makes them."""
    from dictionary_learning.utils import load_dictionary  # pyright: ignore[reportMissingImports]

    coder = random_coder(JUMPRELU["transcoder" if kind == "transcoder" else "sae"], 32)
    if kind == "one threshold":
        coder.threshold.data.fill_(1.5)
    theirs, _ = load_dictionary(str(exported(tmp_path, coder, "dictionary_learning")), "cpu")
    acts = theirs.encode(ROWS)
    assert_same(coder, acts, theirs.decode(acts))


@pytest.mark.parametrize("kind", ["standard", "gated", "jumprelu"])
@torch.no_grad()
def test_other_coders_of_sae_lens_are_the_same_here(tmp_path: Path, kind: str) -> None:
    """SAEs that SAELens itself wrote, of the kinds that are read through thresholds."""
    from sae_lens.registry import get_sae_class  # pyright: ignore[reportMissingImports]

    sae_class, cfg_class = get_sae_class(kind)
    theirs = sae_class(cfg_class(d_in=32, d_sae=64))
    for parameter in theirs.parameters():
        parameter.data.normal_()
    theirs.save_model(str(tmp_path / "c"))
    assert_same(SparseCoder.load_from_disk(tmp_path / "c"), theirs.encode(ROWS), theirs(ROWS))


@torch.no_grad()
def test_what_sae_lens_saves_is_the_same_here(tmp_path: Path) -> None:
    """A TopK SAE that SAELens itself wrote."""
    from sae_lens import TopKSAE, TopKSAEConfig  # pyright: ignore[reportMissingImports]

    cfg = TopKSAEConfig(d_in=32, d_sae=64, k=5, rescale_acts_by_decoder_norm=True)
    theirs = TopKSAE(cfg)
    for parameter in theirs.parameters():
        parameter.data.normal_()
    theirs.save_model(str(tmp_path / "c"))
    acts = theirs.encode(ROWS)
    assert_same(SparseCoder.load_from_disk(tmp_path / "c"), acts, theirs.decode(acts))

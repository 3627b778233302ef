"""Hookpoints are chosen by globs or layers, in natural order; what matches nothing is named."""

from pathlib import Path

import pytest
from tiny_lms import LAYERS, LLAMA, make
from transformers import LlamaConfig

from sae import UsageError
from sae.lm.hookpoints import choose_hookpoints


def test_default_is_every_residual_stream(tmp_path: Path) -> None:
    """Without globs all layers are chosen in natural order, thinned by the stride."""
    lm = make(LlamaConfig(**{**LAYERS, "num_hidden_layers": 11}), tmp_path)
    assert choose_hookpoints(lm) == [f"layers.{i}" for i in range(11)]
    assert choose_hookpoints(lm, layer_stride=5) == ["layers.0", "layers.5", "layers.10"]
    assert choose_hookpoints(lm, layers=(10, 2)) == ["layers.2", "layers.10"]
    globbed = choose_hookpoints(lm, ("layers.[02].mlp", "layers.10.self_attn"))
    assert globbed == ["layers.0.mlp", "layers.2.mlp", "layers.10.self_attn"]


def test_a_name_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    """A glob without a match is answered with the nearest names, a layer with the range."""
    lm = make(LLAMA, tmp_path)
    with pytest.raises(UsageError, match=r"--hookpoints layer\.1\.mlp: .*nearest.*layers\.1\.mlp"):
        choose_hookpoints(lm, ("layer.1.mlp",))
    with pytest.raises(UsageError, match="--layers 3: LlamaModel has 3 layers, 0 to 2"):
        choose_hookpoints(lm, layers=(3,))

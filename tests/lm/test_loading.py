"""Of the LM no more is loaded than the hookpoints need; what cannot be loaded is named."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_lms import LLAMA, TOKENS, hooked, load, make

from sae import UsageError
from sae.config import ModelConfig
from sae.lm.capture import Capture
from sae.lm.loading import find_hookpoints, load_lm, token_limits


def test_later_layers_are_not_read_from_disk(tmp_path: Path) -> None:
    """A checkpoint whose later layers are gone loads; one that lacks a used weight is refused."""
    whole = make(LLAMA, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {n: t for n, t in weights.items() if not n.startswith(("layers.2", "norm"))}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    lm, names = load(tmp_path, layers=(1,))
    assert torch.equal(Capture(lm, names)(TOKENS)[names[0]][1], hooked(whole, "layers.1")[1])
    with pytest.raises(UsageError, match=r"lack layers\.2"):
        load(tmp_path)
    kept.pop("layers.1.mlp.up_proj.weight")
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"lack layers\.1\.mlp\.up_proj\.weight.*random weights"):
        load(tmp_path, layers=(1,))


def test_limits_of_token_ids_are_the_lms(tmp_path: Path) -> None:
    """Token ids go up to the size of the embedding, positions up to the config's."""
    assert token_limits(make(LLAMA, tmp_path)) == (64, 64)


def test_broken_models_are_refused_in_one_line(tmp_path: Path) -> None:
    """Unknown names, broken configs, damaged and pickled weights are refused by name."""
    with pytest.raises(UsageError, match="MODEL no-such/model"):
        find_hookpoints(ModelConfig("no-such/model"))
    make(LLAMA, tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    with pytest.raises(UsageError, match="weights cannot be loaded"):
        load(tmp_path)
    weights.unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match="weights cannot be loaded"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UsageError, match="MODEL"):
        load(tmp_path)


def test_eight_bit_loading_says_what_it_needs(tmp_path: Path) -> None:
    """--load_in_8bit without bitsandbytes is refused in one line."""
    make(LLAMA, tmp_path)
    with pytest.raises(UsageError, match="--load_in_8bit|weights cannot be loaded"):
        load(tmp_path, load_in_8bit=True)


def test_what_is_wrong_with_an_lm_is_said_by_its_cause(tmp_path: Path) -> None:
    """A folder that is not there, a kind that is not known, a library that is missing."""
    with pytest.raises(UsageError, match="no such language model here or on the Hub"):
        find_hookpoints(ModelConfig("no-such/model"))
    (tmp_path / "config.json").write_text('{"model_type": "no-such-kind"}')
    with pytest.raises(UsageError, match=r"transformers [\d.]+ cannot use its config\..*no-such"):
        find_hookpoints(ModelConfig(str(tmp_path)))
    make(LLAMA, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    cfg = ModelConfig(str(tmp_path), layers=(0,))
    skeleton, names = find_hookpoints(cfg)
    with pytest.raises(UsageError, match=r"^MODEL .*: a library is missing") as caught:
        load_lm(cfg, skeleton, names)
    assert "load_in_8bit" not in str(caught.value)

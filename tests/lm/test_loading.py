"""Of the LM no more is loaded than the hookpoints need; what cannot be loaded is named."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from tiny_lms import LLAMA, TOKENS, hooked, load, make
from transformers.utils import hub

from sae import UsageError
from sae.config import ModelConfig
from sae.lm.capture import Capture
from sae.lm.loading import fetch_weights, find_hookpoints, load_lm, token_limits


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


class Hub:
    """A folder in place of the Hub: files come into a cache, and what came is noted."""

    def __init__(self, folder: Path, cache: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.snapshot, self.came = folder, cache / "models--a--b/snapshots/0", []
        (cache / "models--a--b/refs").mkdir(parents=True)
        (cache / "models--a--b/refs/main").write_text("0")
        self.snapshot.mkdir(parents=True)
        patch.setattr(hub.constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(hub, "hf_hub_download", lambda _, name, **kwargs: self.bring(name))
        patch.setattr(hub, "snapshot_download", self.bring_all)

    def bring_all(self, _: str, allow_patterns: list[str], **kwargs: object) -> None:
        for name in allow_patterns:
            self.bring(name)

    def bring(self, name: str) -> None:
        if not (self.folder / name).exists():
            raise LocalEntryNotFoundError(name)
        if not (self.snapshot / name).exists():
            shutil.copy(self.folder / name, self.snapshot / name)
            self.came.append(name)


@pytest.mark.parametrize("shard", ["20KB", "1GB"])
def test_all_weights_are_downloaded_before_ranks_load_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard: str
) -> None:
    """After `fetch_weights` loading downloads nothing more; a loaded model needs nothing."""
    make(LLAMA, tmp_path / "made").save_pretrained(tmp_path / "lm", max_shard_size=shard)
    weights = {file.name for file in (tmp_path / "lm").glob("*.safetensors")}
    assert (len(weights) > 1) == (shard == "20KB")
    found, cfg = Hub(tmp_path / "lm", tmp_path / "cache", monkeypatch), ModelConfig("a/b")
    skeleton, hookpoints = find_hookpoints(cfg)
    assert not weights & set(found.came)
    fetch_weights(cfg, skeleton)
    assert weights < set(found.came)
    found.came.clear()
    lm = load_lm(cfg, skeleton, hookpoints)
    assert not weights & set(found.came)
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: pytest.fail("asks the Hub"))
    fetch_weights(cfg, lm)


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

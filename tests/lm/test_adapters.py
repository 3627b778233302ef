"""An adapter is applied or refused; what is passed for an LM is one."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_lms import LAYERS, TOKENS
from torch import Tensor, nn
from training_runs import run
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from sae import UsageError
from sae.config import ModelConfig
from sae.lm.adapters import base_of_adapter
from sae.lm.capture import Capture
from sae.lm.loading import find_hookpoints, load_lm

LAYER_1 = ModelConfig("lm", layers=(1,))
T5 = T5Config(vocab_size=256, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4)


def plain() -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**LAYERS)).eval()


def adapted() -> PeftModel:
    lora = LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    lm = get_peft_model(plain(), lora)
    torch.manual_seed(1)
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return lm.eval()


def name_base(adapter: Path, **entries: str | None) -> None:
    """Write entries into an adapter's config."""
    said = adapter / "adapter_config.json"
    said.write_text(json.dumps({**json.loads(said.read_text()), **entries}))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, its adapter alone, and both in one folder."""
    folder = tmp_path_factory.mktemp("adapters")
    plain().save_pretrained(folder / "base")
    adapted().save_pretrained(folder / "alone")
    name_base(folder / "alone", base_model_name_or_path=f"{folder}/base")
    shutil.copytree(folder / "base", folder / "beside")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folder / "alone" / name, folder / "beside")
    return folder


def rows(lm: Any) -> Tensor:
    """The residual stream after layer 1, as the model itself returns it."""
    with torch.no_grad():
        return lm(input_ids=TOKENS, output_hidden_states=True).hidden_states[2].flatten(0, 1)


@pytest.mark.parametrize("name", ["alone", "beside"])
def test_an_adapter_is_applied(folders: Path, name: str) -> None:
    """The rows are those of the adapted LM, whether its base lies beside it or is named by it."""
    cfg = ModelConfig(str(folders / name), layers=(1,))
    skeleton, hookpoints = find_hookpoints(cfg)
    found = Capture(load_lm(cfg, skeleton, hookpoints), hookpoints)(TOKENS)["layers.1"][1]
    expected = rows(adapted())
    torch.testing.assert_close(found, expected)
    assert float((rows(plain()) - expected).norm() / expected.norm()) > 0.1


def test_without_peft_an_adapter_is_refused(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line says what to install, and that the base model alone is another choice."""
    monkeypatch.setattr("sae.lm.adapters.is_peft_available", lambda: False)
    for name in ("alone", "beside"):
        with pytest.raises(UsageError, match="adapter_config.json.*pip install peft"):
            find_hookpoints(ModelConfig(str(folders / name)))


def test_an_adapter_that_lacks_weights_is_refused(folders: Path, tmp_path: Path) -> None:
    """Random numbers in place of an adapter's are not trained on."""
    shutil.copytree(folders / "beside", tmp_path / "lacking")
    file = tmp_path / "lacking" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(name for name in tensors if "layers.0" in name))
    save_file(tensors, file, {"format": "pt"})
    cfg = ModelConfig(str(tmp_path / "lacking"), layers=(1,))
    with pytest.raises(UsageError, match="its adapter cannot be applied .*layers.0"):
        load_lm(cfg, *find_hookpoints(cfg))


@pytest.mark.parametrize("name", ["alone", "beside"])
def test_an_adapter_on_a_base_that_lacks_weights_is_refused(
    folders: Path, tmp_path: Path, name: str
) -> None:
    """Nor on a base's: an adapter does not hide them."""
    folder = shutil.copytree(folders / name, tmp_path / "adapter")
    base = folder if name == "beside" else shutil.copytree(folders / "base", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    name_base(folder, base_model_name_or_path=str(base))
    cfg = ModelConfig(str(folder), layers=(1,))
    with pytest.raises(UsageError, match=rf"{base}: its files lack .*layers.0.mlp.up_proj.weight"):
        load_lm(cfg, *find_hookpoints(cfg))


def test_an_adapter_without_a_base_is_refused(folders: Path, tmp_path: Path) -> None:
    """The line names the entry that is absent, empty or unreadable."""
    folder = shutil.copytree(folders / "alone", tmp_path / "adapter")
    for said in ('{"peft_type": "LORA"}', '{"base_model_name_or_path": null}', "{", "[]"):
        (folder / "adapter_config.json").write_text(said)
        with pytest.raises(UsageError, match="names no base_model_name_or_path"):
            find_hookpoints(ModelConfig(str(folder)))


def test_a_revision_is_the_adapters(folders: Path, tmp_path: Path) -> None:
    """The base has the one that the adapter's config says, or none."""
    folder = shutil.copytree(folders / "alone", tmp_path / "adapter")
    for theirs in (None, "v1"):
        name_base(folder, base_model_name_or_path="someone/base", revision=theirs)
        base = base_of_adapter(ModelConfig(str(folder), revision="v2"))
        assert base is not None and (base.model, base.revision) == ("someone/base", theirs)


def test_a_peft_model_is_trained_on_to_the_end(tokens: Tensor, settings: dict[str, Any]) -> None:
    """`train(lm=PeftModel)` captures the adapted rows, evaluates with the head, and saves."""
    lm = adapted()
    lm.get_base_model().name_or_path = "lm"
    skeleton, hookpoints = find_hookpoints(LAYER_1, lm)  # type: ignore[arg-type]
    found = Capture(skeleton, hookpoints)(TOKENS)["layers.1"][1]
    torch.testing.assert_close(found, rows(lm))
    summary = run(lm, tokens, settings, run_name="r", layers=(1,), eval_every=10)  # type: ignore
    assert summary["hookpoints"]["layers.1"]["predictions"]["ce_clean"] > 0
    assert (Path(summary["hookpoints"]["layers.1"]["path"]) / "sae.safetensors").is_file()


def test_what_is_no_lm_is_refused_at_the_start() -> None:
    """A wrapper, a module of another kind, and an LM with a prefix of its own: each by name."""
    prefix = PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    cases = [
        (nn.Linear(2, 2), "lm: Linear is no model of transformers"),
        (nn.DataParallel(plain()), "lm: DataParallel .* pass its .module"),
        (torch.compile(plain()), "lm: OptimizedModule .* pass its ._orig_mod"),
        (T5ForConditionalGeneration(T5), r"lm: the decoder of T5.*: pass get_encoder\(\)"),
        (get_peft_model(plain(), prefix), "puts tokens of its own before the text"),
    ]
    for lm, said in cases:
        with pytest.raises(UsageError, match=said):
            find_hookpoints(LAYER_1, lm)  # type: ignore[arg-type]


def test_the_encoder_of_an_encoder_decoder_is_an_lm() -> None:
    """What the refusal of the whole one says works, and gives the encoder's own rows."""
    for encoder in (T5ForConditionalGeneration(T5).get_encoder(), T5EncoderModel(T5)):
        lm, hookpoints = find_hookpoints(LAYER_1, encoder.eval())
        (found,) = Capture(lm, hookpoints)(TOKENS).values()
        torch.testing.assert_close(found[1], rows(encoder))

"""LMs that predict no next token are judged by all that needs none, with one note."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers as hf
from command_runs import call

from sae import UsageError
from sae.flag_checks import from_flags
from train_sae import TrainConfig, train

ROOT = Path(__file__).parents[2]
SIZES: dict[str, Any] = {
    **{"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4},
    **{"intermediate_size": 48, "max_position_embeddings": 64},
}
MARKS = {
    "pad_token_id": 0,
    "cls_token_id": 1,
    "bos_token_id": 1,
    "sep_token_id": 2,
    "eos_token_id": 2,
}
VISION = {"hidden_size": 32, "image_size": 28, "patch_size": 14, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 4, "projection_dim": 32}
WITHOUT_HEAD = {
    "bert": hf.BertConfig(**SIZES),
    "esm": hf.EsmConfig(**SIZES, pad_token_id=1, mask_token_id=2),
    "modernbert": hf.ModernBertConfig(**SIZES, **MARKS, global_attn_every_n_layers=2),
    "t5": hf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4),
    "llava": hf.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "intermediate_size": 32, **VISION},
        text_config={"model_type": "llama", **SIZES},
    ),
    "qwen2_5_vl": hf.Qwen2_5_VLConfig(
        text_config={
            **SIZES,
            "num_key_value_heads": 2,
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 1,
            "hidden_size": 32,
            "num_heads": 4,
            "intermediate_size": 32,
            "out_hidden_size": 32,
            "fullatt_block_indexes": [0],
        },
    ),
}
AS_SAVED = {
    "t5": hf.T5ForConditionalGeneration,
    "llava": hf.LlavaForConditionalGeneration,
    "qwen2_5_vl": hf.Qwen2_5_VLForConditionalGeneration,
}


@pytest.fixture(params=WITHOUT_HEAD)
def run(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """The beginning of a command line that trains on such an LM."""
    kind, config = AS_SAVED.get(request.param), WITHOUT_HEAD[request.param]
    lm = hf.AutoModelForMaskedLM.from_config(config) if kind is None else kind(config)
    lm.save_pretrained(tmp_path / "lm")
    ids = np.random.default_rng(0).integers(3, 60, 16 * 200).astype("uint16")
    ids.tofile(tmp_path / "ids.bin")
    return [str(tmp_path / "lm"), str(tmp_path / "ids.bin")]


def flags(run: list[str], **more: Any) -> TrainConfig:
    """A short run with those."""
    return from_flags(
        TrainConfig,
        {
            **{"model": run[0], "dataset": run[1], "ctx_len": 16, "batch_size": 8, "k": 4},
            **{"expansion_factor": 4, "layers": (1,), "eval_tokens": 160, "log_with": "none"},
            **{"save_dir": str(Path(run[0]).parent / "runs"), "run_name": "run", **more},
        },
    )


def test_training_and_commands_do_without_a_head(
    run: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Training with --eval_every, evaluate and features give all but figures of predictions."""
    summary = train(flags(run, eval_every=5))
    (figures,) = summary["hookpoints"].values()
    assert 0 < figures["fvu"] < 2 and figures["predictions"] is None
    folder = Path(run[0]).parent / "runs/run"
    assert capsys.readouterr().out.count("predicts no next token") == 1
    assert call(monkeypatch, "evaluate", str(folder)) == 0
    printed = capsys.readouterr().out
    assert printed.count("predicts no next token") == 1 and f"{figures['fvu']:.4f}" in printed
    assert call(monkeypatch, "features", str(folder), "--out", str(folder / "page.html")) == 0
    assert (folder / "page.html").stat().st_size > 10_000


def test_the_lms_own_loss_needs_a_head(run: list[str]) -> None:
    """--loss_fn is named, not a flag that was not given."""
    with pytest.raises(UsageError, match=r"^--loss_fn: .*use fvu"):
        train(flags(run, loss_fn="kl"))

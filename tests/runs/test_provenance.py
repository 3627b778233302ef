"""What a run recorded about its data means afterwards what it meant then."""

import json
from pathlib import Path

import datasets
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from sae.flag_checks import from_flags
from sae.judge.trained import CodersConfig, load_trained
from sae.runs.provenance import flags_of_run
from train_sae import TrainConfig, train

ROOT = Path(__file__).parents[2]
TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"


def test_the_column_that_was_once_the_default_is_the_default(tmp_path: Path) -> None:
    """Runs from before --pack recorded `text` and read input_ids where there were any."""
    old = json.loads((ROOT / "tests/fixtures/format_2/run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(old))
    assert old["text_column"] == "text" and flags_of_run(tmp_path)["text_column"] is None
    (tmp_path / "run.json").write_text(json.dumps({**old, "pack": True}))
    assert flags_of_run(tmp_path)["text_column"] == "text"


def test_roles_of_the_runs_chats_are_not_asked_of_other_data(tmp_path: Path) -> None:
    """Coders trained on what an assistant said are judged on text, and on their own chats."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo/lm")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "lm")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 16}
    config = LlamaConfig(vocab_size=4096, num_attention_heads=2, **sizes)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "lm")
    chat = [{"role": "user", "content": "Two?"}, {"role": "assistant", "content": "Yes, two."}]
    datasets.Dataset.from_dict({"messages": [chat] * 60}).save_to_disk(tmp_path / "chats")
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n" * 60)
    flags = {"model": str(tmp_path / "lm"), "dataset": str(tmp_path / "chats"), "ctx_len": 16}
    flags |= {"chat_roles": ("assistant",), "batch_size": 8, "k": 4, "expansion_factor": 4}
    flags |= {"layers": (0,), "eval_tokens": 16, "log_with": "none", "save_dir": str(tmp_path)}
    train(from_flags(TrainConfig, {**flags, "run_name": "run"}))
    own = load_trained(CodersConfig(str(tmp_path / "run")))
    assert own.held_out and next(own.source.batches(own.blocks, 1)).counted is not None
    text = str(tmp_path / "text.txt")
    other = load_trained(CodersConfig(str(tmp_path / "run"), dataset=text))
    assert not other.held_out and next(other.source.batches(other.blocks, 1)).counted is None

"""The demo LM is truly trained, and its text and the benchmark come from commands that run."""

import json
import math
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]


def test_demo_lm_predicts_files_it_never_saw(tmp_path: Path) -> None:
    """Cross-entropy on held-out source text is well under half of ln(vocab)."""
    command = [sys.executable, str(ROOT / "demo/make_text.py"), str(tmp_path)]
    subprocess.run(command, check=True, timeout=120)
    train, held_out = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("train.jsonl", "heldout.jsonl")
    )
    assert not {d["name"] for d in train} & {d["name"] for d in held_out}
    assert len(train) > 10 * len(held_out) > 0
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo/lm")
    lm = AutoModelForCausalLM.from_pretrained(ROOT / "demo/lm", dtype=torch.float32)
    ids = [i for d in held_out[:12] for i in tokenizer(d["text"]).input_ids]
    blocks = torch.tensor(ids[: len(ids) // 256 * 256]).view(-1, 256)[:64]
    with torch.no_grad():
        loss = lm(blocks, labels=blocks).loss.item()
    assert loss < 0.4 * math.log(len(tokenizer))


def test_benchmark_runs(tmp_path: Path) -> None:
    """The benchmark prints and writes a product, a step and their ratio in both precisions."""
    shape = ["--N", "64", "--D", "16", "--L", "128", "--k", "4", "--repeats", "2"]
    out = tmp_path / "step.json"
    command = [sys.executable, str(ROOT / "benchmarks/step.py"), *shape, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["shape"] == {"N": 64, "D": 16, "L": 128, "k": 4}
    for dtype in ("float32", "bfloat16"):
        for figure in ("ratio", "ratio_in_place", "auxk_ratio"):
            assert f"{result[dtype][figure]:.2f}" in done.stdout
        assert len(result[dtype]["parts_ms"]) == 8
    assert {"date", "torch", "commit", "threads"} <= result["machine"].keys()

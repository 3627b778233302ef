"""Law 4: DeepSpeed shards the LM and never touches the coders' gradients.

That coders never pass through accelerate is a law of the sources: tests/repository/test_source.py.
"""

import json
from pathlib import Path

import pytest
import torch
from launched_runs import SHARDED, Runs

from sae.placement import launch


@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_lm_gives_the_same_run(runs: Runs, name: str) -> None:
    """Curves, held-out figures and final weights under ZeRO-3 equal those of one process."""
    runs.assert_same("one", name)


def test_end_to_end_training_through_a_sharded_lm_is_the_same(runs: Runs) -> None:
    """Training on KL, whose gradients run through shards, is that of one process."""
    runs.assert_same_end_to_end("kl one", "sharded kl")


@pytest.mark.parametrize("name", [*SHARDED, "sharded kl"])
def test_the_engine_of_deepspeed_is_never_called(runs: Runs, name: str) -> None:
    """No forward, backward, step or sum of gradients of DeepSpeed's engine runs in training."""
    assert [rank["engine"] for rank in runs.results[name]] == [[], []]


@pytest.mark.parametrize("name", ["sharded replicas", "sharded head"])
def test_weights_are_gathered_ahead(runs: Runs, name: str) -> None:
    """With and without the LM's head, DeepSpeed knows in a step which module comes next."""
    for rank in runs.results[name]:
        assert rank["ahead"].count(True) >= rank["summary"]["step"], rank["ahead"]


def test_deepspeeds_own_recipe_is_overruled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clipping, accumulation and precision in a DeepSpeed file do not reach a run."""
    file = tmp_path / "zero3.json"
    theirs = {"gradient_clipping": 0.1, "gradient_accumulation_steps": 4, "fp16": {"enabled": True}}
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}, **theirs}))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    for dtype in (torch.float32, torch.bfloat16):
        found = launch.arguments(tmp_path, "none", dtype, 1.0)["deepspeed_plugin"].deepspeed_config
        assert "gradient_clipping" not in found and found["gradient_accumulation_steps"] == 1
        assert found["fp16"] == {"enabled": False}
        assert found["bf16"] == {"enabled": dtype == torch.bfloat16}

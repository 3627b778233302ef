"""What is captured is what a hook on the whole LM sees, on every family; the LM is not changed."""

from pathlib import Path

import pytest
import torch
from tiny_lms import FAMILIES, LAYERS, LLAMA, TOKENS, hooked, load, make
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3Config

from sae import UsageError
from sae.config import ModelConfig, Widths
from sae.lm.capture import Capture, measure_widths
from sae.lm.hookpoints import choose_hookpoints
from sae.lm.loading import find_hookpoints, freeze
from sae.lm.rows import RowRule


@pytest.mark.parametrize("family", FAMILIES)
def test_captured_rows_are_those_of_the_whole_lm(family: str, tmp_path: Path) -> None:
    """Loaded up to its middle layer, an LM gives bit for bit what the whole one gives there."""
    config, layer, inner, widths = FAMILIES[family]
    whole = make(config, tmp_path)
    assert choose_hookpoints(whole, layers=(1,)) == [layer]
    lm, names = load(tmp_path, (layer, inner))
    assert names == [layer, inner]
    measured = measure_widths(lm, names)
    assert measured == {layer: Widths(32, 32), inner: Widths(*widths)}
    skeleton, _ = find_hookpoints(ModelConfig(str(tmp_path), hookpoints=(layer, inner)))
    assert measure_widths(skeleton, names) == measured
    assert len(dict(lm.named_modules())[layer.rpartition(".")[0]]) == 2, "layer 2 was loaded"
    captured = Capture(lm, names)(TOKENS)
    for name in names:
        for ours, expected in zip(captured[name], hooked(whole, name), strict=True):
            assert torch.equal(ours, expected), name
    assert not lm.training and not any(p.requires_grad for p in lm.parameters())


def test_a_model_with_a_head_has_the_same_hookpoints(tmp_path: Path) -> None:
    """Names are those of the base model, so are the rows, and the head does not run."""
    whole = make(LLAMA, tmp_path)
    with_head = freeze(AutoModelForCausalLM.from_pretrained(tmp_path))
    ran: list[str] = []
    with_head.lm_head.register_forward_hook(lambda *_: ran.append("head"))
    ours = Capture(with_head, ["layers.1"])(TOKENS)["layers.1"]
    for a, b in zip(ours, Capture(whole, ["layers.1"])(TOKENS)["layers.1"], strict=True):
        assert torch.equal(a, b)
    assert not ran


def test_nothing_runs_after_the_last_hookpoint(tmp_path: Path) -> None:
    """Modules after the last hookpoint do not run; hooks are gone afterwards, errors or not."""
    lm = make(LLAMA, tmp_path)
    ran: list[str] = []
    for name, module in lm.named_modules():
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    hooks = sum(len(m._forward_hooks) for m in lm.modules())
    Capture(lm, ["layers.0.mlp", "layers.1.self_attn"])(TOKENS)
    assert "layers.1.self_attn" in ran
    assert not {"layers.1", "layers.1.mlp", "layers.2", "norm"} & set(ran)
    with pytest.raises(IndexError):
        Capture(lm, ["layers.1"])(TOKENS + 1000)
    assert sum(len(m._forward_hooks) for m in lm.modules()) == hooks


def test_no_gradient_and_no_cache_is_kept(tmp_path: Path) -> None:
    """Captured rows carry no graph, and no key-value cache is built."""
    make(LLAMA, tmp_path)
    lm, _ = load(tmp_path)
    assert lm.config.use_cache is False
    cached: list[bool] = []
    lm.layers[0].self_attn.register_forward_hook(
        lambda m, a, k, o: cached.append(k.get("past_key_values") is not None), with_kwargs=True
    )
    x, y = Capture(lm, ["layers.1"])(TOKENS)["layers.1"]
    assert cached == [False] and not x.requires_grad and not y.requires_grad


def test_excluded_tokens_leave_no_row(tmp_path: Path) -> None:
    """Rows of excluded ids are gone, the others are the same."""
    lm = make(LLAMA, tmp_path)
    every = Capture(lm, ["layers.0"])(TOKENS)["layers.0"]
    some = Capture(lm, ["layers.0"], RowRule((3, 9)))(TOKENS)["layers.0"]
    keep = ~torch.isin(TOKENS.flatten(), torch.tensor([3, 9]))
    assert 0 < keep.sum() < keep.numel()
    for a, b in zip(every, some, strict=True):
        assert torch.equal(a[keep], b)


def test_without_inputs_both_rows_are_the_output(tmp_path: Path) -> None:
    """Where only outputs are wanted, one tensor stands for input and output."""
    lm = make(LLAMA, tmp_path)
    x, y = Capture(lm, ["layers.1.mlp"], inputs=False)(TOKENS)["layers.1.mlp"]
    assert x is y
    assert torch.equal(y, hooked(lm, "layers.1.mlp")[1])


def test_modules_that_cannot_be_captured_are_refused_by_name(tmp_path: Path) -> None:
    """Rows that are not tokens and a module that never runs are refused; ids have no width."""
    lm = make(Qwen3Config(**LAYERS), tmp_path)
    with pytest.raises(UsageError, match=r"layers\.0\.self_attn\.q_norm.*not one row per token"):
        measure_widths(lm, ["layers.0.self_attn.q_norm"])
    assert measure_widths(lm, ["embed_tokens"]) == {"embed_tokens": Widths(0, 32)}
    lm.never = nn.Linear(2, 2)
    with pytest.raises(UsageError, match="never does not run"):
        measure_widths(lm, ["never"])

"""The LM goes on with what is spliced in, and is whole again afterwards."""

from typing import Any

import pytest
import torch
from tiny_lms import TOKENS, WITH_HEAD, make_with_head
from torch import Tensor, nn
from transformers import PreTrainedModel

from sae.lm.capture import Capture
from sae.lm.head import last_hidden_state
from sae.lm.rows import RowRule
from sae.lm.splice import spliced


@pytest.mark.parametrize("family", WITH_HEAD)
def test_splicing_is_exact_and_leaves_nothing_behind(family: str) -> None:
    """The identity changes no bit, another replacement is what the next layer reads, then gone."""
    config, hookpoint = WITH_HEAD[family]
    lm = make_with_head(config)
    clean = last_hidden_state(lm, TOKENS)
    with spliced(lm, {hookpoint: lambda x, y: y}, TOKENS):
        assert torch.equal(last_hidden_state(lm, TOKENS), clean)
    with spliced(lm, {hookpoint: lambda x, y: 2 * y}, TOKENS):
        doubled = last_hidden_state(lm, TOKENS)
    handle = dict(lm.base_model.named_modules())[hookpoint].register_forward_hook(
        lambda m, a, out: (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out
    )
    torch.testing.assert_close(doubled, last_hidden_state(lm, TOKENS))
    handle.remove()
    assert torch.equal(last_hidden_state(lm, TOKENS), clean)
    with pytest.raises(ZeroDivisionError), spliced(lm, {hookpoint: lambda x, y: 1 / 0}, TOKENS):
        last_hidden_state(lm, TOKENS)
    assert torch.equal(last_hidden_state(lm, TOKENS), clean)


def test_a_compiled_block_stays_compiled(causal_lm: PreTrainedModel) -> None:
    """What takes the place of a block's forward runs inside a splice, and is there afterwards."""
    block = causal_lm.base_model.get_submodule("layers.1")
    ran: list[str] = []
    eager = block.forward

    def compiled(*args: Any, **kwargs: Any) -> Any:
        ran.append("compiled")
        return eager(*args, **kwargs)

    block.forward = compiled
    try:
        for _ in range(2):
            with spliced(causal_lm, {"layers.1": lambda x, y: y}, TOKENS):
                last_hidden_state(causal_lm, TOKENS)
        last_hidden_state(causal_lm, TOKENS)
        assert ran == ["compiled"] * 3 and block.forward is compiled
    finally:
        del block.forward


def test_rows_of_excluded_tokens_stay_as_they_are(causal_lm: PreTrainedModel) -> None:
    """Rows of excluded tokens are neither given to the replacement nor changed."""
    excluded = (3, 9, int(TOKENS[0, 0]))
    keep = ~torch.isin(TOKENS.flatten(), torch.tensor(excluded))
    capture = Capture(causal_lm, ["layers.1"])
    _, y = capture(TOKENS)["layers.1"]
    given: list[Tensor] = []

    def zero(x: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        given.append(y)
        return torch.zeros_like(y)

    with spliced(causal_lm, {"layers.1": zero}, TOKENS, RowRule(excluded)):
        _, after = capture(TOKENS)["layers.1"]
    assert torch.equal(given[0], y[keep]) and not keep.all()
    assert torch.equal(after[~keep], y[~keep]) and not after[keep].any()


def runs_of(module: nn.Module, lm: PreTrainedModel) -> int:
    """How many products inside a module a forward of the LM computes."""
    ran: list[nn.Module] = []
    handles = [
        inner.register_forward_hook(lambda inner, *_: ran.append(inner))
        for inner in module.modules()
        if isinstance(inner, nn.Linear)
    ]
    last_hidden_state(lm, TOKENS)
    for handle in handles:
        handle.remove()
    return len(ran)


@pytest.mark.parametrize("hookpoint", ["layers.1.mlp", "layers.1.self_attn", "layers.1"])
def test_a_replaced_module_does_not_run(causal_lm: PreTrainedModel, hookpoint: str) -> None:
    """A transcoder stands in for its module, whether that returns a tensor or a tuple."""
    module = dict(causal_lm.base_model.named_modules())[hookpoint]
    x, y = Capture(causal_lm, [hookpoint], fast_linear=False)(TOKENS)[hookpoint]
    clean = last_hidden_state(causal_lm, TOKENS)

    def known(given: Tensor, target: Tensor | None) -> Tensor:
        assert target is None and torch.equal(given, x)
        return y

    assert runs_of(module, causal_lm) > 0
    with spliced(causal_lm, {hookpoint: known}, TOKENS, run_modules=False):
        assert torch.equal(last_hidden_state(causal_lm, TOKENS), clean)
        assert runs_of(module, causal_lm) == 0
    assert runs_of(module, causal_lm) > 0

"""A row is a token that is read, in the order of tokens, wherever in the LM it is looked for."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import build
from tiny_lms import TOKENS, WITH_HEAD, make_with_head
from torch import Tensor
from transformers import PreTrainedModel

from sae import UsageError
from sae.batch import TokenBatch
from sae.lm.capture import Capture, by_head, measure_widths
from sae.lm.head import agreement, cross_entropy, kl_divergence, last_hidden_state, predictions_made
from sae.lm.loading import freeze
from sae.lm.probe import checked
from sae.lm.rows import RowRule, far_share
from sae.lm.splice import spliced

LENGTHS = (5, 8, 3)
BLOCK = {"gpt2": "h.1", "llama": "layers.1", "bert": "encoder.layer.1", "opt": "decoder.layers.1"}


def padded(left: bool) -> TokenBatch:
    """Three sequences of unlike lengths with pads of token 7 before or behind them."""
    ids = torch.full((3, 8), 7)
    attended = torch.zeros(3, 8, dtype=torch.bool)
    for i, length in enumerate(LENGTHS):
        place = slice(8 - length, 8) if left else slice(0, length)
        ids[i, place], attended[i, place] = TOKENS.flatten()[i * 3 :][:length], True
    return TokenBatch(ids, attended)


def hooked(lm: PreTrainedModel, module: str, ids: Tensor, **inputs: Tensor) -> tuple[Any, Any]:
    """What enters and leaves a module, by a plain hook on the whole LM."""
    seen: list[tuple[Any, Any]] = []
    handle = lm.base_model.get_submodule(module).register_forward_hook(
        lambda m, args, kwargs, out: seen.append(((*args, *kwargs.values()), out)), with_kwargs=True
    )
    with torch.no_grad():
        lm.base_model(input_ids=ids, **inputs)
    handle.remove()
    (arguments, output), *_ = seen
    return arguments[0], output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", BLOCK)
def test_padded_sequences_have_the_rows_that_they_have_alone(family: str, left: bool) -> None:
    """Pads give no rows, and move neither the positions nor the rows of what is read."""
    lm = freeze(build(family))
    batch = padded(left).padding_last()
    _, rows = Capture(lm, [BLOCK[family]])(batch)[BLOCK[family]]
    alone = []
    for i, length in enumerate(LENGTHS):
        _, y = hooked(lm, BLOCK[family], TOKENS.flatten()[i * 3 :][:length].unsqueeze(0))
        alone.append(y[0])
    torch.testing.assert_close(rows, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_padding_is_in_no_loss(causal_lm: PreTrainedModel) -> None:
    """CE, KL and agreement over padded sequences are the sums over the sequences alone."""
    batch = padded(left=True).padding_last()
    hidden, other = last_hidden_state(causal_lm, batch), torch.randn(3, 8, 32)
    expected = 0.0
    for i, length in enumerate(LENGTHS):
        ids = TOKENS.flatten()[i * 3 :][:length]
        found = causal_lm(input_ids=ids.unsqueeze(0)).logits[0]
        expected += float(F.cross_entropy(found[:-1], ids[1:], reduction="sum"))
    assert float(cross_entropy(causal_lm, hidden, batch)) == pytest.approx(expected, rel=1e-4)
    assert predictions_made(batch) == (sum(LENGTHS) - 3, sum(LENGTHS))
    read = batch.attended
    assert read is not None
    p, q = (causal_lm.get_output_embeddings()(h[read]).log_softmax(1) for h in (hidden, other))
    divergence = float((p.exp() * (p - q)).sum())
    assert float(kl_divergence(causal_lm, other, hidden, batch)) == pytest.approx(divergence, 1e-3)
    assert int(agreement(causal_lm, other, hidden, batch)) == int(
        (p.argmax(1) == q.argmax(1)).sum()
    )


def test_positions_are_counted_from_the_first_token_that_is_read() -> None:
    """The first two tokens of every sequence have no row, pads before them or not."""
    lm = freeze(build("llama"))
    for batch in (padded(left=True), padded(left=True).padding_last(), padded(left=False)):
        all_rows = Capture(lm, ["layers.0"])(batch)["layers.0"][1]
        rows = Capture(lm, ["layers.0"], RowRule(exclude_positions=2))(batch)["layers.0"][1]
        expected = [part[2:] for part in all_rows.split(LENGTHS)]
        assert torch.equal(rows, torch.cat(expected))
    ids = TOKENS.view(2, -1)
    rows = Capture(lm, ["layers.0"], RowRule((int(ids[0, 4]),), 1))(ids)["layers.0"][1]
    keep = ids != ids[0, 4]
    keep[:, 0] = False
    assert torch.equal(rows, Capture(lm, ["layers.0"])(ids)["layers.0"][1][keep.flatten()])


def test_tokens_that_are_context_have_no_row(causal_lm: PreTrainedModel) -> None:
    """A token that is not counted is read by the LM and keeps its row where others are replaced."""
    counted = torch.rand(TOKENS.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    batch = TokenBatch(TOKENS, counted=counted)
    capture = Capture(causal_lm, ["layers.1"])
    whole = capture(TOKENS)["layers.1"][1]
    assert torch.equal(capture(batch)["layers.1"][1], whole[counted.flatten()])
    with spliced(causal_lm, {"layers.1": lambda x, y: 0 * x}, batch):
        after = capture(TOKENS)["layers.1"][1]
    assert not after[counted.flatten()].any()
    assert torch.equal(after[~counted.flatten()], whole[~counted.flatten()])


def test_long_rows_are_left_out_hookpoint_by_hookpoint(causal_lm: PreTrainedModel) -> None:
    """A row longer than its hookpoint's limit is neither captured nor replaced; others are."""
    names = ["layers.0", "layers.1"]
    whole = Capture(causal_lm, names)(TOKENS)
    limits = {name: float(whole[name][1].norm(dim=1).quantile(0.8)) for name in names}
    rule = RowRule(norm_limits=limits)
    capture = Capture(causal_lm, names, rule)
    for name, (_, y) in capture(TOKENS).items():
        expected = whole[name][1]
        fits = expected.norm(dim=1) <= limits[name]
        assert 0 < len(y) < len(expected) and torch.equal(y, expected[fits])
    fits = whole["layers.1"][1].norm(dim=1) <= limits["layers.1"]
    with spliced(causal_lm, {"layers.1": lambda x, y: 0 * x}, TOKENS, rule):
        after = Capture(causal_lm, ["layers.1"])(TOKENS)["layers.1"][1]
    assert not after[fits].any() and torch.equal(after[~fits], whole["layers.1"][1][~fits])


def test_rows_that_are_no_numbers_are_not_passed_over() -> None:
    """NaN and Inf are for the step to find: a limit leaves out what is long."""
    y = torch.tensor([[1.0, 0.0], [float("nan"), 0.0], [float("inf"), 0.0], [9.0, 0.0]])
    fits = RowRule(norm_limits={"h": 3.0}).fitting("h", y, None)
    assert fits is not None and fits.mask.tolist() == [True, True, True, False]
    assert fits.numbers.tolist() == [0, 1, 2]


def test_few_far_rows_are_told_from_many() -> None:
    """The share of the variance in the 1 % of rows farthest from the mean, by definition."""
    y = torch.randn(400, 6, generator=torch.Generator().manual_seed(0)) + 3
    y[[5, 70, 300]] += 200
    distance = ((y - y.mean(0)) ** 2).sum(1).sort(descending=True).values
    assert far_share(y) == pytest.approx(float(distance[:4].sum() / distance.sum()), rel=1e-5)
    assert far_share(y) > 0.9 and far_share(y[100:200]) < 0.2


@pytest.mark.parametrize("module", ["layers.1.self_attn.o_proj", "layers.1.mlp.down_proj"])
def test_what_enters_a_module_is_a_hookpoint(causal_lm: PreTrainedModel, module: str) -> None:
    """`:input` gives the rows that a hook sees enter, and replaces them and nothing else."""
    name = f"{module}:input"
    entering, leaving = hooked(causal_lm, module, TOKENS)
    x, y = Capture(causal_lm, [name], inputs=False)(TOKENS)[name]
    assert x is y and torch.equal(y, entering.flatten(0, 1))
    assert measure_widths(causal_lm, [name])[name] == (y.shape[1], y.shape[1])
    clean = last_hidden_state(causal_lm, TOKENS)
    with spliced(causal_lm, {name: lambda x, y: y}, TOKENS):
        assert torch.equal(last_hidden_state(causal_lm, TOKENS), clean)
    with spliced(causal_lm, {name: lambda x, y: 2 * y}, TOKENS):
        doubled = hooked(causal_lm, module, TOKENS)
    torch.testing.assert_close(doubled[1], 2 * leaving)  # these modules have no bias
    assert torch.equal(last_hidden_state(causal_lm, TOKENS), clean)


def test_both_sides_of_a_module_are_replaced_at_once(causal_lm: PreTrainedModel) -> None:
    """What enters and what leaves one module are two hookpoints."""
    module = "layers.1.mlp.down_proj"
    seen: list[Tensor] = []

    def leaving(x: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        seen.append(y)
        return torch.ones_like(y)

    both = {f"{module}:input": lambda x, y: 0 * x, module: leaving}
    clean = last_hidden_state(causal_lm, TOKENS)
    for order in (both, dict(reversed(both.items()))):
        with spliced(causal_lm, order, TOKENS):
            _, y = hooked(causal_lm, module, TOKENS)
        assert not seen.pop().any() and bool((y == 1).all())
    assert torch.equal(last_hidden_state(causal_lm, TOKENS), clean)


@pytest.mark.parametrize(
    "hookpoint", ["layers.1.self_attn.q_norm", "layers.1.self_attn.o_proj:input"]
)
def test_every_head_is_a_hookpoint(hookpoint: str) -> None:
    """The heads of [B S H D], or of the width that they are joined to, each by itself."""
    lm = make_with_head(WITH_HEAD["qwen3"][0]) if "qwen3" in WITH_HEAD else freeze(build("qwen3"))
    module, _, entering = hookpoint.partition(":")
    found = hooked(lm, module, TOKENS)[0 if entering else 1]
    heads = found.unflatten(-1, (4, -1)) if found.ndim == 3 else found
    names = by_head(lm, [hookpoint])
    assert names == [f"{hookpoint}:head{i}" for i in range(heads.shape[2])]
    capture = checked(Capture(lm, names, inputs=False), 16)
    for i, (_, y) in enumerate(capture(TOKENS).values()):
        assert torch.equal(y, heads[:, :, i].flatten(0, 1))
    clean = last_hidden_state(lm, TOKENS)
    with spliced(lm, {names[1]: lambda x, y: 0 * x}, TOKENS, capture.rule):
        _, leaving = hooked(lm, module, TOKENS)
    expected = heads.clone()
    expected[:, :, 1] = 0
    if entering:
        expected = lm.base_model.get_submodule(module)(expected.flatten(2))
    torch.testing.assert_close(leaving, expected)
    assert torch.equal(last_hidden_state(lm, TOKENS), clean)


def test_what_has_no_heads_is_refused(causal_lm: PreTrainedModel) -> None:
    """A residual stream is not cut into heads, and heads are not taken for rows."""
    with pytest.raises(UsageError, match=r"--per_head: layers\.1 passes .* not made of heads"):
        by_head(causal_lm, ["layers.1"])
    lm = freeze(build("qwen3"))
    with pytest.raises(UsageError, match="--per_head"):
        measure_widths(lm, ["layers.1.self_attn.q_norm"])


def test_positions_before_sequences_are_put_back_in_their_order() -> None:
    """XLNet's blocks give [S B D]: what is spliced in goes to the tokens that it is for."""
    lm = freeze(build("xlnet"))
    capture = checked(Capture(lm, ["layer.0", "layer.1"]), 16)
    clean = last_hidden_state(lm, TOKENS)
    with spliced(lm, {"layer.0": lambda x, y: y}, TOKENS, capture.rule):
        assert torch.equal(last_hidden_state(lm, TOKENS), clean)
    rule = RowRule((int(TOKENS[0, 3]),), sequence_first=capture.rule.sequence_first)
    before = capture(TOKENS)["layer.0"][1]
    with spliced(lm, {"layer.0": lambda x, y: 0 * y}, TOKENS, rule):
        after = capture(TOKENS)["layer.0"][1]
    stays = (TOKENS[0, 3] == TOKENS).flatten()
    assert torch.equal(after[stays], before[stays]) and not after[~stays].any()


def test_streams_of_an_lm_that_has_several_are_named() -> None:
    """Gemma 3n's layers pass four residual streams: refused as such; a module inside works."""
    lm = freeze(build("gemma3n_text"))
    with pytest.raises(UsageError, match=r"layers\.0 passes .* holds 4 residual streams at once"):
        measure_widths(lm, ["layers.0"])
    capture = checked(Capture(lm, ["layers.0.mlp"]), 16)
    _, expected = hooked(lm, "layers.0.mlp", TOKENS)
    torch.testing.assert_close(capture(TOKENS)["layers.0.mlp"][1], expected.flatten(0, 1))

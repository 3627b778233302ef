"""Losses of the LM's head on hidden states are those of the LM's own logits."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from tiny_lms import PLAIN, TOKENS, WITH_HEAD, make_with_head
from torch import Tensor

from sae import SparseCoderConfig, TrainingConfig, UsageError
from sae.batch import TokenBatch
from sae.coders.bank import CoderBank
from sae.lm import head
from sae.lm.capture import Capture
from sae.lm.head import (
    agreement,
    check_head,
    cross_entropy,
    kl_divergence,
    last_hidden_state,
    logits,
)
from sae.training.end_to_end import EndToEnd

HEADS = {
    "opt": hf.OPTConfig(**PLAIN, ffn_dim=48, max_position_embeddings=32, word_embed_proj_dim=32),
    "mixtral": hf.MixtralConfig(
        **PLAIN, intermediate_size=48, num_local_experts=4, num_key_value_heads=2
    ),
    "mamba": hf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4),
    "granite": hf.GraniteConfig(**PLAIN, intermediate_size=48, logits_scaling=3.0),
}


@pytest.mark.parametrize("family", WITH_HEAD)
def test_losses_in_chunks_equal_those_of_all_logits(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CE and KL in chunks, and their gradients, equal those of all logits at once."""
    lm = make_with_head(WITH_HEAD[family][0])
    clean = last_hidden_state(lm, TOKENS).detach()
    hidden = (clean + 0.3 * torch.randn_like(clean)).requires_grad_()
    whole = lm.get_output_embeddings()(hidden).float()
    expected_p = lm(TOKENS).logits.log_softmax(-1)
    cap = getattr(lm.config, "final_logit_softcapping", None)
    whole = whole if cap is None else cap * torch.tanh(whole / cap)
    ce = F.cross_entropy(whole[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum")
    log_p = whole.log_softmax(-1)
    kl = (expected_p.exp() * (expected_p - log_p)).sum()
    same = (whole.argmax(-1) == lm(TOKENS).logits.argmax(-1)).sum()
    expected = [torch.autograd.grad(x, hidden, retain_graph=True)[0] for x in (ce, kl)]
    for size in (1 << 26, 64 * 4, 64 * 5):
        monkeypatch.setattr(head, "_LOGITS", size)
        ours = cross_entropy(lm, hidden, TOKENS), kl_divergence(lm, hidden, clean, TOKENS)
        for loss, of_all, gradient in zip(ours, (ce, kl), expected, strict=True):
            torch.testing.assert_close(loss, of_all, rtol=1e-5, atol=1e-5)
            found = torch.autograd.grad(loss, hidden)[0]
            torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)
        assert agreement(lm, hidden, clean, TOKENS) == same
        assert kl_divergence(lm, clean, clean, TOKENS).abs() < 1e-5


def test_the_head_runs_as_often_whatever_the_padding_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that gather a sharded head together must call it equally often; nothing is lost."""
    lm = make_with_head(WITH_HEAD["llama"][0])
    hidden = last_hidden_state(lm, TOKENS)
    monkeypatch.setattr(head, "_LOGITS", 64 * 4)
    check_head(lm)
    calls: list[int] = []
    lm.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    counts, losses = [], []
    for read in (0, 3, TOKENS.shape[1] - 2):  # padding at the end of the first sequence
        attended = torch.ones_like(TOKENS, dtype=torch.bool)
        attended[0, TOKENS.shape[1] - read :] = False
        calls.clear()
        losses.append(cross_entropy(lm, hidden, TokenBatch(TOKENS, attended)))
        counts.append(len(calls))
    assert len(set(counts)) == 1 and counts[0] > 1
    picked = hidden[0, : TOKENS.shape[1] - 4]
    last = F.cross_entropy(logits(lm, picked), TOKENS[0, 1 : TOKENS.shape[1] - 3], reduction="sum")
    others = cross_entropy(lm, hidden[1:], TOKENS[1:])
    torch.testing.assert_close(losses[1], last + others, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("family", HEADS)
def test_heads_read_hidden_states(family: str) -> None:
    """Whatever lies between an LM's layers and its head, the head on its own gives its logits."""
    lm = make_with_head(HEADS[family])
    with torch.no_grad():
        whole = lm(TOKENS).logits
        ours = logits(lm, last_hidden_state(lm, TOKENS).flatten(0, 1))
    torch.testing.assert_close(ours, whole.flatten(0, 1), rtol=1e-4, atol=1e-5)


def test_a_head_that_reads_something_else_is_refused() -> None:
    """Where hidden states alone do not make the logits, no prediction is judged."""
    lm = make_with_head(WITH_HEAD["gpt2"][0])
    forward = lm.forward

    def biased(input_ids: Tensor) -> Any:
        output = forward(input_ids=input_ids)
        output.logits = output.logits + input_ids.unsqueeze(-1)
        return output

    lm.forward = biased
    with pytest.raises(UsageError, match="cannot be run on hidden states alone") as caught:
        check_head(lm)
    assert "--" not in str(caught.value)  # commands without such a flag check heads too
    bank = CoderBank({}, SparseCoderConfig(), (0,), "cpu")
    with pytest.raises(UsageError, match=r"^--loss_fn ce: .*hidden states alone; use fvu"):
        EndToEnd(Capture(lm, []), bank, TrainingConfig(loss_fn="ce"), masked=False)

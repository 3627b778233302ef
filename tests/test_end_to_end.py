"""Laws of the LM with reconstructions spliced in, and of training on its own loss."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from runs import Settings, assert_identical, run, weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from sae import UsageError, end_to_end
from sae.end_to_end import (
    EndToEnd,
    agreement,
    check_head,
    cross_entropy,
    kl_divergence,
    last_hidden_state,
    logits,
    spliced,
)
from sae.hookpoints import capture, freeze
from train_sae import TrainConfig, train

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
FAMILIES = {
    "llama": hf.LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2),
    "gpt2": hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4),
    "neox": hf.GPTNeoXConfig(**SMALL, intermediate_size=48),
    # Caps its logits: the head is more than a product.
    "gemma2": hf.Gemma2Config(
        **SMALL,
        intermediate_size=48,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=0.1,
    ),
}
PLACES = {"llama": "layers.1", "gpt2": "h.1", "neox": "layers.1", "gemma2": "layers.1"}
TOKENS = torch.randint(0, 64, (3, 9), generator=torch.Generator().manual_seed(1))


def make(config: hf.PretrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    return freeze(AutoModelForCausalLM.from_config(config))


@pytest.fixture(scope="module")
def causal() -> PreTrainedModel:
    return make(FAMILIES["llama"])


@pytest.mark.parametrize("family", FAMILIES)
def test_chunks_are_the_whole(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """CE and KL in chunks, and their gradients, equal those of all logits at once."""
    lm = make(FAMILIES[family])
    clean = last_hidden_state(lm, TOKENS).detach()
    hidden = (clean + 0.3 * torch.randn_like(clean)).requires_grad_()
    logits = lm.get_output_embeddings()(hidden).float()
    expected_p = lm(TOKENS).logits.log_softmax(-1)
    cap = getattr(lm.config, "final_logit_softcapping", None)
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    ce = F.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten(), reduction="sum")
    log_p = logits.log_softmax(-1)
    kl = (expected_p.exp() * (expected_p - log_p)).sum()
    same = (logits.argmax(-1) == lm(TOKENS).logits.argmax(-1)).sum()
    expected = [torch.autograd.grad(x, hidden, retain_graph=True)[0] for x in (ce, kl)]
    for size in (1 << 26, 64 * 4):
        monkeypatch.setattr(end_to_end, "_LOGITS", size)
        ours = cross_entropy(lm, hidden, TOKENS), kl_divergence(lm, hidden, clean)
        for loss, whole, gradient in zip(ours, (ce, kl), expected, strict=True):
            torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-5)
            found = torch.autograd.grad(loss, hidden)[0]
            torch.testing.assert_close(found, gradient, rtol=1e-4, atol=1e-6)
        assert agreement(lm, hidden, clean) == same
        assert kl_divergence(lm, clean, clean).abs() < 1e-5


HEADS = {
    "opt": hf.OPTConfig(**SMALL, ffn_dim=48, max_position_embeddings=32, word_embed_proj_dim=32),
    "mixtral": hf.MixtralConfig(
        **SMALL, intermediate_size=48, num_local_experts=4, num_key_value_heads=2
    ),
    "mamba": hf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4),
    "granite": hf.GraniteConfig(**SMALL, intermediate_size=48, logits_scaling=3.0),
}


@pytest.mark.parametrize("family", HEADS)
def test_heads_read_hidden_states(family: str) -> None:
    """Whatever lies between an LM's layers and its head, the head on its own gives its logits."""
    lm = make(HEADS[family])
    with torch.no_grad():
        whole = lm(TOKENS).logits
        ours = logits(lm, last_hidden_state(lm, TOKENS).flatten(0, 1))
    torch.testing.assert_close(ours, whole.flatten(0, 1), rtol=1e-4, atol=1e-5)


def test_a_head_that_reads_something_else_is_refused() -> None:
    """Where hidden states alone do not make the logits, no prediction is judged."""
    lm = make(FAMILIES["gpt2"])
    forward = lm.forward

    def biased(input_ids: Tensor) -> Any:
        output = forward(input_ids=input_ids)
        output.logits = output.logits + input_ids.unsqueeze(-1)
        return output

    lm.forward = biased
    with pytest.raises(UsageError, match="cannot be run on hidden states alone"):
        check_head(lm)


@pytest.mark.parametrize("family", FAMILIES)
def test_splicing_is_exact_and_leaves_nothing(family: str) -> None:
    """The identity changes no bit, another replacement is what the next layer reads, then gone."""
    lm, place = make(FAMILIES[family]), PLACES[family]
    clean = last_hidden_state(lm, TOKENS)
    with spliced(lm, {place: lambda x, y: y}, TOKENS):
        assert torch.equal(last_hidden_state(lm, TOKENS), clean)
    with spliced(lm, {place: lambda x, y: 2 * y}, TOKENS):
        doubled = last_hidden_state(lm, TOKENS)
    handle = dict(lm.base_model.named_modules())[place].register_forward_hook(
        lambda m, a, out: (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out
    )
    torch.testing.assert_close(doubled, last_hidden_state(lm, TOKENS))
    handle.remove()
    assert torch.equal(last_hidden_state(lm, TOKENS), clean)
    with pytest.raises(ZeroDivisionError), spliced(lm, {place: lambda x, y: 1 / 0}, TOKENS):
        last_hidden_state(lm, TOKENS)
    assert torch.equal(last_hidden_state(lm, TOKENS), clean)


def test_excluded_tokens_stay(causal: PreTrainedModel) -> None:
    """Rows of excluded tokens are neither given to the replacement nor changed."""
    keep = ~torch.isin(TOKENS.flatten(), torch.tensor([3, 9, int(TOKENS[0, 0])]))
    _, y = capture(causal, TOKENS, ["layers.1"])["layers.1"]
    given: list[Tensor] = []

    def zero(x: Tensor, y: Tensor | None) -> Tensor:
        assert y is not None
        given.append(y)
        return torch.zeros_like(y)

    excluded = (3, 9, int(TOKENS[0, 0]))
    with spliced(causal, {"layers.1": zero}, TOKENS, excluded):
        _, after = capture(causal, TOKENS, ["layers.1"])["layers.1"]
    assert torch.equal(given[0], y[keep]) and not keep.all()
    assert torch.equal(after[~keep], y[~keep]) and not after[keep].any()


def runs_of(module: nn.Module, causal: PreTrainedModel) -> int:
    """How many products inside a module a forward of the LM computes."""
    ran: list[nn.Module] = []
    handles = [
        inner.register_forward_hook(lambda inner, *_: ran.append(inner))
        for inner in module.modules()
        if isinstance(inner, nn.Linear)
    ]
    last_hidden_state(causal, TOKENS)
    for handle in handles:
        handle.remove()
    return len(ran)


@pytest.mark.parametrize("place", ["layers.1.mlp", "layers.1.self_attn", "layers.1"])
def test_a_replaced_module_does_not_run(causal: PreTrainedModel, place: str) -> None:
    """A transcoder takes its module's place, whether that returns a tensor or a tuple."""
    module = dict(causal.base_model.named_modules())[place]
    x, y = capture(causal, TOKENS, [place])[place]
    clean = last_hidden_state(causal, TOKENS)

    def known(given: Tensor, target: Tensor | None) -> Tensor:
        assert target is None and torch.equal(given, x)
        return y

    assert runs_of(module, causal) > 0
    with spliced(causal, {place: known}, TOKENS, run_modules=False):
        assert torch.equal(last_hidden_state(causal, TOKENS), clean)
        assert runs_of(module, causal) == 0
    assert runs_of(module, causal) > 0


@pytest.mark.parametrize("loss_fn", ["ce", "kl"])
@pytest.mark.parametrize("transcode", [False, True])
def test_training_on_the_lms_own_loss(
    causal: PreTrainedModel,
    tokens: Tensor,
    settings: Settings,
    loss_fn: str,
    transcode: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every coder parameter gets a gradient, no LM parameter does, and the loss falls."""
    reached: set[str] = set()
    losses: list[float] = []
    finish = EndToEnd.finish_gradients_

    def spy(self: EndToEnd, *args: Any) -> Tensor:
        losses.append(float(finish(self, *args)))
        for name, parameter in self.bank.named_parameters():
            if parameter.grad is not None and parameter.grad.count_nonzero():
                reached.add(name)
        assert all(p.grad is None for p in self.lm.parameters())
        return torch.tensor(losses[-1])

    monkeypatch.setattr(EndToEnd, "finish_gradients_", spy)
    places = ("layers.0.mlp", "layers.2.mlp") if transcode else ("layers.0", "layers.2")
    flags = {
        **{"loss_fn": loss_fn, "hookpoints": places, "transcode": transcode},
        **{"skip_connection": transcode, "optimizer": "adam", "lr": 3e-3},
    }
    before = {n: p.clone() for n, p in causal.named_parameters()}
    if loss_fn == "ce":  # something to learn: which tokens there are at all
        tokens = tokens % 8
    run(causal, tokens, settings, run_name="r", **flags)
    per_coder = {"encoder.weight", "encoder.bias", "W_dec", "b_dec"}
    per_coder |= {"W_skip"} if transcode else set()
    assert len(reached) == 2 * len(per_coder)
    assert sum(losses[-3:]) < sum(losses[:3]) and min(losses) > 0
    assert_identical(before, dict(causal.named_parameters()))


@pytest.mark.parametrize("loss_fn", ["ce", "kl"])
def test_one_denominator_end_to_end(
    causal: PreTrainedModel, tokens: Tensor, settings: Settings, loss_fn: str
) -> None:
    """Accumulated = whole, with AuxK and Multi-TopK added, excluded tokens, several hookpoints."""
    flags = {
        **{"loss_fn": loss_fn, "layers": (0, 2), "optimizer": "adam", "exclude_tokens": (5,)},
        **{"auxk_alpha": 1 / 32, "dead_feature_threshold": 300, "multi_topk": True, "lr": 1e-3},
    }
    whole = run(causal, tokens, settings, run_name="whole", **flags)
    pieces = run(
        causal, tokens, settings, run_name="pieces", **flags, batch_size=2, grad_acc_steps=4
    )
    assert pieces["step"] == whole["step"] and pieces["tokens"] == whole["tokens"]
    for key, tensor in weights(pieces).items():
        torch.testing.assert_close(tensor, weights(whole)[key], rtol=2e-3, atol=2e-4)


def test_what_cannot_be_end_to_end(lm: PreTrainedModel, tokens: Tensor, settings: Settings) -> None:
    """Owners, several seeds, and an LM without a head are refused with the reason."""
    with pytest.raises(UsageError, match="--distribute_modules True: with --loss_fn kl .*drop it"):
        TrainConfig(loss_fn="kl", distribute_modules=True)
    with pytest.raises(UsageError, match="--init_seeds .*one coder per hookpoint"):
        TrainConfig(loss_fn="ce", init_seeds=(0, 1))
    with pytest.raises(UsageError, match="--loss_fn.*LlamaModel has no head"):
        run(lm, tokens, settings, run_name="r", loss_fn="ce")


def test_resume_end_to_end(causal: PreTrainedModel, tokens: Tensor, settings: Settings) -> None:
    """A run on the LM's own loss resumes to the same bits, from its files alone."""
    folder = Path(settings["save_dir"])
    causal.save_pretrained(folder / "lm")
    flags = {"model": str(folder / "lm"), "loss_fn": "kl", "layers": (1,), "save_every": 10}
    straight = train(TrainConfig(**{**settings, **flags}, run_name="a"), dataset=tokens)
    shutil.copytree(folder / "a", folder / "b")
    shutil.rmtree(folder / "b" / "step_20")
    resumed = train(TrainConfig(**{**settings, **flags}, run_name="b", resume=True), dataset=tokens)
    assert_identical(weights(resumed), weights(straight))

"""What becomes of the LM's predictions: losses of its head on final hidden states.

Logits are never whole: the head runs on chunks of positions, and is run again in the backward.
"""

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from ..batch import TokenBatch, copied
from ..flag_checks import UsageError
from .capture import is_sharded, lm_inputs
from .rows import first_tensor
from .splice import computing, with_first_tensor

_BODIES: WeakKeyDictionary[nn.Module, tuple[nn.Module, Any]] = WeakKeyDictionary()
_LOGITS = 1 << 26  # elements of a chunk of logits: 256 MiB in float32


def last_hidden_state(
    lm: PreTrainedModel, tokens: TokenBatch | Int[Tensor, "B S"]
) -> Float[Tensor, "B S D"]:
    """What the LM's head reads."""
    return lm.base_model(**lm_inputs(TokenBatch.of(tokens))).last_hidden_state


def predictions_made(tokens: TokenBatch | Int[Tensor, "B S"]) -> tuple[int, int]:
    """How many tokens are predicted, and how many positions predict: padding does neither."""
    batch = TokenBatch.of(tokens)
    if batch.attended is None:
        return batch.ids[:, 1:].numel(), batch.ids.numel()
    attended = batch.on_host.attended
    assert attended is not None
    return int(_predicted(attended).sum()), int(attended.sum())


def _predicted(attended: Bool[Tensor, "B S"]) -> Bool[Tensor, "B S-1"]:
    """Tokens that predict the next one: neither is padding."""
    return attended[:, :-1] & attended[:, 1:]


def _read(hidden: Float[Tensor, "B S D"], batch: TokenBatch) -> Float[Tensor, "N D"]:
    """The hidden states of tokens that are no padding."""
    rows = hidden.flatten(0, 1)
    attended = batch.on_host.attended
    return rows if attended is None else rows[_numbers(attended, rows.device)]


def _numbers(mask: Bool[Tensor, "B S"], device: torch.device) -> Int[Tensor, " N"]:
    """Where a mask of the CPU is set, on a device that is not asked how many they are."""
    return copied(mask.flatten().nonzero().squeeze(1), device)


def cross_entropy(
    lm: PreTrainedModel, hidden: Float[Tensor, "B S D"], tokens: TokenBatch | Int[Tensor, "B S"]
) -> Float[Tensor, ""]:
    """Sum over positions of -log p(next token); the last position of a sequence predicts none."""
    batch = TokenBatch.of(tokens)

    def loss(rows: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits(lm, rows), targets, reduction="sum")

    rows, targets = hidden[:, :-1].flatten(0, 1), batch.ids[:, 1:].flatten()
    attended = batch.on_host.attended
    if attended is not None:
        predicted = _numbers(_predicted(attended), rows.device)
        rows, targets = rows[predicted], targets[predicted]
    return _over_chunks(lm, loss, batch, rows, targets)


def kl_divergence(
    lm: PreTrainedModel,
    hidden: Float[Tensor, "B S D"],
    clean: Float[Tensor, "B S D"],
    tokens: TokenBatch | Int[Tensor, "B S"],
) -> Float[Tensor, ""]:
    """Sum over positions of KL(p_clean || p) = sum_v p_clean (log p_clean - log p), 0 if equal."""
    batch = TokenBatch.of(tokens)

    def loss(rows: Tensor, clean_rows: Tensor) -> Tensor:
        with torch.no_grad():
            expected = logits(lm, clean_rows).log_softmax(1)
        log_p = logits(lm, rows).log_softmax(1)
        return F.kl_div(log_p, expected, reduction="sum", log_target=True)

    return _over_chunks(lm, loss, batch, _read(hidden, batch), _read(clean.detach(), batch))


def agreement(
    lm: PreTrainedModel,
    hidden: Float[Tensor, "B S D"],
    clean: Float[Tensor, "B S D"],
    tokens: TokenBatch | Int[Tensor, "B S"],
) -> Int[Tensor, ""]:
    """Positions at which the most likely next token is the clean LM's."""
    batch = TokenBatch.of(tokens)

    def equal(rows: Tensor, clean_rows: Tensor) -> Tensor:
        return (logits(lm, rows).argmax(1) == logits(lm, clean_rows).argmax(1)).sum()

    return _over_chunks(lm, equal, batch, _read(hidden, batch), _read(clean, batch))


def _over_chunks(
    lm: PreTrainedModel,
    function: Callable[..., Tensor],
    batch: TokenBatch,
    rows: Tensor,
    others: Tensor,
) -> Tensor:
    """The sum of a function over chunks of positions; no chunk's logits outlive it.

    How many there are is up to the size of the batch, not to its padding: ranks gather the head of
    a sharded LM together.
    """
    head: Any = lm.get_output_embeddings()
    count = -(-batch.ids.numel() // max(1, _LOGITS // head.out_features))
    parts = zip(rows.tensor_split(count), others.tensor_split(count), strict=True)
    # Between forward and backward a sharded head is not there, which the check would take for
    # another result; when its gradient is computed, it is gathered again.
    check = "none" if is_sharded(lm) else "default"
    found = [
        checkpoint(function, *part, use_reentrant=False, determinism_check=check) for part in parts
    ]
    return torch.stack(found).sum()


def logits(lm: PreTrainedModel, rows: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
    """The LM's own head on final hidden states, with whatever scaling or capping it does."""
    body, sample = check_head(lm)
    output = with_first_tensor(copy.copy(sample), rows.unsqueeze(0))
    ids = torch.zeros(1, len(rows), dtype=torch.int64, device=rows.device)
    with computing(body, lambda *_, **__: output):
        return lm(input_ids=ids).logits.squeeze(0).float()


def has_head(lm: PreTrainedModel) -> bool:
    """Whether the LM's predictions can be made from hidden states alone."""
    if lm.base_model is lm or lm.get_output_embeddings() is None:
        return False
    try:
        check_head(lm)
    except (UsageError, RuntimeError, ValueError, TypeError, AttributeError):
        return False
    return True


def unusable_head(lm: PreTrainedModel) -> str | None:
    """What to say of an LM that was loaded with a head which no figure can be made with."""
    if lm.get_output_embeddings() is None or has_head(lm):
        return None
    return f"the head of {type(lm).__name__} cannot be run on hidden states alone: no CE, KL, top-1"


def check_head(lm: PreTrainedModel) -> tuple[nn.Module, Any]:
    """The module below the head, which is not `base_model` in every LM, and what it returns.

    Raises UsageError where the head does not read what `last_hidden_state` gives.
    """
    if lm in _BODIES:
        return _BODIES[lm]
    seen: list[tuple[nn.Module, Any]] = []
    read: list[Tensor] = []
    head: Any = lm.get_output_embeddings()
    tokens = torch.arange(4, device=lm.device).unsqueeze(0)
    with ExitStack() as hooks, torch.no_grad():
        for module in lm.modules():
            handle = module.register_forward_hook(lambda m, a, output: seen.append((m, output)))
            hooks.callback(handle.remove)
        hooks.callback(head.register_forward_pre_hook(lambda m, a: read.append(a[0])).remove)
        expected = lm(input_ids=tokens).logits
    for module, output in reversed(seen):  # from the outside in, the LM itself first
        found = first_tensor(output)
        if module is lm or found is None or isinstance(output, Tensor):
            continue
        if found.data_ptr() == read[0].data_ptr() or torch.equal(found, read[0]):
            _BODIES[lm] = (module, output)
            with torch.no_grad():
                ours = logits(lm, last_hidden_state(lm, tokens)[0])
            if torch.allclose(ours, expected[0].float(), rtol=1e-3, atol=1e-3):
                return _BODIES[lm]
            del _BODIES[lm]
            break
    raise UsageError(f"the head of {type(lm).__name__} cannot be run on hidden states alone")

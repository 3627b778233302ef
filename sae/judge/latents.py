"""What a latent stands for: what it writes, what is near it, where it fires."""

import re
from collections import Counter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..coders.across.cross_layer import CrossLayerTranscoder
from ..coders.across.crosscoder import part_norms, shares_by_lm
from ..coders.sparse_coder import SparseCoder
from ..lm.capture import some_tokens
from ..lm.head import has_head, logits
from .contexts import TOP, Contexts, Example

Effects = list[tuple[int, float]]
"""(token id, change of its logit) pairs."""

# Modules whose output goes into another one of the same block: queries, gates, norms and the like.
_WITHIN = re.compile(
    r"(^|[._])(q|k|v|qkv|query|key|value|query_key_value|c_attn|c_fc|fc1|gate|up|act)(_proj)?$"
    r"|norm|(^|\.)ln_\w+$"
)


@torch.no_grad()
def logit_effects(
    lm: PreTrainedModel, hookpoint: str, directions: Float[Tensor, "C D"], count: int = 10
) -> list[tuple[Effects, Effects]]:
    """The tokens that each direction promotes and suppresses most if the head reads it alone.

    head(norm(direction)) - head(norm(0)), less its mean over the vocabulary. Nothing where the
    `hookpoint` does not write to the residual stream, or no norm comes last.
    """
    norm = _final_norm(lm) if has_head(lm) else None
    writes = not _WITHIN.search(hookpoint)
    if norm is None or norm.weight.shape != directions.shape[1:] or not writes:
        return [([], [])] * len(directions)
    found = []
    for part in directions.split(64):
        rows = torch.cat([torch.zeros_like(part[:1]), part]).to(norm.weight.dtype)
        effects = logits(lm, norm(rows))
        effects = effects[1:] - effects[:1]
        effects -= effects.mean(dim=1, keepdim=True)
        kept = min(count, effects.shape[1])
        best, worst = effects.topk(kept), effects.topk(kept, largest=False)
        for i in range(len(part)):
            found.append((_pairs(best, i), _pairs(worst, i)))
    return found


def _pairs(found: Any, row: int) -> list[tuple[int, float]]:
    pairs = zip(found.indices[row].tolist(), found.values[row].tolist(), strict=True)
    return [(i, round(value, 3)) for i, value in pairs]


def _final_norm(lm: PreTrainedModel) -> Any:
    """The module whose output is what the head reads, if it is a norm with a weight per channel."""
    outputs: list[tuple[nn.Module, Any]] = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, y: outputs.append((module, y)))
        for module in lm.base_model.modules()
    ]
    tokens = some_tokens(lm, 1, 2)
    hidden = lm.base_model(input_ids=tokens).last_hidden_state
    for hook in hooks:
        hook.remove()
    for module, y in outputs:
        weight = getattr(module, "weight", None)
        # Some LMs pass a view of it on.
        same = isinstance(y, Tensor) and y.data_ptr() == hidden.data_ptr()
        if same and isinstance(weight, Tensor) and weight.ndim == 1:
            return module
    return None


class Nearest(NamedTuple):
    """Of C rows the K largest cosines with other rows, and the numbers of these."""

    values: Float[Tensor, "C K"]
    indices: Int[Tensor, "C K"]


@torch.no_grad()
def neighbours(
    coder: SparseCoder, latents: Int[Tensor, " C"], count: int = 8
) -> list[list[tuple[int, float]]]:
    """For each latent the others with the largest cosine between decoder rows; of its prefix."""
    best = nearest_rows(coder.directions()[: coder.prefix], latents, count)
    return [_pairs(best, i) for i in range(len(latents))]


@torch.no_grad()
def nearest_rows(
    rows: Float[Tensor, "L D"], chosen: Int[Tensor, " C"], count: int, block: int = 256
) -> Nearest:
    """Of each chosen row the `count` others with the largest cosine, or all others.

    `block` rows at a time meet all others.
    """
    rows, count = F.normalize(rows, dim=1), min(count, max(0, len(rows) - 1))
    found = [Nearest(rows.new_empty(0, count), chosen.new_empty(0, count))]
    for part in chosen.split(block) if count else ():
        cosines = rows[part] @ rows.T
        cosines.scatter_(1, part[:, None], -torch.inf)
        found.append(Nearest(*cosines.topk(count, dim=1)))
    return Nearest(*(torch.cat(parts) for parts in zip(*found, strict=True)))


class Words:
    """Text of token ids, each kept once."""

    def __init__(self, tokenizer: Any) -> None:
        """Without a tokenizer a token's text is its number."""
        self._tokenizer = tokenizer
        self.texts: list[str] = []
        self._number: dict[int, int] = {}

    def __call__(self, token: int) -> int:
        """The number of a token's text in `texts`."""
        if token not in self._number:
            self._number[token] = len(self.texts)
            self.texts.append(self._text(token))
        return self._number[token]

    def _text(self, token: int) -> str:
        if self._tokenizer is None:
            return f"<{token}>"
        text = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        piece = self._tokenizer.convert_ids_to_tokens(token) or ""
        # Such tokenizers drop the space in front of a text that is decoded alone.
        return " " + text if piece.startswith("\u2581") and not text.startswith(" ") else text


def describe(
    lm: PreTrainedModel,
    hookpoint: str,
    coder: SparseCoder,
    seen: Contexts,
    slots: list[int],
    words: Words,
) -> list[dict[str, Any]]:
    """All that there is to show of the latents in `slots`, as JSON; texts by their number."""
    latents = seen.latents[slots]
    assert coder.W_dec is not None
    effects = logit_effects(lm, *_written(coder, hookpoint, latents))
    shares = _shares(coder, hookpoint, latents)
    ahead, lms = (
        _ahead(lm, coder, latents),
        shares_by_lm(coder.W_dec[latents].detach(), coder.cfg.parts),
    )
    near = neighbours(coder, latents)
    described = []
    for i, slot in enumerate(slots):
        latent = int(latents[i])
        top = seen.top(slot)
        peaks = Counter(example.tokens[example.peak] for example in top).most_common()
        promoted, suppressed = effects[i]
        described.append(
            {
                "id": latent,
                "fired": int(seen.fired[latent]),
                "largest": _short(float(seen.largest[latent])),
                "peaks": [words(token) for token, _ in peaks[:4]],
                "consistency": _short(peaks[0][1] / TOP),
                "top": [_example(e, words) for e in top],
                "intervals": [[_example(e, words) for e in part] for part in seen.intervals(slot)],
                "promoted": [(words(token), effect) for token, effect in promoted],
                "suppressed": [(words(token), effect) for token, effect in suppressed],
                "neighbours": near[i],
                "hookpoints": shares[i],
                "models": [(lm or "the first", _short(float(s[i]))) for lm, s in lms.items()],
                "ahead": [
                    [name, [(words(token), effect) for token, effect in there[i][0]]]
                    for name, there in ahead.items()
                ],
            }
        )
    return described


def _written(
    coder: SparseCoder, hookpoint: str, latents: Tensor
) -> tuple[str, Float[Tensor, "C D"]]:
    """Where latents write, and what; of a crosscoder at the last hookpoint of the first LM."""
    assert coder.W_dec is not None
    rows = coder.W_dec[latents]
    if not coder.cfg.parts:
        return hookpoint, rows
    written = rows.split([part.width for part in coder.cfg.parts], dim=1)
    pairs = zip(coder.cfg.parts, written, strict=True)
    last, columns = [pair for pair in pairs if not pair[0].lm][-1]
    return last.hookpoint, columns * last.rms


def _ahead(
    lm: PreTrainedModel, coder: SparseCoder, latents: Tensor
) -> dict[str, list[tuple[Effects, Effects]]]:
    """By hookpoint ahead the tokens that latents of a cross-layer transcoder promote from there."""
    if not isinstance(coder, CrossLayerTranscoder):
        return {}
    written = zip(sorted(coder.targets), coder.decoders()[1:], strict=True)
    pairs = ((coder.cfg.targets[distance - 1], W) for distance, W in written)
    return {name: logit_effects(lm, name, W[latents], 5) for name, W in pairs}


def _shares(coder: SparseCoder, hookpoint: str, latents: Tensor) -> list[list[tuple[str, float]]]:
    """Of each latent that writes at several hookpoints these, with their share in its norms."""
    assert coder.W_dec is not None
    if isinstance(coder, CrossLayerTranscoder):
        names = [hookpoint, *(coder.cfg.targets[i - 1] for i in sorted(coder.targets))]
        rows = [torch.linalg.vector_norm(W[latents], dim=1) for W in coder.decoders()]
        norms = torch.stack(rows, dim=1)
    elif coder.cfg.parts:
        names = [part.hookpoint for part in coder.cfg.parts]
        norms = part_norms(coder.W_dec[latents], coder.cfg.parts)
    else:
        return [[] for _ in latents]
    shares = norms / norms.sum(1, keepdim=True).clamp(min=1e-30)
    return [[*zip(names, map(_short, row), strict=True)] for row in shares.tolist()]


def _example(example: Example, words: Words) -> dict[str, Any]:
    acts = [_short(a) for a in example.acts]
    return {"t": [words(t) for t in example.tokens], "a": acts, "p": example.peak}


def _short(value: float) -> float:
    return float(f"{value:.3g}") if value else 0

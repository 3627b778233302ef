"""Where a latent fires: kept in one pass over the tokens, in memory that does not grow with them.

For each latent looked at, two tables of `_Table` rows: the contexts of its largest activations, and
a sample of all its activations. How often latents fire, and how strongly, is counted for all.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

BEFORE, AFTER = 20, 12
"""Tokens shown before and after the one at which a latent is most active."""

TOP, SAMPLED = 12, 24
"""Contexts kept per latent: of the largest activations, and of a sample of all."""


class _Table(NamedTuple):
    """For each of C latents the contexts with the largest scores; W = BEFORE + 1 + AFTER."""

    score: Float[Tensor, "C T"]
    tokens: Int[Tensor, "C T W"]  # -1 beyond the sequence
    acts: Float[Tensor, "C T W"]

    @classmethod
    def empty(cls, latents: int, size: int, device: torch.device) -> "_Table":
        width = BEFORE + 1 + AFTER
        return cls(
            torch.full((latents, size), -torch.inf, device=device),
            torch.full((latents, size, width), -1, dtype=torch.int32, device=device),
            torch.zeros(latents, size, width, device=device),
        )

    def offer(
        self,
        score: Float[Tensor, " C"],
        position: Int[Tensor, " C"],
        tokens: Int[Tensor, " S"],
        acts: Float[Tensor, "S C"],
    ) -> None:
        """Put one context per latent in the place of its last one, where it scores higher."""
        lowest, place = self.score.min(dim=1)
        rows = (score > lowest).nonzero().squeeze(1)
        place, position = place[rows], position[rows]
        window = position[:, None] + torch.arange(-BEFORE, AFTER + 1, device=tokens.device)
        inside = (window >= 0) & (window < len(tokens))
        window = window.clamp(0, len(tokens) - 1)
        self.score[rows, place] = score[rows]
        self.tokens[rows, place] = tokens[window].to(torch.int32).masked_fill(~inside, -1)
        self.acts[rows, place] = acts[window, rows[:, None]].masked_fill(~inside, 0.0)


class Example(NamedTuple):
    """Token ids around one activation, and the latent's activation at each."""

    tokens: list[int]
    acts: list[float]
    peak: int
    """Which of the tokens the context was kept for."""


class Contexts:
    """What the activations of one coder looked like."""

    def __init__(self, num_latents: int, latents: Int[Tensor, " C"], seed: int = 0) -> None:
        """`latents` are those whose contexts are kept."""
        device = latents.device
        self.latents = latents
        self.fired = torch.zeros(num_latents, dtype=torch.float64, device=device)
        """Rows that activate each latent."""
        self.largest = torch.zeros(num_latents, device=device)
        """The largest activation of each latent."""
        self.rows = 0
        self._slot = torch.full((num_latents,), -1, dtype=torch.int64, device=device)
        self._slot[latents] = torch.arange(len(latents), device=device)
        self._top = _Table.empty(len(latents), TOP, device)
        self._sample = _Table.empty(len(latents), SAMPLED, device)
        self._generator = torch.Generator(device).manual_seed(seed)

    def add_sequence(
        self,
        tokens: Int[Tensor, " S"],
        kept: Bool[Tensor, " S"],
        top_acts: Float[Tensor, "N K"],
        top_indices: Int[Tensor, "N K"],
    ) -> None:
        """Look at one sequence; the coder saw the N of its tokens that are `kept`.

        A sequence gives a table one context per latent at most, so that twelve contexts are twelve
        sequences. The sample is drawn in proportion to activation, since most of what fires is
        weak: score = log(u) / act, u uniform (Efraimidis and Spirakis 2006, algorithm A-Res).
        """
        active = top_acts > 0
        found, values = top_indices[active], top_acts[active].float()
        self.fired.index_add_(0, found, torch.ones_like(values, dtype=torch.float64))
        self.largest.scatter_reduce_(0, found, values, "amax")
        self.rows += len(top_acts)

        slot = self._slot[found]
        position = kept.nonzero().squeeze(1)[active.nonzero()[:, 0]]
        acts = top_acts.new_zeros(len(tokens), len(self.latents), dtype=torch.float32)
        acts[position[slot >= 0], slot[slot >= 0]] = values[slot >= 0]
        peak, at = acts.max(dim=0)
        self._top.offer(peak.where(peak > 0, -torch.inf), at, tokens, acts)
        u = torch.rand(acts.shape, generator=self._generator, device=acts.device)
        chance, at = (u.log() / acts).where(acts > 0, -torch.inf).max(dim=0)
        self._sample.offer(chance, at, tokens, acts)

    def top(self, slot: int) -> list[Example]:
        """Contexts of the largest activations of `latents[slot]`, the largest first."""
        return self._examples(self._top, slot)

    def intervals(self, slot: int, count: int = 4, each: int = 2) -> list[list[Example]]:
        """Up to `each` sampled contexts from each of `count` equal parts of (0, largest].

        The upper parts come first. Where the sample has none of a part, that one is empty.
        """
        largest = float(self.largest[self.latents[slot]])
        parts: list[list[Example]] = [[] for _ in range(count)]
        for example in self._examples(self._sample, slot):
            share = example.acts[example.peak] / largest
            part = parts[count - 1 - min(count - 1, int(share * count))]
            if len(part) < each:
                part.append(example)
        return parts

    def _examples(self, table: _Table, slot: int) -> list[Example]:
        order = table.score[slot].argsort(descending=True)
        examples = []
        for i in order[table.score[slot][order] > -torch.inf].tolist():
            tokens, acts = table.tokens[slot, i].tolist(), table.acts[slot, i].tolist()
            inside = [token >= 0 for token in tokens]
            examples.append(
                Example(
                    [t for t, there in zip(tokens, inside, strict=True) if there],
                    [a for a, there in zip(acts, inside, strict=True) if there],
                    sum(inside[:BEFORE]),
                )
            )
        return examples

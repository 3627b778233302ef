"""JumpReLU coders from trained ones: every latent is active as often as before, above a threshold.

python -m sae threshold checkpoints/RUN                  writes into checkpoints/RUN/thresholds
python -m sae threshold CODERS --model gpt2 --dataset DATA --out DIR
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from ..coders.across.crosscoder import Crosscoder
from ..coders.bank import CoderBank
from ..coders.sparse_coder import SparseCoder
from ..flag_checks import UsageError
from ..runs.json_files import check_target
from .evaluate import evaluate_loaded, table
from .figures import Evaluation
from .trained import CodersConfig, TrainedCoders, load_trained

_AT_ONCE = 2**26  # pre_acts
_MARGIN = 0.01  # what two products may differ by, relative; bfloat16 rounds to 0.4 %


@dataclass(frozen=True)
class ThresholdConfig(CodersConfig):
    """Which coders get thresholds, and on which text."""

    out: str | None = None
    """Folder to write one folder per coder into; default: thresholds, beside the coders."""


class _Largest:
    """Of each latent the `counts` + 1 largest pre-activations, few of the others in memory."""

    def __init__(self, counts: Int[Tensor, " L"], floor: Float[Tensor, " L"]) -> None:
        """Each latent has `counts` above its `floor`."""
        self.counts, self.floor = counts, floor
        self._acts, self._latents = floor[:0], counts[:0]
        self._room = 2 * len(floor) + 4 * int(counts.sum())

    def add(self, acts: Float[Tensor, " E"], latents: Int[Tensor, " E"]) -> None:
        """Look at pre-activations that are above their latent's floor."""
        self._acts = torch.cat([self._acts, acts])
        self._latents = torch.cat([self._latents, latents])
        if len(self._acts) > self._room:
            _, self.floor = self.last_two()

    def last_two(self) -> tuple[Float[Tensor, " L"], Float[Tensor, " L"]]:
        """Of each latent number `counts` and the next; where there is none, the floor."""
        by_size = self._acts.argsort(descending=True)
        order = by_size[self._latents[by_size].argsort(stable=True)]
        acts, latents = self._acts[order], self._latents[order]
        held = latents.bincount(minlength=len(self.counts))
        first = held.cumsum(0) - held
        place = torch.arange(len(acts), device=acts.device) - first[latents]
        kept = place <= self.counts[latents]
        self._acts, self._latents = acts[kept], latents[kept]

        def number(n: Tensor) -> Tensor:
            there = (n > 0) & (n <= held)
            found = F.pad(acts, (0, 1))[torch.where(there, first + n - 1, len(acts))]
            return torch.where(there, found, self.floor)

        return number(self.counts), number(self.counts + 1)


def _rows(trained: TrainedCoders) -> Iterator[tuple[str, SparseCoder, Tensor]]:
    """Of all coders what they read of the text, a few rows at a time."""
    bank = trained.state.bank
    for batch in trained.source.batches(trained.blocks, 1):
        pairs = trained.capture(batch.to(trained.lm.device))
        for name, coder in bank.items():
            x, y = pairs[bank.hookpoint[name]]
            inputs = (x if coder.cfg.transcode else y).to(coder.dtype)
            for part in inputs.split(max(1, _AT_ONCE // coder.num_latents)):
                yield name, coder, part


@torch.no_grad()
def thresholds(trained: TrainedCoders) -> dict[str, Float[Tensor, " L"]]:
    """By coder the thresholds above which every latent is active on as many rows as in the coder.

    So the mean number of active latents stays what it is on this text. A latent that is active on
    none gets its largest pre-activation there.
    """
    bank, found = trained.state.bank, dict[str, _Largest]()
    counts = {n: torch.zeros(c.num_latents, device=c.device).long() for n, c in bank.items()}
    least = {n: torch.full((c.num_latents,), torch.inf, device=c.device) for n, c in bank.items()}
    for name, coder, rows in _rows(trained):
        latents = coder.encode(rows)
        active = latents.top_acts > 0
        acts, numbers = latents.top_acts[active], latents.top_indices[active]
        counts[name] += numbers.bincount(minlength=coder.num_latents)
        least[name].scatter_reduce_(0, numbers, acts, "amin")
    for name, coder, rows in _rows(trained):
        if name not in found:
            floor = (1 - _MARGIN) * least[name].where(counts[name] > 0, 0)
            found[name] = _Largest(counts[name], floor)
        floor, encoder = found[name].floor, coder.encoder
        arguments = (rows, encoder.weight, encoder.bias, floor, coder.pre_bias, coder.matmul_dtype)
        above = coder.kernels.encode_above(*arguments)
        found[name].add(above.acts, above.indices)
    levels = {}
    for name, largest in found.items():
        last, beyond = largest.last_two()
        between = (last + beyond) / 2  # so that rounding moves few rows
        levels[name] = between.where(counts[name] > 0, beyond * (1 + _MARGIN))
    return levels


def with_thresholds(coder: SparseCoder, levels: Float[Tensor, " L"]) -> SparseCoder:
    """The JumpReLU coder of the same weights, with a threshold for every latent."""
    cfg = replace(coder.cfg, activation="jumprelu", multi_topk=False, num_latents=coder.num_latents)
    made = type(coder)(coder.d_in, cfg, "meta", d_out=coder.d_out)
    made.load_state_dict({**coder.state_dict(), "threshold": levels.float()}, assign=True)
    made.matmul_dtype = coder.matmul_dtype
    if isinstance(made, Crosscoder) and isinstance(coder, Crosscoder):
        made.on_scaled_rows = coder.on_scaled_rows
    return made


def of_coders(trained: TrainedCoders, coders: dict[str, SparseCoder]) -> TrainedCoders:
    """Other coders at the same hookpoints, on the same text."""
    bank, ranks = trained.state.bank, trained.state.exchange.ranks
    dtype = next(iter(coders.values())).matmul_dtype or torch.float32
    other = CoderBank.holding(coders, bank.hookpoint, ranks.device, dtype)
    return replace(trained, state=replace(trained.state, bank=other))


class Thresholded(NamedTuple):
    """Coders with thresholds, and figures of those they were made of and of their own."""

    coders: dict[str, SparseCoder]
    before: Evaluation
    after: Evaluation

    def table(self, activation: dict[str, str]) -> str:
        """Both figures of each coder, one line below the other."""
        lines = {}
        for name in self.coders:
            lines[f"{name} {activation[name]}"] = self.before.coders[name]
            lines[f"{name} jumprelu"] = self.after.coders[name]
        return table(Evaluation(lines))


def make_thresholds(trained: TrainedCoders) -> Thresholded:
    """Coders with thresholds that were made on every other sequence, and figures on the rest.

    Raises UsageError for text of one sequence.
    """
    if len(trained.blocks) < 2:
        raise UsageError(
            f"--tokens {len(trained.blocks) * trained.source.block_len}: thresholds are made on "
            f"every other sequence and measured on the rest; give two or more of "
            f"{trained.source.block_len} tokens"
        )
    bank = trained.state.bank
    levels = thresholds(replace(trained, blocks=trained.blocks[::2]))
    made = {name: with_thresholds(coder, levels[name]) for name, coder in bank.items()}
    rest = replace(trained, blocks=trained.blocks[1::2])
    return Thresholded(made, evaluate_loaded(rest), evaluate_loaded(of_coders(rest, made)))


def main(cfg: ThresholdConfig) -> None:
    """Write coders with thresholds; print what they are worth beside those they were made of."""
    out = Path(cfg.out or cfg.folder / "thresholds")
    if any(out.glob("*/cfg.json")):
        raise UsageError(f"--out {out}: holds coders already; give another folder")
    check_target("--out", out / "cfg.json")
    trained = load_trained(cfg)
    for name, coder in trained.state.bank.items():
        if coder.cfg.activation == "jumprelu":
            raise UsageError(f"{name} is a jumprelu coder: each latent has its threshold already")
    made = make_thresholds(trained)
    print(made.table({n: c.cfg.activation for n, c in trained.state.bank.items()}))
    for name, coder in made.coders.items():
        try:
            coder.save_to_disk(out / name)
        except OSError as error:
            raise UsageError(
                f"--out {out}: {name} cannot be written ({error.strerror}); give another folder"
            ) from None
    print(f"coders  {out.resolve()}")

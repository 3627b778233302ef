"""What trained coders are worth, on tokens that they were not trained on.

python -m sae.evaluate checkpoints/RUN                      on what the run held out
python -m sae.evaluate CODERS --model gpt2 --dataset DATA   a folder or Hub id of coders
"""

import dataclasses
import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import tyro
from jaxtyping import Float, Int
from natsort import natsorted
from torch import Tensor
from transformers import PreTrainedModel

from .bank import CoderBank
from .blocks import TokenSource
from .config import UsageError
from .exchange import Exchange, no_rows
from .functional import Moments, accumulate
from .hookpoints import capture
from .optim import CoderOptimizer
from .predictions import Predictions, predictions
from .ranks import Ranks
from .run_folder import check_target, write_json
from .sparse_coder import SparseCoder
from .trained import Trained, Where, load
from .watch import exit_codes

_BINS = torch.linspace(-6, 0, 25, dtype=torch.float64)


@dataclass(frozen=True)
class HeldOut:
    """Figures of one coder on held-out rows; those of predictions where the LM has its head.

    Source of NMSE, and of the downstream loss: Gao et al., sections 2.1 and 4.1.
    """

    fvu: float
    """sum ||y - sae_out||^2 / sum ||y - y_mean||^2 over all held-out rows."""

    nmse: float
    """MSE over that of always predicting the mean activation: over the same rows it is the FVU."""

    cosine: float
    """Mean over rows of the cosine between y and sae_out."""

    l0: float
    """Mean active latents per row."""

    dead_share: float
    """Share of latents that no held-out row activates."""

    frequency_histogram: list[int]
    """Latents by log10 of the share of rows that activate them: 24 bins from -6 to 0."""

    predictions: Predictions | None = None
    """What the LM predicts with this reconstruction in place of the activations."""


class Evaluation(NamedTuple):
    """Figures of every coder, and of all spliced in at once where there is one per hookpoint."""

    coders: dict[str, HeldOut]
    together: Predictions | None = None

    def scalars(self) -> dict[str, float]:
        """Every figure that is a number, by `figure/coder`; of all at once by `figure/all`."""
        found: dict[str, float] = {}
        for name, figures in self.coders.items():
            values = dataclasses.asdict(figures)
            values |= values.pop("predictions") or {}
            found |= {f"{n}/{name}": v for n, v in values.items() if isinstance(v, float)}
        if self.together is not None:
            found |= {f"{n}/all": v for n, v in dataclasses.asdict(self.together).items()}
        return found


def first_moments(
    lm: PreTrainedModel,
    places: list[str],
    batches: Iterable[Int[Tensor, "B S"]],
    ranks: Ranks,
    exclude_tokens: tuple[int, ...] = (),
) -> tuple[dict[str, Moments], dict[str, Moments]]:
    """Moments of every hookpoint's inputs and of its outputs over all rows of all ranks' batches.

    Raises UsageError where no row is left.
    """
    inputs: dict[str, Moments] = {}
    outputs: dict[str, Moments] = {}
    for tokens in batches:
        captured = capture(lm, tokens, places, exclude_tokens)
        for place, pair in captured.items():
            for found, rows in zip((inputs, outputs), pair, strict=True):
                accumulate(found, place, rows)
    ranks.sum_(t for found in (inputs, outputs) for m in found.values() for t in m)
    ranks.traffic()  # is of no step
    for place in outputs:
        for moments in (inputs[place], outputs[place]):
            if not moments.total_sq.isfinite():
                raise UsageError(
                    f"MODEL: its activations at {place} hold NaN or Inf in the first step already: "
                    f"try --mixed_precision no, or another hookpoint"
                )
    if not all(moments.count for moments in outputs.values()):
        raise UsageError(
            f"--exclude_tokens {' '.join(map(str, exclude_tokens[:9]))}: leaves no token of the "
            f"first step; exclude fewer"
        )
    return inputs, outputs


@torch.no_grad()
def held_out(
    lm: PreTrainedModel,
    exchange: Exchange,
    bank: CoderBank,
    optimizers: dict[str, CoderOptimizer],
    source: TokenSource,
    held: Int[Tensor, " held"],
    exclude_tokens: tuple[int, ...] = (),
) -> Evaluation:
    """Figures of every coder as it would be saved, over all rows of the held-out blocks at once.

    Every rank takes each W-th block, and all know all figures in the end. Raises UsageError where
    the rows define no FVU.
    """
    ranks = exchange.ranks
    places, mine = list(exchange.owner), held[ranks.rank :: ranks.world]
    # All ranks run the LM equally often: those without a block left read one and drop its rows.
    idle = -(-len(held) // ranks.world) - len(mine)
    order = torch.cat([mine, held[-1:].expand(idle)])
    zero = torch.zeros(3, dtype=torch.float64, device=ranks.device)
    sums = {name: zero.clone() for name in bank.hookpoint}  # squared error, cosine, active
    fired = {n: zero.new_zeros(c.num_latents) for n, c in bank.items()}
    moments: dict[str, Moments] = {}
    with ExitStack() as stack:
        for optimizer in optimizers.values():
            stack.enter_context(optimizer.trained())
        for i, tokens in enumerate(source.batches(order, 1)):
            pairs = capture(
                lm, tokens.to(ranks.device), places, exclude_tokens, inputs=bank.transcode
            )
            if i >= len(mine):
                pairs = {place: no_rows(pair) for place, pair in pairs.items()}
            for place, (x, y) in exchange.to_owners(pairs).items():
                accumulate(moments, place, y)
                for name, coder in bank.at(place):
                    # A folder may hold SAEs beside transcoders.
                    out = coder(x if coder.cfg.transcode else y, y, total_variance=1.0)
                    active = out.top_acts > 0
                    cosine = F.cosine_similarity(out.sae_out, y.float(), dim=1).sum()
                    sums[name] += torch.stack([out.fvu, cosine, active.sum()])
                    fired[name].index_add_(0, out.top_indices[active], active[active].double())
        totals = [t for seen in moments.values() for t in seen]
        exchange.sum_replicas_(*totals, *sums.values(), *fired.values())
        figures: dict[str, HeldOut] = {}
        with ranks.together():
            for name, place in bank.hookpoint.items():
                figures[name] = _figures(place, moments[place], sums[name], fired[name])
        together = None
        if lm.base_model is not lm and not exchange.distributed:
            means = {place: seen.mean for place, seen in moments.items()}
            replace = {name: {place: coder} for name, coder, place in _placed(bank)}
            if len(set(bank.hookpoint.values())) == len(bank.hookpoint):
                replace[""] = {place: coder for _, coder, place in _placed(bank)}
            found = predictions(lm, replace, means, source, order, len(mine), exclude_tokens, ranks)
            figures = {n: dataclasses.replace(f, predictions=found[n]) for n, f in figures.items()}
            together = found.get("")
    ranks.traffic()  # is of no step
    merged = exchange.merge(figures)
    return Evaluation({name: merged[name] for name in natsorted(merged)}, together)


def _placed(bank: CoderBank) -> list[tuple[str, SparseCoder, str]]:
    return [(name, coder, bank.hookpoint[name]) for name, coder in bank.items()]


def _figures(place: str, seen: Moments, sums: Tensor, fired: Tensor) -> HeldOut:
    error, cosine, active = sums.tolist()
    fvu = error / float(seen.total_variance) if seen.total_variance else float("nan")
    if not math.isfinite(fvu):
        raise UsageError(
            f"--eval_tokens: held-out FVU at {place} is not a number: too few tokens are held out "
            f"(see --exclude_tokens), or the activations hold NaN or Inf"
        )
    rows = float(seen.count)
    return HeldOut(
        fvu=fvu,
        nmse=(error / rows) / (float(seen.total_variance) / rows),
        cosine=cosine / rows,
        l0=active / rows,
        dead_share=float((fired == 0).double().mean()),
        frequency_histogram=frequency_histogram(fired, rows),
    )


def frequency_histogram(fired: Float[Tensor, " L"], rows: float) -> list[int]:
    """Latents by log10 of the share of rows that activate them: 24 bins from -6 to 0."""
    frequency = (fired[fired > 0].double().cpu() / rows).log10()
    return [int(n) for n in torch.histogram(frequency.clamp(min=-6), bins=_BINS).hist]


@dataclass(frozen=True)
class EvaluateConfig(Where):
    """What to evaluate."""

    out: str | None = None
    """JSON file to write; default: eval.json in the folder of the coders, or here."""


def evaluate(cfg: Where) -> Evaluation:
    """All figures of trained coders. Raises UsageError for what cannot be found or does not fit."""
    return judge(load(cfg))


def judge(it: Trained) -> Evaluation:
    """All figures of coders that are loaded."""
    return held_out(it.lm, it.exchange, it.bank, {}, it.source, it.blocks, it.exclude_tokens)


def table(evaluation: Evaluation) -> str:
    """The figures, a line for each coder."""
    head = ["coder", "FVU", "cosine", "L0", "dead", "CE clean", "spliced", "zero", "mean"]
    rows = [[*head, "recovered", "KL", "top-1"]]
    for name, f in evaluation.coders.items():
        first = [f"{f.fvu:.4f}", f"{f.cosine:.4f}", f"{f.l0:.1f}", f"{f.dead_share:.2%}"]
        rows.append([name, *first, *_row(f.predictions)])
    if evaluation.together is not None and len(evaluation.coders) > 1:
        rows.append(["all at once", "", "", "", "", *_row(evaluation.together)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join("  ".join(line) for line in lines)


def _row(p: Predictions | None) -> list[str]:
    if p is None:
        return [""] * 7
    losses = (p.ce_clean, p.ce_spliced, p.ce_zero, p.ce_mean, p.ce_recovered, p.kl)
    return [*(f"{value:.4f}" for value in losses), f"{p.top1_agreement:.2%}"]


def as_json(it: Trained, found: Evaluation) -> dict[str, Any]:
    """The figures, and what they are figures of."""
    figures: dict[str, Any] = {n: dataclasses.asdict(f) for n, f in found.coders.items()}
    together = None if found.together is None else dataclasses.asdict(found.together)
    of = {name: it.flags[name] for name in ("model", "dataset", "split", "ctx_len")}
    of |= {"tokens": len(it.blocks) * it.source.block_len, "step": it.step, "held_out": it.ours}
    return {"of": of, "coders": figures, "all_at_once": together}


def main() -> None:
    """Evaluate what the command line names; print the table and write the JSON beside it."""
    with exit_codes():
        cfg = tyro.cli(EvaluateConfig, description=__doc__, use_underscores=True)
        if cfg.out:
            check_target("--out", Path(cfg.out))
        it = load(cfg)
        # What the run held out is the run's own figure; other text is not.
        out = Path(cfg.out or cfg.folder / ("eval.json" if it.ours else "eval_other_text.json"))
        check_target("--out", out)
        found = judge(it)
        print(table(found))
        write_json(out, as_json(it, found))
        print(f"figures  {out.resolve()}")


if __name__ == "__main__":
    main()

"""What trained coders are worth, on tokens that they were not trained on.

python -m sae evaluate checkpoints/RUN                      on what the run held out
python -m sae evaluate CODERS --model gpt2 --dataset DATA   a folder or Hub id of coders
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..runs.json_files import check_target, write_json
from ..runs.norm_limits import sinks
from .figures import Evaluation, held_out_figures
from .predictions import Predictions
from .trained import CodersConfig, TrainedCoders, load_trained

_LOOKED_AT = 1 << 14  # tokens, for whether few rows hold most of the variance


@dataclass(frozen=True)
class EvaluateConfig(CodersConfig):
    """What to evaluate."""

    out: str | None = None
    """JSON file to write; default: eval.json in the folder of the coders, or here."""


def evaluate(cfg: CodersConfig) -> Evaluation:
    """All figures of trained coders. Raises UsageError for what cannot be found or does not fit."""
    return evaluate_loaded(load_trained(cfg))


def evaluate_loaded(trained: TrainedCoders) -> Evaluation:
    """All figures of coders that are loaded."""
    where = trained.capture, trained.state, trained.source, trained.blocks
    return held_out_figures(*where, in_depth=True)


def table(evaluation: Evaluation) -> str:
    """The figures, a line for each coder, and below it one for each of its prefixes, if any."""
    head = ["coder", "FVU", "cosine", "L0", "dead", "CE clean", "spliced", "zero", "mean"]
    rows = [[*head, "recovered", "KL", "top-1"]]
    for name, f in evaluation.coders.items():
        first = [f"{f.fvu:.4f}", f"{f.cosine:.4f}", f"{f.l0:.1f}", f"{f.dead_share:.2%}"]
        rows.append([name, *first, *_row(f.predictions)])
        for p in f.prefixes or ():
            first = [f"{p.fvu:.4f}", "", f"{p.l0:.1f}", f"{p.dead_share:.2%}"]
            rows.append([f"  first {p.latents:,}", *first, *_row(p.predictions)])
    if evaluation.together is not None and len(evaluation.coders) > 1:
        rows.append(["all at once", "", "", "", "", *_row(evaluation.together)])
    return _in_columns(rows)


def mixing_table(evaluation: Evaluation) -> str:
    """How far latents are mixed, a line for each coder; see docs/metrics.md."""
    head = ["coder", "nearest", "copies", "aligned", "misaligned", "entropy", "dense", "explain"]
    rows = [head]
    for name, figures in evaluation.coders.items():
        if (m := figures.mixing) is not None:
            cells = [_cell(m.nearest_cosine), _cell(m.copies, "%"), _cell(m.alignment)]
            cells += [_cell(m.misaligned, "%"), _cell(m.firing_entropy)]
            rows.append([name, *cells, _cell(m.dense_share, "%"), _cell(m.dense_explains, "%")])
    return _in_columns(rows)


def crosscoder_table(evaluation: Evaluation) -> str:
    """How crosscoders do at each hookpoint, a line for each; nothing where there are none."""
    rows = [["coder", "hookpoint", "FVU", "decoder share", "recovered", "KL"]]
    for name, figures in evaluation.coders.items():
        for part in figures.hookpoints or ():
            p = part.predictions
            predicted = [_cell(p.ce_recovered), _cell(p.kl)] if p else ["", ""]
            share = _cell(part.decoder_share, "%")
            rows.append([name, part.hookpoint, _cell(part.fvu), share, *predicted])
    return _in_columns(rows) if len(rows) > 1 else ""


def models_table(evaluation: Evaluation) -> str:
    """Whose latents those of a crosscoder over several LMs are, a line for each LM."""
    rows = [["coder", "LM", "decoder share", "of it alone", "not of it"]]
    for name, figures in evaluation.coders.items():
        for lm in figures.models or ():
            alone, without = sum(lm.histogram[18:]), sum(lm.histogram[:2])
            share = _cell(lm.decoder_share, "%")
            rows.append([name, lm.model or "the first", share, f"{alone:,}", f"{without:,}"])
    return _in_columns(rows) if len(rows) > 1 else ""


def _cell(value: float | None, kind: Literal["f", "%"] = "f") -> str:
    return "" if value is None else f"{value:.2%}" if kind == "%" else f"{value:.4f}"


def _in_columns(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    return "\n".join("  ".join(line) for line in lines)


def _row(p: Predictions | None) -> list[str]:
    if p is None:
        return [""] * 7
    losses = (p.ce_clean, p.ce_spliced, p.ce_zero, p.ce_mean, p.ce_recovered, p.kl)
    return [*(f"{value:.4f}" for value in losses), f"{p.top1_agreement:.2%}"]


def as_json(trained: TrainedCoders, found: Evaluation) -> dict[str, Any]:
    """The figures, and what they are figures of."""
    of = {"model": trained.model.model, "dataset": trained.data.dataset}
    of |= {"split": trained.data.split, "ctx_len": trained.data.ctx_len}
    of |= {"tokens": len(trained.blocks) * trained.source.block_len}
    of |= {"step": trained.step, "held_out": trained.held_out}
    coders, all_at_once = found.as_json()
    return {"of": of, "coders": coders, "all_at_once": all_at_once}


def main(cfg: EvaluateConfig) -> None:
    """Evaluate what the command line names; print the table and write the JSON beside it."""
    if cfg.out:
        check_target("--out", Path(cfg.out))
    trained = load_trained(cfg)
    # What the run held out is the run's own figure; other text is not.
    name = "eval.json" if trained.held_out else "eval_other_text.json"
    out = Path(cfg.out or cfg.folder / name)
    check_target("--out", out)
    some = trained.blocks[: max(1, _LOOKED_AT // trained.source.block_len)]
    batches = trained.source.batches(some, 1)
    device = trained.lm.device
    for line in sinks(trained.capture, (batch.to(device) for batch in batches)):
        print(line)
    found = evaluate_loaded(trained)
    print(table(found))
    for other in (crosscoder_table(found), models_table(found), mixing_table(found)):
        print(f"\n{other}" if other else "", end="\n" if other else "")
    write_json(out, as_json(trained, found))
    print(f"figures  {out.resolve()}")

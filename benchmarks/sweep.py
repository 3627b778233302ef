"""Recipes tried on one hookpoint: held-out FVU and latents that never fire, for each set of flags.

    python benchmarks/sweep.py trials.json --out sweep.json
    python benchmarks/sweep.py trials.json --out sweep.json --hookpoint layers.1 --steps 2800

`trials.json` is a list of objects of flags, as {"k": 16, "lr": 0.004, "steps_per_batch": 32}. The
rows of the hookpoint are computed once and held in memory in bfloat16; each trial is then the
script's own step on them: coder, losses, optimizer, schedule, counts. Rows are dealt by one
permutation of a batch, which is not the script's but as good. Results are added to, by trial.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from sae.coders.bank import CoderBank
from sae.coders.firing import FiringRecord, dead_latents
from sae.coders.moments import Moments
from sae.config import DataConfig, ModelConfig, SparseCoderConfig, TrainingConfig, Widths
from sae.data.blocks import split_blocks
from sae.data.text import load_tokens
from sae.flag_checks import from_flags
from sae.kernels.twins import Kernels
from sae.lm.capture import Capture
from sae.lm.loading import find_hookpoints, load_lm, token_limits
from sae.training.losses import auxiliary_loss, divide_gradients_, own_losses, wake_dead_
from sae.training.optim import CoderOptimizer
from sae.training.schedules import Schedule
from sae.training.step_sums import StepSums

ROWS, CTX, GROUP = 4096, 256, 256
Rows = tuple[Tensor, Tensor]


def capture_rows(hookpoint: str, steps: int, transcode: bool) -> tuple[Rows, Rows]:
    """The rows to train on, in the order of the script, and those held out."""
    model = ModelConfig(str(ROOT / "demo/lm"), hookpoints=(hookpoint,))
    data = DataConfig(str(ROOT / "demo/text/train.jsonl"), ctx_len=CTX)
    lm = load_lm(model, *find_hookpoints(model))
    source = load_tokens(data, model, token_limits(lm))
    held, rest = split_blocks(source, data, ROWS // CTX)
    capture = Capture(lm, [hookpoint], inputs=transcode)

    def rows_of(numbers: Tensor, dtype: torch.dtype) -> Rows:
        found = [capture(batch)[hookpoint] for batch in source.batches(numbers, 32)]
        y = torch.cat([y.to(dtype) for _, y in found])
        return (torch.cat([x.to(dtype) for x, _ in found]) if transcode else y, y)

    order = source.order(rest, data.shuffle_seed)[: steps * ROWS // CTX]
    return rows_of(order, torch.bfloat16), rows_of(held, torch.float32)


def trial(flags: dict[str, Any], train: Rows, held: Rows, rows: int = ROWS) -> dict[str, Any]:
    """Train one coder with these flags; its figures on the rows held out."""
    cfg = from_flags(TrainingConfig, {"steps_per_batch": 16, **flags})
    kind = from_flags(SparseCoderConfig, {"expansion_factor": 16, **flags})
    (x, y), total = train, len(train[1]) // rows
    widths = {"h": Widths(x.shape[1], y.shape[1])}
    losses = own_losses(kind, cfg)
    bank = CoderBank(widths, kind, cfg.init_seeds, "cpu", kernels=Kernels(), losses=losses)
    coder, schedule = bank["h"], Schedule(cfg, total, rows)
    first = slice(0, 16 * rows)
    moments = [{"h": Moments.of(tensor[first].float())} for tensor in (x, y)]
    bank.center_(*moments, cfg.rms_units)
    optimizer = CoderOptimizer(coder, schedule)
    firing = FiringRecord(coder.num_latents, schedule.dead_threshold(coder))
    generator, steps = torch.Generator().manual_seed(0), cfg.steps_per_batch or 1
    batch, started = torch.empty(0, dtype=torch.int64), time.monotonic()
    groups = [GROUP] * (rows // GROUP) if coder.family.in_groups else None
    for step in range(total):
        if step % steps == 0:
            there = torch.arange(step * rows, min(step + steps, total) * rows)
            turns = torch.randperm(len(there), generator=generator) if steps > 1 else ...
            batch = there[turns]
        mine = batch[step % steps * rows :][:rows]
        y_rows = y[mine].float()
        x_rows = x[mine].float() if kind.transcode else y_rows
        dead = dead_latents({"h": firing})["h"] if cfg.revives else None
        sums = StepSums(bank)
        sums.add_rows("h", x_rows, y_rows)
        k = schedule.k(step, coder)
        errors = coder.errors(x_rows, y_rows, dead, k, groups)
        (errors.objective + auxiliary_loss(errors, cfg.auxk_alpha)).backward()
        sums.add("h", errors)
        bank.gradients()
        sums.add_penalty_("h", coder, {"h": rows}, k)
        wake_dead_(coder, dead, sums.inputs("h"), cfg.wake_alpha)
        divide_gradients_(coder, sums.variance("h"))
        optimizer.step(step)
        coder.family.update_threshold_(coder, sums.levels.get("h"))
        firing.add_step_(sums.fired["h"], rows)
    seconds, sums = time.monotonic() - started, StepSums(bank)
    with torch.no_grad(), optimizer.trained():
        for x_rows, y_rows in zip(held[0].split(8192), held[1].split(8192), strict=True):
            x_rows = x_rows if kind.transcode else y_rows
            sums.add_rows("h", x_rows, y_rows)
            sums.add("h", coder.errors(x_rows, y_rows))
    never = float((sums.fired["h"] == 0).double().mean())
    fvu = float(sums.losses("h")["fvu/h"])
    l0 = float(sums.fired["h"].sum()) / len(held[1])
    found = {"fvu": fvu, "never": never, "l0": l0, "s": seconds}
    return {"flags": flags, "rows": rows, "steps": total, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trials", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hookpoint", default="layers.3")
    parser.add_argument("--transcode", action="store_true", help="a transcoder, and not an SAE")
    parser.add_argument("--steps", type=int, default=700, help="of 4,096 rows")
    parser.add_argument("--rows", type=int, default=ROWS, help="of a step, of as many in all")
    args = parser.parse_args()
    found = json.loads(args.out.read_text()) if args.out.exists() else []
    train, held = capture_rows(args.hookpoint, args.steps, args.transcode)
    for flags in json.loads(args.trials.read_text()):
        flags = {"transcode": args.transcode, **flags}
        result = {"hookpoint": args.hookpoint, **trial(flags, train, held, args.rows)}
        figures = f"{result['fvu']:.4f} {result['never']:7.2%} {result['l0']:6.2f}"
        print(f"{figures} {result['s']:5.0f} s  {flags}", flush=True)
        found.append(result)
        args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""What it costs to deal a batch to several steps: tokens per second with and without.

    python benchmarks/dealing.py --out benchmarks/results/dealing.json

The script itself trains on the demo's text, steps of 4,096 rows: from batches of 16 LM forwards
that are dealt to 16 steps, and one step a forward. The two take turns; the ratio is of medians.
"""

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

from make_text import write_text

from benchmarks.step import machine
from sae.flag_checks import from_flags
from train_sae import TrainConfig, train

WAYS = {
    "dealt": {"grad_acc_steps": 16, "steps_per_batch": 16},
    "not dealt": {"grad_acc_steps": 1, "steps_per_batch": 1},
}


def tokens_per_second(way: str, text: Path, flags: dict[str, Any]) -> float:
    """Of a run whose rows are dealt, or not."""
    with tempfile.TemporaryDirectory() as folder:
        given = {
            "model": str(ROOT / "demo/lm"),
            "dataset": str(text / "train.jsonl"),
            "ctx_len": 256,
        }
        given |= {"batch_size": 16, "eval_tokens": 4096, "log_with": "none", "save_dir": folder}
        return train(from_flags(TrainConfig, {**given, **WAYS[way], **flags}))["tokens_per_second"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--hookpoints", nargs="+", default=["layers.1", "layers.3", "layers.4.mlp"])
    parser.add_argument("--expansion_factor", type=int, default=16)
    parser.add_argument("--steps", type=int, default=96, help="of each run, in sixteens")
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    flags = {"hookpoints": tuple(args.hookpoints), "expansion_factor": args.expansion_factor}
    flags["max_examples"] = 16 * args.steps
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as text:
        write_text(Path(text))
        for _ in range(args.turns):
            for way in WAYS:
                found[way].append(tokens_per_second(way, Path(text), flags))
    ratio = median(found["dealt"]) / median(found["not dealt"])
    result = {"date": str(datetime.date.today()), "machine": machine("cpu"), "flags": flags}
    args.out.write_text(
        json.dumps({**result, "tokens_per_second": found, "ratio": ratio}, indent=1)
    )
    print(f"tokens/s, dealt over not dealt: {ratio:.3f} (goal 0.95)")


if __name__ == "__main__":
    main()

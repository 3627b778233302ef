"""CE recovered and FVU against L0, for every kind of coder at equal width and tokens.

    python benchmarks/families.py --out benchmarks/results/families.json

Every kind that --activation names, topk with the prefixes of --matryoshka, and a crosscoder over
three layers are trained on the demo LM with each --k, by the script itself and its default recipe,
but without runner-ups, which not all have; then topk with them.
A plot of the same name ends in .svg. Results are added to the file as they come, and what is there
already is not trained again.
"""

import argparse
import datetime
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any, get_args

import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

from make_text import write_text

from sae.config import Activation
from sae.flag_checks import from_flags
from train_sae import TrainConfig, train

COLOURS = ("#1b6ca8", "#d1495b", "#3a9d5d", "#8e5ea2", "#e08e29", "#555555", "#17becf")
MATRYOSHKA = (0.0625, 0.0625, 0.125, 0.25, 0.5)
NO_RUNNER_UPS = {"runner_ups": 0.0}  # since not all kinds have them
KINDS: dict[str, dict[str, Any]] = {
    kind: {"activation": kind, **NO_RUNNER_UPS} for kind in get_args(Activation)
}
KINDS["matryoshka"] = {"matryoshka": MATRYOSHKA}
# Over the hookpoint and the layers beside it; FVU and CE recovered are those at the hookpoint.
KINDS["crosscoder"] = {"crosscoder": True, **NO_RUNNER_UPS}
KINDS["topk, runner-ups"] = {}
PANELS = {"ce_recovered": "CE recovered", "fvu": "FVU"}


def trained(kind: str, k: int, hookpoint: str, text: Path, flags: dict[str, Any]) -> dict[str, Any]:
    """The held-out figures of a coder of this kind."""
    with tempfile.TemporaryDirectory() as folder:
        given = {
            "model": str(ROOT / "demo/lm"),
            "dataset": str(text / "train.jsonl"),
            "hookpoints": beside(hookpoint) if kind == "crosscoder" else (hookpoint,),
            **KINDS[kind],
            "k": k,
            "save_dir": folder,
            "log_with": "none",
            "eval_every": 10**9,  # predictions at the end alone
            **flags,
        }
        summary = train(from_flags(TrainConfig, given))
    (figures,) = summary["hookpoints"].values()
    found = {name: figures[name] for name in ("fvu", "l0", "dead_share")}
    if kind == "crosscoder":
        (figures,) = (p for p in figures["hookpoints"] if p["hookpoint"] == hookpoint)
        found["fvu"] = figures["fvu"]
    found["ce_recovered"] = figures["predictions"]["ce_recovered"]
    return {"kind": kind, "k": k, "steps": summary["step"], "tokens": summary["tokens"], **found}


def beside(hookpoint: str) -> tuple[str, ...]:
    """A layer's hookpoint, and those of the layers before and behind it."""
    stem, _, layer = hookpoint.rpartition(".")
    return tuple(f"{stem}.{int(layer) + i}" for i in (-1, 0, 1))


def plot(results: list[dict[str, Any]]) -> str:
    """Both figures against L0 as SVG, a line for each kind."""
    kinds = list(dict.fromkeys(found["kind"] for found in results))
    drawn = [
        _panel(60 + 380 * i, figure, title, results, kinds)
        for i, (figure, title) in enumerate(PANELS.items())
    ]
    for i, kind in enumerate(kinds):
        x = 40 + 100 * i
        drawn.append(f'<rect x="{x}" y="300" width="12" height="4" fill="{COLOURS[i]}"/>')
        drawn.append(f'<text x="{x + 18}" y="306">{kind}</text>')
    style = 'font-family="sans-serif" font-size="12"'
    size = f'width="{380 * len(PANELS) + 20}" height="320"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{"".join(drawn)}</svg>\n'


def _panel(
    left: int, figure: str, title: str, results: list[dict[str, Any]], kinds: list[str]
) -> str:
    xs, ys = ([found[name] for found in results] for name in ("l0", figure))
    (x0, x1), (y0, y1) = ((min(v) - room(v), max(v) + room(v)) for v in (xs, ys))

    def place(found: dict[str, Any]) -> tuple[float, float]:
        across = 300 * (found["l0"] - x0) / (x1 - x0)
        return left + across, 250 - 220 * (found[figure] - y0) / (y1 - y0)

    parts = [f'<rect x="{left}" y="30" width="300" height="220" fill="none" stroke="#999"/>']
    parts.append(f'<text x="{left}" y="20">{title}</text><text x="{left + 150}" y="282">L0</text>')
    for value, x in ((x0, left), (x1, left + 300)):
        parts.append(f'<text x="{x}" y="266" text-anchor="middle">{value:.0f}</text>')
    for value, y in ((y0, 250), (y1, 34)):
        parts.append(f'<text x="{left - 4}" y="{y}" text-anchor="end">{value:.3f}</text>')
    for kind, colour in zip(kinds, COLOURS, strict=False):
        of_kind = sorted((r for r in results if r["kind"] == kind), key=lambda r: r["l0"])
        points = [place(found) for found in of_kind]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
    return "".join(parts)


def room(values: list[float]) -> float:
    """What is left free on both sides of a range."""
    return 0.08 * (max(values) - min(values)) or 0.1 * abs(max(values)) or 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--k", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--hookpoint", default="layers.3")
    parser.add_argument("--steps", type=int, default=304, help="of 4,096 rows")
    parser.add_argument("--num_latents", type=int, default=3072)
    parser.add_argument("--eval_tokens", type=int, default=2**16)
    args = parser.parse_args()
    flags = {"ctx_len": 256, "batch_size": 32, "grad_acc_steps": 8, "steps_per_batch": 16}
    flags |= {"num_latents": args.num_latents, "eval_tokens": args.eval_tokens}
    flags["max_examples"] = args.steps * 16
    if args.steps % 16:  # a short trial: batches of one step
        flags |= {"batch_size": 16, "grad_acc_steps": 1, "steps_per_batch": 1}
    machine = {"torch": torch.__version__, "machine": platform.machine()}
    asked = {"flags": {**flags, "hookpoint": args.hookpoint}, "machine": machine}
    found = json.loads(args.out.read_text()) if args.out.exists() else {"results": []}
    if found["results"] and found["flags"] != asked["flags"]:
        sys.exit(f"{args.out} has results of other flags: {found['flags']}; give another --out")
    with tempfile.TemporaryDirectory() as text:
        write_text(Path(text))
        for k in args.k:
            for kind in args.kinds:
                if any((r["kind"], r["k"]) == (kind, k) for r in found["results"]):
                    continue
                result = trained(kind, k, args.hookpoint, Path(text), flags)
                print(json.dumps(result), flush=True)
                results = [*found["results"], result]
                found = {**asked, "date": str(datetime.date.today()), "results": results}
                args.out.write_text(json.dumps(found, indent=1) + "\n")
                args.out.with_suffix(".svg").write_text(plot(results), encoding="utf-8")


if __name__ == "__main__":
    main()

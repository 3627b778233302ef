"""Transcoders of all MLPs, each alone or with latents that write to the layers ahead.

    python benchmarks/cross_layer.py --out benchmarks/results/cross_layer.json

Coders of equal width and k are trained on the demo LM on the same tokens, by the script itself and
its default recipe. What a replacement of all MLPs at once loses tells most: only there do latents
of different layers add up. Results are added to the file as they come, and what is there already is
not trained again.
"""

import argparse
import datetime
import json
import platform
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

from make_text import write_text

from sae.flag_checks import from_flags
from train_sae import TrainConfig, train

SIDES: dict[str, dict[str, Any]] = {
    "transcoders": {},
    "one layer ahead": {"cross_layer": 1},
    "all layers ahead": {"cross_layer": "all"},
}


def trained(side: str, text: Path, flags: dict[str, Any]) -> dict[str, Any]:
    """Held-out figures, parameters and seconds of the coders of one side."""
    with tempfile.TemporaryDirectory() as folder:
        given = {"model": str(ROOT / "demo/lm"), "dataset": str(text / "train.jsonl")}
        given |= {"hookpoints": ("layers.*.mlp",), "transcode": True, **SIDES[side], **flags}
        given |= {"save_dir": folder, "log_with": "none", "eval_every": 10**9}
        summary = train(from_flags(TrainConfig, given))
        files = [Path(f["path"]) / "sae.safetensors" for f in summary["hookpoints"].values()]
        parameters = sum(t.numel() for file in files for t in load_file(file).values())
        manifest = json.loads((files[0].parents[1] / "manifest.json").read_text())
    coders = summary["hookpoints"].values()
    return {
        "side": side,
        "tokens": summary["tokens"],
        "parameters": parameters,
        "fvu": {name: found["fvu"] for name, found in summary["hookpoints"].items()},
        "mean_fvu": fmean(found["fvu"] for found in coders),
        "dead_share": fmean(found["dead_share"] for found in coders),
        "ce_recovered_all": summary["together"]["ce_recovered"],
        "kl_all": summary["together"]["kl"],
        "seconds": manifest["wall_seconds"],  # without the figures at the end
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--steps", type=int, default=304, help="of 4,096 rows")
    parser.add_argument("--num_latents", type=int, default=1536)
    parser.add_argument("--eval_tokens", type=int, default=2**15)
    args = parser.parse_args()
    flags = {"ctx_len": 256, "batch_size": 16, "grad_acc_steps": 16, "steps_per_batch": 16}
    flags |= {"num_latents": args.num_latents, "k": args.k, "eval_tokens": args.eval_tokens}
    flags["max_examples"] = args.steps * 16
    flags["runner_ups"] = 0.0  # which cross-layer transcoders do not have
    if args.steps % 16:  # a short trial: batches of one step
        flags |= {"grad_acc_steps": 1, "steps_per_batch": 1}
    machine = {"torch": torch.__version__, "machine": platform.machine()}
    machine |= {"threads": torch.get_num_threads()}
    asked = {"flags": flags, "machine": machine, "date": str(datetime.date.today())}
    found = json.loads(args.out.read_text()) if args.out.exists() else {"results": []}
    if found["results"] and found["flags"] != flags:
        sys.exit(f"{args.out} has results of other flags: {found['flags']}; give another --out")
    with tempfile.TemporaryDirectory() as text:
        write_text(Path(text))
        for side in args.sides:
            if any(r["side"] == side for r in found["results"]):
                continue
            result = trained(side, Path(text), flags)
            print(json.dumps(result), flush=True)
            found = {**asked, "results": [*found["results"], result]}
            args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

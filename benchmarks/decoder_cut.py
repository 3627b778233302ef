"""What ranks that share a coder send each other for its decoder, cut by columns or by latents.

    python benchmarks/decoder_cut.py --out benchmarks/results/decoder_cut.json

The tensors are of the size that they have in a step, and go between processes of this machine over
gloo; nothing is computed. By columns, as ShardedCoder does: candidates of the top k, gradients of
activations, and once a step the squares of decoder rows and of their gradients. By latents: the
same candidates, and then a sum of whole rows, of which every rank has a part.
"""

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.exchange import in_turns, most_of_ranks, sharing
from benchmarks.step import machine
from sae.coders.sharded_kernels import share
from sae.placement.groups import Group, connect_groups
from sae.placement.ranks import Ranks

SHAPE = {"d": 4096, "latents": 2**20, "k": 64, "gpus": 8, "rows": 4096}


def send_candidates(group: Group, rows: int, k: int) -> None:
    """What both cuts need: candidates to the rank that merges their rows, the best to all."""
    keys = torch.zeros(rows, k, dtype=torch.int64)
    lengths = [len(share(rows, rank, group.size)) for rank in range(group.size)]
    mine = lengths[group.rank]
    group.exchange(list(keys.split(lengths)), [(mine, k)] * group.size)
    group.exchange([keys[:mine]] * group.size, [(n, k) for n in lengths])


def by_columns(group: Group, rows: int, k: int, latents: int) -> None:
    """Activations' gradients, of which each rank has the part of its columns; norms."""
    send_candidates(group, rows, k)
    group.sum_(torch.zeros(rows, k))
    for _ in range(2):
        group.sum_(torch.zeros(latents))


def by_latents(group: Group, rows: int, k: int, d: int) -> None:
    """Rows of output, of which each rank has the part of its latents."""
    send_candidates(group, rows, k)
    group.sum_(torch.zeros(rows, d))


def worker(repeats: int) -> dict[str, dict[str, float]]:
    """Both ways, in turns, on the ranks of this launch."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    ranks = Ranks(torch.device("cpu"), 10.0)
    group = connect_groups({"coder": range(ranks.world)}, ranks)["coder"]
    d, latents, k, rows = (SHAPE[n] for n in ("d", "latents", "k", "rows"))
    ways = {
        "columns": partial(by_columns, group, rows, k, latents),
        "latents": partial(by_latents, group, rows, k, d),
    }
    return in_turns(ways, ranks, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.worker:
        found = worker(args.repeats)
        (args.worker / f"rank{os.environ['RANK']}.json").write_text(json.dumps(found))
        return
    found = most_of_ranks(SHAPE["gpus"], __file__, "--repeats", str(args.repeats))
    paper = sharing(**SHAPE)
    print(f"{SHAPE} on {machine('cpu')}")
    for way, seen in found.items():
        moved = SHAPE["rows"] * paper["bytes_a_row"][f"decoder by {way}"]
        moved += paper["bytes_a_step"].get(f"norms, by {way}", 0)
        print(
            f"decoder by {way:8} {seen['received_bytes'] / 1e6:8.1f} MB received by a rank "
            f"(on paper {moved / 1e6:.1f}), {seen['step_ms']:6.0f} ms"
        )
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"machine": machine("cpu"), "shape": SHAPE, **found}
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()

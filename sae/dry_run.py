"""What a run would hold and where, from flags, launch file and LM config: no weights, no data."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from .bank import CoderBank, costs
from .config import SparseCoderConfig
from .exchange import plan, read_plan
from .hookpoints import Hookpoint, find_hookpoints, measure
from .launch import sharded, working_dtype
from .optim import state_bytes


class Held(NamedTuple):
    """Bytes of the tensors that live on one rank through a step.

    What a layer of the LM, or a block of rows in an encoder, needs while it runs comes on top.
    """

    lm: int
    coders: int
    gradients: int
    optimizer: int
    in_flight: int
    """Captured rows, those that travel, and one coder's rows in float32."""


def show(flags: Any) -> None:
    """Print hookpoints, owners, and parameters and GiB per rank; the first rank speaks for all.

    `flags` is the script's `TrainConfig`. Raises UsageError where the run itself would, as far as
    the LM's config can tell.
    """
    if int(os.environ.get("RANK", "0")):
        return
    world = int(os.environ.get("WORLD_SIZE", "1"))
    hub = {"revision": flags.revision, "token": flags.hf_token}
    choose = (flags.hookpoints, flags.layers, flags.layer_stride)
    lm, names = find_hookpoints(flags.model, *choose, **hub)
    parameters, hookpoints = sum(p.numel() for p in lm.parameters()), measure(lm, names)
    shape = SparseCoderConfig.of(flags)
    owner = plan(costs(hookpoints, shape, flags.init_seeds), world, read_plan(flags.layer_to_rank))
    replicas = world == 1 or not flags.distribute_modules
    rows = [["rank", *(name.replace("_", " ") for name in Held._fields), "GiB", "coders of"]]
    for rank in range(1 if replicas else world):
        mine = [h for h in hookpoints if replicas or owner[h.name] == rank]
        held = holdings(flags, world, parameters, hookpoints, mine)
        sizes = [f"{size / 2**30:.2f}" for size in (*held, sum(held))]
        who = "each" if replicas and world > 1 else str(rank)
        rows.append([who, *sizes, " ".join(h.name for h in mine) or "nothing"])
    tokens = flags.batch_size * flags.ctx_len * flags.grad_acc_steps * world
    latents = {shape.latents(h.d_in if flags.transcode else h.d_out) for h in hookpoints}
    print(f"LM      {parameters:,} parameters up to the last of {len(hookpoints)} hookpoints")
    print(f"coders  of {', '.join(f'{n:,}' for n in sorted(latents))} latents")
    print(f"step    {tokens:,} tokens on {world} {'rank' if world == 1 else 'ranks'}")
    if flags.max_examples is not None:
        print(f"run     {flags.max_examples * flags.ctx_len:,} tokens")
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for row in rows:
        print("  ".join([*map(str.rjust, row, widths), row[-1]]))


def holdings(
    flags: Any, world: int, lm_parameters: int, hookpoints: list[Hookpoint], mine: list[Hookpoint]
) -> Held:
    """What a rank that trains the coders of `mine` holds."""
    item = working_dtype(flags.mixed_precision).itemsize
    if sharded():
        lm_parameters = -(-lm_parameters // world) + min(_live_parameters(), lm_parameters)
    bank = CoderBank(mine, SparseCoderConfig.of(flags), flags.init_seeds, "meta")
    coders = [coder for _, coder in bank.items()]
    weights = sum(4 * p.numel() for coder in coders for p in coder.parameters())
    state = sum(state_bytes(coder, flags.optimizer, flags.adam_8bit) for coder in coders)

    tokens = flags.batch_size * flags.ctx_len
    captured = tokens * sum(_width(h, flags.transcode) for h in hookpoints)
    in_flight, rows = captured, tokens
    if flags.distribute_modules and world > 1:
        own = tokens * sum(_width(h, flags.transcode) for h in mine)
        # Sent, received, and joined with what was here already.
        in_flight += (captured - own) + (world - 1) * own + world * own
        rows = world * tokens
    # Of one coder at a time: input, target, reconstruction and its gradient.
    widest = max((c.d_in + 3 * c.d_out for c in coders), default=0)
    working = 4 * rows * widest // flags.micro_acc_steps
    lm = lm_parameters * (1 if flags.load_in_8bit else item)
    return Held(lm, weights, weights, state, in_flight * item + working)


def _width(place: Hookpoint, transcode: bool) -> int:
    return place.d_out + (place.d_in if transcode else 0)


def _live_parameters() -> int:
    """How many parameters of a sharded LM may be gathered at a time, by the launch file."""
    path = Path(os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", ""))
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return int(found.get("zero_optimization", {}).get("stage3_max_live_parameters", 1e9))

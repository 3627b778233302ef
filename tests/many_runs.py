"""Several runs of the script's `train` in one launch, on every rank.

    accelerate launch ... tests/many_runs.py JOBS.json OUT

JOBS.json is a list of [run name, flags, what to do to this rank]; OUT gets one file per rank.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import tyro
from accelerate.state import AcceleratorState

sys.path.insert(0, str(Path(__file__).parent.parent))

import train_sae
from sae import SparseCoder, UsageError
from sae.lm.capture import Pairs
from sae.placement import dealing, liveness
from sae.placement.launch import sharded
from sae.runs import checkpoint

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
PATIENCE = 240.0
"""Seconds that a rank waits for a sign of another one, however busy the machine is."""


@contextmanager
def watched_memory(held: dict[str, Any]) -> Iterator[None]:
    """Record the growth of this process's own memory, file mappings aside, at its peak."""

    def resident() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    before, done = resident(), threading.Event()
    peaks = [0]

    def sample() -> None:
        while not done.wait(0.002):
            peaks.append(resident() - before)

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        held["load_bytes"] = max(peaks)


def wait_for(files: list[Path]) -> None:
    """Wait until another rank has made these files."""
    until = time.monotonic() + PATIENCE
    while not all(file.exists() for file in files):
        assert time.monotonic() < until, f"rank {RANK} waits in vain for {files}"
        time.sleep(0.005)


def run(name: str, flags: list[str], harm: dict[str, Any]) -> dict[str, Any]:
    """One run; what it returned or refused, and what this rank held and did."""
    held: dict[str, Any] = {"forwards": 0, "saved": [], "restored": [], "engine": [], "looks": 0}
    held["ahead"] = []
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        stack.callback(AcceleratorState._reset_state, reset_partial_state=True)
        watch(patch, held)
        do_harm(patch, held, harm)
        if "model" in harm:
            flags = [harm["model"], *flags[1:]]
        if harm.get("other_seed") == RANK:
            flags = [*flags, "--shuffle_seed", "7"]
        flat = (tyro.conf.OmitArgPrefixes,)
        args = [*flags, "--run_name", name]
        cfg = tyro.cli(train_sae.TrainConfig, args=args, use_underscores=True, config=flat)
        try:
            return {"summary": train_sae.train(cfg), **held}
        except UsageError as error:
            return {**held, "error": str(error)}


def watch(patch: pytest.MonkeyPatch, held: dict[str, Any]) -> None:
    """Let a run record in `held` what it holds and does."""
    orders: list[Any] = []  # of DeepSpeed: in which order modules run, once it knows it

    class Capture(train_sae.Capture):
        def __call__(self, tokens: torch.Tensor) -> Pairs:
            found = super().__call__(tokens)
            lm = self.lm.base_model
            held["layers"] = len(lm.layers)
            held["sizes"] = sorted({p.numel() for p in lm.parameters()})
            held["dtypes"] = sorted({str(p.dtype) for p in lm.parameters()})
            held["ahead"] += [order.is_complete_trace() for order in orders]
            return found

    class Bank(train_sae.CoderBank):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            held["coders"] = list(self.hookpoint)
            held["shapes"] = {
                n: {k: list(p.shape) for k, p in c.named_parameters()} for n, c in self.items()
            }

    patch.setattr(train_sae, "Capture", Capture)
    patch.setattr(train_sae, "CoderBank", Bank)
    load_lm, save, load = train_sae.load_lm, SparseCoder.save_to_disk, checkpoint.read_state

    def watched_load_lm(*args: Any) -> Any:
        with watched_memory(held):
            return load_lm(*args)

    def watched_save(coder: SparseCoder, path: Path) -> None:
        held["saved"].append(path.name)
        save(coder, path)

    def watched_load(folder: Path, piece: Any) -> Any:
        held["restored"].append(folder.name)
        return load(folder, piece)

    patch.setattr(train_sae, "load_lm", watched_load_lm)
    patch.setattr(SparseCoder, "save_to_disk", watched_save)
    patch.setattr(checkpoint, "read_state", watched_load)
    if sharded():
        watch_engine(patch, held, orders)


def watch_engine(patch: pytest.MonkeyPatch, held: dict[str, Any], orders: list[Any]) -> None:
    """Record what of DeepSpeed's engine is called that could touch gradients."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    reset_step = PartitionedParameterCoordinator.reset_step

    def watched_reset(order: Any) -> None:
        orders[:] = [order]
        reset_step(order)

    patch.setattr(PartitionedParameterCoordinator, "reset_step", watched_reset)

    for method in ("forward", "backward", "step", "allreduce_gradients"):

        @wraps(original := getattr(DeepSpeedEngine, method))
        def watched(*args: Any, name: str = method, call: Any = original, **kwargs: Any) -> Any:
            held["engine"].append(name)
            return call(*args, **kwargs)

        patch.setattr(DeepSpeedEngine, method, watched)


def do_harm(patch: pytest.MonkeyPatch, held: dict[str, Any], harm: dict[str, Any]) -> None:
    """Let a run meet what `harm` says."""
    count_rows, load_tokens = dealing.count_rows, train_sae.load_tokens
    errors = SparseCoder.errors
    has_had_turn = liveness.has_had_turn
    begun, looked = (
        [Path(f"{harm.get('prepare')}.{sign}.{rank}") for rank in range(WORLD)]
        for sign in ("begun", "looked")
    )

    def spoil(pairs: Pairs) -> dict[str, int]:
        held["forwards"] += 1
        if harm.get("spoil") == RANK and held["forwards"] == 3:
            next(iter(pairs.values()))[1][0] = float("nan")
        return count_rows(pairs)

    def prepare(cfg: Any, *args: Any) -> Any:
        if harm.get("other_data") == RANK:
            cfg = replace(cfg, dataset=harm["data"])
        if "prepare" in harm:  # until the other rank has looked for it five times
            begun[RANK].touch()
            wait_for([looked[1 - RANK]])
        return load_tokens(cfg, *args)

    def look(*args: Any) -> bool:
        held["looks"] += begun[1 - RANK if WORLD == 2 else 0].exists()
        if held["looks"] == 5:
            looked[RANK].touch()
        return has_had_turn(*args)

    calls = iter(range(harm.get("meetings", 0)))

    def meet(coder: SparseCoder, *args: Any) -> Any:
        if (number := next(calls, None)) is not None:
            here = [Path(f"{harm['meet']}.{number}.{rank}") for rank in range(WORLD)]
            here[RANK].touch()
            wait_for(here)
        return errors(coder, *args)

    patch.setattr(dealing, "count_rows", spoil)
    patch.setattr(train_sae, "load_tokens", prepare)
    patch.setattr(liveness, "has_had_turn", look)
    patch.setattr(SparseCoder, "errors", meet)
    if harm.get("other_version") == RANK:
        patch.setattr("sae.runs.folder.version", lambda package: "0.0")


def main() -> None:
    """Run all jobs, and write what came of them."""
    jobs, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(1)
    results = {name: run(name, flags, harm) for name, flags, harm in jobs}
    (out / f"rank{RANK}.json").write_text(json.dumps(results))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

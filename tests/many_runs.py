"""Launched by accelerate: several runs of the script's `train` in one launch, on every rank.

    accelerate launch ... tests/many_runs.py JOBS.json OUT

JOBS.json is a list of [run name, flags, what to do to this rank]; OUT gets one file per rank.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
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


RANK = int(os.environ.get("RANK", "0"))


def run(name: str, flags: list[str], harm: dict[str, Any]) -> dict[str, Any]:
    """One run; what it returned or refused, and what this rank held and did."""
    held: dict[str, Any] = {"forwards": 0, "saved": []}
    real_capture, real_load, real_tokens = (
        *(train_sae.capture, train_sae.load_lm),
        train_sae.load_tokens,
    )
    real_forward, real_save = SparseCoder.forward, SparseCoder.save_to_disk

    def capture(lm: Any, *args: Any, **kwargs: Any) -> Any:
        found = real_capture(lm, *args, **kwargs)
        held["forwards"] += 1
        held["layers"] = len(lm.layers)
        held["sizes"] = sorted({p.numel() for p in lm.parameters()})
        held["dtypes"] = sorted({str(p.dtype) for p in lm.parameters()})
        if harm.get("spoil") == RANK and held["forwards"] == 3:
            next(iter(found.values()))[1][0] = float("nan")
        return found

    def load_lm(*args: Any, **kwargs: Any) -> Any:
        with watched_memory(held):
            return real_load(*args, **kwargs)

    def load_tokens(dataset: str, **kwargs: Any) -> Any:
        if harm.get("other_data") == RANK:
            dataset = harm["data"]
        time.sleep(0 if RANK else harm.get("preparation", 0))
        return real_tokens(dataset, **kwargs)

    def forward(self: SparseCoder, *args: Any, **kwargs: Any) -> Any:
        time.sleep(harm.get("slow", 0))
        return real_forward(self, *args, **kwargs)

    def save_to_disk(self: SparseCoder, path: Path) -> None:
        held["saved"].append(path.name)
        real_save(self, path)

    class Bank(train_sae.CoderBank):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            held["coders"] = list(self.hookpoint)

    if "model" in harm:
        flags = [harm["model"], *flags[1:]]
    if harm.get("other_seed") == RANK:
        flags = [*flags, "--shuffle_seed", "7"]
    with pytest.MonkeyPatch.context() as patch:
        for patched in (capture, load_lm, load_tokens):
            patch.setattr(train_sae, patched.__name__, patched)
        for patched in (forward, save_to_disk):
            patch.setattr(SparseCoder, patched.__name__, patched)
        patch.setattr(train_sae, "CoderBank", Bank)
        if harm.get("other_version") == RANK:
            patch.setattr("sae.run_folder.version", lambda package: "0.0")
        try:
            cfg = tyro.cli(train_sae.TrainConfig, args=[*flags, "--run_name", name])
            return {"summary": train_sae.train(cfg), **held}
        except UsageError as error:
            return {**held, "error": str(error)}
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


def main() -> None:
    jobs, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(1)
    results = {name: run(name, flags, harm) for name, flags, harm in jobs}
    (out / f"rank{RANK}.json").write_text(json.dumps(results))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()

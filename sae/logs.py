"""What a run shows: progress bar, tracker, final table; and the checks that stop it."""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch import Tensor
from tqdm import tqdm

from .bank import CoderBank
from .config import UsageError
from .dead_latents import FiringRecord

_HISTOGRAM_STEPS = 100


def check_launch(log_with: str) -> str | None:
    """The tracker to use. Raises UsageError if it is not installed, or for several processes.

    Processes can each believe to be alone, so it is the launcher's own variable that is asked.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1:
        raise UsageError(
            f"--num_processes {launched}: several processes are not available yet; launch one, "
            f"with accelerate_configs/cpu.yaml or accelerate_configs/1gpu.yaml"
        )
    installed = {str(tracker) for tracker in get_available_trackers()}
    if log_with not in {*installed, "none"}:
        raise UsageError(f"--log_with {log_with}: is not installed; pip install it, or use none")
    return None if log_with == "none" else log_with


def refuse_bad_numbers(metrics: dict[str, Tensor | float], step: int, run: Path) -> None:
    """Raise UsageError if a metric of step number `step` is NaN or infinite, before the update."""
    names = list(metrics)
    values = torch.stack([torch.as_tensor(metrics[n]).double() for n in names])
    if bool(values.isfinite().all()):
        return
    bad, value = next(
        (n, v) for n, v in zip(names, values.tolist(), strict=True) if not math.isfinite(v)
    )
    metric, _, place = bad.partition("/")
    raise UsageError(
        f"step {step}: {metric} at {place} is {value}: the LM's activations there, or the loss, "
        f"hold NaN or Inf, or the targets are constant (see --exclude_tokens). No update was made "
        f"and {run} keeps its last checkpoint. Try --mixed_precision no, a lower --lr, or another "
        f"hookpoint"
    )


class RunLog:
    """The tracker and the progress bar of one run."""

    def __init__(
        self,
        accelerator: Accelerator,
        every: int,
        first_step: int,
        total_steps: int,
        seconds_before: float,
    ) -> None:
        self._accelerator, self._every = accelerator, every
        self._first_step, self._total_steps = first_step, total_steps
        self._seconds_before, self._started = seconds_before, time.monotonic()
        self._rows, self._rows_since = 0, self._started
        self._bar: tqdm | None = None

    @property
    def seconds(self) -> float:
        """Wall seconds of training so far, those before a resume included."""
        return self._seconds_before + time.monotonic() - self._started

    def start(self, flags: dict[str, Any], bank: CoderBank, held_tokens: int) -> None:
        """Open the tracker, record the flags, and say what will be trained."""
        names = list(bank.hookpoint)
        coders = [coder for _, coder in bank.items()]
        widths = ", ".join(str(w) for w in sorted({c.num_latents for c in coders}))
        print(
            f"{len(names)} coders of {widths} latents ({names[0]} to {names[-1]}), "
            f"{sum(p.numel() for p in bank.parameters()):,} parameters; "
            f"{self._total_steps:,} steps, {held_tokens:,} tokens held out"
        )
        if self._accelerator.log_with:
            plain = {n: v if isinstance(v, (int, float, str)) else str(v) for n, v in flags.items()}
            # On resume, points that a killed run logged after its last checkpoint are dropped.
            purge = {"purge_step": self._first_step + 1} if self._first_step else {}
            self._accelerator.init_trackers("tensorboard", plain, {"tensorboard": purge})
        if writer := self._writer():
            rows = "\n".join(f"| {n} | {json.dumps(v)} |" for n, v in flags.items())
            writer.add_text("arguments", f"| flag | value |\n|---|---|\n{rows}", self._first_step)
        self._bar = tqdm(
            total=self._total_steps,
            initial=self._first_step,
            unit="step",
            mininterval=0.2 if sys.stderr.isatty() else 10.0,
        )
        self._started = self._rows_since = time.monotonic()

    def step(
        self, step: int, metrics: dict[str, Any], rows: int, firing: dict[str, FiringRecord]
    ) -> None:
        """Show the metrics of step number `step` (from 1), which trained on `rows` tokens."""
        assert self._bar is not None, "start() comes first"
        self._rows += rows
        self._bar.update()
        if step % _HISTOGRAM_STEPS == 0 or step == self._total_steps:
            self._histograms(step, firing)
        if step % self._every and step != self._total_steps:
            return
        names = list(metrics)
        # One transfer for all values that live on the device.
        values = torch.stack([torch.as_tensor(metrics[n]).double().cpu() for n in names]).tolist()
        numbers = dict(zip(names, values, strict=True))
        now = time.monotonic()
        numbers["tokens"] = next(iter(firing.values())).tokens
        numbers["tokens_per_second"] = self._rows / (now - self._rows_since)
        self._rows, self._rows_since = 0, now
        self._accelerator.log(numbers, step=step)
        fvu = [value for name, value in numbers.items() if name.startswith("fvu/")]
        rate = f"{numbers['tokens_per_second']:,.0f} tokens/s"
        self._bar.set_postfix_str(f"fvu {sum(fvu) / len(fvu):.4f}, {rate}", refresh=False)

    def finish(self, run: Path, summary: dict[str, Any]) -> None:
        """Log the held-out figures, close the tracker, and print where everything is."""
        if self._bar is not None:
            self._bar.close()
        found = summary["hookpoints"]
        held_out = {f"eval/fvu/{n}": figures["fvu"] for n, figures in found.items()}
        self._accelerator.log(held_out, step=summary["step"])
        self._accelerator.end_training()
        width = max(9, *(len(name) for name in found))
        print(f"\n{'hookpoint':{width}}  held-out FVU  dead share")
        for name, figures in found.items():
            print(f"{name:{width}}  {figures['fvu']:12.4f}  {figures['dead_share']:10.2%}")
        print(f"run          {run.resolve()}")
        print(f"TensorBoard  tensorboard --logdir {(run / 'tensorboard').resolve()}")
        print(f"coders       {Path(next(iter(found.values()))['path']).parent}")
        print(f"summary      {(run / 'summary.json').resolve()}")

    def _writer(self) -> Any:
        """TensorBoard's own writer, where that is the tracker."""
        named = (t for t in self._accelerator.trackers if t.name == "tensorboard")
        return next((t.tracker for t in named), None)

    def _histograms(self, step: int, firing: dict[str, FiringRecord]) -> None:
        for name, record in firing.items():
            frequencies = record.frequencies()
            if (writer := self._writer()) and len(frequencies):
                writer.add_histogram(f"log10_firing_frequency/{name}", frequencies.cpu(), step)
            record.clear_recent()

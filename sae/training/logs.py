"""What a run shows: progress bar, metrics, final table."""

import json
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from ..config import Tracker
from ..placement.exchange import Exchange
from ..placement.owners import owned_by
from .bad_steps import Metrics, as_numbers
from .state import TrainingState
from .trackers import open_tracker, show_histogram

_HISTOGRAM_STEPS = 100
_RATE_ENTRIES = 64  # a batch's forwards all come before the first of the steps it is dealt to


class RunLog:
    """The tracker and the progress bar of one run, both kept by rank 0."""

    def __init__(
        self,
        accelerator: Accelerator,
        exchange: Exchange,
        flags: dict[str, Any],
        steps: range,
        seconds_before: float,
    ) -> None:
        """`steps` are those still to go."""
        self._accelerator, self._exchange, self._flags = accelerator, exchange, flags
        self._first_step, self._total_steps = steps.start, steps.stop
        self._seconds_before, self._started = seconds_before, time.monotonic()
        self._rows = 0
        self._marks: deque[tuple[float, int]] = deque(maxlen=_RATE_ENTRIES + 1)
        """When something was logged, and how many rows had been trained on by then."""
        self._bar: tqdm | None = None

    @property
    def seconds(self) -> float:
        """Wall seconds of training so far, those before a resume included."""
        return self._seconds_before + time.monotonic() - self._started

    def start(self, held_out_tokens: int, kernels: str) -> None:
        """Open the tracker, record flags and owners, and say what will be trained, by what."""
        exchange, ranks, flags = self._exchange, self._exchange.ranks, self._flags
        owned = [owned_by(exchange.owner, rank) for rank in range(ranks.world)]
        table = [" ".join(names) or "nothing" for names in owned]
        if ranks.main:
            print(f"kernels on {ranks.device.type}: {kernels}")
            print(
                f"coders at {len(exchange.owner)} hookpoints, {ranks.world} "
                f"{'process' if ranks.world == 1 else 'processes'}; "
                f"{self._total_steps:,} steps, {held_out_tokens:,} tokens held out"
            )
            does = "trains and saves" if exchange.distributed else "saves"
            for rank, owned in enumerate(table) if ranks.world > 1 else ():
                print(f"rank {rank} {does} {owned}")
        if self._accelerator.log_with and ranks.main:
            open_tracker(self._accelerator, flags, self._first_step)
        if writer := self._writer():
            rows = "\n".join(f"| {n} | {json.dumps(v)} |" for n, v in flags.items())
            writer.add_text("arguments", f"| flag | value |\n|---|---|\n{rows}", self._first_step)
            owners = "\n".join(f"| {rank} | {owned} |" for rank, owned in enumerate(table))
            writer.add_text("owners", f"| rank | owns |\n|---|---|\n{owners}", self._first_step)
        self._bar = tqdm(
            total=self._total_steps,
            initial=self._first_step,
            unit="step",
            mininterval=0.2 if sys.stderr.isatty() else 10.0,
            disable=not self._exchange.ranks.main,
        )
        self._started = time.monotonic()
        self._marks.append((self._started, 0))

    def step(self, step: int, metrics: Metrics, rows: int, state: TrainingState) -> None:
        """Show the metrics of step number `step` (from 1), which trained on `rows` tokens."""
        assert self._bar is not None, "start() comes first"
        self._rows += rows
        self._bar.update()
        if step % self._flags["log_every"] and step != self._total_steps:
            return
        known: dict[str, float] = as_numbers(metrics)
        seen = max((record.tokens for record in state.firing.values()), default=0)
        numbers = self._exchange.ranks.merge(known)
        numbers["tokens"] = max(self._exchange.ranks.gather(seen))
        if not self._exchange.ranks.main:
            return
        now = time.monotonic()
        self._marks.append((now, self._rows))
        then, before = self._marks[0]
        numbers["tokens_per_second"] = (self._rows - before) / (now - then)
        self._accelerator.log(numbers, step=step)
        loss = self._flags["loss_fn"]
        found = [value for name, value in numbers.items() if name.split("/")[0] == loss]
        mean = f"{loss} {sum(found) / len(found):.4f}" if found else "skipped"
        rate = f"{numbers['tokens_per_second']:,.0f} tokens/s"
        self._bar.set_postfix_str(f"{mean}, {rate}", refresh=False)

    def histograms_are_due(self, step: int) -> bool:
        """Whether histograms are shown after step number `step`."""
        return step % _HISTOGRAM_STEPS == 0 or step == self._total_steps

    def histograms(self, step: int, state: TrainingState) -> None:
        """Show how often latents fired since the last histograms, and the decoders' norms."""
        found = {}
        for name, record in state.firing.items():
            found[f"log10_firing_frequency/{name}"] = record.frequencies().float().cpu()
            found[f"decoder_norm/{name}"] = state.bank[name].decoder_norms().float().cpu()
        for name, values in self._exchange.merge(found).items():
            if len(values):
                show_histogram(self._accelerator, name, values, step)

    def evaluation(self, step: int, figures: dict[str, float]) -> None:
        """Show held-out figures, by `figure/coder`, after step number `step`."""
        if self._exchange.ranks.main:
            scalars = {f"eval/{name}": value for name, value in figures.items()}
            self._accelerator.log(scalars, step=step)

    def close(self) -> None:
        """Close the tracker and the progress bar."""
        if self._bar is not None:
            self._bar.close()
        for tracker in self._accelerator.trackers:
            tracker.finish()

    def _writer(self) -> Any:
        """TensorBoard's own writer, where that is the tracker."""
        named = (t for t in self._accelerator.trackers if t.name == "tensorboard")
        return next((t.tracker for t in named), None)


def show_summary(run: Path, summary: dict[str, Any], tracker: Tracker) -> None:
    """Print the main figures of a finished run, and where everything is."""
    found = summary["hookpoints"]
    width = max(9, *(len(name) for name in found))
    print(f"\n{'hookpoint':{width}}  held-out FVU  dead share")
    for name, figures in found.items():
        print(f"{name:{width}}  {figures['fvu']:12.4f}  {figures['dead_share']:10.2%}")
    print(f"run          {run.resolve()}")
    if tracker == "tensorboard":
        print(f"TensorBoard  tensorboard --logdir {(run / 'tensorboard').resolve()}")
    print(f"coders       {Path(next(iter(found.values()))['path']).parent}")
    print(f"summary      {(run / 'summary.json').resolve()}")

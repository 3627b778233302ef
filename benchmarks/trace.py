"""Where the time of a real run goes, from torch's profiler, and how long it waits for data.

    python benchmarks/trace.py --out benchmarks/results/trace.json

Two runs on the demo LM, one with text read from disk and tokenised beforehand, one that streams and
tokenises as it goes; then a step with PyTorch's operators alone and one with our kernels, operator
by operator. `--traces FOLDER` keeps what chrome://tracing and Perfetto show.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.profiler import profile, record_function

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "demo")]

from make_text import write_text

import train_sae
from benchmarks.step import Shape, Step, machine, write
from sae.config import KernelChoice
from sae.flag_checks import from_flags
from sae.kernels.cpu import native
from sae.kernels.twins import Kernels
from sae.lm.capture import Capture, Pairs
from sae.placement.ranks import Ranks

_WAIT, _FORWARD = "wait for data", "LM forward"
_STEPS, _BATCH = 30, 16


def labelled(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, named in the trace."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return work(*args, **kwargs)

    return call


class LabelledCapture(Capture):
    """A capture whose forwards of the LM are named in the trace."""

    def __call__(self, tokens: torch.Tensor) -> Pairs:
        with record_function(_FORWARD):
            return super().__call__(tokens)


@contextlib.contextmanager
def labels() -> Iterator[None]:
    """Inside, waits for data, forwards of the LM and what is done in C have names in a trace."""
    batches, in_c = Ranks.batches, native._call

    def waiting(*args: Any) -> Iterator[Any]:
        found = batches(*args)
        ask = labelled(_WAIT, lambda: next(found, None))
        while (tokens := ask()) is not None:
            yield tokens

    def named(name: str, *args: Any) -> None:
        labelled(f"C: {name}", in_c)(name, *args)

    Ranks.batches, native._call = waiting, named
    train_sae.Capture = LabelledCapture
    try:
        yield
    finally:
        Ranks.batches, train_sae.Capture, native._call = batches, Capture, in_c


def shares_of_run(text: Path, folder: Path, streaming: bool, trace: Path | None) -> dict[str, Any]:
    """Of the steps of a run, the shares that waited for data and that the LM took."""
    flags = {
        "model": str(ROOT / "demo/lm"),
        "dataset": str(text),
        "hookpoints": ("layers.1", "layers.3", "layers.4.mlp"),
        "ctx_len": 256,
        "batch_size": _BATCH,
        "max_examples": _STEPS * _BATCH,
        "expansion_factor": 16,
        "eval_tokens": 4096,
        "streaming": streaming,
        "save_dir": str(folder),
        "run_name": "streaming" if streaming else "disk",
        "log_with": "none",
    }
    with labels(), profile() as profiler, contextlib.redirect_stdout(io.StringIO()):
        train_sae.train(from_flags(train_sae.TrainConfig, flags))
    if trace:
        profiler.export_chrome_trace(str(trace))
    main_thread = min(e.thread for e in profiler.events() if e.name == _FORWARD)
    events = [e for e in profiler.events() if e.thread == main_thread]
    forwards = [e.time_range for e in events if e.name == _FORWARD]
    # The first gives the means that coders start from, the last are of the evaluation; the first
    # two steps are warm-up.
    assert len(forwards) > 1 + _STEPS
    forwards = forwards[1 : 1 + _STEPS][2:]
    start, end = forwards[0].start, forwards[-1].end
    waits = [e.time_range for e in events if e.name == _WAIT and start < e.time_range.start < end]
    steps = len(forwards) - 1
    return {
        "steps": steps,
        "ms_per_step": (end - start) / 1e3 / steps,
        "waiting_share": sum(w.elapsed_us() for w in waits) / (end - start),
        "lm_share": sum(f.elapsed_us() for f in forwards[:-1]) / (end - start),
    }


def profiled_step(choice: KernelChoice, dtype: torch.dtype, trace: Path | None) -> dict[str, float]:
    """Milliseconds of a step's most expensive operators, each without what it calls."""
    step = Step(Shape(), dtype, "cpu", kernels=Kernels(choice))
    for _ in range(3):
        step()
    with labels(), profile() as profiler:
        for _ in range(3):
            step()
    if trace:
        profiler.export_chrome_trace(str(trace))
    found = {e.key: e.self_cpu_time_total / 3e3 for e in profiler.key_averages()}
    dearest = sorted(found, key=lambda name: -found[name])[:12]
    return {name: round(found[name], 2) for name in dearest} | {
        "all": round(sum(found.values()), 1)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, help="folder for the traces themselves")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.traces:
        args.traces.mkdir(parents=True, exist_ok=True)

    def trace(name: str) -> Path | None:
        return args.traces / f"{name}.json.gz" if args.traces else None

    result: dict[str, Any] = {"machine": machine("cpu")}
    with tempfile.TemporaryDirectory() as folder:
        write_text(Path(folder) / "text")
        text = Path(folder) / "text/heldout.jsonl"
        for streaming in (False, True):
            name = "streaming" if streaming else "disk"
            result[name] = shares_of_run(text, Path(folder), streaming, trace(name))
            print(name, {key: round(value, 4) for key, value in result[name].items()})
    for dtype in (torch.float32, torch.bfloat16):
        for choice in ("torch", "auto"):
            name = f"{str(dtype).removeprefix('torch.')}, kernels {choice}"
            result[name] = profiled_step(choice, dtype, trace(name.replace(", ", "_")))
            print(name)
            for operator, ms in result[name].items():
                print(f"    {operator:50} {ms:8.2f} ms")
    write(result, args.out)


if __name__ == "__main__":
    main()

"""JumpReLU coders from trained ones: a threshold at which k latents are active in the mean.

python -m sae threshold checkpoints/RUN                  writes into checkpoints/RUN/thresholds
python -m sae threshold CODERS --model gpt2 --dataset DATA --out DIR
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from ..coders.bank import CoderBank
from ..coders.sparse_coder import SparseCoder
from ..flag_checks import UsageError
from ..runs.json_files import check_target
from .evaluate import evaluate_loaded, table
from .figures import Evaluation
from .trained import CodersConfig, TrainedCoders, load_trained

_AT_ONCE = 2**26  # pre_acts


@dataclass(frozen=True)
class ThresholdConfig(CodersConfig):
    """Which coders get thresholds, and on which text."""

    out: str | None = None
    """Folder to write one folder per coder into; default: thresholds, beside the coders."""


class _Largest:
    """The largest of many positive numbers, of which few are in memory at a time."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.count = count
        self.floor = torch.zeros((), device=device)
        """Numbers no larger than this do not count any more."""
        self._kept = torch.empty(0, device=device)

    def add(self, numbers: Float[Tensor, " n"]) -> None:
        """Look at more numbers."""
        self._kept = torch.cat([self._kept, numbers])
        if len(self._kept) > 2 * self.count:
            self._kept = self.in_order()
            self.floor = self._kept[-1]

    def in_order(self) -> Float[Tensor, " n"]:
        """What is known of the `count` largest, the largest first."""
        return self._kept.topk(min(self.count, len(self._kept))).values


@torch.no_grad()
def thresholds(trained: TrainedCoders) -> dict[str, float]:
    """By coder the threshold at which the mean number of active latents on the text is its k.

    Of N rows it is the (k N + 1)-th largest pre-activation, where that is positive; else 0.
    """
    bank, rows = trained.state.bank, dict.fromkeys(trained.state.bank.hookpoint, 0)
    tokens = len(trained.blocks) * trained.source.block_len
    largest = {n: _Largest(c.cfg.k * tokens + 1, c.device) for n, c in bank.items()}
    for batch in trained.source.batches(trained.blocks, 1):
        pairs = trained.capture(batch.to(trained.capture.lm.device))
        for name, coder in bank.items():
            x, y = pairs[bank.hookpoint[name]]
            inputs = (x if coder.cfg.transcode else y).to(coder.dtype)
            rows[name] += len(inputs)
            for part in inputs.split(max(1, _AT_ONCE // coder.num_latents)):
                floor = largest[name].floor.expand(coder.num_latents)
                weights = coder.encoder.weight, coder.encoder.bias, floor
                found = coder.kernels.encode_above(
                    part, *weights, coder.pre_bias, coder.matmul_dtype
                )
                largest[name].add(found.acts)
    found = {}
    for name, coder in bank.items():
        numbers, active = largest[name].in_order(), coder.cfg.k * rows[name]
        found[name] = float(numbers[active]) if active < len(numbers) else 0.0
    return found


def with_threshold(coder: SparseCoder, threshold: float) -> SparseCoder:
    """The JumpReLU coder of the same weights, with one threshold for all latents."""
    cfg = replace(coder.cfg, activation="jumprelu", multi_topk=False, num_latents=coder.num_latents)
    made = SparseCoder(coder.d_in, cfg, "meta", d_out=coder.d_out)
    level = torch.full((coder.num_latents,), threshold, device=coder.device)
    made.load_state_dict({**coder.state_dict(), "threshold": level}, assign=True)
    made.matmul_dtype = coder.matmul_dtype
    return made


def of_coders(trained: TrainedCoders, coders: dict[str, SparseCoder]) -> TrainedCoders:
    """Other coders at the same hookpoints, on the same text."""
    bank, ranks = trained.state.bank, trained.state.exchange.ranks
    dtype = next(iter(coders.values())).matmul_dtype or torch.float32
    other = CoderBank.holding(coders, bank.hookpoint, ranks.device, dtype)
    return replace(trained, state=replace(trained.state, bank=other))


def main(cfg: ThresholdConfig) -> None:
    """Write coders with thresholds; print what they are worth beside those they were made of."""
    out = Path(cfg.out or cfg.folder / "thresholds")
    if any(out.glob("*/cfg.json")):
        raise UsageError(f"--out {out}: holds coders already; give another folder")
    check_target("--out", out / "cfg.json")
    trained = load_trained(cfg)
    found = thresholds(trained)
    made = {n: with_threshold(coder, found[n]) for n, coder in trained.state.bank.items()}
    before = evaluate_loaded(trained)
    after = evaluate_loaded(of_coders(trained, made))
    lines = {}
    for name, coder in trained.state.bank.items():
        lines[f"{name} {coder.cfg.activation}"] = before.coders[name]
        lines[f"{name} > {found[name]:.4g}"] = after.coders[name]
    print(table(Evaluation(lines)))
    for name, coder in made.items():
        try:
            coder.save_to_disk(out / name)
        except OSError as error:
            raise UsageError(
                f"--out {out}: {name} cannot be written ({error.strerror}); give another folder"
            ) from None
    print(f"coders  {out.resolve()}")

"""The flags that docs/recipes.md gives for Sparsify's recipe are that recipe, and nothing else.

The right values come from a loop of its own in float64: TopK and FVU by dense matrices, gradients
by autograd, the sign optimizer by schedulefree's wrapper.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schedulefree
import torch
from safetensors.torch import load_file
from torch import Tensor
from training_runs import SignDescent

from sae import SaeConfig
from sae.coders.bank import CoderBank
from sae.config import DataConfig, MachineConfig, ModelConfig, RunConfig, Widths
from sae.flag_checks import from_flags
from train_sae import TrainConfig, train

PAGE = Path(__file__).parents[2] / "docs/recipes.md"
STEPS, SEQUENCES, ROWS, D, L, K = 12, 4, 24, 16, 48, 3
WARMUP = 4


class Stream:
    """Items that are read in their order."""

    fingerprint = "stream"

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        directions = torch.randn(12, D, generator=g)
        self.items = []
        for _ in range(1 + STEPS * SEQUENCES):
            chosen = torch.rand(ROWS, 12, generator=g).topk(3).indices
            sizes = 1 + torch.rand(ROWS, 3, generator=g)
            self.items.append(torch.zeros(ROWS, 12).scatter(1, chosen, sizes) @ directions + 3)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return ({"site": rows} for rows in self.items)


def documented(optimizer: str) -> dict[str, Any]:
    """The flags of the command in docs/recipes.md, with what the page says for its adam."""
    page = PAGE.read_text()
    command = re.search(r"```bash\npython train_sae.py gpt2 my_text.jsonl (.*?)```", page, re.S)
    assert command is not None
    words = command[1].replace("\\\n", " ").split()
    flags: dict[str, Any] = {}
    for word, value in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--no-"):
            flags[word.removeprefix("--no-")] = False
        elif word.startswith("--"):
            flags[word.removeprefix("--")] = value if value.isalpha() else float(value)
    flags |= {name: int(flags[name]) for name in ("steps_per_batch", "dead_feature_threshold")}
    if optimizer == "signum":
        return flags
    said = re.search(r"For its adam: (.*?) and the same for the rest", page, re.S)
    assert said is not None and "2e-4 / sqrt(L / 2^14)" in said[1]
    assert "`--lr_warmup 1000 --lr_decay 1 --adam_beta1 0.9\n--adam_beta2 0.999`" in said[1]
    adam = {"optimizer": "adam", "lr": 2e-4 / (L / 2**14) ** 0.5, "lr_decay": 1.0}
    return {**flags, **adam, "lr_warmup": WARMUP, "adam_beta1": 0.9, "adam_beta2": 0.999}


def by_hand(optimizer: str, batches: list[Tensor]) -> dict[str, Tensor]:
    """The coder at the end, in float64."""
    cfg = SaeConfig(num_latents=L, k=K)
    start = CoderBank({"site": Widths(D, D)}, cfg, (0,), "cpu")["site"]
    p = {n: t.detach().double().requires_grad_() for n, t in start.named_parameters()}
    p["b_dec"].data.copy_(batches[0].mean(0))
    scale = (L / 2**14) ** 0.5
    if optimizer == "signum":
        inner = SignDescent(p.values(), lr=5e-3 / scale)
        wrapped: Any = schedulefree.ScheduleFreeWrapper(inner, momentum=0.95)
        wrapped.train()
    else:
        wrapped = torch.optim.Adam(p.values(), lr=2e-4 / scale, betas=(0.9, 0.999))
    for step, y in enumerate(batches):
        wrapped.zero_grad()
        pre_acts = (y - p["b_dec"]) @ p["encoder.weight"].T + p["encoder.bias"]
        acts = (pre_acts * (pre_acts >= pre_acts.topk(K).values[:, -1:])).relu()
        error = (y - acts @ p["W_dec"] - p["b_dec"]).square().sum()
        (error / (y - y.mean(0)).square().sum()).backward()
        W_dec = p["W_dec"]
        assert W_dec.grad is not None
        W_dec.grad -= (W_dec.grad * W_dec.detach()).sum(1, keepdim=True) * W_dec.detach()
        if optimizer == "adam":
            rate = min((step + 1) / WARMUP, 1.0, (STEPS - step) / (STEPS - WARMUP))
            wrapped.param_groups[0]["lr"] = 2e-4 / scale * rate
        wrapped.step()
        W_dec.data /= W_dec.data.norm(dim=1, keepdim=True)
    if optimizer == "signum":
        wrapped.eval()
        p["W_dec"].data /= p["W_dec"].data.norm(dim=1, keepdim=True)
    return {name: t.detach() for name, t in p.items()}


@pytest.mark.parametrize("optimizer", ["signum", "adam"])
def test_the_documented_flags_are_sparsifys_recipe(tmp_path: Path, optimizer: str) -> None:
    """Rows in document order, no dead latents revived, one rate for all, its optimizers."""
    rows = Stream()
    flags = documented(optimizer)
    groups = (DataConfig(), MachineConfig(), ModelConfig(), RunConfig())
    known = {name for group in (*groups, TrainConfig().training) for name in vars(group)}
    assert flags.keys() <= known
    flags |= {"num_latents": L, "k": K, "batch_size": SEQUENCES, "eval_tokens": ROWS}
    flags |= {"save_dir": str(tmp_path), "run_name": optimizer, "log_with": "none"}
    summary = train(from_flags(TrainConfig, flags), activations=rows)
    assert summary["step"] == STEPS
    found = load_file(Path(summary["hookpoints"]["site"]["path"]) / "sae.safetensors")
    all_rows = torch.cat(rows.items[1:]).double()
    expected = by_hand(optimizer, list(all_rows.split(SEQUENCES * ROWS)))
    for name, tensor in expected.items():
        # A sign turns where a gradient is no larger than rounding.
        near = (found[name].double() - tensor).abs() < 1e-5
        assert near.double().mean() > 0.995, name

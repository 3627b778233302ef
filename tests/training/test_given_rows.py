"""Rows made elsewhere are trained on as an LM's are."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_runs import run
from transformers import PreTrainedModel

import train_sae
from sae import SparseCoder, UsageError
from sae.flag_checks import from_flags
from sae.lm.capture import Capture


class Items(list[dict[str, Any]]):
    """Rows that can be had by number."""

    fingerprint = "1"


class Unprintable(Items):
    """Rows with a fingerprint that no checkpoint could hold."""

    fingerprint = torch.zeros(2)  # type: ignore[assignment]  # that is the mistake


class Stream:
    """Rows that come one after the other."""

    fingerprint = ("a tuple", 1)  # JSON has only lists

    def __init__(self, items: list[dict[str, Any]]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.items)


def items_of(lm: PreTrainedModel, tokens: Tensor, hookpoint: str, pair: bool) -> Items:
    """An item for each sequence."""
    found = (Capture(lm, [hookpoint], inputs=pair)(t.unsqueeze(0))[hookpoint] for t in tokens)
    return Items([{hookpoint: (x, y) if pair else y} for x, y in found])


@pytest.mark.parametrize("transcode", [False, True])
def test_given_rows_train_the_coders_that_the_lm_trains(
    lm: PreTrainedModel, tokens: Tensor, settings: dict[str, Any], transcode: bool
) -> None:
    """The LM's rows, captured before, give the same weights and held-out FVU as the LM itself."""
    flags = {**settings, "hookpoints": ("layers.1.mlp",), "transcode": transcode, "batch_size": 4}
    live = run(lm, tokens, flags, run_name="live")
    items = items_of(lm, tokens, "layers.1.mlp", transcode)
    cfg = from_flags(train_sae.TrainConfig, {**flags, "run_name": "given"})
    given = train_sae.train(cfg, activations=items)
    ours, theirs = given["hookpoints"]["layers.1.mlp"], live["hookpoints"]["layers.1.mlp"]
    assert ours["fvu"] == pytest.approx(theirs["fvu"], rel=1e-4)
    a, b = (SparseCoder.load_from_disk(found["path"]) for found in (ours, theirs))
    torch.testing.assert_close(a.encoder.weight, b.encoder.weight, rtol=1e-3, atol=1e-5)


def test_a_stream_of_rows_resumes(tmp_path: Path) -> None:
    """Rows that can only be gone through in order: a resumed run ends as an unbroken one."""
    generator = torch.Generator().manual_seed(0)
    items = [{"site": torch.randn(20 + i % 3, 16, generator=generator)} for i in range(60)]
    flags = {"save_dir": str(tmp_path), "batch_size": 5, "expansion_factor": 4, "k": 4}
    flags |= {"save_every": 4, "eval_tokens": 40, "lr": 1e-3, "log_with": "none"}
    flags |= {"optimizer": "signum"}  # no schedule that would know of the end

    def trained(name: str, stop: int | None, **more: Any) -> Any:
        cfg = from_flags(train_sae.TrainConfig, {**flags, "run_name": name, **more})
        return train_sae.train(cfg, activations=Stream(items[:stop]))

    whole = trained("whole", None)
    trained("cut", None, max_examples=40)
    (tmp_path / "cut" / "run.json").write_text(
        (tmp_path / "whole" / "run.json").read_text()
    )  # as if the run had been killed at step 8 of 10
    resumed = trained("cut", None, resume=True)
    assert whole["step"] == resumed["step"] > 8
    paths = [Path(found["hookpoints"]["site"]["path"]) for found in (whole, resumed)]
    files = [(path / "sae.safetensors").read_bytes() for path in paths]
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("activations", "flags", "said"),
    [
        ([{"a": torch.zeros(4, 8)}], {}, "needs a length"),
        (Items(), {}, "hold no item"),
        (Unprintable([{"a": torch.ones(4, 8)}]), {}, "fingerprint cannot be JSON"),
        (Items([{"a": torch.ones(4, 8)}]), {"loss_fn": "kl"}, "--loss_fn kl"),
        (Items([{"a": torch.ones(4, 8)}]), {"transcode": True}, "no pair of rows"),
        (Items([{"a": torch.ones(4, 8).long()}]), {}, "floating-point"),
        (
            Items([{"a": torch.randn(0, 8)}] + [{"a": torch.randn(4, 8)}] * 9),
            {},
            "first item has no",
        ),
        (Items([{"a": torch.randn(4, 8)}] * 9 + [{"b": torch.ones(4, 8)}] * 3), {}, "rows of b"),
        (Items([{"a": torch.randn(4, 8)}] * 9 + [{"a": torch.ones(4, 9)}] * 3), {}, "one width"),
        (Items([{"a": torch.full((64, 8), 0.1)}] * 12), {}, "at a are equal in all rows"),
    ],
)
def test_what_are_no_activations_is_refused(
    activations: Any, flags: dict[str, Any], said: str, tmp_path: Path
) -> None:
    """Each mistake ends in one line that says what is wrong."""
    flags = {"k": 2, "expansion_factor": 2, "batch_size": 1, "log_with": "none", **flags}
    cfg = from_flags(train_sae.TrainConfig, {**flags, "save_dir": str(tmp_path), "run_name": "r"})
    with pytest.raises(UsageError, match=said):
        train_sae.train(cfg, activations=activations)

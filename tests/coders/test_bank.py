"""The coders of a run by name: in natural order, with weights of their own."""

from pathlib import Path

import pytest
import torch
from ranks_in_threads import ThreadGroup, on_ranks

from sae import SaeConfig, SparseCoder, TranscoderConfig, UsageError
from sae.coders.bank import CoderBank, costs
from sae.config import Widths

WIDTHS = {"layers.2": Widths(6, 8), "layers.10": Widths(6, 4)}


def test_coders_are_named_after_hookpoint_and_seed() -> None:
    """One seed: the hookpoint's name; several: .seedS behind it. `at` gives those of one."""
    alone = CoderBank(WIDTHS, SaeConfig(num_latents=16, k=2), (3,), "cpu")
    assert [name for name, _ in alone.items()] == ["layers.2", "layers.10"]
    assert [(c.d_in, c.d_out) for _, c in alone.items()] == [(8, 8), (4, 4)]
    several = CoderBank(WIDTHS, TranscoderConfig(num_latents=16, k=2), (3, 4), "cpu")
    names = ["layers.2.seed3", "layers.2.seed4", "layers.10.seed3", "layers.10.seed4"]
    assert list(several.hookpoint) == names
    assert [name for name, _ in several.at("layers.10")] == names[2:]
    assert [(c.d_in, c.d_out) for _, c in several.items()] == [(6, 8), (6, 8), (6, 4), (6, 4)]


def test_weights_depend_on_hookpoint_and_seed_alone() -> None:
    """A coder starts the same whatever else is in the run; others start elsewhere."""
    cfg = SaeConfig(num_latents=16, k=2)
    widths = {name: Widths(8, 8) for name in ("a", "b")}
    both, one = (
        CoderBank(widths, cfg, (0, 1), "cpu"),
        CoderBank({"b": Widths(8, 8)}, cfg, (1,), "cpu"),
    )
    assert torch.equal(both["b.seed1"].encoder.weight, one["b"].encoder.weight)
    encoders = [coder.encoder.weight for _, coder in both.items()]
    for i, a in enumerate(encoders):
        assert all((a - b).abs().max() > 0.01 for b in encoders[:i])


@pytest.mark.parametrize("latents", [8, 40])
def test_weights_of_another_size_are_refused_by_every_rank(tmp_path: Path, latents: int) -> None:
    """A rank that would find its part in a coder of another size does not take it."""
    SparseCoder(6, SaeConfig(num_latents=latents, k=2)).save_to_disk(tmp_path / "a")
    said = []

    def on_a_rank(group: ThreadGroup) -> None:
        cfg = SaeConfig(num_latents=20, k=2)
        bank = CoderBank({"a": Widths(6, 6)}, cfg, (0,), "cpu", groups={"a": group})
        with pytest.raises(UsageError, match=f"--finetune .*{latents}, 6.*there and .*20, 6"):
            bank.load_pretrained(str(tmp_path))
        said.append(group.rank)

    on_ranks(2, on_a_rank)
    assert sorted(said) == [0, 1]


def test_costs_are_latents_times_widths() -> None:
    """What a plan weighs is seeds * num_latents * (d_in + d_out); token ids cannot be encoded."""
    cfg = SaeConfig(num_latents=16, k=2)
    assert costs(WIDTHS, cfg, (0,)) == {"layers.2": 16 * 16, "layers.10": 16 * 8}
    transcoders = TranscoderConfig(num_latents=16, k=2)
    assert costs(WIDTHS, transcoders, (0, 1)) == {"layers.2": 32 * 14, "layers.10": 32 * 10}
    with pytest.raises(UsageError, match="--transcode: embed_tokens takes token ids"):
        costs({"embed_tokens": Widths(0, 32)}, TranscoderConfig(), (0,))
    with pytest.raises(UsageError, match="--k 9 .*8 latents of the coder at layers.2"):
        costs(WIDTHS, SaeConfig(num_latents=8, k=9), (0,))

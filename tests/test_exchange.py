"""Laws of the layer-to-rank plan and of one process alone."""

import json
import random
from pathlib import Path

import pytest
import torch

from sae import SparseCoderConfig, TranscoderConfig, UsageError
from sae.bank import costs
from sae.exchange import Exchange, no_rows, plan, read_plan
from sae.hookpoints import Hookpoint
from sae.ranks import Ranks

ALONE = Ranks(torch.device("cpu"), 1.0)


def test_cost_is_the_size_of_what_is_trained() -> None:
    """num_latents x (d_in + d_out), of the widths that the coder sees, for every seed."""
    place = [Hookpoint("mlp", 8, 6)]
    assert costs(place, SparseCoderConfig(num_latents=40), (0, 1)) == {"mlp": 2 * 40 * (6 + 6)}
    assert costs(place, TranscoderConfig(num_latents=40), (0,)) == {"mlp": 40 * (8 + 6)}


def test_heaviest_first_onto_the_lightest() -> None:
    """Mixed widths are balanced, equal ones dealt in natural order; a rank may stay empty."""
    assert plan({"a": 1, "b": 5, "c": 3, "d": 3}, 2) == {"a": 0, "b": 0, "c": 1, "d": 1}
    assert plan({"a": 1, "b": 1, "c": 1}, 2) == {"a": 0, "b": 1, "c": 0}
    assert plan({"a": 1}, 3) == {"a": 0}


def test_plan_is_balanced() -> None:
    """Every hookpoint has one owner, and loads differ by no more than the heaviest hookpoint."""
    draw = random.Random(0)
    for _ in range(300):
        world, count = draw.randint(1, 9), draw.randint(1, 40)
        cost = {f"layers.{i}": draw.randint(1, 10**6) for i in range(count)}
        owner = plan(cost, world)
        assert list(owner) == list(cost) and set(owner.values()) <= set(range(world))
        loads = [sum(cost[p] for p, r in owner.items() if r == rank) for rank in range(world)]
        assert max(loads) - min(loads) <= max(cost.values())


def test_owners_by_hand(tmp_path: Path) -> None:
    """Pairs or a JSON file fix owners, the rest is planned around them; nonsense is refused."""
    fixed = read_plan(["a=1", "b=1"])
    assert plan({"a": 1, "b": 1, "c": 1}, 2, fixed) == {"a": 1, "b": 1, "c": 0}
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(fixed))
    assert read_plan([str(file)]) == fixed
    for bad in (["a"], ["a=x"], ["a=1", "a=2"], ["=1"], [str(tmp_path / "none.json")]):
        with pytest.raises(UsageError, match="--layer_to_rank"):
            read_plan(bad)
    file.write_text("[1]")
    with pytest.raises(UsageError, match="--layer_to_rank"):
        read_plan([str(file)])
    with pytest.raises(UsageError, match="--layer_to_rank z=0: no coder is trained there.* a, b"):
        plan({"a": 1, "b": 1}, 2, {"z": 0})
    with pytest.raises(UsageError, match="--layer_to_rank a=2: there are 2 ranks, 0 to 1"):
        plan({"a": 1, "b": 1}, 2, {"a": 2})


def test_one_process_sends_nothing() -> None:
    """Alone, rows and sums stay what they are, and traffic is not a metric."""
    exchange = Exchange(ALONE, {"a": 1}, distributed=True)
    rows = torch.randn(3, 2)
    pairs = {"a": (rows, rows)}
    assert exchange.to_owners(pairs) is pairs and not exchange.distributed
    exchange.sum_replicas_(rows)
    assert ALONE.traffic() == {} and ALONE.gather(5) == [5] and ALONE.merge({"a": 1}) == {"a": 1}
    x, y = no_rows((rows, rows))
    assert x is y and x.shape == (0, 2)

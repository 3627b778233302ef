"""Law 3: which rank trains, saves and restores a coder is one table, which the log shows."""

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from launched_runs import HOOKPOINTS, Runs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sae import SparseCoderConfig, TranscoderConfig, UsageError
from sae.coders.bank import costs
from sae.config import MachineConfig, Widths
from sae.placement import launch
from sae.placement.owners import Placement, plan_owners, read_owners

# Owned by each rank: by cost, by hand, and with ranks that own none.
OWNED = {
    "two owners": [["layers.0", "layers.1.mlp"], ["layers.1", "layers.2"]],
    "two owners, by hand": [[], HOOKPOINTS],
    "three owners": [["layers.0", "layers.2"], ["layers.1"], ["layers.1.mlp"]],
    "four owners": [[hookpoint] for hookpoint in HOOKPOINTS],
    "idle": [["layers.1.mlp"], ["layers.2"], [], ["layers.0", "layers.1"]],
    "some are shared": [
        ["layers.0", "layers.2"],
        ["layers.0", "layers.1.mlp"],
        ["layers.1", "layers.1.mlp"],
    ],
    "four share": [HOOKPOINTS] * 4,
}
# What the log adds to the names of coders that ranks share.
PARTS = {
    "some are shared": [
        {"layers.0": (1, 2)},
        {"layers.0": (2, 2), "layers.1.mlp": (1, 2)},
        {"layers.1.mlp": (2, 2)},
    ],
    "four share": [dict.fromkeys(HOOKPOINTS, (rank, 4)) for rank in (1, 2, 3, 4)],
}


def one_each(owner: dict[str, range]) -> list[int]:
    """The ranks of coders that have one each."""
    assert all(len(ranks) == 1 for ranks in owner.values())
    return [ranks[0] for ranks in owner.values()]


def test_cost_is_the_size_of_what_is_trained() -> None:
    """num_latents x (d_in + d_out), of the widths that the coder sees, for every seed."""
    widths = {"mlp": Widths(8, 6)}
    assert costs(widths, SparseCoderConfig(num_latents=40), (0, 1)) == {"mlp": 2 * 40 * (6 + 6)}
    assert costs(widths, TranscoderConfig(num_latents=40), (0,)) == {"mlp": 40 * (8 + 6)}


def test_the_heaviest_goes_first_to_the_rank_with_the_least() -> None:
    """Mixed widths are balanced, equal ones dealt in natural order; a rank may stay empty."""
    assert one_each(plan_owners({"a": 1, "b": 5, "c": 3, "d": 3}, 2)) == [0, 0, 1, 1]
    assert one_each(plan_owners({"a": 1, "b": 1, "c": 1}, 2)) == [0, 1, 0]
    assert one_each(plan_owners({"a": 1}, 3)) == [0]


def test_coders_that_are_shared_are_planned_like_others() -> None:
    """Each goes to the neighbours with the least so far, beside those that one rank has whole."""
    assert plan_owners({"a": 4, "b": 2, "c": 2}, 4, None, 2) == {
        **{"a": range(2), "b": range(2, 4), "c": range(2, 4)}
    }
    whole = {"a": range(3, 4), "b": range(1, 4)}
    assert plan_owners({"a": 9, "b": 3, "c": 2}, 4, whole, 2) == {**whole, "c": range(2)}


def test_flags_and_the_number_of_ranks_say_where_coders_live() -> None:
    """--shard_latents divides each among all ranks, or as many as --ranks_per_coder says."""

    def placed(**flags: Any) -> tuple[bool, int]:
        found = Placement.of(MachineConfig(**flags), 4)
        return found.distributed, found.ranks_per_coder

    assert placed() == (False, 1) and placed(distribute_modules=True) == (True, 1)
    assert placed(distribute_modules=True, ranks_per_coder=2) == (True, 2)
    assert placed(shard_latents=True) == (True, 4)
    assert placed(shard_latents=True, distribute_modules=True) == (True, 4)
    assert placed(shard_latents=True, ranks_per_coder=2) == (True, 2)
    by_hand = MachineConfig(shard_latents=True, layer_to_rank=("a=1",))
    assert Placement.of(by_hand, 2) == (True, ("a=1",), 2)


def test_ranks_that_cannot_be_divided_are_refused_before_an_lm_is_loaded() -> None:
    """A launch of 4 ranks has no groups of 3, which `connect` says already."""
    launched = SimpleNamespace(num_processes=4, is_main_process=True, device=torch.device("cpu"))
    flags = MachineConfig(distribute_modules=True, ranks_per_coder=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "4")
        with pytest.raises(UsageError, match="--ranks_per_coder 3: does not divide .* ranks, 4"):
            launch.connect(launched, flags)  # pyright: ignore[reportArgumentType]


def test_the_table_is_balanced() -> None:
    """Every hookpoint has one owner, and loads differ by no more than the heaviest hookpoint."""
    draw = random.Random(0)
    for _ in range(300):
        world, count = draw.randint(1, 9), draw.randint(1, 40)
        cost = {f"layers.{i}": draw.randint(1, 10**6) for i in range(count)}
        owner = plan_owners(cost, world)
        assert list(owner) == list(cost) and set(one_each(owner)) <= set(range(world))
        loads = [sum(cost[p] for p, r in owner.items() if rank in r) for rank in range(world)]
        assert max(loads) - min(loads) <= max(cost.values())


def test_owners_given_by_hand_are_kept(tmp_path: Path) -> None:
    """Pairs or a JSON file fix owners, the rest is planned around them; nonsense is refused."""
    fixed = read_owners(["a=1", "b=1"])
    assert one_each(plan_owners({"a": 1, "b": 1, "c": 1}, 2, fixed)) == [1, 1, 0]
    file = tmp_path / "owners.json"
    file.write_text(json.dumps({"a": 1, "b": "1"}))
    assert read_owners([str(file)]) == fixed
    assert read_owners(["a=2-5"]) == {"a": range(2, 6)}
    nonsense = (["a"], ["a=x"], ["a=1", "a=2"], ["=1"], ["a=2-1"], ["a=-1"], ["a=1-"])
    for bad in (*nonsense, [str(tmp_path / "none.json")]):
        with pytest.raises(UsageError, match="--layer_to_rank"):
            read_owners(bad)
    file.write_text("[1]")
    with pytest.raises(UsageError, match="--layer_to_rank"):
        read_owners([str(file)])
    with pytest.raises(UsageError, match="--layer_to_rank z=0: no coder is trained there.* a, b"):
        plan_owners({"a": 1, "b": 1}, 2, {"z": range(1)})
    with pytest.raises(UsageError, match="--layer_to_rank a=2: there are 2 ranks, 0 to 1"):
        plan_owners({"a": 1, "b": 1}, 2, {"a": range(2, 3)})
    with pytest.raises(UsageError, match="--layer_to_rank a=1-2: there are 2 ranks, 0 to 1"):
        plan_owners({"a": 1, "b": 1}, 2, {"a": range(1, 3)})


@pytest.mark.parametrize("name", OWNED)
def test_the_owner_of_a_coder_trains_and_saves_it(runs: Runs, name: str) -> None:
    """Each coder lives on its ranks, which alone write it."""
    assert [rank["coders"] for rank in runs.results[name]] == OWNED[name]
    assert [sorted(set(rank["saved"])) for rank in runs.results[name]] == OWNED[name]


def test_replicas_are_trained_by_all_and_saved_by_their_owner(runs: Runs) -> None:
    """Every rank trains every coder; the table says who writes which."""
    ranks = runs.results["two replicas"]
    assert [rank["coders"] for rank in ranks] == [HOOKPOINTS, HOOKPOINTS]
    assert [sorted(set(rank["saved"])) for rank in ranks] == OWNED["two owners"]


def test_the_owner_of_a_coder_restores_it(runs: Runs) -> None:
    """A resumed rank reads what it trains by the new table, whoever wrote it."""
    resumed = {
        "replicas, two to three": OWNED["three owners"],
        "owners, two to three": [HOOKPOINTS] * 3,
        "shared, two to three": [HOOKPOINTS] * 3,
        "shared, then whole": OWNED["three owners"],
        "whole, then shared": [HOOKPOINTS] * 3,
    }
    for name, expected in resumed.items():
        assert [rank["coders"] for rank in runs.results[name]] == expected
        assert [sorted(rank["restored"]) for rank in runs.results[name]] == expected


@pytest.mark.parametrize("name", [*OWNED, "two replicas"])
def test_the_log_shows_the_table(runs: Runs, name: str) -> None:
    """TensorBoard has a line for each rank, with the hookpoints that it owns, or shares."""
    reader = EventAccumulator(str(runs.folder / "runs" / name / "tensorboard")).Reload()
    (event,) = reader.Tensors("owners/text_summary")
    owned = OWNED["two owners" if name == "two replicas" else name]
    parts = PARTS.get(name, [{} for _ in owned])
    said = [
        [f"{n} ({part[n][0]} of {part[n][1]})" if n in part else n for n in names]
        for names, part in zip(owned, parts, strict=True)
    ]
    lines = [f"| {rank} | {' '.join(names) or 'nothing'} |" for rank, names in enumerate(said)]
    assert event.tensor_proto.string_val[0].decode().splitlines()[2:] == lines

"""Laws of the exchange of rows in one process; many processes are in tests/laws."""

import pytest
import torch

from sae.placement.exchange import Exchange, no_rows, spread_over_machines
from sae.placement.ranks import Ranks

ALONE = Ranks(torch.device("cpu"), 1.0)


def test_one_process_sends_nothing() -> None:
    """Alone, rows and sums stay what they are, and traffic is not a metric."""
    exchange = Exchange(ALONE, {"a": 1}, distributed=True)
    rows = torch.randn(3, 2)
    hands = [{"a": (rows, rows)}]
    assert exchange.to_owners(hands) is hands and not exchange.distributed
    exchange.sum_replicas_(rows)
    assert ALONE.traffic() == {} and ALONE.gather(5) == [5] and ALONE.merge({"a": 1}) == {"a": 1}


def test_one_process_trains_and_writes_every_coder() -> None:
    """Alone, a rank owns all hookpoints, whatever the flags say."""
    for distributed in (False, True):
        exchange = Exchange(ALONE, {"a": 1, "b": 2}, distributed, ("b=0",))
        assert exchange.owner == {"a": range(1), "b": range(1)} and not exchange.groups
        assert exchange.trained_here({"a": "x", "b": "y"}) == {"a": "x", "b": "y"}
        assert exchange.owns("a") and exchange.owns("b")


def test_a_pair_without_rows_keeps_its_widths() -> None:
    """Rows are dropped from both tensors; one tensor twice stays one tensor twice."""
    rows, other = torch.randn(3, 2), torch.randn(3, 5)
    x, y = no_rows((rows, rows))
    assert x is y and x.shape == (0, 2)
    x, y = no_rows((rows, other))
    assert x.shape == (0, 2) and y.shape == (0, 5)


def test_a_coder_on_several_machines_is_named() -> None:
    """Each coder whose ranks are not on one machine has a line; the others have none."""
    owner = {"a": range(0, 2), "b": range(1, 3), "c": range(3, 4), "d": range(0, 4)}
    b, d = spread_over_machines(owner, [0, 0, 2, 2])
    flags = "--shard_latents, --ranks_per_coder or --layer_to_rank"
    assert b.startswith(f"{flags}: b is on ranks 1-2, which are on 2")
    assert d.startswith(f"{flags}: d is on ranks 0-3, which are on 2")
    assert spread_over_machines(owner, [0] * 4) == []


def test_a_run_says_which_coders_several_machines_share(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The main rank prints a line for each, when it is known who owns what."""

    class OnTwoMachines(Ranks):
        def machines(self) -> list[int]:
            return [0, 1]

        def same(self, named: dict[str, str]) -> None:
            pass

    monkeypatch.setattr("sae.placement.exchange.connect_groups", lambda owner, ranks: {})
    for rank, lines in ((0, 1), (1, 0)):
        ranks = OnTwoMachines(torch.device("cpu"), 1.0)
        ranks.rank, ranks.world, ranks.main = rank, 2, rank == 0
        Exchange(ranks, {"a": 1, "b": 1}, True, ("a=0-1", "b=0"))
        said = capsys.readouterr().out.splitlines()
        assert len(said) == lines and all("a is on ranks 0-1" in line for line in said)

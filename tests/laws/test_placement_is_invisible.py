"""Placement changes no number: the same run, whoever holds what, in real launches.

The law of the owner table and that of one recipe, which say why, have files of their own.
"""

import json
from itertools import chain
from typing import Any

import pytest
import torch
from command_runs import call
from conftest import tiny_lm
from launched_runs import (
    DEALINGS,
    FAMILIES,
    HOOKPOINTS,
    KINDS,
    MEETINGS,
    REPLICAS_AND_OWNERS,
    SHARED,
    STEPS,
    Runs,
)
from torch import Tensor
from training_runs import tensors_of


@pytest.mark.parametrize("name", [*REPLICAS_AND_OWNERS, *chain(*SHARED.values())])
def test_every_placement_is_the_same_run(runs: Runs, name: str) -> None:
    """Curves, held-out figures and final weights equal those of one process."""
    runs.assert_same("one", name)


@pytest.mark.parametrize("name", DEALINGS)
def test_batches_are_dealt_alike_in_every_placement(runs: Runs, name: str) -> None:
    """The rows of a batch, dealt to four steps, make the run that they make in one process."""
    runs.assert_same("dealt one", name)


def test_dealt_rows_travel_once(runs: Runs) -> None:
    """An owner receives the rows of the other rank once, in the first step of each batch."""
    curves, kept = runs.curves("two dealt owners"), kept_of(36)
    for rank, found in enumerate(runs.results["two dealt owners"]):
        others = [kept[name].view(3, 2, -1).sum(2)[:, 1 - rank] for name in found["coders"]]
        expected = torch.zeros(3, 4, dtype=torch.int64)
        expected[:, 0] = sum(others) * 32 * 4
        points = curves[f"bytes_received/rank{rank}"]
        assert [value for _, value in points] == expected.flatten().tolist()


def test_transcoders_are_the_same_in_every_placement(runs: Runs) -> None:
    """Inputs and targets travel to the owner together: the weights are those of one process."""
    tuned = [("tuned one", other) for other in ("tuned replicas", "tuned shared")]
    for one, other in (("coded-one", "coded owners"), *tuned):
        for key, tensor in runs.weights(one).items():
            torch.testing.assert_close(runs.weights(other)[key], tensor, rtol=0, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_coders_that_ranks_share_are_the_same_of_every_kind(runs: Runs, kind: str) -> None:
    """Groupmax, a falling k, and every optimizer: shared coders end as those of one process."""
    one, shared = f"{kind} one", f"{kind} shared"
    # Muon orthogonalizes in bfloat16, and soap divides by sizes of a row's smallest parts, which it
    # turns back into the whole row: rounding becomes visible.
    if kind in ("muon", "soap"):
        for key, tensor in runs.weights(one).items():
            torch.testing.assert_close(runs.weights(shared)[key], tensor, rtol=0, atol=2e-4)
    else:
        runs.assert_same(one, shared)


@pytest.mark.parametrize("name", ["runner-ups replicas", "runner-ups shared"])
def test_runner_ups_are_the_same_in_every_placement(runs: Runs, name: str) -> None:
    """They are those of all latents, whoever holds them, and each learns once."""
    one, other = (runs.summary(n)["hookpoints"] for n in ("runner-ups one", name))
    for hookpoint, figures in one.items():
        assert other[hookpoint]["fvu"] == pytest.approx(figures["fvu"], rel=1e-5)
    # Where a runner-up explains what is left its gradient is rounding, which Adam divides by its
    # own size.
    for key, tensor in runs.weights("runner-ups one").items():
        torch.testing.assert_close(runs.weights(name)[key], tensor, rtol=0, atol=2e-5)
    assert any(
        (runs.weights("one")[key] - tensor).abs().max() > 1e-3
        for key, tensor in runs.weights("runner-ups one").items()
    )


@pytest.mark.parametrize("name", ["soap, three to four", "soap, then whole"])
def test_an_eigenbasis_is_resumed_by_other_ranks(runs: Runs, name: str) -> None:
    """What soap keeps of a matrix, some cut and some whole, is read by whoever has the coder."""
    runs.assert_same("soap shared", name)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_the_same_in_every_placement(runs: Runs, family: str) -> None:
    """Replicas, owners, pieces, dealt batches: thresholds too, and figures of prefixes."""
    for one in (f"{family} one", f"{family} dealt one"):
        for other in ("replicas", "owners"):
            runs.assert_same(one, one.replace("one", other))
    if family != "prefixes":
        assert f"{HOOKPOINTS[0]}/threshold" in runs.weights(f"{family} one")
        return
    runs.assert_same("prefixes one", "prefixes shared")
    for other in ("replicas", "owners", "shared"):
        for hookpoint in HOOKPOINTS:
            ours, theirs = (
                runs.summary(f"prefixes {run}")["hookpoints"][hookpoint]["prefixes"]
                for run in ("one", other)
            )
            for right, found in zip(ours, theirs, strict=True):
                for figure in ("latents", "fvu", "l0", "dead_share"):
                    assert found[figure] == pytest.approx(right[figure], rel=1e-5)


@pytest.mark.parametrize("name", ["crossed replicas", "sharded and crossed"])
def test_crosscoders_are_the_same_in_replicas(runs: Runs, name: str) -> None:
    """Accumulated, dealt, in pieces, beside a sharded LM, all is as in one process."""
    runs.assert_same("crossed one", name)
    scales = [
        json.loads((runs.folder / f"runs/{run}/crosscoder.json").read_text())["parts"]
        for run in ("crossed one", name)
    ]
    for ours, theirs in zip(*scales, strict=True):
        assert ours[:2] == theirs[:2] and ours[2] == pytest.approx(theirs[2], rel=1e-6)


@pytest.mark.parametrize("name", ["layered replicas", "layered owners", "sharded and layered"])
def test_cross_layer_transcoders_are_the_same_in_every_placement(runs: Runs, name: str) -> None:
    """Accumulated, dealt, in pieces, beside a sharded LM, all is as in one process."""
    runs.assert_same("layered one", name)


def test_crosscoders_over_several_lms_are_the_same_in_replicas(runs: Runs) -> None:
    """Both LMs read the same tokens on every rank."""
    runs.assert_same("both one", "both replicas")


def test_end_to_end_training_is_the_same_in_replicas(runs: Runs) -> None:
    """On two ranks, accumulated, training on KL is that of one process; padded rows too."""
    for kind in ("kl", "padded"):
        runs.assert_same_end_to_end(f"{kind} one", f"{kind} replicas")


@pytest.fixture(scope="module")
def kept() -> dict[str, Tensor]:
    """Which tokens of 144 examples have rows at each hookpoint, in their order."""
    return kept_of(144)


def kept_of(examples: int) -> dict[str, Tensor]:
    """The same for as many examples, by plain hooks."""
    tokens = torch.randint(0, 64, (200, 16), generator=torch.Generator().manual_seed(0))
    order = 11 + torch.randperm(examples, generator=torch.Generator().manual_seed(42))
    lm, norms = tiny_lm(), {}

    def keep(name: str, output: Any) -> None:
        norms[name] = (output if isinstance(output, Tensor) else output[0]).norm(dim=2)

    for name in HOOKPOINTS:
        module = lm.get_submodule(name)
        module.register_forward_hook(lambda m, args, output, name=name: keep(name, output))
    with torch.no_grad():
        lm(input_ids=tokens[order])
    read = ~torch.isin(tokens[order], torch.tensor([5, 9, 11]))
    read[:, 0] = False
    limits = {name: 1.1 * norm[:12][read[:12]].median() for name, norm in norms.items()}
    return {name: read & (norm <= limits[name]) for name, norm in norms.items()}


@pytest.mark.parametrize(
    ("name", "world", "tensors"),
    [("two owners", 2, 1), ("three owners", 3, 1), ("four owners", 4, 1), ("coded owners", 2, 2)],
)
def test_rows_travel_to_their_owner_and_nowhere_else(
    runs: Runs, kept: dict[str, Tensor], name: str, world: int, tensors: int
) -> None:
    """A rank receives its hookpoints' rows of the other ranks, once, and not a byte more."""
    curves, nothing = runs.curves(name), torch.zeros(STEPS, dtype=torch.int64)
    rows = {name: found.view(STEPS, world, -1).sum(2) for name, found in kept.items()}
    assert len({tuple(found.flatten().tolist()) for found in rows.values()}) > 1
    width = tensors * 32 * 4
    for rank, found in enumerate(runs.results[name]):
        mine = {n: r for n, r in rows.items() if n in found["coders"]}
        others = {n: r for n, r in rows.items() if n not in found["coders"]}
        received = sum(((r.sum(1) - r[:, rank]) for r in mine.values()), nothing) * width
        sent = sum((r[:, rank] for r in others.values()), nothing) * width
        for direction, expected in (("received", received), ("sent", sent)):
            points = curves.get(f"bytes_{direction}/rank{rank}", [])
            assert [v for _, v in points] == expected.tolist(), (rank, direction)


def test_shared_coders_send_rows_once_and_else_what_is_sparse(
    runs: Runs, kept: dict[str, Tensor]
) -> None:
    """Rows of other ranks; 8 bytes a candidate, 4 a gradient of one; norms; not a byte more."""
    curves, expected = runs.curves("sparse"), torch.zeros(4, STEPS, dtype=torch.int64)
    d, latents, k = 32, 128, 2 * 4  # the active ones and as many runner-ups
    for found in kept.values():
        for step, by_rank in enumerate(found.view(STEPS, 4, -1).sum(2).tolist()):
            n = sum(by_rank)
            for rank in range(4):
                merged = n * (rank + 1) // 4 - n * rank // 4  # rows whose candidates meet here
                received = (n - by_rank[rank]) * d * 4 + (3 * merged + n - merged) * k * 8
                # Gradients of activations and, twice, of b_dec; an error, a norm; decoder rows.
                for numbers in (n * k, d, d, 1, 1, latents, latents):
                    received += 2 * 3 * numbers * 4 // 4
                expected[rank, step] += received
    for rank in range(4):
        points = curves[f"bytes_received/rank{rank}"]
        assert [value for _, value in points] == expected[rank].tolist()


def test_no_rank_holds_a_whole_shared_coder(runs: Runs) -> None:
    """Of 128 latents and 32 columns each of four ranks has a quarter, of three a third or so."""
    for name, latents, columns in (
        ("four share", [32] * 4, [8] * 4),
        ("three share", [42, 43, 43], [10, 11, 11]),
    ):
        for rank, found in enumerate(runs.results[name]):
            for shapes in found["shapes"].values():
                assert shapes["encoder.weight"] == [latents[rank], 32]
                assert shapes["encoder.bias"] == [latents[rank]]
                assert shapes["W_dec"] == [128, columns[rank]]


def test_pieces_are_coders_to_all_that_reads_coders(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--finetune reads them, whole or shared; commands too; best ones are those of their step."""
    whole, shared = runs.weights("from pieces"), runs.weights("from pieces, shared")
    for key, tensor in whole.items():
        torch.testing.assert_close(shared[key], tensor, rtol=0, atol=2e-6)
    run = runs.folder / "runs" / "two share"
    for hookpoint in HOOKPOINTS:
        best = run / "best" / hookpoint
        step = json.loads((best / "fvu.json").read_text())["step"]
        saved = tensors_of(run / f"step_{step}" / hookpoint, "sae.safetensors")
        for key, tensor in tensors_of(best, "sae.safetensors").items():
            assert torch.equal(tensor, saved[key]), key
    out = runs.folder / "evaluated.json"
    assert call(monkeypatch, "evaluate", str(run), "--out", str(out)) == 0
    for hookpoint, figures in json.loads(out.read_text())["coders"].items():
        expected = runs.summary("two share")["hookpoints"][hookpoint]
        assert figures["fvu"] == pytest.approx(expected["fvu"], rel=1e-5)
        assert figures["cosine"] == pytest.approx(expected["cosine"], rel=1e-5)
    page = runs.folder / "page.html"
    assert call(monkeypatch, "features", str(run), "--out", str(page)) == 0
    assert all(hookpoint in page.read_text(encoding="utf-8") for hookpoint in HOOKPOINTS)


def test_replicas_sum_gradients_once_per_step(runs: Runs) -> None:
    """However many forwards a step has, the bytes of one ring sum are moved."""
    whole, accumulated = runs.curves("two replicas"), runs.curves("two accumulated")
    for rank in (0, 1):
        key = f"bytes_sent/rank{rank}"
        assert whole[key] == accumulated[key]
        weights_bytes = sum(t.nbytes for t in runs.weights("two replicas").values())
        assert weights_bytes < whole[key][0][1] < 1.1 * weights_bytes


def test_owners_compute_at_the_same_time(runs: Runs) -> None:
    """Every rank is inside a coder while the other one is: each waits there for the other."""
    assert runs.summary("meeting owners")["step"] == STEPS
    met = {file.name for file in runs.folder.glob("met.*")}
    assert met == {f"met.{number}.{rank}" for number in range(MEETINGS) for rank in (0, 1)}


def test_preparing_data_is_no_timeout(runs: Runs) -> None:
    """While a rank prepares the text, those after it and those before it look for it now and then:
    none waits in a collective, which would time out."""
    assert runs.summary("slow preparation")["step"] == STEPS
    assert [rank["looks"] >= 5 for rank in runs.results["slow preparation"]] == [True, True]


def test_a_mistake_on_one_rank_ends_all(runs: Runs) -> None:
    """Other flags on one rank, or NaN on one: every rank says the same and names it."""
    for name, message in {
        "other version": f"the version of torch is '{torch.__version__}' on rank 0 and '0.0' on ",
        "lacking": "lack layers.1.mlp.up_proj.weight; training on random weights is refused",
        "other data": "the data's fingerprint is {",
        "other seed": "--shuffle_seed is 42 on rank 0 and 7 on rank 1",
        "spoiled": "step 3: fvu at layers.0 is nan",
        "too few groups": "3 ranks cannot share a coder of k = 2 groups of latents (groupmax)",
        "eight bits": "--adam_8bit True: rounds blocks of whole parameters",
        "other total": "--batch_size times --grad_acc_steps times the number of ranks is 18",
    }.items():
        errors = [rank["error"] for rank in runs.results[name]]
        assert all(message in error for error in errors), (name, errors)
        assert len({error.removeprefix("rank 0: ") for error in errors}) == 1
    assert not (runs.folder / "runs" / "other seed").exists()
    assert [f.name for f in (runs.folder / "runs" / "spoiled").glob("step_*")] == ["step_3"]


def test_no_rank_holds_the_whole_lm(runs: Runs) -> None:
    """Under ZeRO-3 each of two ranks loads half of the bytes, in the dtype that was asked for."""
    whole = sum(f.stat().st_size for f in (runs.folder / "large").glob("*.safetensors"))
    for name, share in {"large": 1.0, "large bf16": 0.5}.items():
        for rank in runs.results[name]:
            assert rank["layers"] == 5, "the layer after the last hookpoint was loaded"
            assert rank["load_bytes"] < 0.7 * share * whole, name
            # What a rank shows are empty weights, but for the small ones that stay gathered.
            assert max(rank["sizes"]) < 100_000 and 0 in rank["sizes"]
            assert rank["dtypes"] == ["torch.bfloat16" if "bf16" in name else "torch.float32"]

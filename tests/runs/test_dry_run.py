"""The dry run of shared coders: who would hold what, and how to place what does not fit."""

from pathlib import Path
from typing import Any

import pytest
from conftest import tiny_lm

from sae import UsageError
from sae.coders.bank import CoderBank
from sae.flag_checks import from_flags
from sae.runs import dry_run
from train_sae import TrainConfig

L, D = 4096, 32
WHOLE = 4 * (2 * L * D + L)  # bytes of an SAE's weights, without the bias of its output


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("lm")
    tiny_lm().save_pretrained(folder)
    return str(folder)


def planned(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, **flags: Any
) -> list[str]:
    """The lines that a dry run of four ranks prints."""
    monkeypatch.setenv("WORLD_SIZE", "4")
    given = {"model": model, "dataset": "none", "num_latents": L, "k": 8, "batch_size": 1}
    given |= {"ctx_len": 16, "layers": (0, 1), "distribute_modules": True}
    given |= {"optimizer": "signum", "auxk_alpha": 0.0, "wake_alpha": 0.0}
    dry_run.show_plan(from_flags(TrainConfig, {**given, **flags}))
    return capsys.readouterr().out.splitlines()


def test_shared_coders_are_planned_in_parts(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Each rank's line has its part of the weights, of their gradients and of the state."""
    monkeypatch.setattr(dry_run, "_memory", lambda: (2**40, ""))
    monkeypatch.setattr(dry_run, "_GIB", 1)
    for flags, owned, shares in (
        ({"ranks_per_coder": 2}, ["layers.0 (1 of 2)", "layers.0 (2 of 2)"], [2, 2]),
        ({"ranks_per_coder": 4}, ["layers.0 (1 of 4) layers.1 (1 of 4)"], [2]),
        (
            {"distribute_modules": False, "shard_latents": True},
            ["layers.0 (1 of 4) layers.1 (1 of 4)"],
            [2],
        ),
        (
            {"layer_to_rank": ("layers.0=0", "layers.1=0-3")},
            ["layers.0 layers.1 (1 of 4)", "layers.1 (2 of 4)"],
            [4 / 5, 4],
        ),
    ):
        *_, head, a, b, _, _ = planned(model, monkeypatch, capsys, **flags)
        assert head.split()[:4] == ["rank", "lm", "coders", "gradients"]
        for line, names, share in zip((a, b), owned, shares, strict=False):
            cells = line.split(maxsplit=7)
            assert cells[7] == names
            for cell in cells[2:5]:
                assert float(cell) == pytest.approx(WHOLE / share, rel=1e-3)


@pytest.mark.parametrize(
    ("room", "flags", "said"),
    [
        (4.5, {}, None),
        (3.0, {}, "with --distribute_modules --ranks_per_coder 2 the fullest rank holds"),
        (3.5, {"layers": (0, 1, 2)}, "--ranks_per_coder 4 the fullest rank holds"),
        (0.5, {}, "no --ranks_per_coder brings the fullest of 4 ranks below"),
        (4.5, {"distribute_modules": False}, "with --distribute_modules the fullest rank holds"),
        (9.0, {"loss_fn": "ce", "distribute_modules": False}, None),
        (
            0.1,
            {"loss_fn": "ce", "distribute_modules": False},
            "and with --loss_fn ce every rank holds every coder: take fewer --hookpoints",
        ),
        (3.0, {"optimizer": "soap"}, "--ranks_per_coder 4 the fullest rank holds"),
        (1.0, {"adam_8bit": True}, "no --ranks_per_coder brings the fullest of 4 ranks below"),
    ],
)
def test_what_does_not_fit_is_placed_anew(
    model: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    room: float,
    flags: dict[str, Any],
    said: str | None,
) -> None:
    """The fewest ranks per coder that make it fit are named, or that none do."""
    # With adam: weights, their gradients, and two moments.
    flags = {"optimizer": "adam", **flags}
    monkeypatch.setattr(dry_run, "_memory", lambda: (int(room * WHOLE / dry_run._SHARE), "a GPU"))
    *_, last = planned(model, monkeypatch, capsys, **flags)
    if said is None:
        assert "too much" not in last
    else:
        assert said in last and "too much for a GPU" in last


def test_a_crosscoder_is_planned_as_one_coder(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """As wide as its hookpoints together; none is told to share what cannot be shared."""
    monkeypatch.setattr(dry_run, "_GIB", 1)
    monkeypatch.setattr(dry_run, "_memory", lambda: (8, ""))
    flags = {"crosscoder": True, "distribute_modules": False}
    *_, head, line, said = planned(model, monkeypatch, capsys, **flags)
    cells = dict(zip(head.split(), line.split(), strict=False))
    width = 2 * D
    assert float(cells["coders"]) == 4 * (2 * L * width + L + width)
    assert line.endswith("crosscoder") and said.endswith("fewer latents")
    soap = {"optimizer": "soap", "ranks_per_coder": 1}
    assert planned(model, monkeypatch, capsys, **soap)[-1].endswith("fewer latents")


def test_impossible_shares_are_refused_as_a_run_would(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Ranks that cannot be divided so, and groups of latents that are too few: by name."""
    with pytest.raises(UsageError, match="--ranks_per_coder 3: does not divide"):
        planned(model, monkeypatch, capsys, ranks_per_coder=3)
    with pytest.raises(UsageError, match="--ranks_per_coder .*: 4 ranks .* k = 2 groups"):
        planned(model, monkeypatch, capsys, ranks_per_coder=4, activation="groupmax", k=2)


def test_a_launch_file_for_the_cpu_is_held_to_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU ranks share what the machine has; else a GPU of 80 GiB is meant."""
    whole = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert dry_run._memory()[0] == pytest.approx(whole / 2, rel=1e-2)
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert dry_run._memory() == (80 * 2**30, "a GPU of")


def test_a_batch_that_waits_for_its_steps_is_counted(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are held whole, where they wait, and a step's rows once more, with what it makes."""
    monkeypatch.setattr(dry_run, "asks_for_cpu", lambda: False)
    flags = {"model": model, "dataset": "none", "num_latents": 64, "k": 8, "layers": (0, 1)}
    flags |= {"ctx_len": 512, "batch_size": 4, "grad_acc_steps": 8, "mixed_precision": "no"}
    flags |= {"runner_ups": 0.0}
    widths = dict.fromkeys(("layers.0", "layers.1"), dry_run.Widths(D, D))
    owner = {"layers.0": range(1), "layers.1": range(1, 2)}

    def held(world: int, **more: Any) -> int:
        cfg = from_flags(TrainConfig, {**flags, **more})
        plan = dry_run.memory_by_rank(cfg, world, 0, widths, owner)
        return max(memory.in_flight for memory in plan)

    rows, of_two = 4 * 512 * 8, 2 * D * 4  # of a batch on one rank; bytes of one at both hookpoints
    for steps in (4, 16):
        cfg = from_flags(TrainConfig, flags)
        coder = CoderBank({"layers.0": dry_run.Widths(D, D)}, cfg.coder, (0,), "meta")["layers.0"]
        step = rows // steps * of_two + dry_run.step_bytes(cfg, coder, rows // steps, 4)
        busy = max(step, rows // 8 * of_two)
        assert held(1, steps_per_batch=steps) == rows * of_two + busy
        assert held(1, steps_per_batch=steps, batch_on_host=True) == busy
    # An owner of one of two hookpoints waits with the rows of both ranks.
    owners = {"steps_per_batch": 16, "distribute_modules": True}
    on_host = held(2, **owners, batch_on_host=True)
    assert held(2, **owners) - on_host == 2 * rows * of_two // 2


def test_what_shared_coders_hold_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates of a k that falls, at its start; of AuxK entries, or what GPUs send each other."""
    monkeypatch.setattr(dry_run, "asks_for_cpu", lambda: True)
    flags = {"model": "m", "dataset": "d", "hookpoints": ("layers.0",), "num_latents": 4096, "k": 4}
    flags |= {"ctx_len": 512, "batch_size": 4, "steps_per_batch": 1, "mixed_precision": "no"}
    flags |= {"distribute_modules": True, "ranks_per_coder": 2, "auxk_alone": False}
    widths, owner = {"layers.0": dry_run.Widths(D, D)}, {"layers.0": range(2)}

    def held(**more: Any) -> int:
        cfg = from_flags(TrainConfig, {**flags, **more})
        plan = dry_run.memory_by_rank(cfg, 2, 0, widths, owner)
        return max(memory.in_flight for memory in plan)

    rows, first = 2 * 4 * 512, min(2048, 10 * D)  # of the latents of a rank
    falling = held(k_decay_steps=9, auxk_alpha=0) - held(auxk_alpha=0)
    assert falling >= rows * (5 * 8 + dry_run._ENTRY) * (first - 4)
    of_entries = (5 * 8 + dry_run._ENTRY) * rows * (D // 2) + 4 * rows * D
    assert held(auxk_alpha=1) - held(auxk_alpha=0) == of_entries
    monkeypatch.setattr(dry_run, "asks_for_cpu", lambda: False)
    assert held(auxk_alpha=0, micro_acc_steps=2) - held(auxk_alpha=0) < 4 * 4096 * D // 2
    of_all = 4 * 4 * rows * 4096  # float32, as sent, received, put together, and of gradients
    more = held(auxk_alpha=1) - held(auxk_alpha=0)
    assert of_all <= more <= 1.1 * of_all
    assert held(auxk_alpha=1, auxk_alone=True) - held(auxk_alpha=1) == 4 * rows * 4096

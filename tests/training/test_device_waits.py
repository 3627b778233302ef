"""A step waits neither for data nor, but once, for the device; a faster way is the same way."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from starts import wait_until
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import Settings, assert_identical, coder_optimizer, run, weights
from transformers import PreTrainedModel

from sae import SaeConfig, SparseCoder, UsageError
from sae.coders.bank import CoderBank
from sae.coders.firing import FiringRecord, dead_latents
from sae.config import Widths
from sae.kernels.twins import Kernels
from sae.lm import linear, loading
from sae.placement.ranks import _ahead
from sae.training.bad_steps import ask
from sae.training.losses import auxiliary_loss, divide_gradients_
from sae.training.step_sums import StepSums


def test_the_next_batch_is_read_while_one_is_at_work() -> None:
    """Batches come unchanged and in order, each read before it is asked for; errors come along."""
    read: list[int] = []

    def batches() -> Iterator[torch.Tensor]:
        for i in range(3):
            read.append(i)
            yield torch.full((2, 4), i)
        raise UsageError("the text ended")

    ahead = _ahead(batches(), torch.device("cpu"))
    for i in range(3):
        assert torch.equal(next(ahead), torch.full((2, 4), i))
        wanted = min(3, i + 2)
        wait_until(lambda wanted=wanted: len(read) >= wanted)
        assert read == list(range(wanted))
    with pytest.raises(UsageError, match="the text ended"):
        next(ahead)
    assert list(_ahead(iter([]), torch.device("cpu"))) == []


class Questions(TorchDispatchMode):
    """Counts operators that make the host wait for the device."""

    ASKS = ("_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "equal")
    ASKS += ("bincount",)

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name in self.ASKS:
            self.asked.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("more", [{"multi_topk": True}, {"matryoshka": (0.25, 0.75)}])
def test_a_step_of_a_coder_never_asks_the_device(more: dict[str, Any]) -> None:
    """Forward, backward, counts and update of a coder, with AuxK, read nothing off the device."""
    cfg = SaeConfig(num_latents=64, k=4, **more)
    bank = CoderBank({"h": Widths(12, 12)}, cfg, (0,), "cpu", kernels=Kernels("torch"))
    coder = bank["h"]
    optimizer, firing = coder_optimizer(coder, "signum"), FiringRecord(64, 10)
    x, dead = torch.randn(40, 12), torch.arange(0, 64, 3)
    with Questions() as questions:
        sums = StepSums(bank)
        sums.add_rows("h", x, x)
        errors = coder.errors(x, x, dead)
        (errors.objective + auxiliary_loss(errors, 1 / 32)).backward()
        sums.add("h", errors)
        losses = sums.losses("h")
        divide_gradients_(coder, sums.variance("h"))
        optimizer.step(0)
        firing.add_step_(sums.fired["h"], 40)
    assert questions.asked == []
    of_other_kind = "multi_topk_fvu/h" if cfg.matryoshka else ""
    assert all(value > 0 for name, value in losses.items() if name != of_other_kind)
    assert ("mean_prefix_fvu/h" in losses) == bool(cfg.matryoshka)


def test_groups_of_rows_are_one_question() -> None:
    """However many groups share selections, a step asks once how many entries they have."""
    cfg = SaeConfig(num_latents=64, k=4, activation="batchtopk")
    bank = CoderBank({"h": Widths(12, 12)}, cfg, (0,), "cpu", kernels=Kernels("torch"))
    coder, x = bank["h"], torch.randn(40, 12)
    with Questions() as questions:
        sums = StepSums(bank)
        errors = coder.errors(x, x, torch.arange(0, 64, 3), groups=[8, 3, 0, 9, 20])
        (errors.squared_error + auxiliary_loss(errors, 1 / 32)).backward()
        sums.add("h", errors)
        coder.family.update_threshold_(coder, sums.levels["h"])
    # tolist() is not dispatched; where candidates run out, it is asked again
    assert set(questions.asked) <= {"_local_scalar_dense"}
    assert 0 < coder.level < 10


def test_dead_latents_of_all_coders_are_one_transfer() -> None:
    """However many coders there are, which latents are dead is one transfer."""
    records = {f"layers.{i}": FiringRecord(32, 10) for i in range(5)}
    for i, record in enumerate(records.values()):
        record.since_fired[: 3 * i] = 11
    with Questions() as questions:
        found = dead_latents(records)
    assert questions.asked in ([], ["_local_scalar_dense"])  # tolist() is not dispatched at all
    assert found["layers.0"] is None
    for i in range(1, 5):
        assert torch.equal(found[f"layers.{i}"], torch.arange(3 * i))  # type: ignore[arg-type]  # not None
    assert dead_latents({}) == {}


def test_a_step_asks_once_for_all_that_it_must_know() -> None:
    """Metrics, and which latents are dead after the step, are one transfer, before the update."""
    records = {f"layers.{i}": FiringRecord(32, 10) for i in range(3)}
    seen = {name: (torch.arange(32) % (3 + i), 11) for i, name in enumerate(records)}
    with Questions() as questions:
        numbers, dead = ask({"fvu/h": torch.tensor(0.5), "lr/h": 2.0}, records, seen)
        assert questions.asked in ([], ["_local_scalar_dense"])
        questions.asked.clear()
        for name, record in records.items():
            record.add_step_(*seen[name], dead[name])
        found = dead_latents(records)
    assert questions.asked == []
    assert numbers == {"fvu/h": 0.5, "lr/h": 2.0}
    for i, name in enumerate(records):  # those that did not fire in 11 tokens
        assert torch.equal(found[name], torch.arange(0, 32, 3 + i))  # type: ignore[arg-type]  # not None


def test_dead_latents_by_number_and_by_mask_are_the_same() -> None:
    """AuxK by the numbers of the dead latents is AuxK by their mask."""
    coder, x = SparseCoder(12, SaeConfig(num_latents=64, k=4)), torch.randn(40, 12)
    mask = torch.arange(64) % 3 == 0
    by_mask, by_number = coder(x, dead_mask=mask), coder(x, dead_mask=mask.nonzero().squeeze(1))
    assert by_mask.auxk_loss > 0
    assert torch.equal(by_mask.auxk_loss, by_number.auxk_loss)


def test_compiled_blocks_compute_the_same(
    lm: PreTrainedModel, tokens: torch.Tensor, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--compile changes no number beyond rounding, also with hookpoints inside a block; the next
    run with the same LM, of other hookpoints, is what it would have been."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    monkeypatch.setattr(
        linear, "mkl_is_slow", lambda: hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )
    flags = {"hookpoints": ("layers.0", "layers.1.mlp"), "optimizer": "adam"}
    plain = weights(run(lm, tokens, settings, run_name="plain", **flags))
    blocks = [lm.base_model.get_submodule(f"layers.{i}") for i in range(3)]
    try:
        compiled = weights(run(lm, tokens, settings, run_name="fast", compile=True, **flags))
        assert [isinstance(b.forward, loading._Compiled) for b in blocks] == [True, False, True]
        inside = {**flags, "hookpoints": ("layers.0.mlp",)}
        again = weights(run(lm, tokens, settings, run_name="again", **inside))
        assert not any(isinstance(b.forward, loading._Compiled) for b in blocks)
    finally:
        for block in blocks:
            vars(block).pop("forward", None)
    assert_identical(again, weights(run(lm, tokens, settings, run_name="fresh", **inside)))
    assert graphs
    # By name Inductor takes oneDNN's products only where weights are frozen.
    assert not any("mkldnn" in str(node.target) for graph in graphs for node in graph.graph.nodes)
    assert plain.keys() == compiled.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-4, atol=1e-5)


def test_reading_ahead_changes_no_run(
    lm: PreTrainedModel, tokens: torch.Tensor, settings: Settings
) -> None:
    """Two runs of the same flags end with the same bits."""
    assert_identical(
        weights(run(lm, tokens, settings, run_name="one")),
        weights(run(lm, tokens, settings, run_name="two")),
    )


def test_deterministic_operators_change_no_run_on_the_cpu(
    lm: PreTrainedModel, tokens: torch.Tensor, settings: Settings
) -> None:
    """--deterministic is on from the launch on, and a run ends with the bits of one without."""
    plain = weights(run(lm, tokens, settings, run_name="plain", auxk_alpha=1 / 32))
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        flags = {"auxk_alpha": 1 / 32, "deterministic": True}
        same = weights(run(lm, tokens, settings, run_name="same", **flags))
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = True
    assert_identical(plain, same)

"""Runs on a GPU that is not there: devices do not mix, and the host seldom waits.

By `bash scripts/test.sh --fake-cuda`, with a torch that was built for CUDA.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from datasets import Dataset
from fake_cuda import FakeCuda, Question, backward, fake_cuda
from ranks_in_threads import Alike
from tiny_lms import WITH_HEAD, make_with_head
from torch import Tensor
from training_runs import LOSSES, Killed, Settings, coder_optimizer, run

from sae import TranscoderConfig
from sae.coders.sharded import ShardedCoder
from sae.flag_checks import from_flags
from sae.placement import launch
from sae.placement.ranks import Ranks
from sae.training.losses import auxiliary_loss
from train_sae import TrainConfig, train

LOG_EVERY = 3
PADDED = {"exclude_positions": 1, "padded": True}
MLPS = {"hookpoints": ("layers.0.mlp", "layers.1.mlp"), "transcode": True, "skip_connection": True}
GROUPS = {"activation": "batchtopk", "group_sequences": 2}
ACROSS = {"hookpoints": MLPS["hookpoints"], "transcode": True, "cross_layer": "all"}
# Of two coders, how many latents are active. JumpReLU: that, and whether a row has too many.
# BatchTopK: that, and in the same question whether candidates suffice; here they do when all are.
QUESTIONS_OF_ENTRIES = {"jumprelu": 4, "batchtopk": 8}
CASES: dict[str, dict[str, Any]] = {
    "signum": {},
    "float32": {"mixed_precision": "no"},
    "adam, AuxK, Multi-TopK": {"optimizer": "adam", **LOSSES},
    "muon, groupmax": {
        "optimizer": "muon",
        "activation": "groupmax",
        **LOSSES,
        "multi_topk": False,
    },
    "soap": {"optimizer": "soap"},
    "dealt": {"optimizer": "adam", "steps_per_batch": 2, "batch_size": 8, "max_examples": 72},
    "runner-ups": {"optimizer": "adam", **LOSSES, "multi_topk": False},
    "jumprelu": {"optimizer": "adam", "activation": "jumprelu", **LOSSES, "multi_topk": False},
    "batchtopk": {**GROUPS, **LOSSES, "multi_topk": False},
    "prefixes": {"matryoshka": (0.25, 0.75), **LOSSES, "multi_topk": False},
    "crosscoder": {"crosscoder": True, **LOSSES, "multi_topk": False},
    "cross-layer transcoder": {**ACROSS, **LOSSES, "multi_topk": False},
    "cross-layer transcoder, batchtopk": {**ACROSS, **GROUPS},
    "cross-layer transcoder, jumprelu": {**ACROSS, "activation": "jumprelu"},
    "transcoders with a skip": {**MLPS, **LOSSES},
    "k decays, pieces, seeds": {
        **{"k_decay_steps": 9, "grad_acc_steps": 2, "micro_acc_steps": 2, "init_seeds": (0, 1)},
        **{**LOSSES, "max_examples": 72},
    },
    "excluded tokens": {"exclude_tokens": tuple(range(50))},
    "excluded positions": {"exclude_positions": 2},
    "excluded long rows": {"exclude_norm": 3.0, "exclude_tokens": (1, 2)},
    "padding": PADDED,
    "rows made elsewhere": {"made_elsewhere": True, "exclude_norm": 3.0},
    "CE": {"loss_fn": "ce"},
    "KL, AuxK, Multi-TopK": {"loss_fn": "kl", **LOSSES},
    "KL, padding": {"loss_fn": "kl", **PADDED},
    "KL, transcoders, excluded tokens": {"loss_fn": "kl", **MLPS, "exclude_tokens": (1, 2)},
}


class Rows(list[dict[str, Tensor]]):
    """Rows that were made elsewhere."""

    fingerprint = "rows"


@contextmanager
def gpu_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[FakeCuda, list[int]]]:
    """Inside, runs take place on a fake GPU.

    Yields it, and a list of how many questions it had been asked when each step began.
    """
    from kernel_launches import noted_launches  # needs Triton

    begun: list[int] = []
    clear_traffic = Ranks.clear_traffic

    def step_begins(ranks: Ranks) -> None:
        begun.append(len(gpu.asked))
        clear_traffic(ranks)

    with fake_cuda() as gpu, noted_launches() as launches:
        monkeypatch.setattr(
            launch, "connect", lambda _, machine: Ranks(torch.device("cuda"), machine.timeout)
        )
        monkeypatch.setattr(launch, "shard", lambda _, lm, *__: lm)
        monkeypatch.setattr(Ranks, "clear_traffic", step_begins)
        yield gpu, begun
    assert launches or not begun


def gpu_settings(settings: Settings) -> Settings:
    more = {"mixed_precision": "bf16", "log_every": LOG_EVERY, "batch_size": 4, "max_examples": 36}
    more |= {"eval_tokens": 64}
    return {**settings, "layers": (0, 1), **more}


def data(tokens: Tensor, padded: bool) -> Tensor | Dataset:
    if not padded:
        return tokens
    columns = {"input_ids": tokens.tolist(), "attention_mask": [[1] * 12 + [0] * 4] * len(tokens)}
    return Dataset.from_dict(columns)


@pytest.mark.fake_cuda
@pytest.mark.parametrize("case", CASES)
def test_a_step_asks_the_gpu_once_and_a_log_step_once_more(
    case: str,
    tokens: Tensor,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    figure: Callable[[str, str], None],
) -> None:
    """Whether a step is sound is its only question; what is logged is one more."""
    flags = dict(CASES[case])
    rows = data(tokens, flags.pop("padded", False))
    chosen = gpu_settings(settings)
    made_elsewhere = flags.pop("made_elsewhere", False)
    # In a forward the LM's own code asks whether its mask hides a token, or its positions are those
    # of several texts; and how many rows are too long depends on the rows.
    of_forwards = {"sae/lm/rows.py": 1} if "exclude_norm" in flags else {}
    forwards = flags.get("grad_acc_steps", 1)
    if "loss_fn" in flags:
        of_forwards["sae/lm/head.py"] = {"ce": 1, "kl": 2}[flags["loss_fn"]]
    elif not made_elsewhere:
        of_forwards["sae/lm/capture.py"] = forwards
    if of_entries := QUESTIONS_OF_ENTRIES.get(flags.get("activation", "topk")):
        of_forwards["sae/kernels/entries.py"] = of_entries
    if "hookpoints" in flags or made_elsewhere:
        del chosen["layers"]
    with gpu_run(monkeypatch) as (gpu, begun):
        lm = make_with_head(WITH_HEAD["llama"][0]).to("cuda")  # type: ignore[arg-type]  # stubs lack it
        if made_elsewhere:
            rows = Rows({"h": torch.randn(16, 32)} for _ in range(40))
            train(from_flags(TrainConfig, {**chosen, **flags}), activations=rows)
        else:
            run(lm, rows, chosen, **flags)
    # The last step also evaluates and saves.
    steps = [gpu.asked[begun[i] : begun[i + 1]] for i in range(len(begun) - 1)]
    figure(f"{case}: a step", said(steps[LOG_EVERY]))
    figure(f"{case}: a step that is logged", said(steps[2 * LOG_EVERY - 1]))
    # The first step also asks which latents are dead at the start.
    for number, asked in enumerate(steps[1:], start=2):
        files: dict[str, int] = {}
        for question in asked:
            file = question.place.split(":")[0]
            files[file] = files.get(file, 0) + 1
        expected = {"sae/training/bad_steps.py": 1 + (number % LOG_EVERY == 0), **of_forwards}
        if number % flags.get("steps_per_batch", 1) != 1 % flags.get("steps_per_batch", 1):
            del expected["sae/lm/capture.py"]  # only the first step of a batch has a forward
        assert files == expected, said(asked)


def said(asked: list[Question]) -> str:
    """Questions with their places, equal ones counted."""
    each = dict.fromkeys(asked)
    return "; ".join(f"{asked.count(q)} x {q.operator} at {q.place}" for q in each) or "nothing"


@pytest.mark.fake_cuda
def test_a_run_on_a_gpu_goes_on(
    tokens: Tensor, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What evaluates, saves and restores during a run moves tensors to where they belong."""
    flags = {"save_every": 4, "eval_every": 3, "save_best": True, "optimizer": "adam", **LOSSES}
    flags |= {"run_name": "r", "log_with": "tensorboard"}
    with gpu_run(monkeypatch) as (_, begun):
        lm = make_with_head(WITH_HEAD["llama"][0]).to("cuda")  # type: ignore[arg-type]  # stubs lack it
        step_begins = Ranks.clear_traffic

        def dies(ranks: Ranks) -> None:
            step_begins(ranks)
            if len(begun) == 6:
                raise Killed

        monkeypatch.setattr(Ranks, "clear_traffic", dies)
        with pytest.raises(Killed):
            run(lm, tokens, gpu_settings(settings), **flags)
        run(lm, tokens, gpu_settings(settings), resume=True, **flags)
    assert len(begun) == 6 + 9 - 4


@pytest.mark.fake_cuda
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("optimizer", ["signum", "adam", "muon", "soap"])
def test_a_coder_that_ranks_share_asks_where_its_dead_latents_are(
    optimizer: Any, dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once a step, whatever number of forwards it has; AuxK by entries and by dense products."""
    monkeypatch.setattr("sae.kernels.dense_products.pays", lambda *_: dense)
    from kernel_launches import noted_launches  # needs Triton

    cfg = TranscoderConfig(num_latents=64, k=4, skip_connection=True)
    with fake_cuda() as gpu, noted_launches():
        coder = ShardedCoder(Alike(2), 32, cfg, device="cuda")
        coder.matmul_dtype = torch.bfloat16
        rule = coder_optimizer(coder, optimizer)
        x = torch.randn(24, 32, device="cuda", dtype=torch.bfloat16)
        first = torch.arange(40, device="cuda")
        for step, dead in enumerate((first, first + 3, first + 5)):
            before = len(gpu.asked)
            for _ in range(2):
                errors = coder.errors(x, x, dead)
                (errors.objective + auxiliary_loss(errors, 1)).backward()
            asked = gpu.asked[before:]
            assert len(asked) == 1 + (step == 0), said(asked)  # at first where each rank begins
            rule.step(step)


@pytest.mark.fake_cuda
def test_tensors_of_two_devices_do_not_meet() -> None:
    """The fake GPU refuses what a GPU refuses, and notes what the host would wait for."""
    with fake_cuda() as gpu:
        there, here = torch.ones(4, device="cuda"), torch.ones(4)
        for wrong in (
            lambda: there + here,
            lambda: there.addcmul_(there, here),
            lambda: here @ there,
        ):
            with pytest.raises(RuntimeError, match="device"):
                wrong()
        assert gpu.asked == []
        _ = there + torch.tensor(1.0), there[:2], torch.full((), 2.0, device="cuda"), there.topk(2)
        there[there > 0] = 0.0
        here.pin_memory().to("cuda", non_blocking=True)
        assert gpu.asked == []
        waits: list[Callable[[], Any]] = [
            *(there.tolist, there.cpu, lambda: there[0].item(), lambda: bool((there > 0).all())),
            *(lambda: there[there > 0], there.nonzero, lambda: torch.equal(there, there)),
            *(lambda: here.to("cuda"), lambda: torch.tensor(1.0, device="cuda")),
            *(lambda: there.new_tensor([1, 2]), lambda: here.copy_(there)),
            *(lambda: there.long().bincount(minlength=3), lambda: there[torch.tensor([1])]),
        ]
        for count, wait in enumerate(waits, start=1):
            wait()
            assert len(gpu.asked) == count, gpu.asked[-1]


def test_gradients_without_the_engine_are_those_of_the_engine() -> None:
    """Node by node: leaves used twice, broadcast, parts without a gradient, functions in Python."""
    from sae.kernels.twins import Kernels

    generator = torch.Generator().manual_seed(0)
    shapes = [(9, 6), (20, 6), (20,), (20, 6), (6,)]
    leaves = [torch.randn(s, generator=generator, requires_grad=True) for s in shapes]

    def loss() -> Tensor:
        x, W_enc, b_enc, W_dec, bias = leaves
        kernels = Kernels("torch")
        latents = kernels.encode(x, W_enc, b_enc, 3, pre_bias=bias)
        out = kernels.decode(latents, W_dec).add_(bias)
        top = latents.acts.topk(2, dim=1).values
        return (x.detach() - out).pow(2).sum() + top.exp().sum() + (x * bias).sum(1).unbind()[1]

    loss().backward()
    expected = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    backward([loss()])
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient)

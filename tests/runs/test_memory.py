"""What a step holds: nothing of the step before, and what the dry run says."""

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from training_runs import Settings, run
from transformers import PreTrainedModel

import train_sae
from sae import SaeConfig, SparseCoder, SparseCoderConfig, TranscoderConfig
from sae.batch import TokenBatch
from sae.coders.bank import CoderBank
from sae.coders.outputs import CoderErrors
from sae.config import MachineConfig, TrainingConfig, Widths
from sae.lm.capture import Pairs
from sae.runs.dry_run import step_bytes
from sae.training.losses import auxiliary_loss, own_losses
from train_sae import TrainConfig


@pytest.mark.parametrize("transcode", [False, True])
def test_nothing_of_a_forward_is_left_in_the_next(
    lm: PreTrainedModel,
    tokens: Tensor,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    transcode: bool,
) -> None:
    """When the LM runs again, neither rows nor reconstructions of the forward before are there.

    In a coder's forward, there are none of the hookpoint before.
    """
    rows: list[weakref.ref[Tensor]] = []
    outs: list[weakref.ref[Tensor]] = []
    found: list[int] = []

    def alive(seen: list[weakref.ref[Tensor]]) -> int:
        return sum(reference() is not None for reference in seen)

    class Capture(train_sae.Capture):
        def __call__(self, tokens: Any) -> Pairs:
            # Evaluation reads one sequence at a time.
            if outs and len(TokenBatch.of(tokens).ids) == settings["batch_size"]:
                found.append(alive(rows) + alive(outs))
            pairs = super().__call__(tokens)
            rows[:] = [weakref.ref(t) for pair in pairs.values() for t in pair]
            return pairs

    errors = SparseCoder.errors

    def watched(coder: SparseCoder, *args: Any) -> CoderErrors:
        assert alive(outs) == 0
        made = errors(coder, *args)
        if len(args) > 2:  # as the loop calls it
            outs[:] = [weakref.ref(made.sae_out)]
        return made

    monkeypatch.setattr(train_sae, "Capture", Capture)
    monkeypatch.setattr(SparseCoder, "errors", watched)
    flags = {"hookpoints": ("layers.0.mlp", "layers.1.mlp"), "transcode": transcode}
    run(lm, tokens, settings, run_name="r", grad_acc_steps=2, micro_acc_steps=2, **flags)
    assert len(found) > 10 and not any(found)


def peak_bytes(call: Any) -> int:
    """The most that PyTorch's CPU allocator held more than before."""
    gc.collect()  # what earlier tests left would be freed meanwhile, and counted against it
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    held = most = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("cfg", "auxk_alpha"),
    [
        (SaeConfig(num_latents=512, k=16), 0.0),
        (SaeConfig(num_latents=512, k=16), 1 / 32),
        (SaeConfig(num_latents=512, k=1), 1 / 32),  # whose dead latents learn alone
        (SaeConfig(num_latents=512, k=16, multi_topk=True), 1 / 32),
        (SaeConfig(num_latents=512, k=16, matryoshka=(0.125, 0.125, 0.25, 0.5)), 0.0),
        (SaeConfig(num_latents=512, k=16, matryoshka=(0.25, 0.75)), 1 / 32),
        (TranscoderConfig(num_latents=512, k=16), 0.0),
        (SaeConfig(num_latents=512, k=16, activation="jumprelu"), 0.0),
        (SaeConfig(num_latents=512, k=16, activation="jumprelu"), 1 / 32),
        (SaeConfig(num_latents=512, k=16, activation="batchtopk"), 0.0),
    ],
)
def test_the_dry_run_knows_what_a_step_holds(
    cfg: SparseCoderConfig, auxk_alpha: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the allocator gives at most to a forward and backward, gradients of weights aside."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    coder, rows = SparseCoder(64, cfg), 8192
    coder.matmul_dtype = dtype
    if cfg.has_threshold:
        coder.threshold.data.zero_()  # as many latents are active as may be
    y = torch.randn(rows, 64, dtype=dtype)
    x = torch.randn(rows, 64, dtype=dtype) if cfg.transcode else y
    dead = torch.arange(0, 512, 2) if auxk_alpha else None

    def step() -> None:
        groups = [256] * 32 if coder.family.in_groups else None
        errors = coder.errors(x, y, dead, groups=groups)
        (errors.objective + auxiliary_loss(errors, auxk_alpha)).backward()

    gradients = sum(p.nbytes for p in coder.parameters())
    pre_acts = 1024 * 512 * dtype.itemsize  # a block, which is not in the plan
    plan = TrainConfig(coder=cfg, training=TrainingConfig(auxk_alpha=auxk_alpha))
    coder.own_losses = own_losses(cfg, plan.training)
    expected = step_bytes(plan, coder, rows, dtype.itemsize)
    found = peak_bytes(step) - gradients
    assert 0.65 * expected < found < 1.02 * expected + pre_acts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("auxk_alpha", "pieces"), [(0.0, 1), (1 / 32, 1), (1 / 32, 4)])
def test_the_dry_run_knows_what_waits_for_layers_ahead(
    auxk_alpha: float, pieces: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last layer of a cross-layer transcoder holds the latents of all, and its own target."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    cfg = TranscoderConfig(num_latents=512, k=16, cross_layer="all")
    names, rows = [f"layers.{i}" for i in range(6)], 8192
    bank = CoderBank(dict.fromkeys(names, Widths(64, 64)), cfg, (0,), "cpu", dtype)
    x, y = torch.randn(2, rows, 64, dtype=dtype)
    dead = torch.arange(0, 512, 2) if auxk_alpha else None

    def step() -> None:
        for _, coder in bank.items():
            for x_rows, y_rows in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
                errors = coder.errors(x_rows, y_rows, dead)
                (errors.objective + auxiliary_loss(errors, auxk_alpha)).backward()
                del errors

    gradients = sum(p.nbytes for p in bank.parameters())
    pre_acts = 1024 * 512 * dtype.itemsize
    training = TrainingConfig(auxk_alpha=auxk_alpha, micro_acc_steps=pieces)
    plan, piece = TrainConfig(coder=cfg, training=training), rows // pieces
    expected = max(step_bytes(plan, coder, piece, dtype.itemsize) for _, coder in bank.items())
    found = peak_bytes(step) - gradients
    assert 0.65 * expected < found < 1.02 * expected + pre_acts


def test_the_dry_run_knows_that_a_gradient_waits_to_be_added(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where gradients are there already, one more matrix is held at a time, and not two."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    coder = SparseCoder(64, SaeConfig(num_latents=8192, k=4))
    y, matrix = torch.randn(64, 64), 8192 * 64 * 4

    def step() -> None:
        coder.errors(y, y).squared_error.backward()

    step()
    plan = TrainConfig(coder=coder.cfg, training=TrainingConfig(grad_acc_steps=2))
    expected, pre_acts = step_bytes(plan, coder, 64, 4), 64 * 8192 * 4
    found = peak_bytes(step)
    assert matrix < expected < 1.2 * matrix
    assert matrix < found < max(1.2 * expected, pre_acts + matrix / 2)


def test_the_dry_run_counts_sums_in_pieces() -> None:
    """Where k falls from 10 times the width, Triton's partial sums are 21 GB at D = 4096."""
    coder = SparseCoder(4096, SaeConfig(num_latents=131072, k=32), "meta")
    found = {}
    for kernels in ("auto", "torch"):
        training = TrainingConfig(k_decay_steps=1000, auxk_alpha=0.0)
        cfg = TrainConfig(training=training, machine=MachineConfig(kernels=kernels))
        found[kernels] = step_bytes(cfg, coder, 16384, 2)
    # Of 16,384 x 40,960 entries two pieces for every 1,024, each 4,096 numbers of float32.
    assert found["auto"] - found["torch"] == 16384 * 40960 * 2 // 1024 * 4096 * 4


def test_the_dry_run_counts_auxk_on_cuda() -> None:
    """There AuxK may hold activations of every latent for every row, and their gradients."""
    coder = SparseCoder(4096, SaeConfig(num_latents=131072, k=32), "meta")
    found = {}
    for auxk_alpha in (0.0, 1 / 32):
        cfg = TrainConfig(training=TrainingConfig(auxk_alpha=auxk_alpha))
        found[auxk_alpha] = [step_bytes(cfg, coder, rows, 2) for rows in (8192, 65536)]
    few, many = (b - a for a, b in zip(found[0.0], found[1 / 32], strict=True))
    assert 8192 * 131072 * 2 * 2 < few < 1.3 * 8192 * 131072 * 2 * 2
    # More rows are taken by entries, with what is held of long sums, however many rows there are.
    pieces = (65536 * 2048 - 65536 * 32) * 2 // 1024 * 4096 * 4
    assert many == 16384 * 131072 * 2 * 2 + pieces + 65536 * 4 * 4096


def test_an_sae_has_one_copy_of_its_rows_in_float32() -> None:
    """What it reads is what it reconstructs; two tensors are two copies."""
    coder = SparseCoder(64, SaeConfig(num_latents=512, k=4))
    y = torch.randn(8192, 64, dtype=torch.bfloat16)
    other = y.clone()
    one, two = (peak_bytes(lambda x=x: coder.errors(x, y)) for x in (y, other))
    assert two - one == pytest.approx(y.numel() * 4, rel=0.05)

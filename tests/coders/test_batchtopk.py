"""BatchTopK: selection over groups of rows, the threshold that it leaves, and runs in any pieces.

The right values are computed from the paper's equations in float64.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from training_runs import (
    Killed,
    Settings,
    assert_identical,
    die_in_forward,
    run,
    training_state,
    weights,
)
from transformers import PreTrainedModel

from sae import SaeConfig, SparseCoder, UsageError
from sae.coders import functional
from sae.config import KernelChoice
from sae.flag_checks import from_flags
from sae.kernels import latents
from sae.kernels.twins import Kernels
from sae.training.losses import divide_gradients_
from sae.training.schedules import dealing, sequences_per_batch
from train_sae import TrainConfig

SHAPES = [(9, 70, 3, [8, 8, 8, 8]), (9, 70, 3, [5, 0, 17, 8, 7]), (9, 70, 3, [37])]
SHAPES += [(5, 12, 12, [2, 2, 2]), (4, 40, 2, [12]), (4, 40, 2, [])]
FLAGS = {"activation": "batchtopk", "optimizer": "adam", "lr": 0.01, "layers": (0, 2)}
FLAGS |= {"auxk_alpha": 1 / 32, "wake_alpha": 0.0, "dead_feature_threshold": 300}


def selected(pre_acts: Tensor, k: int, groups: list[int]) -> Tensor:
    """relu of the k B largest of every B rows, [N L]; of equal ones the first."""
    kept = torch.zeros_like(pre_acts)
    for i, size in enumerate(groups):
        start = sum(groups[:i])
        rows = pre_acts[start : start + size]
        places = sorted(
            (-float(rows[i, j].detach()), i, j)
            for i in range(len(rows))
            for j in range(rows.shape[1])
        )
        for value, i, j in places[: k * len(rows)]:
            kept[start + i, j] = float(value < 0)
    return pre_acts * kept


@pytest.mark.parametrize("choice", ["torch", "auto"])
@pytest.mark.parametrize("candidates", [1, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_selection_and_gradients_equal_the_equations(
    shape: tuple[int, int, int, list[int]],
    candidates: int,
    choice: KernelChoice,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Definition and twin: outputs and every gradient, with rows that hold most of a group's.

    Groups have as many rows, or not, or none.
    """
    monkeypatch.setattr(latents, "_CANDIDATES", candidates)
    d, width, k, groups = shape
    n = sum(groups)
    g = torch.Generator().manual_seed(0)
    sizes = [(n, d), (width, d), (width,), (width, d), (d,)]
    leaves = [torch.randn(s, dtype=torch.float64, generator=g) for s in sizes]
    leaves[0][::5] *= 6  # such rows have many active latents
    weights_of_out = torch.arange(n * d, dtype=torch.float64).view(n, d).cos()
    x, W_enc, b_enc, W_dec, bias = moved = [t.clone().requires_grad_() for t in leaves]
    acts = selected((x - bias) @ W_enc.T + b_enc, k, groups)
    out = acts @ W_dec
    ((out * weights_of_out).sum() + acts.square().sum()).backward()
    expected = [out.detach(), *(t.grad for t in moved)]
    dtype = torch.float64 if choice == "torch" else torch.float32
    for ops in (functional, Kernels(choice)):
        x, W_enc, b_enc, W_dec, bias = moved = [
            t.to(dtype, copy=True).requires_grad_() for t in leaves
        ]
        latents_found, _ = ops.encode_in_groups(x, W_enc, b_enc, k, groups, bias)
        out = ops.decode(latents_found, W_dec)
        ((out * weights_of_out).sum() + latents_found.acts.square().sum()).backward()
        close = 1e-9 if dtype == torch.float64 else 2e-4
        for ours, right in zip([out.detach(), *(t.grad for t in moved)], expected, strict=True):
            assert ours is not None and right is not None
            scale = float(right.abs().max()) if right.numel() else 1.0
            torch.testing.assert_close(ours.double(), right, rtol=close, atol=close * scale)


@pytest.mark.parametrize("ops", [functional, Kernels("torch"), Kernels("auto")])
def test_of_equal_ones_the_first_are_taken(ops: Any) -> None:
    """Rows that are all alike: the first rows' latents, and of them those of low numbers."""
    x, W = torch.ones(4, 1), torch.tensor([[1.0], [2.0], [1.0], [1.0]])
    latents, _ = ops.encode_in_groups(x, W, torch.zeros(4), 2, [4])
    acts = ops.decode(latents, torch.eye(4))
    assert acts.tolist() == [[1, 2, 1, 1], [1, 2, 0, 0], [0, 2, 0, 0], [0, 2, 0, 0]]


def test_ten_steps_equal_the_equations() -> None:
    """Ten steps of Adam with AuxK and unit-norm decoders, and the threshold after them."""
    torch.manual_seed(0)
    cfg, groups = SaeConfig(num_latents=40, k=2, activation="batchtopk"), [6, 9, 6, 3, 6]
    coder = SparseCoder(7, cfg, dtype=torch.float64)
    coder.use(Kernels("torch"))
    names = [name for name, _ in coder.named_parameters()]
    theirs = {n: p.detach().clone().requires_grad_() for n, p in coder.named_parameters()}
    ours = torch.optim.Adam(coder.parameters(), lr=0.01)
    right = torch.optim.Adam(theirs.values(), lr=0.01)
    level, dead = math.inf, torch.arange(0, 40, 3)
    for _ in range(10):
        x = torch.randn(30, 7, dtype=torch.float64) @ torch.randn(7, 7, dtype=torch.float64)
        variance = (x - x.mean(0)).square().sum()
        ours.zero_grad()
        found = coder.errors(x, x, dead, groups=groups)
        (found.squared_error + found.auxk_error / 32).backward()
        divide_gradients_(coder, variance)
        ours.step()
        coder.normalize_decoder_()
        coder.family.update_threshold_(coder, found.levels)

        right.zero_grad()
        W_enc, b_enc, W_dec, b_dec = (
            theirs[n] for n in ("encoder.weight", "encoder.bias", "W_dec", "b_dec")
        )
        pre_acts = (x - b_dec) @ W_enc.T + b_enc
        acts = selected(pre_acts, 2, groups)
        out = acts @ W_dec + b_dec
        of_dead = pre_acts[:, dead].relu()
        third = of_dead.topk(3, dim=1).values[:, -1:]  # k_aux = 7 // 2
        e_hat = (of_dead * (of_dead >= third)) @ W_dec[dead]
        aux = ((x - out).detach() - e_hat).square().sum()
        (((x - out).square().sum() + aux / 32) / variance).backward()
        with torch.no_grad():
            assert W_dec.grad is not None
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
        right.step()
        with torch.no_grad():
            W_dec /= W_dec.norm(dim=1, keepdim=True)
        smallest = [float(a[a > 0].min()) for a in acts.detach().split(groups)]
        mean = sum(smallest) / len(smallest)
        level = mean if math.isinf(level) else 0.9 * level + 0.1 * mean
    for name in names:
        torch.testing.assert_close(dict(coder.named_parameters())[name], theirs[name])
    assert float(coder.level) == pytest.approx(level, rel=1e-9)
    assert coder.threshold.unique().tolist() == [pytest.approx(level, rel=1e-6)]
    pre_acts = (x - coder.b_dec) @ coder.encoder.weight.T + coder.encoder.bias
    assert (coder(x).top_acts > 0).sum() == (pre_acts > level).sum()


def test_steps_in_pieces_equal_whole_ones(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings
) -> None:
    """Accumulated = micro-batched = whole, threshold too; groups of one sequence are others.

    So with batches that are dealt to steps whose number divides no sequence, and without some rows.
    """
    for dealt in (1, 5):
        flags = {**FLAGS, "steps_per_batch": dealt, "group_sequences": 2, "exclude_tokens": (5,)}
        flags |= {"max_examples": 160 // dealt // 8 * 8, "exclude_norm": 1.2}
        whole = weights(run(lm, tokens, settings, run_name=f"whole {dealt}", **flags))
        for name, shape in {
            "accumulated": {"batch_size": 2, "grad_acc_steps": 4},
            "micro": {"micro_acc_steps": 3},
        }.items():
            found = weights(run(lm, tokens, settings, run_name=f"{name} {dealt}", **flags, **shape))
            for key, tensor in found.items():
                torch.testing.assert_close(tensor, whole[key], rtol=2e-3, atol=2e-4)
        single = {**flags, "group_sequences": 1}
        alone = weights(run(lm, tokens, settings, run_name=f"alone {dealt}", **single))
        key = "layers.0/threshold"
        assert not torch.allclose(alone[key], whole[key], rtol=1e-3)
        assert torch.isfinite(whole[key]).all() and (whole[key] > 0).all()


def test_a_resumed_run_ends_in_the_same_bits(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in step 13 and resumed from 10, within a batch: weights, thresholds, state by bits."""
    flags = {**FLAGS, "steps_per_batch": 4, "max_examples": 40, "save_every": 5}
    flags |= {"group_sequences": 4}
    straight = run(lm, tokens, settings, run_name="a", **flags)
    die_in_forward(monkeypatch, 3 * 4)  # a forward is counted once for each of its steps
    with pytest.raises(Killed):
        run(lm, tokens, settings, run_name="b", **flags)
    monkeypatch.undo()
    resumed = run(lm, tokens, settings, run_name="b", resume=True, **flags)
    assert_identical(weights(resumed), weights(straight))
    assert_identical(training_state(resumed), training_state(straight))
    for name, figures in resumed["hookpoints"].items():
        assert figures["fvu"] == straight["hookpoints"][name]["fvu"]


def test_groups_have_256_rows_by_default_wherever_they_are() -> None:
    """A power of two of sequences, by their length and the steps; what a batch lacks is refused."""

    def group(**flags: Any) -> int | None:
        cfg = from_flags(TrainConfig, {"activation": "batchtopk", **flags})
        sequences = sequences_per_batch(cfg, 4, cfg.data.ctx_len)
        return dealing(cfg, sequences, cfg.data.ctx_len).group

    assert group(ctx_len=256, steps_per_batch=16) == 16
    assert group(ctx_len=256, steps_per_batch=16, batch_size=16, grad_acc_steps=2) == 16
    assert [group(ctx_len=n, steps_per_batch=16) for n in (128, 2048, 8192)] == [32, 2, 1]
    assert group(ctx_len=2048) == 2  # 262,144 rows on four ranks: 16 steps
    assert group(ctx_len=256, group_sequences=8) == 8
    assert group(ctx_len=256, activation="topk") is None
    for flags, message in (
        ({"batch_size": 8}, "--group_sequences 16, the default .*, and --batch_size 8 is no"),
        ({"batch_size": 12, "group_sequences": 8}, "--group_sequences 8: .*--batch_size 12 is no"),
    ):
        with pytest.raises(UsageError, match=message):
            group(ctx_len=256, steps_per_batch=16, **flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"multi_topk": True}, "--multi_topk True: --activation batchtopk"),
        ({"loss_fn": "kl"}, "--loss_fn kl: --activation batchtopk"),
    ],
)
def test_flags_that_do_not_go_with_it_are_refused(flags: dict[str, Any], message: str) -> None:
    """Losses of 4k latents and of the LM, before anything is loaded."""
    with pytest.raises(UsageError, match=message):
        from_flags(TrainConfig, {"activation": "batchtopk", **flags})


def test_a_run_whose_rows_were_not_dealt_goes_on_so(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings
) -> None:
    """Rows of this kind were not dealt once: to resume such a run --steps_per_batch must say so."""
    undealt = {**FLAGS, "group_sequences": 1, "steps_per_batch": 1}
    straight = run(lm, tokens, settings, run_name="r", save_every=10, **undealt)
    record = Path(settings["save_dir"]) / "r" / "run.json"
    flags = {n: v for n, v in json.loads(record.read_text()).items() if n != "wake_alpha"}
    record.write_text(json.dumps({**flags, "steps_per_batch": None}))
    shutil.rmtree(record.parent / f"step_{straight['step']}")
    given = {n: value for n, value in undealt.items() if n != "steps_per_batch"}
    with pytest.raises(UsageError, match="--steps_per_batch is None now and was 1 when"):
        run(lm, tokens, settings, run_name="r", resume=True, **given)
    resumed = run(lm, tokens, settings, run_name="r", save_every=10, resume=True, **undealt)
    assert_identical(weights(resumed), weights(straight))

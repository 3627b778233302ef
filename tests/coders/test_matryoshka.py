"""Matryoshka coders: prefixes of the latents reconstruct too, and the loss is their mean.

The right values are computed from the paper's equation in float64, by dense matrices.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from training_runs import (
    Settings,
    assert_identical,
    killed_and_resumed,
    run,
    scalars,
    training_state,
    weights,
)
from transformers import PreTrainedModel

from sae import SaeConfig, SparseCoder, SparseCoderConfig, TranscoderConfig, UsageError
from sae.config import KernelChoice
from sae.flag_checks import from_flags
from sae.kernels.twins import Kernels
from sae.training.losses import auxiliary_loss, divide_gradients_
from train_sae import TrainConfig

SHARES = (0.125, 0.125, 0.25, 0.5)
SIZES: dict[str, Any] = {"num_latents": 48, "matryoshka": (0.25, 0.25, 0.5)}
KINDS = {
    "topk": SaeConfig(k=3, **SIZES),
    "groupmax": SaeConfig(k=4, activation="groupmax", **SIZES),
    "batchtopk": SaeConfig(k=3, activation="batchtopk", **SIZES),
    "transcoder": TranscoderConfig(k=3, skip_connection=True, **SIZES),
}
D, GROUP, ALPHA = 7, 6, 0.3
DEAD = torch.arange(0, 48, 3)
FLAGS: dict[str, Any] = {"matryoshka": SHARES, "optimizer": "adam", "lr": 0.01, "layers": (0, 2)}
FLAGS |= {"auxk_alpha": 1 / 32, "dead_feature_threshold": 300}


def groups_of(rows: Tensor) -> list[int]:
    """How many rows each group has; the last has the rest."""
    return [len(group) for group in rows.split(GROUP)]


def active(pre_acts: Tensor, cfg: SparseCoderConfig) -> Tensor:
    """relu of what each kind selects, [N L]; there are no ties."""
    if cfg.activation == "batchtopk":
        cut = torch.cat(
            [g.flatten().topk(cfg.k * len(g)).values[-1].expand(len(g)) for g in pre_acts.split(6)]
        )
        return (pre_acts * (pre_acts >= cut[:, None])).relu()
    if cfg.activation == "groupmax":
        groups = pre_acts.view(len(pre_acts), cfg.k, -1)
        return (groups * (groups == groups.amax(2, keepdim=True))).flatten(1).relu()
    return (pre_acts * (pre_acts >= pre_acts.topk(cfg.k).values[:, -1:])).relu()


def right_losses(
    p: dict[str, Tensor], cfg: SparseCoderConfig, x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """sum ||y - y_hat_m||^2 of the prefixes of 12, 24 and 48 latents; AuxK; y_hat_48."""
    pre_acts = (x - (0 if cfg.transcode else p["b_dec"])) @ p["encoder.weight"].T
    pre_acts = pre_acts + p["encoder.bias"]
    acts = active(pre_acts, cfg)
    rest = p["b_dec"] + (x @ p["W_skip"].T if cfg.skip_connection else 0)
    outs = [acts[:, :m] @ p["W_dec"][:m] + rest for m in (12, 24, 48)]
    of_dead = pre_acts[:, DEAD].relu()
    of_dead = of_dead * (of_dead >= of_dead.topk(y.shape[1] // 2).values[:, -1:])  # k_aux
    aux = ((y - outs[-1]).detach() - of_dead @ p["W_dec"][DEAD]).square().sum()
    return torch.stack([(y - out).square().sum() for out in outs]), aux, outs[-1]


def rows_of(cfg: SparseCoderConfig, seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(30, D, dtype=torch.float64, generator=g)
    return x, x[:, :5] ** 2 if cfg.transcode else x


def made(cfg: SparseCoderConfig, dtype: torch.dtype, choice: KernelChoice) -> SparseCoder:
    """A coder with numbers in all parameters."""
    d_out, first = 5 if cfg.transcode else D, torch.Generator().manual_seed(1)
    coder = SparseCoder(D, cfg, dtype=dtype, d_out=d_out, generator=first)
    g = torch.Generator().manual_seed(2)
    for name, parameter in coder.named_parameters():
        if name != "encoder.weight":
            parameter.data += torch.randn(parameter.shape, generator=g).to(dtype) / 4
    coder.normalize_decoder_()
    coder.use(Kernels(choice))
    return coder


@pytest.mark.parametrize(("dtype", "choice"), [(torch.float64, "torch"), (torch.float32, "auto")])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_equal_the_equation(
    kind: str, dtype: torch.dtype, choice: KernelChoice
) -> None:
    """Every prefix's error, AuxK from what all leave, and the gradient of every parameter."""
    cfg = KINDS[kind]
    x, y = rows_of(cfg, 0)
    coder = made(cfg, dtype, choice)
    theirs = {n: p.detach().double().requires_grad_() for n, p in coder.named_parameters()}
    errors, aux, out = right_losses(theirs, cfg, x, y)
    (errors.mean() + ALPHA * aux).backward()
    found = coder.errors(x.to(dtype), y.to(dtype), DEAD, groups=groups_of(x))
    (found.objective + auxiliary_loss(found, ALPHA)).backward()
    assert found.prefix_errors is not None
    pairs: list[Any] = [
        (found.sae_out, out),
        (found.prefix_errors, errors),
        (found.auxk_error, aux),
    ]
    pairs += [(found.objective, errors.mean()), (found.squared_error, errors[-1])]
    pairs += [(p.grad, theirs[n].grad) for n, p in coder.named_parameters()]
    close = 1e-9 if dtype == torch.float64 else 2e-4
    for ours, right in pairs:
        scale = float(right.detach().abs().max())
        torch.testing.assert_close(ours.double(), right, rtol=close, atol=close * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_ten_steps_equal_the_equation(kind: str) -> None:
    """Ten steps of Adam on the mean of the prefixes' FVU, with AuxK and unit-norm decoders."""
    cfg = KINDS[kind]
    coder = made(cfg, torch.float64, "torch")
    theirs = {n: p.detach().clone().requires_grad_() for n, p in coder.named_parameters()}
    ours = torch.optim.Adam(coder.parameters(), lr=0.01)
    right = torch.optim.Adam(theirs.values(), lr=0.01)
    for step in range(10):
        x, y = rows_of(cfg, step)
        variance = (y - y.mean(0)).square().sum()
        ours.zero_grad()
        found = coder.errors(x, y, DEAD, groups=groups_of(x))
        (found.objective + auxiliary_loss(found, ALPHA)).backward()
        divide_gradients_(coder, variance)
        ours.step()
        coder.normalize_decoder_()

        right.zero_grad()
        errors, aux, _ = right_losses(theirs, cfg, x, y)
        ((errors / variance).mean() + ALPHA * aux / variance).backward()
        W_dec = theirs["W_dec"]
        with torch.no_grad():
            assert W_dec.grad is not None
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
        right.step()
        with torch.no_grad():
            W_dec /= W_dec.norm(dim=1, keepdim=True)
    for name, parameter in coder.named_parameters():
        torch.testing.assert_close(parameter, theirs[name])


def test_a_prefix_alone_is_the_coder_without_the_rest() -> None:
    """`first` keeps of the latents that are active among all the first."""
    coder = made(KINDS["topk"], torch.float64, "torch")
    x, _ = rows_of(coder.cfg, 0)
    errors, _, _ = right_losses(dict(coder.named_parameters()), coder.cfg, x, x)
    whole = coder(x)
    variance = (x - x.mean(0)).square().sum()
    torch.testing.assert_close(coder.errors(x, x).prefix_errors, errors)
    for i, latents in enumerate((12, 24, 48)):
        alone = coder.first(latents)
        assert alone.encoder.weight is coder.encoder.weight
        assert alone.errors(x, x).prefix_errors is None
        torch.testing.assert_close(alone(x).fvu, errors[i] / variance)
        kept = whole.top_acts * (whole.top_indices < latents)
        torch.testing.assert_close(alone.encode(x).top_acts, kept)
    assert coder.prefix is None and coder.prefixes == (12, 24, 48)


@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_runs_in_pieces_and_resumed_ones_are_the_same(
    lm: PreTrainedModel,
    tokens: Tensor,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    activation: str,
) -> None:
    """Accumulated = micro-batched = whole; killed and resumed = straight, bit for bit.

    The metric of the loss is logged, and is above FVU, that of all latents.
    """
    flags = {**FLAGS, "activation": activation, "log_with": "tensorboard"}
    flags |= {"group_sequences": 2} if activation == "batchtopk" else {}
    straight = run(lm, tokens, settings, run_name="a", save_every=5, **flags)
    for name, shape in {
        "accumulated": {"batch_size": 2, "grad_acc_steps": 4},
        "micro": {"micro_acc_steps": 3},
    }.items():
        found = weights(run(lm, tokens, settings, run_name=name, **flags, **shape))
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, weights(straight)[key], rtol=2e-3, atol=2e-4)
    resumed = killed_and_resumed(monkeypatch, lm, tokens, settings, **flags)
    assert_identical(weights(resumed), weights(straight))
    assert_identical(training_state(resumed), training_state(straight))
    plain = run(lm, tokens, settings, run_name="plain", **{**flags, "matryoshka": ()})
    for name, figures in resumed["hookpoints"].items():
        assert figures == {**straight["hookpoints"][name], "path": figures["path"]}
        prefixes = figures["prefixes"]
        assert [prefix["latents"] for prefix in prefixes] == [16, 32, 64, 128]
        assert prefixes[-1]["fvu"] == pytest.approx(figures["fvu"], rel=1e-6)
        key = f"{name}/encoder.weight"
        assert not torch.allclose(weights(plain)[key], weights(straight)[key], rtol=1e-2)
    curves = scalars(Path(settings["save_dir"]) / "a")
    of_all = dict(curves["fvu/layers.0"])
    assert all(value > of_all[step] for step, value in curves["mean_prefix_fvu/layers.0"])
    assert "eval/fvu_of_first_16/layers.2" in curves
    assert "mean_prefix_fvu/layers.0" not in scalars(Path(settings["save_dir"]) / "plain")


def test_files_keep_the_shares(
    lm: PreTrainedModel, tokens: Tensor, settings: Settings, tmp_path: Path
) -> None:
    """cfg.json has them, and a plain coder's is as it was; either may start a run of the other.

    The best coders so far are kept with them.
    """
    flags = {**FLAGS, "layers": (1,), "save_best": True, "save_every": 10}
    shares = run(lm, tokens, settings, run_name="shares", **flags)
    path = Path(shares["hookpoints"]["layers.1"]["path"])
    best = Path(settings["save_dir"]) / "shares/best/layers.1"
    for folder in (path, best):
        assert json.loads((folder / "cfg.json").read_text())["matryoshka"] == list(SHARES)
        assert SparseCoder.load_from_disk(folder).prefixes == (16, 32, 64, 128)
    started = {**flags, "matryoshka": (), "finetune": str(path.parent), "max_examples": 8}
    plain = run(lm, tokens, settings, run_name="plain", **{**started, "lr": 1e-9})
    folder = Path(plain["hookpoints"]["layers.1"]["path"])
    before, after = (load_file(p / "sae.safetensors") for p in (path, folder))
    assert all(torch.allclose(before[key], after[key], atol=1e-4) for key in before)
    said = json.loads((folder / "cfg.json").read_text())
    assert "matryoshka" not in said and SparseCoder.load_from_disk(folder).prefixes == ()
    again = {**started, "matryoshka": SHARES, "finetune": str(folder.parent)}
    assert run(lm, tokens, settings, run_name="again", **again)["step"] == 1
    (folder / "cfg.json").write_text(json.dumps({**said, "matryoshka": [0.5, 0.25]}))
    with pytest.raises(UsageError, match="describes no coder: --matryoshka"):
        SparseCoder.load_from_disk(folder)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"matryoshka": (0.5, 0.25)}, "--matryoshka .0.5, 0.25.: must be shares above 0 that sum"),
        ({"matryoshka": (0.0, 1.0)}, "--matryoshka .0.0, 1.0.: must be shares above 0"),
        ({"matryoshka": (-0.5, 1.5)}, "--matryoshka .-0.5, 1.5.: must be at least 0"),
        ({"matryoshka": (float("nan"), 0.5)}, "--matryoshka .nan, 0.5.: must be at least 0"),
        ({"matryoshka": (0.1, 0.9), "num_latents": 64}, "0.1 of the 64 latents .* are 6.4: give"),
        ({"matryoshka": SHARES, "num_latents": 64, "k": 9}, "has 8 latents, fewer than --k 9"),
        ({"matryoshka": SHARES, "multi_topk": True}, "--multi_topk True: --matryoshka"),
        ({"matryoshka": SHARES, "loss_fn": "kl"}, "--loss_fn kl: with --matryoshka"),
        ({"matryoshka": SHARES, "loss_fn": "ce"}, "--loss_fn ce: with --matryoshka"),
    ],
)
def test_flags_that_do_not_go_with_it_are_refused(flags: dict[str, Any], message: str) -> None:
    """Shares that are none, prefixes that are too small, losses that have no prefixes."""
    with pytest.raises(UsageError, match=message):
        from_flags(TrainConfig, flags)


def test_prefixes_are_whole_groups_of_groupmax() -> None:
    """A group of which a prefix has a part would be won by a latent in it or behind it."""
    cfg = SaeConfig(num_latents=48, k=6, activation="groupmax", matryoshka=(0.25, 0.75))
    with pytest.raises(UsageError, match="a prefix of 12 latents .* cuts one of the 6 groups of 8"):
        SparseCoder(D, cfg)
    fits = SaeConfig(num_latents=48, k=4, activation="groupmax", matryoshka=(0.25, 0.75))
    assert SparseCoder(D, fits).prefixes == (12, 48)


def test_shares_may_be_typed_with_few_digits() -> None:
    """A third is 0.333333, ten tenths are 1, and the last prefix has all latents."""
    thirds = SaeConfig(num_latents=3000, matryoshka=(0.333333, 0.333333, 0.333334))
    assert SparseCoder(D, thirds, "meta").prefixes == (1000, 2000, 3000)
    tenths = SaeConfig(num_latents=1000, matryoshka=(0.1,) * 10)
    assert SparseCoder(D, tenths, "meta").prefixes == tuple(range(100, 1001, 100))

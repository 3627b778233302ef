"""Cross-layer transcoders: latents of a layer write to the layers ahead of it, too.

The right values are computed from the equations in float64, layer by layer.
"""

import gc
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from command_runs import call
from tiny_lms import WITH_HEAD, make_with_head
from torch import Tensor
from training_runs import (
    Settings,
    assert_identical,
    killed_and_resumed,
    run,
    training_state,
    weights,
)
from transformers import PreTrainedModel

from sae import SparseCoder, TranscoderConfig, UsageError, load_many
from sae.coders.across.cross_layer import CrossLayerTranscoder
from sae.coders.bank import CoderBank
from sae.coders.moments import Scale
from sae.config import KernelChoice, Widths
from sae.flag_checks import from_flags
from sae.kernels.twins import Kernels
from sae.runs.outcome import _of_stacks
from sae.training.losses import auxiliary_loss, divide_gradients_
from train_sae import TrainConfig, train

Ahead = int | Literal["all"]
NAMES = [f"layers.{i}.mlp" for i in range(4)]
SCALES = [Scale(1.0, 0.5), Scale(2.0, 3.0), Scale(0.1, 8.0), Scale(4.0, 0.25)]
DEAD = torch.arange(0, 40, 3)
ALPHA = 0.3
FLAGS: dict[str, Any] = {"cross_layer": "all", "transcode": True, "hookpoints": ("layers.*.mlp",)}
FLAGS |= {"optimizer": "adam", "lr": 0.01, "auxk_alpha": 1 / 32, "dead_feature_threshold": 300}


def made(dtype: torch.dtype, choice: KernelChoice, ahead: Ahead, **flags: Any) -> CoderBank:
    """Coders of four layers in training, with numbers in all parameters."""
    cfg = TranscoderConfig(**{"num_latents": 40, "k": 3, "cross_layer": ahead, **flags})
    bank = CoderBank(dict.fromkeys(NAMES, Widths(6, 5)), cfg, (0,), "cpu", torch.float32)
    bank.to(dtype)
    g = torch.Generator().manual_seed(2)
    for (_, coder), scale in zip(bank.items(), SCALES, strict=True):
        for name, parameter in coder.named_parameters():
            if name != "encoder.weight":
                parameter.data += torch.randn(parameter.shape, generator=g).to(dtype) / 4
        coder.scale, coder.matmul_dtype = scale, None
        coder.use(Kernels(choice))
    return bank


def rows_of(seed: int) -> list[tuple[Tensor, Tensor]]:
    """24 rows of every layer, what it reads and what it predicts, each at its own scale."""
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(4, 24, d, dtype=torch.float64, generator=g) + 0.2 for d in (6, 5))
    return [(x[i] * scale.x, y[i] * scale.y) for i, scale in enumerate(SCALES)]


Weights = list[dict[str, Tensor]]
"""The parameters of every layer."""


def leaves(bank: CoderBank) -> Weights:
    return [
        {n: p.detach().double().requires_grad_() for n, p in coder.named_parameters()}
        for _, coder in bank.items()
    ]


def reach(ahead: Ahead) -> int:
    return 3 if ahead == "all" else ahead


def right_losses(
    layers: Weights, rows: list[tuple[Tensor, Tensor]], ahead: Ahead
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Squared errors, AuxK's, and y_hat of every layer: y_hat^t = b^t + sum over s of a^s W^st."""
    inputs = zip(layers, rows, strict=True)
    pre = [x @ p["encoder.weight"].T + p["encoder.bias"] for p, (x, _) in inputs]
    acts = []
    for f in pre:
        acts.append((f * (f >= f.topk(3).values[:, -1:])).relu())
    outs, errors, aux = [], [], []
    for t, (p, (x, y)) in enumerate(zip(layers, rows, strict=True)):
        out = p["b_dec"] + acts[t] @ p["W_dec"]
        if "W_skip" in p:
            out = out + x @ p["W_skip"].T
        for s in range(max(0, t - reach(ahead)), t):
            out = out + acts[s] @ p[f"W_from.{t - s}"]
        of_dead = pre[t][:, DEAD].relu()
        of_dead = of_dead * (of_dead >= of_dead.topk(5 // 2).values[:, -1:])
        outs.append(out)
        errors.append((y - out).square().sum())
        aux.append(((y - out).detach() - of_dead @ p["W_dec"][DEAD]).square().sum())
    return errors, aux, outs


def right_gradients(layers: Weights, rows: list[tuple[Tensor, Tensor]], ahead: Ahead) -> Weights:
    """By layer those of its own error, and of those ahead in units of its variance."""
    errors, aux, _ = right_losses(layers, rows, ahead)
    found = []
    for s, p in enumerate(layers):
        loss = errors[s] + ALPHA * aux[s]
        for t in range(s + 1, min(s + reach(ahead), 3) + 1):
            loss = loss + errors[t] * (SCALES[s].y / SCALES[t].y) ** 2
        grads = torch.autograd.grad(loss, list(p.values()), retain_graph=True)
        found.append(dict(zip(p, grads, strict=True)))
    return found


def take_gradients(bank: CoderBank, rows: list[tuple[Tensor, Tensor]], pieces: int = 1) -> Any:
    """As the loop does: layer by layer, each loss with a backward of its own."""
    results = []
    for (_, coder), (x, y) in zip(bank.items(), rows, strict=True):
        dtype = coder.dtype
        for x_rows, y_rows in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
            found = coder.errors(x_rows.to(dtype), y_rows.to(dtype), DEAD)
            (found.objective + auxiliary_loss(found, ALPHA)).backward()
            results.append((found.squared_error, found.auxk_error, found.sae_out))
    return results


@pytest.mark.parametrize("ahead", [1, 2, "all"])
@pytest.mark.parametrize(("dtype", "choice"), [(torch.float64, "torch"), (torch.float32, "auto")])
@pytest.mark.parametrize("skip", [False, True])
def test_losses_and_gradients_equal_the_equations(
    dtype: torch.dtype, choice: KernelChoice, ahead: Ahead, skip: bool
) -> None:
    """Outputs of every layer, AuxK, and the gradient of every parameter; in pieces too."""
    bank = made(dtype, choice, ahead, skip_connection=skip)
    rows = [(x.to(dtype).double(), y.to(dtype).double()) for x, y in rows_of(0)]
    layers = leaves(bank)
    errors, aux, outs = right_losses(layers, rows, ahead)
    expected = right_gradients(layers, rows, ahead)
    found = take_gradients(bank, rows)
    ours = [t for one in found for t in one]
    right = [t for one in zip(errors, aux, outs, strict=True) for t in one]
    pairs: list[Any] = [*zip(ours, right, strict=True)]
    close = 1e-9 if dtype == torch.float64 else 2e-4
    for _ in range(2):
        for (_, coder), grads in zip(bank.items(), expected, strict=True):
            pairs += [(p.grad, grads[n]) for n, p in coder.named_parameters()]
        for mine, theirs in pairs:
            scale = float(theirs.detach().abs().max())
            torch.testing.assert_close(mine.double(), theirs, rtol=close, atol=close * scale)
        bank.zero_grad()
        take_gradients(bank, rows, pieces=3)
        pairs = []


def test_ten_steps_equal_the_equations() -> None:
    """Adam on FVU with AuxK, each parameter in its own unit; no decoder is normalized."""
    bank = made(torch.float64, "torch", "all")
    theirs = leaves(bank)
    ours = torch.optim.Adam(bank.parameters(), lr=0.01)
    right = torch.optim.Adam([p for layer in theirs for p in layer.values()], lr=0.01)
    for step in range(10):
        rows = rows_of(step)
        variances = [(y - y.mean(0)).square().sum() for _, y in rows]
        ours.zero_grad()
        take_gradients(bank, rows)
        for (_, coder), variance in zip(bank.items(), variances, strict=True):
            divide_gradients_(coder, variance)
        ours.step()

        for s, grads in enumerate(right_gradients(theirs, rows, "all")):
            units = {"encoder.weight": SCALES[s].y / SCALES[s].x, "W_dec": 1.0}
            units |= {f"W_from.{d}": SCALES[s].y / SCALES[s - d].y for d in range(1, s + 1)}
            for name, p in theirs[s].items():
                p.grad = grads[name] * units.get(name, SCALES[s].y) / variances[s]
        right.step()
    for (_, coder), layer in zip(bank.items(), theirs, strict=True):
        for name, parameter in coder.named_parameters():
            torch.testing.assert_close(parameter, layer[name])


class Letters:
    """What two threads send each other, one of them each rank."""

    def __init__(self, owner: dict[str, int]) -> None:
        self.owner, self.sent, self.came = owner, dict[Any, list[Tensor]](), threading.Condition()


@dataclass
class Post:
    """One rank's end of it."""

    rank: int
    letters: Letters
    entries: int = 0

    @property
    def owner(self) -> dict[str, int]:
        return self.letters.owner

    def send(self, rank: int, key: str, tensors: list[Tensor]) -> None:
        self.entries += tensors[0].numel()
        with self.letters.came:
            self.letters.sent[self.rank, rank, key] = [t.clone() for t in tensors]
            self.letters.came.notify_all()

    def receive(self, rank: int, key: str) -> list[Tensor]:
        with self.letters.came:
            there = self.letters.came.wait_for(
                lambda: (rank, self.rank, key) in self.letters.sent, timeout=30
            )
            assert there, key
            return self.letters.sent.pop((rank, self.rank, key))

    def settle(self) -> None:
        """What is sent is there at once."""


@pytest.mark.parametrize("owners", [(0, 0, 1, 1), (0, 1, 0, 1), (1, 0, 0, 1)])
@pytest.mark.parametrize("activation", ["topk", "groupmax", "batchtopk", "jumprelu"])
def test_owners_of_layers_send_latents_and_gradients_alone(
    activation: Any, owners: tuple[int, ...]
) -> None:
    """Two ranks with some layers each, in pieces: every error and gradient is that of one rank."""
    flags = {"activation": activation, "num_latents": 42 if activation == "groupmax" else 40}
    one = made(torch.float64, "auto", 2, **flags)
    rows = rows_of(0)
    groups = [4] * 2 if activation == "batchtopk" else None
    for (_, coder), scale in zip(one.items(), SCALES, strict=True):
        if coder.cfg.has_threshold:
            coder.threshold.data.fill_(0.3 * scale.y)

    def train(bank: CoderBank) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, coder in bank.items():
            x, y = rows[NAMES.index(name)]
            for x_rows, y_rows in zip(x.chunk(3), y.chunk(3), strict=True):
                errors = coder.errors(x_rows, y_rows, DEAD, groups=groups)
                (errors.objective + auxiliary_loss(errors, ALPHA)).backward()
                found[name] = found.get(name, 0.0) + float(errors.squared_error)
        bank.gradients()
        return found

    expected = train(one)
    letters = Letters(dict(zip(NAMES, owners, strict=True)))
    posts = [Post(rank, letters) for rank in (0, 1)]
    banks = []
    for post in posts:
        mine = {name: Widths(6, 5) for name, rank in letters.owner.items() if rank == post.rank}
        cfg = TranscoderConfig(k=3, cross_layer=2, **flags)
        bank = CoderBank(mine, cfg, (0,), "cpu", torch.float64, post=post).to(torch.float64)
        for name, coder in bank.items():
            coder.load_state_dict(one[name].state_dict())
            coder.scale, coder.matmul_dtype = SCALES[NAMES.index(name)], None
            assert isinstance(coder, CrossLayerTranscoder)
            coder.scale_sources_(dict(zip(NAMES, SCALES, strict=True)))
        banks.append(bank)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(train, banks))
    assert not letters.sent
    for bank, errors in zip(banks, found, strict=True):
        for name, coder in bank.items():
            assert errors[name] == pytest.approx(expected[name], rel=1e-9)
            for key, parameter in coder.named_parameters():
                right = dict(one[name].named_parameters())[key].grad
                assert right is not None
                torch.testing.assert_close(parameter.grad, right, rtol=1e-9, atol=1e-9)
    if activation in ("topk", "groupmax"):  # of each row and latent that another rank reads
        readers = [
            len({owners[t] for t in range(s + 1, min(s + 3, 4))} - {owners[s]}) for s in range(4)
        ]
        assert sum(post.entries for post in posts) == 2 * 24 * 3 * sum(readers)
    with torch.no_grad(), ThreadPoolExecutor(2) as pool:  # an evaluation returns nothing
        list(pool.map(evaluated, banks, [rows, rows]))
    assert not letters.sent


def evaluated(bank: CoderBank, rows: list[tuple[Tensor, Tensor]]) -> None:
    """Every layer's errors, without gradients."""
    with torch.no_grad():
        for name, coder in bank.items():
            coder.errors(*rows[NAMES.index(name)])


def test_memory_is_that_of_one_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a layer's backward nothing as wide as its output is left, but the rows given."""
    bank = made(torch.float32, "torch", "all")
    rows = [(x[:, :6].float(), y.float()) for x, y in rows_of(0)]
    rows = [(x.repeat(3, 1)[:71], y.repeat(3, 1)[:71]) for x, y in rows]
    given = {id(y) for _, y in rows}

    def left() -> int:
        found = (t for t in gc.get_objects() if type(t) is Tensor and t.shape == (71, 5))
        return sum(id(t) not in given for t in found)

    for (_, coder), (x, y) in zip(bank.items(), rows, strict=True):
        found = coder.errors(x, y, DEAD)
        assert left() > 0
        (found.objective + auxiliary_loss(found, ALPHA)).backward()
        del found
        gc.collect()
        assert left() == 0


def test_a_backward_that_comes_too_late_is_an_error() -> None:
    """One backward for the losses of all layers would lose gradients: it is not done."""
    bank = made(torch.float32, "torch", 1)
    rows = [(x.float(), y.float()) for x, y in rows_of(0)]
    pairs = zip(bank.items(), rows, strict=True)
    losses = [coder.errors(x, y).objective for (_, coder), (x, y) in pairs]
    with pytest.raises(AssertionError, match="has its backward before the next's"):
        torch.stack(losses).sum().backward()


def test_files_hold_every_decoder(tmp_path: Path) -> None:
    """Coders from disk, given the same rows in the order of layers, do what they did in training.

    One alone, or out of order, says what is missing.
    """
    bank = made(torch.float64, "torch", 2)
    for name, coder in bank.items():
        coder.save_to_disk(tmp_path / "coders" / name)
    back = load_many(tmp_path / "coders")
    assert back[NAMES[3]].cfg.sources == tuple(NAMES[1:3])
    assert back[NAMES[0]].cfg.targets == tuple(NAMES[1:3])
    rows = rows_of(0)
    for name, (x, y) in zip(NAMES, rows, strict=True):
        expected, found = bank[name](x, y), back[name](x, y)
        assert torch.equal(found.sae_out, expected.sae_out) and torch.equal(found.fvu, expected.fvu)
    with pytest.raises(UsageError, match="take the same rows, one after the other in the order"):
        back[NAMES[1]](*rows[1])
    for name, (x, y) in zip(NAMES[:1] * 3 + NAMES[1:2], [rows_of(1)[0]] * 2 + rows, strict=False):
        found = back[name](x, y)  # only what the layer before left last is read
    bank[NAMES[0]](*rows[0])
    assert torch.equal(found.sae_out, bank[NAMES[1]](*rows[1]).sae_out)
    alone = SparseCoder.load_from_disk(tmp_path / "coders" / NAMES[1])
    linked = back[NAMES[1]].encode(rows[1][0]).top_acts
    assert torch.equal(alone.encode(rows[1][0]).top_acts, linked)
    with pytest.raises(UsageError, match="goes with those of layers.0.mlp"):
        alone(*rows[1])
    without = SparseCoder.load_from_disk(tmp_path / "coders" / NAMES[1], decoder=False)
    assert isinstance(without, CrossLayerTranscoder) and not len(without.W_from)
    said = json.loads((tmp_path / "coders" / NAMES[2] / "cfg.json").read_text())
    said["sources"] = said["sources"][:1]
    (tmp_path / "coders" / NAMES[2] / "cfg.json").write_text(json.dumps(said))
    with pytest.raises(UsageError, match="W_from.2"):
        load_many(tmp_path / "coders")


def test_a_start_from_trained_coders_is_the_same_function(tmp_path: Path) -> None:
    """--finetune where the first batch has other rms: weights are plain, whatever the scale."""
    bank = made(torch.float32, "torch", "all")
    for name, coder in bank.items():
        coder.save_to_disk(tmp_path / name)
    other = made(torch.float32, "torch", "all")
    for i, (_, coder) in enumerate(other.items()):
        coder.scale = Scale(1.0, 2.0**i)
    other.load_pretrained(str(tmp_path))
    other.normalize_decoders_()
    for name, (x, y) in zip(NAMES, rows_of(0), strict=True):
        x, y = x.float(), y.float()
        assert torch.equal(other[name](x, y).sae_out, bank[name](x, y).sae_out)


@pytest.mark.parametrize("activation", ["topk", "batchtopk", "jumprelu"])
def test_runs_in_pieces_and_resumed_ones_are_the_same(
    lm: PreTrainedModel,
    tokens: Tensor,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    activation: str,
) -> None:
    """Accumulated = whole; killed and resumed = straight, bit for bit."""
    flags = {**FLAGS, "activation": activation, "multi_topk": False}
    flags |= {"group_sequences": 2} if activation == "batchtopk" else {}
    straight = run(lm, tokens, settings, run_name="a", save_every=5, **flags)
    shape = {"batch_size": 2, "grad_acc_steps": 4, "micro_acc_steps": 2}
    # Of a fresh transcoder some gradients are rounding, which Adam divides by its own size.
    tuned = {**flags, "finetune": str(Path(straight["hookpoints"]["layers.0.mlp"]["path"]).parent)}
    whole = weights(run(lm, tokens, settings, run_name="whole", **tuned))
    accumulated = weights(run(lm, tokens, settings, run_name="accumulated", **tuned, **shape))
    for key, tensor in accumulated.items():
        torch.testing.assert_close(tensor, whole[key], rtol=2e-3, atol=2e-4)
    resumed = killed_and_resumed(monkeypatch, lm, tokens, settings, **flags)
    assert_identical(weights(resumed), weights(straight))
    assert_identical(training_state(resumed), training_state(straight))


class Rows(list):
    """Items that say what they are."""

    fingerprint = "rows"


@pytest.mark.parametrize("optimizer", ["adam", "signum", "muon", "soap"])
def test_the_scale_of_a_layer_changes_nothing_but_units(tmp_path: Path, optimizer: str) -> None:
    """What one layer reads or predicts times a power of two: the same latents, the same FVU."""
    g = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, 8, 8, generator=g)
    items = []
    for i in range(40):
        shared = torch.randn(16, 8, generator=g)
        pairs = [(shared @ maps[0, n], shared @ maps[1, n] + i / 9) for n in range(3)]
        items.append({f"l.{n}": pair for n, pair in enumerate(pairs)})
    found = []
    for name, (x_by, y_by) in (("a", (1.0, 1.0)), ("b", (2.0**5, 2.0**-9))):
        flags = {"save_dir": str(tmp_path), "run_name": name, "log_with": "none", "k": 3}
        flags |= {"num_latents": 32, "batch_size": 4, "eval_tokens": 16, "optimizer": optimizer}
        other = [(item["l.1"][0] * x_by, item["l.1"][1] * y_by) for item in items]
        rows = Rows([{**item, "l.1": pair} for item, pair in zip(items, other, strict=True)])
        flags |= {"cross_layer": 1, "transcode": True}
        found.append(train(from_flags(TrainConfig, flags), activations=rows)["hookpoints"])
    for name in ("l.0", "l.1", "l.2"):
        assert found[1][name]["fvu"] == pytest.approx(found[0][name]["fvu"], rel=1e-4)
        assert found[1][name]["frequency_histogram"] == found[0][name]["frequency_histogram"]
    plain, scaled = (load_many(Path(f["l.0"]["path"]).parent) for f in found)
    torch.testing.assert_close(
        scaled["l.1"].state_dict()["W_from.1"] * 2.0**9,
        plain["l.1"].state_dict()["W_from.1"],
        rtol=1e-3,
        atol=1e-5,
    )


def test_commands_read_cross_layer_transcoders(
    tokens: Tensor,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """evaluate's figures are the run's; features, compare, threshold and --finetune take them.

    CE recovered is that of the LM with one MLP replaced, or all, by sums over earlier layers.
    """
    lm = make_with_head(WITH_HEAD["llama"][0])
    lm.save_pretrained(tmp_path / "lm")
    tokens.numpy().astype("uint16").tofile(tmp_path / "ids.bin")
    at = {"model": str(tmp_path / "lm"), "dataset": str(tmp_path / "ids.bin")}
    flags: dict[str, Any] = {**settings, **FLAGS, **at, "multi_topk": False, "save_best": True}
    summary = train(from_flags(TrainConfig, {**flags, "run_name": "a"}))
    folder = Path(settings["save_dir"]) / "a"
    assert call(monkeypatch, "evaluate", str(folder), "--out", str(tmp_path / "e.json")) == 0
    found = json.loads((tmp_path / "e.json").read_text())
    names = list(found["coders"])
    for name, figures in summary["hookpoints"].items():
        for figure in ("fvu", "l0", "cosine"):
            assert found["coders"][name][figure] == pytest.approx(figures[figure], rel=1e-5)
    coders = load_many(Path(summary["hookpoints"][names[0]]["path"]).parent)
    right = spliced_losses(lm, tokens[:16], coders)
    for name in names:
        said = found["coders"][name]["predictions"]["ce_spliced"]
        assert said == pytest.approx(right[name], rel=1e-4)
    assert found["all_at_once"]["ce_spliced"] == pytest.approx(right[""], rel=1e-4)
    best = {json.loads((folder / "best" / n / "fvu.json").read_text())["step"] for n in names}
    assert len(best) == 1
    page = tmp_path / "page.html"
    assert call(monkeypatch, "features", str(folder), "--latents", "3", "--out", str(page)) == 0
    data = re.search(r"<script[^>]*json[^>]*>(.*?)</script>", page.read_text(), re.S)
    assert data is not None
    first = json.loads(data[1])["coders"][0]["latents"][0]
    assert [name for name, _ in first["hookpoints"]] == names
    assert sum(share for _, share in first["hookpoints"]) == pytest.approx(1, abs=0.01)
    assert [name for name, _ in first["ahead"]] == names[1:]
    args = ("compare", str(folder), str(folder), "--out", str(tmp_path / "c.json"))
    assert call(monkeypatch, *args) == 0
    args = (*args[:3], "--dataset", at["dataset"], *args[3:])
    assert call(monkeypatch, *args) == 0
    assert call(monkeypatch, "threshold", str(folder)) == 0
    made_with = load_many(folder / "thresholds")
    assert torch.equal(
        made_with[names[1]].state_dict()["W_from.1"], coders[names[1]].state_dict()["W_from.1"]
    )
    path = str(Path(summary["hookpoints"][names[0]]["path"]).parent)
    tuned = {**flags, "finetune": path, "lr": 1e-9, "max_examples": 8, "save_best": False}
    again = train(from_flags(TrainConfig, {**tuned, "run_name": "b"}))
    for name in names:
        expected = summary["hookpoints"][name]["fvu"]
        assert again["hookpoints"][name]["fvu"] == pytest.approx(expected, rel=0.01)
    with pytest.raises(
        UsageError, match="goes with other layers there .layers.1.mlp, .*: see --cross"
    ):
        train(from_flags(TrainConfig, {**tuned, "cross_layer": 0, "run_name": "c"}))
    capsys.readouterr()
    hub = tmp_path / "hub"
    assert call(monkeypatch, "push", str(folder), "someone/coders", "--dry_run", str(hub)) == 0
    assert torch.equal(
        load_many(hub)[names[1]].state_dict()["W_from.1"], coders[names[1]].state_dict()["W_from.1"]
    )
    for command in ("evaluate", "features"):
        alone = (str(folder), "--hookpoint", names[1], "--out", str(tmp_path / "e2.json"))
        assert call(monkeypatch, command, *alone) == 2
        assert "take all of them, by load_many or without" in capsys.readouterr().err


def test_layers_are_kept_together_when_their_mean_is_lowest() -> None:
    """By seed, over the layers of all ranks, whatever else a name ends with."""
    fvu = {f"layers.{i}.mlp.seed{s}": 0.1 * i + s for i in (0, 1, 10) for s in (0, 7)}
    found = _of_stacks(fvu, ["layers.0.mlp", "layers.1.mlp", "layers.10.mlp"])
    for name, value in found.items():
        assert value == pytest.approx(1.1 / 3 + (7 if name.endswith("seed7") else 0))


@torch.no_grad()
def spliced_losses(lm: Any, ids: Tensor, coders: dict[str, SparseCoder]) -> dict[str, float]:
    """Cross-entropy with each coder's MLP replaced, and with all at once, by plain hooks."""
    base = lm.base_model
    found: dict[str, float] = {}
    for replaced in ([name] for name in coders):
        found[replaced[0]] = _loss(lm, base, ids, coders, replaced)
    return found | {"": _loss(lm, base, ids, coders, list(coders))}


def _loss(
    lm: Any, base: Any, ids: Tensor, coders: dict[str, SparseCoder], replaced: list[str]
) -> float:
    dense: list[Tensor] = []

    def hook(name: str, x: Tensor, y: Tensor) -> Tensor | None:
        p = coders[name].state_dict()
        rows = x.flatten(0, 1)
        f = rows @ p["encoder.weight"].T + p["encoder.bias"]
        kept = f.topk(coders[name].cfg.k)
        dense.append(torch.zeros_like(f).scatter(1, kept.indices, kept.values.relu()))
        if name not in replaced:
            return None
        here = len(dense) - 1
        out = p["b_dec"] + dense[here] @ p["W_dec"]
        for s in range(here):
            out = out + dense[s] @ p[f"W_from.{here - s}"]
        return out.view_as(y)

    handles = [
        base.get_submodule(n).register_forward_hook(lambda m, a, y, n=n: hook(n, a[0], y))
        for n in coders
    ]
    logits = lm(input_ids=ids).logits
    for handle in handles:
        handle.remove()
    return float(
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"transcode": False}, "--transcode False: --cross_layer all is for transcoders"),
        ({"multi_topk": True}, "--multi_topk True: --cross_layer all would need"),
        ({"matryoshka": (0.5, 0.5)}, "--matryoshka .*: --cross_layer all has no prefixes"),
        ({"loss_fn": "kl"}, "--loss_fn kl: --cross_layer all is trained on the FVU"),
        ({"exclude_norm": 2.0}, "--exclude_norm 2.0: --cross_layer all needs the same rows"),
        (
            {"distribute_modules": True, "ranks_per_coder": 2},
            "--ranks_per_coder 2: --cross_layer all has a coder of each layer",
        ),
        ({"rms_units": False}, "--rms_units False: --cross_layer all weighs its layers"),
        ({"cross_layer": -1}, "--cross_layer -1: must be at least 0"),
        ({"cross_layer": "some"}, "--cross_layer 'some': is not of the type"),
    ],
)
def test_flags_that_do_not_go_with_it_are_refused(flags: dict[str, Any], message: str) -> None:
    """Before anything is loaded, with the reason."""
    with pytest.raises(UsageError, match=message):
        from_flags(TrainConfig, {"cross_layer": "all", "transcode": True, **flags})


@pytest.mark.parametrize(
    ("hookpoints", "message"),
    [
        (
            ("layers.0.mlp",),
            "--cross_layer: takes the same module of several layers, in order, not layers.0",
        ),
        (("layers.0.mlp", "layers.1.self_attn"), "not layers.0.mlp, layers.1.self_attn: name them"),
    ],
)
def test_hookpoints_that_are_no_stack_are_refused(
    lm: PreTrainedModel,
    tokens: Tensor,
    settings: Settings,
    hookpoints: tuple[str, ...],
    message: str,
) -> None:
    """Latents write ahead in the order of layers, from one module of each."""
    flags = {**FLAGS, "hookpoints": hookpoints, "multi_topk": False}
    with pytest.raises(UsageError, match=message):
        run(lm, tokens, settings, run_name="r", **flags)


def test_layers_out_of_order_are_refused(tmp_path: Path) -> None:
    """Rows made elsewhere come in the order of their names, numbers as numbers."""
    pair = (torch.randn(16, 8), torch.randn(16, 8))
    rows = Rows([{name: pair for name in ("l.0", "l.10", "l.2")} for _ in range(40)])
    flags = {"save_dir": str(tmp_path), "run_name": "a", "log_with": "none", "k": 3}
    flags |= {"cross_layer": "all", "transcode": True, "num_latents": 32, "eval_tokens": 16}
    with pytest.raises(UsageError, match="in order, not l.0, l.10, l.2"):
        train(from_flags(TrainConfig, {**flags, "batch_size": 4}), activations=rows)

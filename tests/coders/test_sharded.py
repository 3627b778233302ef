"""Coders that several ranks hold compute what one does; the ranks are threads of this process."""

import re
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks_in_threads import ThreadGroup, on_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import coder_optimizer

from sae import SaeConfig, SparseCoder, SparseCoderConfig, TranscoderConfig, UsageError
from sae.coders import functional
from sae.coders.own_losses import OwnLosses
from sae.coders.sharded import ShardedCoder
from sae.kernels.twins import Kernels
from sae.training.losses import auxiliary_loss, divide_gradients_

L, D = 40, 10
KINDS = {
    "topk": SaeConfig(num_latents=L, k=5),
    "multi": SaeConfig(num_latents=L, k=5, multi_topk=True),
    "all": SaeConfig(num_latents=L, k=L),
    "groupmax": SaeConfig(num_latents=L, k=5, activation="groupmax"),
    "prefixes": SaeConfig(num_latents=L, k=5, matryoshka=(0.25, 0.25, 0.5)),
    "free": SaeConfig(num_latents=L, k=5, normalize_decoder=False),
    "transcoder": TranscoderConfig(num_latents=L, k=5),
    "skip": TranscoderConfig(num_latents=L, k=5, skip_connection=True),
}


def made(cfg: SparseCoderConfig, group: ThreadGroup | None = None) -> SparseCoder:
    """A coder, or what one rank holds of it, with numbers in all parameters."""
    d_out = 7 if cfg.transcode else D
    rest = {"d_out": d_out, "generator": torch.Generator().manual_seed(3)}
    make = SparseCoder if group is None else partial(ShardedCoder, group)
    coder = make(D, cfg, **rest)
    shapes = {"encoder.bias": (L,), "b_dec": (d_out,), "W_skip": (d_out, D), "W_dec": (L, d_out)}
    for i, (name, parameter) in enumerate(coder.named_parameters()):
        if name in shapes and (name != "W_dec" or cfg.transcode):
            whole = torch.randn(shapes[name], generator=torch.Generator().manual_seed(i))
            if name == "W_dec":
                whole = torch.nn.functional.normalize(whole)
            parameter.data.copy_(held(coder, name, whole / 3 if name != "W_dec" else whole))
    return coder


def held(coder: SparseCoder, name: str, whole: Tensor) -> Tensor:
    """What a coder's rank has of a tensor as large as a parameter."""
    part = coder.piece.part_of(name) if coder.piece else None
    if part is None:
        return whole
    return whole.narrow(part.dim, part.indices.start, len(part.indices))


def rows(cfg: SparseCoderConfig) -> tuple[Tensor, Tensor]:
    x = torch.randn(30, D, generator=torch.Generator().manual_seed(9))
    return x, x[:, :7] ** 2 if cfg.transcode else x


def learn(coder: SparseCoder, dead: Tensor | None) -> tuple[Any, Tensor, Tensor]:
    """One backward of all losses: the errors, the gradients' norm, and the gradient of x."""
    x, y = rows(coder.cfg)
    x = x.clone().requires_grad_()
    errors = coder.errors(x, y.detach(), dead)
    (errors.objective + auxiliary_loss(errors, 0.5)).backward()
    norm = divide_gradients_(coder, torch.tensor(30.0, dtype=torch.float64))
    assert x.grad is not None
    return errors, norm, x.grad


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("alone", [False, True])
def test_shared_coders_compute_what_the_definition_says(
    kind: str, size: int, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Errors, active latents, output and every gradient; dead latents here, there or nowhere."""
    cfg = KINDS[kind]
    monkeypatch.setattr(SparseCoder, "own_losses", OwnLosses(auxk_alone=alone))
    for dead in (None, torch.tensor([1, 2]), torch.arange(3, L, 4)):
        one = made(cfg)
        one.kernels = functional  # type: ignore[assignment]  # the specification, as a module
        expected, norm, d_x = learn(one, dead)
        order = expected.top_indices.sort(1)

        def on_a_rank(group: ThreadGroup, dead: Tensor | None = dead) -> Any:
            coder = made(cfg, group)
            assert isinstance(coder, ShardedCoder)
            return coder, *learn(coder, dead), lambda out: coder.whole(out)

        found = on_ranks(size, on_a_rank)
        for coder, errors, their_norm, their_d_x, _ in found:
            mine = errors.top_indices.sort(1)
            assert torch.equal(mine.values, order.values)
            acts = errors.top_acts.gather(1, mine.indices)
            torch.testing.assert_close(acts, expected.top_acts.gather(1, order.indices))
            for name in ("squared_error", "objective", "auxk_error", "multi_topk_error"):
                torch.testing.assert_close(getattr(errors, name), getattr(expected, name))
            torch.testing.assert_close(errors.sae_out, expected.sae_out[:, coder.columns])
            torch.testing.assert_close(their_norm, norm)
            torch.testing.assert_close(their_d_x, d_x)
            gradients = {n: p.grad for n, p in one.named_parameters()}
            for name, parameter in coder.named_parameters():
                assert parameter.grad is not None and gradients[name] is not None
                theirs = held(coder, name, gradients[name])
                torch.testing.assert_close(parameter.grad, theirs)


@pytest.mark.parametrize("k_dead", [4, 9])  # some of them, or all
@pytest.mark.parametrize("kind", ["topk", "multi", "prefixes", "skip"])
@pytest.mark.parametrize("alone", [False, True])
def test_shared_auxk_by_dense_products_is_the_same(
    alone: bool, kind: str, k_dead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As CUDA takes it: errors and gradients, with many dead latents on some ranks, none on one."""
    cfg, dead = KINDS[kind], torch.tensor([0, 3, 4, 5, 9, 30, 33, 38, 39])

    def keep_largest_(_: Any, values: Tensor, k: int) -> None:
        order = values.sort(dim=1, descending=True, stable=True).indices
        values.relu_().scatter_(1, order[:, k:], 0)

    monkeypatch.setattr("sae.kernels.selection.keep_largest_", keep_largest_)
    monkeypatch.setattr("sae.coders.sharded_kernels.keep_largest_", keep_largest_)
    monkeypatch.setattr("sae.coders.families.topk.k_dead", lambda *_: k_dead)
    monkeypatch.setattr(SparseCoder, "own_losses", OwnLosses(auxk_alone=alone))
    one = made(cfg)
    one.kernels = functional  # type: ignore[assignment]
    expected, norm, d_x = learn(one, dead)
    gradients = {n: p.grad for n, p in one.named_parameters() if p.grad is not None}
    taken = list[bool]()

    def pays(*_: Any) -> bool:
        taken.append(True)
        return True

    monkeypatch.setattr("sae.kernels.dense_products.pays", pays)

    def on_a_rank(group: ThreadGroup) -> Any:
        coder = made(cfg, group)
        coder.use(Kernels("torch"))
        return coder, *learn(coder, dead)

    for coder, errors, their_norm, their_d_x in on_ranks(4, on_a_rank):
        torch.testing.assert_close(errors.auxk_error, expected.auxk_error)
        torch.testing.assert_close(their_norm, norm)
        torch.testing.assert_close(their_d_x, d_x)
        for name, parameter in coder.named_parameters():
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, held(coder, name, gradients[name]))
    assert len(taken) == 4


def test_dead_latents_are_those_of_the_step() -> None:
    """Other dead latents in the next step are found anew, on a rank that had none too."""
    cfg = KINDS["topk"]
    steps = [torch.tensor([1, 2]), torch.tensor([1, 30]), torch.arange(L)]
    x, y = rows(cfg)
    expected = [made(cfg).errors(x, y, dead).auxk_error for dead in steps]

    def on_a_rank(group: ThreadGroup) -> list[Tensor]:
        coder = made(cfg, group)
        return [coder.errors(x, y, dead).auxk_error for dead in steps for _ in range(2)]

    for found in on_ranks(4, on_a_rank):
        torch.testing.assert_close(found[::2], expected)
        torch.testing.assert_close(found[1::2], expected)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_ties_go_to_the_smaller_number(kernels: Any) -> None:
    """Of latents with the same activation, on whichever ranks, those with small numbers win."""
    cfg = SaeConfig(num_latents=12, k=5)

    def on_a_rank(group: ThreadGroup) -> tuple[Tensor, Tensor]:
        coder = ShardedCoder(group, 3, cfg)
        coder.use(Kernels(kernels))
        values = torch.tensor([1.0, 2, 1, 1, 2, 1, 1, 2, 1, 1, 1, 1])
        coder.encoder.weight.data.zero_()
        coder.encoder.bias.data.copy_(held(coder, "encoder.bias", values))
        return tuple(coder.encode(torch.randn(2, 3)))

    for size in (1, 3):  # ranks that choose among their own, too
        for acts, indices in on_ranks(size, on_a_rank):
            assert indices.sort(1).values.tolist() == [[0, 1, 2, 4, 7]] * 2
            assert acts.sum(1).tolist() == [8, 8]


@pytest.mark.parametrize("cfg", [SaeConfig(num_latents=2500, k=2), TranscoderConfig(k=2)])
def test_shared_coders_start_with_the_bits_of_a_whole_one(cfg: SparseCoderConfig) -> None:
    """Every rank's part of the initial weights is that of the coder that one rank makes."""
    whole = SparseCoder(6, cfg, generator=torch.Generator().manual_seed(1))
    for size in (2, 5):
        found = on_ranks(
            size, lambda g: ShardedCoder(g, 6, cfg, generator=torch.Generator().manual_seed(1))
        )
        for coder in found:
            for name, parameter in whole.named_parameters():
                mine = dict(coder.named_parameters())[name]
                assert torch.equal(mine, held(coder, name, parameter)), name
        for name in ("encoder.weight", "W_dec"):
            sizes = [dict(coder.named_parameters())[name].numel() for coder in found]
            assert sum(sizes) == dict(whole.named_parameters())[name].numel()


@pytest.mark.parametrize(
    ("optimizer", "latents"),
    # Of fewer latents than columns soap's eigenbasis is not one, but any of many.
    [*product(["signum", "adam", "muon"], [40, 6]), ("soap", 40)],
)
@pytest.mark.parametrize("kind", ["topk", "free", "skip"])
def test_every_optimizer_moves_a_shared_coder_like_a_whole_one(
    optimizer: Any, kind: str, latents: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of equal gradients, and what would be saved then; L above and below D."""
    # Muon multiplies in bfloat16, whose rounding would hide other differences.
    monkeypatch.setattr(Tensor, "bfloat16", lambda t: t.float().clone())
    base = KINDS[kind]
    cfg = SparseCoderConfig(**{**vars(base), "num_latents": latents})

    def train(coder: SparseCoder) -> dict[str, Tensor]:
        rule = coder_optimizer(coder, optimizer, lr=0.01)
        for step in range(12 if optimizer == "soap" else 3):  # soap turns its basis after ten
            for i, (name, p) in enumerate(coder.named_parameters()):
                shape = {"encoder.weight": (latents, D), "W_dec": (latents, coder.d_out)}
                shape |= {"W_skip": (coder.d_out, D), "encoder.bias": (latents,)}
                draw = torch.Generator().manual_seed(10 * step + i)
                whole = torch.randn(shape.get(name, tuple(p.shape)), generator=draw)
                p.grad = held(coder, name, whole).clone()
            divide_gradients_(coder, torch.tensor(4.0))
            rule.step(step)
        with rule.trained():
            saved = {n: p.detach().clone() for n, p in coder.named_parameters()}
        return {**saved, "norms": coder.decoder_norms()}

    generator = {"generator": torch.Generator().manual_seed(1)}
    d_out = 13 if cfg.transcode else D
    whole = train(SparseCoder(D, cfg, d_out=d_out, **generator))

    def on_a_rank(group: ThreadGroup) -> tuple[SparseCoder, dict[str, Tensor]]:
        draw = torch.Generator().manual_seed(1)
        coder = ShardedCoder(group, D, cfg, d_out=d_out, generator=draw)
        return coder, train(coder)

    for coder, found in on_ranks(3, on_a_rank):
        for name, tensor in whole.items():
            expected = held(coder, name, tensor)
            torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-5)


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that any operation of this thread makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                self.numbers = max(self.numbers, tensor.numel())
        return made


@pytest.mark.parametrize("optimizer", ["signum", "adam", "muon", "soap"])
def test_no_rank_ever_has_a_whole_matrix(tmp_path: Path, optimizer: Any) -> None:
    """From the first weight to the saved file no tensor is as large as L x D, or half as large."""
    latents, d = 8192, 16
    cfg = SaeConfig(num_latents=latents, k=2)

    def on_a_rank(group: ThreadGroup) -> int:
        with Largest() as largest:
            coder = ShardedCoder(group, d, cfg)
            rule = coder_optimizer(coder, optimizer)
            for step in range(2):  # the first of soap turns nothing yet
                x = torch.randn(8, d)
                errors = coder.errors(x, x, torch.tensor([1, 5000]))
                (errors.squared_error + auxiliary_loss(errors, 0.5)).backward()
                divide_gradients_(coder, torch.tensor(1.0))
                rule.step(step)
            with rule.trained():
                coder.save_to_disk(tmp_path)
        return largest.numbers

    assert max(on_ranks(4, on_a_rank)) == latents * d // 4


def test_what_travels_is_sparse() -> None:
    """Candidates of 8 bytes, gradients of activations of 4, and nothing as wide as a row."""
    n, k, size = 64, 4, 4
    cfg = SaeConfig(num_latents=512, k=k)

    def on_a_rank(group: ThreadGroup) -> tuple[dict[str, int], dict[str, int]]:
        coder = ShardedCoder(group, 32, cfg)
        x = torch.randn(n, 32)
        errors = coder.errors(x, x)
        errors.squared_error.backward()
        by_row = dict(group.received)
        divide_gradients_(coder, torch.tensor(1.0))
        coder.normalize_decoder_()
        return by_row, group.received

    ring = 2 * (size - 1) / size
    for by_row, in_all in on_ranks(size, on_a_rank):
        assert by_row["exchange"] == ring * n * k * 8 and by_row["gather"] == 0
        # The gradient of b_dec, on two ways, and the error itself.
        assert by_row["sum"] == ring * (n * k * 4 + 2 * 32 * 4 + 4)
        assert in_all["sum"] - by_row["sum"] == ring * (2 * 512 * 4 + 4)


def test_no_rows_are_no_error() -> None:
    """Without rows, or with fewer than ranks, errors and gradients are those of one rank."""
    cfg = SaeConfig(num_latents=40, k=5)
    for n in (0, 1, 2):
        x = torch.randn(n, D)
        whole = made(cfg)
        whole.errors(x, x).squared_error.backward()

        def on_a_rank(group: ThreadGroup, x: Tensor = x) -> SparseCoder:
            coder = made(cfg, group)
            coder.errors(x, x).squared_error.backward()
            return coder

        for coder in on_ranks(3, on_a_rank):
            for name, parameter in whole.named_parameters():
                gradient = dict(coder.named_parameters())[name].grad
                assert parameter.grad is not None
                torch.testing.assert_close(gradient, held(coder, name, parameter.grad))


def test_what_cannot_be_shared_is_refused_by_name() -> None:
    """Fewer groups, latents or columns than ranks."""
    for cfg, d, size, what in (
        (SaeConfig(num_latents=40, k=2, activation="groupmax"), 8, 3, "k = 2 groups of latents"),
        (SaeConfig(num_latents=2, k=2), 8, 3, "2 latents"),
        (SaeConfig(num_latents=40, k=2), 2, 3, "2 columns of output"),
    ):
        with pytest.raises(
            UsageError, match=f"--ranks_per_coder .* {size} ranks .*{re.escape(what)}"
        ):
            on_ranks(size, lambda group, d=d, cfg=cfg: ShardedCoder(group, d, cfg))


def test_parts_are_not_rounded_in_blocks() -> None:
    """--adam_8bit, whose blocks would be others than those of a whole coder, is refused."""
    cfg = SaeConfig(num_latents=16, k=2)
    with pytest.raises(UsageError, match=r"--adam_8bit True: .* leave it out"):
        on_ranks(
            2, lambda group: coder_optimizer(ShardedCoder(group, 8, cfg), "adam", adam_8bit=True)
        )

"""Layers of a cross-layer transcoder on several ranks: what they send is latents and gradients."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cross_layer_stack import ALPHA, DEAD, NAMES, SCALES, made, rows_of
from torch import Tensor

from sae import TranscoderConfig
from sae.coders.across.cross_layer import CrossLayerTranscoder
from sae.coders.bank import CoderBank
from sae.config import Widths
from sae.training.losses import auxiliary_loss


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


def evaluated(bank: CoderBank, rows: list[tuple[Tensor, Tensor]]) -> None:
    """Every layer's errors, without gradients."""
    with torch.no_grad():
        for name, coder in bank.items():
            coder.errors(*rows[NAMES.index(name)])


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

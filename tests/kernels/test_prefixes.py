"""Reconstructions from prefixes: the twin equals the definition, and decodes every entry once."""

from typing import Any

import pytest
import torch
from kernel_cases import SHAPES, leaves
from torch import Tensor

from sae.coders import functional
from sae.config import KernelChoice
from sae.kernels.entries import Entries
from sae.kernels.twins import Kernels


def ends_of(latents: int) -> tuple[int, ...]:
    """Prefixes of one latent, of none more, of some, and of all."""
    return (1, 1, max(1, latents // 3), latents)


def found(
    ops: Any,
    tensors: list[Tensor],
    k: int,
    activation: str,
    whole: bool,
    uneven: bool,
    alone: bool = False,
) -> list[Tensor]:
    """Errors of all kinds, and the gradients of their sum, each weighed differently."""
    x, W_enc, b_enc, W_dec, bias = moved = [t.detach().clone().requires_grad_() for t in tensors]
    dead = torch.arange(0, len(W_enc), 2)
    if uneven:
        groups = [len(rows) for rows in x.split(4) if len(rows)]
        latents, of_dead = ops.encode_in_groups(x, W_enc, b_enc, k, groups, bias, None, dead, 1)
    else:
        arguments = (x, W_enc, b_enc, k, activation, bias, None, dead, 1)
        latents, of_dead = ops.encode_with_dead(*arguments)
    offset = x * 0.3 + bias if whole else bias
    ends = ends_of(len(W_enc))
    made = ops.reconstruct(latents, W_dec, offset, (2 * x + 1).detach(), of_dead, ends, alone)
    weights = torch.tensor([0.7, -0.1, 1.3, 0.4], dtype=x.dtype)
    loss = (made.prefix_errors * weights).sum() + made.dead_error / 32
    if whole:  # as in a loss of the reconstruction itself
        loss = loss + made.squared_error / 3 + made.sae_out.sin().sum()
    loss.backward()
    outputs = (made.sae_out, made.squared_error, made.prefix_errors, made.dead_error)
    return [*(t.detach() for t in outputs), *(t.grad for t in moved)]  # type: ignore[misc]


@pytest.mark.parametrize("choice", ["torch", "auto"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_prefixes_equal_their_definition(
    shape: tuple[Any, ...],
    alone: bool,
    uneven: bool,
    whole: bool,
    dtype: torch.dtype,
    choice: KernelChoice,
) -> None:
    """Errors and all gradients, of as many latents in every row or of numbers of their own."""
    n, d, latents, k, activation = shape
    tensors = [t.to(dtype) for t in leaves(n, d, latents)]
    plain = found(functional, tensors, k, activation, whole, uneven, alone)
    fast = found(Kernels(choice), tensors, k, activation, whole, uneven, alone)
    close = 1e-9 if dtype == torch.float64 else 3e-4
    for ours, expected in zip(fast, plain, strict=True):
        scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
        torch.testing.assert_close(ours, expected, rtol=close, atol=close * scale)


def test_every_entry_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward read as many rows of W_dec as latents are active, for four prefixes."""
    read: dict[str, int] = {"weighted_rows": 0, "sampled_product": 0}
    for name in read:
        plain = getattr(Entries, name)

        def counted(self: Entries, *args: Tensor, name: str = name, plain: Any = plain) -> Tensor:
            read[name] += len(self.indices)
            return plain(self, *args)

        monkeypatch.setattr(Entries, name, counted)
    found(Kernels(), leaves(64, 32, 1031), 7, "topk", False, False)
    assert read == {"weighted_rows": 64 * 7, "sampled_product": 64 * 7}


def test_the_errors_of_prefixes_have_one_gradient() -> None:
    """Its backward runs in place, so a second one is an error, not a wrong number."""
    latents, W = Kernels.Latents(torch.ones(3, 1), torch.zeros(3, 1).long()), torch.randn(4, 5)
    W.requires_grad_()
    arguments = (latents, W, torch.zeros(5), torch.randn(3, 5), None, (2, 4))
    made = Kernels().reconstruct(*arguments)
    assert made.prefix_errors is not None
    made.prefix_errors.sum().backward(retain_graph=True)
    with pytest.raises(AssertionError, match="taken once"):
        made.prefix_errors.sum().backward()

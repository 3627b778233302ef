"""Which kernels run is said and changes no run; an int8 search is what it is defined to be."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from runs import Settings, run, weights
from test_kernels import SHAPES, leaves
from transformers import PreTrainedModel

from sae import UsageError, backend, functional, kernels, native


def test_the_choice_of_kernels_is_said_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch is always there; what is asked for in vain is a readable error, auto does without."""
    cpu = torch.device("cpu")
    assert backend.choose("torch", cpu) == "PyTorch's operators"
    assert backend.choose("auto", cpu).startswith("C" if native.library() else "PyTorch")
    monkeypatch.setattr(native, "library", lambda: None)
    for choice in ("native", "int8"):
        with pytest.raises(UsageError, match=f"--kernels {choice}: needs a C compiler"):
            backend.choose(choice, cpu)
    assert backend.choose("auto", cpu) == "PyTorch's operators"
    monkeypatch.undo()
    backend.choose("torch", cpu)
    monkeypatch.setattr(native, "library", lambda: None)
    with pytest.raises(UsageError):
        backend.choose("int8", cpu)
    assert backend.in_pytorch() and not backend.in_int8()  # what is refused changes nothing
    monkeypatch.undo()
    backend.choose("auto", cpu)


def test_kernels_do_not_change_a_run(
    lm: PreTrainedModel, tokens: torch.Tensor, settings: Settings
) -> None:
    """A run with the selection in C ends where one with PyTorch's operators does."""
    ends: dict[tuple[str, str], Any] = {}
    for precision in ("no", "bf16"):
        for choice in ("torch", "auto"):
            flags = {"kernels": choice, "mixed_precision": precision, "optimizer": "adam"}
            done = run(lm, tokens, settings, run_name=choice + precision, **flags)
            fvu = [figures["fvu"] for figures in done["hookpoints"].values()]
            ends[choice, precision] = weights(done) if precision == "no" else fvu
    backend.choose("auto", torch.device("cpu"))
    for name, tensor in ends["torch", "no"].items():
        torch.testing.assert_close(ends["auto", "no"][name], tensor, rtol=1e-4, atol=1e-5)
    # In bfloat16 many latents tie, and any of them is as large.
    found = [ends[choice, "bf16"] for choice in ("torch", "auto")]
    for plain, fast in zip(*found, strict=True):
        assert fast == pytest.approx(plain, rel=0.02)


@pytest.fixture
def in_int8() -> Iterator[None]:
    """Kernels that search in int8, where the processor can."""
    try:
        backend.choose("int8", torch.device("cpu"))
    except UsageError as error:
        pytest.skip(str(error))
    yield
    backend.choose("auto", torch.device("cpu"))


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[4] == "topk" and s[0]])
def test_int8_search_is_its_definition(in_int8: None, shape: tuple) -> None:
    """Candidates are those that rank highest in int8, their activations exact; so are gradients."""
    n, d, latents, k, _ = shape
    x, W_enc, b_enc, W_dec, pre_bias = (
        t.detach().float().requires_grad_() for t in leaves(n, d, latents)
    )
    acts, indices = kernels.encode(x, W_enc, b_enc, k, "topk", pre_bias)
    plain_acts, plain_indices = functional.encode_in_int8(x, W_enc, b_enc, k, pre_bias)
    torch.testing.assert_close(acts.sort(1).values, plain_acts.sort(1).values, rtol=1e-4, atol=1e-4)
    assert torch.equal(indices.sort(1).values, plain_indices.sort(1).values)
    found = []
    for a, i in ((acts, indices), (plain_acts, plain_indices)):
        leaf = [x, W_enc, b_enc, W_dec, pre_bias]
        loss = functional.decode(a, i, W_dec).cos().sum()
        found.append(torch.autograd.grad(loss, leaf))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3)


def test_int8_search_finds_auxks_latents(in_int8: None) -> None:
    """Among the dead the ones that rank highest in int8 are taken, with exact activations."""
    x, W_enc, b_enc, _, _ = (t.detach().float() for t in leaves(64, 32, 1031))
    dead = torch.arange(0, 1031, 3)
    *_, acts, indices = kernels.encode_with_dead(x, W_enc, b_enc, 7, "topk", None, None, dead, 16)
    plain = functional.encode_in_int8(x, W_enc[dead], b_enc[dead], 16, candidates=1)
    torch.testing.assert_close(acts.sort(1).values, plain[0].sort(1).values, rtol=1e-4, atol=1e-4)
    assert torch.equal(indices.sort(1).values, dead[plain[1]].sort(1).values)


def test_int8_search_trains_as_well(
    in_int8: None, lm: PreTrainedModel, tokens: torch.Tensor, settings: Settings
) -> None:
    """A run that searches in int8 ends with the held-out FVU of one that does not."""
    fvu = {}
    for choice in ("auto", "int8"):
        done = run(lm, tokens, settings, run_name=choice, kernels=choice, optimizer="adam")
        fvu[choice] = [figures["fvu"] for figures in done["hookpoints"].values()]
    assert fvu["int8"] == pytest.approx(fvu["auto"], rel=2e-3)
    assert fvu["int8"] != fvu["auto"]

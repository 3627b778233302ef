"""Which kernels run is said and changes no run; an int8 search is what it is defined to be."""

from typing import Any

import pytest
import torch
from kernel_cases import SHAPES, leaves
from training_runs import Settings, run, weights
from transformers import PreTrainedModel

from sae import UsageError
from sae.coders import functional
from sae.kernels.backend import Backend
from sae.kernels.cpu import compiled
from sae.kernels.twins import Kernels

CPU = torch.device("cpu")


def test_kernels_are_described_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch can always be had; a choice that cannot is a UsageError; auto does without C."""
    assert Kernels("torch").describe(CPU) == "PyTorch's operators"
    on_gpu = Kernels("auto").describe(torch.device("cuda"))
    assert on_gpu == "Triton, and cuBLAS for the encoder's product"
    in_words = Kernels("auto").describe(CPU)
    assert in_words.startswith("C" if compiled.library() else "PyTorch")
    monkeypatch.setattr(compiled, "library", lambda: None)
    for choice in ("native", "int8"):
        with pytest.raises(UsageError, match=f"--kernels {choice}: needs a C compiler"):
            Kernels(choice).describe(CPU)
    assert Kernels("auto").describe(CPU) == "PyTorch's operators"


def test_a_backend_uses_c_where_its_choice_and_the_tensors_allow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch never does; the others do for float32, a table also bfloat16, given a compiler."""
    single, double = torch.zeros(2), torch.zeros(2, dtype=torch.float64)
    for choice in ("auto", "native", "int8"):
        backend = Backend(choice)
        assert backend.in_c(single) == (compiled.library() is not None)
        assert backend.in_c(single, table=single.bfloat16()) == backend.in_c(single)
        assert not backend.in_c(double) and not backend.in_c(single, table=double)
        assert backend.in_int8 == (choice == "int8")
    assert not Backend("torch").in_c(single) and not Backend("torch").in_int8
    assert not any(Backend(choice).in_triton(CPU) for choice in ("auto", "torch", "native"))
    monkeypatch.setattr(compiled, "library", lambda: None)
    assert not Backend("auto").in_c(single)


def test_kernels_do_not_change_a_run(
    lm: PreTrainedModel, tokens: torch.Tensor, settings: Settings
) -> None:
    """A run with the selection in C ends where one with PyTorch's operators does."""
    ends: dict[tuple[str, str], Any] = {}
    for precision in ("no", "bf16"):
        for choice in ("torch", "auto"):
            flags = {"kernels": choice, "mixed_precision": precision, "lr": 2e-3}
            done = run(lm, tokens, settings, run_name=choice + precision, **flags)
            fvu = [figures["fvu"] for figures in done["hookpoints"].values()]
            ends[choice, precision] = weights(done) if precision == "no" else fvu
    for name, tensor in ends["torch", "no"].items():
        torch.testing.assert_close(ends["auto", "no"][name], tensor, rtol=1e-4, atol=1e-5)
    # In bfloat16 many latents tie, and any of them is as large.
    found = [ends[choice, "bf16"] for choice in ("torch", "auto")]
    for plain, fast in zip(*found, strict=True):
        assert fast == pytest.approx(plain, rel=0.02)


@pytest.fixture
def in_int8() -> Kernels:
    """Kernels that search in int8, where the processor can."""
    kernels = Kernels("int8")
    try:
        kernels.describe(CPU)
    except UsageError as error:
        pytest.skip(str(error))
    return kernels


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[4] == "topk" and s[0]])
def test_int8_search_equals_its_definition(in_int8: Kernels, shape: tuple) -> None:
    """Candidates are those that rank highest in int8, their activations exact; so are gradients."""
    n, d, latents, k, _ = shape
    x, W_enc, b_enc, W_dec, pre_bias = (
        t.detach().float().requires_grad_() for t in leaves(n, d, latents)
    )
    fast = in_int8.encode(x, W_enc, b_enc, k, "topk", pre_bias)
    plain = functional.encode_in_int8(x, W_enc, b_enc, k, pre_bias)
    torch.testing.assert_close(
        fast.acts.sort(1).values, plain.acts.sort(1).values, rtol=1e-4, atol=1e-4
    )
    assert torch.equal(fast.indices.sort(1).values, plain.indices.sort(1).values)
    found = []
    for acts, indices in (fast[:2], plain):
        leaf = [x, W_enc, b_enc, W_dec, pre_bias]
        loss = functional.decode(functional.Latents(acts, indices), W_dec).cos().sum()
        found.append(torch.autograd.grad(loss, leaf))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


def test_int8_search_finds_the_latents_of_auxk(in_int8: Kernels) -> None:
    """Among the dead the ones that rank highest in int8 are taken, with exact activations."""
    x, W_enc, b_enc, _, _ = (t.detach().float() for t in leaves(64, 32, 1031))
    dead = torch.arange(0, 1031, 3)
    _, of_dead = in_int8.encode_with_dead(x, W_enc, b_enc, 7, "topk", None, None, dead, 16)
    plain = functional.encode_in_int8(x, W_enc[dead], b_enc[dead], 16, candidates=1)
    torch.testing.assert_close(
        of_dead.acts.sort(1).values, plain.acts.sort(1).values, rtol=1e-4, atol=1e-4
    )
    assert torch.equal(of_dead.indices.sort(1).values, dead[plain.indices].sort(1).values)


def test_a_run_that_searches_in_int8_reaches_the_same_fvu(
    in_int8: Kernels, lm: PreTrainedModel, tokens: torch.Tensor, settings: Settings
) -> None:
    """The held-out FVU is within 0.2 % of that of a run that does not, and is not the same."""
    fvu = {}
    for choice in ("auto", "int8"):
        done = run(lm, tokens, settings, run_name=choice, kernels=choice, lr=2e-3)
        fvu[choice] = [figures["fvu"] for figures in done["hookpoints"].values()]
    assert fvu["int8"] == pytest.approx(fvu["auto"], rel=2e-3)
    assert fvu["int8"] != fvu["auto"]

"""Linear layers run in oneDNN where that is faster, and compute the same but for rounding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_lms import LLAMA, TOKENS, make
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sae.lm import linear
from sae.lm.capture import Capture
from sae.lm.linear import fast_linear_layers

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="PyTorch without oneDNN"
)


class OneDnn(TorchDispatchMode):
    """Counts products that oneDNN was asked for by name."""

    products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += func is torch.ops.mkldnn._linear_pointwise.default
        return func(*args, **(kwargs or {}))


def test_linear_layers_compute_the_same_where_they_are_fast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """oneDNN's products are MKL's but for rounding; gradients and other types stay PyTorch's.

    They are used where the processor is AMD's and PyTorch's own operators were not asked for.
    """
    lm = make(LLAMA, tmp_path)
    x, layers = torch.randn(5, 7, 6), [nn.Linear(6, 9, bias=bias) for bias in (True, False)]
    half = nn.Linear(6, 9, dtype=torch.bfloat16)
    found = []
    for slow in (False, True):
        monkeypatch.setattr(linear, "mkl_is_slow", lambda slow=slow: slow)
        with OneDnn() as seen, fast_linear_layers() as mode, torch.no_grad():
            assert (mode is not None) == slow
            out = [layer(x) for layer in layers]
            assert seen.products == 2 * slow
            out += [layers[0](x[:0]), half(x.bfloat16())]
            captured = Capture(lm, ["layers.1"], fast_linear=True)(TOKENS)["layers.1"]
            assert seen.products == (2 + 7 + 7) * slow  # seven linear layers in a block
        with OneDnn() as seen, fast_linear_layers():
            (gradient,) = torch.autograd.grad(layers[0](x).sum(), layers[0].weight)
            assert seen.products == 0
        found.append([*out, gradient, *captured])
    for plain, fast in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-5)
    with OneDnn() as seen:
        Capture(lm, ["layers.1"], fast_linear=False)(TOKENS)
        assert seen.products == 0

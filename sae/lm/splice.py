"""The LM with something else in place of its activations."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from .capture import first_tensor, kept_tokens

_OUTPUTS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()

Replacement = Callable[[Float[Tensor, "N D"], Float[Tensor, "N D_out"] | None], Tensor]
"""(input rows, output rows or None) of a hookpoint -> rows to go on with."""


@contextmanager
def spliced(
    lm: PreTrainedModel,
    replace: dict[str, Replacement],
    tokens: Int[Tensor, "B S"],
    exclude_tokens: tuple[int, ...] = (),
    *,
    run_modules: bool = True,
) -> Iterator[None]:
    """Inside, the LM reads `tokens` with the output of every named module replaced.

    Rows of excluded tokens stay what they are. Without `run_modules` a module does not run at all
    and gets no output rows, unless excluded tokens need them. Afterwards the LM is whole again.
    """
    kept = kept_tokens(tokens, exclude_tokens)
    if kept is not None and bool(kept.all()):
        kept = None
    modules = dict(lm.base_model.named_modules())
    with ExitStack() as stack:
        for name, function in replace.items():
            module = modules[name]
            whole = _whole_output(lm, module, tokens) if not run_modules and kept is None else None
            stack.enter_context(computing(module, _replaced(module, function, kept, whole)))
        yield


def _replaced(
    module: nn.Module, function: Replacement, kept: Tensor | None, whole: Any
) -> Callable[..., Any]:
    """A forward of `module` with its output replaced; `whole` is a sample where it need not run."""
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs) if whole is None else whole
        y = first_tensor(output)
        x = first_tensor((args, kwargs))
        assert y is not None, "a hookpoint returns a tensor"
        rows = None if whole is not None else y.reshape(-1, y.shape[-1])
        x_rows = rows if x is None else x.reshape(-1, x.shape[-1])
        assert x_rows is not None, "a module that does not run has an input"
        shape = (*(y if x is None else x).shape[:-1], y.shape[-1])
        if kept is None:
            out = function(x_rows, rows).to(y.dtype)
        else:
            assert rows is not None
            mask = kept.flatten()
            out = rows.masked_scatter(
                mask.unsqueeze(1), function(x_rows[mask], rows[mask]).to(y.dtype)
            )
        return with_first_tensor(output, out.view(shape))

    return forward


@contextmanager
def computing(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, the module computes `forward`."""
    module.forward = forward  # type: ignore[method-assign]  # for one call
    try:
        yield
    finally:
        del module.forward


def _whole_output(lm: PreTrainedModel, module: nn.Module, tokens: Tensor) -> Any:
    """What a module returns, for its structure: a tensor alone, or among others."""
    if module not in _OUTPUTS:
        seen: list[Any] = []
        handle = module.register_forward_hook(lambda m, a, output: seen.append(output))
        with torch.no_grad():
            lm.base_model(input_ids=tokens[:1, :2])
        handle.remove()
        _OUTPUTS[module] = seen[0]
    return _OUTPUTS[module]


def with_first_tensor(output: Any, tensor: Tensor) -> Any:
    """A module's output with another tensor in place of its first one."""
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, dict):
        first = next(key for key, value in output.items() if isinstance(value, Tensor))
        output[first] = tensor
        return output
    first = next(i for i, value in enumerate(output) if isinstance(value, Tensor))
    return type(output)((*output[:first], tensor, *output[first + 1 :]))

"""The LM with something else in place of its activations."""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..batch import TokenBatch
from .hookpoints import Place, parse
from .rows import Kept, RowRule, first_tensor

_OUTPUTS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()

Replacement = Callable[[Float[Tensor, "N D"], Float[Tensor, "N D_out"] | None], Tensor]
"""(input rows, output rows or None) of a hookpoint -> rows to go on with."""


@contextmanager
def spliced(
    lm: PreTrainedModel,
    replace: dict[str, Replacement],
    tokens: TokenBatch | Int[Tensor, "B S"],
    rule: RowRule | None = None,
    *,
    run_modules: bool = True,
) -> Iterator[None]:
    """Inside, the LM reads `tokens` with the rows of every hookpoint replaced.

    Tokens that `rule` counts out keep what they have. Without `run_modules` a module does not run
    at all and gets no output rows, unless `rule` can count tokens out, which would need them; where
    masks may, modules must run. Afterwards the LM is whole again.
    """
    batch, rule = TokenBatch.of(tokens), rule or RowRule()
    # Whether modules run is up to flags and the data, not to which tokens a batch happens to hold:
    # ranks that ran other modules would have other sums.
    run_modules = run_modules or rule.counts_out
    kept = rule.kept(batch)
    assert run_modules or kept is None, "data with masks needs the rows that its modules give"
    modules = dict(lm.base_model.named_modules())
    samples: dict[str, Any] = {}  # made before anything is replaced
    for name in () if run_modules else replace:
        if parse(name) == Place(name) and name not in rule.norm_limits:
            samples[name] = _whole_output(lm, modules[name], batch)
    with ExitStack() as stack:
        for name, function in replace.items():
            place = parse(name)
            new = partial(_with_new_rows, rule, name, function, batch, kept)
            forward = _replaced(modules[place.module], place.enters, new, samples.get(name))
            stack.enter_context(computing(modules[place.module], forward))
        yield


def _with_new_rows(
    rule: RowRule,
    name: str,
    function: Replacement,
    batch: TokenBatch,
    kept: Kept | None,
    x: Tensor | None,
    y: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """What a hookpoint passes on, with its rows replaced; `y` is None of a module that waits."""
    rows = None if y is None else rule.flat(name, "output", y, batch)
    is_whole_module = parse(name) == Place(name)
    x_rows = rows if x is None or not is_whole_module else rule.flat(name, "input", x, batch)
    like = x if y is None else y
    assert x_rows is not None and like is not None, "a module that does not run has an input"
    chosen = kept if rows is None else rule.fitting(name, rows, kept)
    if chosen is None:
        return rule.put(name, like, function(x_rows, rows).to(dtype), batch)
    assert rows is not None, "tokens that are no rows keep what they have"
    new = function(x_rows[chosen.numbers], rows[chosen.numbers]).to(dtype)
    return rule.put(name, like, rows.index_copy(0, chosen.numbers, new), batch)


def _replaced(
    module: nn.Module, enters: bool, new: Callable[..., Tensor], whole: Any
) -> Callable[..., Any]:
    """A forward of `module` with what it reads or returns replaced.

    `whole` is a sample of what it returns where it need not run.
    """
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        x = first_tensor((args, kwargs))
        if enters:
            assert x is not None, "a hookpoint passes a tensor"
            args, kwargs = with_first_tensor((args, kwargs), new(x, x, x.dtype))
            return original(*args, **kwargs)
        output = original(*args, **kwargs) if whole is None else whole
        y = first_tensor(output)
        assert y is not None, "a hookpoint passes a tensor"
        return with_first_tensor(output, new(x, None if whole is not None else y, y.dtype))

    return forward


@contextmanager
def computing(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, the module computes `forward`."""
    before = vars(module).get("forward")  # compiled, or replaced at another hookpoint of it
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def _whole_output(lm: PreTrainedModel, module: nn.Module, batch: TokenBatch) -> Any:
    """What a module returns, for its structure: a tensor alone, or among others."""
    if module not in _OUTPUTS:
        seen: list[Any] = []
        handle = module.register_forward_hook(lambda m, a, output: seen.append(output))
        with torch.no_grad():
            lm.base_model(input_ids=batch.ids[:1, :2])
        handle.remove()
        _OUTPUTS[module] = seen[0]
    return _OUTPUTS[module]


def with_first_tensor(value: Any, tensor: Tensor) -> Any:
    """A module's arguments or outputs with another tensor in place of the first one."""
    if isinstance(value, Tensor):
        return tensor
    if isinstance(value, dict):
        found = copy.copy(value)
        key = next(key for key, item in value.items() if first_tensor(item) is not None)
        found[key] = with_first_tensor(value[key], tensor)
        return found
    at = next(i for i, item in enumerate(value) if first_tensor(item) is not None)
    return type(value)((*value[:at], with_first_tensor(value[at], tensor), *value[at + 1 :]))

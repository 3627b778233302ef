"""What flows through the LM at its hookpoints, as rows."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers import PreTrainedModel

from ..config import Widths
from ..flag_checks import UsageError
from .linear import fast_linear_layers

Pairs = dict[str, tuple[Float[Tensor, "N D"], Float[Tensor, "N D_out"]]]
"""Hookpoint -> (input rows, output rows); where inputs are not wanted, both are the output."""


class _LastHookpoint(Exception):
    """Raised by a hook when everything asked for is captured: the rest of the LM need not run."""


@dataclass(frozen=True)
class Capture:
    """Reads token ids with the LM and returns the rows that its hookpoints pass on."""

    lm: PreTrainedModel
    hookpoints: list[str]
    exclude_tokens: tuple[int, ...] = ()
    """Token ids whose rows are left out."""
    inputs: bool = True
    """Whether what enters a module is wanted too."""
    fast_linear: bool = True
    """Whether float32 linear layers may run in another library than PyTorch's choice."""
    sequence_first: frozenset[tuple[str, str]] = frozenset()
    """(hookpoint, "input" or "output") of tensors [S B D]: positions come before sequences."""

    def __call__(self, tokens: Int[Tensor, "B S"]) -> Pairs:
        """One forward of the LM; the rows of every hookpoint, one row per token that is kept.

        Hooks copy what they see, since some LMs go on to write into it; they change nothing. The
        forward stops once the last hookpoint has run, unless the LM is sharded. Raises UsageError
        for a hookpoint that does not run on text or does not give one row per token.
        """
        modules = dict(self.lm.base_model.named_modules())
        kept = kept_tokens(tokens, self.exclude_tokens)
        seen: Pairs = {}
        sharded = is_sharded(self.lm)

        def store(name: str, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            y = first_tensor(output)
            if y is None:
                kind = type(modules[name]).__name__
                raise UsageError(f"hookpoint {name}: {kind} returns no tensor")
            if name in seen:
                raise UsageError(f"hookpoint {name} runs several times in a forward: take it out")
            out = into = self._rows(name, "output", y, tokens, kept)
            if self.inputs:
                x = first_tensor((args, kwargs))  # an embedding takes token ids: no activations
                into = self._rows(name, "input", y[..., :0] if x is None else x, tokens, kept)
            seen[name] = (into, out)
            # A forward cut short would leave shards gathered.
            if len(seen) == len(self.hookpoints) and not sharded:
                raise _LastHookpoint

        fast = fast_linear_layers() if self.fast_linear else nullcontext()
        stops = suppress(_LastHookpoint)
        with _hooks(modules, self.hookpoints, store), torch.no_grad(), stops, fast:
            self.lm.base_model(input_ids=tokens)
        if absent := [name for name in self.hookpoints if name not in seen]:
            raise UsageError(
                f"hookpoint {absent[0]} does not run when {type(self.lm).__name__} reads text: "
                f"take it out of --hookpoints"
            )
        return {name: seen[name] for name in self.hookpoints}

    def _rows(
        self, name: str, part: str, tensor: Tensor, tokens: Tensor, kept: Tensor | None
    ) -> Float[Tensor, "N D"]:
        if (name, part) in self.sequence_first:
            tensor = tensor.transpose(0, 1)
        if tensor.ndim < 2 or tensor.shape[:-1].numel() != tokens.numel():
            raise UsageError(
                f"hookpoint {name} passes a tensor of shape {tuple(tensor.shape)}, which is not "
                f"one row per token ({tuple(tokens.shape)}): take it out of --hookpoints"
            )
        rows = tensor.detach().reshape(tokens.numel(), tensor.shape[-1])
        return rows.clone() if kept is None else rows[kept.flatten()]


def count_rows(pairs: Pairs) -> int:
    """Rows of each hookpoint, which all have as many."""
    return len(next(output for _, output in pairs.values()))


def measure_widths(
    lm: PreTrainedModel, hookpoints: Iterable[str], device: str | torch.device | None = None
) -> dict[str, Widths]:
    """The widths at each hookpoint, by one forward of eight tokens.

    An LM without weights is run on shapes alone.
    """
    tokens = torch.zeros(1, 8, dtype=torch.int64, device=device or lm.device)
    on_shapes = FakeTensorMode(allow_non_fake_inputs=True) if tokens.is_meta else nullcontext()
    modules, names = dict(lm.base_model.named_modules()), list(hookpoints)
    widths: dict[str, Widths] = {}

    def store(name: str, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        x, y = first_tensor((args, kwargs)), first_tensor(output)
        if y is None or not y.ndim:
            return
        # Of one sequence only its positions may be left; some LMs pad it.
        if len([size for size in y.shape[:-1] if size != 1]) > 1:
            raise UsageError(
                f"hookpoint {name} passes a tensor of shape {tuple(y.shape)}, which is not one row "
                f"per token ({tuple(tokens.shape)}): take it out of --hookpoints"
            )
        widths[name] = Widths(x.shape[-1] if x is not None and x.ndim else 0, y.shape[-1])

    with on_shapes, reading_text(lm), _hooks(modules, names, store), torch.no_grad():
        lm.base_model(input_ids=tokens)
    if absent := [name for name in names if name not in widths]:
        raise UsageError(
            f"hookpoint {absent[0]} does not run when {type(lm).__name__} reads text, or returns "
            f"no tensor: take it out of --hookpoints"
        )
    return {name: widths[name] for name in names}


@contextmanager
def reading_text(lm: PreTrainedModel) -> Iterator[None]:
    """Inside, an LM that fails on a few tokens is a UsageError."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"MODEL: {type(lm).__name__} cannot read text. {reason}") from None


def is_sharded(lm: PreTrainedModel) -> bool:
    """Whether every rank holds a part of every weight (ZeRO-3)."""
    return hasattr(next(lm.parameters()), "ds_id")


def kept_tokens(
    tokens: Int[Tensor, "B S"], exclude_tokens: tuple[int, ...]
) -> Bool[Tensor, "B S"] | None:
    """Which tokens have rows; None where nothing is excluded."""
    return ~torch.isin(tokens, tokens.new_tensor(exclude_tokens)) if exclude_tokens else None


@contextmanager
def _hooks(modules: dict[str, nn.Module], names: list[str], store: Any) -> Iterator[None]:
    """Inside, `store(name, args, kwargs, output)` is called after each named module."""
    with ExitStack() as stack:
        for name in names:

            def hook(module: Any, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                store(name, args, kwargs, output)

            handle = modules[name].register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def first_tensor(value: Any) -> Tensor | None:
    """The first floating-point tensor in a module's arguments or outputs."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        for item in value:
            found = first_tensor(item)
            if found is not None:
                return found
    return None

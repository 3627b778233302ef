"""What flows through the LM at its hookpoints, as rows."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from transformers import PreTrainedModel

from ..batch import TokenBatch
from ..config import Widths
from ..flag_checks import UsageError
from .hookpoints import attention_heads, parse, text_config
from .linear import fast_linear_layers
from .rows import HookpointRows, RowRule, at_hookpoint, not_rows, one_head, split_heads

Pairs = dict[str, tuple[Float[Tensor, "N D"], Float[Tensor, "N D_out"]]]
"""Hookpoint -> (input rows, output rows); where inputs are not wanted, both are the output."""


class RowReader(Protocol):
    """What turns a batch into rows: the LM, or a place where they lie already."""

    @property
    def lm(self) -> PreTrainedModel | None: ...

    @property
    def hookpoints(self) -> list[str]: ...

    @property
    def rule(self) -> RowRule: ...

    def __call__(self, batch: TokenBatch, /) -> Pairs: ...

    def find(self, batch: TokenBatch, /) -> dict[str, HookpointRows]: ...

    def with_rule(self, rule: RowRule) -> "RowReader": ...


class _LastHookpoint(Exception):
    """Raised by a hook when everything asked for is captured: the rest of the LM need not run."""


@dataclass(frozen=True)
class Capture:
    """Reads token ids with the LM and returns the rows that its hookpoints pass on."""

    lm: PreTrainedModel
    hookpoints: list[str]
    rule: RowRule = field(default_factory=RowRule)
    """Which tokens are rows."""
    inputs: bool = True
    """Whether what enters a module is wanted too."""
    fast_linear: bool = True
    """Whether float32 linear layers may run in another library than PyTorch's choice."""

    def __call__(self, tokens: TokenBatch | Int[Tensor, "B S"]) -> Pairs:
        """One forward of the LM; the rows of every hookpoint, one row per token that is kept.

        Raises UsageError for a hookpoint that does not run on text or does not give one row per
        token.
        """
        return {name: (found.x, found.y) for name, found in self.find(tokens).items()}

    def with_rule(self, rule: RowRule) -> "Capture":
        """The same rows under another rule."""
        return replace(self, rule=rule)

    def find(self, tokens: TokenBatch | Int[Tensor, "B S"]) -> dict[str, HookpointRows]:
        """The rows of every hookpoint, and the tokens that they belong to.

        Hooks copy what they see, since some LMs go on to write into it; they change nothing. The
        forward stops once the last hookpoint has run, unless the LM is sharded.
        """
        batch = TokenBatch.of(tokens)
        modules = dict(self.lm.base_model.named_modules())
        kept = self.rule.kept(batch)
        seen: dict[str, HookpointRows] = {}
        sharded = is_sharded(self.lm)

        def store(name: str, args: Any, kwargs: dict[str, Any], output: Any) -> None:
            x, y = at_hookpoint(name, (args, kwargs), output)
            if y is None:
                kind = type(modules[parse(name).module]).__name__
                raise UsageError(f"hookpoint {name}: {kind} passes no tensor")
            if name in seen:
                raise UsageError(f"hookpoint {name} runs several times in a forward: take it out")
            seen[name] = self.rule.find(name, x, y, batch, kept, self.inputs)
            # A forward cut short would leave shards gathered.
            if len(seen) == len(self.hookpoints) and not sharded:
                raise _LastHookpoint

        on_cpu = batch.ids.device.type == "cpu"
        fast = fast_linear_layers() if self.fast_linear and on_cpu else nullcontext()
        stops = suppress(_LastHookpoint)
        with _hooks(modules, self.hookpoints, store), torch.no_grad(), stops, fast:
            self.lm.base_model(**lm_inputs(batch))
        if absent := [name for name in self.hookpoints if name not in seen]:
            raise UsageError(
                f"hookpoint {absent[0]} does not run when {type(self.lm).__name__} reads text: "
                f"take it out of --hookpoints"
            )
        return self.rule.leave_out_long({name: seen[name] for name in self.hookpoints})


def lm_inputs(batch: TokenBatch) -> dict[str, Tensor]:
    """What the LM is given: ids, and a mask where there is padding."""
    if batch.attended is None:
        return {"input_ids": batch.ids}
    return {"input_ids": batch.ids, "attention_mask": batch.attended.long()}


def count_rows(pairs: Pairs) -> dict[str, int]:
    """Rows of each hookpoint."""
    return {name: len(y) for name, (_, y) in pairs.items()}


def each_once(pairs: Pairs) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """The rows of each hookpoint in order; they leave `pairs` as they are handed out."""
    for name in list(pairs):
        yield name, pairs.pop(name)


def in_pieces(
    x: Float[Tensor, "N D"], y: Float[Tensor, "N D_out"], count: int, groups: list[int] | None
) -> Iterator[tuple[Tensor, Tensor, list[int] | None]]:
    """Both cut into `count` pieces; where they are one tensor, so is each piece.

    `groups`, how many neighbouring rows belong together, are not cut: each piece has its own.
    """
    each = max(1, -(-len(y if groups is None else groups) // count))
    cut: Iterable[list[int] | None] = repeat(None)
    sizes: int | list[int] = each
    if groups is not None:
        cut = [groups[start : start + each] for start in range(0, len(groups), each)]
        sizes = [sum(piece) for piece in cut]
    for piece, x_rows, y_rows in zip(cut, x.split(sizes), y.split(sizes), strict=False):
        yield (y_rows if x is y else x_rows), y_rows, piece


def measure_widths(
    lm: PreTrainedModel, hookpoints: Iterable[str], device: str | torch.device | None = None
) -> dict[str, Widths]:
    """The widths at each hookpoint, by one forward of eight tokens.

    An LM without weights is run on shapes alone.
    """
    tokens = some_tokens(lm, 1, 8, device)
    on_shapes = FakeTensorMode(allow_non_fake_inputs=True) if tokens.is_meta else nullcontext()
    modules, names = dict(lm.base_model.named_modules()), list(hookpoints)
    widths: dict[str, Widths] = {}

    heads = attention_heads(lm)

    def store(name: str, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        x, y = at_hookpoint(name, (args, kwargs), output)
        if y is None or not y.ndim:
            return
        if parse(name).head is not None:
            y = one_head(name, y, heads)
        # Of one sequence only its positions may be left; some LMs pad it.
        if len([size for size in y.shape[:-1] if size != 1]) > 1:
            raise not_rows(name, y, tokens)
        widths[name] = Widths(x.shape[-1] if x is not None and x.ndim else 0, y.shape[-1])

    with on_shapes, reading_text(lm), _hooks(modules, names, store), torch.no_grad():
        lm.base_model(input_ids=tokens)
    if absent := [name for name in names if name not in widths]:
        raise UsageError(
            f"hookpoint {absent[0]} does not run when {type(lm).__name__} reads text, or returns "
            f"no tensor: take it out of --hookpoints"
        )
    return {name: widths[name] for name in names}


def by_head(lm: PreTrainedModel, hookpoints: list[str]) -> list[str]:
    """A hookpoint for every head of each of the hookpoints, by one forward.

    Raises UsageError for one whose module does not pass [B S H D], nor the input of one width that
    is made of the LM's heads.
    """
    tokens = some_tokens(lm, 1, 11)  # as many as an LM has of no heads
    on_shapes = FakeTensorMode(allow_non_fake_inputs=True) if tokens.is_meta else nullcontext()
    modules, heads = dict(lm.base_model.named_modules()), attention_heads(lm)
    found: dict[str, int] = {}

    def store(name: str, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        _, y = at_hookpoint(name, (args, kwargs), output)
        if y is None:
            return
        split = split_heads(name, y, heads)
        if split.shape[:-2].numel() != tokens.numel():
            raise UsageError(
                f"--per_head: {name} passes a tensor of shape {tuple(y.shape)} for "
                f"{tokens.numel()} tokens, which is not [B S H D]: take it out of --hookpoints"
            )
        found[name] = split.shape[-2]

    with on_shapes, reading_text(lm), _hooks(modules, hookpoints, store), torch.no_grad():
        lm.base_model(input_ids=tokens)
    return [f"{name}:head{i}" for name in hookpoints for i in range(found.get(name, 0))]


def some_tokens(
    lm: PreTrainedModel, sequences: int, length: int, device: str | torch.device | None = None
) -> Int[Tensor, "B S"]:
    """Ids that differ, to try an LM with; none is its padding, which some LMs look for."""
    vocabulary = getattr(lm.get_input_embeddings(), "num_embeddings", 1)
    numbers = torch.arange(sequences * length, device=device or lm.device).view(sequences, length)
    ids = (7 * numbers + 11) % vocabulary
    padding = getattr(text_config(lm.config), "pad_token_id", None)
    if not isinstance(padding, int):
        return ids
    return torch.where(ids == padding, (ids + 1) % vocabulary, ids)


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


@contextmanager
def _hooks(modules: dict[str, nn.Module], names: list[str], store: Any) -> Iterator[None]:
    """Inside, `store(name, args, kwargs, output)` is called after each named module."""
    with ExitStack() as stack:
        for name in names:

            def hook(module: Any, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                store(name, args, kwargs, output)

            handle = modules[parse(name).module].register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield

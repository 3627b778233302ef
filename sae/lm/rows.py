"""Rows: which tokens have one at a hookpoint, and how they lie in what its module passes on."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..batch import TokenBatch, copied
from ..flag_checks import UsageError
from .hookpoints import parse

# The linear layer behind the heads, by the names that it has; an MLP's can be called the same.
_JOINS_HEADS = re.compile(
    r"(attn|attention)([\w.]*\.)?(o|wo|o_proj|out_proj|c_proj|dense|out_lin|out)$", re.IGNORECASE
)


class Kept(NamedTuple):
    """The tokens of a batch that have rows."""

    mask: Bool[Tensor, " B*S"]
    """Which they are."""
    numbers: Int[Tensor, " N"]
    """Where they are, in order: indexing by the mask would ask a GPU how many they are."""


class HookpointRows(NamedTuple):
    """The rows of a hookpoint in one forward."""

    x: Float[Tensor, "N D"]
    """What enters; where that is not wanted, what leaves."""

    y: Float[Tensor, "N D_out"]
    """What leaves, or, of a `:input` hookpoint, what enters."""

    kept: Bool[Tensor, " B*S"] | None
    """Of all tokens those that have a row; None: all of them."""


@dataclass(frozen=True)
class RowRule:
    """Which tokens are rows, here and wherever the rows are put back into the LM."""

    exclude_tokens: tuple[int, ...] = ()
    """Token ids without rows."""
    exclude_positions: int = 0
    """Tokens at the start of every sequence without rows."""
    norm_limits: Mapping[str, float] = field(default_factory=dict)
    """Hookpoint -> the length above which a row is left out."""
    sequence_first: frozenset[tuple[str, str]] = frozenset()
    """(hookpoint, "input" or "output") of tensors [S B D]: positions come before sequences."""
    heads: int = 1
    """Attention heads that a width is made of where a module does not show them."""

    @property
    def counts_out(self) -> bool:
        """Whether tokens may be left out, whatever a batch happens to hold."""
        return bool(self.exclude_tokens or self.exclude_positions)

    def kept(self, batch: TokenBatch) -> Kept | None:
        """Which tokens have rows, but for those too long; None for all of them."""
        host = batch.on_host
        kept = host.rows()
        if self.exclude_tokens:
            excluded = torch.isin(host.ids, host.ids.new_tensor(self.exclude_tokens))
            kept = ~excluded if kept is None else kept & ~excluded
        if self.exclude_positions:
            later = self._later(host)
            kept = later if kept is None else kept & later
        if kept is None:
            return None
        mask, device = kept.flatten(), batch.ids.device
        return Kept(copied(mask, device), copied(mask.nonzero().squeeze(1), device))

    def _later(self, batch: TokenBatch) -> Bool[Tensor, "B S"]:
        """Tokens behind the first `exclude_positions` of their sequence; padding has no place."""
        read = torch.ones_like(batch.ids) if batch.attended is None else batch.attended.long()
        return read.cumsum(1) > self.exclude_positions

    def find(
        self,
        hookpoint: str,
        entering: Tensor | None,
        leaving: Tensor,
        batch: TokenBatch,
        kept: Kept | None,
        inputs: bool,
    ) -> HookpointRows:
        """The rows of a hookpoint among what its module reads and returns, long ones among them.

        `kept` is that of the batch. Raises UsageError for what is not one row per token.
        """
        y = self.flat(hookpoint, "output", leaving, batch)
        x = y
        if inputs:  # an embedding takes token ids: no activations
            x = leaving[..., :0] if entering is None else entering
            x = self.flat(hookpoint, "input", x, batch)
        if kept is None:
            y_rows = y.clone()
            return HookpointRows(x.clone() if inputs else y_rows, y_rows, None)
        y_rows = y[kept.numbers]
        return HookpointRows(x[kept.numbers] if inputs else y_rows, y_rows, kept.mask)

    def leave_out_long(self, found: dict[str, HookpointRows]) -> dict[str, HookpointRows]:
        """The rows without those that are too long.

        A GPU is asked once how many are left at each hookpoint.
        """
        fits = {name: self._fits(name, found[name].y) for name in found if name in self.norm_limits}
        counts = torch.stack([mask.sum() for mask in fits.values()]).tolist() if fits else []
        left = dict(found)
        for (name, mask), count in zip(fits.items(), counts, strict=True):
            x, y, kept = found[name]
            numbers = mask.nonzero_static(size=count).squeeze(1)
            rows = y[numbers]
            whole = mask if kept is None else kept.masked_scatter(kept, mask)
            left[name] = HookpointRows(rows if x is y else x[numbers], rows, whole)
        return left

    def fitting(self, hookpoint: str, y: Float[Tensor, "B*S D"], kept: Kept | None) -> Kept | None:
        """Of the kept tokens those whose row is not too long; a GPU is asked how many they are."""
        if hookpoint not in self.norm_limits:
            return kept
        fits = self._fits(hookpoint, y)
        mask = fits if kept is None else kept.mask & fits
        return Kept(mask, mask.nonzero().squeeze(1))

    def _fits(self, hookpoint: str, y: Float[Tensor, "N D"]) -> Bool[Tensor, " N"]:
        norm = torch.linalg.vector_norm(y.float(), dim=1)
        # What is not finite is for the step to find, and not to be passed over.
        return ~(norm > self.norm_limits[hookpoint]) | norm.isinf()

    def flat(
        self, hookpoint: str, part: str, tensor: Tensor, batch: TokenBatch
    ) -> Float[Tensor, "B*S D"]:
        """A module's tensor as one row per token, in the order of tokens."""
        head, tokens = parse(hookpoint).head, batch.ids
        if part == "output" and head is not None:
            tensor = one_head(hookpoint, tensor, self.heads)
        if (hookpoint, part) in self.sequence_first:
            tensor = tensor.transpose(0, 1)
        if tensor.ndim < 2 or tensor.shape[:-1].numel() != tokens.numel():
            raise not_rows(hookpoint, tensor, tokens)
        return tensor.reshape(tokens.numel(), tensor.shape[-1])

    def put(
        self, hookpoint: str, tensor: Tensor, rows: Float[Tensor, "B*S D"], batch: TokenBatch
    ) -> Tensor:
        """The tensor of a hookpoint with other rows in it, the reverse of `flat`."""
        head = parse(hookpoint).head
        if head is not None:
            heads = split_heads(hookpoint, tensor, self.heads)
            parts = list(heads.unbind(-2))
            parts[head] = self._in_place(hookpoint, parts[head], rows, batch)
            return torch.stack(parts, -2).view(tensor.shape)
        return self._in_place(hookpoint, tensor, rows, batch)

    def _in_place(self, hookpoint: str, tensor: Tensor, rows: Tensor, batch: TokenBatch) -> Tensor:
        if (hookpoint, "output") in self.sequence_first:
            return rows.view(*batch.ids.shape, -1).transpose(0, 1)
        return rows.view(*tensor.shape[:-1], -1)


def not_rows(hookpoint: str, tensor: Tensor, tokens: Int[Tensor, "B S"]) -> UsageError:
    """What to say of a tensor that does not hold one row per token, and what to do instead."""
    way_out = "take it out of --hookpoints"
    if tensor.ndim == 4 and tensor.shape[:2] == tokens.shape:
        way_out += ", or train on each of its heads by --per_head"
    if tensor.ndim == 4 and tensor.shape[1:3] == tokens.shape:
        way_out = (
            f"it holds {len(tensor)} residual streams at once; name a module inside that passes "
            f"one of them, such as its mlp or a norm"
        )
    return UsageError(
        f"hookpoint {hookpoint} passes a tensor of shape {tuple(tensor.shape)}, which is not one "
        f"row per token ({tuple(tokens.shape)}): {way_out}"
    )


def split_heads(hookpoint: str, tensor: Tensor, heads: int) -> Float[Tensor, "*B_S H D"]:
    """A tensor by heads, as its module gives it or, in one width, by the LM's number of heads."""
    if tensor.ndim >= 4:
        return tensor
    module, enters, _ = parse(hookpoint)
    if not (enters and _JOINS_HEADS.search(module)) or tensor.shape[-1] % heads or heads == 1:
        raise UsageError(
            f"--per_head: {hookpoint} passes a tensor of shape {tuple(tensor.shape)}, which is not "
            f"made of heads; name the input of the module behind the heads, as o_proj:input"
        )
    return tensor.unflatten(-1, (heads, -1))


def one_head(hookpoint: str, tensor: Tensor, heads: int) -> Float[Tensor, "*B_S D"]:
    """The head that a hookpoint names."""
    split, head = split_heads(hookpoint, tensor, heads), parse(hookpoint).head
    assert head is not None, "the hookpoint names a head"
    if head >= split.shape[-2]:
        last = split.shape[-2] - 1
        raise UsageError(f"hookpoint {hookpoint}: it has the heads 0 to {last}: name one of them")
    return split[..., head, :]


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


def at_hookpoint(
    hookpoint: str, arguments: Any, output: Any
) -> tuple[Tensor | None, Tensor | None]:
    """What enters and what leaves; of a `:input` hookpoint what enters counts as leaving."""
    entering = first_tensor(arguments)
    return entering, entering if parse(hookpoint).enters else first_tensor(output)


def far_share(y: Float[Tensor, "N D"]) -> float:
    """Share of sum ||y - y_mean||^2 that the 1 % of rows farthest from the mean hold."""
    distance = (y.float() - y.float().mean(0)).square().sum(1).double()
    top = distance.topk(math.ceil(len(y) / 100)).values.sum()
    return float(top / distance.sum()) if len(y) and distance.sum() > 0 else 0.0

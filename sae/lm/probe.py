"""Checks of a loaded LM before hours of training: rows are tokens, and a forward works."""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from ..flag_checks import UsageError
from .capture import Capture, some_tokens
from .hookpoints import attention_heads
from .rows import RowRule
from .trace import check_calls, trace_forward

_SEQUENCES, _LENGTH = 3, 5
"""Different numbers, so that rows in another order are not the same rows by chance."""

_ALIKE = 0.1  # relative difference of two rows that rounding explains
_MOST = 0.75  # share of rows that must be alike: rounding may send a token to another expert


def checked(capture: Capture, ctx_len: int) -> Capture:
    """The capture, with the order of rows that its hookpoints turn out to have.

    Every hookpoint must run once in a forward, and give a sequence in a batch of others the rows
    that it gives it alone; where a module puts positions before sequences, [S B D], its rows are
    brought into order. A forward of `ctx_len` tokens must work. Raises UsageError else.
    """
    lm = capture.lm
    capture = replace(capture, rule=replace(capture.rule, heads=attention_heads(lm)))
    check_calls(lm, capture.hookpoints, trace_forward(lm))
    _check_length(capture, ctx_len)
    whole_rule = RowRule(heads=capture.rule.heads)
    of_all_tokens = replace(capture, rule=whole_rule)
    try:
        sequence_first = _find_sequence_first(of_all_tokens, _LENGTH)
    except UsageError:  # some LMs pad what is shorter than a window
        sequence_first = _find_sequence_first(of_all_tokens, ctx_len)
    return replace(capture, rule=replace(capture.rule, sequence_first=sequence_first))


def _find_sequence_first(capture: Capture, length: int) -> frozenset[tuple[str, str]]:
    """(hookpoint, part) of tensors [S B D]; raises UsageError for rows in no known order."""
    count = _SEQUENCES if length != _SEQUENCES else _SEQUENCES - 1
    tokens = some_tokens(capture.lm, count, length)
    together = capture(tokens)
    alone = [capture(sequence.unsqueeze(0)) for sequence in tokens]
    sequence_first = set()
    for name, pair in together.items():
        for part, rows in zip(("input", "output"), pair, strict=True):
            expected = torch.cat([found[name][part == "output"] for found in alone])
            if _are_alike(rows, expected):
                continue
            transposed = rows.unflatten(0, (length, count)).transpose(0, 1).flatten(0, 1)
            if not _are_alike(transposed, expected):
                raise UsageError(
                    f"hookpoint {name}: its {part} is not one row per token: a sequence has other "
                    f"rows alone than in a batch. Take it out of --hookpoints"
                )
            sequence_first.add((name, part))
    return frozenset(sequence_first)


def _are_alike(rows: Float[Tensor, "N D"], expected: Float[Tensor, "N D"]) -> bool:
    rows, expected = rows.float().nan_to_num(), expected.float().nan_to_num()
    close = (rows - expected).norm(dim=1) <= _ALIKE * expected.norm(dim=1)
    return close.double().mean().item() >= _MOST


def _check_length(capture: Capture, ctx_len: int) -> None:
    tokens = some_tokens(capture.lm, 1, ctx_len)
    try:
        capture(tokens)
    except (RuntimeError, ValueError, IndexError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UsageError(
            f"--ctx_len {ctx_len}: {type(capture.lm).__name__} fails on sequences of that length: "
            f"lower it. {reason}"
        ) from None

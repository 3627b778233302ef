"""What coders start from: the means of the first step's rows."""

from collections.abc import Iterable

from ..batch import TokenBatch
from ..coders.moments import Moments, accumulate
from ..flag_checks import UsageError
from ..lm.capture import RowReader
from ..placement.ranks import Ranks


def first_moments(
    capture: RowReader, batches: Iterable[TokenBatch], ranks: Ranks
) -> tuple[dict[str, Moments], dict[str, Moments]]:
    """Moments of every hookpoint's inputs and of its outputs over all rows of all ranks' batches.

    Raises UsageError where no row is left, or all are equal.
    """
    inputs, outputs = dict[str, Moments](), dict[str, Moments]()
    for tokens in batches:
        for hookpoint, pair in capture(tokens).items():
            for found, rows in zip((inputs, outputs), pair, strict=True):
                accumulate(found, hookpoint, rows)
    ranks.sum_(t for found in (inputs, outputs) for m in found.values() for t in m)
    for hookpoint in outputs:
        for moments in (inputs[hookpoint], outputs[hookpoint]):
            if not moments.total_sq.isfinite():
                raise UsageError(
                    f"MODEL: its activations at {hookpoint} hold NaN or Inf in the first step "
                    f"already: try --mixed_precision no, or another hookpoint"
                )
    if not all(moments.count for moments in outputs.values()):
        some = " ".join(map(str, capture.rule.exclude_tokens[:9]))
        raise UsageError(
            f"--exclude_tokens {some}, --exclude_positions {capture.rule.exclude_positions}, and "
            f"what the data mask, leaves no token of the first step; exclude fewer"
        )
    for hookpoint, moments in outputs.items():
        if moments.count > 1 and not moments.total_variance > 0:
            raise UsageError(
                f"MODEL: its activations at {hookpoint} are equal in all rows of the first step: "
                f"nothing can be learned from them; choose another hookpoint"
            )
    return inputs, outputs

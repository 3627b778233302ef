"""Several LMs that read the same tokens, for a crosscoder that tells what they share."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel

from ..batch import TokenBatch
from ..config import ModelConfig, Widths
from ..flag_checks import UsageError
from .capture import Capture, Pairs, RowReader, is_sharded, measure_widths
from .loading import fetch_weights, find_hookpoints, load_lm, token_limits
from .probe import checked
from .rows import HookpointRows, RowRule


@dataclass(frozen=True)
class Beside:
    """Reads the same tokens with several LMs; hookpoints of all but the first say whose they are.

    `others` are by the name of their LM, as `label` gives it.
    """

    first: RowReader
    others: dict[str, RowReader]

    @property
    def lm(self) -> PreTrainedModel | None:
        """The first LM."""
        return self.first.lm

    @property
    def hookpoints(self) -> list[str]:
        """Those of all."""
        more = (named(h, lm) for lm, other in self.others.items() for h in other.hookpoints)
        return [*self.first.hookpoints, *more]

    @property
    def rule(self) -> RowRule:
        """Which tokens are rows, of every LM the same."""
        return self.first.rule

    def with_rule(self, rule: RowRule) -> "Beside":
        """The same rows under another rule, which each LM reads in its own layout."""
        of_all = {"exclude_tokens": rule.exclude_tokens, "norm_limits": rule.norm_limits}
        of_all["exclude_positions"] = rule.exclude_positions
        others = {n: r.with_rule(replace(r.rule, **of_all)) for n, r in self.others.items()}
        return Beside(self.first.with_rule(rule), others)

    def __call__(self, batch: TokenBatch) -> Pairs:
        """The rows of a batch, of all LMs."""
        return {name: (found.x, found.y) for name, found in self.find(batch).items()}

    def find(self, batch: TokenBatch) -> dict[str, HookpointRows]:
        """The rows of a batch, of all LMs, and the tokens that they belong to."""
        found = dict(self.first.find(batch))
        for lm, other in self.others.items():
            found |= {named(name, lm): rows for name, rows in other.find(batch).items()}
        return found


def named(hookpoint: str, lm: str) -> str:
    """What a hookpoint of another LM than the first is called; `Columns.lm` tells it again."""
    return f"{hookpoint} of {lm}"


def label(lm: str) -> str:
    """The name of an LM without the folders of this machine."""
    return Path(lm).resolve().name if Path(lm).is_dir() else lm


def others_of(cfg: ModelConfig) -> dict[str, ModelConfig]:
    """By name the LMs beside the first. Raises UsageError for two of one name."""
    given = list(dict.fromkeys(cfg.models))
    if own := [lm for lm in given if Path(lm).resolve() == Path(cfg.model).resolve()]:
        raise UsageError(f"--models {own[0]}: is MODEL itself: name the others alone")
    found = {label(lm): replace(cfg, model=lm, models=(), revision=None) for lm in given}
    if len(found) < len(given):
        raise UsageError(f"--models {' '.join(cfg.models)}: two of these folders have one name")
    return found


def read_beside(
    first: RowReader,
    widths: dict[str, Widths],
    cfg: ModelConfig,
    ctx_len: int,
    dtype: torch.dtype,
    main_first: Callable[..., Any],
) -> tuple[RowReader, dict[str, Widths]]:
    """A reader of the first LM and of all that `cfg.models` names, and the widths of all.

    `main_first` calls what downloads on one rank before the others. Raises UsageError for LMs that
    cannot be loaded here, or that read other tokens.
    """
    if not cfg.models:
        return first, widths
    lm = first.lm
    if lm is None or is_sharded(lm):
        what = "rows made elsewhere" if lm is None else "an LM that ranks share"
        raise UsageError(f"--models: do not go with {what}: give the rows of all as activations")
    others: dict[str, RowReader] = {}
    for name, of_other in others_of(cfg).items():
        try:
            skeleton, hookpoints = find_hookpoints(of_other)
            main_first(fetch_weights, of_other, skeleton)
            other = load_lm(of_other, skeleton, hookpoints, dtype, lm.device)
        except UsageError as error:
            raise UsageError(f"--models {of_other.model}: {error}") from None
        _check_tokens(replace(cfg, model=lm.name_or_path or cfg.model), lm, of_other, other)
        rule = RowRule(cfg.exclude_tokens, cfg.exclude_positions)
        capture = checked(Capture(other, hookpoints, rule, inputs=False), ctx_len)
        others[name] = capture
        found = measure_widths(other, hookpoints, lm.device)
        widths = widths | {named(hookpoint, name): width for hookpoint, width in found.items()}
    return Beside(first, others), widths


def _check_tokens(
    cfg: ModelConfig, lm: PreTrainedModel, of_other: ModelConfig, other: PreTrainedModel
) -> None:
    """Raise UsageError unless a token id of the one LM is that of the other."""
    name, other_name = cfg.model, of_other.model
    ids, theirs = token_limits(lm)[0], token_limits(other)[0]
    if theirs < ids:
        raise UsageError(
            f"--models {other_name}: knows {theirs} token ids, and MODEL {name} {ids}: give the "
            f"one with fewer as MODEL"
        )
    words, others = _vocabulary(cfg), _vocabulary(of_other)
    if words and others and words.items() - others.items():
        strange = min(words.items() - others.items(), key=lambda item: item[1])
        raise UsageError(
            f"--models {other_name}: its tokenizer is another: token {strange[1]} of MODEL {name} "
            f"is {strange[0]!r}, and there it is not"
        )


def _vocabulary(cfg: ModelConfig) -> dict[str, int]:
    """Token -> id; nothing where an LM has no tokenizer, as one that was trained on ids."""
    how = {"revision": cfg.revision, "token": cfg.hf_token, "trust_remote_code": False}
    try:
        return AutoTokenizer.from_pretrained(cfg.model, **how).get_vocab()
    except Exception:  # each tokenizer's backend has errors of its own
        return {}

"""Trained coders, with the LM and the data that they are judged on."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar
from tyro.conf import Positional, arg

from .bank import CoderBank
from .blocks import TokenSource, hold_out
from .config import UsageError
from .data import TEXT_FLAGS, load_tokens
from .exchange import Exchange
from .hookpoints import find_hookpoints, load_lm, token_limits
from .launch import on_cpu, working_dtype
from .ranks import Ranks
from .run_folder import read_json
from .sparse_coder import SparseCoder


@dataclass(frozen=True)
class Where:
    """Trained coders and their data; of a run's folder, all but `coders` default to its flags."""

    coders: Annotated[str, Positional, arg(metavar="RUN_OR_PATH_OR_HUB_ID")]
    """A run's folder, a folder of coders, or a Hub id."""
    model: str | None = None
    """Hub id or folder of the language model."""
    dataset: str | None = None
    """Hub id, folder or files of the data, as for training."""
    split: str | None = None
    """Split of the data set; default: train."""
    text_column: str | None = None
    """Column that holds text."""
    ctx_len: int | None = None
    """Tokens per sequence; default: 2048."""
    tokens: int | None = None
    """Tokens to read; default: what the run held out, or the first 131,072."""
    revision: str | None = None
    """Git revision of the model on the Hub."""
    hf_token: str | None = field(default=None, repr=False)
    """Hub token."""

    @property
    def folder(self) -> Path:
        """Where results go: the folder of the coders, or the one at hand for a Hub id."""
        return Path(self.coders) if Path(self.coders).is_dir() else Path()


_DEFAULTS: dict[str, Any] = {
    **{"model": None, "dataset": None, "split": "train", "text_column": "text", "ctx_len": 2048},
    **{"data_args": "", "token_dtype": None, "shuffle_seed": 42, "exclude_tokens": ()},
    **{"data_preprocessing_num_proc": 1, "streaming": False, "max_examples": None},
    **{"eval_tokens": 2**17, "mixed_precision": "auto", "revision": None},
}

_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("ctx_len", "shuffle_seed", "max_examples", "eval_tokens"), (int,)),
    **{"data_preprocessing_num_proc": (int,), "streaming": (bool,)},
    "exclude_tokens": (list, tuple),
}
"""Types of the flags that are not text."""


@dataclass(frozen=True)
class Trained:
    """Coders, the LM with its head, and the token blocks to read; all in one process."""

    lm: PreTrainedModel
    bank: CoderBank
    exchange: Exchange
    source: TokenSource
    blocks: Int[Tensor, " n"]
    flags: dict[str, Any]

    @property
    def exclude_tokens(self) -> tuple[int, ...]:
        """Token ids whose activations the coders never saw."""
        return tuple(self.flags["exclude_tokens"])


def load(where: Where) -> Trained:
    """Load what `where` names. Raises UsageError for what cannot be found or does not fit."""
    before = flags_of_run(Path(where.coders))
    given = {n: v for n, v in vars(where).items() if n in _DEFAULTS and v is not None}
    flags = {**_DEFAULTS, **before, **given}
    for name in ("model", "dataset"):
        if flags[name] is None:
            raise UsageError(
                f"--{name}: {where.coders} does not come with its run: name the {name}"
            )
    coders = SparseCoder.load_many(where.coders)
    hookpoint = {name: re.sub(r"\.seed\d+$", "", name) for name in coders}
    hub: dict[str, Any] = {"revision": flags["revision"], "token": where.hf_token}
    patterns = tuple(dict.fromkeys(hookpoint.values()))
    disable_progress_bar()
    skeleton, places = find_hookpoints(flags["model"], patterns, with_head=True, **hub)
    dtype = working_dtype(flags["mixed_precision"])
    ranks = Ranks(torch.device("cpu" if on_cpu() else "cuda"), 10.0)
    lm = load_lm(flags["model"], skeleton, places, dtype, ranks.device, **hub)
    bank = CoderBank.holding(coders, hookpoint, ranks.device, dtype)
    source = load_tokens(
        flags["dataset"],
        tokenizer=flags["model"],
        limits=token_limits(lm),
        **{name: flags[name] for name in TEXT_FLAGS},
        **hub,
    )
    same_data = all(given.get(n) in (None, before.get(n)) for n in ("dataset", "split", "ctx_len"))
    held = torch.arange(len(source))
    if before and same_data:  # the rest was trained on
        held, _ = hold_out(source, flags["eval_tokens"], flags["max_examples"], per_step=1)
    wanted = -(-(where.tokens or len(held) * source.block_len) // source.block_len)
    if not before and where.tokens is None:
        wanted = min(len(held), -(-flags["eval_tokens"] // source.block_len))
    if wanted > len(held):
        raise UsageError(
            f"--tokens {where.tokens}: there are {len(held) * source.block_len:,}"
            + (" that the run held out; give another --dataset or --split" if before else "")
        )
    exchange = Exchange(ranks, dict.fromkeys(places, 1), distributed=False)
    return Trained(lm, bank, exchange, source, held[:wanted], flags)


def flags_of_run(folder: Path) -> dict[str, Any]:
    """The flags of the run whose folder this is, or one of whose checkpoints; else nothing.

    Raises UsageError for a file that is damaged.
    """
    for candidate in (folder / "run.json", folder.parent / "run.json"):
        if candidate.is_file():
            flags = read_json(candidate)
            for name, default in _DEFAULTS.items():
                value = flags.setdefault(name, default)
                kinds = _KINDS.get(name, (str,))
                if value is not None and type(value) not in kinds:
                    raise UsageError(f"{candidate}: {name} is {value!r}: the file is damaged")
            return flags
    return {}

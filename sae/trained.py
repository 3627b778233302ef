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
from .hookpoints import Hookpoint, find_hookpoints, load_lm, measure, token_limits
from .launch import on_cpu, working_dtype
from .ranks import Ranks
from .run_folder import checkpoints, read_json
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

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens < 1:
            raise UsageError(f"--tokens {self.tokens}: must be 1 or more")

    @property
    def folder(self) -> Path:
        """Where results go: the folder of the coders, or the one at hand for a Hub id."""
        return Path(self.coders) if Path(self.coders).is_dir() else Path()


_DEFAULTS: dict[str, Any] = {
    **{"model": None, "dataset": None, "split": "train", "text_column": "text", "ctx_len": 2048},
    **{"data_args": "", "token_dtype": None, "shuffle_seed": 42, "exclude_tokens": ()},
    **{"data_preprocessing_num_proc": 1, "streaming": False, "max_examples": None},
    **{"eval_tokens": 2**17, "mixed_precision": "auto", "revision": None, "load_in_8bit": False},
}

_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("ctx_len", "shuffle_seed", "max_examples", "eval_tokens"), (int,)),
    **{"data_preprocessing_num_proc": (int,), "streaming": (bool,), "load_in_8bit": (bool,)},
    "exclude_tokens": (list, tuple),
}
"""Types of the flags that are not text."""

_OF_THE_DATA = ("data_args", "token_dtype", "streaming", "max_examples")
"""Flags that say how to read one data set, and nothing of another."""


@dataclass(frozen=True)
class Trained:
    """Coders, the LM with its head, and the token blocks to read; all in one process."""

    lm: PreTrainedModel
    bank: CoderBank
    exchange: Exchange
    source: TokenSource
    blocks: Int[Tensor, " n"]
    flags: dict[str, Any]
    ours: bool
    """Whether the text is what the run itself held out."""

    step: str | None
    """The checkpoint, if it is a run's."""

    @property
    def exclude_tokens(self) -> tuple[int, ...]:
        """Token ids whose activations the coders never saw."""
        return tuple(self.flags["exclude_tokens"])


def load(where: Where) -> Trained:
    """Load what `where` names. Raises UsageError for what cannot be found or does not fit."""
    coders = _coders(where)
    before = flags_of_run(Path(where.coders))
    given = {n: v for n, v in vars(where).items() if n in _DEFAULTS and v is not None}
    ours = bool(before) and _same_text(given, before)
    flags = {**_DEFAULTS, **before, **given}
    if before and not ours:
        flags |= {name: _DEFAULTS[name] for name in _OF_THE_DATA}
    for name in ("model", "dataset"):
        if flags[name] is None:
            raise UsageError(
                f"--{name}: {where.coders} does not come with its run: name the {name}"
            )
    hookpoint = {name: re.sub(r"\.seed-?\d+$", "", name) for name in coders}
    hub: dict[str, Any] = {"revision": flags["revision"], "token": where.hf_token}
    patterns = tuple(dict.fromkeys(hookpoint.values()))
    disable_progress_bar()
    skeleton, places = find_hookpoints(flags["model"], patterns, with_head=True, **hub)
    _check_widths(coders, hookpoint, measure(skeleton, places), flags["model"])
    dtype = working_dtype(flags["mixed_precision"])
    ranks = Ranks(torch.device("cpu" if on_cpu() else "cuda"), 10.0)
    eight_bit = flags["load_in_8bit"]
    lm = load_lm(flags["model"], skeleton, places, dtype, ranks.device, eight_bit, **hub)
    bank = CoderBank.holding(coders, hookpoint, ranks.device, dtype)
    source = load_tokens(
        flags["dataset"],
        tokenizer=flags["model"],
        limits=token_limits(lm),
        **{name: flags[name] for name in TEXT_FLAGS},
        **hub,
    )
    saved = _data_of_run(Path(where.coders))
    blocks = torch.arange(len(source))
    if before and (ours or saved == source.fingerprint):  # the rest was trained on
        ours, blocks = True, blocks[: _held_blocks(source, flags, before, saved)]
    blocks = _wanted(blocks, where.tokens, flags["eval_tokens"], source.block_len, ours)
    exchange = Exchange(ranks, dict.fromkeys(places, 1), distributed=False)
    newest = checkpoints(Path(where.coders))
    step = newest[-1].name if newest else None
    return Trained(lm, bank, exchange, source, blocks, flags, ours, step)


def _coders(where: Where) -> dict[str, SparseCoder]:
    if (Path(where.coders) / "cfg.json").is_file():
        raise UsageError(
            f"{where.coders} is one coder, whose hookpoint its folder's name says: give "
            f"{Path(where.coders).resolve().parent}"
        )
    return SparseCoder.load_many(where.coders)


def _check_widths(
    coders: dict[str, SparseCoder], hookpoint: dict[str, str], places: list[Hookpoint], model: str
) -> None:
    """Raise UsageError for coders that are not as wide as their hookpoints."""
    at = {place.name: place for place in places}
    for name, coder in coders.items():
        place = at[hookpoint[name]]
        d_in = place.d_in if coder.cfg.transcode else place.d_out
        if (coder.d_in, coder.d_out) != (d_in, place.d_out):
            raise UsageError(
                f"--model {model}: {place.name} is {d_in} and {place.d_out} wide, and the coder "
                f"{coder.d_in} and {coder.d_out}: name its own model"
            )


def _wanted(
    blocks: Tensor, tokens: int | None, default: int, block_len: int, ours: bool
) -> Int[Tensor, " n"]:
    """The leading blocks that hold `tokens`; by default what a run held out, or `default` tokens.

    Raises UsageError where there are fewer than were asked for.
    """
    if tokens is None:
        return blocks if ours else blocks[: -(-default // block_len)]
    wanted = -(-tokens // block_len)
    if wanted > len(blocks):
        raise UsageError(
            f"--tokens {tokens}: there are {len(blocks) * block_len:,}"
            + (" that the run held out; give another --dataset" if ours else "")
        )
    return blocks[:wanted]


def _same_text(given: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether the data set is the run's own; `--split` is a mere label for files here."""
    theirs, asked = before["dataset"], given.get("dataset", before["dataset"])
    if theirs is None or asked is None:
        return False
    here = Path(asked).exists()
    same = Path(asked).resolve() == Path(theirs).resolve() if here else asked == theirs
    split = given.get("split", before["split"]) == before["split"]
    return (
        same
        and (here or split)
        and given.get("text_column", before["text_column"]) == (before["text_column"])
    )


def _held_blocks(
    source: TokenSource, flags: dict[str, Any], before: dict[str, Any], saved: dict[str, Any]
) -> int:
    """Leading blocks that the run held out, whatever the length of a block is now."""
    if not saved or saved.get("block_len") == source.block_len:
        held, _ = hold_out(source, before["eval_tokens"], flags["max_examples"], per_step=1)
        return len(held)
    then = saved["block_len"]
    tokens = then * min(-(-before["eval_tokens"] // then), max(1, saved["blocks"] // 10))
    return max(1, tokens // source.block_len)


def _data_of_run(folder: Path) -> dict[str, Any]:
    """The fingerprint of what a run trained on."""
    found = [folder, *checkpoints(folder)][-1] / "manifest.json"
    data = read_json(found).get("data") if found.is_file() else None
    return data if isinstance(data, dict) else {}


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

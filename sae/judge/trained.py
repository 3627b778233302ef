"""Trained coders, with the LM and the data that they are judged on."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar
from tyro.conf import Positional, arg

from ..coders.across.cross_layer import CrossLayerTranscoder, link
from ..coders.across.crosscoder import Crosscoder
from ..coders.bank import CoderBank
from ..coders.sparse_coder import SparseCoder
from ..config import Columns, DataConfig, MachineConfig, ModelConfig, Widths
from ..data.blocks import TokenSource
from ..data.text import load_tokens
from ..flag_checks import OF_ONE_DATA_SET, UsageError, flags_marked, from_flags
from ..formats import kinds
from ..formats.hub import coders_folder
from ..formats.origin import without_seed
from ..lm.beside import label, read_beside
from ..lm.capture import Capture, RowReader, measure_widths
from ..lm.head import unusable_head
from ..lm.joined import CROSSCODER, Joined, joined_widths
from ..lm.loading import find_hookpoints, load_lm, token_limits
from ..lm.probe import checked
from ..lm.rows import RowRule
from ..placement.exchange import Exchange
from ..placement.launch import check_device, on_cpu, working_dtype
from ..placement.ranks import Ranks
from ..runs.folder import checkpoints
from ..runs.norm_limits import norm_limits_of
from ..runs.provenance import data_of_run, flags_of_run, held_out_blocks, is_text_of_run
from ..training.state import TrainingState

_EXCLUSIONS = ("exclude_tokens", "exclude_positions", "exclude_norm")


@dataclass(frozen=True)
class CodersConfig:
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
    hookpoint: str | None = None
    """Where the one coder reads, if its files do not say it; or the only one to take."""
    allow_pt: bool = False
    """Open coder files that are pickles (.pt), which can run code: only of people you trust."""
    models: tuple[str, ...] | None = None
    """Further LMs, of a crosscoder over several."""
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


@dataclass(frozen=True)
class TrainedCoders:
    """Coders, the LM with its head, and the token blocks to read; all in one process."""

    lm: PreTrainedModel
    capture: RowReader
    state: TrainingState
    source: TokenSource
    blocks: Int[Tensor, " n"]
    model: ModelConfig
    data: DataConfig
    held_out: bool
    """Whether the text is what the run itself held out."""

    step: str | None
    """The checkpoint, if it is a run's."""


def load_trained(cfg: CodersConfig, like: TrainedCoders | None = None) -> TrainedCoders:
    """Load what `cfg` names, on the same rows of the same text as `like` where that is given.

    Raises UsageError for what cannot be found or does not fit.
    """
    coders, run = named_coders(cfg), Path(cfg.coders)
    hookpoint = {name: without_seed(name) for name in coders}
    if parts := _parts(coders, cfg.coders):
        hookpoint = dict.fromkeys(coders, CROSSCODER)
    for coder in coders.values():
        if isinstance(coder, Crosscoder):
            coder.use_scaled_rows_(parts)
    link(coders, hookpoint)
    for coder in coders.values():
        if isinstance(coder, CrossLayerTranscoder):
            coder.check_linked()
    before, given = flags_of_run(run), {n: v for n, v in vars(cfg).items() if v is not None}
    if like is not None:
        given |= {"text_column": like.data.text_column, "split": like.data.split}
    held_out = bool(before) and is_text_of_run(given, before)
    flags: dict[str, Any] = {n: v for n, v in {**before, **given}.items() if v is not None}
    for name in ("model", "dataset"):
        if name not in flags:
            raise UsageError(f"--{name}: {cfg.coders} does not come with its run: name the {name}")
    data = from_flags(DataConfig, {**flags, "eval_tokens": before.get("eval_tokens", 2**17)})
    if before and not held_out:
        other = {f: getattr(DataConfig, f) for f in flags_marked(data, OF_ONE_DATA_SET)}
        data = replace(data, **other)
    if like is not None:
        data = replace(like.data, eval_tokens=data.eval_tokens)
        flags |= {name: getattr(like.model, name) for name in _EXCLUSIONS}
    model = replace(
        from_flags(ModelConfig, flags),
        **{"hookpoints": _read_at(hookpoint, parts), "layers": (), "layer_stride": 1}
        | {"per_head": False, "models": _models(parts, flags.get("models") or ())},
    )
    dtype = working_dtype(from_flags(MachineConfig, flags).mixed_precision)

    disable_progress_bar()
    skeleton, names = find_hookpoints(model, head="wanted")
    check_device()
    ranks = Ranks(torch.device("cpu" if on_cpu() else "cuda"), 10.0)
    lm = load_lm(model, skeleton, names, dtype, ranks.device)
    if note := unusable_head(lm):
        print(note)
    widths = measure_widths(lm, names)
    bank = CoderBank.holding(coders, hookpoint, ranks.device, dtype)
    limits = (
        norm_limits_of(run, model.exclude_norm)
        if like is None
        else {n: v for n, v in like.capture.rule.norm_limits.items() if n in names}
    )
    rule = RowRule(model.exclude_tokens, model.exclude_positions, limits)
    capture = checked(Capture(lm, names, rule, inputs=bank.transcode), data.ctx_len)
    reader: RowReader = capture
    if parts:
        how = data.ctx_len, dtype, ranks.main_first
        all_lms, widths = read_beside(capture, widths, model, *how)
        reader, widths = Joined(all_lms, parts), joined_widths(widths)
    _check_widths(coders, hookpoint, widths, model.model)
    source = load_tokens(data, model, token_limits(lm))
    saved, blocks = data_of_run(run), torch.arange(len(source))
    if before and (held_out or saved == source.fingerprint):  # the rest was trained on
        held_out, blocks = True, blocks[: held_out_blocks(source, data, before, saved)]
    blocks = _leading_blocks(blocks, cfg.tokens, data.eval_tokens, source.block_len, held_out)
    owned = dict.fromkeys(reader.hookpoints, 1)
    state = TrainingState(Exchange(ranks, owned, distributed=False), bank)
    newest = checkpoints(run)
    step = newest[-1].name if newest else None
    return TrainedCoders(lm, reader, state, source, blocks, model, data, held_out, step)


def _parts(coders: dict[str, SparseCoder], where: str) -> tuple[Columns, ...]:
    """The parts of crosscoders; none of other coders. Raises UsageError for several readings."""
    found = {coder.cfg.parts for coder in coders.values()}
    if len(found) > 1:
        raise UsageError(
            f"{where}: its crosscoders read different hookpoints, or are beside other coders: give "
            f"the folder of one, and --hookpoint {CROSSCODER}"
        )
    return found.pop()


def _read_at(hookpoint: dict[str, str], parts: tuple[Columns, ...]) -> tuple[str, ...]:
    """The hookpoints of the LM that coders read."""
    own = tuple(part.hookpoint for part in parts if not part.lm)
    return own or tuple(dict.fromkeys(hookpoint.values()))


def _models(parts: tuple[Columns, ...], known: Iterable[str]) -> tuple[str, ...]:
    """The further LMs that a crosscoder reads: of those that are known, or by their name alone."""
    by_label = {label(lm): lm for lm in known}
    names = dict.fromkeys(part.lm for part in parts if part.lm)
    return tuple(by_label.get(name, name) for name in names)


def named_coders(cfg: CodersConfig) -> dict[str, SparseCoder]:
    """The coders that `cfg` names, by their names.

    Raises UsageError for one coder that does not say where it reads.
    """
    folder = coders_folder(cfg.coders, allow_pt=cfg.allow_pt, token=cfg.hf_token)
    paths = kinds.chosen(kinds.list_coders(folder), cfg.hookpoint)
    silent = [name for name, path in paths.items() if _is_silent(path, folder)]
    if silent and cfg.hookpoint is None:
        if folder in paths.values():
            raise UsageError(
                f"{cfg.coders} is one coder, whose files do not say where it reads: give "
                f"--hookpoint, or of a run {folder.resolve().parent}"
            )
        raise UsageError(
            f"{cfg.coders}: the files of {silent[0]} do not say where it reads: give the path of "
            f"one coder, and --hookpoint"
        )
    coders = {}
    for name, path in paths.items():
        coder = SparseCoder.load_from_disk(path, allow_pt=cfg.allow_pt)
        # Sums of squares of half-precision numbers do not fit into their own kind.
        coders[name] = coder.to(torch.promote_types(coder.dtype, torch.float32))
    for name, path in paths.items():
        kind = kinds.KINDS[kinds.kind_of(path) or "sparsify"]
        if what := kind.between(path):
            raise UsageError(
                f"{cfg.coders}: {name} is {what}: two modules, and a hookpoint here is one. Load "
                f"it by load_many, or export it"
            )
        if note := kind.note(path):
            print(f"note  {name} {note}")
    return coders


def _is_silent(path: Path, folder: Path) -> bool:
    """Whether nothing says where a coder reads: of a run's it is the name of its folder."""
    is_of_run = kinds.kind_of(path) in ("sparsify", None) and path != folder
    return not is_of_run and not kinds.says_hookpoint(path)


def _check_widths(
    coders: dict[str, SparseCoder], hookpoint: dict[str, str], widths: dict[str, Widths], model: str
) -> None:
    """Raise UsageError for coders that are not as wide as their hookpoints."""
    for name, coder in coders.items():
        d_in, d_out = widths[hookpoint[name]]
        if (coder.d_in, coder.d_out) != (d_in if coder.cfg.transcode else d_out, d_out):
            raise UsageError(
                f"--model {model}: {hookpoint[name]} is {d_in} and {d_out} wide, and the coder "
                f"{coder.d_in} and {coder.d_out}: name its own model"
            )


def _leading_blocks(
    blocks: Tensor, tokens: int | None, default: int, block_len: int, held_out: bool
) -> Int[Tensor, " n"]:
    """The leading blocks that hold `tokens`; by default what a run held out, or `default` tokens.

    Raises UsageError where there are fewer than were asked for.
    """
    if tokens is None:
        return blocks if held_out else blocks[: -(-default // block_len)]
    wanted = -(-tokens // block_len)
    if wanted > len(blocks):
        raise UsageError(
            f"--tokens {tokens}: there are {len(blocks) * block_len:,}"
            + (" that the run held out; give another --dataset" if held_out else "")
        )
    return blocks[:wanted]

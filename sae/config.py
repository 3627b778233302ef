"""What a coder is and which flags go together; imports no torch."""

import json
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, Literal

Activation = Literal["topk", "groupmax"]

INT8_CANDIDATES = 2
"""Latents per active one whose pre-activations an int8 search computes in full."""

_TOO_MANY = 2**46
_TOO_LARGE = 2**40


class UsageError(Exception):
    """What the user asked for cannot be done; it names the flag, the value and the way out."""


@dataclass(frozen=True)
class SparseCoderConfig:
    """The shape of one sparse coder, as written to `cfg.json`."""

    activation: Activation = "topk"
    """`topk` keeps the k largest latents, `groupmax` the largest of each of k groups."""

    expansion_factor: int = 32
    """num_latents as a multiple of the input width; used where `num_latents` is 0."""

    normalize_decoder: bool = True
    """Keep every row of W_dec at unit norm."""

    num_latents: int = 0
    """Number of latents; 0 means `expansion_factor * d_in`."""

    k: int = 32
    """Active latents per row."""

    multi_topk: bool = False
    """Add the Multi-TopK loss, the reconstruction from 4k latents."""

    skip_connection: bool = False
    """Add a linear map from input to output, W_skip."""

    transcode: bool = False
    """Predict a module's output from its input instead of reconstructing the output."""

    @classmethod
    def of(cls, flags: Any) -> "SparseCoderConfig":
        """The shape that the script's flags ask for."""
        return cls(**{field.name: getattr(flags, field.name) for field in fields(cls)})

    def latents(self, d_in: int) -> int:
        """num_latents of a coder whose input has width `d_in`."""
        return self.num_latents or d_in * self.expansion_factor

    def check(self, d_in: int, where: str) -> None:
        """Raise UsageError unless `k` fits the number of latents of a coder `d_in` wide."""
        latents = self.latents(d_in)
        if latents * d_in >= _TOO_MANY:
            raise UsageError(
                f"--num_latents or --expansion_factor: the coder at {where} would have {latents} "
                f"latents of {d_in} weights: lower it"
            )
        if self.k < 1:
            raise UsageError(f"--k {self.k} of the coder at {where}: must be at least 1")
        if self.k > latents:
            raise UsageError(
                f"--k {self.k} is larger than the {latents} latents of the coder at {where}: "
                f"lower --k, or raise --num_latents or --expansion_factor"
            )
        widths = [self.k, 4 * self.k] if self.multi_topk else [self.k]
        if self.activation == "groupmax" and any(latents % k for k in widths):
            raise UsageError(
                f"--activation groupmax splits the {latents} latents at {where} into equal groups, "
                f"which --k {self.k} does not allow: give a --k "
                + ("whose fourfold divides" if self.multi_topk else "that divides")
                + f" {latents}"
            )
        if self.multi_topk and 4 * self.k > latents:
            raise UsageError(
                f"--multi_topk reconstructs from {4 * self.k} latents and the coder at {where} has "
                f"{latents}: lower --k, or raise --num_latents or --expansion_factor"
            )

    @classmethod
    def from_json(cls, path: Path) -> tuple["SparseCoderConfig", dict[str, Any]]:
        """Read `cfg.json`; return the config and the keys that are not the config's own.

        Raises UsageError for a file that is not JSON, lacks `d_in`, or holds impossible values.
        """
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UsageError(f"{path} does not exist: give the folder of one coder") from None
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{path} is not JSON ({error}): the file is damaged") from None
        if not isinstance(values, dict) or type(values.get("d_in")) is not int:
            raise UsageError(f"{path} has no integer d_in: it does not describe a sparse coder")
        known = {f.name: values.pop(f.name) for f in fields(cls) if f.name in values}
        for field in fields(cls):
            if field.name not in known:
                continue
            value = known[field.name]
            kind = type(field.default)
            if type(value) is not kind or (kind is int and not 0 <= value < _TOO_LARGE):
                raise UsageError(f"{path}: {field.name} is {value!r}, not a usable {kind.__name__}")
        if known.get("activation", "topk") not in ("topk", "groupmax"):
            raise UsageError(f"{path}: activation {known['activation']!r} is not topk or groupmax")
        for name, value in values.items():
            if name not in ("d_in", "d_out") and value not in (None, False):
                raise UsageError(
                    f"{path}: {name} is {value!r}, which this version does not know: the coder "
                    f"may compute something else; take it out if it does not"
                )
        return cls(**known), values

    def to_json(self, path: Path, d_in: int, d_out: int) -> None:
        """Write `cfg.json`: this config and the widths."""
        text = json.dumps({**asdict(self), "d_in": d_in, "d_out": d_out}, indent=2)
        path.write_text(text + "\n", encoding="utf-8")


SaeConfig = SparseCoderConfig
TranscoderConfig = partial(SparseCoderConfig, transcode=True)

_AT_LEAST_ONE = (
    *("batch_size", "ctx_len", "grad_acc_steps", "micro_acc_steps", "k", "expansion_factor"),
    *("layer_stride", "save_every", "log_every", "dead_feature_threshold", "eval_tokens"),
    *("data_preprocessing_num_proc", "keep_last"),
)
_AT_LEAST_ZERO = (
    *("eval_every", "num_latents", "k_decay_steps", "lr_warmup_steps", "auxk_alpha"),
    "max_bad_steps",
)


def check_flags(flags: Any) -> None:
    """Raise UsageError for values and combinations of flags that cannot work.

    `flags` is the script's `TrainConfig`; everything here is known before anything is loaded.
    """

    def refuse(flag: str, why: str) -> None:
        raise UsageError(f"--{flag} {getattr(flags, flag)}: {why}")

    for flag, value in vars(flags).items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and abs(number) >= _TOO_LARGE:
                refuse(flag, "must be less than 2^40 in size")
    for flag in _AT_LEAST_ONE:
        if getattr(flags, flag) < 1:
            refuse(flag, "must be at least 1")
    for flag in _AT_LEAST_ZERO:
        if not 0 <= getattr(flags, flag) < float("inf"):
            refuse(flag, "must be a finite number, 0 or more")
    if flags.lr is not None and not 0 < flags.lr < float("inf"):
        refuse("lr", "must be a finite number above 0; leave it out for the optimizer's default")
    if flags.max_examples is not None and flags.max_examples < 1:
        refuse("max_examples", "must be at least 1; leave it out to use the whole data set")
    if flags.hookpoints and (flags.layers or flags.layer_stride != 1):
        other = "layers" if flags.layers else "layer_stride"
        refuse(other, "picks residual streams, --hookpoints names modules: give one of the two")
    if flags.layers and flags.layer_stride != 1:
        refuse("layer_stride", "thins out the default of all layers: drop it, or drop --layers")
    if not flags.init_seeds or len(set(flags.init_seeds)) != len(flags.init_seeds):
        refuse("init_seeds", "give one or more different seeds")
    if flags.k_decay_steps and flags.activation == "groupmax":
        refuse("k_decay_steps", "k must always divide num_latents with --activation groupmax")
    if flags.adam_8bit and flags.optimizer != "adam":
        refuse("adam_8bit", f"belongs to --optimizer adam, not {flags.optimizer}")
    if flags.resume and flags.adam_8bit:
        refuse("resume", "the state of --adam_8bit is not kept: start a new run with --finetune")
    if flags.shuffle_seed < 0:
        refuse("shuffle_seed", "must be 0 or more")
    if flags.streaming and flags.max_examples is None:
        refuse("streaming", "a stream has no length: give --max_examples, the blocks to train on")
    if flags.loss_fn != "fvu" and flags.distribute_modules:
        refuse(
            "distribute_modules",
            f"with --loss_fn {flags.loss_fn} the gradient of one coder runs through the LM and "
            f"through the coders above it, so each rank needs all of them: drop it",
        )
    if flags.loss_fn != "fvu" and len(flags.init_seeds) > 1:
        refuse("init_seeds", f"--loss_fn {flags.loss_fn} splices in one coder per hookpoint")
    if flags.layer_to_rank and not flags.distribute_modules:
        refuse("layer_to_rank", "says where coders live, which --distribute_modules asks for")
    if not 0 < flags.timeout < 1e6:
        refuse("timeout", "must be a number of minutes above 0")
    if flags.run_name is not None and (
        flags.run_name in ("", ".", "..") or "/" in flags.run_name or "\\" in flags.run_name
    ):
        refuse("run_name", "names one folder below --save_dir: use a plain name")


def parse_data_args(text: str) -> dict[str, str | int | float | bool | None]:
    """`"a=b,c=1"` as keyword arguments of `datasets.load_dataset`, numbers and booleans typed."""
    parsed: dict[str, str | int | float | bool | None] = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        name, equals, value = item.partition("=")
        if not equals or not name.strip().isidentifier():
            raise UsageError(f'--data_args "{text}": {item!r} is not of the form name=value')
        parsed[name.strip()] = _literal(value.strip())
    return parsed


def _literal(text: str) -> str | int | float | bool | None:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text

"""The flags of a run in groups, each with its checks, and what a coder is; imports no torch."""

import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from tyro.conf import Positional, Suppress, arg

from .flag_checks import (
    MAY_CHANGE,
    NO_FLAG,
    OF_ONE_DATA_SET,
    SECRET,
    AtLeast,
    UsageError,
    check_values,
    refuse,
)

Activation = Literal["topk", "groupmax", "batchtopk", "jumprelu"]
WITH_THRESHOLD = frozenset({"batchtopk", "jumprelu"})
"""Of these the ones in whose files every latent has a threshold."""
OptimizerName = Literal["signum", "adam", "muon", "soap"]
KernelChoice = Literal["auto", "torch", "native", "int8"]
Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "none"]

INT8_CANDIDATES = 2
"""Latents per active one whose pre-activations an int8 search computes in full."""
DENSE_WEIGHTS = 2**31
"""Rows times dead latents up to which AuxK is dense on CUDA: 4.3 GB of activations in bfloat16."""

_TOO_MANY = 2**46


class Widths(NamedTuple):
    """Widths of what enters and leaves a module."""

    d_in: int
    d_out: int


class Columns(NamedTuple):
    """The columns of a crosscoder that are those of one hookpoint."""

    hookpoint: str
    width: int
    rms: float = 1.0
    """Of the hookpoint's rows about their mean, which training divides them by."""

    @property
    def lm(self) -> str:
        """The LM that the hookpoint is of, "" for the first: "layers.3 of other" names both."""
        return self.hookpoint.partition(" of ")[2]


@dataclass(frozen=True)
class SparseCoderConfig:
    """What a coder is; written to its cfg.json."""

    activation: Activation = "topk"
    """topk: the k largest latents of a row; groupmax: the largest of each of k groups; batchtopk:
    the k B largest of B rows; jumprelu: those above a threshold, which learns to let k through."""
    expansion_factor: Annotated[int, AtLeast(1)] = 32
    """Number of latents as a multiple of the input width."""
    normalize_decoder: bool = True
    """Keep decoder rows at unit norm."""
    num_latents: Annotated[int, AtLeast(0)] = 0
    """Number of latents; 0: expansion_factor times the width."""
    k: Annotated[int, AtLeast(1)] = 32
    """Active latents per token; with thresholds, their mean, which training aims at."""
    multi_topk: bool = False
    """Add the FVU of a reconstruction from 4k latents, weighted 1/8."""
    skip_connection: bool = False
    """Add a linear map from input to output."""
    transcode: bool = False
    """Predict each module's output from its input, instead of reconstructing the output."""
    matryoshka: Annotated[tuple[float, ...], AtLeast(0)] = ()
    """Shares of the latents, in order, that sum to 1: prefixes, each of which reconstructs alone
    too. The loss is the mean of their FVU."""
    crosscoder: bool = False
    """One coder over all hookpoints: each latent reads and writes at every one of them."""
    cross_layer: Annotated[int | Literal["all"], AtLeast(0)] = 0
    """Layers ahead, or all, to which a transcoder's latents write too, beside their own."""
    parts: Annotated[tuple[Columns, ...], NO_FLAG, Suppress] = ()
    """The columns of a crosscoder by hookpoint, which a run finds."""
    sources: Annotated[tuple[str, ...], NO_FLAG, Suppress] = ()
    """The hookpoints whose latents a cross-layer transcoder takes in beside its own, in order."""
    targets: Annotated[tuple[str, ...], NO_FLAG, Suppress] = ()
    """The hookpoints ahead that its latents write to, in order."""

    def __post_init__(self) -> None:
        check_values(self)
        if self.matryoshka and (0 in self.matryoshka or abs(sum(self.matryoshka) - 1) > 1e-6):
            refuse(self, "matryoshka", "must be shares above 0 that sum to 1")
        if self.matryoshka and self.multi_topk:
            refuse(self, "multi_topk", "--matryoshka has prefixes in place of 4k latents: drop one")

    @property
    def has_threshold(self) -> bool:
        """Whether every latent has a threshold, above which it is active."""
        return self.activation in WITH_THRESHOLD

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
        if self.k > latents:
            raise UsageError(
                f"--k {self.k} is larger than the {latents} latents of the coder at {where}: "
                f"lower --k, or raise --num_latents or --expansion_factor"
            )
        if self.multi_topk and 4 * self.k > latents:
            raise UsageError(
                f"--multi_topk reconstructs from {4 * self.k} latents and the coder at {where} has "
                f"{latents}: lower --k, or raise --num_latents or --expansion_factor"
            )


SaeConfig = SparseCoderConfig
TranscoderConfig = partial(SparseCoderConfig, transcode=True)


@dataclass(frozen=True)
class ModelConfig:
    """The language model, and where in it coders are trained."""

    model: Annotated[str, Positional, arg(metavar="MODEL")] = "HuggingFaceTB/SmolLM2-135M"
    """Hub id or folder of the language model."""
    hookpoints: tuple[str, ...] = ()
    """Globs over the base model's modules ("layers.*.mlp", or "layers.*.self_attn.o_proj:input" for
    what enters one); default: residual streams."""
    layers: tuple[int, ...] = ()
    """Layers whose residual stream to train on; default: all."""
    layer_stride: Annotated[int, AtLeast(1)] = 1
    """Train on every N-th layer."""
    exclude_tokens: tuple[int, ...] = ()
    """Token ids whose activations are left out everywhere."""
    exclude_positions: Annotated[int, AtLeast(0)] = 0
    """Tokens at the start of every sequence whose activations are left out everywhere."""
    exclude_norm: Annotated[float | None, AtLeast(1)] = None
    """Leave out activations longer than this times their hookpoint's median at the start."""
    per_head: bool = False
    """One coder per attention head, where a hookpoint passes [B S H D] or "o_proj:input"."""
    revision: str | None = None
    """Git revision of the model on the Hub."""
    hf_token: Annotated[str | None, SECRET] = field(default=None, repr=False)
    """Hub token; never written to disk. HF_TOKEN in the environment works too."""
    load_in_8bit: bool = False
    """Load the LM with 8-bit weights (needs bitsandbytes and a GPU)."""
    models: tuple[str, ...] = ()
    """Further LMs that read the same tokens: one crosscoder is over MODEL and these."""

    def __post_init__(self) -> None:
        check_values(self)
        if self.hookpoints and (self.layers or self.layer_stride != 1):
            other = "layers" if self.layers else "layer_stride"
            refuse(
                self,
                other,
                "picks residual streams, --hookpoints names modules: give one of the two",
            )
        if self.per_head and not self.hookpoints:
            refuse(self, "per_head", "residual streams have no heads: name modules by --hookpoints")
        if self.layers and self.layer_stride != 1:
            refuse(self, "layer_stride", "thins out the default, all layers: drop it, or --layers")


@dataclass(frozen=True)
class DataConfig:
    """The text or token ids, and which of them are trained on."""

    dataset: Annotated[str, Positional, arg(metavar="DATASET")] = "EleutherAI/SmolLM2-135M-10B"
    """Hub id, folder saved by datasets, json/csv/parquet/arrow/txt files, or .bin/.npy of ids."""
    ctx_len: Annotated[int, AtLeast(1)] = 2048
    """Tokens per sequence."""
    split: str = "train"
    """Split of the data set."""
    text_column: str | None = None
    """Column that holds text; default: input_ids, text, messages or conversations."""
    chat_roles: Annotated[tuple[str, ...], OF_ONE_DATA_SET] = ()
    """Of chats, the roles whose tokens are trained on; the rest is context. Default: all."""
    pack: bool = True
    """Join documents and cut them into sequences; else one document, padded, per sequence."""
    bos_per_document: bool = False
    """Put what the tokenizer puts first before every document, and not before every sequence."""
    eos_token: str | None = None
    """Token, or its number, that ends a document; default: the tokenizer's own."""
    skip_bad_rows: Annotated[bool, OF_ONE_DATA_SET] = False
    """Leave out lines of json files that cannot be read, and say how many."""
    max_examples: Annotated[int | None, AtLeast(1), OF_ONE_DATA_SET] = None
    """Sequences to train on; default: all."""
    streaming: Annotated[bool, OF_ONE_DATA_SET] = False
    """Read the data set as a stream (needs --max_examples)."""
    shuffle_seed: Annotated[int, AtLeast(0)] = 42
    """Seed of the order of sequences."""
    eval_tokens: Annotated[int, AtLeast(1)] = 2**17
    """Tokens held out from the start of the data (at most a tenth of it)."""
    token_dtype: Annotated[
        Literal["uint16", "uint32", "int32", "int64"] | None, OF_ONE_DATA_SET
    ] = None
    """Type of the ids in a .bin file; default: the smallest that holds the vocabulary."""
    data_args: Annotated[str, OF_ONE_DATA_SET] = ""
    """Arguments for datasets.load_dataset, as "a=b,c=d"."""
    data_preprocessing_num_proc: Annotated[int, AtLeast(1), MAY_CHANGE] = max(
        1, (os.cpu_count() or 1) // 2
    )
    """Processes that tokenize."""

    def __post_init__(self) -> None:
        check_values(self)
        if self.bos_per_document and not self.pack:
            refuse(self, "bos_per_document", "with --no-pack every document begins so anyway")
        if self.streaming and self.max_examples is None:
            refuse(self, "streaming", "a stream has no length: give --max_examples to say how much")


@dataclass(frozen=True)
class TrainingConfig:
    """Losses, optimizer, and what one step consists of."""

    init_seeds: tuple[int, ...] = (0,)
    """Seeds of the initial weights; several train several coders on the same activations."""
    finetune: Annotated[str | None, MAY_CHANGE] = None
    """Folder or Hub id of trained coders to start from."""
    loss_fn: Literal["fvu", "ce", "kl"] = "fvu"
    """Fraction of variance unexplained at the hookpoint, or an end-to-end loss of the LM."""
    optimizer: OptimizerName = "adam"
    """adam, signum (schedule-free), muon, or soap (adam in an eigenbasis: better and slower)."""
    lr: float | None = None
    """Peak rate; default: by a rule in docs/recipes.md."""
    lr_warmup: Annotated[float, AtLeast(0)] = 0.05
    """Share of the run, or, above 1, steps in which the rate rises from 0 (not of signum)."""
    lr_decay: Annotated[float, AtLeast(0)] = 0.2
    """Share of the rest, or, above 1, steps at its end in which the rate falls to 0 (nor here)."""
    encoder_lr: Annotated[float | None, AtLeast(0)] = None
    """The rate of W_enc over that of the other parameters; default: 0.5, of transcoders 0.25."""
    rms_units: bool = True
    """Rates of biases, and how transcoders start, in units of the rms of their activations."""
    adam_beta1: Annotated[float, AtLeast(0)] = 0.8
    """Decay of Adam's first moment."""
    adam_beta2: Annotated[float, AtLeast(0)] = 0.95
    """Decay of Adam's second moment."""
    adam_8bit: bool = False
    """Keep Adam's moments in 8 bits (needs bitsandbytes)."""
    k_decay_steps: Annotated[int, AtLeast(0)] = 0
    """Optimizer steps over which k falls to its value, from 10 times the input width."""
    auxk_alpha: Annotated[float, AtLeast(0)] = 1.0
    """Weight of the AuxK loss, which revives dead latents; Gao et al. use 1/32."""
    wake_alpha: Annotated[float, AtLeast(0)] = 1.0
    """Weight of the loss that raises pre-activations of dead latents; Gao et al. have none."""
    dead_feature_threshold: Annotated[float, AtLeast(0)] = 0.005
    """Tokens without firing after which a latent counts as dead; up to 1: a share of the run's, of
    150 latents / k to 10 million."""
    batch_size: Annotated[int, AtLeast(1), MAY_CHANGE] = 32
    """Sequences per rank and LM forward."""
    grad_acc_steps: Annotated[int, AtLeast(1), MAY_CHANGE] = 1
    """LM forwards per batch."""
    steps_per_batch: Annotated[int | None, AtLeast(1)] = None
    """Optimizer steps that the rows of a batch (the forwards above) are dealt to; default: 16, or
    fewer, so that a step has 4,096 rows; twice as many below 2M tokens; 1 with ce or kl."""
    micro_acc_steps: Annotated[int, AtLeast(1), MAY_CHANGE] = 1
    """Pieces that a forward's rows are cut into, to save memory; the numbers stay the same."""
    group_sequences: Annotated[int | None, AtLeast(1)] = None
    """Sequences whose rows in a step share a selection (batchtopk); default: to give 256 rows."""
    max_bad_steps: Annotated[int, AtLeast(0), MAY_CHANGE] = 10
    """Steps with NaN or Inf that are skipped before the run ends; those of a batch count as one."""
    allow_pt: Annotated[bool, MAY_CHANGE] = False
    """Open files of --finetune that are pickles (.pt), which can run code: of people you trust."""
    runner_ups: Annotated[float | None, AtLeast(0)] = None
    """Weight of what the k latents next to the active ones learn; default: 0.3 where it can be."""
    auxk_alone: bool | None = None
    """AuxK teaches each dead latent alone, not a row's together; default: where L / k >= 512."""

    @property
    def uses_lm_loss(self) -> bool:
        """Whether the loss is that of the LM's predictions."""
        return self.loss_fn != "fvu"

    @property
    def revives(self) -> bool:
        """Whether dead latents are looked for."""
        return self.auxk_alpha > 0 or self.wake_alpha > 0

    def __post_init__(self) -> None:
        check_values(self)
        if self.lr is not None and not 0 < self.lr < float("inf"):
            refuse(self, "lr", "must be a finite number above 0; leave it out for the default")
        for name in ("adam_beta1", "adam_beta2"):
            if getattr(self, name) >= 1:
                refuse(self, name, "must be below 1")
        if not self.init_seeds or len(set(self.init_seeds)) != len(self.init_seeds):
            refuse(self, "init_seeds", "give one or more different seeds")
        if self.uses_lm_loss and self.steps_per_batch not in (None, 1):
            why = f"--loss_fn {self.loss_fn} needs whole sequences: leave it out"
            refuse(self, "steps_per_batch", why)
        if self.adam_8bit and self.optimizer != "adam":
            refuse(self, "adam_8bit", f"belongs to --optimizer adam, not {self.optimizer}")
        if self.loss_fn != "fvu" and len(self.init_seeds) > 1:
            refuse(
                self, "init_seeds", f"--loss_fn {self.loss_fn} splices in one coder per hookpoint"
            )


@dataclass(frozen=True)
class MachineConfig:
    """Where things run, and how fast."""

    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """bf16 runs the LM and the encoder product in bfloat16; auto: on GPUs that have it."""
    kernels: Annotated[KernelChoice, MAY_CHANGE] = "auto"
    """native: C or, on CUDA, Triton; auto: if it can be had; int8: C, searching latents in int8."""
    deterministic: Annotated[bool, MAY_CHANGE] = False
    """The LM too repeats bit for bit on a GPU, with slower operators; coders always do."""
    compile: Annotated[bool, MAY_CHANGE] = False
    """Compile the LM's blocks by torch.compile, except those with hookpoints inside."""
    distribute_modules: Annotated[bool, MAY_CHANGE] = False
    """Keep each coder on one rank only, and send that rank the rows of all ranks."""
    layer_to_rank: Annotated[tuple[str, ...], MAY_CHANGE] = ()
    """Owners by hand, "layers.0=0 layers.1=1-3" or a .json file; default: by cost."""
    batch_on_host: Annotated[bool, MAY_CHANGE] = False
    """Keep the rows of a batch that wait for their step in the host's memory, not on the GPU."""
    ranks_per_coder: Annotated[int, AtLeast(1), MAY_CHANGE] = 1
    """Ranks that share each coder, for coders too large for one."""
    timeout: Annotated[float, MAY_CHANGE] = 10.0
    """Minutes that a rank waits for another before the run ends."""
    shard_latents: Annotated[bool, MAY_CHANGE] = False
    """All ranks hold each coder together, or so many at a time as --ranks_per_coder says."""

    def __post_init__(self) -> None:
        check_values(self)
        given = {"layer_to_rank": self.layer_to_rank, "ranks_per_coder": self.ranks_per_coder > 1}
        for name in (n for n, is_given in given.items() if is_given and not self.owning):
            refuse(self, name, "says where coders live: add --distribute_modules")
        if not 0 < self.timeout < 1e6:
            refuse(self, "timeout", "must be a number of minutes above 0")

    @property
    def owning(self) -> str | None:
        """The flag by which coders are not whole on every rank, if one is given."""
        owners = "distribute_modules" if self.distribute_modules else None
        return "shard_latents" if self.shard_latents else owners

    @property
    def sharing(self) -> str | None:
        """The flag by which several ranks have each coder together, if one is given."""
        alone = "shard_latents" if self.shard_latents else None
        return "ranks_per_coder" if self.ranks_per_coder > 1 else alone


@dataclass(frozen=True)
class RunConfig:
    """What a run writes, and when."""

    dry_run: Annotated[bool, MAY_CHANGE] = False
    """Print hookpoints, owners and memory per rank, from the LM's config alone."""
    save_dir: Annotated[str, MAY_CHANGE] = "checkpoints"
    """Folder of runs."""
    run_name: Annotated[str | None, MAY_CHANGE] = None
    """Folder of this run below save_dir; default: the model's name."""
    resume: Annotated[bool, MAY_CHANGE] = False
    """Continue the run from its newest checkpoint; without one, start it."""
    save_every: Annotated[int, AtLeast(1), MAY_CHANGE] = 1000
    """Optimizer steps between checkpoints."""
    keep_last: Annotated[int, AtLeast(1), MAY_CHANGE] = 2
    """Checkpoints to keep."""
    save_best: Annotated[bool, MAY_CHANGE] = False
    """At every checkpoint, keep each coder whose held-out FVU is its lowest so far in best/."""
    eval_every: Annotated[int, AtLeast(0), MAY_CHANGE] = 0
    """Optimizer steps between evaluations, of the LM's predictions too; 0: none but the last."""
    log_every: Annotated[int, AtLeast(1), MAY_CHANGE] = 1
    """Optimizer steps between log entries."""
    log_with: Annotated[Tracker, MAY_CHANGE] = "tensorboard"
    """Tracker that accelerate writes to."""
    project: Annotated[str | None, MAY_CHANGE] = None
    """Project in the tracker; default: that of its own variable, such as WANDB_PROJECT, or sae."""

    def __post_init__(self) -> None:
        check_values(self)
        name = self.run_name
        if name is not None and (name in ("", ".", "..") or "/" in name or "\\" in name):
            refuse(self, "run_name", "names one folder below --save_dir: use a plain name")
        if self.project is not None and not self.project.strip():
            refuse(self, "project", "a project has a name; leave it out for the default")


def accept_names(cfg: Any) -> None:
    """Put configs in place of a plain name or path of a model or data set, as notebooks give it."""
    for group, kind in (("model", ModelConfig), ("data", DataConfig)):
        if isinstance(name := getattr(cfg, group), (str, Path)):
            object.__setattr__(cfg, group, kind(str(name)))

"""Train sparse autoencoders or transcoders on the activations of a frozen language model.

    python train_sae.py MODEL DATASET                       SAEs on every layer's residual stream
    python train_sae.py gpt2 DATA --hookpoints "h.*.attn"   on modules chosen by glob
    python train_sae.py gpt2 DATA --hookpoints "h.*.mlp" --transcode --skip_connection
    python train_sae.py gpt2 DATA --run_name R --resume     go on after an interruption
    accelerate launch --config_file accelerate_configs/1gpu.yaml train_sae.py MODEL DATASET

One turn of the loop is one optimizer step. Blocks marked EDIT are what experiments change; what
would make a result wrong is in sae/.
"""

import os
import sys
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel
from tyro.conf import Positional, arg

from sae import checkpoint, logs
from sae.bank import CoderBank
from sae.blocks import hold_out
from sae.config import Activation, SparseCoderConfig, UsageError, check_flags
from sae.data import load_tokens
from sae.dead_latents import FiringRecord
from sae.evaluate import HeldOut, first_moments, held_out
from sae.functional import Moments, accumulate
from sae.hookpoints import capture, load_lm, measure, token_limits, working_dtype
from sae.optim import CoderOptimizer, OptimizerName, finish_gradients_, k_at


@dataclass(frozen=True)
class TrainConfig:
    """Every knob of a run."""

    model: Annotated[str, Positional, arg(metavar="MODEL")] = "HuggingFaceTB/SmolLM2-135M"
    """Hub id or folder of the language model."""
    dataset: Annotated[str, Positional, arg(metavar="DATASET")] = "EleutherAI/SmolLM2-135M-10B"
    """Hub id, folder saved by datasets, json/jsonl/parquet/txt files, or .bin of token ids."""

    # Where the coders read and write.
    hookpoints: tuple[str, ...] = ()
    """Globs over the base model's module names ("layers.*.mlp"); default: residual streams."""
    layers: tuple[int, ...] = ()
    """Layers whose residual stream to train on; default: all."""
    layer_stride: int = 1
    """Train on every N-th layer."""
    transcode: bool = False
    """Predict each module's output from its input, instead of reconstructing the output."""
    exclude_tokens: tuple[int, ...] = ()
    """Token ids whose activations are left out everywhere."""

    # The coders.
    activation: Activation = "topk"
    """topk: the k largest latents of a row; groupmax: the largest of each of k groups."""
    expansion_factor: int = 32
    """Number of latents as a multiple of the input width."""
    num_latents: int = 0
    """Number of latents; 0: expansion_factor times the width."""
    k: int = 32
    """Active latents per token."""
    multi_topk: bool = False
    """Add the FVU of a reconstruction from 4k latents, weighted 1/8."""
    skip_connection: bool = False
    """Add a linear map from input to output."""
    normalize_decoder: bool = True
    """Keep decoder rows at unit norm."""
    init_seeds: tuple[int, ...] = (0,)
    """Seeds of the initial weights; several train several coders on the same activations."""
    finetune: str | None = None
    """Folder or Hub id of trained coders to start from."""

    # The optimization.
    loss_fn: Literal["fvu", "ce", "kl"] = "fvu"
    """Fraction of variance unexplained at the hookpoint, or an end-to-end loss of the LM."""
    optimizer: OptimizerName = "signum"
    """signum (schedule-free), adam, or muon."""
    lr: float | None = None
    """Peak rate; default: signum 5e-3, adam 2e-4 over sqrt(latents / 2^14), muon 2e-3."""
    lr_warmup_steps: int = 1000
    """Optimizer steps of linear warm-up (adam, and muon's biases)."""
    adam_8bit: bool = False
    """Keep Adam's moments in 8 bits (needs bitsandbytes)."""
    k_decay_steps: int = 0
    """Optimizer steps over which k falls to its value, from 10 times the input width."""
    auxk_alpha: float = 0.0
    """Weight of the AuxK loss, which revives dead latents; Gao et al. use 1/32."""
    dead_feature_threshold: int = 10_000_000
    """Tokens without firing after which a latent counts as dead."""
    batch_size: int = 32
    """Sequences per LM forward."""
    grad_acc_steps: int = 1
    """LM forwards per optimizer step."""
    micro_acc_steps: int = 1
    """Pieces that a forward's rows are cut into, to save memory; the numbers stay the same."""

    # The data.
    ctx_len: int = 2048
    """Tokens per sequence."""
    split: str = "train"
    """Split of the data set."""
    text_column: str = "text"
    """Column that holds text."""
    max_examples: int | None = None
    """Sequences to train on; default: all."""
    streaming: bool = False
    """Read the data set as a stream (needs --max_examples)."""
    shuffle_seed: int = 42
    """Seed of the order of sequences."""
    eval_tokens: int = 2**17
    """Tokens held out from the start of the data (at most a tenth of it)."""
    token_dtype: Literal["uint16", "uint32"] | None = None
    """Type of the ids in a .bin file; default: the smallest that holds the vocabulary."""
    data_args: str = ""
    """Arguments for datasets.load_dataset, as "a=b,c=d"."""
    data_preprocessing_num_proc: int = max(1, (os.cpu_count() or 1) // 2)
    """Processes that tokenize."""

    # The machine and the run.
    revision: str | None = None
    """Git revision of the model on the Hub."""
    hf_token: str | None = field(default=None, repr=False)
    """Hub token; never written to disk. HF_TOKEN in the environment works too."""
    load_in_8bit: bool = False
    """Load the LM with 8-bit weights (needs bitsandbytes and a GPU)."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """bf16 runs the LM and the encoder product in bfloat16; auto: on GPUs that have it."""
    distribute_modules: bool = False
    """Keep each coder on one rank only."""
    save_dir: str = "checkpoints"
    """Folder of runs."""
    run_name: str | None = None
    """Folder of this run below save_dir; default: the model's name."""
    resume: bool = False
    """Continue the run from its newest checkpoint."""
    save_every: int = 1000
    """Optimizer steps between checkpoints."""
    save_best: bool = False
    """At every checkpoint, keep each coder whose held-out FVU is its lowest so far in best/."""
    log_every: int = 1
    """Optimizer steps between log entries."""
    log_with: Literal["tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "none"] = (
        "tensorboard"
    )
    """Tracker that accelerate writes to."""

    def __post_init__(self) -> None:
        check_flags(self)

    @property
    def coder(self) -> SparseCoderConfig:
        """The shape of the coders."""
        return SparseCoderConfig(
            **{name: getattr(self, name) for name in SparseCoderConfig.__dataclass_fields__}
        )


def train(
    cfg: TrainConfig, lm: PreTrainedModel | None = None, dataset: Dataset | Tensor | None = None
) -> dict[str, Any]:
    """Run the training that `cfg` describes; return what `summary.json` says.

    `lm`, frozen where it is, and `dataset` (with `input_ids` or text, or a tensor of token blocks)
    replace `cfg.model` and `cfg.dataset`. Raises UsageError for anything the user can mend.
    """
    tracker = logs.check_launch(cfg.log_with)
    run = Path(cfg.save_dir) / (cfg.run_name or Path(cfg.model).resolve().name)
    accelerator = Accelerator(not torch.cuda.is_available(), log_with=tracker, project_dir=run)
    flags = {name: value for name, value in asdict(cfg).items() if name != "hf_token"}
    checkpoint.open_run(run, flags, cfg.resume)

    # The language model, frozen, and no more of it than the hookpoints need.
    dtype = working_dtype(cfg.mixed_precision, accelerator.device)
    lm, places = load_lm(
        cfg.model if lm is None else lm,
        choose=(cfg.hookpoints, cfg.layers, cfg.layer_stride),
        dtype=dtype,
        device=accelerator.device,
        revision=cfg.revision,
        token=cfg.hf_token,
        load_in_8bit=cfg.load_in_8bit,
    )

    # Coders, one per hookpoint and seed.
    bank = CoderBank(measure(lm, places), cfg.coder, cfg.init_seeds, lm.device)
    bank.matmul_in(dtype)

    # Tokens: the first blocks are held out, the rest is trained on in shuffled order.
    per_step = cfg.batch_size * cfg.grad_acc_steps
    stream_blocks = -(-cfg.eval_tokens // cfg.ctx_len) + (cfg.max_examples or 0)
    source = load_tokens(
        cfg.dataset if dataset is None else dataset,
        tokenizer=lm.name_or_path or cfg.model,
        limits=token_limits(lm),
        ctx_len=cfg.ctx_len,
        split=cfg.split,
        text_column=cfg.text_column,
        data_args=cfg.data_args,
        num_proc=cfg.data_preprocessing_num_proc,
        stream_blocks=stream_blocks if cfg.streaming else None,
        shuffle_seed=cfg.shuffle_seed,
        token_dtype=cfg.token_dtype,
        revision=cfg.revision,
        token=cfg.hf_token,
    )
    held, numbers = hold_out(source, cfg.eval_tokens, cfg.max_examples, per_step)
    total_steps, data = len(numbers) // per_step, source.fingerprint
    order = source.order(numbers, cfg.shuffle_seed)[: total_steps * per_step]

    # For each coder an optimizer and a record of what fires.
    choice = (cfg.optimizer, cfg.lr, cfg.adam_8bit)
    optimizers = {name: CoderOptimizer(coder, *choice) for name, coder in bank.items()}
    silence = cfg.dead_feature_threshold
    firing = {n: FiringRecord(c.num_latents, silence, c.device) for n, c in bank.items()}
    first_step, seconds_before = 0, 0.0
    if cfg.resume:
        first_step, seconds_before = checkpoint.load(run, data, bank, optimizers, firing)
    elif cfg.finetune is not None:
        bank.load_pretrained(cfg.finetune)
    else:
        first_batches = source.batches(order[:per_step], cfg.batch_size)
        bank.center_(*first_moments(lm, places, first_batches, cfg.exclude_tokens))

    def evaluate() -> dict[str, HeldOut]:
        return held_out(lm, bank, optimizers, source.batches(held, 1), cfg.exclude_tokens)

    log = logs.RunLog(accelerator, cfg.log_every, first_step, total_steps, seconds_before)
    log.start(flags, bank, held_tokens=len(held) * source.block_len)
    batches = source.batches(order[first_step * per_step :], cfg.batch_size)
    for step in range(first_step, total_steps):
        moments: dict[str, Moments] = {}
        errors = {name: torch.zeros(3, device=lm.device) for name in optimizers}
        dead = {n: f.dead_mask() if cfg.auxk_alpha else None for n, f in firing.items()}
        k = {name: k_at(step, cfg.k_decay_steps, coder) for name, coder in bank.items()}

        for tokens in islice(batches, cfg.grad_acc_steps):
            for place, (x, y) in capture(lm, tokens, places, cfg.exclude_tokens).items():
                # EDIT: what goes in and what should come out.
                x, y = (x if cfg.transcode else y).float(), y.float()
                accumulate(moments, place, y)
                for name, coder in bank.at(place):
                    pieces = (x.chunk(cfg.micro_acc_steps), y.chunk(cfg.micro_acc_steps))
                    for x_rows, y_rows in zip(*pieces, strict=True):
                        # Sums of squared errors: their denominator is known once all rows are in.
                        out = coder(x_rows, y_rows, dead[name], total_variance=1.0, k=k[name])
                        # EDIT: the loss.
                        loss = out.fvu + cfg.auxk_alpha * out.auxk_loss + out.multi_topk_fvu / 8
                        loss.backward()
                        errors[name] += torch.stack(out[3:]).detach()
                        firing[name].observe(out.top_acts, out.top_indices)

        # One denominator for all rows of the step, then one update.
        metrics: dict[str, Tensor | float] = {}
        for name, coder in bank.items():
            seen = moments[bank.hookpoint[name]]
            for metric, error in zip(("fvu", "auxk", "multi_topk_fvu"), errors[name], strict=True):
                metrics[f"{metric}/{name}"] = error / seen.total_variance
            metrics[f"grad_norm/{name}"] = finish_gradients_(coder, seen.total_variance)
        logs.refuse_bad_numbers(metrics, step + 1, run)
        rows = int(next(iter(moments.values())).count)
        for name, optimizer in optimizers.items():
            metrics[f"lr/{name}"] = optimizer.step(step, total_steps, cfg.lr_warmup_steps)
            # EDIT: what is logged.
            metrics[f"l0/{name}"] = firing[name].end_step(rows)
            metrics[f"dead_share/{name}"] = firing[name].dead_share()
            metrics[f"k/{name}"] = k[name]
        log.step(step + 1, metrics, rows, firing)

        if (step + 1) % cfg.save_every == 0 or step + 1 == total_steps:
            if cfg.save_best:
                checkpoint.keep_best(run, step + 1, evaluate(), bank, optimizers)
            checkpoint.save(run, step + 1, log.seconds, data, bank, optimizers, firing)

    summary = checkpoint.summarize(run, total_steps, log.seconds, evaluate(), firing)
    log.finish(run, summary)
    return summary


def main() -> None:
    """Train what the command line asks for; a mistake that the user can mend ends with code 2."""
    try:
        train(tyro.cli(TrainConfig, description=__doc__, use_underscores=True))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

"""Train sparse autoencoders or transcoders on the activations of a frozen language model.

    python train_sae.py MODEL DATASET                       SAEs on every layer's residual stream
    python train_sae.py gpt2 DATA --hookpoints "h.*.mlp" --transcode --skip_connection
    accelerate launch --config_file accelerate_configs/8gpu.yaml train_sae.py MODEL DATASET

Blocks marked EDIT are what experiments change; what would make a result wrong is in sae/.
"""

import os
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel
from tyro.conf import Positional, arg

from sae import checkpoint, dry_run, launch, logs, watch
from sae.bad_steps import BadSteps
from sae.bank import CoderBank, costs
from sae.blocks import hold_out
from sae.config import Activation, SparseCoderConfig, check_flags
from sae.data import TEXT_FLAGS, load_tokens
from sae.end_to_end import EndToEnd
from sae.evaluate import first_moments, held_out
from sae.exchange import Exchange
from sae.hookpoints import capture, find_hookpoints, load_lm, measure, token_limits
from sae.optim import CoderOptimizer, OptimizerName, finish_gradients_, k_at
from sae.run_folder import open_run, recorded_flags
from sae.sums import StepSums


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
    """Sequences per rank and LM forward."""
    grad_acc_steps: int = 1
    """LM forwards per optimizer step."""
    max_bad_steps: int = 10
    """Steps with NaN or Inf that are skipped before the run ends."""
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
    eval_every: int = 0
    """Optimizer steps between evaluations, of the LM's predictions too; 0: none but the last."""
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
    kernels: launch.Choice = "auto"
    """native: C or, on CUDA, Triton; auto: if it can be had; int8: C, searching latents in int8."""
    compile: bool = False
    """Compile the LM's blocks by torch.compile, except those with hookpoints inside."""
    distribute_modules: bool = False
    """Keep each coder on one rank only, and send that rank the rows of all ranks."""
    layer_to_rank: tuple[str, ...] = ()
    """Owners by hand, "layers.0=0 layers.1=1" or a .json file; default: by cost."""
    timeout: float = 10.0
    """Minutes that a rank waits for another before the run ends."""
    dry_run: bool = False
    """Print hookpoints, owners and memory per rank, from the LM's config alone."""
    save_dir: str = "checkpoints"
    """Folder of runs."""
    run_name: str | None = None
    """Folder of this run below save_dir; default: the model's name."""
    resume: bool = False
    """Continue the run from its newest checkpoint; without one, start it."""
    save_every: int = 1000
    """Optimizer steps between checkpoints."""
    keep_last: int = 2
    """Checkpoints to keep."""
    save_best: bool = False
    """At every checkpoint, keep each coder whose held-out FVU is its lowest so far in best/."""
    log_every: int = 1
    """Optimizer steps between log entries."""
    log_with: logs.Tracker = "tensorboard"
    """Tracker that accelerate writes to."""

    def __post_init__(self) -> None:
        check_flags(self)


def train(
    cfg: TrainConfig, lm: PreTrainedModel | None = None, dataset: Dataset | Tensor | None = None
) -> dict[str, Any]:
    """Run the training that `cfg` describes; return what `summary.json` says.

    `lm`, which is frozen, and `dataset` (with `input_ids` or text, or a tensor of token blocks)
    replace `cfg.model` and `cfg.dataset`. Raises UsageError for anything the user can mend.
    """
    # The launch. Ranks that were not started alike, or do not know each other, end here.
    run = Path(cfg.save_dir) / (cfg.run_name or Path(cfg.model).resolve().name)
    dtype = launch.working_dtype(cfg.mixed_precision)
    hub: dict[str, Any] = {"revision": cfg.revision, "token": cfg.hf_token}
    choose = (cfg.hookpoints, cfg.layers, cfg.layer_stride)
    with_head = cfg.loss_fn != "fvu" or cfg.eval_every > 0
    skeleton, places = find_hookpoints(lm or cfg.model, *choose, with_head=with_head, **hub)
    accelerator = Accelerator(**launch.arguments(run, cfg.log_with, dtype, cfg.timeout))
    ranks = launch.join(accelerator, cfg.timeout, cfg.kernels)
    per_step = cfg.batch_size * cfg.grad_acc_steps * ranks.world
    flags = recorded_flags(cfg, lm, dataset)
    resumes = open_run(run, {**flags, "sequences_per_step": per_step}, ranks)

    # The language model, frozen, and no more of it than the hookpoints need.
    lm = lm or load_lm(cfg.model, skeleton, places, dtype, ranks.device, cfg.load_in_8bit, **hub)
    lm = launch.shard(accelerator, lm, places, cfg.compile)

    # Coders, one per hookpoint and seed: all of them, or those that live on this rank.
    hookpoints = measure(lm, places, ranks.device)
    shape = SparseCoderConfig.of(cfg)
    cost = costs(hookpoints, shape, cfg.init_seeds)
    exchange = Exchange(ranks, cost, cfg.distribute_modules, cfg.layer_to_rank)
    bank = CoderBank(exchange.here(hookpoints), shape, cfg.init_seeds, ranks.device, dtype)

    # Tokens: the first blocks are held out, the rest is trained on in shuffled order.
    with ranks.main_first():
        source = load_tokens(
            cfg.dataset if dataset is None else dataset,
            tokenizer=lm.name_or_path or cfg.model,
            limits=token_limits(lm),
            **{name: flags[name] for name in TEXT_FLAGS},
            **hub,
        )
    held, numbers = hold_out(source, cfg.eval_tokens, cfg.max_examples, per_step)
    total_steps, data = len(numbers) // per_step, source.fingerprint
    order = source.order(numbers, cfg.shuffle_seed)[: total_steps * per_step]

    # For each coder an optimizer and a record of what fires.
    rule = (cfg.optimizer, cfg.lr, cfg.adam_8bit)
    optimizers = {name: CoderOptimizer(coder, *rule) for name, coder in bank.items()}
    bad_steps = BadSteps(cfg.max_bad_steps, ranks)
    sums = StepSums(bank, cfg.dead_feature_threshold)
    firing = sums.firing
    coders = (exchange, bank, optimizers)
    first_step, seconds = checkpoint.load(run, data, *coders, firing) if resumes else (0, 0.0)
    if cfg.finetune is not None and not resumes:
        bank.load_pretrained(cfg.finetune)
    elif not resumes:
        first_batches = ranks.batches(source, order[:per_step], cfg.batch_size)
        bank.center_(*first_moments(lm, places, first_batches, ranks, cfg.exclude_tokens))
    whole_lm = EndToEnd(lm, bank, cfg) if cfg.loss_fn != "fvu" else None
    evaluate = partial(held_out, lm, *coders, source, held, cfg.exclude_tokens)

    log = logs.RunLog(accelerator, exchange, flags, range(first_step, total_steps), seconds)
    log.start(held_tokens=len(held) * source.block_len)
    batches = ranks.batches(source, order[first_step * per_step :], cfg.batch_size)
    for step in range(first_step, total_steps):
        dead = sums.start_step(cfg.auxk_alpha > 0)
        k = {name: k_at(step, cfg.k_decay_steps, coder) for name, coder in bank.items()}

        for tokens in islice(batches, cfg.grad_acc_steps):
            if whole_lm is not None:  # the LM's own loss, with reconstructions spliced in
                whole_lm.backward(tokens, sums, dead, k)
                continue
            # EDIT: what goes in and what should come out, {hookpoint: (x, y)}.
            pairs = capture(lm, tokens, places, cfg.exclude_tokens, inputs=cfg.transcode)
            sums.rows += len(pairs[places[0]][1])
            for place, (x, y) in exchange.to_owners(pairs).items():
                sums.add_targets(place, y)
                for name, coder in bank.at(place):
                    pieces = (x.chunk(cfg.micro_acc_steps), y.chunk(cfg.micro_acc_steps))
                    for x_rows, y_rows in zip(*pieces, strict=True):
                        # Sums of squared errors: their denominator is known once all rows are in.
                        out = coder(x_rows, y_rows, dead[name], total_variance=1.0, k=k[name])
                        # EDIT: the loss.
                        loss = out.fvu + cfg.auxk_alpha * out.auxk_loss + out.multi_topk_fvu / 8
                        loss.backward()
                        sums.add(name, out)

        # One denominator for all rows of the step, then one update.
        exchange.sum_replicas_(*sums.tensors(), *bank.gradients())
        rows, metrics = sum(ranks.gather(sums.rows)), ranks.traffic()
        if whole_lm is not None:
            metrics[cfg.loss_fn] = whole_lm.finish_gradients_(sums, exchange)
        for name, coder in bank.items():
            metrics |= sums.losses(name)
            metrics[f"grad_norm/{name}"] = finish_gradients_(coder, sums.variance(name))
        good = bad_steps.good(metrics, step + 1, order[step * per_step :][:per_step])
        for name, optimizer in optimizers.items() if good else ():
            metrics[f"lr/{name}"] = optimizer.step(step, total_steps, cfg.lr_warmup_steps)
            # EDIT: what is logged.
            metrics[f"l0/{name}"] = firing[name].end_step(rows)
            metrics[f"dead_share/{name}"] = firing[name].dead_share()
            metrics[f"k/{name}"] = k[name]
        log.step(step + 1, metrics, rows, sums)

        if cfg.eval_every and (step + 1) % cfg.eval_every == 0:
            log.evaluation(step + 1, evaluate())
        stop = bad_steps.verdict or ranks.stop_reason()
        if stop or (step + 1) % cfg.save_every == 0 or step + 1 == total_steps:
            if cfg.save_best:
                checkpoint.keep_best(run, step + 1, evaluate(), *coders)
            checkpoint.save(run, step + 1, log.seconds, data, *coders, firing, cfg.keep_last)
        if stop:
            log.stop(stop, step + 1)

    final = log.evaluation(total_steps, evaluate())
    summary = checkpoint.summarize(run, total_steps, log.seconds, final, exchange, firing)
    return log.finish(run, summary)


def main() -> None:
    """Train what the command line asks for; the README lists the exit codes."""
    with watch.exit_codes():
        cfg = tyro.cli(TrainConfig, description=__doc__, use_underscores=True)
        dry_run.show(cfg) if cfg.dry_run else train(cfg)


if __name__ == "__main__":
    main()

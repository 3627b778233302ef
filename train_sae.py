"""Train sparse autoencoders or transcoders on the activations of a frozen language model.

    python train_sae.py MODEL DATASET                       SAEs on every layer's residual stream
    python train_sae.py gpt2 DATA --hookpoints "h.*.mlp" --transcode --skip_connection
    accelerate launch --config_file accelerate_configs/8gpu.yaml train_sae.py MODEL DATASET

Blocks marked EDIT are what experiments change; what would make a result wrong is in sae/.
"""

from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import tyro
from accelerate import Accelerator
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from sae.coders.bank import CoderBank, costs
from sae.coders.families.family import check_flags
from sae.coders.firing import FiringRecord, dead_latents
from sae.config import (
    DataConfig,
    MachineConfig,
    ModelConfig,
    RunConfig,
    SparseCoderConfig,
    TrainingConfig,
    accept_names,
)
from sae.data.blocks import BatchPlan, split_blocks
from sae.data.text import load_tokens
from sae.judge.figures import held_out_figures, rehearse_end
from sae.kernels.twins import Kernels
from sae.lm.capture import Capture, each_once, in_pieces, measure_widths
from sae.lm.joined import join
from sae.lm.loading import fetch_weights, find_hookpoints, load_lm, token_limits
from sae.lm.probe import checked
from sae.lm.rows import RowRule
from sae.placement import launch, owners, signals
from sae.placement.dealing import Dealer
from sae.placement.entry import run_as_script
from sae.placement.exchange import Exchange
from sae.placement.exit_codes import Stopped
from sae.runs import checkpoint
from sae.runs.dry_run import show_plan
from sae.runs.folder import open_run, recorded_flags, run_folder
from sae.runs.lock import unlock, unlock_all
from sae.runs.norm_limits import limit_norms
from sae.runs.outcome import keep_best, summarize
from sae.runs.part_scales import coder_config, scale_parts
from sae.training.bad_steps import BadSteps, Metrics, ask, bad_number
from sae.training.end_to_end import EndToEnd
from sae.training.given_rows import Activations, GivenRows
from sae.training.logs import RunLog, show_summary
from sae.training.losses import auxiliary_loss, divide_gradients_, own_losses, wake_dead_
from sae.training.optim import CoderOptimizer
from sae.training.schedules import Schedule, dealing, sequences_per_batch
from sae.training.start import first_moments
from sae.training.state import TrainingState
from sae.training.step_sums import StepSums


@dataclass(frozen=True)
class TrainConfig:
    """The flags of a run, in groups: names, defaults and help stand in sae/config.py, once."""

    coder: SparseCoderConfig = SparseCoderConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    training: TrainingConfig = TrainingConfig()
    machine: MachineConfig = MachineConfig()
    run: RunConfig = RunConfig()
    # EDIT: flags of your own, with a default and a docstring, read as `cfg.name` below.

    def __post_init__(self) -> None:
        accept_names(self)
        check_flags(self)


def train(
    cfg: TrainConfig,
    lm: PreTrainedModel | None = None,
    dataset: Dataset | Tensor | None = None,
    activations: Activations | None = None,
) -> dict[str, Any]:
    """Run the training that `cfg` describes; return what `summary.json` says.

    `lm` and `dataset` (with `input_ids` or text, or a tensor of token blocks) replace the names in
    `cfg`; `activations` ({hookpoint: rows} items) both. Raises UsageError for what users can mend.
    """
    training, machine, data, folder = cfg.training, cfg.machine, cfg.data, run_folder(cfg)

    # The launch. Ranks that were not started alike, or do not know each other, end here.
    dtype = launch.working_dtype(machine.mixed_precision)
    head = "needed" if training.uses_lm_loss else "wanted" if cfg.run.eval_every else "no"
    given = None if activations is None else GivenRows.of(activations, cfg)
    if given is None:
        skeleton, hookpoints = find_hookpoints(cfg.model, lm, head)
    accelerator = Accelerator(**launch.arguments(folder, cfg.run.log_with, dtype, machine.timeout))
    ranks = launch.connect(accelerator, machine)
    kernels = Kernels(machine.kernels)
    kernels_description = kernels.describe(ranks.device)
    per_batch = sequences_per_batch(cfg, ranks.world, given.block_len if given else data.ctx_len)
    flags = recorded_flags(cfg, given or lm, given or dataset, per_batch)
    resumes = open_run(folder, flags, cfg, ranks)

    # The frozen language model, no more of it than the hookpoints need; or rows made elsewhere.
    if given is None:
        ranks.main_first(fetch_weights, cfg.model, skeleton)
        lm = skeleton if lm else load_lm(cfg.model, skeleton, hookpoints, dtype, ranks.device)
        lm = launch.shard(accelerator, lm, hookpoints, machine.compile)
        widths = measure_widths(lm, hookpoints, ranks.device)
        rule = RowRule(cfg.model.exclude_tokens, cfg.model.exclude_positions)
        capture = Capture(lm, hookpoints, rule, cfg.coder.transcode, machine.kernels != "torch")
        capture = checked(capture, data.ctx_len)
        load = partial(load_tokens, data, cfg.model, token_limits(lm), lm.name_or_path, dataset)
    else:
        capture, widths = given, given.widths
    capture, widths = join(capture, widths, cfg, dtype, ranks.main_first)

    # Which ranks train the coders of which hookpoint.
    seeds, placement = training.init_seeds, owners.Placement.of(machine, ranks.world)
    exchange = Exchange(ranks, costs(widths, cfg.coder, seeds), *placement)

    # Tokens: the first blocks are held out, the rest is trained on in shuffled order.
    source = given or ranks.main_first(load)
    held_out, trained_on = split_blocks(source, data, per_batch)
    seed, dealt = data.shuffle_seed, dealing(cfg, per_batch, source.block_len, len(trained_on))
    plan = BatchPlan(source.order(trained_on, seed), per_batch, *dealt, seed)
    schedule = Schedule(training, plan.total_steps, per_batch * source.block_len // plan.steps)

    # Rows too long to be trained on, by those of the first batch.
    first_batches = partial(ranks.batches, source, plan.first, training.batch_size)
    capture = limit_norms(capture, cfg.model.exclude_norm, first_batches(), folder, resumes, ranks)
    capture = scale_parts(capture, first_batches(), folder, resumes, ranks)

    # Coders of this rank, by hookpoint and seed, each with an optimizer and a record of what fires.
    here = exchange.trained_here(widths)
    how = (dtype, kernels, exchange.groups, exchange.post, own_losses(cfg.coder, training))
    with ranks.together():
        bank = CoderBank(here, coder_config(cfg.coder, capture), seeds, ranks.device, *how)
        optimizers = {name: CoderOptimizer(coder, schedule) for name, coder in bank.items()}
    firing = {n: FiringRecord.of(c, schedule.dead_threshold(c)) for n, c in bank.items()}
    state = TrainingState(exchange, bank, optimizers, firing)
    evaluate = partial(held_out_figures, capture, state, source, held_out)
    rehearse_end(folder, capture, state, source, held_out)

    # The start: the last checkpoint, trained coders, or the means of the first batch's rows.
    first_step, seconds = 0, 0.0
    if resumes:
        first_step, seconds = checkpoint.restore(folder, source, state)
    else:
        schedule.check()
        bank.center_(*first_moments(capture, first_batches(), ranks), training.rms_units)
    if not resumes and training.finetune is not None:
        from_where = training.finetune, training.allow_pt, cfg.model.hf_token
        ranks.main_first(bank.load_pretrained, *from_where)
        bank.normalize_decoders_()
    end_to_end = EndToEnd(capture, bank, training, source.masked) if training.uses_lm_loss else None
    bad_steps = BadSteps(training.max_bad_steps, ranks, plan.steps)
    log = RunLog(accelerator, exchange, flags, range(first_step, plan.total_steps), seconds)
    log.start(len(held_out) * source.block_len, kernels_description)
    forwards = ranks.batches(source, plan.from_step(first_step), training.batch_size)
    dealer = Dealer(capture, exchange, plan, forwards, machine.batch_on_host)
    signals.training_begins()
    for step in range(first_step, plan.total_steps):
        sums = StepSums(bank)
        bank.zero_grad(set_to_none=True)
        ranks.clear_traffic()
        k = {name: schedule.k(step, coder) for name, coder in bank.items()}
        dead = dead_latents(firing) if training.revives else dict.fromkeys(firing)
        of_auxk = dead if training.auxk_alpha > 0 else dict.fromkeys(firing)
        if end_to_end is not None:  # the LM's own loss, with reconstructions spliced in
            for tokens in islice(forwards, training.grad_acc_steps):
                end_to_end.backward(tokens, sums, of_auxk, k)
        for groups, counted, pairs in dealer.rows(step) if end_to_end is None else ():
            sums.rows.update(counted)
            # EDIT: what goes in and what should come out, {hookpoint: (x, y)}.
            for hookpoint, (x, y) in each_once(pairs):  # what was used is freed
                sums.add_rows(hookpoint, x, y)
                for name, coder in bank.at(hookpoint):
                    pieces = in_pieces(x, y, training.micro_acc_steps, groups.get(hookpoint))
                    for x_rows, y_rows, group in pieces:
                        errors = coder.errors(x_rows, y_rows, of_auxk[name], k[name], group)
                        # EDIT: the loss, in units of squared error: FVU once all rows are in.
                        loss = errors.objective + auxiliary_loss(errors, training.auxk_alpha)
                        loss.backward()
                        sums.add(name, errors)
                        del x_rows, y_rows, errors, loss
                del x, y

        # One denominator for all rows of the step; one update, which leaves decoders unit-norm.
        exchange.sum_replicas_(*sums.tensors(), *bank.gradients())
        rows = ranks.sum_counts(sums.rows)
        metrics: Metrics = {}
        if end_to_end is not None:
            metrics[training.loss_fn] = sums.mean_lm_loss()
            end_to_end.combine_gradients_(sums)
        for name, coder in bank.items():
            sums.add_penalty_(name, coder, rows, k[name])
            metrics |= sums.losses(name)
            wake_dead_(coder, dead[name], sums.inputs(name), training.wake_alpha)
            metrics[f"grad_norm/{name}"] = divide_gradients_(coder, sums.variance(name))
        seen = {name: (sums.fired[name], rows[bank.hookpoint[name]]) for name in firing}
        metrics, dead_then = ask(metrics, firing, seen)  # the step's one question to the device
        bad = bad_number(metrics, ranks)
        if bad is None:
            for name, optimizer in optimizers.items():
                optimizer.step(step)
                firing[name].add_step_(*seen[name], dead_then[name])
                bank[name].family.update_threshold_(bank[name], sums.levels.get(name))
                # EDIT: what is logged.
                metrics[f"lr/{name}"] = optimizer.lr
                metrics[f"l0/{name}"] = sums.fired[name].sum() / rows[bank.hookpoint[name]]
                metrics[f"dead_share/{name}"] = firing[name].dead_share()
                metrics[f"k/{name}"] = k[name]
            metrics |= ranks.traffic()
        else:
            bad_steps.skip(bad, step + 1, plan.sequences(step))
            metrics = {"skipped_steps": float(bad_steps.skipped)}
        log.step(step + 1, metrics, max(rows.values()), state)
        if log.histograms_are_due(step + 1):
            log.histograms(step + 1, state)
            for record in firing.values():
                record.clear_recent()
        if cfg.run.eval_every and (step + 1) % cfg.run.eval_every == 0:
            log.evaluation(step + 1, evaluate().scalars())
        stop = bad_steps.verdict or ranks.stop_reason()
        if stop or step + 1 == plan.total_steps or (step + 1) % cfg.run.save_every == 0:
            if cfg.run.save_best:
                keep_best(folder, step + 1, evaluate().fvu(), state)
            checkpoint.save(folder, step + 1, log.seconds, source, state, cfg.run.keep_last)
        if stop:
            log.close()
            unlock(folder)
            raise stop if isinstance(stop, Exception) else Stopped.saved(stop, step + 1)

    evaluation = evaluate()
    log.evaluation(plan.total_steps, evaluation.scalars())
    summary = summarize(folder, plan.total_steps, log.seconds, *evaluation.as_json(), state)
    log.close()
    unlock(folder)
    if ranks.main:
        show_summary(folder, summary, cfg.run.log_with)
    return summary


def main() -> None:
    """Train what the command line asks for; docs/robustness.md lists the exit codes."""
    with run_as_script(unlock_all):
        flat = (tyro.conf.OmitArgPrefixes,)
        cfg = tyro.cli(TrainConfig, description=__doc__, use_underscores=True, config=flat)
        show_plan(cfg) if cfg.run.dry_run else train(cfg)


if __name__ == "__main__":
    main()

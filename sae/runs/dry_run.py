"""What a run would hold and where, from flags, launch file and LM config: no weights, no data.

Where that is too much, a placement in which it fits.
"""

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..coders.bank import CoderBank, costs
from ..coders.functional import k_aux
from ..coders.own_losses import dead_learn_alone, selected_over_k
from ..coders.sharded import ShardedCoder
from ..coders.sparse_coder import SparseCoder
from ..config import DENSE_WEIGHTS, Widths
from ..flag_checks import UsageError
from ..lm.beside import named, others_of
from ..lm.capture import measure_widths
from ..lm.hookpoints import text_config, text_layers
from ..lm.joined import joined_widths, parts_of
from ..lm.loading import find_hookpoints
from ..placement.groups import Group
from ..placement.launch import asks_for_cpu, on_cpu, read_mpi, sharded, working_dtype
from ..placement.owners import Placement, owned_by, plan_owners, read_owners
from ..training.losses import own_losses
from ..training.optim import check_optimizer, state_bytes, update_bytes
from ..training.schedules import Schedule, dealing, sequences_per_batch

_ENTRY = 32  # bytes of one active latent of one row
_ENTRY_BY_PREFIX = 40  # more of it where entries are put in the order of prefixes too
_WAITING_ENTRY = 26  # of it, until its gradient goes through the encoder
_LOOSE_ENTRY = 48  # where rows have numbers of them of their own
_ENTRIES_TO_A_PIECE = 512  # of which Triton keeps a sum of its own where latents fire often

_GIB = 2**30
_SHARE = 7 / 8  # of the memory; a layer of the LM, and a block of rows in an encoder, need the rest


@dataclass(frozen=True)
class Layers:
    """Who owns which layer, in a plan that sends nothing."""

    rank: int
    owner: dict[str, int]

    def send(self, rank: int, key: str, tensors: list[Tensor]) -> None:
        """Not asked for."""
        raise AssertionError("a plan sends nothing")

    def receive(self, rank: int, key: str) -> list[Tensor]:
        """Not asked for."""
        raise AssertionError("a plan receives nothing")

    def settle(self) -> None:
        """There is nothing."""


class RankMemory(NamedTuple):
    """Bytes of the tensors that live on one rank through a step.

    What a layer of the LM, or a block of rows in an encoder, needs while it runs comes on top.
    """

    lm: int
    coders: int
    gradients: int
    optimizer: int
    in_flight: int
    """Captured rows, those that travel, and what one coder makes of its rows, or of an update."""


def show_plan(cfg: Any) -> None:
    """Print hookpoints, owners, and parameters and GiB per rank; only rank 0 prints.

    `cfg` is the script's `TrainConfig`. Raises UsageError where the run itself would, as far as
    the LM's config can tell.
    """
    read_mpi()
    if int(os.environ.get("RANK", "0")):
        return
    world = int(os.environ.get("WORLD_SIZE", "1"))
    lm, hookpoints = find_hookpoints(cfg.model)
    parameters, widths = sum(p.numel() for p in lm.parameters()), _widths(lm, hookpoints)
    for name, of_other in others_of(cfg.model).items():
        other, theirs = find_hookpoints(of_other)
        parameters += sum(p.numel() for p in other.parameters())
        widths |= {named(h, name): width for h, width in _widths(other, theirs).items()}
    if cfg.coder.crosscoder:
        parts_of(widths)
        widths = joined_widths(widths)
    owner = _owners(cfg, world, widths)
    replicas = world == 1 or not cfg.machine.owning
    plan = memory_by_rank(cfg, world, parameters, widths, owner)
    rows = [["rank", *(name.replace("_", " ") for name in RankMemory._fields), "GiB", "coders of"]]
    for rank, memory in enumerate(plan):
        sizes = [f"{size / _GIB:.2f}" for size in (*memory, sum(memory))]
        who = "each" if replicas and world > 1 else str(rank)
        mine = widths if replicas else owned_by(owner, rank)
        rows.append([who, *sizes, " ".join(mine) or "nothing"])
    batch, steps = _batch(cfg, world)
    transcode = cfg.coder.transcode
    latents = {cfg.coder.latents(w.d_in if transcode else w.d_out) for w in widths.values()}
    ranks = "rank" if world == 1 else "ranks"
    print(f"LM      {parameters:,} parameters up to the last of {len(widths)} hookpoints")
    print(f"coders  of {', '.join(f'{n:,}' for n in sorted(latents))} latents")
    of_batch = f", of a batch of {batch:,}" if steps > 1 else ""
    print(f"step    {batch // steps:,} tokens{of_batch} on {world} {ranks}")
    if cfg.data.max_examples is not None:
        print(f"run     {cfg.data.max_examples * cfg.data.ctx_len:,} tokens")
    columns = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for row in rows:
        print("  ".join([*map(str.rjust, row, columns), row[-1]]))
    if line := advice(cfg, world, parameters, widths, max(map(sum, plan))):
        print(line)


def _owners(cfg: Any, world: int, widths: dict[str, Widths]) -> dict[str, range]:
    weight = costs(widths, cfg.coder, cfg.training.init_seeds)
    _, fixed, each = Placement.of(cfg.machine, world)
    return plan_owners(weight, world, read_owners(fixed), each)


def advice(
    cfg: Any, world: int, lm_parameters: int, widths: dict[str, Widths], fullest: float
) -> str | None:
    """How to place coders where the `fullest` rank holds too much, in words; else nothing."""
    memory, whose = _memory()
    room = _SHARE * memory
    if fullest <= room:
        return None
    said = f"{fullest / _GIB:.1f} GiB are too much for {whose} {memory / _GIB:.0f} GiB, of which "
    said += "the LM's forward needs some"
    if cfg.training.uses_lm_loss:
        return (
            f"{said}, and with --loss_fn {cfg.training.loss_fn} every rank holds every coder: take "
            f"fewer --hookpoints or latents, or a smaller --batch_size"
        )
    least = fullest
    for each in (n for n in range(1, world + 1) if world % n == 0):
        machine = {"distribute_modules": True, "shard_latents": False, "layer_to_rank": ()}
        machine["ranks_per_coder"] = each
        try:
            other = replace(cfg, machine=replace(cfg.machine, **machine))
            owner = _owners(other, world, widths)
            held = max(map(sum, memory_by_rank(other, world, lm_parameters, widths, owner)))
        except UsageError:  # a coder that so many cannot share, or that has no owner
            continue
        least = min(least, held)
        if held <= room:
            flags = "--distribute_modules" + (f" --ranks_per_coder {each}" if each > 1 else "")
            return f"{said}: with {flags} the fullest rank holds {held / _GIB:.1f} GiB"
    return (
        f"{said}, and no --ranks_per_coder brings the fullest of {world} ranks below "
        f"{least / _GIB:.1f} GiB: take more ranks, a smaller --batch_size, or fewer latents"
    )


def _memory() -> tuple[int, str]:
    """Bytes of memory for each rank, and whose they are."""
    if torch.cuda.is_available() and not on_cpu():
        return torch.cuda.get_device_properties(0).total_memory, "this GPU with its"
    if asks_for_cpu():
        machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return machine // int(os.environ.get("LOCAL_WORLD_SIZE", "1")), "a rank of this machine's"
    return 80 * _GIB, "a GPU of"


def _widths(lm: PreTrainedModel, hookpoints: list[str]) -> dict[str, Widths]:
    """The widths by a forward on shapes alone; those of the config where it needs weights."""
    try:
        return measure_widths(lm, hookpoints)
    except UsageError as error:
        prefix, depth = text_layers(lm)
        if not {f"{prefix}.{i}" for i in range(depth)}.issuperset(hookpoints):
            raise UsageError(
                f"--dry_run: {type(lm).__name__} runs only with its weights, so the widths of its "
                f"modules are not known before the run measures them. {error}"
            ) from None
        width = text_config(lm.config).hidden_size
        return dict.fromkeys(hookpoints, Widths(width, width))


def memory_by_rank(
    cfg: Any, world: int, lm_parameters: int, widths: dict[str, Widths], owner: dict[str, range]
) -> list[RankMemory]:
    """What each rank holds; of replicas, which all hold the same, one."""
    distributed = cfg.machine.owning is not None and world > 1
    return [
        _rank_memory(cfg, world, lm_parameters, widths, owner, rank if distributed else None)
        for rank in range(world if distributed else 1)
    ]


def _rank_memory(
    cfg: Any,
    world: int,
    lm_parameters: int,
    widths: dict[str, Widths],
    owner: dict[str, range],
    rank: int | None,
) -> RankMemory:
    """What a rank holds that trains its own coders or, where it has no number, all."""
    training = cfg.training
    item = working_dtype(cfg.machine.mixed_precision).itemsize
    if sharded():
        lm_parameters = -(-lm_parameters // world) + min(_live_parameters(), lm_parameters)
    mine = {name: w for name, w in widths.items() if rank is None or rank in owner[name]}
    groups = {
        name: Group(rank - owner[name].start, len(owner[name]))
        for name in mine
        if rank is not None and len(owner[name]) > 1
    }
    post = None
    if rank is not None and cfg.coder.cross_layer:
        post = Layers(rank, {name: ranks.start for name, ranks in owner.items()})
    losses = own_losses(cfg.coder, training)
    bank = CoderBank(
        mine, cfg.coder, training.init_seeds, "meta", groups=groups, post=post, losses=losses
    )
    coders = [coder for _, coder in bank.items()]
    for coder in coders:
        check_optimizer(training, coder)
    weights = sum(4 * p.numel() for coder in coders for p in coder.parameters())
    state = sum(state_bytes(coder, training.optimizer, training.adam_8bit) for coder in coders)

    batch, steps = _batch(cfg, world)
    tokens = rows = training.batch_size * cfg.data.ctx_len
    inputs = cfg.coder.transcode
    width = {name: w.d_out + (w.d_in if inputs else 0) for name, w in widths.items()}
    in_flight = tokens * sum(width.values())
    waiting = batch // world * sum(width.values())
    if rank is not None:
        waiting = batch * sum(width[name] for name in mine)
        sent = sum(w * len([r for r in owner[name] if r != rank]) for name, w in width.items())
        own = sum(width[name] for name in mine)
        # Sent, received, and joined with what was here already.
        in_flight += tokens * (sent + (world - 1) * own + world * own)
        rows = world * tokens
    if steps > 1:
        rows = -(-batch // (steps if rank is not None else steps * world))
    piece = -(-rows // training.micro_acc_steps)
    working = max((step_bytes(cfg, coder, piece, item, steps) for coder in coders), default=0)
    if groups:  # candidates of 8 bytes: sent, received, in order, sent, received
        first = Schedule(training, 1, rows)  # where k falls it is largest
        k = max(
            min(selected_over_k(coder) * first.k(0, coder), cfg.coder.latents(coder.d_in))
            for coder in coders
        )
        if training.auxk_alpha > 0:
            k += max(k_aux(coder.d_out) for coder in coders)
        working += 5 * 8 * k * piece
    updates = max((update_bytes(coder, training.optimizer) for coder in coders), default=0)
    lm = lm_parameters * (1 if cfg.model.load_in_8bit else item)
    row_item = 4 if cfg.coder.crosscoder else item  # whose rows are divided in float32
    in_flight *= row_item
    if steps == 1:
        return RankMemory(lm, weights, weights, state, max(in_flight + working, updates))
    # A forward brings rows, or a step's rows are joined and trained on, or a coder is updated.
    waiting *= row_item
    busy = max(in_flight, -(-waiting // steps) + working, updates)
    on_host = cfg.machine.batch_on_host and not asks_for_cpu()
    return RankMemory(lm, weights, weights, state, busy + (0 if on_host else waiting))


def _batch(cfg: Any, world: int) -> tuple[int, int]:
    """Tokens of a batch on all ranks, and the steps that it is dealt to."""
    length = cfg.data.ctx_len
    sequences = sequences_per_batch(cfg, world, length)
    return sequences * length, dealing(cfg, sequences, length, cfg.data.max_examples).steps


def step_bytes(cfg: Any, coder: SparseCoder, rows: int, item: int, dealt: int = 1) -> int:
    """The most bytes that a forward and backward of `rows` rows hold beside weights and gradients.

    `item` is the size of the encoder's factors, `dealt` the steps of a batch. A block of pre_acts
    comes on top.
    """
    training, d_in, d_out = cfg.training, coder.d_in, coder.d_out
    k = Schedule(training, 1, rows).k(0, coder)
    wide = max(selected_over_k(coder), coder.family.candidates)
    active = min(wide * k, coder.num_latents)
    dead = min(k_aux(d_out), coder.num_latents) if training.auxk_alpha else 0
    floats = (1 + max(1, len(coder.prefixes))) * d_out  # the reconstruction; errors, by prefix
    if item < 4:  # targets in float32, and what a transcoder reads
        floats += d_out + (d_in if coder.cfg.transcode else 0)
    floats += d_out if dead else 0  # what dead latents leave of the error
    floats += 2 * d_out if coder.cfg.multi_topk else 0  # the same of 4k latents
    # Of every entry its activation, its latent and their gradients, as they come and by latent.
    in_triton = cfg.machine.kernels != "torch" and not asks_for_cpu()
    of_dead = rows * _ENTRY * dead
    if dead and in_triton:  # activations and gradients of all dead latents, at worst of all
        held = 4 if isinstance(coder, ShardedCoder) else 2  # as they are sent and received, too
        held += dead_learn_alone(coder)  # and their products
        of_dead = max(of_dead, held * item * min(rows * coder.num_latents, DENSE_WEIGHTS))
    entry = _LOOSE_ENTRY if coder.cfg.has_threshold else _ENTRY
    inputs = 0 if coder.cfg.transcode and item == 4 else item * d_in  # less b_dec, or rounded
    entry += _ENTRY_BY_PREFIX if coder.prefixes else 0
    found = rows * (4 * floats + inputs + entry * active) + of_dead
    # Latents and inputs of layers before wait for their gradients, of all pieces and seeds; where
    # other ranks read them those of this layer too, of all forwards.
    owners = cfg.machine.owning is not None and bool(coder.cfg.targets)
    if layers := max(len(coder.cfg.sources), int(owners)):
        waiting = inputs + _WAITING_ENTRY * active
        of_dead = max(of_dead - rows * _ENTRY * dead, 0) + rows * _WAITING_ENTRY * dead
        parts = training.micro_acc_steps * len(training.init_seeds)
        parts *= training.grad_acc_steps if owners and dealt == 1 else 1
        found += layers * parts * (rows * waiting + of_dead) + rows * 4 * d_out
    if training.grad_acc_steps * training.micro_acc_steps > 1:  # a gradient before it is added
        found += 4 * max(p.numel() for p in coder.parameters())
    if in_triton:
        pieces = rows * max(active, dead) // _ENTRIES_TO_A_PIECE
        found += 4 * pieces * max(d_in, d_out) // (coder.piece.of if coder.piece else 1)
    return found


def _live_parameters() -> int:
    """How many parameters of a sharded LM may be gathered at a time, by the launch file."""
    path = Path(os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", ""))
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return int(found.get("zero_optimization", {}).get("stage3_max_live_parameters", 1e9))

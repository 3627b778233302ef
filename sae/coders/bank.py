"""All coders of a run: one per hookpoint and seed."""

import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import SparseCoderConfig, Widths
from ..flag_checks import UsageError
from ..formats import kinds
from ..formats.hub import HubName, coders_folder
from ..formats.sparsify import opened, shapes_of
from ..kernels.twins import Kernels
from .across import stack
from .across.cross_layer import CrossLayerTranscoder, coder_class, link
from .across.crosscoder import Crosscoder, unfolded
from .across.passing import Post
from .families.family import family_of
from .moments import Moments, Scale
from .own_losses import NONE, OwnLosses
from .sharded import Group, ShardedCoder
from .sparse_coder import SparseCoder


class CoderBank(nn.Module):
    """Coder names in natural order -> coders; `hookpoint[name]` says what each one reads.

    A coder is named after its hookpoint; with several seeds `.seedS` is added.
    """

    def __init__(
        self,
        widths: dict[str, Widths],
        cfg: SparseCoderConfig,
        seeds: tuple[int, ...],
        device: str | torch.device,
        matmul_dtype: torch.dtype = torch.float32,
        kernels: Kernels | None = None,
        groups: Mapping[str, Group] | None = None,
        post: Post | None = None,
        losses: OwnLosses = NONE,
    ) -> None:
        """Coders at the hookpoints of `widths`.

        `matmul_dtype`: the encoders' products, forward and backward; weights are float32. Of the
        coders at the hookpoints in `groups` only what this rank of the group holds. Without `post`
        all layers of a cross-layer transcoder are here. `losses`: what they are trained on.
        """
        super().__init__()
        self.transcode = cfg.transcode
        """Whether some coder needs its module's input."""
        self.multi_topk = cfg.multi_topk
        self.hookpoint: dict[str, str] = {}
        self._coders, self._post = nn.ModuleDict(), post
        for hookpoint, width in widths.items():
            d_in, group = _d_in(width, cfg), (groups or {}).get(hookpoint)
            if group is not None and cfg.cross_layer:
                raise UsageError(
                    f"--layer_to_rank: with --cross_layer one rank has the coder of {hookpoint} "
                    f"whole: give it one"
                )
            of_one = stack.at(cfg, list(post.owner if post else widths), hookpoint)
            make = coder_class(of_one) if group is None else partial(ShardedCoder, group)
            for seed in seeds:
                name = hookpoint if len(seeds) == 1 else f"{hookpoint}.seed{seed}"
                # Every hookpoint and seed draws its own weights, whatever else is in the run. Of a
                # seed torch's generator reads 32 bits.
                own = zlib.crc32(f"{hookpoint} {seed}".encode())
                coder = make(
                    d_in,
                    of_one,
                    device,
                    torch.float32,
                    d_out=width.d_out,
                    generator=torch.Generator().manual_seed(own),
                )
                coder.matmul_dtype, coder.own_losses = matmul_dtype, losses
                if isinstance(coder, Crosscoder):
                    coder.on_scaled_rows = True
                if kernels is not None:
                    coder.use(kernels)
                self.hookpoint[name] = hookpoint
                self._coders[_key(name)] = coder
        link(dict(self.items()), self.hookpoint, post)

    @classmethod
    def holding(
        cls,
        coders: dict[str, SparseCoder],
        hookpoint: dict[str, str],
        device: str | torch.device,
        matmul_dtype: torch.dtype = torch.float32,
    ) -> "CoderBank":
        """A bank of coders that are there already, SAEs or transcoders or both."""
        bank = cls({}, next(iter(coders.values())).cfg, (0,), device)
        bank.transcode = any(coder.cfg.transcode for coder in coders.values())
        for name, coder in coders.items():
            coder.matmul_dtype = matmul_dtype
            bank.hookpoint[name] = hookpoint[name]
            bank._coders[_key(name)] = coder.to(device)
        link(coders, hookpoint)
        return bank

    def __getitem__(self, name: str) -> SparseCoder:
        coder = self._coders[_key(name)]
        assert isinstance(coder, SparseCoder)
        return coder

    def items(self) -> Iterator[tuple[str, SparseCoder]]:
        """(name, coder) pairs in natural order."""
        return ((name, self[name]) for name in self.hookpoint)

    def at(self, hookpoint: str) -> list[tuple[str, SparseCoder]]:
        """(name, coder) pairs of one hookpoint, one per seed."""
        return [(name, self[name]) for name, where in self.hookpoint.items() if where == hookpoint]

    def gradients(self) -> list[Tensor]:
        """The gradient of every parameter; where no row has reached it, zeros from now on.

        Before, what other ranks return for latents from here goes through their encoders.
        """
        for _, coder in self.items():
            if isinstance(coder, CrossLayerTranscoder):
                coder.finish_()
        if self._post is not None:
            self._post.settle()
        for parameter in self.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [p.grad for p in self.parameters() if p.grad is not None]

    def center_(self, x: dict[str, Moments], y: dict[str, Moments], rms_units: bool) -> None:
        """Start every coder from the means of its hookpoint's inputs and targets.

        With `rms_units` their scale is the coder's, too.
        """
        for name, coder in self.items():
            hookpoint = self.hookpoint[name]
            if rms_units:
                coder.scale = Scale.of(x[hookpoint], y[hookpoint])
            coder.center_(x[hookpoint].mean, y[hookpoint].mean)
            if isinstance(coder, CrossLayerTranscoder) and rms_units:
                coder.scale_sources_({name: Scale.of(x[name], y[name]) for name in y})

    def load_pretrained(
        self, source: str, allow_pt: bool = False, token: str | None = None
    ) -> None:
        """Copy the weights of trained coders of the same names, from a folder or the Hub.

        Pickles are opened only with `allow_pt`. Raises UsageError where a hookpoint is missing
        there or a shape or kind differs.
        """
        for name, coder in self.items():
            try:
                tensors = _weights_for(
                    coder, _files_of(name, source, allow_pt, token), name, allow_pt
                )
            except UsageError as error:
                raise UsageError(f"--finetune {source}: {error}") from None
            if coder.cfg.parts:
                tensors = unfolded(tensors, coder.cfg.parts)
            coder.load_state_dict(tensors)
            if isinstance(coder, Crosscoder):
                coder.balance_()

    def normalize_decoders_(self) -> None:
        """Scale every row of every decoder to unit norm, where decoders are so."""
        for _, coder in self.items():
            coder.normalize_decoder_()


def _weights_for(coder: SparseCoder, found: Path, name: str, allow_pt: bool) -> dict[str, Tensor]:
    """Of the weights of a trained coder those that `coder` has here."""
    mine = shapes_of(coder.cfg, coder.d_in, coder.d_out)
    if kinds.kind_of(found) in ("sparsify", None):  # a coder in pieces is never whole in memory
        with opened(found) as (cfg, _, _, stored):
            _check_kind(name, cfg, coder.cfg, stored.shapes, mine)
            return stored.read_all(coder.piece)
    cfg, _, _, tensors, _ = kinds.read(found, allow_pt)
    shapes = {key: tuple(t.shape) for key, t in tensors.items()}
    _check_kind(name, cfg, coder.cfg, shapes, mine)
    parts = {key: coder.piece and coder.piece.part_of(key) for key in tensors}
    return {
        key: t
        if (part := parts[key]) is None
        else t.narrow(part.dim, part.indices.start, len(part.indices)).clone()
        for key, t in tensors.items()
    }


def _files_of(name: str, source: str, allow_pt: bool, token: str | None) -> Path:
    """The folder of the coder of this name; of a single one that does not say where it reads."""
    named = Path(source).exists() or HubName.parse(source).folder is not None
    folder = coders_folder(source, None, None if named else name, allow_pt, token)
    if (folder / name).is_dir():
        return folder / name
    if not named:  # other programs' folders have names of their own
        folder = coders_folder(source, allow_pt=allow_pt, token=token)
    found = kinds.list_coders(folder)
    if len(found) == 1 and not kinds.says_hookpoint(next(iter(found.values()))):
        return next(iter(found.values()))
    if name not in found:
        raise UsageError(f"it has no {name}; give the folder that holds {name}")
    return found[name]


def _check_kind(
    name: str,
    theirs: SparseCoderConfig,
    ours: SparseCoderConfig,
    there: dict[str, tuple[int, ...]],
    here: dict[str, tuple[int, ...]],
) -> None:
    """Raise UsageError unless weights there fit a coder here."""
    if theirs.transcode != ours.transcode:
        kind = "a transcoder" if theirs.transcode else "an SAE"
        raise UsageError(f"{name} there is {kind}: see --transcode")
    mine, others = ([part.hookpoint for part in cfg.parts] for cfg in (ours, theirs))
    if mine != others:
        where = f"is a crosscoder over {', '.join(others)}" if others else "is no crosscoder"
        raise UsageError(f"{name} {where} there: see --crosscoder and --hookpoints")
    if (theirs.sources, theirs.targets) != (ours.sources, ours.targets):
        there_too = ", ".join((*theirs.sources, *theirs.targets)) or "none"
        raise UsageError(
            f"{name} goes with other layers there ({there_too}): see --cross_layer and --hookpoints"
        )
    thresholds = theirs.has_threshold or ours.has_threshold
    if thresholds and theirs.activation != ours.activation:
        raise UsageError(
            f"{name} is a {theirs.activation} coder there, and --activation here is "
            f"{ours.activation}: start from a coder of the kind that is to be trained"
        )
    if there != here:
        raise UsageError(
            f"{name} has {there} there and {here} here: set --num_latents, "
            f"--skip_connection and the model as there"
        )


def costs(
    widths: dict[str, Widths], cfg: SparseCoderConfig, seeds: tuple[int, ...]
) -> dict[str, int]:
    """Hookpoint -> seeds * num_latents * (d_in + d_out), what its coders weigh in a plan.

    Raises UsageError for a coder that cannot be.
    """
    found = {}
    if cfg.cross_layer:
        stack.check(widths)
    for hookpoint, width in widths.items():
        d_in = _d_in(width, cfg)
        if d_in == 0:
            raise UsageError(f"--transcode: {hookpoint} takes token ids, not activations")
        family_of(cfg).check(cfg, d_in, where=hookpoint)
        decoders = 1 + len(stack.at(cfg, list(widths), hookpoint).sources)
        found[hookpoint] = len(seeds) * cfg.latents(d_in) * (d_in + decoders * width.d_out)
    return found


def _d_in(width: Widths, cfg: SparseCoderConfig) -> int:
    return width.d_in if cfg.transcode else width.d_out


def _key(name: str) -> str:
    return name.replace(".", "/")  # a module's name cannot hold a dot

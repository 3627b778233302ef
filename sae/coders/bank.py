"""All coders of a run: one per hookpoint and seed."""

import zlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import SparseCoderConfig, Widths
from ..flag_checks import UsageError
from ..formats.hub import coder_folder
from ..formats.sparsify import newest_coders, opened, shapes_of
from ..kernels.twins import Kernels
from .families.family import family_of
from .functional import Moments
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
    ) -> None:
        """Coders at the hookpoints of `widths`.

        `matmul_dtype`: the encoders' products, forward and backward; weights are float32. Of the
        coders at the hookpoints in `groups` only what this rank of the group holds.
        """
        super().__init__()
        self.transcode = cfg.transcode
        """Whether some coder needs its module's input."""
        self.multi_topk = cfg.multi_topk
        self.hookpoint: dict[str, str] = {}
        self._coders = nn.ModuleDict()
        for hookpoint, width in widths.items():
            d_in, group = _d_in(width, cfg), (groups or {}).get(hookpoint)
            make = SparseCoder if group is None else partial(ShardedCoder, group)
            for seed in seeds:
                name = hookpoint if len(seeds) == 1 else f"{hookpoint}.seed{seed}"
                # Every hookpoint and seed draws its own weights, whatever else is in the run. Of a
                # seed torch's generator reads 32 bits.
                own = zlib.crc32(f"{hookpoint} {seed}".encode())
                coder = make(
                    d_in,
                    cfg,
                    device,
                    torch.float32,
                    d_out=width.d_out,
                    generator=torch.Generator().manual_seed(own),
                )
                coder.matmul_dtype = matmul_dtype
                if kernels is not None:
                    coder.use(kernels)
                self.hookpoint[name] = hookpoint
                self._coders[_key(name)] = coder

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
        """The gradient of every parameter; where no row has reached it, zeros from now on."""
        for parameter in self.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [p.grad for p in self.parameters() if p.grad is not None]

    def center_(self, x: dict[str, Moments], y: dict[str, Moments]) -> None:
        """Start every coder from the means of its hookpoint's inputs and targets."""
        for name, coder in self.items():
            hookpoint = self.hookpoint[name]
            coder.center_(x[hookpoint].mean, y[hookpoint].mean)

    def load_pretrained(self, source: str) -> None:
        """Copy the weights of trained coders of the same names, from a folder or the Hub.

        Raises UsageError where a hookpoint is missing there or a shape or kind differs.
        """
        for name, coder in self.items():
            try:
                tensors = _weights_for(coder, name, source)
            except UsageError as error:
                raise UsageError(f"--finetune {source}: {error}") from None
            coder.load_state_dict(tensors)

    def normalize_decoders_(self) -> None:
        """Scale every row of every decoder to unit norm, where decoders are so."""
        for _, coder in self.items():
            coder.normalize_decoder_()


def _weights_for(coder: SparseCoder, name: str, source: str) -> dict[str, Tensor]:
    """Of the weights of a trained coder those that `coder` has here."""
    if Path(source).is_dir():
        folder = newest_coders(Path(source)) / name
    else:
        folder = coder_folder(source, name)
    if not folder.is_dir():
        raise UsageError(f"it has no {name}; give the folder that holds {name}")
    with opened(folder) as (cfg, _, _, stored):
        if cfg.transcode != coder.cfg.transcode:
            kind = "a transcoder" if cfg.transcode else "an SAE"
            raise UsageError(f"{name} there is {kind}: see --transcode")
        if cfg.has_threshold != coder.cfg.has_threshold:
            raise UsageError(
                f"{name} is a {cfg.activation} coder there, and --activation here is "
                f"{coder.cfg.activation}: start from a coder of the kind that is to be trained"
            )
        mine = shapes_of(coder.cfg, coder.d_in, coder.d_out)
        if mine != stored.shapes:
            raise UsageError(
                f"{name} has {stored.shapes} there and {mine} here: set --num_latents, "
                f"--skip_connection and the model as there"
            )
        return stored.read_all(coder.piece)


def costs(
    widths: dict[str, Widths], cfg: SparseCoderConfig, seeds: tuple[int, ...]
) -> dict[str, int]:
    """Hookpoint -> seeds * num_latents * (d_in + d_out), what its coders weigh in a plan.

    Raises UsageError for a coder that cannot be.
    """
    found = {}
    for hookpoint, width in widths.items():
        d_in = _d_in(width, cfg)
        if d_in == 0:
            raise UsageError(f"--transcode: {hookpoint} takes token ids, not activations")
        family_of(cfg).check(cfg, d_in, where=hookpoint)
        found[hookpoint] = len(seeds) * cfg.latents(d_in) * (d_in + width.d_out)
    return found


def _d_in(width: Widths, cfg: SparseCoderConfig) -> int:
    return width.d_in if cfg.transcode else width.d_out


def _key(name: str) -> str:
    return name.replace(".", "/")  # a module's name cannot hold a dot

"""One coder over several ranks: each has latents of its encoder, and columns of its decoder.

Every rank of a group sees the same rows, and knows the same latents, errors and losses.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ..config import SparseCoderConfig
from ..flag_checks import UsageError
from ..formats.pieces import Part, Piece
from ..kernels.twins import Kernels
from .families.family import family_of
from .outputs import CoderErrors
from .sharded_kernels import Group, ShardedKernels, copied, row_dots, share
from .sparse_coder import SparseCoder

_DRAWN_ROWS = 1024  # so much of the encoder is there at a time when it starts


def shared_latents(cfg: SparseCoderConfig, num_latents: int, size: int) -> list[range]:
    """The latents that each of several ranks holds; with groupmax, whole groups of latents.

    Raises UsageError where there is too little to share, or the family does not allow it.
    """
    shared, what = family_of(cfg).shared_by_ranks(cfg, num_latents)
    if shared < size:
        raise UsageError(_too_many(size, what))
    return [share(num_latents, rank, size, num_latents // shared) for rank in range(size)]


def _too_many(size: int, what: str) -> str:
    return (
        f"--shard_latents, --ranks_per_coder or --layer_to_rank: {size} ranks cannot share a coder "
        f"of {what}: give it fewer ranks"
    )


class ShardedCoder(SparseCoder):
    """A coder of which this rank holds a part; it computes what the whole one does.

    `encoder.weight` [L_rank D], `encoder.bias` [L_rank], `W_dec` [L D_rank], `W_skip` [D_rank D];
    `b_dec` is whole. `sae_out` has the rank's own columns, see `whole`; all else that is returned,
    and every gradient of what is whole, is that of the whole coder.
    """

    def __init__(
        self,
        group: Group,
        d_in: int,
        cfg: SparseCoderConfig,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        *,
        d_out: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """The part of the coder that `SparseCoder` would make, with the same initial weights."""
        super().__init__(d_in, cfg, "meta", dtype, d_out=d_out)
        self.group = group
        latents = shared_latents(cfg, self.num_latents, group.size)
        columns = [share(self.d_out, rank, group.size) for rank in range(group.size)]
        if self.d_out < group.size:
            raise UsageError(_too_many(group.size, f"{self.d_out} columns of output"))
        self.cuts = {"encoder.weight": (0, latents), "encoder.bias": (0, latents)}
        self.cuts |= {"W_dec": (1, columns), "W_skip": (0, columns)}
        """By parameter the dimension that it is cut along, and the indices that each rank has."""
        parts = {name: Part(dim, of[group.rank]) for name, (dim, of) in self.cuts.items()}
        self.piece = Piece(group.rank, group.size, parts)
        mine = columns[group.rank]
        self.columns = slice(mine.start, mine.stop)
        planned = torch.device(device).type == "meta"
        held = {} if planned else self._drawn(latents[group.rank], generator)
        for name, parameter in list(self.named_parameters()):
            shape = list(parameter.shape)
            if part := self.piece.part_of(name):
                shape[part.dim] = len(part.indices)
            zeros = torch.zeros(shape, device=device, dtype=dtype)
            module = self.encoder if name.startswith("encoder.") else self
            weights = held[name].to(device) if name in held else zeros
            setattr(module, name.removeprefix("encoder."), nn.Parameter(weights))
        self.use(self.kernels)

    def _drawn(self, latents: range, generator: torch.Generator | None) -> dict[str, Tensor]:
        """This rank's part of the initial weights: all are drawn, a block of rows at a time."""
        dtype = self.dtype
        found = {"encoder.weight": torch.empty(len(latents), self.d_in, dtype=dtype)}
        if not self.cfg.transcode:
            width = self.columns.stop - self.columns.start
            found["W_dec"] = torch.empty(self.num_latents, width, dtype=dtype)
        for start in range(0, self.num_latents, _DRAWN_ROWS):
            stop = min(start + _DRAWN_ROWS, self.num_latents)
            block = self.draw(torch.empty(stop - start, self.d_in, dtype=dtype), generator)
            first, last = max(start, latents.start), min(stop, latents.stop)
            if first < last:
                mine = block[first - start : last - start]
                found["encoder.weight"][first - latents.start : last - latents.start] = mine
            if "W_dec" in found:
                if self.cfg.normalize_decoder:
                    self.kernels.normalize_rows_(block)
                found["W_dec"][start:stop] = block[:, self.columns]
        return found

    def use(self, kernels: Kernels) -> None:
        """Compute by these kernels, on this rank's part."""
        self.kernels = ShardedKernels(kernels, self.group, self.cuts["encoder.weight"][1])

    def held_latents(self, numbers: Tensor) -> Tensor:
        """Of the latents with these numbers those of this rank, numbered from its first."""
        assert isinstance(self.kernels, ShardedKernels)
        return self.kernels.dead_here(numbers)

    def errors(
        self,
        x: Tensor,
        y: Tensor,
        dead: Tensor | None = None,
        k: int | None = None,
        groups: list[int] | None = None,
    ) -> CoderErrors:
        """As of the whole coder, but that `sae_out` has this rank's columns."""
        return super().errors(x, y[:, self.columns], dead, k, groups)

    def _offset(self, rows: Tensor) -> Tensor:
        rows, b_dec = copied(self.group, rows, self.b_dec)
        mine = b_dec[self.columns]
        if self.W_skip is None:
            return mine
        return self.kernels.linear(rows, self.W_skip, self.matmul_dtype) + mine

    def decode(self, top_acts: Tensor, top_indices: Tensor) -> Tensor:
        """As of the whole coder, without gradients."""
        k = top_acts.shape[-1]
        latents = self.kernels.Latents(
            top_acts.reshape(-1, k).to(self.dtype), top_indices.reshape(-1, k)
        )
        with torch.no_grad():
            assert self.W_dec is not None
            out = self.kernels.decode(latents, self.W_dec).add_(self.b_dec[self.columns])
            out = self.whole(out)
        return out.view(*top_acts.shape[:-1], self.d_out)

    @torch.no_grad()
    def whole(self, sae_out: Float[Tensor, "N _"]) -> Float[Tensor, "N D"]:
        """The columns of all ranks."""
        widths = [len(columns) for columns in self.cuts["W_dec"][1]]
        padded = sae_out.new_zeros(len(sae_out), max(widths))
        padded[:, : sae_out.shape[1]] = sae_out
        found = self.group.gather(padded)
        return torch.cat([t[:, :width] for t, width in zip(found, widths, strict=True)], dim=1)

    @torch.no_grad()
    def decoder_norms(self) -> Float[Tensor, " L"]:
        """The norms of the whole decoder rows."""
        assert self.W_dec is not None
        return self.group.sum_(row_dots(self.W_dec, self.W_dec)).sqrt()

    def total(self, by_parameter: dict[str, Tensor]) -> Tensor:
        """The sum over the whole coder of numbers that were summed over each parameter here."""
        assert self.piece is not None
        zero = self.b_dec.new_zeros(())
        cut, whole = zero.clone(), zero.clone()
        for name, value in by_parameter.items():
            target = cut if self.piece.part_of(name) else whole
            target += value
        return self.group.sum_(cut) + whole

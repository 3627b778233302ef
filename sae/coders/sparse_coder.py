"""One sparse coder: an SAE or a transcoder, and its losses."""

import math
from copy import copy
from importlib import import_module
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..config import SparseCoderConfig
from ..flag_checks import UsageError
from ..formats import hub, kinds, sparsify
from ..formats.pieces import Piece
from ..kernels.entries import in_rows, row_starts
from ..kernels.twins import Kernels, Latents
from . import functional
from .families.family import family_of
from .moments import Moments, Scale
from .outputs import CoderErrors, CoderOutput, EncoderOutput
from .own_losses import OwnLosses, active_alone, dead_learn_alone, selected_over_k
from .prefixes import prefixes_of


class SparseCoder(nn.Module):
    """A sparse autoencoder or transcoder, of the family that `cfg.activation` names.

    SAE:         top = encode(x - b_dec);  sae_out = top W_dec + b_dec
    transcoder:  top = encode(x);          sae_out = top W_dec + b_dec [+ x W_skip^T]

    `encoder.weight` [L D], `encoder.bias` [L], `W_dec` [L D_out], `b_dec` [D_out] and the optional
    `W_skip` [D_out D] have the reference's names, in memory and on disk. Where latents have
    thresholds, `threshold` [L] is theirs, in float32. An SAE's decoder starts as the unit-normed
    encoder (Gao et al., section 2.4), a transcoder's decoder and skip at 0.
    """

    kernels: Kernels = Kernels()
    """What computes: the kernels of the run, or `functional`, the specification."""

    scale: Scale = Scale()
    """What learning rates are in units of; none, unless training has set it."""

    threshold: Tensor
    """[L], above which latents are active, in families that have one."""

    level: Float[Tensor, ""]
    """The threshold of all latents in one, where training estimates it; infinite before."""

    piece: Piece | None = None
    """What is here of a coder that several ranks hold; None: all."""

    own_losses: OwnLosses = OwnLosses()
    """Of the run that trains this coder."""

    prefix: int | None = None
    """How many latents may be active, the first ones, of a coder that `first` returned."""

    def __init__(
        self,
        d_in: int,
        cfg: SparseCoderConfig,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        *,
        d_out: int | None = None,
        decoder: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        """`generator` draws the initial weights, on the CPU so that every device gets the same."""
        super().__init__()
        self.cfg = cfg
        self.d_in = d_in
        self.d_out = d_in if d_out is None else d_out
        self.num_latents = cfg.latents(d_in)
        self.family = family_of(cfg)
        self.family.check(cfg, d_in, where="this coder")
        self.prefixes = prefixes_of(cfg, d_in)
        if not cfg.transcode and self.d_in != self.d_out:
            raise UsageError(
                f"an SAE reconstructs its input, but d_in is {self.d_in} and d_out {self.d_out}: "
                f"set transcode"
            )
        self.matmul_dtype: torch.dtype | None = None

        host = "meta" if torch.device(device).type == "meta" else "cpu"
        weight = torch.empty(self.num_latents, d_in, device=host, dtype=dtype)
        weight = self.draw(weight, generator)
        self.encoder = nn.Linear(d_in, self.num_latents, device="meta", dtype=dtype)
        self.encoder.weight = nn.Parameter(weight.to(device))
        self.encoder.bias = nn.Parameter(torch.zeros(self.num_latents, device=device, dtype=dtype))
        self.W_dec: nn.Parameter | None = None
        if decoder and cfg.transcode:
            self.W_dec = nn.Parameter(
                torch.zeros(self.num_latents, self.d_out, device=device, dtype=dtype)
            )
        elif decoder:
            self.W_dec = nn.Parameter(self.encoder.weight.detach().clone())
        self.b_dec = nn.Parameter(torch.zeros(self.d_out, device=device, dtype=dtype))
        self.W_skip: nn.Parameter | None = None
        if cfg.skip_connection:
            self.W_skip = nn.Parameter(torch.zeros(self.d_out, d_in, device=device, dtype=dtype))
        if cfg.has_threshold:
            threshold = torch.full((self.num_latents,), math.inf, device=device)
            self.level = threshold[0].double()
            if self.family.trains_threshold:
                self.threshold = nn.Parameter(threshold)
            else:
                self.register_buffer("threshold", threshold)
        if not cfg.transcode:
            self.normalize_decoder_()

    @staticmethod
    def draw(weight: Float[Tensor, "L D"], generator: torch.Generator | None) -> Tensor:
        """Rows of the encoder as it starts, uniform in +- 1 / sqrt(D), in place."""
        bound = 1 / math.sqrt(weight.shape[1])
        return weight.uniform_(-bound, bound, generator=generator)

    @property
    def device(self) -> torch.device:
        return self.encoder.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.weight.dtype

    def first(self, latents: int) -> "SparseCoder":
        """This coder, same parameters, of whose active latents only the first `latents` are kept.

        Which ones are active is still decided among all.
        """
        kept = copy(self)
        kept.prefix, kept.prefixes = latents, ()
        return kept

    def _kept(self, latents: Latents) -> Latents:
        if self.prefix is None:
            return latents
        return latents._replace(acts=latents.acts * (latents.indices < self.prefix))

    def use(self, kernels: Kernels) -> None:
        """Compute by these kernels."""
        self.kernels = kernels

    def encode(self, x: Float[Tensor, "*rows D"], k: int | None = None) -> EncoderOutput:
        """The active latents of every row of `x`: `k` (default: the config's), or all above theirs.

        K is k or, where latents have thresholds, the number that the row with the most has.
        """
        rows = x.reshape(-1, self.d_in).to(self.dtype)
        latents = self._kept(self.family.encode(self, rows, k or self.cfg.k))
        found = in_rows(latents.acts, latents.indices, row_starts(latents))
        shape = (*x.shape[:-1], found[0].shape[1])
        return EncoderOutput(found[0].view(shape), found[1].view(shape))

    @property
    def pre_bias(self) -> Float[Tensor, " D"] | None:
        """What is subtracted from what the encoder reads."""
        return None if self.cfg.transcode else self.b_dec

    def decode(
        self, top_acts: Float[Tensor, "*rows K"], top_indices: Int[Tensor, "*rows K"]
    ) -> Float[Tensor, "*rows D"]:
        """top W_dec + b_dec, without the skip connection."""
        shape = math.prod(top_acts.shape[:-1]), top_acts.shape[-1]  # K may be 0
        acts, indices = top_acts.reshape(shape).to(self.dtype), top_indices.reshape(shape)
        assert self.W_dec is not None, "this coder was loaded with decoder=False"
        out = self.kernels.decode(self.kernels.Latents(acts, indices), self.W_dec).add_(self.b_dec)
        return out.view(*top_acts.shape[:-1], self.d_out)

    def forward(
        self,
        x: Float[Tensor, "*rows D"],
        y: Float[Tensor, "*rows D_out"] | None = None,
        dead_mask: Bool[Tensor, " L"] | Int[Tensor, " M"] | None = None,
        *,
        total_variance: Tensor | float | None = None,
        k: int | None = None,
    ) -> CoderOutput:
        """Reconstruct `y` (default: `x`) and measure the error.

        fvu            = sum ||y - sae_out||^2 / total_variance
        auxk_loss      = min(n_dead / k_aux, 1) sum ||e - e_hat||^2 / total_variance
        multi_topk_fvu = sum ||y - sae_out_4k||^2 / total_variance

        `total_variance` defaults to that of `y`. For the rest see `errors`.
        """
        k = k or self.cfg.k
        rows = x.reshape(-1, self.d_in)
        y_rows = rows.to(self.dtype) if y is None else y.reshape(-1, self.d_out).to(self.dtype)
        if total_variance is None:
            wide = torch.promote_types(self.dtype, torch.float32)
            total_variance = Moments.of(y_rows).total_variance.to(wide)
        most = self.num_latents if self.family.trains_threshold else k  # no bound in use
        found = self.errors(rows, y_rows, dead_mask, most)
        latents = in_rows(found.top_acts, found.top_indices, found.row_starts)
        return CoderOutput(
            found.sae_out.view(*x.shape[:-1], self.d_out),
            latents[0].view(*x.shape[:-1], latents[0].shape[1]),
            latents[1].view(*x.shape[:-1], latents[1].shape[1]),
            found.squared_error / total_variance,
            found.auxk_error / total_variance,
            found.multi_topk_error / total_variance,
        )

    def errors(
        self,
        x: Float[Tensor, "N D"],
        y: Float[Tensor, "N D_out"],
        dead: Bool[Tensor, " L"] | Int[Tensor, " M"] | None = None,
        k: int | None = None,
        groups: list[int] | None = None,
    ) -> CoderErrors:
        """Reconstruct the rows of `y` from those of `x`; squared errors, divided by nothing.

        AuxK (Gao et al., appendix A.2): e = (y - sae_out).detach(), and e_hat is the
        reconstruction, without b_dec, from the k_aux largest of the `dead` latents. These are given
        as a mask or, which does not make the host wait for the device, by number. `groups`: in
        training, how many neighbouring rows share a selection, of the families where rows do.
        """
        k, y_rows = k or self.cfg.k, y.to(self.dtype)
        rows = y_rows if x is y else x.to(self.dtype)
        if dead is not None and dead.dtype == torch.bool:
            dead = dead.nonzero().squeeze(1)
        if dead is not None and not len(dead):
            dead = None

        wide_k = min(selected_over_k(self) * k, self.num_latents)
        wide, dead_latents, levels = self.family.select(self, rows, wide_k, dead, groups)
        latents = wide
        if self.cfg.multi_topk:
            latents = self.family.narrow(self, rows, wide, k)
        elif selected_over_k(self) > 1:
            latents = active_alone(self, wide, k)
        latents, dead_latents = self._passed_on(self._kept(latents), dead_latents)
        offset = self._offset(rows)
        assert self.W_dec is not None, "this coder was loaded with decoder=False"
        arguments = (self.W_dec, offset, y_rows)
        sae_out, squared_error, dead_error, prefix_errors = self.kernels.reconstruct(
            latents, *arguments, dead_latents, self.prefixes, dead_learn_alone(self)
        )
        auxk_error = multi_topk_error = squared_error.new_zeros(())
        if dead is not None and dead_error is not None:
            auxk_error = min(len(dead) / functional.k_aux(self.d_out), 1.0) * dead_error
        if self.cfg.multi_topk:
            multi_topk_error = self.kernels.reconstruct(wide, *arguments).squared_error
        return CoderErrors(
            *(sae_out, latents.acts, latents.indices, squared_error, auxk_error, multi_topk_error),
            row_starts=row_starts(latents),
            levels=levels,
            prefix_errors=prefix_errors,
        )

    def _passed_on(
        self, latents: Latents, of_dead: Latents | None
    ) -> tuple[Latents, Latents | None]:
        """The latents that this coder's own target is made of."""
        return latents, of_dead

    def _offset(self, rows: Tensor) -> Tensor:
        """What is added to the latents' sum."""
        if self.W_skip is None:
            return self.b_dec
        return self.kernels.linear(rows, self.W_skip, self.matmul_dtype) + self.b_dec

    @torch.no_grad()
    def center_(self, x_mean: Float[Tensor, " D"], y_mean: Float[Tensor, " D"]) -> None:
        """Start from the data: b_dec = mean(y); a transcoder's b_enc = -W_enc mean(x).

        A transcoder's W_enc is brought to the unit that it has by `unit`.
        """
        self.b_dec.copy_(y_mean)
        if self.cfg.transcode:
            self.encoder.weight.mul_(self.unit("encoder.weight"))
            self.encoder.bias.copy_(-(self.encoder.weight @ x_mean.to(self.dtype)))
        self.family.start_(self)

    def unit(self, parameter: str) -> float:
        """The unit of a parameter, so that its number is the same at every scale of the data.

        Biases are in the unit of the targets, maps from x to y in y's over x's; decoder rows have
        none.
        """
        x, y = self.scale if self.cfg.transcode else (self.scale.y, self.scale.y)
        return {"encoder.weight": y / x, "W_skip": y / x, "W_dec": 1.0}.get(parameter, y)

    @property
    def rows_are_unit(self) -> bool:
        """Whether every row of W_dec has unit norm by itself."""
        return self.cfg.normalize_decoder and not self.cfg.parts

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """Scale rows of W_dec to unit norm; zeros stay."""
        if self.W_dec is not None and not self.W_dec.is_meta and self.cfg.normalize_decoder:
            self.kernels.normalize_rows_(self.W_dec)

    @torch.no_grad()
    def fixed_directions(self) -> Float[Tensor, "L D"] | None:
        """Of every row of W_dec the unit direction that normalizing undoes steps along, if any."""
        return self.W_dec if self.cfg.normalize_decoder else None

    def held_latents(self, numbers: Int[Tensor, " M"]) -> Int[Tensor, " M"]:
        """Of the latents with these numbers those whose encoder rows are here, as rows of them."""
        return numbers

    def whole(self, sae_out: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """What `errors` returned as `sae_out`, with all columns."""
        return sae_out

    def directions(self) -> Float[Tensor, "L D"]:
        """What every latent writes, wherever it does."""
        assert self.W_dec is not None, "this coder was loaded with decoder=False"
        return self.W_dec

    @torch.no_grad()
    def decoder_norms(self) -> Float[Tensor, " L"]:
        """||W_dec_l|| of every latent."""
        assert self.W_dec is not None, "a coder in training has a decoder"
        return torch.linalg.vector_norm(self.W_dec, dim=1)

    def total(self, by_parameter: dict[str, Tensor]) -> Tensor:
        """The sum of numbers that are each of one parameter."""
        return sum(by_parameter.values(), self.b_dec.new_zeros(()))

    def state_tensors(self) -> dict[str, Tensor]:
        """What resuming needs beside the weights: a threshold as far as it is known."""
        return {"threshold.level": self.level} if "threshold" in self._buffers else {}

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `state_tensors` returned."""
        if "threshold" in self._buffers:
            self.level.copy_(tensors["threshold.level"])
            self.threshold.copy_(self.level)

    def save_to_disk(self, path: Path | str) -> None:
        """Write `cfg.json` and `sae.safetensors` into the folder `path`, or what is here of it."""
        tensors = self.state_dict()
        sparsify.write(Path(path), self.cfg, self.d_in, self.d_out, tensors, self.piece)

    @staticmethod
    def load_from_disk(
        path: Path | str,
        device: str | torch.device = "cpu",
        *,
        decoder: bool = True,
        allow_pt: bool = False,
    ) -> "SparseCoder":
        """Read a coder of any program that docs/files.md names; of pickles only with `allow_pt`.

        Raises UsageError for a folder that is not a coder's, a damaged file, or shapes that do not
        fit `cfg.json`; nothing is allocated before the shapes are known to fit.
        """
        cfg, d_in, d_out, tensors, _ = kinds.read(Path(path), allow_pt, decoder=decoder)
        made = import_module(".across.cross_layer", __package__).coder_class(cfg)
        coder = made(d_in, cfg, "meta", d_out=d_out, decoder=decoder)
        coder.load_state_dict(tensors, assign=True)
        return coder.to(device)

    @staticmethod
    def load_many(
        name: str | Path,
        local: bool | None = None,
        layers: list[str] | None = None,
        device: str | torch.device = "cpu",
        *,
        decoder: bool = True,
        pattern: str | None = None,
        allow_pt: bool = False,
        token: str | None = None,
    ) -> dict[str, "SparseCoder"]:
        """Every coder of a folder or Hub repository by its hookpoint, in natural order.

        A run's folder stands for its newest whole checkpoint; of the Hub, `name` is a repository,
        with `@revision` and `/folder` behind it where wanted. `layers` names hookpoints, `pattern`
        is a glob over them; `local` forces (True) or forbids (False) reading `name` as a folder;
        `token` stands in for HF_TOKEN.
        """
        folder = hub.coders_folder(name, local, pattern, allow_pt, token)
        found = {
            hookpoint: SparseCoder.load_from_disk(path, device, decoder=decoder, allow_pt=allow_pt)
            for hookpoint, path in kinds.list_coders(folder, layers, pattern).items()
        }
        import_module(".across.cross_layer", __package__).link(found)
        return found

    @staticmethod
    def load_from_hub(
        name: str,
        hookpoint: str | None = None,
        device: str | torch.device = "cpu",
        *,
        decoder: bool = True,
        allow_pt: bool = False,
        token: str | None = None,
    ) -> "SparseCoder":
        """The coder of one hookpoint of a Hub repository (or its only one)."""
        folder = hub.coder_folder(name, hookpoint, allow_pt, token)
        return SparseCoder.load_from_disk(folder, device, decoder=decoder, allow_pt=allow_pt)

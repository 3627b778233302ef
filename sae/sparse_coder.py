"""One sparse coder: an SAE or a transcoder with TopK latents, its losses, and its file format."""

import math
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from jaxtyping import Bool, Float, Int
from natsort import natsorted
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import functional, kernels
from .config import SparseCoderConfig, UsageError
from .updates import normalize_rows_

_DTYPES = {"F64", "F32", "F16", "BF16"}


class EncoderOutput(NamedTuple):
    """The active latents of every row, in no order."""

    top_acts: Float[Tensor, "*rows K"]
    top_indices: Int[Tensor, "*rows K"]


class CoderOutput(NamedTuple):
    """What one forward of a coder returns."""

    sae_out: Float[Tensor, "*rows D"]
    """The reconstruction of the target."""

    top_acts: Float[Tensor, "*rows K"]
    """Activations of the active latents, 0 where fewer than k are positive."""

    top_indices: Int[Tensor, "*rows K"]
    """Their indices in [0, num_latents)."""

    fvu: Float[Tensor, ""]
    """sum ||y - sae_out||^2 / total_variance."""

    auxk_loss: Float[Tensor, ""]
    """AuxK over the same denominator; 0 without dead latents."""

    multi_topk_fvu: Float[Tensor, ""]
    """FVU of the reconstruction from 4k latents; 0 unless `multi_topk`."""


class SparseCoder(nn.Module):
    """A k-sparse autoencoder or transcoder.

    SAE:         top = encode(x - b_dec);  sae_out = top W_dec + b_dec
    transcoder:  top = encode(x);          sae_out = top W_dec + b_dec [+ x W_skip^T]

    `encoder.weight` [L D], `encoder.bias` [L], `W_dec` [L D_out], `b_dec` [D_out] and the optional
    `W_skip` [D_out D] have the reference's names, in memory and on disk. An SAE's decoder starts
    as the unit-normed encoder (Gao et al., section 2.4), a transcoder's decoder and skip at 0.
    """

    ops: ModuleType = kernels
    """Where encode and decode come from: `kernels`, or `functional`, the specification."""

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
        cfg.check(d_in, where="this coder")
        if not cfg.transcode and self.d_in != self.d_out:
            raise UsageError(
                f"an SAE reconstructs its input, but d_in is {self.d_in} and d_out {self.d_out}: "
                f"set transcode"
            )
        self.matmul_dtype: torch.dtype | None = None

        host = "meta" if torch.device(device).type == "meta" else "cpu"
        bound = 1 / math.sqrt(d_in)
        weight = torch.empty(self.num_latents, d_in, device=host, dtype=dtype)
        weight.uniform_(-bound, bound, generator=generator)
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
        self.normalize_decoder_()

    @property
    def device(self) -> torch.device:
        return self.encoder.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.weight.dtype

    def encode(self, x: Float[Tensor, "*rows D"], k: int | None = None) -> EncoderOutput:
        """The `k` (default: the config's) active latents of every row of `x`."""
        k = k or self.cfg.k
        encoded = self._encode_rows(x.reshape(-1, self.d_in).to(self.dtype), k)
        return EncoderOutput(*(t.view(*x.shape[:-1], k) for t in encoded[:2]))

    def _encode_rows(self, rows: Tensor, k: int, dead: Tensor | None = None) -> tuple[Tensor, ...]:
        """Activations and indices of the active latents, and of those of AuxK where any are dead.

        They are no views: the kernels know by an index tensor's identity what they sorted before.
        """
        arguments = (
            rows,
            self.encoder.weight,
            self.encoder.bias,
            k,
            self.cfg.activation,
            None if self.cfg.transcode else self.b_dec,
            self.matmul_dtype,
        )
        if dead is None:
            return self.ops.encode(*arguments)
        k_dead = min(functional.k_aux(self.d_out), len(dead))
        return self.ops.encode_with_dead(*arguments, dead, k_dead)

    def decode(
        self, top_acts: Float[Tensor, "*rows K"], top_indices: Int[Tensor, "*rows K"]
    ) -> Float[Tensor, "*rows D"]:
        """top W_dec + b_dec, without the skip connection."""
        k = top_acts.shape[-1]
        acts, indices = top_acts.reshape(-1, k).to(self.dtype), top_indices.reshape(-1, k)
        out, _ = self._reconstruct(acts, indices, self.b_dec)
        return out.view(*top_acts.shape[:-1], self.d_out)

    def _reconstruct(
        self, top_acts: Tensor, top_indices: Tensor, offset: Tensor, *of_dead: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """top W_dec + offset; with AuxK's (activations, indices) also their sum, without."""
        assert self.W_dec is not None, "this coder was loaded with decoder=False"
        arguments = (top_acts, top_indices, self.W_dec)
        if not of_dead:
            return self.ops.decode(*arguments).add_(offset), None
        sae_out, e_hat = self.ops.decode_with_dead(*arguments, *of_dead)
        return sae_out.add_(offset), e_hat

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

        e = (y - sae_out).detach(), and e_hat is the reconstruction, without b_dec, from the k_aux
        largest of the latents in `dead_mask` (Gao et al., appendix A.2), or whose numbers it
        gives, which spares the device a question. `total_variance` defaults to that of `y`; a step
        of several forwards gives 1 and divides the sums of squared errors by the variance of all
        its rows.
        """
        k = k or self.cfg.k
        rows = x.reshape(-1, self.d_in).to(self.dtype)
        y_rows = rows if y is None else y.reshape(-1, self.d_out).to(self.dtype)
        if total_variance is None:
            total_variance = functional.Moments.of(y_rows).total_variance.to(self.dtype)

        dead = dead_mask
        if dead is not None and dead.dtype == torch.bool:
            dead = dead.nonzero().squeeze(1)
        if dead is not None and not len(dead):
            dead = None

        wide_k = min(4 * k, self.num_latents) if self.cfg.multi_topk else k
        wide_acts, wide_indices, *of_dead = self._encode_rows(rows, wide_k, dead)
        top_acts, top_indices = wide_acts, wide_indices
        if self.cfg.multi_topk:
            top_acts, top_indices = self._narrow(rows, wide_acts, wide_indices, k)
        offset = self.b_dec if self.W_skip is None else rows @ self.W_skip.mT + self.b_dec
        sae_out, e_hat = self._reconstruct(top_acts, top_indices, offset, *of_dead)
        fvu = self.ops.squared_error(y_rows, sae_out) / total_variance

        auxk_loss = multi_topk_fvu = fvu.new_zeros(())
        if dead is not None and e_hat is not None:
            share = min(len(dead) / functional.k_aux(self.d_out), 1.0)
            residual = (y_rows - sae_out).detach()
            auxk_loss = share * self.ops.squared_error(residual, e_hat) / total_variance
        if self.cfg.multi_topk:
            wide_out, _ = self._reconstruct(wide_acts, wide_indices, offset)
            multi_topk_fvu = self.ops.squared_error(y_rows, wide_out) / total_variance

        return CoderOutput(
            sae_out.view(*x.shape[:-1], self.d_out),
            top_acts.view(*x.shape[:-1], k),
            top_indices.view(*x.shape[:-1], k),
            fvu,
            auxk_loss,
            multi_topk_fvu,
        )

    def _narrow(self, rows: Tensor, acts: Tensor, indices: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k active latents among the 4k, without a second product where topk allows it."""
        if self.cfg.activation == "groupmax":
            top_acts, top_indices = self._encode_rows(rows, k)
            return top_acts, top_indices
        top_acts, position = acts.topk(k, dim=1)
        return top_acts, indices.gather(1, position)

    @torch.no_grad()
    def center_(self, x_mean: Float[Tensor, " D"], y_mean: Float[Tensor, " D"]) -> None:
        """Start from the data: b_dec = mean(y); a transcoder's b_enc = -W_enc mean(x)."""
        self.b_dec.copy_(y_mean)
        if self.cfg.transcode:
            self.encoder.bias.copy_(-(self.encoder.weight @ x_mean.to(self.dtype)))

    @torch.no_grad()
    def normalize_decoder_(self) -> None:
        """Scale every row of W_dec to unit norm; rows of zeros (a fresh transcoder's) stay."""
        if self.W_dec is None or self.W_dec.is_meta or not self.cfg.normalize_decoder:
            return
        normalize_rows_(self.W_dec)

    def save_to_disk(self, path: Path | str) -> None:
        """Write `cfg.json` and `sae.safetensors` into the folder `path`."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        save_file(tensors, path / "sae.safetensors")
        self.cfg.to_json(path / "cfg.json", self.d_in, self.d_out)

    @staticmethod
    def load_from_disk(
        path: Path | str, device: str | torch.device = "cpu", *, decoder: bool = True
    ) -> "SparseCoder":
        """Read a coder that this project or the reference wrote.

        Raises UsageError for a folder that is not a coder's, a damaged file, or shapes that do not
        fit `cfg.json`; nothing is allocated before the shapes are known to fit.
        """
        path = Path(path)
        cfg, rest = SparseCoderConfig.from_json(path / "cfg.json")
        d_in = rest["d_in"]
        file = path / "sae.safetensors"
        try:
            with safe_open(file, framework="pt", device="cpu") as stored:
                slices = {name: stored.get_slice(name) for name in list(stored.keys())}
                shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
                if strange := {s.get_dtype() for s in slices.values()} - _DTYPES:
                    raise UsageError(f"{file} holds {', '.join(strange)}, not floating point")
                expected = _expected_shapes(cfg, d_in, (*shapes.get("b_dec", ()), d_in)[0])
                if shapes != expected:
                    raise UsageError(
                        f"{file} holds {shapes}, but {path / 'cfg.json'} describes {expected}: "
                        f"it is not a sparse coder of this kind, or one of the two was changed"
                    )
                tensors = {
                    name: stored.get_tensor(name) for name in shapes if decoder or name != "W_dec"
                }
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{file} cannot be read ({error}): the file is damaged") from None
        coder = SparseCoder(d_in, cfg, "meta", d_out=expected["b_dec"][0], decoder=decoder)
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
    ) -> dict[str, "SparseCoder"]:
        """Every coder of a folder or Hub repository by its hookpoint, in natural order.

        A run's folder stands for its newest whole checkpoint. `layers` names hookpoints, `pattern`
        is a glob over them; `local` forces (True) or forbids (False) reading `name` as a folder.
        """
        if local or (local is None and Path(name).is_dir()):
            root = newest_coders(Path(name))
        else:
            root = _snapshot(str(name), None if pattern is None else f"{pattern}/*")
        if not root.is_dir():
            raise UsageError(f"{root} is not a folder: give a folder of coders")
        for layer in layers or ():
            _check_name(layer)
        if layers is None:
            found = [f.name for f in root.iterdir() if (f / "cfg.json").is_file()]
            layers = [f for f in found if pattern is None or fnmatch(f, pattern)]
        if not layers:
            matching = "" if pattern is None else f" that match {pattern!r}"
            raise UsageError(f"{root} holds no sparse coders{matching}: give a folder of coders")
        return {
            layer: SparseCoder.load_from_disk(root / layer, device, decoder=decoder)
            for layer in natsorted(layers)
        }

    @staticmethod
    def load_from_hub(
        name: str,
        hookpoint: str | None = None,
        device: str | torch.device = "cpu",
        *,
        decoder: bool = True,
    ) -> "SparseCoder":
        """The coder of one hookpoint of a Hub repository (or its only one)."""
        _check_name(hookpoint or "")
        root = _snapshot(name, None if hookpoint is None else f"{hookpoint}/*")
        if hookpoint is not None:
            root = root / hookpoint
        if not (root / "cfg.json").is_file():
            raise UsageError(
                f"{name} has no coder at hookpoint {hookpoint}: name one of its folders"
            )
        return SparseCoder.load_from_disk(root, device, decoder=decoder)


Sae = SparseCoder
load_many = SparseCoder.load_many


def newest_coders(folder: Path) -> Path:
    """`folder` itself if it holds coders, else its newest `step_*` checkpoint.

    A checkpoint is renamed into place when it is whole.
    """
    steps = natsorted((f for f in folder.glob("step_*") if f.suffix == ""), key=lambda f: f.name)
    return steps[-1] if steps else folder


def _expected_shapes(cfg: SparseCoderConfig, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
    latents = cfg.latents(d_in)
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (latents, d_in),
        "encoder.bias": (latents,),
        "W_dec": (latents, d_out),
        "b_dec": (d_out,),
    }
    return {**shapes, "W_skip": (d_out, d_in)} if cfg.skip_connection else shapes


def _check_name(hookpoint: str) -> None:
    if Path(hookpoint).is_absolute() or ".." in Path(hookpoint).parts:
        raise UsageError(f"hookpoint {hookpoint}: names a folder of coders, not a path out of it")


def _snapshot(name: str, allow: str | None) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=allow))
    except (RepositoryNotFoundError, HFValidationError, HfHubHTTPError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"{name} is neither a folder here nor on the Hub ({reason})") from None

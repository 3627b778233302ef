"""Coder files as the reference writes them: one folder a coder, and folders of such folders.

CODERS/<name>/cfg.json          what the coder is
CODERS/<name>/sae.safetensors   encoder.weight, encoder.bias, W_dec, b_dec and, if any, W_skip
"""

from fnmatch import fnmatch
from pathlib import Path

from natsort import natsorted
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import SparseCoderConfig
from ..flag_checks import UsageError

_DTYPES = {"F64", "F32", "F16", "BF16"}


def write(
    folder: Path, cfg: SparseCoderConfig, d_in: int, d_out: int, tensors: dict[str, Tensor]
) -> None:
    """Write one coder's two files."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file(plain, folder / "sae.safetensors")
    cfg.to_json(folder / "cfg.json", d_in, d_out)


def read(
    folder: Path, *, decoder: bool = True
) -> tuple[SparseCoderConfig, int, int, dict[str, Tensor]]:
    """Config, d_in, d_out and tensors of one coder; W_dec only with `decoder`.

    Raises UsageError for a folder that is not a coder's, a damaged file, or shapes that do not
    fit `cfg.json`; no tensor is read before the shapes are known to fit.
    """
    cfg, rest = SparseCoderConfig.from_json(folder / "cfg.json")
    d_in = rest["d_in"]
    file = folder / "sae.safetensors"
    try:
        with safe_open(file, framework="pt", device="cpu") as stored:
            slices = {name: stored.get_slice(name) for name in list(stored.keys())}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            if strange := {s.get_dtype() for s in slices.values()} - _DTYPES:
                raise UsageError(f"{file} holds {', '.join(strange)}, not floating point")
            d_out = (*shapes.get("b_dec", ()), d_in)[0]
            expected = _shapes(cfg, d_in, d_out)
            if shapes != expected:
                raise UsageError(
                    f"{file} holds {shapes}, but {folder / 'cfg.json'} describes {expected}: "
                    f"it is not a sparse coder of this kind, or one of the two was changed"
                )
            wanted = [name for name in shapes if decoder or name != "W_dec"]
            return cfg, d_in, d_out, {name: stored.get_tensor(name) for name in wanted}
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{file} cannot be read ({error}): the file is damaged") from None


def _shapes(cfg: SparseCoderConfig, d_in: int, d_out: int) -> dict[str, tuple[int, ...]]:
    latents = cfg.latents(d_in)
    shapes: dict[str, tuple[int, ...]] = {
        "encoder.weight": (latents, d_in),
        "encoder.bias": (latents,),
        "W_dec": (latents, d_out),
        "b_dec": (d_out,),
    }
    return {**shapes, "W_skip": (d_out, d_in)} if cfg.skip_connection else shapes


def newest_coders(folder: Path) -> Path:
    """`folder` itself if it holds coders, else its newest `step_*` checkpoint.

    A checkpoint is renamed into place when it is whole.
    """
    steps = natsorted((f for f in folder.glob("step_*") if f.suffix == ""), key=lambda f: f.name)
    return steps[-1] if steps else folder


def list_coders(
    folder: Path, names: list[str] | None = None, pattern: str | None = None
) -> dict[str, Path]:
    """Name -> folder of every coder, in natural order; `names`, or those a glob matches.

    Raises UsageError where there is none.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder: give a folder of coders")
    for name in names or ():
        check_name(name)
    if names is None:
        found = [f.name for f in folder.iterdir() if (f / "cfg.json").is_file()]
        names = [f for f in found if pattern is None or fnmatch(f, pattern)]
    if not names:
        matching = "" if pattern is None else f" that match {pattern!r}"
        raise UsageError(f"{folder} holds no sparse coders{matching}: give a folder of coders")
    return {name: folder / name for name in natsorted(names)}


def check_name(hookpoint: str) -> None:
    """Raise UsageError for the name of a coder that is a path out of its folder."""
    if Path(hookpoint).is_absolute() or ".." in Path(hookpoint).parts:
        raise UsageError(f"hookpoint {hookpoint}: names a folder of coders, not a path out of it")

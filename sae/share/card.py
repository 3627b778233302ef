"""The model card of a run's coders: what they are, what they are worth, how to load them."""

import shlex
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..config import SparseCoderConfig
from ..formats.coder_file import CoderFile
from ..formats.origin import without_folder, without_seed

_PACKAGES = ("train-sae", "torch", "transformers", "accelerate", "datasets")
_FIGURES = ("fvu", "l0", "dead_share", "ce_recovered")
_HEAD = ("FVU", "L0", "dead share", "CE recovered")
_NOT_SHOWN = (
    *(
        "model",
        "dataset",
        "sequences_per_batch",
        "sequences_per_step",
        "resume",
        "save_dir",
        "run_name",
    ),
    "data_preprocessing_num_proc",
)


def card(
    repo: str,
    flags: dict[str, Any],
    defaults: dict[str, Any],
    coders: dict[str, CoderFile],
    figures: dict[str, dict[str, Any]],
    licence: str | None,
    formats: tuple[str, ...],
) -> str:
    """README.md of the repository: metadata in YAML, then text.

    `flags` are those of the run and `defaults` what they are if left out; `coders` need no tensors.
    """
    model, dataset = flags.get("model"), flags.get("dataset")
    on_hub = {name for name in (model, dataset) if name and _is_hub_id(name)}
    head = [f"license: {licence}"] if licence else []
    head += ["library_name: train-sae", "tags:", "- sparse-autoencoder"]
    head += [f"base_model: {model}"] if model in on_hub else []
    head += ["datasets:", f"- {dataset}"] if dataset in on_hub else []
    kinds = {_kind(coder.cfg) for coder in coders.values()}
    where = [part.hookpoint for coder in coders.values() for part in coder.cfg.parts]
    where = where or [without_seed(name) for name in coders]
    what = f"Sparse coders ({' and '.join(sorted(kinds))}) of the activations of {_shown(model)}"
    lines = ["---", *head, "---", "", f"# {repo.split('/')[-1]}", "", f"{what}."]
    lines += ["", f"- Base model: {_shown(model)}", f"- Data set: {_shown(dataset)}"]
    lines += [f"- Tokens per sequence: {flags['ctx_len']}"] if "ctx_len" in flags else []
    lines += [f"- Hookpoints: {', '.join(f'`{name}`' for name in dict.fromkeys(where))}"]
    lines += ["", "## Figures", "", "On text that was held out of training:", ""]
    columns = ("hookpoint", "latents", "k", *_HEAD)
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, coder in coders.items():
        found = figures.get(name, {})
        cells = [name, f"{coder.cfg.latents(coder.d_in):,}", str(coder.cfg.k)]
        cells += [_number(found.get(figure)) for figure in _FIGURES]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "FVU is the fraction of variance unexplained, L0 the mean number of active latents",
    ]
    lines += ["per token; CE recovered is 1 where the reconstruction costs the model nothing."]
    lines += ["", "## Use", "", "```python", "from sae import load_many", ""]
    lines += [f'coders = load_many("{repo}")', "```"]
    first = next(iter(coders))
    if "sae_lens" in formats:
        lines += ["", "In SAELens:", "", "```python", "from sae_lens import SAE", ""]
        lines += [f'sae = SAE.from_pretrained("{repo}", "sae_lens/{first}")', "```"]
    lines += ["", "## How they were trained", "", "```bash", command(flags, defaults), "```"]
    recorded = flags.get("versions")
    versions = [f"{n} {v}" for n, v in recorded.items()] if recorded else _versions()
    when = "" if recorded else " (when this page was made)"
    return "\n".join([*lines, "", f"With {', '.join(versions)}{when}.", ""])


def _kind(cfg: SparseCoderConfig) -> str:
    if cfg.crosscoder:
        return "crosscoders, whose columns are those of the hookpoints in this order"
    if cfg.sources or cfg.targets:
        return "the layers of a cross-layer transcoder, which work together alone"
    return "transcoders" if cfg.transcode else "SAEs"


def command(flags: dict[str, Any], defaults: dict[str, Any]) -> str:
    """The command of a run: the flags that are not as they are if left out."""
    processes = flags.get("processes", 1)
    several = ["accelerate", "launch", "--num_processes", str(processes)]
    several += ["--use_deepspeed", "--zero_stage", "3"] if flags.get("lm_in_shards") else []
    words = [*(several if processes > 1 else ["python"]), "train_sae.py"]
    words += [_shown(flags.get(name)) for name in ("model", "dataset")]
    for name, value in flags.items():
        if name in _NOT_SHOWN or name not in defaults:
            continue
        if _plain(value) == _plain(defaults[name]):
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif value is not None:
            values = value if isinstance(value, (list, tuple)) else [value]
            words += [f"--{name}", *(without_folder(str(v)) for v in values)]
    return shlex.join(words)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _is_hub_id(name: str) -> bool:
    return not Path(name).exists() and not Path(name).is_absolute() and name.count("/") <= 1


def _shown(name: Any) -> str:
    return "unknown" if name is None else without_folder(str(name))


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, (int, float)) else ""


def _versions() -> list[str]:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:  # it runs from its folder, too
            continue
    return found

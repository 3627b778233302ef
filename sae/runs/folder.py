"""The folder of a run: what was asked for, whether it may go on, which checkpoints are whole.

RUN/run.json   the run's flags (never the token); of its first launch, processes, whether they
               had shards of the LM, and versions
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from natsort import natsorted

from ..coders.own_losses import excluded_by
from ..flag_checks import MAY_CHANGE, UsageError, flags_marked, flags_of
from ..placement.launch import sharded
from ..placement.ranks import Ranks
from .json_files import read_json, write_json
from .lock import lock

_PACKAGES = ("torch", "accelerate", "deepspeed", "transformers", "datasets", "safetensors")
NOT_FLAGS = ("sequences_per_batch", "processes", "lm_in_shards", "versions")
"""What run.json says beside flags."""


def run_folder(cfg: Any) -> Path:
    """The folder of the run that `cfg`, the script's `TrainConfig`, describes."""
    return Path(cfg.run.save_dir) / (cfg.run.run_name or Path(cfg.model.model).resolve().name)


def recorded_flags(cfg: Any, lm: Any, dataset: Any, sequences_per_batch: int) -> dict[str, Any]:
    """The flags of a run as they are written down, without the token.

    What was passed from Python has no name by which it could be found again, but an LM may know it.
    Rows that were given stand for both.
    """
    flags = {**flags_of(cfg), "sequences_per_batch": sequences_per_batch}
    if lm is not None:
        flags["model"] = getattr(lm, "name_or_path", None) or None
    if dataset is not None:
        flags["dataset"] = None
    return flags


def open_run(folder: Path, flags: dict[str, Any], cfg: Any, ranks: Ranks) -> bool:
    """Make the run's folder this run's own; return whether there is a checkpoint to resume from.

    Rank 0 does it, once all ranks were found to have the same flags and the same packages. With
    `resume` and no checkpoint yet the run starts from the beginning, so that one command starts
    and restarts it. Raises UsageError for ranks that differ, a folder that cannot be written, that
    another process writes to, or that holds a run which is not resumed or had other flags. `flags`
    are those recorded, of `cfg`.
    """
    versions = {package: _version(package) for package in _PACKAGES}
    # Machines may differ in their number of cores, which is this flag's default.
    given = {f"--{n}": v for n, v in flags.items() if n != "data_preprocessing_num_proc"}
    ranks.same({**given, **{f"the version of {name}": v for name, v in versions.items()}})
    launch: dict[str, Any] = {"processes": ranks.world, "lm_in_shards": sharded()}
    launch["versions"] = {n: v for n, v in versions.items() if v}
    found: dict[str, bool] = {}
    with ranks.together():
        if ranks.main:
            found["resumes"] = _open_run(folder, flags, cfg, launch)
    return ranks.merge(found)["resumes"]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # some are needed by some runs only
        return None


def _open_run(folder: Path, flags: dict[str, Any], cfg: Any, launch: dict[str, Any]) -> bool:
    with _writable(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder)
    for left_over in folder.glob("*.tmp"):  # of a save or a deletion that was cut off
        # Cut off between two renames, .old.tmp is the only best coder: keep_best puts it back.
        if not left_over.name.endswith(".old.tmp"):
            shutil.rmtree(left_over, ignore_errors=True)
    if any(folder.glob("step_*")):
        if not flags["resume"]:
            raise UsageError(
                f"--run_name {folder.name}: {folder} already holds a run; add --resume to continue "
                f"it, or give another --run_name"
            )
        _check_same_run(folder, flags, cfg)
        return True
    if flags["resume"]:
        print(f"--resume: {folder} holds no checkpoint yet; the run starts from the beginning")
    with _writable(folder):
        write_json(folder / "run.json", {**flags, **launch})
    return False


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"--save_dir {folder.parent}: cannot be written ({error.strerror}); give another folder"
        ) from None


def _check_same_run(folder: Path, flags: dict[str, Any], cfg: Any) -> None:
    """Raise UsageError where flags that move numbers are not those that the run started with.

    A flag that run.json does not name is newer than the run, which had its default, or did what
    was done then.
    """
    before = {**flags_of(type(cfg)()), **_as_done_then(read_json(folder / "run.json"), cfg)}
    if flags["sequences_per_batch"] != _sequences_per_batch(before):
        raise UsageError(
            f"--resume: --batch_size times --grad_acc_steps times the number of ranks is "
            f"{flags['sequences_per_batch']} now and was {_sequences_per_batch(before)} when "
            f"the run started: choose the two so that it is the same on this many ranks"
        )
    free = {*flags_marked(cfg, MAY_CHANGE), "sequences_per_batch"}
    if before["text_column"] == "text" and flags["text_column"] is None:
        free.add("text_column")  # what the default was once
    for name, value in json.loads(json.dumps(flags)).items():
        from_python = name in ("model", "dataset") and value is None
        if name in free or from_python:
            continue
        was = json.loads(json.dumps(before[name]))
        if was != value:
            raise UsageError(
                f"--resume: --{name} is {value!r} now and was {was!r} when the run started; give "
                f"the same flags, or start a new run with --finetune"
            )


def _as_done_then(recorded: dict[str, Any], cfg: Any) -> dict[str, Any]:
    """A run's flags, with what was done where a flag is newer, or had another default then."""
    none = None if excluded_by(cfg.coder, cfg.training) else 0.0  # as the default is there
    together = False if cfg.training.auxk_alpha else None
    done: dict[str, Any] = {"runner_ups": none, "auxk_alone": together, **recorded}
    if "wake_alpha" in recorded:
        return done
    done["wake_alpha"] = 0.0
    if recorded.get("activation") == "batchtopk" and recorded.get("steps_per_batch") is None:
        done["steps_per_batch"] = 1  # its rows were not dealt
    if "lr_warmup_steps" not in recorded:
        return done
    del done["lr_warmup_steps"]
    done |= {"lr_warmup": recorded["lr_warmup_steps"], "lr_decay": 1.0}
    done |= {"steps_per_batch": 1, "encoder_lr": 1.0, "rms_units": False}
    done |= {"adam_beta1": 0.9, "adam_beta2": 0.999}
    by_rule = {"adam": "2e-4 / sqrt(latents / 2^14)", "muon": 2e-3}
    if recorded.get("lr") is None and recorded.get("optimizer") in by_rule:
        done["lr"] = by_rule[recorded["optimizer"]]
    return done


def _sequences_per_batch(flags: dict[str, Any]) -> Any:
    # Runs from before there were several ranks did not write it.
    alone = flags.get("batch_size", 0) * flags.get("grad_acc_steps", 0)
    return flags.get("sequences_per_batch", flags.get("sequences_per_step", alone))


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    found = [f for f in folder.glob("step_*") if f.suffix == "" and (f / "manifest.json").is_file()]
    return natsorted(found, key=lambda f: f.name)

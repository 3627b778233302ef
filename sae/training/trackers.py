"""The run in a tracker: its project, its name, and its id, by which a resumed run goes on in it.

RUN/tracker.json   by tracker: project and id
"""

import json
import os
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from ..flag_checks import UsageError

_DEFAULT_PROJECT = "sae"
_VARIABLES = {
    "wandb": "WANDB_PROJECT",
    "trackio": "TRACKIO_PROJECT",
    "mlflow": "MLFLOW_EXPERIMENT_NAME",
    "comet_ml": "COMET_PROJECT_NAME",
}


def open_tracker(accelerator: Accelerator, flags: dict[str, Any], first_step: int) -> None:
    """Open the run in the tracker of `accelerator`, or the one that a resumed run had there.

    Called by rank 0. `flags` are those of the run. Raises UsageError for a damaged tracker.json.
    """
    (name,) = map(str, accelerator.log_with)
    plain = {n: v if isinstance(v, (int, float, str)) else str(v) for n, v in flags.items()}
    if name == "tensorboard":
        # On resume, points that a killed run logged after its last checkpoint are dropped.
        purge = {"purge_step": first_step + 1} if first_step else {}
        accelerator.init_trackers(name, plain, {name: purge})
        return
    folder = Path(accelerator.project_dir)
    record = folder / "tracker.json"
    kept = _read(record) if flags["resume"] else {}
    before = kept.get(name, {})
    project = flags["project"] or before.get("project")
    project = project or os.environ.get(_VARIABLES[name]) or _DEFAULT_PROJECT
    id_before = before["id"] if before.get("project") == project else None
    if name == "mlflow":
        os.environ[_VARIABLES[name]] = project  # accelerate puts the variable before its argument
        if id_before:  # what MLflow has recorded of a run cannot be recorded anew
            plain = None
    accelerator.init_trackers(project, plain, {name: _arguments(name, folder.name, id_before)})
    tracked = accelerator.trackers[-1].tracker
    if name == "comet_ml" and not id_before:
        tracked.set_name(folder.name)
    _write(record, {**kept, name: {"project": project, "id": _id_of(name, tracked)}})


def _arguments(name: str, run_name: str, id_before: str | None) -> dict[str, Any]:
    """What each tracker's own start takes."""
    if name == "wandb":
        same = {"id": id_before, "resume": "allow"} if id_before else {}
        return {"name": run_name, **same}
    if name == "trackio":  # which knows runs by their names
        return {"name": id_before or run_name, "resume": "allow" if id_before else "never"}
    if name == "mlflow":
        return {"run_name": run_name, "run_id": id_before}
    return {"experiment_key": id_before} if id_before else {}


def _id_of(name: str, tracked: Any) -> str:
    if name == "wandb":
        return tracked.id
    if name == "trackio":
        return tracked.name
    return tracked.info.run_id if name == "mlflow" else tracked.get_key()


def show_histogram(accelerator: Accelerator, name: str, values: Tensor, step: int) -> None:
    """Show a histogram of a vector, where the tracker has histograms."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.tracker.add_histogram(name, values, step)
        elif tracker.name == "wandb":
            import wandb  # pyright: ignore[reportMissingImports]

            tracker.log({name: wandb.Histogram(values.numpy())}, step=step)
        elif tracker.name == "comet_ml":
            tracker.tracker.log_histogram_3d(values.numpy(), name=name, step=step)


def _read(record: Path) -> dict[str, Any]:
    try:
        return json.loads(record.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UsageError(
            f"{record} cannot be read ({error}): the file is damaged; delete it, and the tracker "
            f"gets a new run"
        ) from None


def _write(record: Path, value: dict[str, Any]) -> None:
    aside = record.with_name(record.name + ".tmp")
    aside.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, record)

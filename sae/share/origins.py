"""Where coders come from, as the folder of their run says it."""

from pathlib import Path

from ..formats.hook_names import about_lm
from ..formats.origin import Origin
from ..judge.provenance import flags_of_run
from ..runs.json_files import read_json


def origin_of(run: Path, model: str | None = None) -> Origin:
    """What a run's folder, or one of its checkpoints, says of its LM and text; or its `model`."""
    flags = flags_of_run(run)
    summary = next((f for f in (run, run.parent) if (f / "summary.json").is_file()), None)
    tokens = read_json(summary / "summary.json").get("tokens") if summary and flags else None
    model = model or flags.get("model")
    kind, layers = about_lm(model)
    return Origin(
        model=_without_folder(model),
        model_type=kind,
        layers=layers,
        dataset=_without_folder(flags.get("dataset")),
        ctx_len=flags.get("ctx_len"),
        tokens=tokens,
    )


def _without_folder(name: str | None) -> str | None:
    """A name without the folders of this machine, which mean nothing elsewhere."""
    return Path(name).name if name is not None and Path(name).is_absolute() else name

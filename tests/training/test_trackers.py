"""A run in each tracker has its project, its name and, after a resume, still its id."""

import json
import shutil
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import accelerate.tracking
import numpy as np
import pytest
import torch
from accelerate.utils import LoggerType
from torch import Tensor
from training_runs import Settings, run
from transformers import PreTrainedModel

from sae import UsageError
from sae.training.logs import RunLog

# Tracker -> the variable that names its project.
VARIABLES = {
    "wandb": "WANDB_PROJECT",
    "trackio": "TRACKIO_PROJECT",
    "mlflow": "MLFLOW_EXPERIMENT_NAME",
    "comet_ml": "COMET_PROJECT_NAME",
}


class Fake:
    """What a tracker's module was told: (project, name, id that was asked for, resume)."""

    def __init__(self) -> None:
        self.starts: list[tuple[Any, ...]] = []
        self.points: list[tuple[int, dict[str, Any]]] = []
        self.histograms: list[str] = []
        self.params: list[dict[str, Any]] = []
        self.finished = 0

    def log(self, values: dict[str, Any], step: int) -> None:
        self.points.append((step, values))

    def finish(self) -> None:
        self.finished += 1

    def record(self, values: dict[str, Any], **_: Any) -> None:
        self.params.append(values)


def fake_wandb(fake: Fake) -> dict[str, Any]:
    def init(
        project: str, name: str, id: str | None = None, resume: str | None = None
    ) -> SimpleNamespace:
        fake.starts.append((project, name, id, resume))
        made = id or f"made-{len(fake.starts)}"
        return SimpleNamespace(id=made, log=fake.log, finish=fake.finish)

    class Histogram:
        def __init__(self, sequence: np.ndarray) -> None:
            self.values = np.asarray(sequence)

    return {"init": init, "config": SimpleNamespace(update=fake.record), "Histogram": Histogram}


def fake_trackio(fake: Fake) -> dict[str, Any]:
    def init(project: str, name: str, resume: str) -> SimpleNamespace:
        fake.starts.append((project, name, name if resume == "allow" else None, resume))
        taken = resume == "never" and len(fake.starts) > 1
        given = f"made-{len(fake.starts)}" if taken else name
        return SimpleNamespace(name=given, log=fake.log, finish=fake.finish)

    return {"init": init, "config": SimpleNamespace(update=fake.record)}


def fake_mlflow(fake: Fake) -> dict[str, Any]:
    def start_run(
        run_id: str | None, experiment_id: str, run_name: str, **_: Any
    ) -> SimpleNamespace:
        fake.starts.append((experiment_id, run_name, run_id, None))
        return SimpleNamespace(info=SimpleNamespace(run_id=run_id or f"made-{len(fake.starts)}"))

    limits = SimpleNamespace(MAX_PARAM_VAL_LENGTH=6000, MAX_PARAMS_TAGS_PER_BATCH=100)
    return {
        "search_experiments": lambda filter_string: [],
        "create_experiment": lambda name, **_: name,
        "start_run": start_run,
        "log_params": fake.record,
        "log_metrics": fake.log,
        "end_run": fake.finish,
        "utils": SimpleNamespace(validation=limits),
    }


def fake_comet(fake: Fake) -> dict[str, Any]:
    class Experiment:
        def __init__(self, key: str) -> None:
            self.key = key
            self.end, self.log_parameters = fake.finish, fake.record

        def get_key(self) -> str:
            return self.key

        def set_name(self, name: str) -> None:
            project, _, *rest = fake.starts[-1]
            fake.starts[-1] = (project, name, *rest)

        def set_step(self, step: int) -> None: ...

        def log_metric(self, name: str, value: float, step: int) -> None:
            fake.log({name: value}, step)

        def log_histogram_3d(self, values: np.ndarray, name: str, step: int) -> None:
            fake.histograms.append(name)

    def start(project_name: str, experiment_key: str | None = None) -> Experiment:
        fake.starts.append((project_name, None, experiment_key, None))
        return Experiment(experiment_key or f"made-{len(fake.starts)}")

    return {"__version__": "3.50.0", "start": start}


MODULES = {
    "wandb": fake_wandb,
    "trackio": fake_trackio,
    "mlflow": fake_mlflow,
    "comet_ml": fake_comet,
}


@pytest.fixture
def fake(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """The tracker of the test's parameter, or wandb, as if it were installed."""
    name = getattr(request, "param", "wandb")
    made, module = Fake(), ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(MODULES[name](made))
    monkeypatch.setitem(sys.modules, name, module)
    trackers = [LoggerType.TENSORBOARD, LoggerType(name)]
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", trackers)
    for variable in VARIABLES.values():
        monkeypatch.setenv(variable, "")  # so that it is put back after the test
        monkeypatch.delenv(variable)
    return made


@pytest.mark.parametrize(("fake", "name"), [(n, n) for n in MODULES], indirect=["fake"])
def test_a_resumed_run_goes_on_in_the_tracker(
    fake: Fake,
    name: str,
    lm: PreTrainedModel,
    tokens: Tensor,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The project is the flag, the tracker's variable or sae; --resume continues the same run."""
    flags = {"log_with": name, "layers": (1,), "save_every": 10, "max_examples": 80}
    folder = Path(settings["save_dir"]) / "mine"
    run(lm, tokens, settings, run_name="mine", **flags)
    assert fake.starts[-1][:3] == ("sae", "mine", None)
    monkeypatch.setenv(VARIABLES[name], "from the variable")
    shutil.rmtree(folder)
    run(lm, tokens, settings, run_name="mine", **flags)
    assert fake.starts[-1][:3] == ("from the variable", "mine", None)
    kept = json.loads((folder / "tracker.json").read_text())[name]["id"]

    monkeypatch.delenv(VARIABLES[name])
    recorded = len(fake.params)
    run(lm, tokens, settings, run_name="mine", resume=True, **flags)
    project, _, continued, resume = fake.starts[-1]
    assert (project, continued) == ("from the variable", kept)
    assert resume == ("allow" if name in ("wandb", "trackio") else None)
    assert len(fake.params) == recorded + (name != "mlflow")  # it takes a parameter only once

    monkeypatch.setenv(VARIABLES[name], "from the variable")
    run(lm, tokens, settings, run_name="mine", resume=True, project="from the flag", **flags)
    assert fake.starts[-1][0] == "from the flag" and fake.starts[-1][2] is None
    assert fake.finished == 4
    assert ("decoder_norm/layers.1" in fake.histograms) == (name == "comet_ml")


def test_wandb_gets_every_metric_and_histograms(
    fake: Fake,
    lm: PreTrainedModel,
    tokens: Tensor,
    settings: Settings,
    capsys: pytest.CaptureFixture,
) -> None:
    """Each step once, held-out figures, histograms of all decoder rows, and no TensorBoard."""
    flags = {"log_with": "wandb", "layers": (1,), "max_examples": 80}
    summary = run(lm, tokens, settings, run_name="mine", **flags)
    assert [step for step, values in fake.points if "fvu/layers.1" in values] == [*range(1, 11)]
    found = {name: value for _, values in fake.points for name, value in values.items()}
    assert found["eval/fvu/layers.1"] == summary["hookpoints"]["layers.1"]["fvu"]
    np.testing.assert_allclose(found["decoder_norm/layers.1"].values, np.ones(128), rtol=1e-4)
    assert "TensorBoard" not in capsys.readouterr().out
    assert not (Path(settings["save_dir"]) / "mine/tensorboard").exists()
    run(lm, tokens, settings, run_name="other", **{**flags, "log_with": "tensorboard"})
    assert "TensorBoard  tensorboard --logdir" in capsys.readouterr().out


def test_a_damaged_record_of_the_tracker_is_named(
    fake: Fake, lm: PreTrainedModel, tokens: Tensor, settings: Settings
) -> None:
    """What is no JSON in tracker.json is not a traceback."""
    flags = {"log_with": "wandb", "layers": (1,), "max_examples": 80, "run_name": "mine"}
    run(lm, tokens, settings, **flags)
    (Path(settings["save_dir"]) / "mine/tracker.json").write_text('{"wandb')
    with pytest.raises(UsageError, match=r"tracker\.json cannot be read .*delete it"):
        run(lm, tokens, settings, resume=True, **flags)


def test_tokens_per_second_are_those_of_whole_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the rows of 64 entries, also where only every 32nd step has forwards to wait for."""
    now, logged = [0.0], list[dict[str, float]]()
    ranks = SimpleNamespace(main=True, merge=dict, gather=lambda value: [value], world=1)
    ranks.device = torch.device("cpu")
    exchange: Any = SimpleNamespace(ranks=ranks, owner={"h": range(1)}, distributed=False)
    accelerator: Any = SimpleNamespace(log_with=None, trackers=[])
    accelerator.log = lambda numbers, step: logged.append(numbers)
    monkeypatch.setattr("sae.training.logs.time", SimpleNamespace(monotonic=lambda: now[0]))
    flags = {"log_every": 1, "loss_fn": "fvu"}
    log = RunLog(accelerator, exchange, flags, range(200), 0.0)
    log.start(0, "none")
    state: Any = SimpleNamespace(firing={})
    for step in range(200):
        now[0] += 33.0 if step % 32 == 0 else 1.0  # 64 seconds for 32 steps
        log.step(step + 1, {}, 10, state)
    log.close()
    rates = [numbers["tokens_per_second"] for numbers in logged]
    assert rates[0] == 10 / 33
    assert rates[64:] == [5.0] * len(rates[64:])

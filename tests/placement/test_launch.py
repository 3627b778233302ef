"""A machine without DeepSpeed, and processes that mpirun or srun starts."""

import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from starts import ROOT, Starter, folder, starter

from sae import UsageError
from sae.placement import launch

__all__ = ["folder", "starter"]  # fixtures
FLAGS = [
    *("--layers", "1", "--ctx_len", "16", "--num_latents", "64", "--k", "4", "--batch_size", "4"),
    *("--eval_tokens", "256", "--max_examples", "32", "--log_with", "none", "--run_name"),
]

# In front of the script: DeepSpeed is neither found nor imported.
WITHOUT_DEEPSPEED = """
import importlib.util, os, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "deepspeed":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *args: name != "deepspeed" and find(name, *args) or None
sys.meta_path.insert(0, Absent())
import train_sae
argv = sys.argv[1:]
for name, sharded in (("plain", "false"), ("sharded", "true")):
    os.environ.update(ACCELERATE_USE_DEEPSPEED=sharded, ACCELERATE_DEEPSPEED_ZERO_STAGE="3")
    sys.argv = ["train_sae.py", *argv, name]
    train_sae.main()
"""


def test_without_deepspeed_all_but_sharding_works(folder: Path) -> None:
    """A run trains to its end; a launch that asks for DeepSpeed ends in one line."""
    files = [str(folder / "lm"), str(folder / "ids.bin"), "--save_dir", str(folder / "runs")]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_DEEPSPEED, *files, *FLAGS],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert (folder / "runs/plain/summary.json").exists(), done.stderr
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "asks for DeepSpeed, which is not installed: pip install" in line


ALONE = {"PMI_SIZE": "1", "PMI_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}
LOST = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}


def test_one_process_of_mpi_is_one_process(starter: Starter) -> None:
    """Where mpirun or srun started one process, it trains alone; one of two that are lost ends."""
    files = [str(starter.folder / "lm"), str(starter.folder / "ids.bin")]
    save = ["--save_dir", str(starter.folder / "runs")]
    for name, environment, code in (("alone", ALONE, 0), ("lost", LOST, 2)):
        argv, log = [*files, *save, *FLAGS, name], starter.folder / name
        (pid,) = starter.server.start("train_sae", argv, log, env=environment)
        assert starter.wait(pid) == code, starter.log(name)
    said = starter.log("lost")
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: OMPI_COMM_WORLD_SIZE is 2: ") and "Traceback" not in said
    assert "MASTER_ADDR, MASTER_PORT" in line and "unset OMPI_COMM_WORLD_SIZE" in line


def test_processes_of_mpi_that_can_find_each_other_are_ranks(starter: Starter) -> None:
    """With MASTER_ADDR and MASTER_PORT, two processes of mpirun train as one run."""
    files = [str(starter.folder / "lm"), str(starter.folder / "ids.bin")]
    argv = [*files, "--save_dir", str(starter.folder / "runs"), *FLAGS, "ranks"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for rank in "01":
        given = {**meet, "PMI_SIZE": "2", "PMI_RANK": rank}
        log = starter.folder / f"ranks.{rank}"
        started += starter.server.start("train_sae", argv, log, env=given)
    codes = [starter.wait(pid) for pid in started]
    said = [starter.log(f"ranks.{rank}") for rank in "01"]
    assert codes == [0, 0], said
    assert "2 processes; 4 steps" in said[0] and "2 processes" not in said[1]


def test_torchs_own_variables_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under torchrun inside srun, the ranks are torchrun's; on GPUs, MPI's need a local rank."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PMI_SIZE", "4")
    monkeypatch.setenv("PMI_RANK", "3")
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        launch.read_mpi()
        assert os.environ["WORLD_SIZE"] == "2" and "RANK" not in os.environ
    monkeypatch.setattr(launch, "on_cpu", lambda: False)
    monkeypatch.setenv("MASTER_ADDR", "host")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(UsageError, match="PMI_SIZE is 4: .* without LOCAL_RANK:"):
        launch.read_mpi()
    monkeypatch.setenv("SLURM_LOCALID", "1")
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")  # so that they are put back after the test
        monkeypatch.delenv(name)
    launch.read_mpi()
    assert [os.environ[n] for n in ("WORLD_SIZE", "RANK", "LOCAL_RANK")] == ["4", "3", "1"]


@pytest.mark.parametrize(("compute", "expected"), [(7, torch.float32), (8, torch.bfloat16)])
def test_emulated_bfloat16_is_not_taken_for_bfloat16(
    compute: int, expected: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU before Ampere (a T4: 7.5) trains in float32, and bf16 on it is refused by its name."""
    for variable in ("ACCELERATE_USE_CPU", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(variable, raising=False)
    properties = SimpleNamespace(major=compute)
    for name, value in {
        **{"is_available": True, "device_count": 1, "current_device": 0},
        **{"get_device_properties": properties, "get_device_name": "Tesla T4"},
        "_check_bf16_tensor_supported": True,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.version, "hip", None)
    assert launch.working_dtype("auto") == expected and torch.cuda.is_bf16_supported()
    asked = launch.working_dtype("bf16")
    refused = pytest.raises(UsageError, match="--mixed_precision bf16: Tesla T4 has no bfloat16")
    with refused if compute < 8 else nullcontext():
        launch.arguments(tmp_path, "none", asked, 1.0)


REACHED_BY = {"main": "10.0.0.2", "own name": "127.0.1.1", launch._ANYWHERE: "10.0.0.2"}


class Route:
    """A socket in place of the real one: by which of its addresses this machine reaches another."""

    far = ""

    def __init__(self, *_: object) -> None: ...
    def __enter__(self) -> "Route":
        return self

    def __exit__(self, *_: object) -> None: ...
    def connect(self, to: tuple[str, int]) -> None:
        if to[0] not in REACHED_BY:
            raise OSError("no such host")
        self.far = to[0]

    def getsockname(self) -> tuple[str, int]:
        return REACHED_BY[self.far], 0


@pytest.mark.parametrize(
    ("main", "here", "set_before", "expected"),
    [
        ("main", "1", None, "eth1"),
        ("own name", "1", None, "eth1"),  # as on the main machine
        ("unknown", "1", None, "eth1"),
        ("main", "1", "ib0", "ib0"),
        ("main", "2", None, None),  # one machine
    ],
)
def test_gloo_takes_the_interface_between_the_machines(
    main: str,
    here: str,
    set_before: str | None,
    expected: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On several machines not the loopback, whatever a machine calls itself, but what users set."""
    known = {"lo": "127.0.0.1", "eth0": "192.168.0.5", "eth1": "10.0.0.2"}
    monkeypatch.setattr(launch, "_addresses", lambda: known)
    monkeypatch.setattr(launch.socket, "socket", Route)
    ranks = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": here}
    for name, value in {**ranks, "MASTER_ADDR": main, "ACCELERATE_USE_CPU": "true"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", set_before or "")  # so that it is put back
    if set_before is None:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    launch.arguments(tmp_path, "none", torch.float32, 1.0)
    assert os.environ.get("GLOO_SOCKET_IFNAME") == expected


def test_addresses_are_those_of_the_interfaces() -> None:
    """The loopback has its address, and the way to it is by that."""
    assert launch._addresses()["lo"] == "127.0.0.1"

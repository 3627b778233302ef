"""How a launch becomes an Accelerator: device, backend, ZeRO-3; and launches that are refused."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import is_deepspeed_available
from datasets import disable_progress_bars
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from ..flag_checks import UsageError
from ..lm.capture import is_sharded
from ..lm.loading import compile_blocks
from .ranks import Ranks

# What mpirun (of MPICH, Open MPI, MVAPICH) and srun call the variables of torch.
_MPI = {
    "WORLD_SIZE": ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
    "RANK": ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"),
    "LOCAL_RANK": (
        *("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
        "SLURM_LOCALID",
    ),
}


def on_cpu() -> bool:
    """Whether the run uses the CPU: there is no GPU, or the launch file says `use_cpu: true`."""
    return not torch.cuda.is_available() or asks_for_cpu()


def asks_for_cpu() -> bool:
    """Whether the launch file says `use_cpu: true`."""
    return _is_set("ACCELERATE_USE_CPU")


def sharded() -> bool:
    """Whether the launch file asks for DeepSpeed, which shards the LM over the ranks."""
    return _is_set("ACCELERATE_USE_DEEPSPEED")


def read_mpi() -> None:
    """Give this process torch's variables where mpirun or srun started it, and said its rank.

    Raises UsageError where it is one of several that cannot find each other, and so would each
    train alone.
    """
    size = next((name for name in _MPI["WORLD_SIZE"] if name in os.environ), None)
    if "WORLD_SIZE" in os.environ or size is None or int(os.environ[size]) <= 1:
        return
    found = {n: os.environ.get(n) or _first_set(others) for n, others in _MPI.items()}
    if on_cpu():  # each takes its cores from the launcher
        found["LOCAL_RANK"] = found["LOCAL_RANK"] or "0"
    needed = {**found, **{name: os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT")}}
    if missing := [name for name, value in needed.items() if not value]:
        raise UsageError(
            f"{size} is {os.environ[size]}: MPI or Slurm started that many processes, but they "
            f"cannot find each other without {', '.join(missing)}: export the first host as "
            f"MASTER_ADDR and a free port as MASTER_PORT, or launch by torchrun; for one process "
            f"alone, unset {size}"
        )
    os.environ.update({name: value for name, value in found.items() if value})


def working_dtype(mixed_precision: str) -> torch.dtype:
    """What the LM and the encoders' products run in: `no`, `bf16`, or `auto`, by the device."""
    if mixed_precision == "auto":
        mixed_precision = "no" if on_cpu() or not torch.cuda.is_bf16_supported() else "bf16"
    return torch.bfloat16 if mixed_precision == "bf16" else torch.float32


def arguments(
    run: Path, log_with: str, dtype: torch.dtype, timeout_minutes: float
) -> dict[str, Any]:
    """What `Accelerator` must be given for the launch at hand.

    Without these, ranks on a CPU each believe to be alone, DeepSpeed decides the LM's dtype, and a
    lost rank keeps the others waiting for as long as the backend likes.
    """
    read_mpi()
    if log_with not in {*map(str, get_available_trackers()), "none"}:
        raise UsageError(f"--log_with {log_with}: is not installed; pip install it, or use none")
    found: dict[str, Any] = {"project_dir": run}
    found["log_with"] = None if log_with == "none" else log_with
    if "LOCAL_RANK" in os.environ:
        backend = "gloo" if on_cpu() else "nccl"
        timeout = timedelta(minutes=timeout_minutes)
        found["kwargs_handlers"] = [InitProcessGroupKwargs(backend=backend, timeout=timeout)]
    if not sharded():
        return {**found, "cpu": on_cpu()}
    if not is_deepspeed_available():
        raise UsageError(
            "the launch file asks for DeepSpeed, which is not installed: pip install "
            "'deepspeed>=0.19,<0.20', or take a launch file without zero3 in its name"
        )
    plugin = DeepSpeedPlugin()
    if plugin.zero_stage != 3:
        raise UsageError(
            f"the launch file asks for ZeRO stage {plugin.zero_stage}, which does not shard a "
            f"frozen LM: set zero_stage: 3, as accelerate_configs/8gpu_zero3.yaml does, or drop "
            f"DeepSpeed"
        )
    plugin.deepspeed_config.update(
        bf16={"enabled": dtype == torch.bfloat16},
        fp16={"enabled": False},
        train_micro_batch_size_per_gpu=1,  # without a loader of its own DeepSpeed cannot tell
        gradient_accumulation_steps=1,
    )
    # The coders have their own gradients, clipped by nobody.
    plugin.deepspeed_config.pop("gradient_clipping", None)
    return {**found, "deepspeed_plugin": plugin}


def connect(accelerator: Accelerator, timeout_minutes: float) -> Ranks:
    """The ranks of this launch. Raises UsageError if a process takes itself for the only one."""
    launched = os.environ.get("WORLD_SIZE", "1")
    # Several processes on the CPU are MPI's to accelerate: it sets an address and starts one.
    address_for_one = {"ACCELERATE_USE_CPU", "MASTER_PORT"} <= os.environ.keys()
    if accelerator.num_processes == 1 and "WORLD_SIZE" not in os.environ and address_for_one:
        launched = "several"
    if str(accelerator.num_processes) != launched:
        raise UsageError(
            f"{launched} processes were asked for and this one sees {accelerator.num_processes}: "
            f"each would train alone and write the same folder. On the CPU, launch with "
            f"--config_file accelerate_configs/cpu_2proc.yaml --num_processes N; on GPUs with "
            f"accelerate_configs/8gpu.yaml; or with torchrun --nproc_per_node N"
        )
    if not accelerator.is_main_process:  # one progress bar is enough
        disable_progress_bar()
        disable_progress_bars()
    device = torch.device("cpu") if accelerator.device.type == "cpu" else accelerator.device
    return Ranks(device, timeout_minutes)


def shard(
    accelerator: Accelerator, lm: PreTrainedModel, hookpoints: list[str], compiled: bool = False
) -> PreTrainedModel:
    """The LM on the accelerator's device, or, if it was loaded into shards, gathered as it runs.

    If it is to be `compiled`, that is done block by block. Raises UsageError where it is sharded.
    """
    if not is_sharded(lm):
        if compiled:
            compile_blocks(lm, hookpoints)
        same = lm.device.type == accelerator.device.type
        return lm if same else lm.to(accelerator.device)  # type: ignore[arg-type]  # stubs lack it
    if compiled:
        raise UsageError("--compile: does not work on a sharded LM; leave it out")
    # Its module is called, never the engine, which would take part in the coders' backward.
    return accelerator.prepare(lm).module


def _first_set(names: tuple[str, ...]) -> str | None:
    return next((os.environ[name] for name in names if name in os.environ), None)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")

"""How a launch becomes an Accelerator: device, backend, ZeRO-3; and launches that are refused."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.tracking import get_available_trackers
from datasets import disable_progress_bars
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from ..flag_checks import UsageError
from ..lm.capture import is_sharded
from ..lm.loading import compile_blocks
from .ranks import Ranks


def on_cpu() -> bool:
    """Whether the run uses the CPU: there is no GPU, or the launch file says `use_cpu: true`."""
    return not torch.cuda.is_available() or _is_set("ACCELERATE_USE_CPU")


def sharded() -> bool:
    """Whether the launch file asks for DeepSpeed, which shards the LM over the ranks."""
    return _is_set("ACCELERATE_USE_DEEPSPEED")


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
    plugin = DeepSpeedPlugin()
    if plugin.zero_stage != 3:
        raise UsageError(
            f"the launch file asks for ZeRO stage {plugin.zero_stage}, which does not shard a "
            f"frozen LM: set stage 3, as accelerate_configs/zero3.json does, or drop DeepSpeed"
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


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")

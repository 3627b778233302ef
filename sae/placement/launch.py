"""How a launch becomes an Accelerator: device, backend, ZeRO-3; and launches that are refused."""

import os
import socket
import struct
from contextlib import suppress
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

from ..config import MachineConfig
from ..flag_checks import UsageError
from ..lm.capture import is_sharded
from ..lm.loading import compile_blocks, leave_blocks_plain
from .owners import Placement
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

_ANYWHERE = "192.0.2.1"  # an address that no machine has, for documentation
_GET_ADDRESS = 0x8915  # SIOCGIFADDR of Linux


def on_cpu() -> bool:
    """Whether the run uses the CPU: there is no GPU, or the launch file asks for none."""
    return not torch.cuda.is_available() or asks_for_cpu()


def _has_bfloat16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


def check_device() -> None:
    """Raise UsageError where accelerate or torchrun started this process for a GPU it has not."""
    if asks_for_cpu():
        return
    local_rank, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ  # Slurm may show each process its own alone
    if torch.cuda.is_available() and by_torchrun and local_rank >= gpus:
        raise UsageError(
            f"--num_processes of the launch: process {local_rank} of this machine finds {gpus} "
            f"GPUs, and each needs its own: start no more processes than there are GPUs"
        )
    if torch.cuda.is_available() or "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return
    why = f"torch {torch.__version__} finds none (see nvidia-smi, and CUDA_VISIBLE_DEVICES)"
    if torch.version.cuda is None and torch.version.hip is None:
        why = f"torch {torch.__version__} is built without CUDA (install one that is built with it)"
    raise UsageError(
        f"accelerate launch was asked for GPUs, and {why}. To train on the CPU, launch with "
        f"--config_file accelerate_configs/cpu.yaml, or cpu_2proc.yaml for several processes, or "
        f"export ACCELERATE_USE_CPU=true"
    )


def asks_for_cpu() -> bool:
    """Whether the launch file, or the user, keeps this process from GPUs."""
    # Of several processes accelerate passes on which GPUs they see, but not `use_cpu`.
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "").startswith("-1")
    return hidden or _is_set("ACCELERATE_USE_CPU")


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
        mixed_precision = "bf16" if not on_cpu() and _has_bfloat16() else "no"
    return torch.bfloat16 if mixed_precision == "bf16" else torch.float32


def arguments(
    run: Path, log_with: str, dtype: torch.dtype, timeout_minutes: float
) -> dict[str, Any]:
    """What `Accelerator` must be given for the launch at hand.

    Without these, ranks on a CPU each believe to be alone, DeepSpeed decides the LM's dtype, and a
    lost rank keeps the others waiting for as long as the backend likes.
    """
    read_mpi()
    check_device()
    if log_with not in {*map(str, get_available_trackers()), "none"}:
        raise UsageError(f"--log_with {log_with}: is not installed; pip install it, or use none")
    found: dict[str, Any] = {"project_dir": run}
    found["log_with"] = None if log_with == "none" else log_with
    if dtype == torch.bfloat16 and not on_cpu() and not _has_bfloat16():
        raise UsageError(
            f"--mixed_precision bf16: {torch.cuda.get_device_name()} has no bfloat16, and emulates "
            f"it slowly: use no, or auto"
        )
    if "LOCAL_RANK" in os.environ:
        if (interface := _interface_between_machines()) is not None:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
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


def connect(accelerator: Accelerator, machine: MachineConfig) -> Ranks:
    """The ranks of this launch; with `--deterministic` PyTorch's operators repeat bit for bit.

    Raises UsageError if a process takes itself for the only one, or if ranks cannot be divided as
    flags say.
    """
    if machine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by the first product
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore
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
    Placement.of(machine, accelerator.num_processes)  # before an LM is loaded for nothing
    device = torch.device("cpu") if accelerator.device.type == "cpu" else accelerator.device
    return Ranks(device, machine.timeout)


def shard(
    accelerator: Accelerator, lm: PreTrainedModel, hookpoints: list[str], compiled: bool = False
) -> PreTrainedModel:
    """The LM on the accelerator's device, or, if it was loaded into shards, gathered as it runs.

    If it is to be `compiled`, that is done block by block. Raises UsageError where it is sharded.
    """
    if not is_sharded(lm):
        compile_blocks(lm, hookpoints) if compiled else leave_blocks_plain(lm)
        same = lm.device.type == accelerator.device.type
        return lm if same else lm.to(accelerator.device)
    if compiled:
        raise UsageError("--compile: does not work on a sharded LM; leave it out")
    engine = accelerator.prepare(lm)
    _let_forwards_begin_at_base_(engine)
    # Its module is called, never the engine, which would take part in the coders' backward.
    return engine.module


def _let_forwards_begin_at_base_(engine: Any) -> None:
    """Tell DeepSpeed that a forward begins where the base model is called.

    It learns in which order modules run between two such signs, and gathers ahead; its own sign is
    a call of the whole LM, which of one with a head never comes, or comes for the head alone.
    """
    lm, shards = engine.module, engine.optimizer
    base = lm.base_model
    if base is lm:
        return

    def begins(*_: object) -> None:
        if "forward" not in vars(base):  # else it stands in for itself, and only the head runs
            shards.get_param_coordinator().reset_step()

    shards.fwd_pre_hook.remove()
    base.register_forward_pre_hook(begins, prepend=True)


def _interface_between_machines() -> str | None:
    """The network interface by which ranks reach the main address; None if it is not known.

    Gloo would take the one of the machine's own name, which many systems give to the loopback.
    """
    if os.environ.get("WORLD_SIZE") == os.environ.get("LOCAL_WORLD_SIZE"):
        return None
    # On the main machine that address can be the loopback as well: then the way to anywhere.
    for far in (os.environ.get("MASTER_ADDR", ""), _ANYWHERE):
        with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
            way.connect((far, 9))  # of datagrams, which sends nothing
            address = way.getsockname()[0]
            if not address.startswith("127."):
                return next((n for n, a in _addresses().items() if a == address), None)
    return None


def _addresses() -> dict[str, str]:
    """The IPv4 address of every network interface that has one."""
    try:
        import fcntl
    except ImportError:  # Windows
        return {}
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            with suppress(OSError):
                request = struct.pack("256s", name.encode())
                reply = fcntl.ioctl(any_socket.fileno(), _GET_ADDRESS, request)
                found[name] = socket.inet_ntoa(reply[20:24])
    return found


def _first_set(names: tuple[str, ...]) -> str | None:
    return next((os.environ[name] for name in names if name in os.environ), None)


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1")

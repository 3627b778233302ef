"""Launch files and launch scripts: accelerate reads the ones, a dry run resolves the others."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command, launch_command_parser
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from sae import UsageError
from sae.placement import launch
from sae.runs.dry_run import _live_parameters

ROOT = Path(__file__).parents[2]
PROCESSES = {
    **{"cpu": 1, "cpu_2proc": 2, "cpu_2proc_zero3": 2, "1gpu": 1, "8gpu": 8, "8gpu_zero3": 8},
    **{"2node_16gpu": 16, "2node_16gpu_zero3": 16},
}
MODELS = (
    *("gpt2", "pythia-160m", "smollm2-135m", "llama-3.2-1b", "llama-3-8b", "qwen3-8b"),
    *("gemma-2-2b", "llama-3-70b"),
)

# What the configs of the models say, as far as shapes depend on it (from their model cards' files).
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 8192,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257},
    "EleutherAI/pythia-160m": {
        **{"model_type": "gpt_neox", "hidden_size": 768, "num_hidden_layers": 12},
        **{"num_attention_heads": 12, "intermediate_size": 3072, "vocab_size": 50304},
    },
    "HuggingFaceTB/SmolLM2-135M": {
        **{**LLAMA, "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9},
        **{"num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152},
    },
    "meta-llama/Llama-3.2-1B": {
        **{**LLAMA, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32},
        **{"num_key_value_heads": 8, "intermediate_size": 8192, "vocab_size": 128256},
    },
    "meta-llama/Meta-Llama-3-8B": {
        **{**LLAMA, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32},
        **{"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256},
    },
    "Qwen/Qwen3-8B": {
        **{"model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36, "head_dim": 128},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 12288},
        **{"vocab_size": 151936, "max_position_embeddings": 40960},
    },
    "google/gemma-2-2b": {
        **{"model_type": "gemma2", "hidden_size": 2304, "num_hidden_layers": 26, "head_dim": 256},
        **{"num_attention_heads": 8, "num_key_value_heads": 4, "intermediate_size": 9216},
        **{"vocab_size": 256000},
    },
    "meta-llama/Meta-Llama-3-70B": {
        **{**LLAMA, "hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64},
        **{"num_key_value_heads": 8, "intermediate_size": 28672, "vocab_size": 128256},
    },
}

# In place of accelerate: start one process with the environment that eight would see.
STUB = f"""#!{sys.executable}
import sys, yaml
config = yaml.safe_load(open(sys.argv[sys.argv.index("--config_file") + 1]))
stage = config.get("deepspeed_config", {{}}).get("zero_stage", "")
print(config["num_processes"], stage, *sys.argv[sys.argv.index("train_sae.py") + 1:], sep="\\n")
"""


@pytest.mark.parametrize("name", PROCESSES)
def test_launch_files_are_small_and_accelerate_reads_them(name: str) -> None:
    """Three to six keys, a comment on each, and accelerate's own reader takes the file."""
    path = ROOT / f"accelerate_configs/{name}.yaml"
    lines = [line for line in path.read_text().splitlines() if line]
    assert 3 <= len(yaml.safe_load(path.read_text())) <= 6
    assert all("#" in line for line in lines)
    config = load_config_from_file(str(path))
    assert config.num_processes == PROCESSES[name]
    assert config.num_machines == (2 if name.startswith("2node") else 1)
    assert config.use_cpu == name.startswith("cpu")
    assert (config.distributed_type == "DEEPSPEED") == name.endswith("zero3")
    if name.endswith("zero3"):
        assert config.deepspeed_config["zero_stage"] == 3
    assert {p.name for p in path.parent.iterdir()} == {f"{name}.yaml" for name in PROCESSES}


def environment_of(file: Path, patch: pytest.MonkeyPatch) -> dict[str, str]:
    """What accelerate gives the processes that it starts with a launch file."""
    parser = launch_command_parser()
    flags = ["--machine_rank", "0", "--main_process_ip", "127.0.0.1", "--main_process_port", "0"]
    args = parser.parse_args(["--config_file", str(file), *flags, "train_sae.py"])
    found: list[dict[str, str]] = []

    def starts(prepare: Callable[[Any], Any]) -> Callable[[Any], None]:
        def start(args: Any) -> None:
            prepared = prepare(args)
            found.append(prepared[1] if isinstance(prepared, tuple) else prepared)

        return start

    for kind, prepare in (
        ("simple", prepare_simple_launcher_cmd_env),
        ("multi_gpu", prepare_multi_gpu_env),
        ("deepspeed", prepare_deepspeed_cmd_env),
    ):
        patch.setattr(f"accelerate.commands.launch.{kind}_launcher", starts(prepare))
    launch_command(args)
    return found[0]


@pytest.mark.parametrize("name", PROCESSES)
def test_what_a_launch_file_says_of_gpus_is_heeded(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a GPU a launch for GPUs is refused; with GPUs a launch for the CPU is on the CPU."""
    environment = environment_of(ROOT / f"accelerate_configs/{name}.yaml", monkeypatch)
    variables = ("ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES", "ACCELERATE_MIXED_PRECISION")
    for variable in (*variables, "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(variable, raising=False)
        if variable in variables and variable in environment:
            monkeypatch.setenv(variable, environment[variable])
    on_cpu = name.startswith("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert launch.on_cpu() == on_cpu
    launch.check_device()
    with monkeypatch.context() as patch:
        patch.setenv("LOCAL_RANK", "1")
        launch.check_device()  # as Slurm starts processes that each see their own
        patch.setenv("TORCHELASTIC_RUN_ID", "none")
        with nullcontext() if on_cpu else pytest.raises(UsageError, match="process 1 .* finds 1 G"):
            launch.check_device()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert launch.on_cpu()
    asked = "asked for GPUs, and torch .*--config_file accelerate_configs/cpu.yaml"
    with nullcontext() if on_cpu else pytest.raises(UsageError, match=asked):
        launch.arguments(tmp_path, "none", torch.float32, 1.0)
    # Without accelerate, a machine without GPUs is reason enough to train on the CPU.
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    launch.check_device()


@pytest.mark.parametrize("name", [name for name in PROCESSES if name.endswith("zero3")])
def test_sharding_needs_no_other_file(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From any folder, what accelerate hands on of a launch file is ZeRO-3 with a sharded load."""
    file = ROOT / f"accelerate_configs/{name}.yaml"
    monkeypatch.chdir(tmp_path)
    for variable, value in environment_of(file, monkeypatch).items():
        if variable.startswith("ACCELERATE_"):
            monkeypatch.setenv(variable, value)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    plugin = launch.arguments(tmp_path, "none", torch.float32, 1.0)["deepspeed_plugin"]
    assert plugin.zero_stage == 3 and plugin.zero3_init_flag
    assert plugin.deepspeed_config["zero_optimization"]["stage"] == 3
    # DeepSpeed's own defaults, which a dry run takes for the memory of what is gathered.
    live = DeepSpeedZeroConfig(**plugin.deepspeed_config["zero_optimization"]).max_live_parameters
    assert live == _live_parameters() == 10**9


def hub_cache(folder: Path) -> None:
    """A Hub cache that holds configs and no weights."""
    for name, config in CONFIGS.items():
        repository = folder / f"models--{name.replace('/', '--')}"
        (repository / "snapshots" / "0").mkdir(parents=True)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0")
        (repository / "snapshots" / "0" / "config.json").write_text(json.dumps(config))


def test_every_script_resolves_without_weights(tmp_path: Path) -> None:
    """--dry_run of each model's script fits its GPUs and says the memory that its header says."""
    hub_cache(tmp_path / "hub")
    stub = tmp_path / "bin" / "accelerate"
    stub.parent.mkdir()
    stub.write_text(STUB)
    stub.chmod(0o755)
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    environment["PATH"] = f"{stub.parent}:{environment['PATH']}"
    launched = {}
    for name in MODELS:
        command = ["bash", str(ROOT / f"scripts/{name}.sh"), "--dry_run"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        world, stage, *line = done.stdout.splitlines()
        assert line[-1] == "--dry_run"
        launched[name] = (line, world, stage)
    # One process resolves them all: most of the time is spent on imports.
    runner = (
        "import os, sys, train_sae\n"
        f"for name, (line, world, stage) in {launched!r}.items():\n"
        "    os.environ.update(WORLD_SIZE=world, ACCELERATE_DEEPSPEED_ZERO_STAGE=stage)\n"
        "    os.environ['ACCELERATE_USE_DEEPSPEED'] = str(stage == '3').lower()\n"
        "    sys.argv = ['train_sae.py', *line]\n"
        "    print('SCRIPT', name)\n"
        "    train_sae.main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", runner], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = dict(part.split("\n", 1) for part in done.stdout.split("SCRIPT ")[1:])
    assert found.keys() == set(MODELS)
    for name, table in found.items():
        rows = [r.split() for r in re.findall(r"^ *(?:\d+|each) .*$", table, flags=re.M)]
        memory = max(float(row[6]) for row in rows)
        tokens = int(re.findall(r"^run +([\d,]+) tokens", table, flags=re.M)[0].replace(",", ""))
        assert memory < 70, (name, table)  # of 80 GiB: the LM's forward needs the rest
        header = (ROOT / f"scripts/{name}.sh").read_text()
        assert f"Memory: {memory:.0f} GiB per GPU" in header, (name, table)
        assert f"Tokens: {tokens / 1e6:.0f} M." in header, (name, table)
        assert f"Hardware: {len(rows)} GPU" in header, (name, table)
    seventy = found["llama-3-70b"]
    assert "--distribute_modules" in launched["llama-3-70b"][0] and launched["llama-3-70b"][2]
    assert [row.split()[-1] for row in seventy.splitlines()[-8:]] == [
        f"layers.{10 * i}" for i in range(8)
    ]

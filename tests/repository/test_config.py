"""Configs from Python: groups, plain names, flat flags, and values that are no flag's."""

from dataclasses import fields
from typing import Any

import numpy as np
import pytest

from sae import (
    DataConfig,
    MachineConfig,
    ModelConfig,
    RunConfig,
    SaeConfig,
    TrainingConfig,
    UsageError,
)
from sae.flag_checks import MAY_CHANGE, flags_marked, flags_of, from_flags
from train_sae import TrainConfig

GROUPS = (SaeConfig, ModelConfig, DataConfig, TrainingConfig, MachineConfig, RunConfig)


def test_plain_names_stand_for_model_and_data() -> None:
    """TrainConfig takes the names of a model and of data instead of their configs."""
    cfg = TrainConfig(SaeConfig(k=4), model="name", data="file.jsonl")
    assert cfg.coder.k == 4
    assert cfg.model == ModelConfig(model="name")
    assert cfg.data == DataConfig(dataset="file.jsonl")
    assert cfg == from_flags(TrainConfig, {"k": 4, "model": "name", "dataset": "file.jsonl"})


def test_flat_flags_and_groups_are_the_same_config() -> None:
    """A config comes back from its flat flags, with tuples that JSON made lists of."""
    cfg = TrainConfig(
        SaeConfig(k=4, multi_topk=True, expansion_factor=8),
        ModelConfig("name", hookpoints=("layers.*.mlp", "layers.0"), exclude_tokens=(1, 2)),
        DataConfig("data", ctx_len=64, max_examples=10, streaming=True),
        TrainingConfig(init_seeds=(3, 4), optimizer="adam", lr=1e-3, auxk_alpha=1 / 32),
        MachineConfig(mixed_precision="bf16", distribute_modules=True, layer_to_rank=("a=0",)),
        RunConfig(run_name="r", save_every=7, log_with="none"),
    )
    assert from_flags(TrainConfig, flags_of(cfg)) == cfg
    as_json = {n: list(v) if isinstance(v, tuple) else v for n, v in flags_of(cfg).items()}
    assert from_flags(TrainConfig, as_json) == cfg
    assert from_flags(TrainConfig, flags_of(TrainConfig())) == TrainConfig() == TrainConfig()
    assert from_flags(DataConfig, flags_of(cfg)) == cfg.data


def test_a_flag_belongs_to_one_group() -> None:
    """No two groups have a flag of the same name, so that flat flags have one meaning.

    The token is secret, and where coders read and write is found by the run.
    """
    names = [f.name for group in GROUPS for f in fields(group)]
    assert len(names) == len(set(names))
    assert {*flags_of(TrainConfig()), "hf_token", "parts", "sources", "targets"} == set(names)


def test_the_token_is_never_written_down() -> None:
    """The Hub token is in no flat flags and in no printed config."""
    cfg = TrainConfig(model=ModelConfig(hf_token="secret"))
    assert "secret" not in str(flags_of(cfg)) and "secret" not in repr(cfg)


def test_flags_that_move_numbers_may_not_change_on_resume() -> None:
    """Of the coder and its losses no flag is free; how often a run saves is."""
    free = flags_marked(TrainConfig(), MAY_CHANGE)
    fixed = {"k", "num_latents", "transcode", "loss_fn", "optimizer", "lr", "auxk_alpha"}
    fixed |= {"model", "dataset", "ctx_len", "shuffle_seed", "hookpoints", "mixed_precision"}
    assert not free & fixed
    assert {"save_every", "log_every", "resume", "kernels", "batch_size"} <= free


@pytest.mark.parametrize(
    ("group", "flag", "value"),
    [
        (TrainingConfig, "batch_size", "8"),
        (TrainingConfig, "batch_size", 8.0),
        (TrainingConfig, "batch_size", True),
        (TrainingConfig, "batch_size", None),
        (TrainingConfig, "lr", "1e-3"),
        (TrainingConfig, "init_seeds", [0, 1]),
        (TrainingConfig, "init_seeds", (0, "1")),
        (TrainingConfig, "init_seeds", 0),
        (TrainingConfig, "optimizer", "sgd"),
        (TrainingConfig, "adam_8bit", 1),
        (SaeConfig, "k", np.float64(4)),
        (SaeConfig, "activation", "relu"),
        (SaeConfig, "transcode", "yes"),
        (ModelConfig, "hookpoints", "layers.0"),
        (ModelConfig, "model", None),
        (DataConfig, "max_examples", 10.0),
        (DataConfig, "token_dtype", "int8"),
        (MachineConfig, "timeout", "10"),
        (RunConfig, "run_name", 3),
    ],
)
def test_values_of_the_wrong_type_are_refused_by_name(group: Any, flag: str, value: Any) -> None:
    """A value that a flag's type does not allow is named with its flag."""
    with pytest.raises(UsageError, match=f"^--{flag} .*not of the type that this flag takes"):
        group(**{flag: value})


def test_numbers_of_other_libraries_are_numbers() -> None:
    """A NumPy integer is a whole number, and a whole number is a float too."""
    assert TrainingConfig(batch_size=np.int64(8)).batch_size == 8
    assert TrainingConfig(auxk_alpha=1, lr=np.float32(0.5)).lr == 0.5


@pytest.mark.parametrize(
    ("group", "flag", "value"),
    [
        (TrainingConfig, "batch_size", 0),
        (TrainingConfig, "batch_size", 2**40),
        (TrainingConfig, "auxk_alpha", float("nan")),
        (TrainingConfig, "auxk_alpha", -0.1),
        (SaeConfig, "k", 0),
        (DataConfig, "eval_tokens", 0),
        (ModelConfig, "exclude_tokens", (2**50,)),
    ],
)
def test_numbers_out_of_proportion_are_refused_by_name(group: Any, flag: str, value: Any) -> None:
    """A number below a flag's limit, not finite or too large is named with its flag."""
    with pytest.raises(UsageError, match=f"^--{flag} "):
        group(**{flag: value})


def test_messages_do_not_print_whole_documents() -> None:
    """A value of 100,000 characters is cut in the middle."""
    text = str(UsageError(f"--run_name {'x' * 100_000}: use a plain name"))
    assert len(text) < 3000 and text.startswith("--run_name x") and text.endswith("a plain name")

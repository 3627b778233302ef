"""Placement never changes the numbers: the same run, whoever holds what, launched for real."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_lm
from runs import weights
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig

ROOT = Path(__file__).parent.parent
PLACES = ["layers.0", "layers.1", "layers.1.mlp", "layers.2"]
STEPS, SAVED = 12, 6

# Losses that couple rows, rows that differ in number between ranks, an optimizer without a sign.
FLAGS = (
    "--hookpoints layers.? layers.1.mlp --ctx_len 16 --max_examples 144 --eval_tokens 176 --k 4 "
    "--expansion_factor 4 --optimizer adam --lr 1e-3 --lr_warmup_steps 5 --auxk_alpha 0.03125 "
    f"--dead_feature_threshold 300 --multi_topk --exclude_tokens 5 9 11 --save_every {SAVED}"
).split()


class Runs:
    """All runs of this file, made by a handful of launches."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.results = folder, {}
        tiny_lm().save_pretrained(folder / "lm")
        tokens = torch.randint(0, 64, (200 * 16,), generator=torch.Generator().manual_seed(0))
        tokens.numpy().astype("uint16").tofile(folder / "ids.bin")

    def launch(self, config: str, processes: int, jobs: dict[str, str], **harm: Any) -> None:
        base = [str(self.folder / "lm"), str(self.folder / "ids.bin"), *FLAGS]
        base += ["--save_dir", str(self.folder / "runs")]
        listed = [[n, [*base, *more.split()], harm.get(n, {})] for n, more in jobs.items()]
        out = self.folder / f"{config}{processes}{len(self.results)}"
        out.mkdir()
        (out / "jobs.json").write_text(json.dumps(listed))
        launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
        launcher += ["--config_file", f"accelerate_configs/{config}.yaml"]
        launcher += ["--num_processes", str(processes), "--main_process_port", "0"]
        command = [*launcher, "tests/many_runs.py", str(out / "jobs.json"), str(out)]
        # Without this, glibc keeps what was freed, and its share of the process cannot be told.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
        environment["MALLOC_TRIM_THRESHOLD_"] = "65536"
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr[-6000:]
        for name in jobs:
            files = [out / f"rank{rank}.json" for rank in range(processes)]
            self.results[name] = [json.loads(file.read_text())[name] for file in files]

    def cut(self, name: str, new: str) -> None:
        """A copy of a run that ended at its first save."""
        shutil.copytree(self.folder / "runs" / name, self.folder / "runs" / new)
        shutil.rmtree(self.folder / "runs" / new / f"step_{STEPS}")

    def summary(self, name: str) -> dict[str, Any]:
        summaries = [rank["summary"] for rank in self.results[name]]
        assert all(s == summaries[0] for s in summaries), name
        return summaries[0]

    def curves(self, name: str) -> dict[str, list[tuple[int, float]]]:
        reader = EventAccumulator(str(self.folder / "runs" / name / "tensorboard"))
        reader.Reload()
        return {n: [(e.step, e.value) for e in reader.Scalars(n)] for n in reader.Tags()["scalars"]}

    def weights(self, name: str) -> dict[str, Tensor]:
        return weights(self.summary(name))


SAME = {
    "two replicas": "--batch_size 6",
    "two owners": "--batch_size 6 --distribute_modules",
    "two accumulated": "--batch_size 2 --grad_acc_steps 3",
    "two owners, pieces": "--batch_size 3 --grad_acc_steps 2 --micro_acc_steps 3 "
    "--distribute_modules",
    "two owners, by hand": "--batch_size 6 --distribute_modules --layer_to_rank layers.0=1 "
    "layers.1=1 layers.1.mlp=1 layers.2=1",
    "three owners": "--batch_size 4 --distribute_modules",
    "replicas, two to three": "--batch_size 4 --distribute_modules --resume",
    "owners, two to three": "--batch_size 4 --resume",
    "four replicas": "--batch_size 3",
    "four owners": "--batch_size 3 --distribute_modules",
    "sharded replicas": "--batch_size 6",
    "sharded owners": "--batch_size 6 --distribute_modules",
}
# A fresh transcoder predicts the mean of the first step, where the gradient of b_dec is rounding,
# which Adam divides by its own size. Replicas, which round otherwise, start from trained ones.
CODED = "--transcode --skip_connection --no-normalize_decoder"
HARMED = {
    "other seed": {"other_seed": 1},
    "other version": {"other_version": 1},
    "other data": {"other_data": 1},
    "spoiled": {"spoil": 1},
    "slow coders": {"slow": 0.05},
    "slow preparation": {"preparation": 4},
}


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    made = Runs(tmp_path_factory.mktemp("placement"))

    def some(*names: str) -> dict[str, str]:
        return {name: SAME[name] for name in names}

    tuned = f"{CODED} --finetune {made.folder}/runs/coded-one"
    one = {"one": "", "coded-one": CODED, "tuned one": tuned}
    one["kl one"] = "--loss_fn kl"
    AutoModelForCausalLM.from_config(tiny_lm().config).save_pretrained(made.folder / "causal")
    causal = {"model": str(made.folder / "causal")}
    jobs = {name: f"--batch_size 12 {flags}" for name, flags in one.items()}
    made.launch("cpu", 1, jobs, **{"kl one": causal})
    two = [name for name in SAME if name.startswith("two ")]
    others = {"coded owners": f"--batch_size 6 {CODED} --distribute_modules"}
    others["tuned replicas"] = f"--batch_size 6 {tuned}"
    others["kl replicas"] = "--batch_size 3 --grad_acc_steps 2 --loss_fn kl"
    harmed = {name: "--batch_size 6 --distribute_modules" for name in HARMED}
    harmed["slow preparation"] += " --timeout 0.04"
    harmed["spoiled"] += " --max_bad_steps 0"
    shutil.copy(made.folder / "ids.bin", made.folder / "other.bin")
    with open(made.folder / "other.bin", "r+b") as file:
        file.write(b"\x01\x00\x02\x00")
    harm = {**HARMED, "other data": {"other_data": 1, "data": str(made.folder / "other.bin")}}
    harm["kl replicas"] = causal
    made.launch("cpu_2proc", 2, {**some(*two), **others, **harmed}, **harm)
    made.cut("two replicas", "replicas, two to three")
    made.cut("two owners", "owners, two to three")
    made.cut("two owners", "other total")
    three = some("three owners", "replicas, two to three", "owners, two to three")
    made.launch("cpu_2proc", 3, {**three, "other total": "--batch_size 6 --resume"})
    idle = "--batch_size 3 --distribute_modules --layer_to_rank layers.0=3 layers.1=3"
    made.launch("cpu_2proc", 4, {**some("four replicas", "four owners"), "idle": idle})
    big = LlamaConfig(hidden_size=512, intermediate_size=2048, num_hidden_layers=12, vocab_size=64)
    AutoModel.from_config(big).save_pretrained(made.folder / "big")
    one_step = "--batch_size 6 --max_examples 12 --hookpoints layers.10 --mixed_precision "
    sharded = {**some("sharded replicas", "sharded owners"), "big": f"{one_step} no"}
    sharded["big bf16"] = f"{one_step} bf16"
    shutil.copytree(made.folder / "lm", made.folder / "lacking")
    lacking = load_file(made.folder / "lm" / "model.safetensors")
    lacking.pop("layers.1.mlp.up_proj.weight")
    save_file(lacking, made.folder / "lacking" / "model.safetensors", {"format": "pt"})
    sharded["lacking"] = "--batch_size 6"
    models = {name: {"model": str(made.folder / name.split()[0])} for name in list(sharded)[2:]}
    sharded["sharded kl"] = "--batch_size 6 --loss_fn kl"
    models["sharded kl"] = causal
    made.launch("cpu_2proc_zero3", 2, sharded, **models)
    return made


@pytest.mark.parametrize("name", SAME)
def test_every_placement_is_the_same_run(runs: Runs, name: str) -> None:
    """Curves, held-out figures and final weights equal those of one process."""
    one, other = runs.summary("one"), runs.summary(name)
    assert other["step"] == one["step"] == STEPS and other["tokens"] == one["tokens"]
    for place, figures in one["hookpoints"].items():
        for metric in ("fvu", "l0", "dead_share"):
            assert other["hookpoints"][place][metric] == pytest.approx(figures[metric], rel=1e-5)
    curves = runs.curves(name)
    for metric, points in runs.curves("one").items():
        if metric != "tokens_per_second":
            steps, values = zip(*curves[metric], strict=True)
            assert steps == tuple(step for step, _ in points), metric
            assert values == pytest.approx([v for _, v in points], rel=1e-4, abs=1e-7), metric
    found = runs.weights(name)
    for key, tensor in runs.weights("one").items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=2e-6)


def test_transcoders_too(runs: Runs) -> None:
    """Inputs and targets travel to the owner together: the weights are those of one process."""
    for one, other in (("coded-one", "coded owners"), ("tuned one", "tuned replicas")):
        for key, tensor in runs.weights(one).items():
            torch.testing.assert_close(runs.weights(other)[key], tensor, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["kl replicas", "sharded kl"])
def test_the_lms_own_loss_too(runs: Runs, name: str) -> None:
    """Under DDP, accumulated, and with a sharded LM, KL training is that of one process."""
    curves = runs.curves(name)
    for metric, points in runs.curves("kl one").items():
        if metric.split("/")[0] in ("kl", "fvu", "auxk", "grad_norm", "tokens", "eval"):
            values = [value for _, value in curves[metric]]
            assert values == pytest.approx([v for _, v in points], rel=1e-3, abs=1e-6), metric
    for key, tensor in runs.weights("kl one").items():
        torch.testing.assert_close(runs.weights(name)[key], tensor, rtol=0, atol=1e-3)


def kept_rows(per_rank: int, world: int) -> Tensor:
    """Rows of every optimizer step and rank, [STEPS W], from the order of examples alone."""
    tokens = torch.randint(0, 64, (200, 16), generator=torch.Generator().manual_seed(0))
    order = 11 + torch.randperm(144, generator=torch.Generator().manual_seed(42))
    kept = ~torch.isin(tokens[order], torch.tensor([5, 9, 11]))
    return kept.view(STEPS, world, per_rank * 16).sum(2)


@pytest.mark.parametrize(
    ("name", "world", "tensors"),
    [("two owners", 2, 1), ("three owners", 3, 1), ("four owners", 4, 1), ("coded owners", 2, 2)],
)
def test_rows_travel_to_their_owner_and_nowhere_else(
    runs: Runs, name: str, world: int, tensors: int
) -> None:
    """A rank receives its hookpoints' rows of the other ranks, once, and not a byte more."""
    curves, rows = runs.curves(name), kept_rows(12 // world, world)
    for rank, found in enumerate(runs.results[name]):
        share = len(found["coders"])
        width = tensors * 32 * 4
        received = (rows.sum(1) - rows[:, rank]) * share * width
        sent = rows[:, rank] * (len(PLACES) - share) * width
        for direction, expected in (("received", received), ("sent", sent)):
            points = curves.get(f"bytes_{direction}/rank{rank}", [])
            assert [v for _, v in points] == expected.tolist(), (rank, direction)


def test_replicas_sum_gradients_once_per_step(runs: Runs) -> None:
    """However many forwards a step has, the bytes of one ring sum are moved."""
    whole, accumulated = runs.curves("two replicas"), runs.curves("two accumulated")
    for rank in (0, 1):
        key = f"bytes_sent/rank{rank}"
        assert whole[key] == accumulated[key]
        weights_bytes = sum(t.nbytes for t in runs.weights("two replicas").values())
        assert weights_bytes < whole[key][0][1] < 1.1 * weights_bytes


def test_each_coder_lives_on_one_rank(runs: Runs) -> None:
    """Owners partition the coders, by cost, by hand, and with ranks that own none."""
    for name, expected in {
        "two owners": [["layers.0", "layers.1.mlp"], ["layers.1", "layers.2"]],
        "two owners, by hand": [[], PLACES],
        "three owners": [["layers.0", "layers.2"], ["layers.1"], ["layers.1.mlp"]],
        "four owners": [[place] for place in PLACES],
        "idle": [["layers.1.mlp"], ["layers.2"], [], ["layers.0", "layers.1"]],
        "two replicas": [PLACES, PLACES],
    }.items():
        assert [rank["coders"] for rank in runs.results[name]] == expected, name
        saved = [sorted(set(rank["saved"])) for rank in runs.results[name]]
        if name != "two replicas":
            assert saved == expected, name
        assert sorted(place for rank in saved for place in rank) == PLACES, name


def test_owners_compute_at_the_same_time(runs: Runs) -> None:
    """Coders of 50 ms, two on each rank: a step takes the time of two, not of four."""
    forwards = STEPS + 11 / 2  # of training and of evaluation
    assert 0.1 * forwards < runs.summary("slow coders")["wall_seconds"] + 0.55 < 0.18 * forwards


def test_preparing_data_is_no_timeout(runs: Runs) -> None:
    """The main process may take longer over the text than a rank waits for another."""
    assert runs.summary("slow preparation")["step"] == STEPS


def test_a_mistake_on_one_rank_ends_all(runs: Runs) -> None:
    """Other flags on one rank, or NaN on one: every rank says the same and names it."""
    for name, message in {
        "other version": "the version of torch is '2.13.0+cpu' on rank 0 and '0.0' on rank 1",
        "lacking": "lack layers.1.mlp.up_proj.weight; training on random weights is refused",
        "other data": "the data's fingerprint is {",
        "other seed": "--shuffle_seed is 42 on rank 0 and 7 on rank 1",
        "spoiled": "step 3: fvu at layers.0 is nan",
        "other total": "--batch_size times --grad_acc_steps times the number of ranks is 18",
    }.items():
        errors = [rank["error"] for rank in runs.results[name]]
        assert all(message in error for error in errors), (name, errors)
        assert len({error.removeprefix("rank 0: ") for error in errors}) == 1
    assert not (runs.folder / "runs" / "other seed").exists()
    assert [f.name for f in (runs.folder / "runs" / "spoiled").glob("step_*")] == ["step_3"]


def test_no_rank_holds_the_whole_lm(runs: Runs) -> None:
    """Under ZeRO-3 each of two ranks loads half of the bytes, in the dtype that was asked for."""
    whole = sum(f.stat().st_size for f in (runs.folder / "big").glob("*.safetensors"))
    for name, share in {"big": 1.0, "big bf16": 0.5}.items():
        for rank in runs.results[name]:
            assert rank["layers"] == 11, "the layer after the last hookpoint was loaded"
            assert rank["load_bytes"] < 0.7 * share * whole, name
            # What a rank shows are empty weights, but for the small ones that stay gathered.
            assert max(rank["sizes"]) < 100_000 and 0 in rank["sizes"]
            assert rank["dtypes"] == ["torch.bfloat16" if "bf16" in name else "torch.float32"]

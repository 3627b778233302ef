"""The same training, placed in many ways, in one launch per number of processes."""

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_lm
from datasets import Dataset
from safetensors.torch import load_file, save_file
from starts import ACCELERATE, PATIENCE, fork_server
from torch import Tensor
from training_runs import scalars, weights
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig

ROOT = Path(__file__).parent.parent
HOOKPOINTS = ["layers.0", "layers.1", "layers.1.mlp", "layers.2"]
STEPS, SAVED = 12, 6

# Losses that couple rows, rows that differ in number between ranks and hookpoints, an optimizer
# without a sign.
FLAGS = (
    "--hookpoints layers.? layers.1.mlp --ctx_len 16 --max_examples 144 --eval_tokens 176 --k 4 "
    "--expansion_factor 4 --optimizer adam --lr 1e-3 --lr_warmup 5 --auxk_alpha 0.03125 "
    f"--dead_feature_threshold 300 --multi_topk --exclude_tokens 5 9 11 --save_every {SAVED} "
    "--exclude_positions 1 --exclude_norm 1.1"
).split()

# Every one of these is the run "one", placed otherwise.
REPLICAS_AND_OWNERS = {
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
}
# Coders that several ranks share, of 128 latents and 32 columns, which three ranks cannot share
# evenly; and beside such coders others that one rank has whole.
WIDE = "--distribute_modules --ranks_per_coder"
MIXED = "layers.0=0-1 layers.1=2 layers.1.mlp=1-2 layers.2=0"
SHARED = {
    2: {
        "two share": f"--batch_size 6 {WIDE} 2 --save_best",
        "two share, pieces": f"--batch_size 3 --grad_acc_steps 2 --micro_acc_steps 3 {WIDE} 2",
    },
    3: {
        "three share": f"--batch_size 4 {WIDE} 3",
        "some are shared": f"--batch_size 4 --distribute_modules --layer_to_rank {MIXED}",
        "shared, two to three": f"--batch_size 4 {WIDE} 3 --resume",
        "shared, then whole": "--batch_size 4 --distribute_modules --resume",
        "whole, then shared": f"--batch_size 4 {WIDE} 3 --resume",
    },
    4: {
        "four share": "--batch_size 3 --shard_latents",
        "two and two share": f"--batch_size 3 {WIDE} 2",
    },
}
# Runs of other kinds, by one process and by so many that share each coder; groupmax has 4 groups.
KINDS = {
    "groupmax": ("--activation groupmax", 3),
    "decay": ("--k_decay_steps 8", 4),
    "muon": ("--optimizer muon", 4),
    "signum": ("--optimizer signum", 3),
    "soap": ("--optimizer soap", 3),
}
# Families whose rows have active latents by other rules; prefixes have no rows of their own number.
FAMILIES = {
    "batchtopk": "--activation batchtopk --no-multi_topk --group_sequences 2",
    "jumprelu": "--activation jumprelu --no-multi_topk",
    "prefixes": "--no-multi_topk --matryoshka 0.125 0.125 0.25 0.5",
}
RUNNER_UPS = "--auxk_alone True --no-multi_topk"  # with which there are no runner-ups
SIX = "--steps_per_batch 6 --max_examples 24"
OWNERS = "--batch_size 2 --grad_acc_steps 3 --micro_acc_steps 2 --distribute_modules"
SHARDED = {
    "sharded replicas": "--batch_size 6",
    "sharded owners": "--batch_size 6 --distribute_modules",
    "sharded and shared": f"--batch_size 6 {WIDE} 2",
}
# A fresh transcoder predicts the mean of the first step, where the gradient of b_dec is rounding,
# which Adam divides by its own size. Replicas, which round otherwise, start from trained ones.
CODED = "--transcode --skip_connection --no-normalize_decoder"
KL = "--loss_fn kl --max_examples 72"
# Of many forwards no row is left out: what ranks sum must not depend on that.
PADDED = f"{KL} --transcode --hookpoints layers.*.mlp --exclude_tokens 7"
# Batches whose rows are dealt to four steps, saved within one.
DEALT = "--steps_per_batch 4 --max_examples 36"
DEALINGS = {
    "two dealt": f"--batch_size 2 --grad_acc_steps 3 {DEALT}",
    "two dealt owners": f"--batch_size 6 --distribute_modules {DEALT}",
    "dealt, two to three": f"--batch_size 2 --grad_acc_steps 2 --resume {DEALT}",
    "four dealt and shared": f"--batch_size 3 {WIDE} 2 {DEALT} --micro_acc_steps 2",
    "sharded and dealt": f"--batch_size 6 --distribute_modules {DEALT}",
}
# One coder over all hookpoints, whose rows are then the same.
CROSSED = "--crosscoder --exclude_norm None --steps_per_batch 4 --max_examples 36"
# Transcoders whose latents write ahead; they start from trained ones, see CODED.
LAYERED = "--hookpoints layers.*.mlp --transcode --cross_layer 1 --exclude_norm None"
LAYERED += " --steps_per_batch 4 --max_examples 36 --no-multi_topk"
MEETINGS = 8
HARMED: dict[str, dict[str, Any]] = {
    "other seed": {"other_seed": 1},
    "other version": {"other_version": 1},
    "other data": {"other_data": 1},
    "spoiled": {"spoil": 1},
    "meeting owners": {"meetings": MEETINGS},
    "slow preparation": {},
}


class Runs:
    """Runs by name: what every rank returned, and what is on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results: dict[str, list[dict[str, Any]]] = {}

    def launch(
        self, config: str | None, processes: int, jobs: dict[str, str], harm: dict[str, Any]
    ) -> None:
        """Runs of one launch: by accelerate with a launch file, or by the fork server alone."""
        base = [str(self.folder / "lm"), str(self.folder / "ids.bin"), *FLAGS]
        base += ["--save_dir", str(self.folder / "runs")]
        listed = [[n, [*base, *more.split()], harm.get(n, {})] for n, more in jobs.items()]
        out = self.folder / f"{config}-{processes}"
        out.mkdir()
        (out / "jobs.json").write_text(json.dumps(listed))
        argv = [str(out / "jobs.json"), str(out)]
        server = fork_server()
        if config is None:
            started = server.start("many_runs", argv, out / "log", processes)
        else:
            # Without this, glibc keeps what was freed, and its share cannot be told.
            env = {f"MALLOC_{kind}_THRESHOLD_": "65536" for kind in ("MMAP", "TRIM")}
            launcher = ["launch", "--config_file", f"accelerate_configs/{config}.yaml"]
            launcher += ["--num_processes", str(processes), "--main_process_port", "0"]
            argv = [*launcher, "tests/many_runs.py", *argv]
            started = server.start(ACCELERATE, argv, out / "log", env=env)
        codes = [server.wait(pid, 2 * PATIENCE) for pid in started]
        said = [file.read_text()[-3000:] for file in out.glob("log.*")]
        assert codes == [0] * len(started), "\n".join(said)
        for name in jobs:
            files = [out / f"rank{rank}.json" for rank in range(processes)]
            self.results[name] = [json.loads(file.read_text())[name] for file in files]

    def cut(self, name: str, new: str) -> None:
        """A copy of a run that ended at its first save."""
        shutil.copytree(self.folder / "runs" / name, self.folder / "runs" / new)
        shutil.rmtree(self.folder / "runs" / new / f"step_{STEPS}")

    def summary(self, name: str) -> dict[str, Any]:
        """The summary of a run, which is the same on all ranks."""
        summaries = [rank["summary"] for rank in self.results[name]]
        assert all(s == summaries[0] for s in summaries), name
        return summaries[0]

    def curves(self, name: str) -> dict[str, list[tuple[int, float]]]:
        """(step, value) points by metric."""
        return scalars(self.folder / "runs" / name)

    def weights(self, name: str) -> dict[str, Tensor]:
        """Every tensor of every coder at the end of a run."""
        return weights(self.summary(name))

    def assert_same(self, one: str, other: str) -> None:
        """Curves, held-out figures and final weights of two runs differ by rounding only."""
        first, second = self.summary(one), self.summary(other)
        assert first["step"] == second["step"] == STEPS and first["tokens"] == second["tokens"]
        for hookpoint, figures in first["hookpoints"].items():
            theirs = second["hookpoints"][hookpoint]
            for metric in ("fvu", "l0", "dead_share"):
                assert theirs[metric] == pytest.approx(figures[metric], rel=1e-5), metric
        curves = self.curves(other)
        for metric, points in self.curves(one).items():
            if metric != "tokens_per_second" and not metric.startswith("bytes_"):
                steps, values = zip(*curves[metric], strict=True)
                assert steps == tuple(step for step, _ in points), metric
                assert values == pytest.approx([v for _, v in points], rel=1e-4, abs=1e-7), metric
        found = self.weights(other)
        for key, tensor in self.weights(one).items():
            scale = max(1.0, float(tensor.abs().max()))
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=2e-6 * scale)

    def assert_same_end_to_end(self, one: str, other: str) -> None:
        """The same for runs on the LM's own loss, whose gradients run through the LM."""
        curves = self.curves(other)
        for metric, points in self.curves(one).items():
            if metric.split("/")[0] in ("kl", "fvu", "auxk", "grad_norm", "tokens", "eval"):
                values = [value for _, value in curves[metric]]
                assert values == pytest.approx([v for _, v in points], rel=1e-3, abs=1e-6), metric
        for key, tensor in self.weights(one).items():
            torch.testing.assert_close(self.weights(other)[key], tensor, rtol=0, atol=1e-3)


def make(folder: Path) -> Runs:
    """All runs that the laws of placement compare."""
    made = Runs(folder)
    make_files(folder)
    causal = {"model": str(folder / "causal")}

    tuned = f"{CODED} --finetune {folder}/runs/coded-one"
    one = {"one": "", "coded-one": CODED, "tuned one": tuned, "kl one": KL, "dealt one": DEALT}
    both = f"{CROSSED} --models {folder}/other"
    one |= {"crossed one": CROSSED, "both one": both}
    layered = f"{LAYERED} --finetune {folder}/runs/layered-start"
    one |= {"layered-start": LAYERED, "layered one": layered}
    one["runner-ups one"] = RUNNER_UPS
    one |= {f"{kind} one": flags for kind, (flags, _) in KINDS.items()}
    one |= {f"{family} one": flags for family, flags in FAMILIES.items()}
    one |= {f"{family} dealt one": f"{flags} {SIX}" for family, flags in FAMILIES.items()}
    jobs = {name: f"--batch_size 12 {flags}" for name, flags in one.items()}
    padded = {**causal, "data": str(folder / "padded")}
    jobs["padded one"] = f"--batch_size 12 {PADDED}"
    made.launch(None, 1, jobs, {"kl one": causal, "padded one": padded})

    shared = {world: dict(runs) for world, runs in SHARED.items()}
    for kind, (flags, world) in KINDS.items():
        shared[world][f"{kind} shared"] = f"--batch_size {12 // world} {WIDE} {world} {flags}"
    shared[2]["tuned shared"] = f"--batch_size 6 {WIDE} 2 {tuned}"

    two = {n: flags for n, flags in REPLICAS_AND_OWNERS.items() if n.startswith("two ")}
    two |= shared[2]
    two |= {n: flags for n, flags in DEALINGS.items() if n.startswith("two ")}
    two["runner-ups replicas"] = f"--batch_size 2 --grad_acc_steps 3 {RUNNER_UPS}"
    two["runner-ups shared"] = f"--batch_size 6 {WIDE} 2 {RUNNER_UPS}"
    two["coded owners"] = f"--batch_size 6 {CODED} --distribute_modules"
    two["tuned replicas"] = f"--batch_size 6 {tuned}"
    two["kl replicas"] = f"--batch_size 3 --grad_acc_steps 2 {KL}"
    two["crossed replicas"] = f"--batch_size 2 --grad_acc_steps 3 {CROSSED}"
    two["layered owners"] = f"--batch_size 6 --distribute_modules --micro_acc_steps 2 {layered}"
    two["both replicas"] = f"--batch_size 6 {both}"
    two["layered replicas"] = f"--batch_size 2 --grad_acc_steps 3 --micro_acc_steps 2 {layered}"
    for family, flags in FAMILIES.items():
        for name, more in ((family, flags), (f"{family} dealt", f"{flags} {SIX}")):
            two |= {
                f"{name} replicas": f"--batch_size 6 {more}",
                f"{name} owners": f"{OWNERS} {more}",
            }
    two["prefixes shared"] = f"--batch_size 6 {WIDE} 2 {FAMILIES['prefixes']}"
    two |= dict.fromkeys(HARMED, "--batch_size 6 --distribute_modules")
    two["spoiled"] += " --max_bad_steps 0"
    two["padded replicas"] = f"--batch_size 3 --grad_acc_steps 2 {PADDED}"
    harm = {**HARMED, "kl replicas": causal, "padded replicas": padded}
    harm["other data"]["data"] = str(folder / "other.bin")
    harm["meeting owners"]["meet"] = str(folder / "met")
    harm["slow preparation"]["prepare"] = str(folder / "preparation")
    made.launch("cpu_2proc", 2, two, harm)

    made.cut("two replicas", "replicas, two to three")
    made.cut("two owners", "owners, two to three")
    made.cut("two owners", "other total")
    made.cut("two dealt owners", "dealt, two to three")
    names = ("three owners", "replicas, two to three", "owners, two to three")
    three = {name: REPLICAS_AND_OWNERS[name] for name in names}
    made.cut("two share", "shared, two to three")
    made.cut("two share", "shared, then whole")
    made.cut("two owners", "whole, then shared")
    shutil.copytree(folder / "runs" / "two share", folder / "runs" / "pieces")
    from_pieces = f"--batch_size 4 --distribute_modules --finetune {folder}/runs/pieces"
    three |= {"other total": "--batch_size 6 --resume", **shared[3], "from pieces": from_pieces}
    three["dealt, two to three"] = DEALINGS["dealt, two to three"]
    three["from pieces, shared"] = f"{from_pieces} --ranks_per_coder 3"
    made.launch(None, 3, three, {})

    four = {n: flags for n, flags in REPLICAS_AND_OWNERS.items() if n.startswith("four ")}
    four["four dealt and shared"] = DEALINGS["four dealt and shared"]
    four["idle"] = "--batch_size 3 --distribute_modules --layer_to_rank layers.0=3 layers.1=3"
    four["sparse"] = "--batch_size 3 --shard_latents --auxk_alpha 0 --wake_alpha 0 --no-multi_topk"
    made.cut("soap shared", "soap, three to four")
    made.cut("soap shared", "soap, then whole")
    soap = "--batch_size 3 --distribute_modules --optimizer soap --resume"
    four |= {"soap, three to four": f"{soap} --ranks_per_coder 4", "soap, then whole": soap}
    four["eight bits"] = "--batch_size 3 --distribute_modules --adam_8bit "
    four["eight bits"] += "--layer_to_rank layers.0=0-2"
    four["too few groups"] = "--batch_size 3 --distribute_modules --activation groupmax --k 2 "
    four["too few groups"] += "--layer_to_rank layers.0=0-2"
    made.launch(None, 4, {**four, **shared[4]}, {})

    one_step = "--batch_size 6 --max_examples 12 --eval_tokens 16 --hookpoints layers.4 "
    one_step += "--mixed_precision"
    large = {"large": f"{one_step} no", "large bf16": f"{one_step} bf16"}
    others = {"lacking": "--batch_size 6", "sharded kl": f"--batch_size 6 {KL}"}
    others["sharded head"] = "--batch_size 6 --max_examples 48 --lr_warmup 0 --eval_every 9"
    models = {name: {"model": str(folder / name.split()[0])} for name in (*large, "lacking")}
    sharded = {**SHARDED, "sharded and dealt": DEALINGS["sharded and dealt"]}
    sharded["sharded and crossed"] = f"--batch_size 6 --micro_acc_steps 2 {CROSSED}"
    sharded["sharded and layered"] = f"--batch_size 6 --distribute_modules {layered}"
    models["sharded kl"] = models["sharded head"] = causal
    made.launch("cpu_2proc_zero3", 2, {**sharded, **large, **others}, models)
    return made


def make_files(folder: Path) -> None:
    """LMs and token ids."""
    tiny_lm().save_pretrained(folder / "lm")
    tokens = torch.randint(0, 64, (200 * 16,), generator=torch.Generator().manual_seed(0))
    tokens.numpy().astype("uint16").tofile(folder / "ids.bin")
    shutil.copy(folder / "ids.bin", folder / "other.bin")
    with open(folder / "other.bin", "r+b") as file:
        file.write(b"\x01\x00\x02\x00")
    blocks = tokens.view(-1, 16)
    read = torch.ones_like(blocks)
    read[::9, 12:] = 0
    columns = {"input_ids": blocks.tolist(), "attention_mask": read.tolist()}
    Dataset.from_dict(columns).save_to_disk(folder / "padded")
    # DeepSpeed keeps smaller weights than this head's on every rank.
    causal = LlamaConfig(**{**tiny_lm().config.to_dict(), "vocab_size": 4096})
    AutoModelForCausalLM.from_config(causal).save_pretrained(folder / "causal")
    large = LlamaConfig(hidden_size=512, intermediate_size=2048, num_hidden_layers=6, vocab_size=64)
    AutoModel.from_config(large).save_pretrained(folder / "large")
    shutil.copytree(folder / "lm", folder / "lacking")
    lacking = load_file(folder / "lm" / "model.safetensors")
    lacking.pop("layers.1.mlp.up_proj.weight")
    save_file(lacking, folder / "lacking" / "model.safetensors", {"format": "pt"})
    other = {**tiny_lm().config.to_dict(), "hidden_size": 24, "num_hidden_layers": 4}
    AutoModel.from_config(LlamaConfig(**other)).save_pretrained(folder / "other")


def made_once(folder: Path) -> Runs:
    """All runs in a folder; the first process of tests that comes makes them, others wait."""
    folder.mkdir(exist_ok=True)
    with locked(folder / "lock"):
        results = folder / "results.json"
        if results.exists():
            made = Runs(folder)
            made.results = json.loads(results.read_text())
            return made
        made = make(folder)
        results.write_text(json.dumps(made.results))
        return made


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Inside, no other process is inside."""
    with open(file, "w") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield

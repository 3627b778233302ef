"""The command line takes the reference's flags, and answers mistakes with one readable line."""

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tyro

from sae import UsageError
from sae.flag_checks import flags_of
from train_sae import TrainConfig

ROOT = Path(__file__).parents[2]
LM = "demo/lm"
Script = Callable[..., subprocess.CompletedProcess[str]]


def parse(line: str) -> TrainConfig:
    flat = (tyro.conf.OmitArgPrefixes,)
    return tyro.cli(TrainConfig, args=shlex.split(line), use_underscores=True, config=flat)


def test_flags_of_the_reference_work_verbatim() -> None:
    """Every flag of the reference parses flat, and its defaults are the reference's."""
    cfg = parse(
        "EleutherAI/pythia-160m data --transcode --hookpoints h.*.attn 'h.[012].mlp.act' "
        "--batch_size 2 --ctx_len 64 --grad_acc_steps 3 --micro_acc_steps 2 --k 16 "
        "--expansion_factor 8 --num_latents 512 --activation groupmax --multi_topk "
        "--skip_connection --no-normalize_decoder --loss_fn fvu --optimizer muon --lr 1e-3 "
        "--lr_warmup 5 --auxk_alpha 0.03 --dead_feature_threshold 1000 "
        "--exclude_tokens 0 1 --init_seeds 0 1 2 --save_every 7 --save_best --save_dir d "
        "--run_name r --finetune path --split s --max_examples 9 --text_column c "
        "--shuffle_seed 3 --data_args a=b,c=d --data_preprocessing_num_proc 2 "
        "--revision v --hf_token t --load_in_8bit"
    )
    assert cfg.model.model == "EleutherAI/pythia-160m" and cfg.data.dataset == "data"
    assert cfg.model.hookpoints == ("h.*.attn", "h.[012].mlp.act")
    assert cfg.model.exclude_tokens == (0, 1) and cfg.model.load_in_8bit
    assert cfg.training.init_seeds == (0, 1, 2) and not cfg.coder.normalize_decoder
    cfg = parse("--layers 0 4 --k_decay_steps 10 --resume --normalize_decoder")
    assert cfg.model.layers == (0, 4) and cfg.run.resume and cfg.coder.normalize_decoder
    assert parse("--layer_stride 2").model.layer_stride == 2
    default = flags_of(parse(""))
    expected = {
        **{"model": "HuggingFaceTB/SmolLM2-135M", "dataset": "EleutherAI/SmolLM2-135M-10B"},
        **{"expansion_factor": 32, "k": 32, "optimizer": "adam", "loss_fn": "fvu"},
        **{"ctx_len": 2048, "batch_size": 32, "save_every": 1000, "auxk_alpha": 1.0},
        **{"dead_feature_threshold": 0.005, "shuffle_seed": 42, "init_seeds": (0,)},
    }
    assert {name: default[name] for name in expected} == expected


def test_dashes_and_underscores_are_the_same() -> None:
    """--batch-size is --batch_size."""
    line = "--batch{0}size 3 --no-normalize{0}decoder --exclude{0}tokens 1"
    assert parse(line.format("-")) == parse(line.format("_"))


def test_help_explains_every_flag(script: Script) -> None:
    """--help lists every field with a sentence and a default."""
    shown = " ".join(script("--help").stdout.replace("│", " ").split())
    names = [*flags_of(TrainConfig()), "hf_token"]
    for name in names:
        if name not in ("model", "dataset"):
            assert f"--{name}" in shown, name
    assert "MODEL" in shown and "DATASET" in shown
    assert shown.count("(default:") == len(names)


BAD_FLAGS = [
    ("--loss_fn ce --steps_per_batch 4", "--steps_per_batch 4: --loss_fn ce needs whole sequences"),
    ("--loss_fn kl --steps_per_batch 2", "--steps_per_batch 2: --loss_fn kl needs whole sequences"),
    ("--hookpoints a --layers 1", "--layers (1,): picks residual streams"),
    ("--hookpoints a --layer_stride 2", "--layer_stride 2"),
    ("--layers 1 --layer_stride 2", "--layer_stride 2"),
    ("--batch_size 0", "--batch_size 0: must be at least 1"),
    ("--k -3", "--k -3"),
    ("--lr nan", "--lr nan"),
    ("--lr -1", "--lr -1.0"),
    ("--auxk_alpha inf", "--auxk_alpha inf"),
    ("--max_examples 0", "--max_examples 0"),
    ("--init_seeds 1 1", "--init_seeds (1, 1)"),
    ("--run_name ../x", "--run_name ../x"),
    ("--streaming", "--streaming True: a stream has no length"),
    ("--loss_fn ce --distribute_modules", "--distribute_modules True: with --loss_fn ce"),
    ("--loss_fn kl --init_seeds 0 1", "--init_seeds (0, 1): --loss_fn kl"),
    ("--layer_to_rank layers.0=1", "--layer_to_rank ('layers.0=1',): says where coders live"),
    ("--ranks_per_coder 2", "--ranks_per_coder 2: says where coders live: add --distribute_mod"),
    ("--ranks_per_coder 0 --distribute_modules", "--ranks_per_coder 0: must be at least 1"),
    (
        "--distribute_modules --ranks_per_coder 2 --activation batchtopk",
        "--ranks_per_coder or --layer_to_rank: ranks cannot share a coder of --activation batch",
    ),
    ("--shard_latents --activation jumprelu", "ranks cannot share a coder of --activation jumpre"),
    ("--shard_latents --adam_8bit", "needs whole parameters: leave out --shard_latents"),
    ("--shard_latents --loss_fn kl", "--shard_latents True: with --loss_fn kl"),
    ("--shard_latents --crosscoder", "--shard_latents True: --crosscoder is one coder"),
    ("--shard_latents --transcode --cross_layer all", "--shard_latents True: --cross_layer all"),
    (
        "--distribute_modules --ranks_per_coder 2 --adam_8bit",
        "--adam_8bit True: needs whole parameters",
    ),
    ("--timeout 0", "--timeout 0"),
    ("--activation groupmax --k_decay_steps 5", "--k_decay_steps 5"),
    ("--adam_8bit --optimizer muon", "--adam_8bit True: belongs to --optimizer adam, not muon"),
]


@pytest.mark.parametrize(("line", "message"), BAD_FLAGS)
def test_impossible_flags_are_refused_by_name(line: str, message: str) -> None:
    """Values and combinations that cannot work are named before anything is loaded."""
    with pytest.raises(UsageError, match=r"^--") as caught:
        parse(line)
    assert message in str(caught.value)


# What only the whole script meets: (arguments, what the one line must say).
MISTAKES = {
    "unknown model": ("no-such/model data", "MODEL no-such/model"),
    "unknown data set": (f"{LM} no-such/data", "DATASET no-such/data"),
    "no such hookpoint": (f"{LM} TEXT --hookpoints layers.9", "nearest are layers."),
    "k above num_latents": (
        f"{LM} TEXT --num_latents 8 --k 9 --ctx_len 64 --batch_size 2",
        "--k 9 is larger than the 8",
    ),
    "groups do not divide": (
        f"{LM} TEXT --activation groupmax --k 5 --ctx_len 64 --batch_size 2",
        "--activation groupmax",
    ),
    "batch above the data": (f"{LM} TEXT --batch_size 5000 --ctx_len 64", "--batch_size"),
    "more than positions": (f"{LM} TEXT --ctx_len 600 --batch_size 1", "--ctx_len 600"),
    "warm-up above the run": (
        f"{LM} TEXT --lr_warmup 1000 --ctx_len 64 --batch_size 2",
        "--lr_warmup 1000.0: the run has ",
    ),
    "more ranks per coder than ranks": (
        f"{LM} TEXT --distribute_modules --ranks_per_coder 2 --ctx_len 64 --batch_size 2",
        "--ranks_per_coder 2: does not divide the number of ranks, 1",
    ),
    "more steps than rows": (
        f"{LM} TEXT --ctx_len 8 --batch_size 2 --steps_per_batch 32",
        "--steps_per_batch 32: a batch has 16 tokens",
    ),
    "examples below a batch": (
        f"{LM} TEXT --ctx_len 64 --batch_size 8 --max_examples 4",
        "--max_examples 4: a batch is 8 sequences",
    ),
    "bad flag": (f"{LM} TEXT --batch_size 0", "--batch_size 0"),
    "unwritable": (f"{LM} TEXT --save_dir FILE/x", "--save_dir"),
    "missing tracker": (f"{LM} TEXT --log_with wandb", "--log_with wandb"),
}


def test_mistakes_end_in_one_line(tmp_path: Path) -> None:
    """Each ends with code 2 and one line that names the flag and the way out, and no lock."""
    (tmp_path / "FILE").write_text("")
    text = tmp_path / "text.txt"
    text.write_text("some words of text\n" * 500)
    # One process meets them all: most of the time is spent on imports.
    cases = {
        name: line.replace("FILE", str(tmp_path / "FILE")).replace("TEXT", str(text)).split()
        for name, (line, _) in MISTAKES.items()
    }
    runner = (
        "import sys, train_sae\n"
        f"for name, line in {cases!r}.items():\n"
        f"    save = [] if '--save_dir' in line else ['--save_dir', {str(tmp_path)!r}]\n"
        "    sys.argv = ['train_sae.py', *line, *save]\n"
        "    print('CASE', name, file=sys.stderr)\n"
        "    try:\n"
        "        train_sae.main()\n"
        "    except SystemExit as stop:\n"
        "        print('CODE', stop.code, file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", runner], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = dict(part.split("\n", 1) for part in done.stderr.split("CASE ")[1:])
    assert found.keys() == MISTAKES.keys()
    for name, (_, message) in MISTAKES.items():
        lines = [x for x in found[name].splitlines() if x.startswith("error: ")]
        assert len(lines) == 1 and message in lines[0], (name, found[name])
        assert "CODE 2" in found[name] and "Traceback" not in found[name], name
    assert (tmp_path / "lm/run.lock").read_text() == "" and "in order" not in done.stdout

"""A run on the Hub: what is uploaded, by whom, and that nothing of the machine goes along."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from command_runs import call
from loopback_hub import READER, WRITER, Hub, Repo, loopback_hub
from other_programs import KINDS, assert_same_coder, random_coder, save_run
from ranks_in_threads import ThreadGroup, on_ranks
from safetensors.torch import load_file

from sae import SaeConfig, SparseCoder, load_many
from sae.coders.sharded import ShardedCoder
from sae.formats.origin import without_folder
from sae.share.push import PushConfig, assemble

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hub() -> Iterator[Hub]:
    with loopback_hub() as server:
        yield server


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """The folder of a finished run on a text of this machine."""
    coders = {name: random_coder(KINDS["sae"]) for name in ("layers.1", "layers.3")}
    coders["layers.3"].b_dec.data.neg_()
    run, text = save_run(tmp_path / "runs" / "my-run", coders), tmp_path / "private" / "text.txt"
    text.parent.mkdir()
    text.write_text("words")
    for name in coders:
        (run / "step_5" / name / "resume.safetensors").write_text("optimizer")
    flags = {"model": "org/tiny-lm", "dataset": str(text), "ctx_len": 64, "k": 3, "lr": 0.004}
    flags |= {"optimizer": "adam", "normalize_decoder": False, "hookpoints": ["layers.1"]}
    flags |= {"eval_tokens": 512, "split": "train", "text_column": None}
    flags |= {"processes": 2, "versions": {"torch": "2.9.1", "transformers": "5.1"}}
    (run / "run.json").write_text(json.dumps(flags))
    figures = {"fvu": 0.125, "l0": 2.5, "dead_share": 0.01, "predictions": {"ce_recovered": 0.9}}
    of_coders = {name: {**figures, "path": str(run / "step_5" / name)} for name in coders}
    summary = {"step": 5, "tokens": 640, "wall_seconds": 2.0, "tokens_per_second": 320.0}
    (run / "summary.json").write_text(json.dumps({**summary, "hookpoints": of_coders}))
    elsewhere = str(tmp_path / "models/finetuned")  # judged in another LM than trained on
    of = {"model": elsewhere, "dataset": str(text), "step": "step_5", "held_out": True}
    (run / "eval.json").write_text(json.dumps({"of": of, "coders": {"layers.1": {"fvu": 0.25}}}))
    (run / "report.html").write_text(f"<p>looked at on 512 tokens of {text}.</p>")
    return run


def test_the_dry_run_is_what_would_be_uploaded(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Coders as they are, other formats beside, figures, page, card; no path of the machine."""
    out = tmp_path / "out"
    push = ("push", str(finished), "org/name", "--as", "sae_lens", "--license", "mit")
    assert call(monkeypatch, *push, "--dry_run", str(out)) == 0
    assert str(out) in capsys.readouterr().out
    files = {f.relative_to(out).as_posix() for f in out.rglob("*") if f.is_file()}
    ours = {f"layers.{i}/{f}" for i in (1, 3) for f in ("cfg.json", "sae.safetensors")}
    beside = {
        f"sae_lens/layers.{i}/{f}" for i in (1, 3) for f in ("cfg.json", "sae_weights.safetensors")
    }
    assert files == ours | beside | {"README.md", "summary.json", "eval.json", "report.html"}
    coders = load_many(finished)
    for folder in (out, out / "sae_lens"):
        found = load_many(folder)
        assert list(found) == ["layers.1", "layers.3"]
        assert all(assert_same_coder(found[name], coders[name]) is None for name in coders)
    for file in (
        "README.md",
        "summary.json",
        "eval.json",
        "report.html",
        "sae_lens/layers.1/cfg.json",
    ):
        assert str(tmp_path) not in (out / file).read_text(), file
    about = json.loads((out / "sae_lens/layers.1/cfg.json").read_text())["metadata"]
    assert about["training_tokens"] == 640 and about["context_size"] == 64
    assert json.loads((out / "eval.json").read_text())["of"]["model"] == "finetuned"
    text = (out / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head) == {
        "license": "mit",
        "library_name": "train-sae",
        "tags": ["sparse-autoencoder"],
        "base_model": "org/tiny-lm",
    }
    assert "- Base model: org/tiny-lm" in body and "- Data set: text.txt" in body
    assert "- Hookpoints: `layers.1`, `layers.3`" in body
    assert "| layers.1 | 24 | 3 | 0.25 | 2.5 | 0.01 | 0.9 |" in body
    assert "| layers.3 | 24 | 3 | 0.125 | 2.5 | 0.01 | 0.9 |" in body
    words = body.split("```bash\n")[1].split("```")[0].split()
    launch = "accelerate launch --num_processes 2 train_sae.py org/tiny-lm text.txt"
    assert words[:7] == launch.split()
    given = "--ctx_len 64 --eval_tokens 512 --k 3 --lr 0.004 --no-normalize_decoder"
    assert sorted(words[7:]) == sorted([*given.split(), "--hookpoints", "layers.1"])
    assert 'load_many("org/name")' in body and "sae_lens/layers.1" in body
    assert "With torch 2.9.1, transformers 5.1." in body
    assert call(monkeypatch, *push, "--dry_run", str(out)) == 2
    assert "is no empty folder" in capsys.readouterr().err
    (finished / "report.html").unlink()
    flags = json.loads((finished / "run.json").read_text())
    del flags["processes"], flags["versions"]  # as older runs have it
    (finished / "run.json").write_text(json.dumps(flags))
    assert call(monkeypatch, *push, "--dry_run", str(tmp_path / "without")) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert len(said) == 1 and "has no report.html, which python -m sae features" in said[0]
    assert not (tmp_path / "without/report.html").exists()
    text = (tmp_path / "without/README.md").read_text()
    flags |= {"processes": 2, "lm_in_shards": True}
    (finished / "run.json").write_text(json.dumps(flags))
    assert call(monkeypatch, *push, "--dry_run", str(tmp_path / "shards")) == 0
    launched = "accelerate launch --num_processes 2 --use_deepspeed --zero_stage 3 train_sae.py"
    assert launched in (tmp_path / "shards/README.md").read_text()
    assert "python train_sae.py" in text and "(when this page was made)." in text


def test_a_coder_in_pieces_is_pushed_whole(finished: Path, tmp_path: Path) -> None:
    """What ranks wrote together is one file there, as every program reads it."""
    cfg = SaeConfig(num_latents=32, k=3)

    def save(group: ThreadGroup) -> None:
        ShardedCoder(group, 8, cfg, generator=torch.Generator().manual_seed(1)).save_to_disk(folder)

    folder = finished / "step_5/layers.3"
    (folder / "sae.safetensors").unlink()
    on_ranks(2, save)
    assemble(PushConfig(str(finished), "org/name"), tmp_path / "out")
    pushed = tmp_path / "out/layers.3"
    assert {f.name for f in pushed.iterdir()} == {"cfg.json", "sae.safetensors"}
    whole = SparseCoder(8, cfg, generator=torch.Generator().manual_seed(1))
    tensors = load_file(pushed / "sae.safetensors")
    assert tensors.keys() == whole.state_dict().keys()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensors[name], tensor)


def test_names_that_are_folders_here_lose_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Absolute or not; a Hub id keeps its owner."""
    monkeypatch.chdir(tmp_path)
    Path("secret").mkdir()
    Path("secret/text.jsonl").write_text("")
    for name in (str(tmp_path / "secret/text.jsonl"), "secret/text.jsonl", "./secret/text.jsonl"):
        assert without_folder(name) == "text.jsonl"
    assert without_folder("org/data") == "org/data"


def test_mistakes_are_refused_before_anything_is_sent(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A name that is none, a folder that is no finished run: one line."""
    for name, folder, why in (
        ("name", finished, "give an owner and a name"),
        ("org/name", tmp_path, "has no summary.json"),
    ):
        assert call(monkeypatch, "push", str(folder), name, "--dry_run", str(tmp_path / "o")) == 2
        assert why in capsys.readouterr().err


def test_a_run_is_pushed_and_pulled(hub: Hub, finished: Path, tmp_path: Path) -> None:
    """Rights first, a busy Hub is waited for, and a second push sends no weights again."""
    runner = (
        "import json, os, sys\nimport sae.__main__ as door\n"
        "for token, arguments in json.load(sys.stdin):\n"
        "    os.environ.pop('HF_TOKEN', None)\n"
        "    os.environ.update({'HF_TOKEN': token} if token else {})\n"
        "    sys.argv = ['sae', *arguments]\n"
        "    try:\n        door.main()\n        print('CODE 0', flush=True)\n"
        "    except SystemExit as stop:\n        print('CODE', stop.code, flush=True)\n"
    )
    push = ["push", str(finished), "org/name", "--private"]
    again = [WRITER, ["push", str(finished), "org/name", "--as", "sae_lens"]]
    calls = [[None, push], ["wrong", push], [READER, push]]
    calls += [[WRITER, ["push", str(finished), "readers/x"]]]
    calls += [[WRITER, ["push", str(finished), "elsewhere/x"]]]
    for name in ("org/locked", "org/locked", "org/busy"):
        calls.append([WRITER, ["push", str(finished), name]])
    calls.append([WRITER, ["push", str(finished), "org/old", "--revision", "v9"]])
    calls += [[WRITER, push], again]
    hub.repos["org/old"] = Repo()
    hub.forbidden["POST /api/models/org/locked/commit"] = 1
    hub.busy |= {"POST /api/models/org/name/commit": 1, "POST /api/models/org/busy/commit": 99}
    hub.retry_after = "0"
    # Of two large files only one comes through at first.
    weights = [(finished / f"step_5/layers.{i}/sae.safetensors").read_bytes() for i in (1, 3)]
    lost, kept = (f"/upload/{hashlib.sha256(data).hexdigest()}" for data in weights)
    hub.forbidden[f"PUT {lost}"] = 1
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache")}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        *([sys.executable, "-c", runner],),
        input=json.dumps(calls),
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    codes = [line for line in done.stdout.splitlines() if line.startswith("CODE")]
    assert codes == ["CODE 2"] * 9 + ["CODE 0"] * 2, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    for line, why in zip(
        errors,
        (
            "HF_TOKEN",
            "HF_TOKEN",
            "may only read",
            "may only read in readers",
            "is not in elsewhere",
            *["org/locked: the token may not do this"] * 2,
            "org/busy: the Hub takes no more requests for now (429)",
            "org/old: it is not there",
        ),
        strict=True,
    ):
        assert why in line
    files = hub.repos["org/name"].commits["main"]
    assert hub.repos["org/name"].private
    assert not any(name.split("/")[0] != "org" for name in hub.repos)
    assert files["layers.1/sae.safetensors"] == weights[0] and "README.md" in files
    assert {"sae_lens/layers.3/cfg.json", "eval.json", "report.html"} < files.keys()
    assert not any("resume" in name for name in files)
    sent = [line for line in hub.requests if line.startswith("PUT")]
    assert sent.count(f"PUT {lost}") == 2 and sent.count(f"PUT {kept}") == 1
    assert len(sent) - 1 == len(set(sent)) == len(set(hub.blobs))
    secrets = [token.encode() for token in (WRITER, READER)]
    assert not any(token in body for token in secrets for body in [*hub.bodies, *files.values()])
    assert WRITER not in done.stdout + done.stderr


def test_a_hub_out_of_reach_is_said_in_one_line(finished: Path, tmp_path: Path) -> None:
    """Where nothing answers, the line names the repository, and the token stays hidden."""
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": WRITER}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        *([sys.executable, "-m", "sae", "push", str(finished), "org/name"],),
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2, done.stderr
    (said,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "ORG/NAME org/name: it cannot be uploaded" in said and WRITER not in said

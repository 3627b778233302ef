"""Coders that went through another program's files are judged as before."""

import json
import re
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from command_runs import call
from other_programs import (
    KINDS,
    assert_same_coder,
    cross_layer_coders,
    dense,
    random_coder,
    save_run,
)
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from sae import SaeConfig, SparseCoder, TranscoderConfig, UsageError, load_many
from sae.config import Columns
from sae.formats.coder_file import NeedsThreshold
from sae.judge.trained import CodersConfig, load_trained
from sae.share.export import ExportConfig, Program, export
from sae.share.origins import origin_of

LM = str(Path(__file__).parents[2] / "demo/lm")


def evaluated(
    monkeypatch: pytest.MonkeyPatch, coders: Path, *flags: str
) -> dict[str, dict[str, Any]]:
    """Figures by coder, on a text of the tests."""
    text, out = coders.parent / "text.txt", coders.parent / "figures.json"
    text.write_text("def f(x):\n    return x + 1\n\n\nfor i in range(7):\n    print(f(i))\n" * 400)
    where = ("--model", LM, "--dataset", str(text), "--ctx_len", "64", "--tokens", "512")
    command = ("evaluate", str(coders), *where, "--out", str(out), *flags)
    assert call(monkeypatch, *command) == 0
    return json.loads(out.read_text())["coders"]


def test_coders_whose_files_say_no_hookpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--hookpoint says where they read, and their figures are those of the coder; else refused."""
    ours = tmp_path / "ours"
    random_coder(KINDS["sae"], 192).save_to_disk(ours / "layers.1")
    figures = evaluated(monkeypatch, ours)
    out = str(tmp_path / "sae_lens/coders")
    assert call(monkeypatch, "export", str(ours), "--to", "sae_lens", "--out", out) == 0
    cfg = tmp_path / "sae_lens/coders/layers.1/cfg.json"
    cfg.write_text(json.dumps({**json.loads(cfg.read_text()), "metadata": {}}))
    silent = tmp_path / "silent"
    (tmp_path / "sae_lens/coders/layers.1").rename(silent)
    assert evaluated(monkeypatch, silent, "--hookpoint", "layers.1") == figures
    capsys.readouterr()
    assert call(monkeypatch, "evaluate", str(silent), "--model", LM, "--dataset", "x") == 2
    assert "do not say where it reads" in capsys.readouterr().err
    features = ("features", str(silent), "--hookpoint", "layers.1", "--model", LM)
    text = ("--dataset", str(tmp_path / "text.txt"), "--ctx_len", "64", "--tokens", "512")
    page = tmp_path / "page.html"
    assert call(monkeypatch, *features, *text, "--out", str(page), "--latents", "3") == 0
    assert "layers.1" in page.read_text()
    names = ("--hookpoint", "layers.9")
    flags = ("--out", str(tmp_path / "again"))
    random_coder(KINDS["sae"], 192).save_to_disk(ours / "layers.2")
    assert call(monkeypatch, "export", str(ours), *names, *flags) == 2
    assert "there are layers.1, layers.2" in capsys.readouterr().err


def test_thresholds_are_made_where_a_program_has_no_k(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one command: L0 and FVU before and after are printed and written, and L0 stays at k."""
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n\n\nfor i in range(7):\n    print(f(i))\n" * 400)
    skip = TranscoderConfig(num_latents=24, k=3, skip_connection=True)
    ours, out = tmp_path / "ours", tmp_path / "sae_lens"
    for i in range(6):
        random_coder(skip, 192).save_to_disk(ours / f"layers.{i}.mlp")
    where = ("--model", LM, "--dataset", str(text), "--ctx_len", "64", "--tokens", "512")
    command = ("export", str(ours), *where)
    assert call(monkeypatch, *command, "--to", "sae_lens", "--out", str(out)) == 0
    printed = capsys.readouterr().out
    assert "has no TopK coder with a skip connection; so thresholds are made" in printed
    cfg = json.loads((out / "layers.3.mlp/cfg.json").read_text())
    assert cfg["architecture"] == "jumprelu_skip_transcoder"
    about = cfg["metadata"]
    assert about["training_architecture"] == "topk" and about["l0"] == pytest.approx(3, abs=0.1)
    assert about["l0_before_threshold"] == pytest.approx(3, abs=0.1)
    rows = [line.split() for line in printed.splitlines() if line.startswith("layers.3.mlp ")]
    before, after = (next(r for r in rows if r[1] == kind) for kind in ("topk", "jumprelu"))
    assert before[2] == f"{about['fvu_before_threshold']:.4f}" and after[2] == f"{about['fvu']:.4f}"
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *command, "--to", "circuit_tracer", "--out", "set") == 0
    theirs = load_many(tmp_path / "set")
    assert list(theirs) == [f"layers.{i}.mlp" for i in range(6)]
    assert torch.equal(theirs["layers.3.mlp"].threshold, load_many(out)["layers.3.mlp"].threshold)


def test_thresholds_are_made_on_what_the_run_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the folder of a run: on every other sequence there each latent is active as before."""
    text = tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n\n\nfor i in range(7):\n    print(f(i))\n" * 400)
    coder = random_coder(SaeConfig(num_latents=24, k=3, activation="groupmax"), 192)
    run = save_run(tmp_path / "run", {"layers.1": coder})
    flags = {"model": LM, "dataset": str(text), "ctx_len": 64, "eval_tokens": 512}
    flags |= {"split": "train", "text_column": None, "batch_size": 1, "grad_acc_steps": 1}
    (run / "run.json").write_text(json.dumps(flags))
    command = ("export", str(run), "--to", "dictionary_learning", "--out", str(tmp_path / "out"))
    assert call(monkeypatch, *command) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if line.startswith("layers.1 ")]
    groupmax, jumprelu = (next(r for r in rows if r[1] == k) for k in ("groupmax", "jumprelu"))
    trained = load_trained(CodersConfig(str(run)))
    assert trained.held_out and len(trained.blocks) == 8
    made = load_many(tmp_path / "out", allow_pt=True)["layers.1"]
    y, others = (
        torch.cat([trained.capture(b)["layers.1"][1] for b in trained.source.batches(half, 1)])
        for half in (trained.blocks[::2], trained.blocks[1::2])
    )
    before, after = ((dense(c, y)[0] > 0).sum(0) for c in (coder, made))
    assert int((before - after).abs().max()) <= 1
    l0 = (dense(made, others)[0] > 0).sum(1).double().mean()  # where figures are from
    assert (groupmax[4], jumprelu[4]) == ("3.0", f"{l0:.1f}")


def test_what_begins_every_sequence_is_known(tmp_path: Path) -> None:
    """True where a tokenizer puts BOS first; not where documents begin so, unknown of ids."""
    lm = tmp_path / "lm"
    lm.mkdir()
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(Path(LM) / name, lm / name)
    tokenizer = Tokenizer.from_file(str(Path(LM) / "tokenizer.json"))
    bos = tokenizer.token_to_id("<|endoftext|>")
    template = {"single": "<|endoftext|> $A", "special_tokens": [("<|endoftext|>", bos)]}
    tokenizer.post_processor = TemplateProcessing(**template)
    tokenizer.save(str(lm / "tokenizer.json"))
    cases = [({}, True), ({"bos_per_document": True}, False), ({"model": LM}, False)]
    cases += [({"dataset": "ids.bin"}, None), ({"model": "no/such"}, None)]
    for given, expected in cases:
        flags = {"model": str(lm), "dataset": "text.jsonl", "ctx_len": 64, **given}
        (tmp_path / "run.json").write_text(json.dumps(flags))
        assert origin_of(tmp_path).begins_with_bos is expected, given


def families_of_row(row: str) -> list[Any]:
    """The families that a line of the table in docs/files.md names."""
    kinds = re.match(r"(\w+)(?: or (\w+))? ", row)
    return [name.lower() for name in kinds.groups() if name] if kinds else ["topk"]


def coder_of_row(row: str, kind: Any, prefixes: bool) -> SparseCoder:
    """A coder of a family as a line of the table calls it."""
    crossed = row == "crosscoder"
    if "cross-layer" in row:
        cfg = TranscoderConfig(num_latents=24, k=3, activation=kind, cross_layer="all")
        return cross_layer_coders(cfg)["layers.3.mlp"]
    cfg = SaeConfig(
        num_latents=24,
        k=3,
        activation=kind,
        transcode="transcoder" in row,
        skip_connection="skip" in row,
        matryoshka=(1 / 3, 2 / 3) if prefixes else (),
        crosscoder=crossed,
        parts=(Columns("layers.3", 5), Columns("layers.4", 3)) if crossed else (),
    )
    coder = random_coder(cfg, d_out=5 if "≠" in row else None)
    if kind == "batchtopk":
        coder.threshold.data.fill_(1.5)
    return coder


def outcome(row: str, coder: SparseCoder, program: Program, folder: Path) -> str:
    """What becomes of such a coder, in the words of the table."""
    names = [f"layers.{i}.mlp" for i in range(6)] if program == "circuit_tracer" else ["layers.3"]
    coders = dict.fromkeys(names, coder)
    if "cross-layer" in row:
        coders = cross_layer_coders(coder.cfg)
        names = ["layers.3.mlp"]
    run = save_run(folder / "run", coders)
    (run / "run.json").write_text(json.dumps({"model": LM, "dataset": "x"}))
    try:
        export(ExportConfig(str(run), out=str(folder / "out"), to=program))
    except NeedsThreshold:
        return "through a threshold"
    except UsageError as error:
        several = coder.cfg.crosscoder or coder.cfg.sources
        nearest = "--to sparsify" if several else "try --to sae_lens"
        assert program == "sae_lens" or nearest in str(error)
        return "not at all"
    back = load_many(folder / "out", allow_pt=True)[names[0]]
    only_here = coder.cfg.has_threshold or coder.cfg.crosscoder or coder.cfg.sources
    if program == "sparsify" and only_here:
        assert back.cfg == coder.cfg
        return "only here"
    differ = any(not torch.equal(t, back.state_dict()[n]) for n, t in coder.state_dict().items())
    has_prefixes = back.cfg.matryoshka == coder.cfg.matryoshka
    if coder.cfg.sources:
        assert not differ and back.cfg == replace(coder.cfg, sources=back.cfg.sources)
        return "exact"
    if not differ and has_prefixes:  # without, they are summed in another order
        assert_same_coder(coder, back)
    x = torch.randn(64, 8)
    for found, expected in zip(dense(back, x), dense(coder, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    kept = coder.cfg.activation == "batchtopk" and program == "dictionary_learning"
    assert has_prefixes or not (kept and not coder.cfg.transcode)
    return "exact [1]" if differ else "exact"


def test_the_table_of_programs_is_true(tmp_path: Path) -> None:
    """Every cell in docs/files.md: what is exact comes back bit for bit, what is not is refused."""
    page = (Path(__file__).parents[2] / "docs/files.md").read_text()
    head, _, *lines = re.findall(r"^\| .* \|$|^\|---.*$", page[page.index("| coder here") :], re.M)
    programs = re.findall(r"`(\w+)`", head)
    assert programs == [*get_args(Program)]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    rows = rows[: next(i for i, row in enumerate(rows) if len(row) != 5)]
    assert len(rows) == 16
    for i, (row, *cells) in enumerate(rows):
        alone = row == "crosscoder" or "cross-layer" in row
        for kind, prefixes in product(families_of_row(row), (False,) if alone else (False, True)):
            coder = coder_of_row(row, kind, prefixes)
            for program, said in zip(programs, cells, strict=True):
                folder = tmp_path / f"{i}{kind}{prefixes}{program}"
                found = outcome(row, coder, program, folder)
                assert found == said, (row, kind, prefixes, program)

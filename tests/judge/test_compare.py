"""Laws of comparing runs."""

import json
import re
import shlex
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from command_runs import call
from other_programs import random_coder, save_run
from torch import Tensor
from training_runs import Settings, run
from transformers import PreTrainedModel

from sae import SaeConfig, SparseCoder, UsageError
from sae.judge.compare import comparison, differing_flags
from sae.judge.twins import nearest_twins

ROOT = Path(__file__).parents[2]
LM = str(ROOT / "demo/lm")


def test_twins_are_found_by_direction() -> None:
    """Permuted and scaled rows are twins of cosine 1; orthogonal ones have cosine 0."""
    a, b = (SparseCoder(8, SaeConfig(num_latents=6, k=2)) for _ in range(2))
    assert a.W_dec is not None and b.W_dec is not None
    b.W_dec.data.copy_(3 * a.W_dec.data[torch.tensor([3, 1, 0, 2, 5, 4])])
    found = nearest_twins(a, b)
    torch.testing.assert_close(found.cosine, torch.ones(6))
    assert found.latent.tolist() == [2, 1, 3, 0, 5, 4]
    assert nearest_twins(a, b, torch.tensor([4, 0])).latent.tolist() == [5, 2]
    a.W_dec.data.copy_(torch.eye(8)[:6])
    b.W_dec.data.copy_(torch.eye(8)[[0, 1, 7, 7, 7, 7]])
    assert nearest_twins(a, b).cosine.tolist() == [1, 1, 0, 0, 0, 0]


def test_comparison_shows_figures_flags_and_shared_latents(
    lm: PreTrainedModel,
    tokens: Tensor,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    """Figures, flags that differ, shared latents: all of a run with itself, fewer of another."""
    first = run(lm, tokens, settings, run_name="a")
    second = run(lm, tokens, settings, run_name="b", init_seeds=(7,), lr=0.02)
    folders = tuple(str(Path(settings["save_dir"]) / name) for name in "ab")
    assert differing_flags(folders) == {
        "init_seeds": [[0], [7]],
        "lr": [None, 0.02],
        "run_name": ["a", "b"],
    }
    recorded = json.loads((Path(folders[1]) / "run.json").read_text())
    assert (recorded["processes"], recorded["lm_in_shards"]) == (1, False)
    assert recorded["versions"]["torch"] == version("torch")
    recorded["versions"] = {"torch": "2.9.1"}
    (Path(folders[1]) / "run.json").write_text(json.dumps(recorded))
    judged = {"layers.1": {"predictions": {"ce_recovered": 0.9, "kl": 0.25}}}
    for folder, step, held_out in ((folders[0], "step_20", False), (folders[1], "step_20", True)):
        of = {"step": step, "held_out": held_out}
        (Path(folder) / "eval.json").write_text(json.dumps({"of": of, "coders": judged}))
    assert call(monkeypatch, "compare", *folders) == 0
    lines = {line[:32].strip(): line for line in capsys.readouterr().out.splitlines()}
    for hookpoint, figures in first["hookpoints"].items():
        row = next(line for key, line in lines.items() if key.startswith(f"{hookpoint} fvu"))
        other = second["hookpoints"][hookpoint]["fvu"]
        assert f"{figures['fvu']:.4f}" in row and row.endswith(f"{other:.4f}")
    text = "\n".join(lines.values())
    assert any(
        row.startswith("versions ") and row.endswith("torch 2.9.1") for row in lines.values()
    )
    assert text.count("0.9000") == 1 and "0.2500" in text and "--lr" in text and "2,560" in text
    same = comparison((folders[0], folders[0]), near=0.999)
    assert same.count("128 (mean 1.000)") == 3
    assert "latents with a twin" in text and "128 (mean 1.000)" not in text
    for bad in ((folders[0],), (folders[0], settings["save_dir"])):
        with pytest.raises(UsageError, match="RUN_A RUN_B|has no summary.json"):
            comparison(bad, near=0.7)


def test_coders_of_several_programs_are_judged_on_one_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Figures are those of evaluate, twins count both ways; a table, JSON and a plot say them."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("def f(x):\n    return x + 1\n\n\nprint(f(3))\n" * 700)
    narrow = random_coder(SaeConfig(num_latents=24, k=3), 192)
    wide = random_coder(SaeConfig(num_latents=48, k=6), 192)
    assert narrow.W_dec is not None and wide.W_dec is not None
    wide.W_dec.data[:12] = narrow.W_dec.data[:12]
    for name, coder in (("narrow", narrow), ("wide", wide)):
        coder.save_to_disk(tmp_path / name / "layers.1")
    export = ("export", "wide", "--to", "sae_lens", "--out", "theirs")
    assert call(monkeypatch, *export) == 0
    export = ("export", "narrow", "--to", "dictionary_learning", "--out", "pickled")
    assert call(monkeypatch, *export) == 0
    sources = ("narrow", "theirs", "pickled")
    where = ("--model", LM, "--dataset", "text.txt", "--ctx_len", "64", "--tokens", "512")
    where = (*where, "--hookpoint", "layers.1", "--allow_pt")
    assert call(monkeypatch, "compare", *sources, *where) == 0
    printed = capsys.readouterr().out
    assert "50.0% of 1 in 2, 25.0% of 2 in 1" in printed
    found = json.loads(Path("comparison.json").read_text())
    assert found["twins"] == [
        {"a": 0, "b": 1, "of_a": 0.5, "of_b": 0.25},
        {"a": 0, "b": 2, "of_a": 1.0, "of_b": 1.0},
        {"a": 1, "b": 2, "of_a": 0.25, "of_b": 0.5},
    ]
    assert [c["latents"] for c in found["coders"]] == [24, 48, 24]
    for source, compared in zip(sources, found["coders"], strict=True):
        assert call(monkeypatch, "evaluate", source, *where, "--out", "one.json") == 0
        alone = json.loads(Path("one.json").read_text())["coders"]["layers.1"]
        assert {name: compared[name] for name in alone} == alone
        assert f"{alone['fvu']:.4f}" in printed and compared["tokens_per_second"] > 0
    svg = ElementTree.fromstring(Path("comparison.svg").read_text())
    assert len(list(svg.iter("{http://www.w3.org/2000/svg}circle"))) == 6
    texts = [element.text for element in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert {"CE recovered", "FVU", "L0", "1: narrow layers.1", "2: theirs layers.1"} <= {*texts}
    assert "3: pickled layers.1" in texts
    assert call(monkeypatch, "compare", "narrow", *where) == 2


@pytest.mark.parametrize("order", [("run", "bare"), ("bare", "run")])
def test_all_read_the_rows_that_the_run_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: tuple[str, str]
) -> None:
    """Tokens that a run leaves out, and its column, are those of coders without a run too."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"text": "no", "content": f"x = {i}\ny = x + {i}\n"}) for i in range(900)]
    Path("text.jsonl").write_text("\n".join(lines))
    coder = random_coder(SaeConfig(num_latents=24, k=3), 192)
    save_run(tmp_path / "run", {"layers.1": coder})
    coder.save_to_disk(tmp_path / "bare/layers.1")
    flags = {"model": LM, "dataset": "other.jsonl", "ctx_len": 64, "exclude_positions": 8}
    flags |= {"text_column": "content", "split": "train", "eval_tokens": 512}
    Path("run/run.json").write_text(json.dumps(flags))
    command = ("compare", *order, "--dataset", "text.jsonl", "--tokens", "512")
    assert call(monkeypatch, *command) == 0
    first, second = json.loads(Path("comparison.json").read_text())["coders"]
    assert (first["source"], second["source"]) == order
    for figure in ("fvu", "l0", "dead_share", "predictions"):
        assert first[figure] == second[figure]
    assert (
        call(monkeypatch, "evaluate", "bare", "--model", LM, *command[3:], "--ctx_len", "64") == 0
    )
    plain = json.loads(Path("bare/eval_other_text.json").read_text())["coders"]["layers.1"]
    assert plain["fvu"] != first["fvu"]


def test_the_example_in_the_documentation_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run of ours beside the checked-in SAE that SAELens trained, whose figures are good."""
    page = (ROOT / "docs/judging.md").read_text()
    line = next(line for line in page.splitlines() if "compare" in line and "fixtures" in line)
    ours = random_coder(SaeConfig(num_latents=24, k=3), 192)
    ours.save_to_disk(tmp_path / "run/step_5/layers.3")
    text = tmp_path / "text.txt"
    text.write_text("".join(file.read_text() for file in sorted(ROOT.glob("sae/formats/*.py"))[:4]))
    flags = {"model": LM, "dataset": "other.txt", "ctx_len": 64}
    (tmp_path / "run/run.json").write_text(json.dumps(flags))
    words = [*shlex.split(line)[3:], "--tokens", "1024", "--out", str(tmp_path / "c.json")]
    here = {"checkpoints/RUN": str(tmp_path / "run"), "demo/text/heldout.jsonl": str(text)}
    monkeypatch.chdir(ROOT)
    assert call(monkeypatch, *(here.get(word, word) for word in words)) == 0
    assert "sae_lens  layers.3  128" in re.sub(" +", "  ", capsys.readouterr().out)
    ours_found, theirs = json.loads((tmp_path / "c.json").read_text())["coders"]
    assert ours_found["fvu"] > 1 > 0.5 > theirs["fvu"]
    assert theirs["predictions"]["ce_recovered"] > 0.8 and theirs["l0"] == 16

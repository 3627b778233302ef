"""Coders that went through another program's files are judged as before."""

import json
from pathlib import Path
from typing import Any

import pytest
from command_runs import call
from other_programs import KINDS, random_coder

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


def test_commands_take_coders_of_any_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The figures of ours, of SAELens' and of dictionary_learning's files are the same."""
    ours = tmp_path / "ours"
    random_coder(KINDS["sae"], 192).save_to_disk(ours / "layers.1")
    figures = evaluated(monkeypatch, ours)
    for program in ("sae_lens", "dictionary_learning"):
        out = tmp_path / program / "coders"
        assert call(monkeypatch, "export", str(ours), "--to", program, "--out", str(out)) == 0
        assert evaluated(monkeypatch, out, "--allow_pt") == figures
    # Files that do not say where the coder reads.
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

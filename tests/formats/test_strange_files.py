"""Files of strangers: what they say is no path, no number that is none, and no other place."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command_runs import call
from other_programs import JUMPRELU, KINDS, assert_same_coder, random_coder, save_run
from safetensors.torch import load_file, save_file

from sae import SaeConfig, SparseCoder, UsageError, load_many
from sae.formats import kinds
from sae.formats.hook_names import our_name
from sae.formats.hub import HubName
from sae.judge.trained import CodersConfig, named_coders
from sae.share.export import ExportConfig, Program, export
from sae.share.origins import origin_of

LM = str(Path(__file__).parents[2] / "demo/lm")
TEXT = "def f(x):\n    return x + 1\n\n\nprint(f(3))\n" * 300


def theirs(folder: Path, to: Program = "sae_lens", **coders: SparseCoder) -> Path:
    """Coders of another program; "__" in a name stands for a dot."""
    named = {name.replace("__", "."): coder for name, coder in coders.items()}
    run = save_run(folder / "run", named)
    (run / "run.json").write_text(json.dumps({"model": LM, "dataset": "org/text", "ctx_len": 64}))
    export(ExportConfig(str(run), out=str(folder / "theirs"), to=to))
    return folder / "theirs"


def change(file: Path, **metadata: Any) -> None:
    """Other metadata in a `cfg.json` of SAELens."""
    values = json.loads(file.read_text())
    values["metadata"] |= metadata
    file.write_text(json.dumps(values))


@pytest.mark.parametrize("to", ["sparsify", "sae_lens"])
def test_a_hookpoint_that_is_a_path_is_refused(tmp_path: Path, to: Program) -> None:
    """Nothing is written outside the folder that was asked for, whatever a file says."""
    folder = theirs(tmp_path, layers__1=random_coder(KINDS["sae"]))
    out = tmp_path / "out/a/b"
    for evil in ("../../escaped", str(tmp_path / "escaped")):
        change(folder / "layers.1/cfg.json", hookpoint=evil)
        with pytest.raises(UsageError, match="not a path out of it"):
            export(ExportConfig(str(folder), out=str(out), to=to, model=LM))
        with pytest.raises(UsageError, match=r"theirs/layers\.1: hookpoint .*escaped"):
            load_many(folder)
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize("to", ["sparsify", "sae_lens", "dictionary_learning"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, to: Program, value: float) -> None:
    """The file and the tensor are named; a threshold may be infinite."""
    coder = random_coder(KINDS["sae"])
    folder = theirs(tmp_path, to, layers__1=coder) / "layers.1"
    tensor = "b_dec"
    if to == "dictionary_learning":
        file = folder / "ae.pt"
        found = torch.load(file, weights_only=True)
        found[tensor][3] = value
        torch.save(found, file)
    else:
        file = next(folder.glob("*.safetensors"))
        found = load_file(file)
        found[tensor][3] = value
        save_file(found, file)
    with pytest.raises(UsageError, match=rf"{file.name}: {tensor} holds NaN or Inf"):
        load_many(folder.parent, allow_pt=True)
    never = random_coder(JUMPRELU["sae"])
    never.threshold.data[:2] = torch.inf
    folder = theirs(tmp_path / "never", to, layers__1=never)
    found = load_many(folder, allow_pt=True)["layers.1"]
    assert torch.equal(found.threshold, never.threshold)


def test_weights_of_eight_bits_are_refused(tmp_path: Path) -> None:
    """By name, instead of an error of PyTorch's."""
    file = theirs(tmp_path, layers__1=random_coder(KINDS["sae"])) / "layers.1"
    file /= "sae_weights.safetensors"
    save_file({n: t.to(torch.float8_e4m3fn) for n, t in load_file(file).items()}, file)
    with pytest.raises(UsageError, match="holds torch.float8_e4m3fn, not floating point of 16"):
        load_many(file.parent)


def test_coders_of_few_bits_are_judged_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums that do not fit into float16, and twins among coders of two types."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    coder = random_coder(KINDS["sae"], 192)
    coder.b_dec.data.mul_(30)
    half = random_coder(KINDS["sae"], 192).to(torch.float16)
    half.load_state_dict(coder.state_dict())
    half.save_to_disk(Path("half/layers.1"))
    exact = half.to(torch.float32)
    exact.save_to_disk(Path("exact/layers.1"))
    where = ("--model", LM, "--dataset", "text.txt", "--ctx_len", "64", "--tokens", "512")
    assert call(monkeypatch, "compare", "half", "exact", *where) == 0
    found = json.loads(Path("comparison.json").read_text())
    first, second = found["coders"]
    assert first["fvu"] == second["fvu"] > 1
    assert [(pair["of_a"], pair["of_b"]) for pair in found["twins"]] == [(1, 1)]
    page = ("--twins", "exact", "--latents", "3", "--out", "page.html")
    assert call(monkeypatch, "features", "half", *where, *page) == 0
    rows = 100 * torch.randn(512, 192, generator=torch.Generator().manual_seed(0))
    in_half = load_many("half")["layers.1"](rows.half()).fvu
    assert in_half.item() == pytest.approx(exact(rows.half().float()).fvu.item(), rel=0.05)


def test_ours_and_theirs_lie_in_one_folder(tmp_path: Path) -> None:
    """Both are read; of a pushed run the copies for other programs are not."""
    folder = theirs(tmp_path, layers__3=random_coder(KINDS["sae"]))
    random_coder(KINDS["sae"]).save_to_disk(folder / "layers.1")
    assert list(load_many(folder)) == ["layers.1", "layers.3"]
    (folder / "layers.3").rename(folder / "moved")
    (folder / "sae_lens").mkdir()
    (folder / "moved").rename(folder / "sae_lens/layers.3")
    assert list(load_many(folder)) == ["layers.1"]


def test_a_place_that_the_files_say_is_not_overruled(tmp_path: Path) -> None:
    """--hookpoint is for files that say none: another place would give wrong figures."""
    folder = theirs(tmp_path, layers__3=random_coder(KINDS["sae"], 192))
    for source in (folder, folder / "layers.3"):
        with pytest.raises(UsageError, match="--hookpoint layers.1: the files of layers.3 say lay"):
            named_coders(CodersConfig(str(source), model=LM, hookpoint="layers.1"))
        same = CodersConfig(str(source), model=LM, hookpoint="layers.3")
        assert list(named_coders(same)) == ["layers.3"]


@pytest.mark.parametrize("to", ["sae_lens", "dictionary_learning"])
def test_coders_of_several_seeds_come_back(tmp_path: Path, to: Program) -> None:
    """Their files name one hookpoint, and their folders the seeds."""
    coders = {f"layers__3.seed{seed}": random_coder(KINDS["sae"]) for seed in (0, -1)}
    coders["layers__3.seed-1"].b_dec.data.neg_()
    found = load_many(theirs(tmp_path, to, **coders), allow_pt=True)
    assert sorted(found) == ["layers.3.seed-1", "layers.3.seed0"]
    for name, coder in coders.items():
        assert_same_coder(found[name.replace("__", ".")], coder)


def test_an_lm_that_was_changed_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """TransformerLens' processing changes what a coder read: a line says so."""
    folder = theirs(tmp_path, layers__3=random_coder(KINDS["sae"]))
    named_coders(CodersConfig(str(folder)))
    assert capsys.readouterr().out == ""
    given = {"center_writing_weights": True, "fold_ln": False}
    change(folder / "layers.3/cfg.json", model_from_pretrained_kwargs=given)
    named_coders(CodersConfig(str(folder)))
    said = capsys.readouterr().out
    assert said.startswith("note  layers.3 was trained on an LM with center_writing_weights of")


def test_names_of_hooks_are_taken_apart() -> None:
    """Inputs of modules, Gemma 1 of 2B beside Gemma 2, and revisions with slashes."""
    assert our_name(None, "model.layers.12.self_attn.o_proj.input", None) == (
        "layers.12.self_attn.o_proj:input"
    )
    for model, module in (
        ("google/gemma-2b-it", "mlp"),
        ("codegemma-2b", "mlp"),
        ("gemma-7b", "mlp"),
        ("google/gemma-2-2b", "post_feedforward_layernorm"),
        ("gemma-2-27b-it", "post_feedforward_layernorm"),
        ("gemma-3-4b-pt", "post_feedforward_layernorm"),
    ):
        assert our_name("blocks.3.hook_mlp_out", None, model) == f"layers.3.{module}"
    assert HubName.parse("org/name@refs/pr/1") == ("org/name", "refs/pr/1", None)
    assert HubName.parse("org/name@refs/pr/1/a/b") == ("org/name", "refs/pr/1", "a/b")
    assert HubName.parse("org/name@v1/a") == ("org/name", "v1", "a")
    for wrong in ("org/name@", "/no/such/folder", "org/name@/a"):
        with pytest.raises(UsageError, match="neither a folder here nor on the Hub"):
            HubName.parse(wrong)


def test_only_what_lacks_thresholds_gets_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coder that a program holds exactly stays so, whatever is exported beside it."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT)
    coders = {
        "layers.1": random_coder(KINDS["sae"], 192),
        "layers.2": random_coder(JUMPRELU["sae"], 192),
        "layers.3": random_coder(replace(KINDS["sae"], activation="groupmax"), 192),
    }
    for name, coder in coders.items():
        coder.save_to_disk(Path("ours") / name)
    where = ("--model", LM, "--dataset", "text.txt", "--ctx_len", "64", "--tokens", "512")
    assert call(monkeypatch, "export", "ours", "--to", "sae_lens", "--out", "out", *where) == 0
    found = load_many("out")
    for name in ("layers.1", "layers.2"):
        assert_same_coder(found[name], coders[name])
    assert found["layers.3"].cfg.activation == "jumprelu"


def test_what_a_file_says_of_its_training_goes_on(tmp_path: Path) -> None:
    """From program to program, where the run itself is not at hand; --model stands above it."""
    first = theirs(tmp_path, layers__3=random_coder(KINDS["sae"]))
    about = json.loads((first / "layers.3/cfg.json").read_text())["metadata"]
    change(first / "layers.3/cfg.json", model_name=LM, training_tokens=99, prepend_bos=True)
    export(ExportConfig(str(first), out=str(tmp_path / "again"), to="sae_lens"))
    again = json.loads((tmp_path / "again/layers.3/cfg.json").read_text())["metadata"]
    known = {"training_tokens": 99, "prepend_bos": True, "dataset_path": "org/text"}
    assert again == {**about, **known, "context_size": 64}
    export(ExportConfig(str(first), out=str(tmp_path / "other"), to="dictionary_learning"))
    (coder,) = kinds.list_coders(tmp_path / "other").values()
    assert kinds.trained_on(coder) == {"model": "lm", "ctx_len": 64}
    assert origin_of(tmp_path, "gpt2", kinds.trained_on(coder)).model == "gpt2"


def test_missing_models_and_wrong_targets_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line with the flag, for each of what users mistake."""
    monkeypatch.chdir(tmp_path)
    for i in range(6):
        random_coder(JUMPRELU["transcoder"], 192).save_to_disk(Path(f"set/layers.{i}.mlp"))
    assert call(monkeypatch, "export", "set", "--to", "circuit_tracer", "--out", "out") == 2
    assert "--model: circuit-tracer takes transcoders of MLPs" in capsys.readouterr().err
    named = ("--to", "circuit_tracer", "--out", "out", "--model", LM)
    assert call(monkeypatch, "export", "set", *named) == 0
    Path("text.txt").write_text(TEXT)
    where = ("--model", LM, "--dataset", "text.txt", "--out", "x.svg")
    assert call(monkeypatch, "compare", "set", "out", *where) == 2
    assert "--out x.svg: is for figures" in capsys.readouterr().err
    run = save_run(tmp_path / "run", {"layers.1": random_coder(SaeConfig(num_latents=24, k=3))})
    command = ("push", str(run), "org/name", "--dry_run", "text.txt")
    assert call(monkeypatch, *command) == 2
    assert "--dry_run text.txt: is no empty folder" in capsys.readouterr().err

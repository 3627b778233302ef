"""Which program wrote a coder is recognized from its files; all commands take any of them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from other_programs import JUMPRELU, KINDS, random_coder, save_run

from sae import SaeConfig, SparseCoder, UsageError, load_many
from sae.coders.bank import CoderBank
from sae.config import Widths
from sae.formats import kinds
from sae.share.export import ExportConfig, Program, export

LM = str(Path(__file__).parents[2] / "demo/lm")


def test_what_is_no_coder_is_refused_with_the_kinds(tmp_path: Path) -> None:
    """The line lists every program whose files are known."""
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "weights.bin").write_text("")
    for load in (load_many, SparseCoder.load_from_disk):
        with pytest.raises(UsageError) as caught:
            load(tmp_path / "c")
        assert all(
            f"{name} ({kind.files})" in str(caught.value) for name, kind in kinds.KINDS.items()
        )


def test_coders_of_several_programs_lie_in_one_folder(tmp_path: Path) -> None:
    """Each is recognized, in folders below folders too; two of one hookpoint are refused."""
    run = save_run(tmp_path / "run", {"layers.1": random_coder(KINDS["sae"])})
    (run / "run.json").write_text(json.dumps({"model": "demo/lm", "dataset": "x"}))
    export(ExportConfig(str(run), out=str(tmp_path / "all/saelens/here"), to="sae_lens"))
    cfg = tmp_path / "all/saelens/here/layers.1/cfg.json"
    values = json.loads(cfg.read_text())
    values["metadata"]["hookpoint"] = "layers.0"
    cfg.write_text(json.dumps(values))
    export(ExportConfig(str(run), out=str(tmp_path / "all"), to="dictionary_learning"))
    assert list(load_many(tmp_path / "all", allow_pt=True)) == ["layers.0", "layers.1"]
    values["metadata"]["hookpoint"] = "layers.1"
    cfg.write_text(json.dumps(values))
    with pytest.raises(UsageError, match="holds two coders of layers.1"):
        load_many(tmp_path / "all", allow_pt=True)
    shutil.copy(cfg.parent / "sae_weights.safetensors", run / "step_5/layers.1")
    with pytest.raises(UsageError, match="has the files of sparsify and of sae_lens: keep one"):
        load_many(run / "step_5")


@pytest.mark.parametrize("to", ["sae_lens", "dictionary_learning", "circuit_tracer"])
def test_what_is_lost_of_prefixes_is_said(tmp_path: Path, to: Program) -> None:
    """A line for every coder, whatever the program."""
    kind = JUMPRELU["transcoder"] if to == "circuit_tracer" else KINDS["sae"]
    coder = random_coder(replace(kind, matryoshka=(0.25, 0.75)))
    names = [f"layers.{i}.mlp" for i in range(6)] if to == "circuit_tracer" else ["layers.1"]
    run = save_run(tmp_path / "run", dict.fromkeys(names, coder))
    (run / "run.json").write_text(json.dumps({"model": LM, "dataset": "x"}))
    _, notes = export(ExportConfig(str(run), out=str(tmp_path / "out"), to=to))
    for name in names:
        assert any(n.startswith(f"{name}: the sizes of its prefixes have no place") for n in notes)


@pytest.mark.parametrize("to", ["sae_lens", "dictionary_learning", "circuit_tracer"])
def test_thresholds_are_not_rounded_to_the_weights_bits(tmp_path: Path, to: Program) -> None:
    """Weights of bfloat16 go out as float32 where thresholds are compared with what they give."""
    coder = random_coder(JUMPRELU["transcoder" if to == "circuit_tracer" else "sae"])
    for parameter in coder.parameters():
        parameter.data = parameter.data.bfloat16()
    names = [f"layers.{i}.mlp" for i in range(6)] if to == "circuit_tracer" else ["layers.1"]
    run = save_run(tmp_path / "run", dict.fromkeys(names, coder))
    (run / "run.json").write_text(json.dumps({"model": LM, "dataset": "x"}))
    export(ExportConfig(str(run), out=str(tmp_path / "out"), to=to))
    back = load_many(tmp_path / "out", allow_pt=True)[names[0]]
    assert torch.equal(back.threshold, coder.threshold)
    # Where no bias is folded, the weights are still those of few bits.
    assert torch.equal(back.encoder.weight, coder.encoder.weight.float())


@pytest.mark.parametrize("to", ["sae_lens", "dictionary_learning"])
def test_runs_start_from_coders_of_any_program(tmp_path: Path, to: str) -> None:
    """--finetune copies their weights, of pickles with --allow_pt; another hookpoint is refused."""
    coder = random_coder(KINDS["sae"])
    run = save_run(tmp_path / "run", {"layers.1": coder})
    export(ExportConfig(str(run), out=str(tmp_path / "out"), to=to))
    bank = CoderBank({"layers.1": Widths(8, 8)}, KINDS["sae"], (0,), "cpu")
    pickled = to == "dictionary_learning"
    if pickled:
        with pytest.raises(UsageError, match="--finetune .* is a pickle.*--allow_pt"):
            bank.load_pretrained(str(tmp_path / "out"))
    bank.load_pretrained(str(tmp_path / "out"), pickled)
    assert torch.equal(bank["layers.1"].encoder.weight, coder.encoder.weight)
    elsewhere = CoderBank({"layers.2": Widths(8, 8)}, KINDS["sae"], (0,), "cpu")
    with pytest.raises(UsageError, match="it has no layers.2"):
        elsewhere.load_pretrained(str(tmp_path / "out"), pickled)
    wider = CoderBank({"layers.1": Widths(8, 8)}, SaeConfig(num_latents=32, k=3), (0,), "cpu")
    with pytest.raises(UsageError, match="--num_latents"):
        wider.load_pretrained(str(tmp_path / "out"), pickled)

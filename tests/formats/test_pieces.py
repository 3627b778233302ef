"""A coder in pieces opens as one, on any number of ranks, and is exported into one file."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from command_runs import call
from ranks_in_threads import on_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae import SaeConfig, SparseCoder, SparseCoderConfig, TranscoderConfig, UsageError, load_many
from sae.coders.sharded import ShardedCoder
from sae.formats import sparsify
from sae.formats.pieces import Part, Stored

KINDS = {
    "sae": SaeConfig(num_latents=23, k=3),
    "skip": TranscoderConfig(num_latents=23, k=3, skip_connection=True),
}


def save(folder: Path, cfg: SparseCoderConfig, size: int) -> dict[str, Tensor]:
    """Save a coder from so many ranks; what it holds as a whole."""
    d_out = 5 if cfg.transcode else 8
    whole = SparseCoder(8, cfg, d_out=d_out)
    for parameter in whole.parameters():
        parameter.data.normal_()
    state = {name: t.clone() for name, t in whole.state_dict().items()}

    def on_a_rank(group: Any) -> None:
        coder = ShardedCoder(group, 8, cfg, d_out=d_out)
        for name, parameter in coder.named_parameters():
            part = coder.piece and coder.piece.part_of(name)
            mine = part and (part.dim, part.indices.start, len(part.indices))
            parameter.data.copy_(state[name].narrow(*mine) if mine else state[name])
        coder.save_to_disk(folder)

    on_ranks(size, on_a_rank)
    return state


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_open_as_one_coder(tmp_path: Path, kind: str, size: int) -> None:
    """All tensors, in the reference's names, are those that were saved; so is any part of one."""
    state = save(tmp_path / "c", KINDS[kind], size)
    files = {f.name for f in (tmp_path / "c").iterdir()}
    pieces = {f"sae-{i}-of-{size}.safetensors" for i in range(1, size + 1)}
    assert files == {"cfg.json", "sae.safetensors.index.json", *pieces}
    loaded = load_many(tmp_path)["c"].state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    parts = {"encoder.weight": Part(0, range(3, 19)), "encoder.bias": Part(0, range(22, 23))}
    parts |= {"W_dec": Part(0, range(2, 9)), "b_dec": Part(0, range(1, 2))}
    with Stored(tmp_path / "c", "sae") as stored:
        for name, part in parts.items():
            expected = state[name][part.indices.start : part.indices.stop]
            assert torch.equal(stored.read(name, part), expected), name
        columns = stored.read("W_dec", Part(1, range(1, 4)))
        assert torch.equal(columns, state["W_dec"][:, 1:4])


def test_no_number_is_written_twice(tmp_path: Path) -> None:
    """The pieces together are as many numbers as the coder has."""
    state = save(tmp_path / "c", KINDS["skip"], 4)
    pieces = [load_file(f) for f in (tmp_path / "c").glob("*.safetensors")]
    count = sum(t.numel() for piece in pieces for t in piece.values())
    assert count == sum(t.numel() for t in state.values())


def _damage(folder: Path, kind: str) -> None:
    index, piece = folder / "sae.safetensors.index.json", folder / "sae-2-of-3.safetensors"
    values = json.loads(index.read_text())
    weight_map, dims = values["weight_map"], values["metadata"]["dims"]
    if kind == "not json":
        index.write_text("{")
    elif kind == "a list":
        index.write_text("[]")
    elif kind == "a piece is missing":
        piece.unlink()
    elif kind == "a piece is cut off":
        piece.write_bytes(piece.read_bytes()[:-9])
    elif kind == "a piece lacks a tensor":
        save_file({"W_dec": load_file(piece)["W_dec"]}, piece)
    elif kind == "a piece has other shapes":
        save_file({**load_file(piece), "W_dec": torch.zeros(7, 2)}, piece)
    elif kind == "a piece has no dimension":
        save_file({**load_file(piece), "encoder.bias": torch.zeros(())}, piece)
    elif kind == "too few pieces":
        weight_map["W_dec"].pop()
        index.write_text(json.dumps(values))
    elif kind == "no pieces":
        weight_map["W_dec"].clear()
        index.write_text(json.dumps(values))
    elif kind == "out of the folder":
        weight_map["W_dec"][0] = "../x.safetensors"
        index.write_text(json.dumps(values))
    elif kind == "no dimension":
        del dims["W_dec"]
        index.write_text(json.dumps(values))
    elif kind == "a wrong dimension":
        dims["encoder.bias"] = 1
        index.write_text(json.dumps(values))
    elif kind == "a dimension that is none":
        dims["W_dec"] = -1
        index.write_text(json.dumps(values))


DAMAGES = (
    *("not json", "a list", "a piece is missing", "a piece is cut off", "a piece lacks a tensor"),
    *("a piece has other shapes", "a piece has no dimension", "too few pieces", "no pieces"),
    *("out of the folder", "no dimension", "a wrong dimension", "a dimension that is none"),
)


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_pieces_are_refused(kind: str, tmp_path: Path) -> None:
    """Damage to the index or to a piece gives one line that names the file."""
    save(tmp_path / "c", KINDS["sae"], 3)
    _damage(tmp_path / "c", kind)
    with pytest.raises(UsageError, match="sae.safetensors.index.json"):
        SparseCoder.load_from_disk(tmp_path / "c")


def test_export_streams_pieces_into_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file has the numbers of the coder, and no more than a block of rows was in memory."""
    states = {name: save(tmp_path / "step_7" / name, KINDS[name], 3) for name in KINDS}
    (tmp_path / "step_7" / "whole").mkdir()
    whole = SparseCoder(8, KINDS["sae"], dtype=torch.bfloat16)
    whole.save_to_disk(tmp_path / "step_7" / "whole")
    states["whole"] = whole.state_dict()
    read, largest = Stored.read, [0]

    def noted(self: Stored, *arguments: Any) -> Tensor:
        tensor = read(self, *arguments)
        largest.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(Stored, "read", noted)
    monkeypatch.setattr(sparsify, "_BLOCK_BYTES", 100)
    out = tmp_path / "out"
    assert call(monkeypatch, "export", str(tmp_path), "--to", "sparsify", "--out", str(out)) == 0
    assert max(largest) <= 100
    assert capsys.readouterr().out.splitlines() == [f"coder  {out / n}" for n in sorted(states)]
    for name, state in states.items():
        assert {f.name for f in (out / name).iterdir()} == {"cfg.json", "sae.safetensors"}
        found = load_file(out / name / "sae.safetensors")
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in state.items())
        assert (out / name / "cfg.json").read_text() == (
            (tmp_path / "step_7" / name / "cfg.json").read_text()
        )
    assert call(monkeypatch, "export", str(tmp_path), "--out", str(out)) == 2
    assert f"--out {out}: already holds sae; give another folder" in capsys.readouterr().err


def test_what_cannot_be_exported_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No coders, a disk that is full, and a target that cannot be made: one line each."""
    (tmp_path / "empty").mkdir()
    run = partial(call, monkeypatch, "export")
    assert run(str(tmp_path / "empty"), "--out", str(tmp_path / "out")) == 2
    assert "holds no sparse coders" in capsys.readouterr().err
    save(tmp_path / "coders" / "c", KINDS["sae"], 2)
    (tmp_path / "file").write_text("")
    assert run(str(tmp_path / "coders"), "--out", str(tmp_path / "file")) == 2
    assert f"--out {tmp_path / 'file'}: c cannot be written" in capsys.readouterr().err

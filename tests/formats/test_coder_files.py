"""Files of coders have the reference's names, shapes and numbers; what is no coder is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae import Sae, SaeConfig, SparseCoder, UsageError, load_many
from sae.formats.coder_file import has_unit_rows

# Modules of Python that Windows lacks.
POSIX = ("fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "syslog", "readline")
REFERENCE = Path(__file__).parents[1] / "fixtures" / "reference"


@pytest.mark.parametrize("kind", ["sae", "transcoder", "groupmax"])
def test_coders_of_the_reference_load_with_their_numbers(kind: str) -> None:
    """A file of eai-sparsify 1.3.3 gives the latents, reconstruction and FVU it gave there."""
    coder = Sae.load_from_disk(REFERENCE / kind)
    expected = load_file(REFERENCE / f"{kind}.expected.safetensors")
    out = coder(expected["x"], expected["y"] if coder.cfg.transcode else None)
    torch.testing.assert_close(out.sae_out, expected["sae_out"])
    torch.testing.assert_close(out.fvu, expected["fvu"])
    ours, theirs = out.top_indices.sort(1).values, expected["latent_indices"].sort(1).values
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["sae", "transcoder", "groupmax"])
def test_files_have_the_reference_format(kind: str, tmp_path: Path) -> None:
    """What is saved has the reference's tensor names, shapes, types and config keys."""
    Sae.load_from_disk(REFERENCE / kind).save_to_disk(tmp_path)
    ours, theirs = (load_file(p / "sae.safetensors") for p in (tmp_path, REFERENCE / kind))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor)
    ours, theirs = (json.loads((p / "cfg.json").read_text()) for p in (tmp_path, REFERENCE / kind))
    assert ours == {**theirs, "d_out": theirs["d_in"]}


def test_loading_examples_of_the_reference_work(tmp_path: Path) -> None:
    """The reference README's ways to build, save, load and use a coder work with these imports."""
    for name in ("layers.10", "layers.2"):
        SparseCoder(8, SaeConfig(num_latents=16, k=2), device="cpu").save_to_disk(tmp_path / name)
    coders = load_many(tmp_path, local=True)
    assert list(coders) == ["layers.2", "layers.10"]
    assert list(Sae.load_many(str(tmp_path), layers=["layers.10"])) == ["layers.10"]
    assert list(Sae.load_many(str(tmp_path), pattern="*.2")) == ["layers.2"]
    coder = coders["layers.2"]
    x = torch.randn(3, 5, 8)
    latents = coder.encode(x)
    assert latents.top_acts.shape == latents.top_indices.shape == (3, 5, 2)
    out = coder(x)
    torch.testing.assert_close(coder.decode(*latents), out.sae_out)
    assert out.sae_out.shape == x.shape and out.top_acts.shape == (3, 5, 2)


def test_cfg_json_says_how_many_latents_there_are(tmp_path: Path) -> None:
    """num_latents is written as it is, however it was given, and expansion_factor as given."""
    coder = SparseCoder(8, SaeConfig(expansion_factor=4, k=2))
    coder.save_to_disk(tmp_path / "new")
    written = json.loads((tmp_path / "new/cfg.json").read_text())
    assert (written["num_latents"], written["expansion_factor"]) == (32, 4)
    coder.save_to_disk(tmp_path / "old")  # as it was written before, and by the reference
    (tmp_path / "old/cfg.json").write_text(json.dumps({**written, "num_latents": 0}))
    for name in ("new", "old"):
        loaded = Sae.load_from_disk(tmp_path / name)
        assert loaded.num_latents == 32
        assert torch.equal(loaded.encoder.weight, coder.encoder.weight)


def test_loading_a_coder_needs_no_posix() -> None:
    """`from sae import SparseCoder` loads and encodes where Python lacks the modules of POSIX."""
    code = (
        f"import sys\nfor name in {POSIX!r}:\n    sys.modules[name] = None\n"
        f"import torch\nfrom sae import SparseCoder\n"
        f"coder = SparseCoder.load_from_disk({str(REFERENCE / 'sae')!r})\n"
        f"print(*coder.encode(torch.ones(2, 10)).top_acts.shape)\n"
    )
    root = REFERENCE.parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "2 3\n", done.stderr


def test_the_decoder_can_be_left_out() -> None:
    """With decoder=False a coder encodes and has no W_dec."""
    coder = Sae.load_from_disk(REFERENCE / "sae", decoder=False)
    assert coder.W_dec is None
    assert coder.encode(torch.randn(2, 10)).top_acts.shape == (2, 3)


def _damage(folder: Path, kind: str) -> None:
    cfg, weights = folder / "cfg.json", folder / "sae.safetensors"
    values = json.loads(cfg.read_text())
    tensors = load_file(weights)
    if kind == "not json":
        cfg.write_text("{")
    elif kind == "no d_in":
        cfg.write_text("{}")
    elif kind == "wrong type":
        cfg.write_text(json.dumps({**values, "k": "3"}))
    elif kind == "huge":
        cfg.write_text(json.dumps({**values, "num_latents": 10**30}))
    elif kind == "other width":
        cfg.write_text(json.dumps({**values, "num_latents": 999_999_999}))
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-40])
    elif kind == "no weights":
        weights.unlink()
    elif kind == "foreign":
        save_file({"W_enc": torch.zeros(3, 3)}, weights)
    elif kind == "extra tensor":
        save_file({**tensors, "threshold": torch.zeros(3)}, weights)
    elif kind == "whole numbers":
        save_file({name: t.to(torch.int32) for name, t in tensors.items()}, weights)


@pytest.mark.parametrize(
    "kind",
    [
        "not json",
        "no d_in",
        "wrong type",
        "huge",
        "other width",
        "truncated",
        "no weights",
        "foreign",
        "extra tensor",
        "whole numbers",
    ],
)
def test_damaged_and_foreign_files_are_refused(kind: str, tmp_path: Path) -> None:
    """A file that is damaged or another tool's gives one readable line that names it."""
    Sae.load_from_disk(REFERENCE / "sae").save_to_disk(tmp_path / "c")
    _damage(tmp_path / "c", kind)
    with pytest.raises(UsageError, match="cfg.json|sae.safetensors"):
        Sae.load_from_disk(tmp_path / "c")


def test_names_that_lead_out_of_the_folder_are_refused(tmp_path: Path) -> None:
    """A hookpoint is the name of a folder of the coders, never a path to somewhere else."""
    SparseCoder(8, SaeConfig(num_latents=16, k=2)).save_to_disk(tmp_path / "outside")
    (tmp_path / "coders").mkdir()
    for name in ("../outside", str(tmp_path / "outside")):
        with pytest.raises(UsageError, match="not a path out of it"):
            load_many(tmp_path / "coders", layers=[name])
    with pytest.raises(UsageError, match="holds no sparse coders"):
        load_many(tmp_path / "coders")


def test_rows_count_as_unit_to_1e_5() -> None:
    """What docs/files.md promises of saved decoders is what decides how others' are read."""
    rows = torch.eye(4)
    assert has_unit_rows(rows * (1 + 8e-6)) and has_unit_rows(rows * (1 - 8e-6))
    rows[2] *= 1 + 1.2e-5
    assert not has_unit_rows(rows)

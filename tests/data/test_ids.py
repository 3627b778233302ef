"""Token ids on disk are read in their own width, or the file is refused with the way out."""

from pathlib import Path

import numpy as np
import pytest

from sae import DataConfig, ModelConfig, UsageError
from sae.data.text import load_tokens

IDS = np.random.default_rng(0).integers(1, 500, 4000)
LIMITS = (500, None)


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64"])
def test_every_width_is_read_where_it_is_named(dtype: str, tmp_path: Path) -> None:
    """--token_dtype says how wide the ids of a .bin are."""
    IDS.astype(dtype).tofile(tmp_path / "ids.bin")
    source = load_tokens(
        DataConfig(str(tmp_path / "ids.bin"), ctx_len=16, token_dtype=dtype), ModelConfig(), LIMITS
    )
    assert np.array_equal(source[3].ids, IDS[48:64])


@pytest.mark.parametrize(("dtype", "bits"), [("uint32", 32), ("int32", 32), ("int64", 64)])
def test_wider_ids_than_the_vocabulary_needs_are_refused(
    dtype: str, bits: int, tmp_path: Path
) -> None:
    """Read as uint16, every second id would be 0: the file is refused with the right width."""
    IDS.astype(dtype).tofile(tmp_path / "ids.bin")
    with pytest.raises(UsageError, match=f"{bits} bits wide. Set --token_dtype int{bits}"):
        load_tokens(DataConfig(str(tmp_path / "ids.bin"), ctx_len=16), ModelConfig(), LIMITS)


def test_files_that_say_their_width_need_no_flag(tmp_path: Path) -> None:
    """.npy files, in a row or in blocks, and .bin files with llm.c's header."""
    np.save(tmp_path / "row.npy", IDS.astype("int32"))
    np.save(tmp_path / "blocks.npy", IDS.astype("int64").reshape(-1, 20))
    header = np.zeros(256, "<i4")
    header[:3] = [20240520, 1, len(IDS)]
    (tmp_path / "llmc.bin").write_bytes(header.tobytes() + IDS.astype("uint16").tobytes())
    for name, length in {"row.npy": 16, "blocks.npy": 20, "llmc.bin": 16}.items():
        config = DataConfig(str(tmp_path / name), ctx_len=16)
        source = load_tokens(config, ModelConfig(), LIMITS)
        assert source.block_len == length and len(source) == 4000 // length
        assert np.array_equal(source[1].ids, IDS[length : 2 * length])


def test_npy_files_of_objects_are_refused(tmp_path: Path) -> None:
    """No pickle is read, and numbers that are no ids are named."""
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "floats.npy", np.ones(8))
    for name in ("objects.npy", "floats.npy"):
        with pytest.raises(UsageError, match=name):
            load_tokens(DataConfig(str(tmp_path / name), ctx_len=4), ModelConfig(), LIMITS)

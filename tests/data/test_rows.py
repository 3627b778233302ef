"""Rows that are damaged, empty or of another kind are named, left out and counted, or refused."""

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from datasets.exceptions import DatasetGenerationError
from token_data import load

from sae import DataConfig, UsageError
from sae.batch import TokenBatch
from sae.data.blocks import TokenSource
from sae.data.files import unreadable

TEXTS = [f"def f_{i}(x):\n    return {i}\n" for i in range(40)]
STREAM = {"streaming": True, "max_examples": 5}


def whole(source: TokenSource) -> TokenBatch:
    """All blocks as one batch."""
    return next(source.batches(torch.arange(len(source)), len(source)))


def table(**columns: Any) -> datasets.Dataset:
    return datasets.Dataset.from_dict(columns)


@pytest.mark.parametrize("more", [{}, STREAM], ids=["mapped", "streamed"])
@pytest.mark.parametrize("kind", ["json", "jsonl.gz"])
def test_bad_lines_are_named_in_every_file_of_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, more: dict[str, Any]
) -> None:
    """Under another name or compressed, a bad line is named by its number, or left out."""
    good = [json.dumps({"text": text}) for text in TEXTS]
    file, plain = tmp_path / f"docs.{kind}", tmp_path / "good.jsonl"
    text = "\n".join([*good[:20], '{"text": "never closed', *good[20:]]).encode()
    file.write_bytes(gzip.compress(text) if kind.endswith("gz") else text)
    with pytest.raises(UsageError, match=rf"docs\.{kind}: line 21 is no JSON .*--skip_bad_rows"):
        whole(load(str(file), **more))
    plain.write_text("\n".join(good))
    found = whole(load(str(file), skip_bad_rows=True, **more))
    assert "1 lines that are no JSON objects left out: 21" in capsys.readouterr().out
    assert torch.equal(found.ids, whole(load(str(plain), **more)).ids)


def test_a_damaged_array_is_named_by_its_line(tmp_path: Path) -> None:
    """A .json that is one array has no lines to leave out, and its error names where it ends."""
    (tmp_path / "docs.json").write_text('[{"text": "a"},\n{"text": "b"},\n{"text": oops}]')
    with pytest.raises(UsageError, match=r"docs\.json: line 3 is no JSON .*column 10"):
        load(str(tmp_path / "docs.json"))


def test_a_file_whose_lines_are_well_is_not_blamed(tmp_path: Path) -> None:
    """An error of another cause is said as it is, and no line of JSON is called damaged."""
    (tmp_path / "docs.json").write_text("\n".join([json.dumps({"text": "a"})] * 9))
    outer = DatasetGenerationError("An error occurred while generating the dataset")
    outer.__cause__ = OSError("the disk is gone")
    said = str(unreadable(DataConfig(str(tmp_path / "docs.json")), outer))
    assert "the disk is gone" in said and "no JSON" not in said


def test_skipping_is_refused_where_there_are_no_lines(tmp_path: Path) -> None:
    """--skip_bad_rows is never accepted and then not heeded."""
    table(text=TEXTS).save_to_disk(tmp_path / "saved")
    table(text=TEXTS).to_parquet(tmp_path / "docs.parquet")
    (tmp_path / "docs.json").write_text(json.dumps([{"text": text} for text in TEXTS]))
    for name in ("saved", "docs.parquet", "docs.json"):
        with pytest.raises(UsageError, match="--skip_bad_rows: is for files"):
            load(str(tmp_path / name), skip_bad_rows=True)


def test_rows_without_text_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """Null rows are left out, and their number is that of the rows asked for."""
    expected = whole(load(table(text=TEXTS))).ids
    capsys.readouterr()
    data = table(text=[None, None, *TEXTS])
    assert torch.equal(whole(load(data)).ids, expected)
    assert "2 of its 42 rows have no text" in capsys.readouterr().out
    assert torch.equal(whole(load(data.select(range(1, 42)))).ids, expected)
    assert "1 of its 41 rows have no text" in capsys.readouterr().out
    whole(load(data, **STREAM))
    assert "2 of 42 rows read together have no text" in capsys.readouterr().out
    ids = table(input_ids=[None, *[[i, i] for i in range(1, 9)]])
    assert whole(load(ids.select([3, 0, 1]), ctx_len=2)).ids.tolist() == [[3, 3], [1, 1]]
    assert "1 of its 3 rows have no input_ids" in capsys.readouterr().out


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_ids_are_not_packed_where_packing_is_off(streaming: bool) -> None:
    """Each ragged row is a sequence, without its own padding, cut, or padded behind."""
    rows = [[i] * (1 + i % 7) for i in range(1, 40)]
    mask = [[0] * (i % 2) + [1] * (len(row) - i % 2) for i, row in enumerate(rows)]
    read = [row[i % 2 :][:4] for i, row in enumerate(rows) if len(row) > i % 2]
    more = {"streaming": True, "max_examples": len(read) - 1} if streaming else {}
    data = table(input_ids=[None, *rows], attention_mask=[None, *mask])
    found = whole(load(data, ctx_len=4, pack=False, **more))
    assert found.attended is not None
    kept = [ids[m].tolist() for ids, m in zip(found.ids, found.attended, strict=True)]
    assert sorted(kept) == sorted(read) if streaming else kept == read
    even = table(input_ids=[[1, 2, 3], [4, 5, 6]])
    assert whole(load(even, ctx_len=8, pack=False)).ids.tolist() == [[1, 2, 3], [4, 5, 6]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"input_ids": [[1, None, 3, 4]] * 9}, "holds .1, None, 3, 4., which is no list of int"),
        ({"input_ids": [[1.5, 2.0, 3.0, 4.0]] * 9}, "which is no list of integers"),
        ({"input_ids": [[1, 2]] * 9, "attention_mask": [None, *[[1, 1]] * 8]}, "not as long as"),
    ],
)
def test_rows_that_are_no_ids_end_a_stream(columns: dict[str, Any], message: str) -> None:
    """No id of a stream is rounded, and a row that is none ends it in one line."""
    with pytest.raises(UsageError, match=message):
        whole(load(table(**columns), ctx_len=4, streaming=True, max_examples=2))


def test_a_column_of_strings_is_text_whatever_its_name() -> None:
    """Strings in `conversations` are text, of which nobody can ask for a role."""
    data = table(conversations=TEXTS)
    assert torch.equal(whole(load(data)).ids, whole(load(table(text=TEXTS))).ids)
    with pytest.raises(UsageError, match="which is no message"):
        load(data, chat_roles=("assistant",))


def test_columns_that_are_no_masks_are_not_read() -> None:
    """Beside input_ids a data set may have a column of any other name and type."""
    data = table(input_ids=[[1, 2, 3, 4]] * 9, counted=[0] * 9)
    assert whole(load(data, ctx_len=4)).counted is None
    with pytest.raises(UsageError, match="attention_mask is not as long"):
        load(table(input_ids=[[1, 2]] * 9, attention_mask=[1] * 9), ctx_len=2)

"""Which rows a name stands for: splits of folders, parts of splits, globs."""

import json
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from sae import DataConfig, UsageError
from sae.data.files import open_dataset


def write(file: Path, text: str, rows: int = 10) -> None:
    """A file of documents that all say the same."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps({"text": text}) + "\n" for _ in range(rows)))


def texts(name: Path | str, **flags: str) -> list[str]:
    """The documents that a name and a split stand for."""
    return list(open_dataset(DataConfig(str(name), **flags), None)["text"])


@pytest.mark.parametrize("names", ["{}.jsonl", "data/{}-00000-of-00001.jsonl", "{}/part.jsonl"])
def test_a_folder_has_the_splits_that_its_names_say(names: str, tmp_path: Path) -> None:
    """Text of the test split is never trained on."""
    for split in ("train", "test"):
        write(tmp_path / names.format(split), split)
    assert texts(tmp_path) == ["train"] * 10
    assert texts(tmp_path, split="test") == ["test"] * 10
    assert texts(tmp_path, split="train[:50%]") == ["train"] * 5
    with pytest.raises(UsageError, match="--split validation: .* of the splits train, test"):
        texts(tmp_path, split="validation")


def test_a_folder_without_splits_is_all_train(tmp_path: Path) -> None:
    """Names that say nothing are parts of one split."""
    write(tmp_path / "a.jsonl", "a")
    write(tmp_path / "b.jsonl", "b")
    assert sorted(texts(tmp_path)) == ["a"] * 10 + ["b"] * 10


def test_a_folder_that_cannot_be_told_apart_is_refused(tmp_path: Path) -> None:
    """A file beside a train file that names no split is neither read nor left out in silence."""
    write(tmp_path / "train.jsonl", "train")
    write(tmp_path / "more.jsonl", "more")
    with pytest.raises(UsageError, match=r"more\.jsonl names no split"):
        texts(tmp_path)


def test_files_and_globs_are_one_split_of_any_name(tmp_path: Path) -> None:
    """What is named outright is read, whatever it is called; parts of it by their share."""
    write(tmp_path / "test.jsonl", "test")
    write(tmp_path / "more.jsonl", "more")
    assert texts(tmp_path / "test.jsonl") == ["test"] * 10
    assert texts(tmp_path / "test.jsonl", split="train[:30%]") == ["test"] * 3
    assert sorted(texts(f"{tmp_path}/*.jsonl")) == ["more"] * 10 + ["test"] * 10


def test_parts_of_saved_data_sets(tmp_path: Path) -> None:
    """A folder saved by datasets knows its splits, and gives parts of them."""
    rows = {name: Dataset.from_dict({"text": [name] * 10}) for name in ("train", "test")}
    DatasetDict(rows).save_to_disk(tmp_path / "both")
    rows["train"].save_to_disk(tmp_path / "one")
    assert texts(tmp_path / "both", split="test[:20%]") == ["test"] * 2
    assert texts(tmp_path / "both") == ["train"] * 10
    assert texts(tmp_path / "one", split="train[5:]") == ["train"] * 5

"""No token of a text is lost or seen twice, whatever it is read from."""

import os
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from token_data import LM, VOCAB, documents, jsonl, load
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sae import DataConfig, ModelConfig, UsageError
from sae.data.blocks import TokenSource
from sae.data.files import parse_data_args
from sae.data.text import load_tokens


def stacked(source: TokenSource) -> torch.Tensor:
    """All blocks in order."""
    return torch.cat([batch.ids for batch in source.batches(torch.arange(len(source)), 7)])


def joined(texts: list[str]) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(LM)
    ids = []
    for text in texts:
        if text:
            ids += [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    return ids


def test_packing_loses_no_token(tmp_path: Path) -> None:
    """Blocks in order are the documents joined by the end token, cut every ctx_len tokens."""
    blocks = stacked(load(jsonl(tmp_path)))
    expected = joined(documents())
    whole = len(expected) // 32 * 32
    assert blocks.flatten().tolist() == expected[:whole]


def test_packing_does_not_depend_on_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process and three give the same blocks, though each tokenizes a part."""
    monkeypatch.setattr("sae.data.text.DOCUMENTS_PER_CALL", 50)
    one = stacked(load(jsonl(tmp_path), data_preprocessing_num_proc=1))
    monkeypatch.setattr("sae.data.text.DOCUMENTS_PER_CALL", 40)  # another cache entry
    three = stacked(load(jsonl(tmp_path), data_preprocessing_num_proc=3))
    assert torch.equal(one, three)


def test_a_stream_gives_the_packed_blocks_in_an_order_of_its_own(tmp_path: Path) -> None:
    """A stream holds every token of the data, resumes at any block, and repeats itself."""
    source = load(jsonl(tmp_path), streaming=True, max_examples=59, shuffle_seed=3)
    assert len(source) == 60
    blocks = stacked(source)
    again = load(jsonl(tmp_path), streaming=True, max_examples=59, shuffle_seed=3)
    late = torch.cat([batch.ids for batch in again.batches(torch.arange(17, 60), 4)])
    assert torch.equal(late, blocks[17:])
    saved = datasets.Dataset.from_dict({"text": documents()})
    assert stacked(load(saved, streaming=True, max_examples=59)).shape == blocks.shape
    with pytest.raises(UsageError, match="the stream: holds token .*MODEL has 100 tokens"):
        stacked(load(jsonl(tmp_path), streaming=True, max_examples=59, limits=(100, None)))
    other = stacked(load(jsonl(tmp_path), streaming=True, max_examples=59, shuffle_seed=4))
    assert not torch.equal(other, blocks)
    everything = len(joined(documents())) // 32
    longer = load(jsonl(tmp_path), streaming=True, max_examples=everything)
    with pytest.raises(UsageError, match=f"ended before sequence {everything}.*--max_examples"):
        stacked(longer)


def test_all_kinds_of_files_give_the_same_blocks(tmp_path: Path) -> None:
    """json, parquet, a saved folder, a folder of files and a Dataset give the same blocks."""
    expected = stacked(load(jsonl(tmp_path)))
    data = datasets.Dataset.from_dict({"text": documents()})
    data.to_parquet(str(tmp_path / "docs.parquet"))
    data.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "folder").mkdir()
    data.select(range(150)).to_json(str(tmp_path / "folder" / "a.jsonl"))
    data.select(range(150, len(data))).to_json(str(tmp_path / "folder" / "b.jsonl"))
    for source in ("docs.parquet", "saved", "folder"):
        assert torch.equal(stacked(load(str(tmp_path / source))), expected), source
    assert torch.equal(stacked(load(data)), expected)


def test_a_saved_data_set_may_lie_where_nothing_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens are then kept in the cache of `datasets`, by data and column; else beside the data."""
    data = datasets.Dataset.from_dict({"text": documents(), "other": documents()[::-1]})
    data.save_to_disk(str(tmp_path / "saved"))
    data.select(range(100)).save_to_disk(str(tmp_path / "part"))
    cache, access = tmp_path / "cache", os.access
    monkeypatch.setattr("sae.data.files.HF_DATASETS_CACHE", cache)

    def read_only(path: Path, mode: int) -> bool:
        inside = Path(path).is_relative_to(tmp_path) and not Path(path).is_relative_to(cache)
        return not (inside and mode == os.W_OK) and access(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(os, "access", read_only)
        given = [("saved", "text"), ("saved", "other"), ("part", "text"), ("saved", "text")]
        found = [stacked(load(str(tmp_path / n), text_column=c)) for n, c in given]
        patch.setattr("sae.data.text.DOCUMENTS_PER_CALL", 50)
        three = load(str(tmp_path / "saved"), data_preprocessing_num_proc=3)
        assert torch.equal(stacked(three), found[0])
    assert not list(tmp_path.glob("[ps]a*/cache-*"))  # in saved/ and part/
    assert len({file.name[:22] for file in cache.glob("cache-*.arrow")}) == 3
    assert torch.equal(found[0], stacked(load(jsonl(tmp_path)))) and torch.equal(found[0], found[3])
    assert not torch.equal(found[0], found[1]) and len(found[2]) < len(found[0])
    load(str(tmp_path / "saved"), text_column="other")
    assert len(list((tmp_path / "saved").glob("cache-*.arrow"))) == 1


def test_a_text_file_is_a_document(tmp_path: Path) -> None:
    """Lines of a .txt file stay together."""
    (tmp_path / "a.txt").write_text("one line\nanother line\n" * 50)
    blocks = stacked(load(str(tmp_path / "a.txt"), ctx_len=16))
    text = AutoTokenizer.from_pretrained(LM).decode(blocks[0])
    assert text.startswith("one line\nanother line")


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_binary_token_files_are_read_as_they_are(
    tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture
) -> None:
    """A .bin file is read as it is, typed by vocabulary or flag; a partial block is announced."""
    ids = np.arange(70, dtype=dtype)
    ids.tofile(tmp_path / "ids.bin")
    vocab = 4096 if dtype == "uint16" else 100_000
    blocks = stacked(load(str(tmp_path / "ids.bin"), limits=(vocab, None)))
    assert blocks.flatten().tolist() == list(range(64))
    assert "last 6 tokens" in capsys.readouterr().out
    forced = stacked(load(str(tmp_path / "ids.bin"), token_dtype=dtype))
    assert torch.equal(forced, blocks)


def test_pretokenized_rows_are_used_as_they_are() -> None:
    """Rows of input_ids, selected and shuffled or not, and tensors are the blocks."""
    rows = torch.arange(120).view(10, 12)
    data = datasets.Dataset.from_dict({"input_ids": rows.tolist()})
    assert torch.equal(stacked(load(data)), rows)
    assert torch.equal(stacked(load(data.select([4, 1]))), rows[[4, 1]])
    assert torch.equal(stacked(load(rows)), rows)
    assert load(rows).block_len == 12


def test_blocks_start_as_the_tokenizer_starts_a_text(tmp_path: Path) -> None:
    """Where the tokenizer begins every text with BOS, every block does, and no token is lost."""
    bpe = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "a": 2, "b": 3}, unk_token="b"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    words = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    words.save_pretrained(tmp_path / "words")
    with pytest.raises(UsageError, match="--ctx_len 1: what the tokenizer puts first"):
        load(jsonl(tmp_path), tokenizer=str(tmp_path / "words"), ctx_len=1)
    blocks = stacked(
        load(jsonl(tmp_path, ["a b a", "b b"] * 5), tokenizer=str(tmp_path / "words"), ctx_len=5)
    )
    assert blocks[:, 0].tolist() == [0] * len(blocks)
    expected = [2, 3, 2, 1, 3, 3, 1] * 5
    assert blocks[:, 1:].flatten().tolist() == expected[: len(blocks) * 4]
    stream = load(
        jsonl(tmp_path, ["a b a"] * 9),
        tokenizer=str(tmp_path / "words"),
        ctx_len=5,
        streaming=True,
        max_examples=3,
    )
    assert stacked(stream)[:, 0].tolist() == [0] * 4


def test_tokenization_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second load of the same text does not tokenize again."""
    path = jsonl(tmp_path, [f"cached {tmp_path} {i}" for i in range(200)])
    first = stacked(load(path))

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("tokenized again")

    kind = type(AutoTokenizer.from_pretrained(LM))
    call = kind.__call__
    # A string is the loader's look at what the tokenizer adds; a list is a batch of documents.
    monkeypatch.setattr(
        kind, "__call__", lambda s, t, **k: call(s, t, **k) if isinstance(t, str) else fail()
    )
    assert torch.equal(stacked(load(path)), first)


def test_bad_data_is_refused_in_one_line(tmp_path: Path) -> None:
    """Each kind of bad data is refused by flag or name before training."""
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "odd.bin").write_bytes(b"123")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "mixed").mkdir()
    for name in ("note.txt", "docs.jsonl"):
        (tmp_path / "mixed" / name).write_text("a note")
    numbers = datasets.Dataset.from_dict({"text": [3, 4]})
    shutil.copytree(LM, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{not json\n')
    ragged = datasets.Dataset.from_dict({"input_ids": [[1, 2], [3]]})
    cases = [
        (jsonl(tmp_path), {"text_column": "content"}, "--text_column content.*columns text"),
        (str(tmp_path / "empty.jsonl"), {}, "file is empty"),
        (str(tmp_path / "odd.bin"), {}, "3 bytes are not whole uint16 tokens"),
        (str(tmp_path / "missing.bin"), {}, "no such file"),
        (str(tmp_path / "nothing"), {}, "nothing here that can be read"),
        (str(tmp_path / "bad.jsonl"), {}, r"bad.jsonl: line 2 is no JSON object.*--skip_bad_rows"),
        ("no-such/data-set", {}, "DATASET no-such/data-set"),
        (jsonl(tmp_path), {"ctx_len": 10**6}, "less than one block"),
        (ragged, {}, "3 tokens are less than one block of 32"),
        (torch.full((4, 8), 64), {"limits": (64, None)}, "holds token 64.*64 tokens"),
        (jsonl(tmp_path), {"limits": (100, None)}, "MODEL has 100 tokens"),
        (torch.zeros(3), {}, "integer token ids"),
        (jsonl(tmp_path), {"limits": (VOCAB, 31)}, "--ctx_len 32: MODEL has 31 positions"),
        (torch.ones(4, 9, dtype=int), {"limits": (VOCAB, 8)}, "--ctx_len 9: MODEL has 8"),
        (torch.full((4, 8), -1), {}, "holds token -1"),
        (datasets.Dataset.from_dict({"input_ids": [[1.5]]}), {}, "not lists of integers"),
        (str(tmp_path / "mixed"), {}, "holds .jsonl and .txt files"),
        (numbers, {}, "--text_column text: holds 3, which is not text"),
        (jsonl(tmp_path), {"tokenizer": str(tmp_path / "mute")}, "it has no tokenizer"),
        (jsonl(tmp_path), {"data_args": "a=b,c"}, "--data_args"),
        (jsonl(tmp_path), {"tokenizer": "", "model": None}, "its tokenizer is not known"),
        (jsonl(tmp_path), {"exclude_tokens": (VOCAB,)}, "--exclude_tokens 4096: .*0 to 4095"),
        (jsonl(tmp_path), {"tokenizer": "no-such/model"}, "its tokenizer cannot be loaded"),
    ]
    for source, options, message in cases:
        with pytest.raises(UsageError, match=message):
            load(source, **options)


def test_data_args_are_typed() -> None:
    """Values of --data_args become numbers, booleans or strings."""
    parsed = parse_data_args("name=en, n=3,p=0.5,flag=true,x=None")
    assert parsed == {"name": "en", "n": 3, "p": 0.5, "flag": True, "x": None}
    assert parse_data_args("") == {}


def test_all_tokens_that_begin_a_text_begin_a_block(tmp_path: Path) -> None:
    """A tokenizer that starts a text with two tokens, as GLM's does, starts every block so."""
    bpe = Tokenizer(
        models.WordLevel({"[gMASK]": 0, "<sop>": 1, "</s>": 2, "a": 3, "b": 4}, unk_token="b")
    )
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [("[gMASK]", 0), ("<sop>", 1)]
    bpe.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A", special_tokens=special
    )
    words = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="</s>")
    words.save_pretrained(tmp_path / "words")
    (tmp_path / "text.txt").write_text("a b " * 50)
    data = DataConfig(str(tmp_path / "text.txt"), ctx_len=6)
    source = load_tokens(data, ModelConfig(str(tmp_path / "words")), (5, None))
    assert [source[i].ids.tolist() for i in (0, 9)] == [[0, 1, 3, 4, 3, 4]] * 2

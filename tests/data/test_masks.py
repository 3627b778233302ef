"""Padding, context and one document per sequence: masks beside ids, by plain numpy."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import zstandard
from token_data import LM, VOCAB, jsonl, load
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sae import UsageError
from sae.batch import TokenBatch
from sae.config import DataConfig, ModelConfig
from sae.data.blocks import TokenSource
from sae.data.text import load_tokens

PACKED = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.ZstdCompressor().compress,
}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "Four, I think."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]


def whole(source: TokenSource, count: int | None = None) -> TokenBatch:
    """All blocks, or the first few, as one batch."""
    length = len(source) if count is None else count
    return next(source.batches(torch.arange(length), length))


def stream_or_not(data: datasets.Dataset, streaming: bool, **flags: Any) -> TokenSource:
    more = {"streaming": True, "max_examples": len(data) - 1} if streaming else {}
    return load(data, **more, **flags)


@pytest.fixture(scope="module")
def chat_lm(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The demo LM's tokenizer with a chat template."""
    tokenizer = AutoTokenizer.from_pretrained(LM)
    tokenizer.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("chat_lm")
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text((LM / "config.json").read_text())
    return str(folder)


def test_attention_masks_hide_padding(tmp_path: Path) -> None:
    """Zeros in `attention_mask` are padding, which is put behind what is read; ones are nothing."""
    ids = [[9, 9, 1, 2], [3, 4, 5, 6], [7, 9, 9, 9]]
    mask = [[0, 0, 1, 1], [1, 1, 1, 1], [1, 0, 0, 0]]
    data = datasets.Dataset.from_dict({"input_ids": ids, "attention_mask": mask})
    found = whole(load(data))
    assert found.attended is not None
    assert [row[m].tolist() for row, m in zip(found.ids, found.attended, strict=True)] == [
        [1, 2],
        [3, 4, 5, 6],
        [7],
    ]
    assert found.attended[0].tolist() == [True, True, False, False]
    ones = datasets.Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 4] * 3})
    assert whole(load(ones)).attended is None
    assert load(ones).fingerprint != load(data).fingerprint
    stream = load(data, streaming=True, max_examples=2, ctx_len=4, eval_tokens=4)
    assert {tuple(r.tolist()) for b in stream.batches(torch.arange(3), 1) for r in b.ids} == {
        (1, 2, 9, 9),
        (3, 4, 5, 6),
        (7, 9, 9, 9),
    }
    short = datasets.Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * 3] * 3})
    with pytest.raises(UsageError, match="attention_mask is not as long as its input_ids"):
        load(short)


@pytest.mark.parametrize("streaming", [False, True])
def test_ids_of_unlike_lengths_are_joined(streaming: bool) -> None:
    """Ragged rows, null ones aside, are packed into blocks as they are, padding left out."""
    rows = [[i] * (1 + i % 5) for i in range(1, 40)]
    rows[7] = None
    expected = [i for row in rows if row is not None for i in row]
    data = datasets.Dataset.from_dict({"input_ids": rows})
    blocks = len(expected) // 8
    more = {"streaming": True, "max_examples": blocks - 1, "eval_tokens": 8} if streaming else {}
    found = whole(load(data, ctx_len=8, **more), blocks).ids.flatten().tolist()
    if streaming:  # shuffled row by row
        assert len(found) == 8 * blocks and set(found) <= set(expected)
    else:
        assert found == expected[: 8 * blocks]
        mask = [None if row is None else [0] + [1] * (len(row) - 1) for row in rows]
        masked = datasets.Dataset.from_dict({"input_ids": rows, "attention_mask": mask})
        read = [i for row in rows if row is not None for i in row[1:]]
        found = whole(load(masked, ctx_len=8)).ids.flatten().tolist()
        assert found == read[: len(read) // 8 * 8]


def test_ids_need_no_tokenizer_and_an_explicit_text_column_wins(tmp_path: Path) -> None:
    """`input_ids` are read, in streams too, without a tokenizer; `--text_column` reads the text."""
    data = datasets.Dataset.from_dict({"input_ids": [[1] * 8] * 9, "text": ["def f(x):\n"] * 9})
    for more in ({}, {"streaming": True, "max_examples": 8, "eval_tokens": 8}):
        cfg = DataConfig(**{"ctx_len": 8, "eval_tokens": 1, **more})
        source = load_tokens(cfg, ModelConfig("none"), (VOCAB, None), "no-such/model", data)
        assert bool((whole(source).ids == 1).all())
    text = load(data, ctx_len=8, text_column="text")
    tokenizer = AutoTokenizer.from_pretrained(LM)
    one = [*tokenizer("def f(x):\n").input_ids, tokenizer.eos_token_id]
    assert whole(text).ids.flatten().tolist() == (one * 9)[: len(text) * 8]


@pytest.mark.parametrize("streaming", [False, True])
def test_one_document_per_sequence(tmp_path: Path, streaming: bool) -> None:
    """Without packing a sequence is a document with its end token, cut, or padded behind it."""
    texts = ["def f(x):\n", "x = 1\n" * 40, "return"] * 4
    tokenizer = AutoTokenizer.from_pretrained(LM)
    expected = [[*tokenizer(t).input_ids, tokenizer.eos_token_id][:16] for t in texts]
    data = datasets.Dataset.from_dict({"text": texts})
    found = whole(stream_or_not(data, streaming, pack=False, ctx_len=16))
    assert found.attended is not None
    rows = [ids[m].tolist() for ids, m in zip(found.ids, found.attended, strict=True)]
    assert sorted(rows) == sorted(expected) if streaming else rows == expected


def test_what_begins_a_text_begins_every_document(tmp_path: Path) -> None:
    """With --bos_per_document documents begin with it, and blocks do not unless they are one."""
    tokenizer = AutoTokenizer.from_pretrained(LM)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    inner = tokenizer.backend_tokenizer
    from tokenizers.processors import TemplateProcessing

    begin = tokenizer.bos_token_id
    inner.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token=tokenizer.eos_token
    ).save_pretrained(tmp_path / "bos")
    data = datasets.Dataset.from_dict({"text": ["def f(x):\n"] * 40})
    body = tokenizer("def f(x):\n", add_special_tokens=False).input_ids
    document = [begin, *body, tokenizer.eos_token_id]
    limits, name = (VOCAB + 1, None), str(tmp_path / "bos")
    found = whole(load(data, limits, name, bos_per_document=True)).ids
    assert found.flatten().tolist() == (document * 40)[: found.numel()]
    assert bool((whole(load(data, limits, name)).ids[:, 0] == begin).all())


def test_an_end_token_can_be_named(tmp_path: Path) -> None:
    """--eos_token, by text or number, ends documents; without any the error names the flag."""
    data = datasets.Dataset.from_dict({"text": ["return"] * 40})
    tokenizer = AutoTokenizer.from_pretrained(LM)
    body = tokenizer("return").input_ids
    word = tokenizer.convert_ids_to_tokens(7)
    for given in ("7", word):
        found = whole(load(data, eos_token=given)).ids.flatten().tolist()
        assert found == ([*body, 7] * 40)[: len(found)]
    with pytest.raises(UsageError, match="--eos_token <none>: is no token"):
        load(data, eos_token="<none>")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(
        tmp_path / "endless"
    )
    with pytest.raises(UsageError, match="no end token .*--eos_token"):
        load(data, tokenizer=str(tmp_path / "endless"))
    assert len(load(data, tokenizer=str(tmp_path / "endless"), eos_token="7"))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_of_chats_the_roles_asked_for_are_trained_on(
    chat_lm: str, column: str, streaming: bool
) -> None:
    """A chat is its template's text; with --chat_roles only what these said is counted."""
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    chat = (
        CHAT
        if column == "messages"
        else [{"from": names[m["role"]], "value": m["content"]} for m in CHAT]
    )
    data = datasets.Dataset.from_dict({column: [chat] * 12})
    tokenizer = AutoTokenizer.from_pretrained(chat_lm)
    text = "".join(f"<{m['role']}> {m['content']}\n" for m in CHAT)
    ids = tokenizer(text).input_ids
    flags = {"tokenizer": chat_lm, "pack": False, "ctx_len": 80}
    found = whole(stream_or_not(data, streaming, **flags))
    assert found.counted is None and found.ids[0][: len(ids)].tolist() == ids
    found = whole(stream_or_not(data, streaming, chat_roles=("assistant",), **flags))
    assert found.counted is not None and found.attended is not None
    said = tokenizer.decode(found.ids[0][found.counted[0]])
    assert said.split() == ["Four,", "I", "think.", "Yes."]
    assert int(found.attended[0].sum()) == len(ids)
    packed = whole(stream_or_not(data, streaming, chat_roles=("user",), tokenizer=chat_lm), 5)
    assert packed.counted is not None
    everything = tokenizer.decode(packed.ids[packed.counted])
    assert "Two and two" in everything and "Four" not in everything and "brief" not in everything


def test_chats_that_cannot_be_read_are_refused(chat_lm: str, tmp_path: Path) -> None:
    """No template, roles of what is no chat, and templates that rewrite the past, each by name."""
    data = datasets.Dataset.from_dict({"messages": [CHAT] * 4})
    with pytest.raises(UsageError, match="no chat template"):
        load(data)
    with pytest.raises(UsageError, match="--chat_roles user: column text"):
        load(datasets.Dataset.from_dict({"text": ["a"]}), chat_roles=("user",))
    odd = datasets.Dataset.from_dict({"messages": [[{"speaker": "me", "said": "x" * 5000}]]})
    with pytest.raises(UsageError, match="no message with role") as raised:
        load(odd, tokenizer=chat_lm)
    assert len(str(raised.value)) < 400
    tokenizer = AutoTokenizer.from_pretrained(chat_lm)
    tokenizer.chat_template = "{{ messages | length }} messages: {{ messages[-1].content }}"
    tokenizer.save_pretrained(tmp_path / "odd")
    with pytest.raises(UsageError, match="--chat_roles: the template changes earlier"):
        load(data, tokenizer=str(tmp_path / "odd"), chat_roles=("assistant",))


@pytest.mark.parametrize(
    "kind",
    ["csv", "tsv", "arrow", "parquet", *(f"jsonl.{end}" for end in PACKED), "json.gz", "txt.gz"],
)
def test_every_format_holds_the_same_text(tmp_path: Path, kind: str) -> None:
    """The same documents in another format give the same tokens."""
    texts = [f"def f_{i}(x):\n    return 'a, b\t{i}'\n" for i in range(40)]
    data, file = datasets.Dataset.from_dict({"text": texts}), tmp_path / f"docs.{kind}"
    if kind == "txt.gz":  # a file is a document
        file.write_bytes(gzip.compress("".join(texts).encode()))
        data = datasets.Dataset.from_dict({"text": ["".join(texts)]})
    elif kind == "json.gz":
        file.write_bytes(gzip.compress(json.dumps([{"text": text} for text in texts]).encode()))
    elif kind.startswith("jsonl."):
        file.write_bytes(PACKED[file.suffix[1:]](Path(jsonl(tmp_path, texts)).read_bytes()))
    elif kind in ("csv", "tsv"):
        data.to_csv(file, sep="\t" if kind == "tsv" else ",", index=False)
    elif kind == "parquet":
        data.to_parquet(file)
    else:
        data.save_to_disk(tmp_path / "saved")
        (tmp_path / "saved/data-00000-of-00001.arrow").rename(file)
    assert torch.equal(whole(load(str(file))).ids, whole(load(data)).ids)


def test_zst_files_say_what_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without zstandard the line says to install it."""
    (tmp_path / "docs.jsonl.zst").write_bytes(b"1")
    monkeypatch.setattr("sae.data.files.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install zstandard"):
        load(str(tmp_path / "docs.jsonl.zst"))


@pytest.mark.parametrize("streaming", [False, True])
def test_bad_lines_are_named_or_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], streaming: bool
) -> None:
    """A line that is no JSON is named by file and number; --skip_bad_rows counts and passes it."""
    good = [json.dumps({"text": f"x = {i}\n" * 20}) for i in range(30)]
    lines = [*good[:20], '{"text": "never closed', *good[20:]]
    file = tmp_path / "docs.jsonl"
    file.write_text("\n".join(lines))
    more = {"streaming": True, "max_examples": 20} if streaming else {}
    with pytest.raises(UsageError, match=r"docs\.jsonl: line 21 is no JSON object"):
        whole(load(str(file), **more))
    source = load(str(file), skip_bad_rows=True, **more)
    assert "1 lines that are no JSON objects left out: 21" in capsys.readouterr().out
    (tmp_path / "good.jsonl").write_text("\n".join(good))
    expected = whole(load(str(tmp_path / "good.jsonl"), **more)).ids
    assert torch.equal(whole(source).ids, expected)

"""Documents to token ids: text with an end token behind it, and chats by their template."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..config import DataConfig, ModelConfig
from ..flag_checks import UsageError
from .chats import counted_tokens, messages_of, render, spans_of

DOCUMENTS_PER_CALL = 1000
CHAT_COLUMNS = ("messages", "conversations")


class Document(NamedTuple):
    """Token ids, and with --chat_roles which of them are trained on."""

    ids: list[int]
    counted: list[bool] | None = None


@dataclass(frozen=True)
class Encoder:
    """How a column's documents become token ids; `datasets` fingerprints it, and all in it."""

    tokenizer: PreTrainedTokenizerBase
    column: str
    end: int
    lead: tuple[int, ...]
    """What comes before every document."""
    roles: tuple[str, ...]
    length: int | None
    """Without packing, the length that documents are cut and padded to."""

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Columns of `input_ids`, and of masks where there are any, of all but empty documents."""
        documents = [self._with_lead(found) for found in self.documents(batch[self.column])]
        columns: dict[str, list[Any]] = {"input_ids": [], **{name: [] for name in self.masks}}
        for ids, counted in documents:
            padding = 0 if self.length is None else max(0, self.length - len(ids))
            kept = ids[: self.length]
            columns["input_ids"].append(kept + [self.end] * padding)
            if "attention_mask" in columns:
                columns["attention_mask"].append([True] * len(kept) + [False] * padding)
            if "counted" in columns:
                assert counted is not None
                columns["counted"].append(counted[: self.length] + [False] * padding)
        return columns

    @property
    def masks(self) -> list[str]:
        """The columns of masks beside `input_ids`."""
        return ["attention_mask"] * (self.length is not None) + ["counted"] * bool(self.roles)

    def documents(self, column: list[Any]) -> Iterator[Document]:
        """The token ids of a column's documents, each with its end token."""
        texts = [text for text in column if text]
        are_strings = bool(texts) and isinstance(texts[0], str)
        if self.column in CHAT_COLUMNS and (self.roles or not are_strings):
            yield from map(self._chat, texts)
            return
        if strange := next((text for text in texts if not isinstance(text, str)), None):
            raise UsageError(
                f"--text_column {self.column}: holds {repr(strange)[:80]}, which is not text"
            )
        if texts:
            # Long documents are the point of packing: the length warning does not apply.
            ids: Any = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
            yield from (Document([*document, self.end]) for document in ids)

    def _chat(self, chat: Any) -> Document:
        messages = messages_of(chat, self.column)
        text = render(self.tokenizer, messages, self.column)
        found: Any = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=bool(self.roles), verbose=False
        )
        if not self.roles:
            return Document(found["input_ids"])
        spans = spans_of(self.tokenizer, messages, self.column)
        return Document(
            found["input_ids"], counted_tokens(found["offset_mapping"], spans, self.roles)
        )

    def _with_lead(self, document: Document) -> Document:
        if document.ids[: len(self.lead)] == list(self.lead):  # a template begins so itself
            return document
        counted = document.counted
        return Document(
            [*self.lead, *document.ids],
            None if counted is None else [*([False] * len(self.lead)), *counted],
        )


def load_tokenizer(name: str, model: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the LM. Raises UsageError for one that cannot read text."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=model.revision, token=model.hf_token, trust_remote_code=False
        )
    except Exception as error:  # each tokenizer's backend has errors of its own
        reason = " ".join(str(error).split())[:300]
        raise UsageError(f"MODEL {name}: its tokenizer cannot be loaded. {reason}") from None
    if not tokenizer("text").input_ids:
        raise UsageError(f"MODEL {name}: it has no tokenizer; give token ids (.bin, input_ids)")
    return tokenizer


def end_token(tokenizer: PreTrainedTokenizerBase, cfg: DataConfig) -> int:
    """The token that ends a document. Raises UsageError where there is none."""
    if cfg.eos_token is not None:
        if cfg.eos_token.isdecimal() and int(cfg.eos_token) < len(tokenizer):
            return int(cfg.eos_token)
        if cfg.eos_token in tokenizer.get_vocab():
            return tokenizer.get_vocab()[cfg.eos_token]
        raise UsageError(
            f"--eos_token {cfg.eos_token}: is no token of the tokenizer; give one, or its number"
        )
    own = (tokenizer.eos_token_id, tokenizer.sep_token_id)
    found = next((token for token in own if isinstance(token, int)), None)
    if found is None:
        raise UsageError(
            f"MODEL {tokenizer.name_or_path}: its tokenizer has no end token to put between "
            f"documents: name one by --eos_token"
        )
    return found


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer puts before a text: nothing, BOS, or several tokens."""
    bare = tokenizer("text", add_special_tokens=False).input_ids
    whole = tokenizer("text").input_ids
    before = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), None)
    if before is None:  # its first tokens change the ones behind them
        special = set(tokenizer.all_special_ids)
        before = next((i for i, token in enumerate(whole) if token not in special), 0)
    return tuple(whole[:before])

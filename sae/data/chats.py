"""Chats to text by the tokenizer's template, and which of it each role said."""

from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from ..flag_checks import UsageError

_ROLES = {"human": "user", "gpt": "assistant"}
"""The usual names for those of messages with `from` and `value`."""


class Span(NamedTuple):
    """A part of a chat's text, up to a character, and the role that said it."""

    end: int
    role: str


def messages_of(chat: Any, column: str) -> list[dict[str, str]]:
    """The messages of a chat. Raises UsageError for what is none."""
    found = []
    for item in chat if isinstance(chat, list) else [chat]:
        if isinstance(item, dict) and isinstance(item.get("role"), str):
            found.append({"role": item["role"], "content": item.get("content") or ""})
        elif isinstance(item, dict) and isinstance(item.get("from"), str):
            role = _ROLES.get(item["from"], item["from"])
            found.append({"role": role, "content": item.get("value") or ""})
        else:
            raise UsageError(
                f"--text_column {column}: holds {repr(item)[:80]}, which is no message with role "
                f"and content (or from and value)"
            )
    return found


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    column: str,
    reply_next: bool = False,
) -> str:
    """The text of messages by the template. Raises UsageError where the template has none."""
    if not tokenizer.chat_template:
        raise UsageError(
            f"--text_column {column}: holds chats, and the tokenizer has no chat template: name a "
            f"column of text, or take the tokenizer of a chat model"
        )
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=reply_next
        )
    except Exception as error:  # a template raises what it likes
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"--text_column {column}: the template refuses a chat. {reason}") from None
    assert isinstance(text, str)
    return text


def spans_of(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], column: str
) -> list[Span]:
    """Who said what of the text that `render` gives for all messages.

    A message is what its text has more than the text of those before it. What the template puts in
    front of a reply is said by nobody. Raises UsageError for a template that changes what came
    before.
    """
    spans: list[Span] = []
    before = ""
    for count, message in enumerate(messages, start=1):
        try:
            text = render(tokenizer, messages[:count], column)
        except UsageError:  # some want a user's message behind the system's
            if count == len(messages) or message["role"] != "system":
                raise
            continue
        if not text.startswith(before):
            raise UsageError(
                f"--chat_roles: the template changes earlier messages when later ones come, so "
                f"nobody can say which tokens are whose: leave the flag out, or give another "
                f"template. After {count} messages of column {column}: {text[:80]!r}"
            )
        if message["role"] == "assistant" and count > 1:
            opened = render(tokenizer, messages[: count - 1], column, reply_next=True)
            if text.startswith(opened):
                spans.append(Span(len(opened), ""))
        spans.append(Span(len(text), message["role"]))
        before = text
    return spans


def counted_tokens(
    offsets: list[tuple[int, int]], spans: list[Span], roles: tuple[str, ...]
) -> list[bool]:
    """Which tokens one of the `roles` said: a token is of the part of its last character."""
    counted, at = [], 0
    for _, end in offsets:
        while at < len(spans) - 1 and end > spans[at].end:
            at += 1
        counted.append(spans[at].role in roles)
    return counted

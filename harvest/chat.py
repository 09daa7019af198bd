"""Chats: lists of messages, rendered by the tokenizer's own chat template, with the tokens of each role told apart.

A source gives a chat as a document whose text spells its messages; `rendered` makes tokens of it when it is packed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from data.base.errors import UserError

Keep = Literal["all", "assistant"]
# As for token ids, a lone surrogate: texts are free of them once read.
_CHAT_MARK = "\udcfe"
_STAND_IN = "\ue000{}\ue001"  # private use: no text and no template has it


@dataclass(frozen=True)
class Chat:
    """Messages with `role` and `content`. keep: whose rows are harvested, of all tokens or of the assistant's words."""

    messages: list[dict[str, str]]
    keep: Keep

    def spelled(self) -> str:
        """Write the text of a document that stands for the chat."""
        return _CHAT_MARK + json.dumps({"keep": self.keep, "messages": self.messages}, sort_keys=True)

    @classmethod
    def from_text(cls, text: str) -> Chat | None:
        """Read a chat from a document's text; None where it is an ordinary text."""
        return cls(**json.loads(text[1:])) if text.startswith(_CHAT_MARK) else None


def is_chat(value: object) -> bool:
    """Return whether a row's value is a list of messages: objects with a `role` and a `content` of text."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(
            isinstance(message, Mapping)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
            for message in value
        )
    )


def template_hash(tokenizer: Any) -> str:
    """Hash the chat template, which decides a chat's tokens; UserError where the tokenizer has none."""
    return hashlib.sha256(json.dumps(_template(tokenizer), sort_keys=True).encode()).hexdigest()


def _template(tokenizer: Any) -> Any:
    """Return the tokenizer's template; a few have several, by name."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        raise UserError("text.chat is set, but this model's tokenizer has no chat template: take the model's chat form")
    return template


def rendered(chat: Chat, tokenizer: Any, name: str) -> tuple[list[int], NDArray[np.bool_]]:
    """Render a chat by the tokenizer's template: its token ids [n], and whether each one's row is harvested [n].

    Special tokens are decided elsewhere. A token that crosses the border of a message belongs to whom its first
    character belongs to. name: the document's, for messages.
    """
    text = _apply(chat.messages, tokenizer, name)
    if chat.keep == "all":
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids, np.ones(len(ids), np.bool_)
    if not tokenizer.is_fast:
        raise UserError("text.chat=assistant needs a tokenizer.json beside the model: set text.chat=all")
    wanted = np.zeros(len(text) + 1, np.bool_)  # by character
    for message, (start, end) in zip(chat.messages, _spans(chat.messages, text, tokenizer, name), strict=True):
        wanted[start:end] = message["role"] == "assistant"
    said = tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
    starts = np.array([start for start, _ in said["offset_mapping"]], np.int64)
    return said["input_ids"], wanted[starts]


def _apply(messages: Sequence[Mapping[str, str]], tokenizer: Any, name: str) -> str:
    """Write the messages by the template."""
    _template(tokenizer)
    try:
        return str(tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False))
    except Exception as error:  # the template's own, such as roles that have to take turns
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(f"{name} is no chat for this model's template ({reason}): correct it or leave it out") from None


def _spans(messages: Sequence[Mapping[str, str]], text: str, tokenizer: Any, name: str) -> list[tuple[int, int]]:
    """Find the range of characters of each message's content in the rendered text.

    A second rendering has a mark of its own in place of every content: what stands between the marks is the template's,
    and with the contents put back, as they are or trimmed, it must be the text. UserError where it is not.
    """
    marks = [_STAND_IN.format(number) for number in range(len(messages))]
    rest = _apply(
        [{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)], tokenizer, name
    )
    before_each = []
    for mark in marks:
        before, _, rest = rest.partition(mark)
        before_each.append(before)
    as_they_are = [message["content"] for message in messages]
    for contents in (as_they_are, [content.strip() for content in as_they_are]):
        parts = [part for pair in zip(before_each, contents, strict=True) for part in pair]
        if "".join([*parts, rest]) == text:
            ends = np.cumsum([len(part) for part in parts])[1::2]
            return [(int(end) - len(content), int(end)) for end, content in zip(ends, contents, strict=True)]
    raise UserError(
        f"{name}: this model's chat template changes what a message says, so that the assistant's words cannot be told "
        "apart: set text.chat=all"
    )

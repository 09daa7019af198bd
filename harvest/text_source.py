"""What every text source shares: documents, the split a document belongs to, and how a row becomes a document.

A source is a `Settings` model whose fields are the settings under `text`; it yields `Document`s in a fixed order. Its
`settings()` are the question as the user asked it; its `identity()` is what the store's fingerprint records: the same
with a hash of the text, or a data set's commit.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from data.base.config import Settings
from data.base.errors import UserError
from data.base.records import Json
from data.store.manifest import HELDOUT, TRAIN
from harvest.chat import Chat, Keep, is_chat
from harvest.disk_arrays import DigestSet

BYTE_ORDER_MARK = "\ufeff"
_SURROGATE = re.compile("[\ud800-\udfff]")
# Texts are free of surrogates once read, so that this mark cannot be the beginning of one.
_IDS_MARK = "\udcff"
_LARGEST_ID = 2**31 - 1  # token ids are stored as int32


@dataclass(frozen=True)
class Document:
    """One text. `key` decides its split: the module path for the standard library, the text itself elsewhere.

    A document that comes as token ids has their spelling for its text; `token_ids` reads them back.
    """

    name: str
    text: str
    key: str

    @classmethod
    def of_ids(cls, name: str, ids: Iterable[int]) -> Document:
        """Make a document of token ids, which no tokenizer will see."""
        spelled = " ".join(map(str, ids))
        text = _IDS_MARK + spelled if spelled else ""
        return cls(name, text, text)


def token_ids(text: str) -> list[int] | None:
    """Read the token ids that a document's text spells, or None where it is a text for the tokenizer."""
    return [int(one) for one in text[1:].split()] if text.startswith(_IDS_MARK) else None


def hash_text(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def split_of(key: str, heldout: float) -> str:
    """Choose the split of a document: `heldout` for that fraction of all keys,
    by the first 64 bits of the key's sha256."""
    return HELDOUT if int.from_bytes(hash_text(key)[:8], "big") < heldout * 2**64 else TRAIN


def unique(documents: Iterable[Document]) -> Iterator[Document]:
    """Drop blank documents and those whose exact text came before, so that no text can stand in both splits."""
    seen = DigestSet()
    for doc in documents:
        if doc.text.strip() and seen.add(hash_text(doc.text)):
            yield doc


_said: set[Hashable] = set()


def say_once(about: Hashable, line: str) -> None:
    """Print a line about a text to stderr: once a process, as a text is read several times, and by one of many."""
    if about not in _said and os.environ.get("RANK", "0") == "0":
        _said.add(about)
        print(line, file=sys.stderr, flush=True)


class TextSource(Settings, ABC):
    """Where documents come from; the fields are the settings under `text` in the configuration."""

    kind: str
    """The name of the kind of text, in `harvest.documents.SOURCES`."""

    @abstractmethod
    def check(self) -> None:
        """Refuse, in a moment and without reading the text, what cannot work (UserError)."""

    @abstractmethod
    def documents(self) -> Iterator[Document]:
        """Iterate over all documents, in an order that is the same each time."""

    def settings(self) -> Json:
        """Return the plain values `source_from` rebuilds this source from."""
        return self.model_dump()

    def identity(self) -> Json:
        """Return the settings with the number of documents and a hash over all of them, in order;
        UserError for empty text."""
        whole, count = hashlib.sha256(), 0
        for doc in unique(self.documents()):
            whole.update(hash_text(doc.key) + hash_text(doc.text))
            count += 1
        if not count:
            raise UserError(f"the text {self.settings()} holds no document that is not blank: choose another text")
        return {**without_new(self.settings()), "documents": count, "sha256": whole.hexdigest()}


def without_new(settings: Json) -> Json:
    """Drop `chat` where it is null from a source's settings: older stores, without it, stay the same."""
    return {name: value for name, value in settings.items() if name != "chat" or value is not None}


def readable(text: str, name: str, file: str) -> str:
    """Make a text readable for a tokenizer: without a byte order mark,
    U+FFFD for each lone surrogate (which is said)."""
    text = text.removeprefix(BYTE_ORDER_MARK)
    if _SURROGATE.search(text):
        say_once((file, "surrogate"), f"{name} holds a lone surrogate: it is read as U+FFFD, here and in what follows")
        text = _SURROGATE.sub("\ufffd", text)
    return text


class RowReader:
    """Makes documents of the rows of a file or a data set, and counts those that are null.

    file: its name, for messages. field: the column that holds the text, the token ids or the messages of a chat.
    chat: whose tokens of a chat are harvested; None where rows are no chats.
    """

    def __init__(self, file: str, field: str, chat: Keep | None = None) -> None:
        self.file = file
        self.field = field
        self.chat = chat
        self.nulls = 0

    def document(self, number: int, row: object) -> Document:
        """Read the document of a row; UserError says what stands there where it is neither text nor token ids."""
        name = f"{self.file}:{number}"
        if not isinstance(row, Mapping) or self.field not in row:
            has = f"it has {sorted(map(str, row))}" if isinstance(row, Mapping) else "it is no object"
            raise UserError(f"{name} has no text under {self.field!r} ({has}): set text.field")
        value = row[self.field]
        if value is None:
            self.nulls += 1
            return Document(name, "", "")
        if self.chat is not None:
            return self._chat_document(name, value, self.chat)
        if isinstance(value, str):
            text = readable(value, name, self.file)
            return Document(name, text, text)
        if isinstance(value, list) and all(_is_token_id(one) for one in value):
            return Document.of_ids(name, value)
        raise UserError(f"{name} has {_described(value)} under {self.field!r}, not a text: {_remedy(value)}")

    def _chat_document(self, name: str, value: object, keep: Keep) -> Document:
        if not is_chat(value):
            raise UserError(
                f"{name} has {_described(value)} under {self.field!r}, not a chat's messages (objects with role and "
                "content): set text.field to the column of messages, or text.chat=null"
            )
        assert isinstance(value, list)
        messages = [
            {"role": message["role"], "content": readable(message["content"], name, self.file)} for message in value
        ]
        text = Chat(messages, keep).spelled()
        return Document(name, text, text)

    def report(self) -> None:
        """Say how many rows were null, if any."""
        if self.nulls:
            what = "document is null and is" if self.nulls == 1 else "documents are null and are"
            say_once((self.file, "null"), f"{self.file}: {self.nulls:,} {what} left out")


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST_ID


def _described(value: object) -> str:
    """Describe in words what a value is."""
    if isinstance(value, list):
        parts = {type(one) for one in value}
        if parts == {str}:
            return "a list of texts"
        return "a list of numbers that are no token ids" if parts <= {int, float} else "a list"
    if isinstance(value, bytes):
        return "binary data"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    return "an object" if isinstance(value, Mapping) else f"a {type(value).__name__}"


def _remedy(value: object) -> str:
    if isinstance(value, list) and is_chat(value):
        return "set text.chat=all, or text.chat=assistant, to read it as a chat"
    if isinstance(value, list):
        return "join each list to one text (or give whole numbers from 0 on, which are taken as token ids)"
    if isinstance(value, bytes):
        return "store the column as strings"
    return "set text.field to a column of texts"

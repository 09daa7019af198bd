"""The order in which documents are packed, and where it is cut into ranges that are tokenised by themselves."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from data.store.token_store import RangeSizes
from harvest.disk_arrays import DiskArray, DiskStrings
from harvest.text_dataset import StreamLost
from harvest.text_source import Document, TextSource, split_of, unique

_SORTED_AT_ONCE = 1 << 20  # documents
_Item = TypeVar("_Item")


@dataclass(frozen=True)
class DocumentRange:
    """Consecutive documents of a split, in packing order.

    texts: yields (name, text) of each, as often as it is called. characters: of all texts. last: whether the split ends
    with it. lost: the error that ended a stream within it, after the documents that are here.
    """

    number: int
    texts: Callable[[], Iterator[tuple[str, str]]]
    characters: int
    last: bool
    lost: StreamLost | None = None


class DocumentOrder:
    """The unique documents of a text by split, in packing order.

    shuffle: a seed, by which they come by sha256(seed, key), after all of them were laid into temporary files; None:
    they come in the source's order, as they are read. heldout: the fraction held out. on_document: is called for each
    document that is read into the files.
    """

    def __init__(
        self,
        source: TextSource,
        shuffle: int | None,
        heldout: float,
        on_document: Callable[[], None] = lambda: None,
    ) -> None:
        self._source, self._shuffle, self._heldout = source, shuffle, heldout
        self._on_document = on_document
        self._shuffled: ShuffledDocuments | None = None

    def texts(self, split: str) -> Iterator[tuple[str, str]]:
        """Yield (name, text) of each document of a split."""
        if self._shuffle is None:
            return ((doc.name, doc.text) for doc in self._of(split))
        shuffled = ShuffledDocuments(self._of(split), self._shuffle)
        return map(shuffled.document, shuffled.order())

    def ranges(self, split: str, sizes: RangeSizes) -> Iterator[DocumentRange]:
        """Yield the ranges of a split from the first on; one range, without documents, of a split that has none."""
        if self._shuffle is None:
            for number, docs, characters, last, lost in _cut(self._of(split), _characters, sizes):
                yield DocumentRange(number, partial(_named, docs), characters, last, lost)
            return
        if self._shuffled is None:
            self._shuffled = ShuffledDocuments(
                self._read(), self._shuffle, lambda doc: split_of(doc.key, self._heldout)
            )
        shuffled = self._shuffled
        for number, at, characters, last, lost in _cut(shuffled.order(split), shuffled.characters, sizes):
            yield DocumentRange(number, partial(map, shuffled.document, at), characters, last, lost)

    def _of(self, split: str) -> Iterator[Document]:
        return (doc for doc in unique(self._source.documents()) if split_of(doc.key, self._heldout) == split)

    def _read(self) -> Iterator[Document]:
        for doc in unique(self._source.documents()):
            self._on_document()
            yield doc


def _named(docs: Iterable[Document]) -> Iterator[tuple[str, str]]:
    return ((doc.name, doc.text) for doc in docs)


def _characters(doc: Document) -> int:
    return len(doc.text)


def _cut(
    items: Iterator[_Item], size_of: Callable[[_Item], int], sizes: RangeSizes
) -> Iterator[tuple[int, list[_Item], int, bool, StreamLost | None]]:
    """Yield (number, items, their size, whether it is the last, what ended it) of each range."""
    number, before, size = 0, 0, 0
    part: list[_Item] = []
    try:
        for item in items:
            # Looked at before an item is added, so that what is yielded is known not to be the last.
            if size >= sizes.due(before) or len(part) == sizes.documents:
                yield number, part, size, False, None
                number, before, size, part = number + 1, before + size, 0, []
            part.append(item)
            size += size_of(item)
    except StreamLost as error:
        yield number, part, size, False, error
        return
    yield number, part, size, True, None


class ShuffledDocuments:
    """Documents in temporary files, by number; and their numbers in the order of sha256(seed, key), compared as bytes.

    split_of: which split's order a document is in; by default there is one order, of the split "".
    """

    def __init__(
        self, documents: Iterable[Document], seed: int, split_of: Callable[[Document], str] = lambda doc: ""
    ) -> None:
        self._names, self._texts = DiskStrings(), DiskStrings()
        ranks, leading, sizes, splits = DiskArray(), DiskArray(), DiskArray(), DiskArray()
        self._splits: dict[str, int] = {}
        for doc in documents:
            rank = hashlib.sha256(f"{seed}:{doc.key}".encode("utf-8", "surrogatepass")).digest()
            self._names.append(doc.name)
            self._texts.append(doc.text)
            ranks.write(rank)
            leading.write(rank[:8])
            sizes.write(np.array([len(doc.text)], np.int64))
            splits.write(bytes([self._splits.setdefault(split_of(doc), len(self._splits))]))
        count = len(self._names)
        self._ranks, self._leading = ranks.array(">u8", count, 4), leading.array(">u8", count)
        self._sizes, self._split = sizes.array(np.int64, count), splits.array(np.uint8, count)

    def document(self, number: int) -> tuple[str, str]:
        """Read (name, text) of a document."""
        return self._names[number], self._texts[number]

    def characters(self, number: int) -> int:
        """Return the length of a document's text."""
        return int(self._sizes[number])

    def order(self, split: str = "") -> Iterator[int]:
        """Yield the numbers of a split's documents in their order, sorted part by part: not all need fit in memory."""
        if split not in self._splits:
            return
        count = len(self._sizes)
        n_parts = max(1, count // _SORTED_AT_ONCE)
        for part in range(n_parts):
            low, high = part * 2**64 // n_parts, (part + 1) * 2**64 // n_parts - 1
            numbers = self._between(low, high, self._splits[split])
            # Of lexsort's keys the last one counts first.
            yield from numbers[np.lexsort(self._ranks[numbers].T[::-1])].tolist()

    def _between(self, low: int, high: int, split: int) -> np.ndarray:
        """Find a split's documents whose ranks begin with a number from `low` to `high`, by number."""
        found = [np.zeros(0, np.int64)]
        for at in range(0, len(self._sizes), _SORTED_AT_ONCE):
            some = slice(at, at + _SORTED_AT_ONCE)
            inside = (self._leading[some] >= low) & (self._leading[some] <= high) & (self._split[some] == split)
            found.append(at + np.flatnonzero(inside))
        return np.concatenate(found)

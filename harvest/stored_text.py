"""Packed contexts out of stored tokens: where BOS, EOS and borders lie is arithmetic, tokens are read as they are used.

The same contexts as `harvest.packing.pack` makes, without a tokenizer: documents' lengths and two flags a token say how
many rows each context has; ids are read, a range at a time, for the contexts that are run. Letters: D documents and n
tokens of a range, m of them with the ends of its documents, T tokens of a context.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.base.errors import UserError
from data.store.token_store import DocumentTable, RangeSizes, TokenRange, TokenStore
from harvest.disk_arrays import DiskArray
from harvest.packing import Packing, beyond_vocabulary, bos_id, special_ids
from harvest.text_dataset import StreamLost

_RANGES_IN_MEMORY = 3  # units are run in order, while the one before is written
_MORE_THAN_ESTIMATED = 1.01


@dataclass(frozen=True)
class StreamEnds:
    """What packing puts around documents (`head`, `tail`) and before contexts (`lead`): ids, or None.

    keeps: of each of these ids, whether its row is harvested. keep_special: whether that of a special token in a
    document is.
    """

    head: int | None
    tail: int | None
    lead: int | None
    keeps: dict[int, bool]
    keep_special: bool

    @classmethod
    def of(cls, tokenizer: Any, packing: Packing) -> StreamEnds:
        """Read them from the packing; UserError for a token that the tokenizer does not have."""
        bos = bos_id(tokenizer, packing)
        head = bos if packing.bos == "document" else None
        lead = bos if packing.bos == "context" else None
        tail = int(tokenizer.eos_token_id) if packing.separator else None
        special = set(special_ids(tokenizer))
        keeps = {one: packing.keep_special or one not in special for one in (head, tail, lead) if one is not None}
        return cls(head, tail, lead, keeps, packing.keep_special)


@dataclass(frozen=True)
class _Places:
    """Where a range's tokens lie among those with the documents' ends.

    lengths [D]: of documents with their ends. tokens [n], heads, tails: places of the ids, the BOS and the EOS.
    """

    lengths: NDArray[np.int64]
    tokens: NDArray[np.int64]
    heads: NDArray[np.int64]
    tails: NDArray[np.int64]

    @classmethod
    def of(cls, table: DocumentTable, ends: StreamEnds) -> _Places:
        has_head_D = np.zeros(len(table.lengths), np.int64)
        if ends.head is not None:
            # A document that came as ids, or as a chat whose template begins with a BOS, gets no second one.
            has_head_D[:] = ~(table.own & (table.firsts == ends.head))
        n_tails = int(ends.tail is not None)
        lengths_D = table.lengths + has_head_D + n_tails
        ends_D = np.cumsum(lengths_D)
        starts_D = ends_D - lengths_D
        before_D = np.cumsum(table.lengths) - table.lengths
        shift_D = starts_D + has_head_D - before_D
        tokens = np.arange(len(table.wanted)) + np.repeat(shift_D, table.lengths)
        return cls(lengths_D, tokens, starts_D[has_head_D.astype(np.bool_)], ends_D[: len(ends_D) * n_tails] - 1)

    def laid(self, of_tokens: NDArray[Any], of_head: Any, of_tail: Any) -> NDArray[Any]:
        """Lay values of the tokens, of a BOS and of an EOS, to their places: [m]."""
        out = np.empty(int(self.lengths.sum()), of_tokens.dtype)
        out[self.tokens] = of_tokens
        if len(self.heads):
            out[self.heads] = of_head
        if len(self.tails):
            out[self.tails] = of_tail
        return out


class _Rows:
    """The contexts' ids, or which of their rows are harvested: [n, T], made for the slice that is asked for."""

    def __init__(self, text: StoredText, column: int) -> None:
        self._text, self._column = text, column

    def __len__(self) -> int:
        return self._text.n_contexts

    def __getitem__(self, contexts: slice) -> NDArray[Any]:
        return self._text.read(contexts)[self._column]


class StoredText:
    """The packed contexts of a split that hold at least `rows` kept rows, as `PackedTokens` has them.

    Ranges are taken in order until `is_enough`; then `contexts` and `keep` are read like arrays, by slices. Their
    number is rounded up to a `multiple` where the text goes on that far. vocabulary: rows of the model's embedding,
    beyond which a token is refused (UserError).
    """

    def __init__(
        self,
        store: TokenStore,
        split: str,
        tokenizer: Any,
        packing: Packing,
        rows: int,
        *,
        multiple: int = 1,
        vocabulary: int | None = None,
    ) -> None:
        assert rows > 0 and multiple > 0
        self.store, self.split, self.rows_asked, self.multiple = store, split, rows, multiple
        self.lost: StreamLost | None = None
        self.kept = 0  # rows, in whole contexts
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._ends, self._context = StreamEnds.of(tokenizer, packing), packing.context
        self._stride = packing.context - (self._ends.lead is not None)
        self._range_ends: list[int] = []  # in the stream
        self._characters = 0
        self._carry = np.zeros(0, np.bool_)  # of the stream's last, unfinished context
        self._counts, self._n_counts = DiskArray(), 0  # kept rows of each context
        self._goal: int | None = None
        self._last = False
        self._unstored: TokenRange | None = None  # what was read of a stream's last range before it was lost
        self._cache: dict[int, tuple[NDArray[np.int32], NDArray[np.bool_]]] = {}
        self._lock = threading.Lock()  # the writing thread reads too

    @property
    def n_ranges(self) -> int:
        """Return how many ranges were taken."""
        return len(self._range_ends)

    @property
    def is_enough(self) -> bool:
        """Return whether no further range is needed."""
        return self.lost is not None or (self._goal is not None and self._n_counts >= self._goal)

    @property
    def has_rows(self) -> bool:
        """Return whether the ranges taken hold the rows asked for."""
        return self._goal is not None

    @property
    def is_whole(self) -> bool:
        """Return whether the last range of the split was taken."""
        return self._last

    @property
    def n_contexts(self) -> int:
        return min(self._n_counts, self._goal or 0)

    @property
    def contexts(self) -> _Rows:
        """Return the ids: [n, T] int32."""
        return _Rows(self, 0)

    @property
    def keep(self) -> _Rows:
        """Return which rows are harvested: [n, T] bool."""
        return _Rows(self, 1)

    def take(self) -> None:
        """Count the contexts of the next range, which is committed; UserError where its end cannot be tokenised."""
        number = self.n_ranges
        record = self.store.record(self.split, number)
        assert record is not None, f"range {number} of {self.split} is not committed"
        self._add(self.store.table(self.split, number), record.characters)
        self._last = record.last
        if record.refused and not self.is_enough:
            raise UserError(record.refused)

    def end_with(self, part: TokenRange, lost: StreamLost) -> None:
        """Take what was read of the next range of a stream before it was lost, which is not stored: the text's end.

        Whole units alone, as the text has not ended here. Raises what ended the stream where there is not even one.
        """
        self._unstored = part
        self._add(part.table, part.characters)
        if part.refused and not self.is_enough:
            raise UserError(part.refused)
        if self.is_enough:
            return
        self._goal = self._n_counts // self.multiple * self.multiple
        self.lost = lost
        if not self._goal:
            raise lost

    def _add(self, table: DocumentTable, characters: int) -> None:
        places = _Places.of(table, self._ends)
        begin = self._range_ends[-1] if self._range_ends else 0
        stream = np.concatenate([self._carry, self._laid_keep(table, places)])
        n_whole = len(stream) // self._stride
        counts = stream[: n_whole * self._stride].reshape(n_whole, self._stride).sum(1, dtype=np.int32)
        if self._ends.lead is not None:
            counts += self._ends.keeps[self._ends.lead]
        self._carry = stream[n_whole * self._stride :].copy()
        running = self.kept + np.cumsum(counts, dtype=np.int64)
        if self._goal is None and n_whole and running[-1] >= self.rows_asked:
            needed = self._n_counts + int(np.searchsorted(running, self.rows_asked)) + 1
            self._goal = -(-needed // self.multiple) * self.multiple
        self._counts.write(counts)
        self._n_counts += n_whole
        self.kept = int(running[-1]) if n_whole else self.kept
        self._characters += characters
        self._range_ends.append(begin + int(places.lengths.sum()))
        self._refuse_beyond_vocabulary(table, places, begin)

    def _refuse_beyond_vocabulary(self, table: DocumentTable, places: _Places, begin: int) -> None:
        """Raise UserError for the first document with a token that the embedding lacks, of those that are needed."""
        if self._vocabulary is None or not len(table.lengths):
            return
        largest_D = table.largest.copy()
        starts_D = np.cumsum(places.lengths) - places.lengths
        if self._ends.head is not None:
            headed = np.isin(starts_D, places.heads)
            largest_D[headed] = np.maximum(largest_D[headed], self._ends.head)
        if self._ends.tail is not None:
            largest_D = np.maximum(largest_D, self._ends.tail)
        needed_D = np.ones(len(largest_D), np.bool_)
        if self._goal is not None:
            needed_D = (begin + starts_D) // self._stride < self._goal
        beyond = np.flatnonzero((largest_D >= self._vocabulary) & needed_D)
        if len(beyond):
            first = int(beyond[0])
            raise UserError(
                beyond_vocabulary(table.names[first], int(largest_D[first]), self._tokenizer, self._vocabulary)
            )

    def ranges_wanted(self, sizes: RangeSizes) -> int:
        """Estimate how many ranges are needed, by the rows that the text so far has a character.

        The same for every process, as it depends on whole ranges alone; at least one more than were taken.
        """
        if not self.kept:
            return max(1, 2 * self.n_ranges)
        rows = self.rows_asked + self.multiple * self._context
        wanted = rows * self._characters / self.kept * _MORE_THAN_ESTIMATED
        number, characters = self.n_ranges + 1, self._characters + sizes.due(self._characters)
        while characters < wanted:
            characters += sizes.due(characters)
            number += 1
        return number

    def rows(self, contexts: slice) -> int:
        """Count the kept rows of some contexts."""
        counts = self._counts.array(np.int32, self.n_contexts)
        return int(counts[contexts].sum(dtype=np.int64))

    def read(self, contexts: slice) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Read some contexts: their ids [n, T] and which of their rows are harvested [n, T]."""
        first, last, step = contexts.indices(self.n_contexts)
        assert step == 1
        n = max(0, last - first)
        ids_pieces, keep_pieces = self._stream(first * self._stride, (first + n) * self._stride)
        ids = np.concatenate(ids_pieces).reshape(n, self._stride)
        keep = np.concatenate(keep_pieces).reshape(n, self._stride)
        lead = self._ends.lead
        if lead is not None:
            ids = np.concatenate([np.full((n, 1), lead, np.int32), ids], axis=1)
            keep = np.concatenate([np.full((n, 1), self._ends.keeps[lead], np.bool_), keep], axis=1)
        return ids, keep

    def _stream(self, begin: int, end: int) -> tuple[list[NDArray[np.int32]], list[NDArray[np.bool_]]]:
        """Read the stream's part from `begin` to `end`, in pieces."""
        ids, keeps = [np.zeros(0, np.int32)], [np.zeros(0, np.bool_)]
        number = int(np.searchsorted(self._range_ends, begin, side="right"))
        while begin < end:
            starts_at = self._range_ends[number - 1] if number else 0
            tokens, keep = self._range(number)
            piece = slice(begin - starts_at, min(end, self._range_ends[number]) - starts_at)
            ids.append(tokens[piece])
            keeps.append(keep[piece])
            begin, number = starts_at + piece.stop, number + 1
        return ids, keeps

    def _range(self, number: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Read a range's part of the stream, documents' ends included; the last few stay in memory."""
        with self._lock:
            if number not in self._cache:
                table, tokens = self._table(number), self._tokens(number)
                places = _Places.of(table, self._ends)
                while len(self._cache) >= _RANGES_IN_MEMORY:
                    self._cache.pop(next(iter(self._cache)))
                laid = places.laid(tokens, self._ends.head, self._ends.tail)
                self._cache[number] = laid, self._laid_keep(table, places)
            return self._cache[number]

    def _laid_keep(self, table: DocumentTable, places: _Places) -> NDArray[np.bool_]:
        keep = table.wanted if self._ends.keep_special else table.wanted & ~table.special
        ends = [one is not None and self._ends.keeps[one] for one in (self._ends.head, self._ends.tail)]
        return places.laid(keep, *ends)

    def _is_unstored(self, number: int) -> bool:
        return self._unstored is not None and number == self.n_ranges - 1

    def _table(self, number: int) -> DocumentTable:
        if self._unstored is not None and self._is_unstored(number):
            return self._unstored.table
        return self.store.table(self.split, number)

    def _tokens(self, number: int) -> NDArray[np.int32]:
        if self._unstored is not None and self._is_unstored(number):
            return self._unstored.tokens
        return self.store.tokens(self.split, number)

    def document(self, sequence: int, position: int) -> str:
        """Return the name of the document that token `position` of context `sequence` belongs to."""
        within = position - (self._context - self._stride)
        at = sequence * self._stride + max(within, 0)
        number = int(np.searchsorted(self._range_ends, at, side="right"))
        table = self._table(number)
        ends_D = np.cumsum(_Places.of(table, self._ends).lengths)
        begin = self._range_ends[number - 1] if number else 0
        return table.names[int(np.searchsorted(ends_D, at - begin, side="right"))]

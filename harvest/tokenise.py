"""Text -> stored tokens, range by range, by any number of processes; and the packed contexts out of them.

What is asked for decides which ranges are made, in rounds: the first range, then as many as an estimate by its rows
wants, until there are enough. Every process works the rounds out by itself, from whole ranges alone, so that the files
are the same however many there are; within a round each takes the leases of ranges that nobody has. Where all of a
round is there already (another site, another dtype, a resume) the text is not looked at.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from data.base.errors import UserError
from data.base.progress import progress
from data.storage.base import LeaseLost
from data.store.token_store import TokenRange, TokenStore
from harvest.document_order import DocumentOrder, DocumentRange
from harvest.encoding import token_range
from harvest.packing import Packing, special_ids, too_short
from harvest.stored_text import StoredText
from harvest.text_source import TextSource

WAIT_S = 0.2  # between looks at ranges that other processes have


class Tokeniser:
    """Makes the ranges of one text that are left to make, beside any other process that does so.

    documents: of the text, where their number is known, for the progress line. quiet: without one.
    """

    def __init__(
        self,
        store: TokenStore,
        source: TextSource,
        tokenizer: Any,
        packing: Packing,
        *,
        documents: int | None = None,
        quiet: bool = False,
    ) -> None:
        self.store, self.source, self.tokenizer, self.packing = store, source, tokenizer, packing
        self._special = special_ids(tokenizer)
        self._progress = _Progress(documents, quiet)
        self._order = DocumentOrder(source, packing.shuffle, packing.heldout, self._progress.read)

    def text(self, split: str, rows: int, *, multiple: int = 1, vocabulary: int | None = None) -> StoredText:
        """Return the packed contexts of a split, tokenised as far as they need.

        As `harvest.packing.pack` has them; UserError where the text has fewer rows than asked for, or where a document
        that they need cannot be tokenised.
        """
        text = StoredText(
            self.store, split, self.tokenizer, self.packing, rows, multiple=multiple, vocabulary=vocabulary
        )
        ranges = _Ranges(self._order, self.store, split)
        with self._progress.of(split, rows):
            while not (text.is_enough or text.is_whole):
                wanted = text.ranges_wanted(self.store.sizes)
                lost = self._make(ranges, range(text.n_ranges, wanted))
                while text.n_ranges < wanted and self.store.is_made(split, text.n_ranges):
                    self._progress.tokens(ranges.uncounted(text.n_ranges))
                    text.take()
                    if text.is_enough or text.is_whole:
                        break
                # Where another process read further than this one, what that one stored goes before.
                if lost is not None and lost.number == text.n_ranges and not text.is_enough:
                    assert lost.lost is not None
                    text.end_with(self._tokenised(lost), lost.lost)
        if not text.has_rows:
            raise UserError(too_short(self.source, self.packing, split, rows, text.kept))
        self.store.clear_up()
        return text

    def _make(self, ranges: _Ranges, wanted: range) -> DocumentRange | None:
        """Return when all of the wanted ranges are committed, as far as the text goes, by this process or another.

        Returns the range in which a stream was lost, where it was, once all before it are committed.
        """
        lost = None
        while left := ranges.left(wanted):
            for number in left:
                if self.store.is_made(ranges.split, number):  # by another, since the last look
                    self._progress.tokens(ranges.uncounted(number))
                    continue
                with self.store.leases.take(ranges.split, number, ["tokens"], {}) as ours:
                    # Looked at again under the lease: another may have committed it in between.
                    if not ours or self.store.is_made(ranges.split, number):
                        continue
                    part = ranges.get(number)
                    if part is None or part.lost is not None:
                        # There is nothing to be made from here on.
                        wanted = range(wanted.start, number if part is None else part.number)
                        lost = part
                        break
                    self._commit(ranges.split, part)
                    ranges.uncounted(number)
            else:
                if ranges.left(wanted) == left:  # other processes have all of it, and one of them may die
                    time.sleep(WAIT_S)
        return lost

    def _commit(self, split: str, part: DocumentRange) -> None:
        try:
            self.store.write(split, part.number, self._tokenised(part))
        except LeaseLost:
            return  # whether the range is there is looked at again

    def _tokenised(self, part: DocumentRange) -> TokenRange:
        return token_range(
            part.texts(),
            self.tokenizer,
            self._special,
            characters=part.characters,
            last=part.last,
            on_tokens=self._progress.tokens,
        )


class _Ranges:
    """The ranges of a split by number, of a text that is read forward and, for one that was passed, again."""

    def __init__(self, order: DocumentOrder, store: TokenStore, split: str) -> None:
        self.split = split
        self._order, self._store = order, store
        self._reading: Iterator[DocumentRange] = iter(())
        self._next: int | None = None
        self._counted: set[int] = set()

    def uncounted(self, number: int) -> int:
        """Return the tokens of a range that is committed, and 0 the next time."""
        record = self._store.record(self.split, number)
        if record is None or number in self._counted:
            return 0
        self._counted.add(number)
        return record.tokens

    def left(self, wanted: range) -> list[int]:
        """Return which of the wanted ranges are not committed, up to the split's last where that is known."""
        made, left = set(self._store.numbers(self.split)), []
        for number in wanted:
            record = self._store.record(self.split, number) if number in made else None
            if record is None:
                left.append(number)
            elif record.last:
                break
        return left

    def get(self, number: int) -> DocumentRange | None:
        """Read a range; None where the split ends before it, and the one in which a stream was lost before it."""
        if self._next is None or self._next > number:
            self._reading, self._next = self._order.ranges(self.split, self._store.sizes), 0
        for part in self._reading:
            self._next = part.number + 1
            if part.number == number or part.lost is not None:
                return part
        self._next = None
        return None


class _Progress:
    """The lines that say how far the text is read, and how far it is tokenised, with rate and time left.

    Nothing is shown of what takes less than a second.
    """

    def __init__(self, documents: int | None, quiet: bool) -> None:
        self._options: dict[str, Any] = {"quiet": quiet, "lines": 5, "delay": 1.0, "leave": False}
        self._documents = documents
        self._reading: Any = None
        self._bar: Any = None

    def of(self, split: str, rows: int) -> Any:
        """Begin the line of a split, of which so many rows are asked for; the `with` block ends it."""
        self._bar = progress(f"tokenise {split}", rows, "tokens", **self._options)
        return self._bar

    def read(self) -> None:
        """Count a document that was read, and is not tokenised yet."""
        if self._reading is None:
            self._reading = progress("read text", self._documents, "documents", **self._options)
        self._reading.update(1)

    def tokens(self, count: int) -> None:
        """Count tokens; those beyond what is asked for do not show."""
        if self._reading is not None:
            self._reading.close()
            self._reading = None
        self._bar.update(min(count, self._bar.total - self._bar.n))

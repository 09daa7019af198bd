"""Compare each chunk file with the crc32c of its commit record, the first time that a process reads it.

Damage on a disk or on the way from it is silent: a flipped bit in a chunk is another activation, and training on it
raises nothing. The check costs a pass over bytes that were just read, once a process; what was compared is remembered.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.base.errors import UserError
from data.store.commit import Chunk, remake
from data.store.store import Store

# google_crc32c keeps Python's interpreter lock while it runs: 80 us a call let other threads go on.
_SLICE_BYTES = 256 << 10
_READ_BYTES = 8 << 20  # of a file that is read for its check alone

# Keys of the chunk files that this process compared, by store. Readers come and go, a store's files stay the same.
_verified: defaultdict[str, set[str]] = defaultdict(set)


def forget() -> None:
    """Let every chunk file be checked anew, as in a new process."""
    _verified.clear()


def crc32c(parts: Iterable[NDArray[Any]]) -> str:
    """Return the crc32c of arrays' bytes, one after another, as commit records write it."""
    import google_crc32c

    crc = 0
    for part in parts:
        flat = part.reshape(-1).view(np.uint8)
        for begin in range(0, len(flat), _SLICE_BYTES):
            crc = google_crc32c.extend(crc, flat[begin : begin + _SLICE_BYTES])
    return f"{crc:08x}"


class ChunkChecks:
    """The checks of one site's chunk files; its methods may run in several threads at once."""

    def __init__(self, store: Store, split: str, site: str) -> None:
        self.store, self.split, self.site = store, split, site
        self._done = _verified[str(store.path)]
        self._locks: defaultdict[str, Lock] = defaultdict(Lock)

    def is_done(self, record: Chunk) -> bool:
        # With the crc in the name: a unit that was made anew under the same key is another file, to be checked again.
        return record.key + record.crc32c in self._done

    def compare(self, record: Chunk, unit: int, content: Iterable[NDArray[Any]]) -> None:
        """Hold a file's whole content, in parts, against its record; UserError names what differs."""
        found = crc32c(content)
        if found != record.crc32c:
            raise self.wrong(record, unit, f"is damaged (its crc32c is {found} where {record.crc32c} was committed)")
        self._done.add(record.key + record.crc32c)

    def read_and_compare(self, record: Chunk, unit: int) -> None:
        """Read a whole file for its check alone, unless it was checked before: only a part of it is wanted."""
        # Threads that want other chunks of the same shard wait here, where all but the first have nothing to do.
        with self._locks[record.key]:
            if not self.is_done(record):
                self.compare(record, unit, self._content(record, unit))

    def _content(self, record: Chunk, unit: int) -> Iterable[NDArray[Any]]:
        # A shard may have a gigabyte: it is read in pieces, through one buffer.
        buffer = np.empty(min(_READ_BYTES, record.bytes), np.uint8)
        for begin in range(0, record.bytes, len(buffer)):
            part = buffer[: record.bytes - begin]
            try:
                length = self.store.storage.read_into(record.key, begin, part.data)
            except FileNotFoundError:
                raise self.wrong(record, unit, "is missing") from None
            self.refuse_length(record, unit, length)
            yield part

    def refuse_length(self, record: Chunk, unit: int, length: int) -> None:
        """Raise UserError where a file has another length than was committed."""
        if length != record.bytes:
            raise self.wrong(record, unit, f"has {length} bytes where {record.bytes} were committed")

    def wrong(self, record: Chunk, unit: int, what: str) -> UserError:
        """Say what is wrong with a chunk file, and how to make it anew."""
        remedy = remake(self.store.path, self.split, unit, self.site)
        return UserError(f"{self.store.path / record.key} {what}: {remedy}")

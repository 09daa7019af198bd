"""What grows with the text lies in files without a name, not in memory: they end with their process, killed or not."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from data.base.files import naming

_FREE = bytes(16)  # no digest of a text is known to be all zeros


class DiskArray:
    """An array written piece by piece to a file in the system's folder for temporary files (TMPDIR), then mapped."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115
        weakref.finalize(self, self._file.close)

    def write(self, piece: bytes | NDArray[Any]) -> None:
        """Add to the end. An OSError names the folder."""
        with naming(Path(tempfile.gettempdir())):
            self._file.write(piece if isinstance(piece, bytes) else np.ascontiguousarray(piece).data)

    def array(self, dtype: DTypeLike, *shape: int) -> NDArray[Any]:
        """Open the first values written, of this many, as an array that the system reads from the file as needed.

        A change to it is seen by this array alone.
        """
        with naming(Path(tempfile.gettempdir())):
            self._file.flush()
        if not np.prod(shape):
            return np.empty(shape, dtype)
        return np.memmap(self._file, dtype, "c", shape=shape)


class DigestSet:
    """Which digests were seen, by their first 16 bytes: a hash table in a file, which need not fit in memory."""

    _SLOT = 16

    def __init__(self) -> None:
        self._count = 0
        self._table = self._empty(1 << 12)

    def _empty(self, slots: int) -> mmap.mmap:
        """Make a table; the first, which is small, without a file."""
        size = slots * self._SLOT
        if not self._count:
            return mmap.mmap(-1, size)
        with naming(Path(tempfile.gettempdir())), tempfile.TemporaryFile() as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a sparse file on a full disk would end the process
            return mmap.mmap(file.fileno(), size)

    def add(self, digest: bytes) -> bool:
        """Return whether a digest is new, and remember it."""
        # Half of the slots are free, so that the next free one is near.
        if 2 * self._count * self._SLOT >= len(self._table):
            self._grow()
        at = self._slot(self._table, digest[: self._SLOT])
        if self._table[at : at + self._SLOT] != _FREE:
            return False
        self._table[at : at + self._SLOT] = digest[: self._SLOT]
        self._count += 1
        return True

    def _slot(self, table: mmap.mmap, digest: bytes) -> int:
        """Find where a digest is, or the free slot where it belongs."""
        at = int.from_bytes(digest[:8], "little") * self._SLOT % len(table)
        while table[at : at + self._SLOT] not in (digest, _FREE):
            at = (at + self._SLOT) % len(table)
        return at

    def _grow(self) -> None:
        old, self._table = self._table, self._empty(4 * len(self._table) // self._SLOT)
        for at in range(0, len(old), self._SLOT):
            digest = old[at : at + self._SLOT]
            if digest != _FREE:
                new = self._slot(self._table, digest)
                self._table[new : new + self._SLOT] = digest
        old.close()


class DiskStrings:
    """Strings one after another, each found by its number; the first to be read ends the writing."""

    def __init__(self) -> None:
        self._spool, self._ends = DiskArray(), DiskArray()
        self._count, self._bytes = 0, 0
        self._read: tuple[NDArray[np.uint8], NDArray[np.int64]] | None = None

    def append(self, text: str) -> None:
        assert self._read is None
        encoded = text.encode("utf-8", "surrogatepass")
        self._spool.write(encoded)
        self._bytes += len(encoded)
        self._ends.write(np.array([self._bytes], np.int64))
        self._count += 1

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> str:
        if self._read is None:
            self._read = self._spool.array(np.uint8, self._bytes), self._ends.array(np.int64, self._count)
        texts, ends = self._read
        begin = int(ends[index - 1]) if index else 0
        return texts[begin : int(ends[index])].tobytes().decode("utf-8", "surrogatepass")

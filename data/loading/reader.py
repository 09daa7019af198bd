"""Read the committed chunks of one site, in (unit, chunk) order: straight from their files, or through zarr."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray

from data.base.files import open_plain
from data.base.seeded import Ints
from data.loading.checksums import ChunkChecks
from data.store.commit import Chunk
from data.store.store import Store

MOST_PARTS = 1024  # that one preadv takes, on Linux and elsewhere
_TORCH = {
    **{"uint16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32},
    **{"int8": torch.int8, "int32": torch.int32},
}


@runtime_checkable
class Reader(Protocol):
    """Chunks 0..n-1 of a site. Reads may run in several threads at once."""

    @property
    def width(self) -> int:
        """Return how many numbers a row has as it is stored:
        rows are read so, and `Store.decoder` makes activations of them."""
        ...

    @property
    def row_shape(self) -> tuple[int, ...]: ...

    @property
    def sizes(self) -> Ints:
        """Return the valid rows of each chunk."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Return the dtype of rows in memory; uint16 are the bits of bfloat16."""
        ...

    @property
    def torch_dtype(self) -> torch.dtype: ...

    @property
    def bytes_read(self) -> int:
        """Return the bytes of rows that it has read so far, in all threads."""
        ...

    def read(self, chunk: int, out: NDArray[Any], start: int = 0) -> None:
        """Fill `out` with the chunk's valid rows from `start` on, as many as there are and fit.

        A UserError names a chunk file that is missing or not as it was committed. Its checksum is compared when this
        process reads it for the first time (`data.loading.checksums`).
        """
        ...


@runtime_checkable
class ScatterReader(Protocol):
    """A reader that fills several arrays from one chunk without a copy of the whole."""

    def scatter(self, chunk: int, outs: Sequence[NDArray[Any]], start: int) -> None:
        """Fill `outs` one after another with the chunk's rows from `start` on, which must be enough."""
        ...


class _CommittedReader:
    """What both readers know from the commit records alone."""

    def __init__(self, store: Store, split: str, site: str) -> None:
        # A record that was lost would only make the store smaller, and training would go on without its rows, unseen.
        store.refuse_missing_records(split, site)
        self.store, self.split, self.site = store, split, site
        self.checks = ChunkChecks(store, split, site)
        self.row_shape = store.row_shape(split, site)
        self.width = int(np.prod(self.row_shape))
        self.dtype = store.rows_of(site).dtype
        self.torch_dtype = _TORCH[self.dtype.name]
        self.chunks: list[Chunk] = []  # the file that each chunk is in
        self.numbers: list[int] = []  # of each chunk in the array
        self.within: list[int] = []  # and in its file
        self.units: list[int] = []  # that each chunk belongs to
        sizes: list[int] = []
        layout = store.layout
        for unit, commit in store.committed(split, site).items():
            # With shards a file holds a unit's chunks, without them one: rows are counted in chunks either way, so that
            # the order of rows does not depend on how they are filed.
            for file, number in zip(commit.chunks, count(unit * layout.files_per_unit)):
                rows = layout.chunks(file.rows)
                first = number * layout.file_rows // layout.chunk_rows
                self.chunks += [file] * len(rows)
                self.numbers += range(first, first + len(rows))
                self.within += range(len(rows))
                self.units += [unit] * len(rows)
                sizes += rows
        self.sizes = np.array(sizes, np.int64)
        self.bytes_read, self._counting = 0, Lock()

    def _count(self, rows: Iterable[NDArray[Any]]) -> None:
        with self._counting:
            self.bytes_read += sum(part.nbytes for part in rows)

    def _part(self, chunk: int, out: NDArray[Any], start: int) -> NDArray[Any]:
        """Return the rows of `out` that a read fills."""
        assert out.dtype == self.dtype and out.shape[1:] == self.row_shape, (out.dtype, out.shape)
        assert 0 <= start <= self.sizes[chunk], (chunk, start)
        return out[: int(self.sizes[chunk]) - start]

    def _offset(self, chunk: int, start: int) -> int:
        """Return the byte of its file at which a chunk's row `start` begins, where no codec is used."""
        row = self.within[chunk] * self.store.layout.chunk_rows + start
        return row * self.width * self.dtype.itemsize

    def _must_compare(self, chunk: int, offset: int, nbytes: int) -> bool:
        """Return whether the bytes of a read are to be compared: it is the first of its file, and takes all of it.

        The first read of a part has its file read, whole, for the check.
        """
        record = self.chunks[chunk]
        if self.checks.is_done(record):
            return False
        if offset == 0 and nbytes == record.bytes:
            return True
        self.checks.read_and_compare(record, self.units[chunk])
        return False


def _missing(file: int, outs: Sequence[NDArray[Any]], at: int) -> int:
    """Fill `outs` one after another from byte `at` of a file on; the bytes that its end leaves unfilled."""
    wanted = sum(out.nbytes for out in outs)
    # One call scatters a chunk over many batches; reading it whole first would copy each row once more.
    got = os.preadv(file, outs, at)  # type: ignore[arg-type]  # numpy's arrays are buffers, which 3.11's types cannot say
    while got < wanted:  # some file systems give less than they have
        skipped, left = 0, []
        for out in outs:
            left += [out.data.cast("B")[max(got - skipped, 0) :]] if skipped + out.nbytes > got else []
            skipped += out.nbytes
        more = os.preadv(file, left, at + got)
        if not more:
            break
        got += more
    return wanted - got


class DirectReader(_CommittedReader):
    """Reads chunks into place from their files or shards; from folders without a codec, on little-endian machines.

    In a shard without a codec the chunks lie one after another (`data.store.chunk_codec`), so its index need not be
    read.
    """

    def __init__(self, store: Store, split: str, site: str) -> None:
        super().__init__(store, split, site)
        assert isinstance(store.path, Path)
        self._folder = store.path

    def read(self, chunk: int, out: NDArray[Any], start: int = 0) -> None:
        self.scatter(chunk, [self._part(chunk, out, start)], start)

    def scatter(self, chunk: int, outs: Sequence[NDArray[Any]], start: int) -> None:
        """Fill `outs` one after another with the chunk's rows from `start` on, which must be enough."""
        record, unit = self.chunks[chunk], self.units[chunk]
        at = self._offset(chunk, start)
        compare = self._must_compare(chunk, at, sum(out.nbytes for out in outs))
        try:
            file = open_plain(self._folder / record.key)
        except FileNotFoundError:
            raise self.checks.wrong(record, unit, "is missing") from None
        try:
            # A file that grew or shrank is refused before anything of it is used, also by processes that checked it
            # before.
            length = os.fstat(file).st_size
            if length == record.bytes:
                for first in range(0, len(outs), MOST_PARTS):
                    parts = outs[first : first + MOST_PARTS]
                    length -= _missing(file, parts, at)
                    at += sum(part.nbytes for part in parts)
        finally:
            os.close(file)
        self.checks.refuse_length(record, unit, length)
        if compare:
            # On the bytes where they landed: this covers the disk, the bus and the copy, and needs no second read.
            self.checks.compare(record, unit, outs)
        self._count(outs)


class RangeReader(_CommittedReader):
    """Reads chunks into place, each by one request to wherever a store lies; without a codec, as `DirectReader`."""

    def read(self, chunk: int, out: NDArray[Any], start: int = 0) -> None:
        part, record, unit = self._part(chunk, out, start), self.chunks[chunk], self.units[chunk]
        assert part.flags.c_contiguous
        at = self._offset(chunk, start)
        compare = self._must_compare(chunk, at, part.nbytes)
        into = memoryview(part.reshape(-1).view(np.uint8).data)
        try:
            length = self.store.storage.read_into(record.key, at, into)
        except FileNotFoundError:
            raise self.checks.wrong(record, unit, "is missing") from None
        self.checks.refuse_length(record, unit, length)
        if compare:
            self.checks.compare(record, unit, [part])
        self._count([part])


class ZarrReader(_CommittedReader):
    """Reads through zarr-python: any codec it knows."""

    def __init__(self, store: Store, split: str, site: str) -> None:
        super().__init__(store, split, site)
        import zarr

        import data.store.zarr_bfloat16  # noqa: F401  registers the type

        self._array = zarr.open_array(**store.storage.zarr(f"{split}/{site}"), mode="r")

    def read(self, chunk: int, out: NDArray[Any], start: int = 0) -> None:
        from zarr.core.buffer.cpu import NDBuffer

        part, record, unit = self._part(chunk, out, start), self.chunks[chunk], self.units[chunk]
        length = self.store.storage.size(record.key)
        if length is None:  # zarr would give zeros
            raise self.checks.wrong(record, unit, "is missing")
        self.checks.refuse_length(record, unit, length)
        # zarr reads the file again after this, so what it decodes is checked as far as the cache of the system serves
        # both.
        if not self.checks.is_done(record):
            self.checks.read_and_compare(record, unit)
        first = self.numbers[chunk] * self.store.layout.chunk_rows + start
        try:
            self._array.get_basic_selection(slice(first, first + len(part)), out=NDBuffer.from_numpy_array(part))
        except (RuntimeError, ValueError):  # of codecs and of a shard's index
            raise self.checks.wrong(record, unit, "cannot be decoded") from None
        self._count([part])


CommittedReader = DirectReader | RangeReader | ZarrReader


def scatter(reader: Reader, chunk: int, outs: Sequence[NDArray[Any]], start: int) -> None:
    """Fill `outs`, each [n, width], one after another with the chunk's rows from `start` on, as many as they take."""
    if isinstance(reader, ScatterReader):
        reader.scatter(chunk, outs, start)
        return
    rows = np.empty((sum(map(len, outs)), *reader.row_shape), reader.dtype)
    reader.read(chunk, rows, start)
    at = 0
    for out in outs:
        out[...] = rows[at : at + len(out)]
        at += len(out)


def open_reader(store: Store, split: str, site: str) -> CommittedReader:
    """Open the fastest reader that can read this site; a UserError where the store does not have it."""
    metadata, layout = store.metadata(split, site), store.layout
    as_written = store.rows_of(site).format(tuple(metadata["shape"][1:])).metadata()
    # Only where the array's own description says just what we write may its files be read past zarr; another tool may
    # have written it with other codecs.
    plain = layout.codec is None and metadata["codecs"] == as_written["codecs"]
    # Stored bytes are little-endian, and are read into memory as they are.
    if sys.byteorder == "little" and plain:
        if not isinstance(store.path, Path):
            return RangeReader(store, split, site)
        if hasattr(os, "preadv"):
            return DirectReader(store, split, site)
    return ZarrReader(store, split, site)

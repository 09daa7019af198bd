"""Commit records, and how files come to last: what a record names was on the disk before it."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.base.errors import UserError
from data.store.chunk_codec import ChunkCodec
from data.store.manifest import Json, Layout, unseal
from data.store.stats import Stats


@dataclass(frozen=True)
class Chunk:
    """One chunk file as it was written."""

    key: str  # path below the store
    rows: int  # valid rows; the file is padded with zeros
    bytes: int
    crc32c: str


@dataclass(frozen=True)
class Commit:
    """What is true of one unit of one site; its JSON on disk. Statistics are empty for tokens and origin."""

    split: str
    unit: int
    site: str
    rows: int
    chunks: tuple[Chunk, ...]
    sum: list[float]
    sum_sq: float
    mean_norm: float
    max_abs: float
    nonfinite: int
    made_by: Json

    @classmethod
    def of(cls, data: bytes, path: object) -> Commit:
        """Read a record's content; a UserError names `path` where it is damaged or no commit record."""
        remedy = "delete this file and run the same harvest again, which makes its unit anew"
        obj = unseal(data, path, remedy)
        try:
            return cls(**obj | {"chunks": tuple(Chunk(**chunk) for chunk in obj["chunks"])})
        except (TypeError, KeyError):  # sealed, but a file of another kind
            raise UserError(f"{path} is no commit record: {remedy}") from None

    def wrong_name(self, split: str, unit: int, site: str, layout: Layout) -> str | None:
        """Say how the record does not fit its file's name and the store's layout; None where it does."""
        if (self.split, self.unit, self.site) != (split, unit, site):
            return f"is the record of unit {self.unit} of {self.split}/{self.site}"
        rows = [chunk.rows for chunk in self.chunks]
        if rows != layout.files(self.rows) or self.rows > layout.unit_rows:
            return f"has chunks of {rows} rows for its {self.rows}"
        return None

    def wrong_array(self, codec: ChunkCodec, width: int, capacity: int) -> str | None:
        """Say how the record does not fit its array, of so many rows of `width` numbers; None where it does."""
        layout = codec.layout
        if (self.unit + 1) * layout.unit_rows > capacity:
            return f"is of a unit beyond the {capacity} rows of its array"
        if len(self.sum) not in (0, width):
            return f"has sums of {len(self.sum)} numbers where rows have {width}"
        for number, chunk in enumerate(self.chunks, self.unit * layout.files_per_unit):
            key = chunk_key(self.split, self.site, number, codec.row_shape)
            if chunk.key != key:
                return f"names {chunk.key} where {key} belongs"
            size = codec.file_bytes(chunk.rows)
            if size not in (None, chunk.bytes):
                return f"has {chunk.bytes} bytes for {chunk.key} where its array's files have {size}"
        return None

    @property
    def stats(self) -> Stats:
        return Stats(self.rows, np.array(self.sum), self.sum_sq, self.mean_norm, self.max_abs)


def record_key(split: str, unit: int, site: str) -> str:
    """The path of a commit record below its store."""
    return f"commits/{split}/{unit:06d}.{site}.json"


def unit_of(key: str) -> int:
    """The unit that a commit record's path names."""
    return int(key.rpartition("/")[2].partition(".")[0])


def chunk_key(split: str, site: str, number: int, row_shape: tuple[int, ...]) -> str:
    """The path, below the store, of the number-th chunk file of an array."""
    return f"{split}/{site}/c.{number}" + ".0" * len(row_shape)


def remake(store: Location, split: str, unit: int, site: str) -> str:
    """The one remedy for a damaged unit of a site, as the end of a sentence."""
    record = store / record_key(split, unit, site)
    return f"delete {record} and run the same harvest again, which makes unit {unit} of {split}/{site} anew"


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError say which file it is about, which calls on open files do not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def fsync(folder: Path) -> None:
    """Make the names in a folder (or a file's content) last through a power failure; an OSError names it."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write and fsync it; what fails leaves no file, and an OSError names it."""
    try:
        with naming(path), open(path, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def put(path: Path, data: bytes) -> None:
    """Write a file that no other process writes now (in a store: under its lock): all of it or nothing.

    What a killed process leaves has the one name that the next one to write this record writes to.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with whole_file(temporary) as file:
        file.write(data)
    os.replace(temporary, path)
    fsync(path.parent)


def put_first(path: Path, data: bytes) -> None:
    """Write a file that others may be writing at the same time, with the same bytes and without a lock."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with contextlib.suppress(FileNotFoundError):  # another was first, and removed this one
        with whole_file(temporary) as file:
            file.write(data)
        os.replace(temporary, path)
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        left.unlink(missing_ok=True)
    fsync(path.parent)

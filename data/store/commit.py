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

from data.store.manifest import Json, unseal
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
        """From a record's content; a UserError naming `path` where it is damaged."""
        obj = unseal(data, path, "delete this file and run the same harvest again to make its unit anew")
        return cls(**obj | {"chunks": tuple(Chunk(**chunk) for chunk in obj["chunks"])})

    @property
    def stats(self) -> Stats:
        return Stats(self.rows, np.array(self.sum), self.sum_sq, self.mean_norm, self.max_abs)


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

"""Commit records: what is true of one unit of one site, written once all that they name is on the disk."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from data.base.errors import UserError
from data.base.location import Location
from data.base.records import Json, unseal
from data.store.chunk_codec import ChunkCodec
from data.store.layout import Layout
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
        # All chunks of a unit but the last are full, so that the place of a row follows from the layout alone.
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
            # A codec's length depends on the values; the crc32c alone must vouch for such a file.
            if size not in (None, chunk.bytes):
                return f"has {chunk.bytes} bytes for {chunk.key} where its array's files have {size}"
        return None

    @property
    def stats(self) -> Stats:
        return Stats(self.rows, np.array(self.sum), self.sum_sq, self.mean_norm, self.max_abs)


RECORD = re.compile(r"(\d{6,})\.(\w[\w.-]*)\.json")  # the name of a record: unit, site


def record_key(split: str, unit: int, site: str) -> str:
    """Return the path of a commit record below its store."""
    return f"commits/{split}/{unit:06d}.{site}.json"


def unit_of(key: str) -> int:
    """Return the unit that a commit record's path names."""
    return int(key.rpartition("/")[2].partition(".")[0])


def chunk_key(split: str, site: str, number: int, row_shape: tuple[int, ...]) -> str:
    """Return the path, below the store, of the number-th chunk file of an array."""
    return f"{split}/{site}/c.{number}" + ".0" * len(row_shape)


def remake(store: Location, split: str, unit: int, site: str) -> str:
    """Return the one remedy for a damaged unit of a site, as the end of a sentence."""
    record = store / record_key(split, unit, site)
    return f"delete {record} and run the same harvest again, which makes unit {unit} of {split}/{site} anew"

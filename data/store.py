"""The store: a folder of Zarr v3 arrays, one chunk a file, where only what a commit record names counts.

    manifest.json                            written first
    <split>/<site>/                          array [capacity, width], rows of all sites align; plain chunks, or as the
                                             layout says int8 rows, compressed, a unit in one shard
    <split>/tokens, <split>/origin           int32 [capacity], int32 [capacity, 2] (sequence, position)
    commits/<split>/<unit>.<site>.json       written last: rows, bytes and crc32c of each chunk file, statistics
    complete.json                            written when all that was asked for is committed
    claims/                                  there only while processes write: data/claims.py

A unit is `layout.chunks_per_unit` consecutive chunks, of which only those that hold rows are written; with shards its
one file is what is called a chunk file here. A committed unit is never written again. Any number of processes may
write: each chunk is staged under a name of its own, and under the store's lock, which the kernel keeps, a unit's chunks
come to their places and its record is written, once.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data.claims import Claims, Overtaken
from data.commit import Chunk, Commit, fsync, put, put_first, whole_file
from data.errors import UserError
from data.lock import alone
from data.manifest import HELDOUT, TRAIN, Json, Layout, Manifest, differing, seal, seal_array, unseal
from data.order import Ints, seeded_permutation
from data.rows import BOOKS, Rows
from data.stats import Stats

if TYPE_CHECKING:  # it needs torch
    from data.encoding import Decoder, Standard

TOKENS, ORIGIN = BOOKS
_SITE = re.compile(r"\w[\w.-]*")


class Store:
    """One store, open. Reading needs no lock; `require` and `write` take it themselves."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self.claims = Claims(path / "claims", self.lock)
        self._commits: dict[Path, Commit] = {}  # a record never changes once it is there
        self._rows: dict[str, Rows] = {}  # nor does how a site's rows are encoded

    @classmethod
    def open(cls, path: Path | str) -> Store:
        """Open a folder; a UserError where it is no store, its manifest is damaged or its format is newer."""
        path = Path(path)
        if not (path / "manifest.json").is_file():
            raise UserError(f"{path} is not a store (it has no manifest.json): give the folder of a harvested cache")
        return cls(path, Manifest.from_json(path / "manifest.json"))

    @classmethod
    def create_or_open(cls, cache: Path, manifest: Manifest) -> Store:
        """Open `manifest`'s folder in `cache`, or make it, manifest first; a UserError names fields that differ."""
        path = cache / manifest.folder
        if not (path / "manifest.json").exists():
            if (path / "commits").exists():
                raise UserError(
                    f"{path} has lost its manifest.json: restore it, or delete the folder and harvest again"
                )
            path.mkdir(parents=True, exist_ok=True)
            put_first(path / "manifest.json", manifest.to_json())
            fsync(cache)
        store = cls.open(path)
        fields = differing(store.manifest.identity, manifest.identity)
        if fields:
            raise UserError(f"{path} was made otherwise ({'; '.join(fields)}): ask for the same, or use another cache")
        return store

    @property
    def layout(self) -> Layout:
        return self.manifest.layout

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Be the only one to change what the store holds, for a moment; not to be entered twice."""
        return alone(self.path / "manifest.json")

    def array_path(self, split: str, site: str) -> Path:
        return self.path / split / site

    def metadata(self, split: str, site: str) -> Json:
        """The array's zarr.json; a UserError where the store has no such site."""
        path = self.array_path(split, site) / "zarr.json"
        if not path.is_file():
            have = ", ".join(self.sites(split)) or "none"
            raise UserError(f"{self.path} has no site {site} in split {split} (it has: {have}): harvest it first")
        try:
            found: Json = json.loads(path.read_bytes())
        except ValueError:
            raise UserError(f"{path} is damaged: delete the store and harvest again") from None
        return found

    def row_shape(self, split: str, site: str) -> tuple[int, ...]:
        """Of rows as they are stored."""
        return tuple(self.metadata(split, site)["shape"][1:])

    def rows_of(self, site: str) -> Rows:
        """The forms that the rows of a site or book have, in either split."""
        rows = self._rows.get(site) or Rows(self.layout, site, {})
        if rows.is_int8 and not rows.attributes:
            for split in (TRAIN, HELDOUT):
                if not rows.attributes and (self.array_path(split, site) / "zarr.json").is_file():
                    rows = Rows(self.layout, site, self.metadata(split, site).get("attributes", {}))
        if rows.attributes or not rows.is_int8:
            self._rows[site] = rows
        return rows

    def decoder(self, split: str, site: str) -> Decoder:
        """A new module that turns stored rows [B, W] into activations [B, `decoder.width`], on any device."""
        rows = self.rows_of(site)
        return rows.decoder(rows.width(self.row_shape(split, site)))

    def require(self, split: str, site: str, width: int, rows_capacity: int, standard: Standard | None = None) -> None:
        """Make the array of a site with room for `rows_capacity` rows in whole units, or let it grow; never shrinks.

        standard: what int8 rows are encoded by, where no array of the site says it yet.
        """
        assert _SITE.fullmatch(site), f"{site!r} cannot name a folder"
        path, unit_rows = self.array_path(split, site), self.layout.unit_rows
        capacity = -(-rows_capacity // unit_rows) * unit_rows
        row_shape = self.rows_of(site).shape(width)
        with self.lock():
            if not (path / "zarr.json").exists():
                self._create_array(split, site, (capacity, *row_shape))
            found = self.metadata(split, site)
            shape = (found["shape"][0], *row_shape)
            assert tuple(found["shape"]) == shape, f"{path} has rows of shape {found['shape'][1:]}, not {row_shape}"
            if self.rows_of(site).is_int8:
                encoded_by = self.rows_of(site).standard or standard
                assert encoded_by is not None and len(encoded_by.mean) == width, f"{site} has no standard for {width}"
                found["attributes"] = {"encoding": encoded_by.attributes(site)}
            grown = seal_array(found | {"shape": [max(capacity, shape[0]), *row_shape]})
            if grown == (path / "zarr.json").read_bytes():
                return
            put(path / "zarr.json", grown)
            for folder in (path, path.parent, self.path):
                for left in folder.glob("zarr.*.partial"):  # zarr's temporary names, of a process killed in here
                    left.unlink()
            for written in (path.parent, self.path):
                fsync(written)

    def _create_array(self, split: str, site: str, shape: tuple[int, ...]) -> None:
        import zarr

        from data.bfloat16 import BFloat16

        rows, files = self.rows_of(site), self.rows_of(site).format(shape[1:])
        zarr.open_group(self.path, mode="a").require_group(split).create_array(
            site,
            shape=shape,
            chunks=(self.layout.chunk_rows, *shape[1:]),
            shards=(self.layout.unit_rows, *shape[1:]) if self.layout.shards else None,
            dtype=BFloat16() if rows.dtype == np.uint16 else rows.dtype,
            fill_value=0,
            compressors=files.compressor,
            filters=None,
            # All chunks in one folder: one directory fsync a unit.
            chunk_key_encoding={"name": "default", "separator": "."},
        )

    def _record(self, split: str, unit: int, site: str) -> Path:
        return self.path / "commits" / split / f"{unit:06d}.{site}.json"

    def _records(self, split: str) -> list[tuple[int, str, Path]]:
        """(unit, site, file) of every commit of a split, by unit."""
        names = (path.name.split(".", 1) for path in (self.path / "commits" / split).glob("[0-9]*.json"))
        found = sorted((int(unit), rest.removesuffix(".json")) for unit, rest in names)
        return [(unit, site, self._record(split, unit, site)) for unit, site in found]

    def is_committed(self, split: str, unit: int, site: str) -> bool:
        return self._record(split, unit, site).exists()

    def committed(self, split: str, site: str) -> dict[int, Commit]:
        """The commits of a site by unit, in order; a UserError names a damaged record."""
        found = {}
        for unit, name, path in self._records(split):
            if name == site:
                if path not in self._commits:
                    self._commits[path] = Commit.read(path)
                found[unit] = self._commits[path]
        return found

    def permutation(self, split: str, unit: int, n: int) -> Ints:
        """The seeded order of a unit's `n` rows, the same for all its sites, tokens and origin."""
        return seeded_permutation(n, "mixing", self.layout.mixing_seed, split, unit)

    def write(
        self, split: str, unit: int, site: str, rows: NDArray[Any], made_by: Json, order: Ints | None = None
    ) -> Commit:
        """Write and commit a unit's rows, [n, width] in the native dtype: row i is `rows[order[i]]`, or `rows[i]`.

        Chunks are on the disk before their record is. Where the unit is committed by the time, that commit stands and
        is returned. A UserError refuses values that are not finite; Overtaken tells that the claim was taken over.
        """
        layout = self.layout
        shape = self.metadata(split, site)["shape"]
        kind = self.rows_of(site)
        assert rows.dtype == kind.native and np.prod(rows.shape[1:]) == kind.width(shape[1:]), (rows.dtype, rows.shape)
        assert len(rows) <= layout.unit_rows and (unit + 1) * layout.unit_rows <= shape[0], (len(rows), unit, shape)
        stage = self.claims.stage(split, unit, site)
        try:
            chunks, stats = self._stage(stage, split, unit, kind, rows, order, tuple(shape[1:]))
            moments = (stats.sum.tolist(), stats.sum_sq, stats.mean_norm, stats.max_abs)
            commit = Commit(split, unit, site, len(rows), tuple(chunks), *moments, nonfinite=0, made_by=made_by)
            return self._settle(stage, commit)
        except FileNotFoundError:
            if self.array_path(split, site).is_dir():
                raise Overtaken(f"unit {unit} of {split}/{site}") from None
            raise
        finally:
            self.claims.unstage(stage)

    def _stage(
        self,
        stage: Path,
        split: str,
        unit: int,
        kind: Rows,
        rows: NDArray[Any],
        order: Ints | None,
        row_shape: tuple[int, ...],
    ) -> tuple[list[Chunk], Stats]:
        """Write the chunk files of a unit into `stage`; statistics are of the values that will be read."""
        parts: list[Stats] = []

        def stored(first: int, n: int) -> Iterator[NDArray[Any]]:
            for at in range(first, first + n, self.layout.chunk_rows):
                chunk = slice(at, min(at + self.layout.chunk_rows, first + n))
                # Only a chunk is there twice; and rows[order[chunk]] takes ten times as long.
                part = kind.stored(rows[chunk] if order is None else rows.take(order[chunk], axis=0))
                if not kind.is_book:
                    parts.append(Stats.of(kind.values(part)))
                    if not np.isfinite(parts[-1].max_abs):
                        at_site = f"unit {unit} of {split}/{kind.site}"
                        raise UserError(f"{at_site} holds values that are not finite: it is not stored")
                yield part

        chunks, at = [], 0
        for number, n in enumerate(self.layout.files(len(rows)), unit * self.layout.files_per_unit):
            key = self.key(split, kind.site, number, row_shape)
            pieces = kind.format(row_shape).pieces(stored(at, n))
            chunks.append(Chunk(key, n, *self._write_chunk(stage, key, pieces)))
            at += n
        return chunks, Stats.merge(parts) if parts else Stats(len(rows), np.zeros(0), 0.0, 0.0, 0.0)

    @staticmethod
    def key(split: str, site: str, number: int, row_shape: tuple[int, ...]) -> str:
        """The path, below the store, of the number-th chunk file of an array."""
        return f"{split}/{site}/c.{number}" + ".0" * len(row_shape)

    def _settle(self, stage: Path, commit: Commit) -> Commit:
        """Move staged chunks to their places and write the record, unless another process has."""
        record = self._record(commit.split, commit.unit, commit.site)
        with self.lock():
            if record.exists():
                return Commit.read(record)
            for chunk in commit.chunks:
                os.replace(stage / Path(chunk.key).name, self.path / chunk.key)
            fsync(self.array_path(commit.split, commit.site))
            record.parent.mkdir(parents=True, exist_ok=True)
            put(record, seal(asdict(commit)))
        return commit

    def _write_chunk(self, stage: Path, key: str, pieces: Iterable[bytes]) -> tuple[int, str]:
        """Write one chunk file into `stage`; returns its bytes and their crc32c."""
        import google_crc32c

        crc, size = 0, 0
        with whole_file(stage / Path(key).name) as file:
            for data in pieces:
                file.write(data)
                crc, size = google_crc32c.extend(crc, data), size + len(data)
        return size, f"{crc:08x}"

    def rows(self, split: str, site: str) -> int:
        """Committed rows."""
        return sum(commit.rows for commit in self.committed(split, site).values())

    def sites(self, split: str) -> list[str]:
        """Activation sites with something committed, without tokens and origin."""
        return sorted({site for _, site, _ in self._records(split)} - BOOKS.keys())

    def stats(self, split: str, site: str) -> Stats:
        """Statistics over all committed rows; a UserError where there are none."""
        parts = [commit.stats for commit in self.committed(split, site).values() if commit.rows]
        if not parts:
            raise UserError(f"{self.path} holds no rows of {site} in split {split}: harvest them first")
        return Stats.merge(parts)

    def mark_complete(self, extent: Json) -> None:
        """Record, under the lock, that all of `extent` is committed."""
        put(self.path / "complete.json", seal(extent))

    @property
    def complete(self) -> Json | None:
        """The extent last marked complete, or None."""
        path = self.path / "complete.json"
        return unseal(path, "delete it and run the same harvest again") if path.exists() else None


def _stores(cache: Path) -> tuple[list[Store], list[UserError]]:
    """All stores of a cache folder by name, and what is wrong with those that cannot be opened."""
    found, wrong = [], []
    for path in sorted(cache.glob("*/manifest.json")):
        try:
            found.append(Store.open(path.parent))
        except UserError as error:
            wrong.append(error)
    return found, wrong


def _matching(cache: Path, matches: Callable[[Store], bool]) -> list[Store]:
    """The stores that match; where none does but some could not be opened, the first such error."""
    stores, wrong = _stores(Path(cache))
    found = [store for store in stores if matches(store)]
    if not found and wrong:
        raise wrong[0]
    return found


def find(cache: Path, settings: Json) -> list[Store]:
    """All stores of a cache that were asked for with just these settings."""
    return _matching(cache, lambda store: store.manifest.settings == settings)


def find_fingerprint(cache: Path, fingerprint: str) -> Store:
    """The store with this fingerprint; a UserError where there is none."""
    found = _matching(cache, lambda store: store.manifest.fingerprint == fingerprint)
    if not found:
        raise UserError(f"no store in {cache} has the fingerprint {fingerprint[:12]}: harvest it again or set cache=")
    return found[0]


def pick(stores: Sequence[Store]) -> Store:
    """The one store of `stores` (at least one); a UserError lists several, for nothing is guessed."""
    assert stores, "no store to pick from"
    if len(stores) > 1:
        names = ", ".join(str(store.path) for store in stores)
        raise UserError(f"{len(stores)} stores match these settings ({names}): choose one with store=<path>")
    return stores[0]

"""The store: a place of Zarr v3 arrays, one chunk a file, where only what a commit record names counts.

    manifest.json                            written first
    <split>/<site>/                          array [capacity, width], rows of all sites align; plain chunks, or as the
                                             layout says int8 rows, compressed, a unit in one shard
    <split>/tokens, <split>/origin           int32 [capacity], int32 [capacity, 2] (sequence, position)
    commits/<split>/<unit>.<site>.json       written last: rows, bytes and crc32c of each chunk file, statistics
    complete.json                            written when all that was asked for is committed
    claims/                                  there only while processes write: data/storage/leases.py

A unit is `layout.chunks_per_unit` consecutive chunks, of which only those that hold rows are written; with shards its
one file is what is called a chunk file here. A committed unit is never written again. Any number of processes may
write: each chunk is staged under a name of its own, and a unit's chunks come to their places and its record is written,
once, as a folder or an object store can: data/storage/local.py.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data.base.errors import UserError
from data.base.location import Location, Url, parse_location
from data.base.records import Json, diff_fields, seal, seal_array, unseal
from data.base.seeded import Ints, seeded_permutation
from data.storage.base import LeaseLost
from data.storage.open import open_storage
from data.store.commit import RECORD, Chunk, Commit, chunk_key, record_key, remake, unit_of
from data.store.layout import Layout
from data.store.manifest import HELDOUT, TRAIN, Manifest
from data.store.row_format import INDEX_ARRAYS, RowFormat
from data.store.stats import Stats

if TYPE_CHECKING:  # it needs torch
    from data.store.int8 import FeatureScale, RowDecoder

TOKENS, ORIGIN = INDEX_ARRAYS
_SITE = re.compile(r"\w[\w.-]*")


def read_manifest(path: Location) -> Manifest:
    """Read the manifest in a folder, whatever the folder's name; a UserError where there is none or it is damaged."""
    try:
        return Manifest.from_json(open_storage(path).read("manifest.json"), path / "manifest.json")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{path} is not a store (it has no manifest.json): give the folder of a harvested cache"
        ) from None


class Store:
    """One store, open."""

    def __init__(self, path: Location, manifest: Manifest) -> None:
        self.path, self.manifest, self.storage = path, manifest, open_storage(path)
        self.leases = self.storage.leases
        self._commits: dict[str, Commit] = {}  # a record never changes once it is there
        self._rows: dict[str, RowFormat] = {}  # nor does how a site's rows are encoded

    @classmethod
    def open(cls, path: Location | str) -> Store:
        """Open a folder or URL; a UserError where it is no store, its manifest is damaged or its format is newer."""
        path = parse_location(path)
        manifest = read_manifest(path)
        # A folder may be reached by a symlink of another name, so the name that it resolves to counts as well.
        names = {path.name} if isinstance(path, Url) else {path.absolute().name, path.resolve().name}
        if manifest.folder not in names:
            raise UserError(
                f"{path / 'manifest.json'} is the manifest of {manifest.folder}: give the folder that name, or restore "
                "its own manifest from a copy"
            )
        return cls(path, manifest)

    @classmethod
    def create_or_open(cls, cache: Location, manifest: Manifest) -> Store:
        """Open `manifest`'s folder in `cache`, or make it, manifest first; a UserError names fields that differ."""
        path = cache / manifest.folder
        place = open_storage(path)
        if place.size("manifest.json") is None:
            # Without its manifest a store cannot say what its rows are. A new one over old chunks would give them
            # another meaning.
            if "commits" in place.folders():
                raise UserError(
                    f"{path} has lost its manifest.json: restore it, or delete the folder and harvest again"
                )
            place.create("manifest.json", manifest.to_json())
        # Another process may have made it in between: what counts is what lies there now, not what this one wanted to
        # write.
        there = read_manifest(path)
        fields = diff_fields(there.identity, manifest.identity)
        if fields:
            raise UserError(f"{path} was made otherwise ({'; '.join(fields)}): ask for the same, or use another cache")
        return cls(path, there)

    @property
    def layout(self) -> Layout:
        return self.manifest.layout

    def array_path(self, split: str, site: str) -> Location:
        return self.path / split / site

    def metadata(self, split: str, site: str) -> Json:
        """Read the array's zarr.json; a UserError where the store has no such site."""
        key = f"{split}/{site}/zarr.json"
        try:
            return self._parsed(key, self.storage.read(key))
        except FileNotFoundError:
            have = ", ".join(self.sites(split)) or "none"
            raise UserError(
                f"{self.path} has no site {site} in split {split} (it has: {have}): harvest it first"
            ) from None

    def _parsed(self, key: str, data: bytes) -> Json:
        """Parse a zarr.json, which carries a check of its own unless another program wrote it."""
        try:
            metadata: Json = json.loads(data)
            # zarr-python keeps attributes it does not know, but a tool that rewrites the file may drop the check: then
            # only the shape is looked at, as for any other array of Zarr.
            checked = "check" in metadata.get("attributes", {})
            if all(type(n) is int for n in metadata["shape"]) and not (checked and data != seal_array(metadata)):
                return metadata
        except (ValueError, TypeError, KeyError, AttributeError):  # not JSON, or no array's
            pass
        raise UserError(
            f"{self.path / key} is damaged: restore it from a copy, or delete the store and run the same harvest again"
        )

    def row_shape(self, split: str, site: str) -> tuple[int, ...]:
        """Return the shape of rows as they are stored."""
        return tuple(self.metadata(split, site)["shape"][1:])

    def rows_of(self, site: str) -> RowFormat:
        """Return the forms that the rows of a site or book have, in either split."""
        rows = self._rows.get(site) or RowFormat(self.layout, site, {})
        # Both splits of a site share one scale, measured on train/. The array of either may exist first, so both are
        # looked at.
        if rows.is_int8 and not rows.attributes:
            for split in (TRAIN, HELDOUT):
                if not rows.attributes and self.storage.size(f"{split}/{site}/zarr.json") is not None:
                    rows = RowFormat(self.layout, site, self.metadata(split, site).get("attributes", {}))
        # Cached only once it is known for good: an int8 site whose array is yet to be made gets its attributes later.
        if rows.attributes or not rows.is_int8:
            self._rows[site] = rows
        return rows

    def decoder(self, split: str, site: str) -> RowDecoder:
        """Return a new module that turns stored rows [B, W] into activations [B, `decoder.width`], on any device."""
        rows = self.rows_of(site)
        return rows.decoder(rows.width(self.row_shape(split, site)))

    def require(
        self, split: str, site: str, width: int, rows_capacity: int, standard: FeatureScale | None = None
    ) -> None:
        """Make the array of a site with room for `rows_capacity` rows in whole units, or let it grow; never shrinks.

        standard: what int8 rows are encoded by, where no array of the site says it yet.
        """
        assert _SITE.fullmatch(site), f"{site!r} cannot name a folder"
        key, unit_rows = f"{split}/{site}/zarr.json", self.layout.unit_rows
        capacity = -(-rows_capacity // unit_rows) * unit_rows
        row_shape = self.rows_of(site).shape(width)
        # zarr itself writes the description of a new array, in memory, so that its defaults are not repeated here.
        made = {} if self.storage.size(key) else self.rows_of(site).zarr_files(split, (capacity, *row_shape))
        # The groups above the array may be there already, made by a process that is at another site: they are left as
        # they are.
        for group in (name for name in made if name != key):
            self.storage.update(group, lambda old, new=made[group]: old or new)  # type: ignore[misc]

        def grown(old: bytes | None) -> bytes:
            found = self._parsed(key, old or made[key])
            shape = (found["shape"][0], *row_shape)
            assert tuple(found["shape"]) == shape, f"{key} has rows of shape {found['shape'][1:]}, not {row_shape}"
            if self.rows_of(site).is_int8:
                encoded_by = self.rows_of(site).standard or standard
                # A scale that is on the disk goes before the one measured now: rows encoded by it may be committed
                # already.
                assert encoded_by is not None and len(encoded_by.mean) == width, f"{site} has no standard for {width}"
                found["attributes"] = {"encoding": encoded_by.attributes(site)}
            # Only the shape grows. Chunks that do not exist read as zeros, and no reader goes beyond what commit
            # records count.
            return seal_array(found | {"shape": [max(capacity, shape[0]), *row_shape]})

        self.storage.update(key, grown)

    def _records(self, split: str) -> list[tuple[int, str, str]]:
        """Return (unit, site, key) of every commit of a split, by unit."""
        names = (RECORD.fullmatch(name) for name in self.storage.list_files(f"commits/{split}"))
        records = sorted((int(match[1]), match[2]) for match in names if match)
        return [(unit, site, record_key(split, unit, site)) for unit, site in records]

    def is_committed(self, split: str, unit: int, site: str) -> bool:
        return self.storage.size(record_key(split, unit, site)) is not None

    def committed(self, split: str, site: str) -> dict[int, Commit]:
        """Read the commits of a site by unit, in order; a UserError names a damaged record."""
        records = [(unit, key) for unit, name, key in self._records(split) if name == site]
        # Listing is cheap and shows what others have committed since; a record that was read once is not read again.
        unread = [key for _, key in records if key not in self._commits]
        if unread:
            self._read_records(split, site, unread)
        return {unit: self._commits[key] for unit, key in records if key in self._commits}

    def _read_records(self, split: str, site: str, keys: Sequence[str]) -> None:
        """Read commit records and hold each against its name, the layout and its array."""
        capacity, *row_shape = self.metadata(split, site)["shape"]
        kind = self.rows_of(site)
        codec, width = kind.format(tuple(row_shape)), kind.width(tuple(row_shape))
        for key, data in zip(keys, self.storage.read_many(keys), strict=True):
            if isinstance(data, FileNotFoundError):  # it was removed a moment ago
                continue
            if isinstance(data, OSError):
                raise data
            commit, unit = Commit.of(data, self.path / key), unit_of(key)
            wrong = commit.wrong_name(split, unit, site, self.layout) or commit.wrong_array(codec, width, capacity)
            if wrong:
                raise UserError(f"{self.path / key} {wrong}: {remake(self.path, split, unit, site)}")
            self._commits[key] = commit

    def refuse_missing_records(self, split: str, site: str) -> None:
        """Raise UserError where complete.json counts rows of a site whose commit records are not there."""
        complete = self.complete or {}  # before the records: what is committed meanwhile is not in it
        sites = complete.get(split)
        counted = sites.get(site, 0) if isinstance(sites, dict) else 0
        commits = self.committed(split, site)
        rows = sum(commit.rows for commit in commits.values())
        if isinstance(counted, int) and rows < counted:
            # Units are committed in any order, so the first one that is missing may lie before others that are there.
            first = next(unit for unit in itertools.count() if unit not in commits)
            raise UserError(
                f"{self.path / record_key(split, first, site)} is missing: complete.json counts {counted:,} rows of "
                f"{split}/{site}, {rows:,} are committed; run the same harvest again, which makes the others anew"
            )

    def permutation(self, split: str, unit: int, n: int) -> Ints:
        """Return the seeded order of a unit's `n` rows, the same for all its sites, tokens and origin."""
        return seeded_permutation(n, "mixing", self.layout.mixing_seed, split, unit)

    def write(
        self, split: str, unit: int, site: str, rows: NDArray[Any], made_by: Json, order: Ints | None = None
    ) -> Commit:
        """Write and commit a unit's rows, [n, width] in the native dtype: row i is `rows[order[i]]`, or `rows[i]`.

        Chunks are on the disk before their record is. Where the unit is committed by the time, that commit stands and
        is returned. A UserError refuses values that are not finite; LeaseLost tells that the claim was taken over.
        """
        layout = self.layout
        shape = self.metadata(split, site)["shape"]
        kind = self.rows_of(site)
        assert rows.dtype == kind.native and np.prod(rows.shape[1:]) == kind.width(shape[1:]), (rows.dtype, rows.shape)
        assert len(rows) <= layout.unit_rows and (unit + 1) * layout.unit_rows <= shape[0], (len(rows), unit, shape)
        stage = self.leases.stage(split, unit, site)
        try:
            chunks, stats = self._stage(stage, split, unit, kind, rows, order, tuple(shape[1:]))
            moments = (stats.sum.tolist(), stats.sum_sq, stats.mean_norm, stats.max_abs)
            commit = Commit(split, unit, site, len(rows), tuple(chunks), *moments, nonfinite=0, made_by=made_by)
            record, keys = record_key(split, unit, site), [chunk.key for chunk in chunks]
            # Whoever comes first wins: if another process committed this unit meanwhile, its record is returned and not
            # ours.
            standing = self.storage.commit_staged(stage, keys, record, seal(asdict(commit)))
            return Commit.of(standing, self.path / record)
        except FileNotFoundError:
            # The stage is gone though the array is there: another process took this one for dead and swept what it had
            # staged. If the array is gone too, somebody removed the whole store, and the error says so.
            if self.storage.size(f"{split}/{site}/zarr.json") is not None:
                raise LeaseLost(f"unit {unit} of {split}/{site}") from None
            raise
        finally:
            self.leases.unstage(stage)

    def _stage(
        self,
        stage: Location,
        split: str,
        unit: int,
        kind: RowFormat,
        rows: NDArray[Any],
        order: Ints | None,
        row_shape: tuple[int, ...],
    ) -> tuple[list[Chunk], Stats]:
        """Write the chunk files of a unit into `stage`; statistics are of the values that will be read."""
        parts: list[Stats] = []

        # A generator, so that no more than one chunk of the unit exists a second time while its file is written.
        def stored(first: int, n: int) -> Iterator[NDArray[Any]]:
            for at in range(first, first + n, self.layout.chunk_rows):
                chunk = slice(at, min(at + self.layout.chunk_rows, first + n))
                # Only a chunk is there twice; and rows[order[chunk]] takes ten times as long.
                part = kind.stored(rows[chunk] if order is None else rows.take(order[chunk], axis=0))
                if not kind.is_book:
                    # Of the decoded rows, not the given ones: training normalises what it will read, with the rounding
                    # of int8 in it.
                    parts.append(Stats.of(kind.values(part)))
                    if not np.isfinite(parts[-1].max_abs):
                        at_site = f"unit {unit} of {split}/{kind.site}"
                        raise UserError(f"{at_site} holds values that are not finite: it is not stored")
                yield part

        chunks, at = [], 0
        for number, n in enumerate(self.layout.files(len(rows)), unit * self.layout.files_per_unit):
            key = chunk_key(split, kind.site, number, row_shape)
            pieces = kind.format(row_shape).encode(stored(at, n))
            chunks.append(Chunk(key, n, *self._write_chunk(stage, key, pieces)))
            at += n
        # Tokens and origin have no statistics worth keeping; their record has empty sums (`Commit.wrong_array` knows).
        return chunks, Stats.merge(parts) if parts else Stats(len(rows), np.zeros(0), 0.0, 0.0, 0.0)

    def _write_chunk(self, stage: Location, key: str, pieces: Iterable[bytes]) -> tuple[int, str]:
        """Write one chunk file into `stage`; returns its bytes and their crc32c."""
        import google_crc32c

        crc, size = 0, 0

        def counted() -> Iterator[bytes]:
            nonlocal crc, size
            for data in pieces:
                # Computed while the bytes pass by, so that what is checked later is what was meant to be written, not
                # what a disk made of it.
                crc, size = google_crc32c.extend(crc, data), size + len(data)
                yield data

        self.storage.put_staged(stage, key.rpartition("/")[2], counted())
        return size, f"{crc:08x}"

    def rows(self, split: str, site: str) -> int:
        """Return the committed rows."""
        return sum(commit.rows for commit in self.committed(split, site).values())

    def sites(self, split: str) -> list[str]:
        """Return the activation sites with something committed, without tokens and origin."""
        return sorted({site for _, site, _ in self._records(split)} - INDEX_ARRAYS.keys())

    def stats(self, split: str, site: str) -> Stats:
        """Return the statistics over all committed rows; a UserError where there are none."""
        self.refuse_missing_records(split, site)
        # A unit without a kept row has nothing to add, and no mean.
        parts = [commit.stats for commit in self.committed(split, site).values() if commit.rows]
        if not parts:
            raise UserError(f"{self.path} holds no rows of {site} in split {split}: harvest them first")
        return Stats.merge(parts)

    def mark_complete(self, extent: Callable[[], Json]) -> None:
        """Record that all of `extent()`, looked at while no other process does the same, is committed."""
        self.storage.update("complete.json", lambda _: seal(extent()))

    @property
    def complete(self) -> Json | None:
        """Return the extent last marked complete, or None."""
        try:
            data = self.storage.read("complete.json")
        except FileNotFoundError:
            return None
        return unseal(data, self.path / "complete.json", "delete it and run the same harvest again")

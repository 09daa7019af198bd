"""The store: a folder of Zarr v3 arrays, one chunk a file, where only what a commit record names counts.

    manifest.json                            written first
    <split>/<site>/                          array [capacity, width], plain chunks; rows of all sites align
    <split>/tokens, <split>/origin           int32 [capacity], int32 [capacity, 2] (sequence, position)
    commits/<split>/<unit>.<site>.json       written last: rows, bytes and crc32c of each chunk file, statistics
    complete.json                            written when all that was asked for is committed
    claims/                                  there only while processes write: data/claims.py

A unit is `layout.chunks_per_unit` consecutive chunks, of which only those that hold rows are written. A committed unit
is never written again. Any number of processes may write: each chunk is staged under a name of its own, and under the
store's lock, which the kernel keeps, a unit's chunks come to their places and its record is written, once.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.claims import Claims, Overtaken
from data.commit import Chunk, Commit, fsync, put, put_first, whole_file
from data.errors import UserError
from data.lock import alone
from data.manifest import Json, Layout, Manifest, differing, seal, seal_array, unseal
from data.order import Ints, seeded_permutation
from data.stats import Stats

TOKENS, ORIGIN = "tokens", "origin"
_ROW_SHAPES: dict[str, tuple[int, ...]] = {TOKENS: (), ORIGIN: (2,)}
_NATIVE = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32}
_SITE = re.compile(r"\w[\w.-]*")


def widen(rows: NDArray[Any]) -> NDArray[Any]:
    """Stored rows as floats: uint16 are the bits of bfloat16."""
    if rows.dtype != np.uint16:
        return rows
    from data.bfloat16 import to_float32

    return to_float32(rows)


class Store:
    """One store, open. Reading needs no lock; `require` and `write` take it themselves."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest
        self.claims = Claims(path / "claims", self.lock)
        self._commits: dict[Path, Commit] = {}  # a record never changes once it is there

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

    def dtype(self, site: str) -> np.dtype[Any]:
        """The in-memory type of a site's rows."""
        return np.dtype(np.int32 if site in _ROW_SHAPES else _NATIVE[self.layout.dtype])

    def row_shape(self, split: str, site: str) -> tuple[int, ...]:
        return tuple(self.metadata(split, site)["shape"][1:])

    def require(self, split: str, site: str, width: int, rows_capacity: int) -> None:
        """Make the array of a site with room for `rows_capacity` rows in whole units, or let it grow; never shrinks."""
        assert _SITE.fullmatch(site), f"{site!r} cannot name a folder"
        path, unit_rows = self.array_path(split, site), self.layout.unit_rows
        capacity = -(-rows_capacity // unit_rows) * unit_rows
        row_shape = _ROW_SHAPES.get(site, (width,))
        with self.lock():
            if not (path / "zarr.json").exists():
                self._create_array(split, site, (capacity, *row_shape))
            found = self.metadata(split, site)
            shape = (found["shape"][0], *row_shape)
            assert tuple(found["shape"]) == shape, f"{path} has rows of shape {found['shape'][1:]}, not {row_shape}"
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

        zarr.open_group(self.path, mode="a").require_group(split).create_array(
            site,
            shape=shape,
            chunks=(self.layout.chunk_rows, *shape[1:]),
            dtype=BFloat16() if self.dtype(site) == np.uint16 else self.dtype(site),
            fill_value=0,
            compressors=None,
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
        assert rows.dtype == self.dtype(site) and list(rows.shape[1:]) == shape[1:], (rows.dtype, rows.shape, shape)
        assert len(rows) <= layout.unit_rows and (unit + 1) * layout.unit_rows <= shape[0], (len(rows), unit, shape)
        stage = self.claims.stage(split, unit, site)
        try:
            chunks, stats = self._stage(stage, split, unit, site, rows, order)
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
        self, stage: Path, split: str, unit: int, site: str, rows: NDArray[Any], order: Ints | None
    ) -> tuple[list[Chunk], Stats]:
        """Write the chunk files of a unit into `stage`."""
        layout = self.layout
        parts, chunks = [], []
        for index, start in enumerate(range(0, len(rows), layout.chunk_rows)):
            chunk = slice(start, start + layout.chunk_rows)
            # Only a chunk is there twice; and rows[order[chunk]] takes ten times as long.
            part = rows[chunk] if order is None else rows.take(order[chunk], axis=0)
            if site not in _ROW_SHAPES:
                parts.append(Stats.of(widen(part)))
                if not np.isfinite(parts[-1].max_abs):
                    raise UserError(f"unit {unit} of {split}/{site} holds values that are not finite: it is not stored")
            number = unit * layout.chunks_per_unit + index
            chunks.append(self._write_chunk(stage, f"{split}/{site}/c.{number}" + ".0" * (rows.ndim - 1), part))
        return chunks, Stats.merge(parts) if parts else Stats(len(rows), np.zeros(0), 0.0, 0.0, 0.0)

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

    def _write_chunk(self, stage: Path, key: str, rows: NDArray[Any]) -> Chunk:
        """Write one chunk file as zarr's `bytes` codec would, into `stage`."""
        import google_crc32c

        data = rows.astype(rows.dtype.newbyteorder("<"), copy=False).tobytes()
        row_bytes = rows.dtype.itemsize * int(np.prod(rows.shape[1:]))
        data += bytes(row_bytes * (self.layout.chunk_rows - len(rows)))
        with whole_file(stage / Path(key).name) as file:
            file.write(data)
        return Chunk(key, len(rows), len(data), f"{google_crc32c.value(data):08x}")

    def rows(self, split: str, site: str) -> int:
        """Committed rows."""
        return sum(commit.rows for commit in self.committed(split, site).values())

    def sites(self, split: str) -> list[str]:
        """Activation sites with something committed, without tokens and origin."""
        return sorted({site for _, site, _ in self._records(split)} - _ROW_SHAPES.keys())

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

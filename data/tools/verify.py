"""Hold every byte of a store against what its records say, reading each chunk file once.

Records carry a check of their own and must be byte for byte what it was made of; a chunk must have the length, the
crc32c and the statistics of its commit record; what complete.json counts must be committed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import chain, count

import numpy as np

from data.base.errors import UserError
from data.base.location import Location
from data.base.records import Json, seal, seal_array, unseal
from data.storage.open import open_storage
from data.store.commit import RECORD, Chunk, Commit, chunk_key
from data.store.files import SPLITS, leftovers
from data.store.layout import Layout
from data.store.manifest import Manifest
from data.store.row_format import RowFormat
from data.store.stats import Stats
from data.store.store import ORIGIN, TOKENS, Store

_GROUP = {"attributes": {}, "zarr_format": 3, "node_type": "group"}
_TOLERANCE = 1e-9  # of float64 sums added in another order


@dataclass(frozen=True)
class Finding:
    """Something wrong with one file; a leftover is a file of no store, which does no harm."""

    path: Location
    what: str
    leftover: bool = False

    def __str__(self) -> str:
        return f"{'leftover' if self.leftover else 'damaged'}: {self.path} {self.what}"


def _sealed(data: bytes, path: Location, indent: int | None = None) -> Json:
    """A record, if it is byte for byte what was written; a UserError otherwise."""
    obj = unseal(data, path, "")
    if data != seal(obj, indent):
        raise UserError(f"{path} is damaged")
    return obj


def _array(raw: bytes, layout: Layout, site: str) -> tuple[RowFormat, tuple[int, ...]]:
    """The rows that an array's zarr.json tells of, and their shape; a UserError where it is not as it was written."""
    try:
        found = json.loads(raw)
        sound = isinstance(found, dict) and raw == seal_array(found)
    except (ValueError, AttributeError):  # attributes that are no object
        sound = False
    if not sound:
        raise UserError("is not as it was written")
    rows, shape = RowFormat(layout, site, found["attributes"]), tuple(found["shape"][1:])
    wanted = {
        "data_type": "int8" if rows.is_int8 else "int32" if rows.is_book else layout.dtype,
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        **rows.format(shape).metadata(),
    }
    for name, value in wanted.items():
        if found[name] != value:
            raise UserError(f"has {name} {found[name]} where the manifest wants {value}")
    if rows.is_int8:
        standard = rows.standard
        if standard is None or standard.attributes(site) != rows.attributes["encoding"]:
            raise UserError(f"does not say how rows of {site} are encoded")
        if {len(standard.mean), len(standard.std)} != {rows.width(shape)}:
            raise UserError("is encoded by a mean or deviation of another width")
    return rows, shape


class Verifier:
    """One store's check; `run` fills `findings`. Letters: N rows of a chunk, D width."""

    def __init__(self, path: Location) -> None:
        self.path, self.storage, self.findings = path, open_storage(path), list[Finding]()
        self.commits: dict[tuple[str, str], dict[int, Commit | None]] = {}  # (split, site) -> unit; None: damaged
        self.arrays: dict[tuple[str, str], tuple[RowFormat, tuple[int, ...]]] = {}  # whose metadata is sound
        self.complete: Json | None = None

    def damaged(self, path: Location, what: str) -> None:
        self.findings.append(Finding(path, what))

    def run(self, quiet: bool = False) -> list[Finding]:
        """All findings, leftovers last; where the manifest is damaged, nothing else is looked at."""
        if manifest := self._manifest():
            self.store = Store(self.path, manifest)
            self.layout = manifest.layout
            self._records()
            self._metadata()
            self._chunks(quiet)
            self._extent()
            self._leftovers()
        return self.findings

    def _manifest(self) -> Manifest | None:
        path = self.path / "manifest.json"
        try:
            data = self.storage.read("manifest.json")
            manifest = Manifest.from_json(data, path)
            if data == manifest.to_json():
                return manifest
            self.damaged(path, "is not as it was written")
        except FileNotFoundError:
            self.damaged(path, "is missing")
        except UserError:
            self.damaged(path, "is not as it was written, or of a newer format")
        return None

    def _records(self) -> None:
        """Read complete.json and every commit record, and hold each against its name and the layout."""
        path = self.path / "complete.json"
        try:
            self.complete = _sealed(self.storage.read("complete.json"), path)
        except FileNotFoundError:
            pass
        except UserError:
            self.damaged(path, "is not as it was written")
        for split in SPLITS:
            names = [name for name in self.storage.list_files(f"commits/{split}") if RECORD.fullmatch(name)]
            contents = self.storage.read_many([f"commits/{split}/{name}" for name in names])
            for name, data in zip(names, contents, strict=True):
                if data is not None and (parts := RECORD.fullmatch(name)):
                    unit, site = int(parts[1]), parts[2]
                    path = self.path / f"commits/{split}/{name}"
                    self.commits.setdefault((split, site), {})[unit] = self._record(data, path, split, unit, site)

    def _record(self, data: bytes, path: Location, split: str, unit: int, site: str) -> Commit | None:
        try:
            _sealed(data, path)
            commit = Commit.of(data, path)
        except UserError:
            self.damaged(path, "is not as it was written")
            return None
        if (commit.split, commit.unit, commit.site) != (split, unit, site):
            self.damaged(path, f"is the record of unit {commit.unit} of {commit.split}/{commit.site}")
            return None
        rows = [chunk.rows for chunk in commit.chunks]
        if rows != self.layout.files(commit.rows) or commit.rows > self.layout.unit_rows:
            self.damaged(path, f"has chunks of {rows} rows for its {commit.rows}")
            return None
        return commit

    def _metadata(self) -> None:
        """Every zarr.json: of the store, of its splits, of the arrays that are there or have records."""
        self._group("zarr.json")
        for split in SPLITS:
            folders = {
                site for site in self._folders(split) if self.storage.size(f"{split}/{site}/zarr.json") is not None
            }
            sites = folders | {site for at, site in self.commits if at == split}
            if sites:
                self._group(f"{split}/zarr.json")
            for site in sorted(sites):
                key = f"{split}/{site}/zarr.json"
                try:
                    self.arrays[split, site] = _array(self.storage.read(key), self.layout, site)
                except FileNotFoundError:
                    self.damaged(self.path / key, "is missing")
                except UserError as error:
                    self.damaged(self.path / key, str(error))
        for (split, site), (rows, _) in self.arrays.items():
            first, _ = self.arrays.get((SPLITS[0], site), (rows, ()))
            if first.attributes.get("encoding") != rows.attributes.get("encoding"):
                self.damaged(self.path / split / site / "zarr.json", f"is encoded otherwise than in {SPLITS[0]}/")

    def _folders(self, split: str) -> list[str]:
        return open_storage(self.path / split).folders()

    def _group(self, key: str) -> None:
        try:
            if json.loads(self.storage.read(key)) != _GROUP:
                self.damaged(self.path / key, "is not a plain group's")
        except FileNotFoundError:
            if self.arrays or self.commits:
                self.damaged(self.path / key, "is missing")
        except ValueError:
            self.damaged(self.path / key, "is not as it was written")

    def _chunks(self, quiet: bool) -> None:
        """Read every committed chunk once: length, checksum, statistics of its unit."""
        from tqdm import tqdm

        sound = [c for units in self.commits.values() for c in units.values() if c]
        total = sum(chunk.bytes for commit in sound for chunk in commit.chunks)
        settings = {"unit": "B", "unit_scale": True, "mininterval": 1.0, "desc": f"verify {self.path.name}"}
        with tqdm(total=total, disable=quiet, **settings) as bar:
            for commit in sound:
                parts: list[Stats] | None = []
                contents = self.storage.read_many([chunk.key for chunk in commit.chunks])
                numbers = count(commit.unit * self.layout.files_per_unit)
                for number, chunk, content in zip(numbers, commit.chunks, contents, strict=False):
                    found = self._read(commit, number, chunk, content)
                    bar.update(chunk.bytes)
                    parts = None if parts is None or found is None else parts + found
                if parts:
                    self._statistics(commit, Stats.merge(parts))

    def _read(self, commit: Commit, number: int, chunk: Chunk, content: bytes | None) -> list[Stats] | None:
        """The statistics of a file's chunks, of a book's none; None where the file is damaged or its shape unknown."""
        import google_crc32c

        path = self.path / chunk.key
        if content is None:
            self.damaged(path, "is missing")
            return None
        if len(content) != chunk.bytes:
            self.damaged(path, f"has {len(content)} bytes where {chunk.bytes} were committed")
        elif (crc := f"{google_crc32c.value(content):08x}") != chunk.crc32c:
            self.damaged(path, f"has the crc32c {crc} where {chunk.crc32c} was committed")
        elif (commit.split, commit.site) in self.arrays:
            rows, shape = self.arrays[commit.split, commit.site]
            if self._is_named(commit, number, chunk, shape):
                try:
                    chunks = rows.format(shape).decode(content, self.layout.chunks(chunk.rows))
                    found = [None if rows.is_book else Stats.of(rows.values(x)) for x in chunks]
                    return [stats for stats in found if stats]
                except ValueError as error:
                    self.damaged(path, f"is as it was committed, but its array's metadata wants another: {error}")
        return None

    def _is_named(self, commit: Commit, number: int, chunk: Chunk, shape: tuple[int, ...]) -> bool:
        """Whether a record names the right file."""
        wanted = chunk_key(commit.split, commit.site, number, shape)
        if chunk.key != wanted:
            record = self.path / "commits" / commit.split / f"{commit.unit:06d}.{commit.site}.json"
            self.damaged(record, f"names {chunk.key} where {wanted} belongs")
        return chunk.key == wanted

    def _statistics(self, commit: Commit, stats: Stats) -> None:
        """Hold a unit's statistics against those of the values that were read."""
        scale = _TOLERANCE * float(np.sqrt(commit.rows * stats.sum_sq))  # no entry of the sum is larger than this
        pairs = {
            "sum": len(commit.sum) == len(stats.sum) and np.allclose(commit.sum, stats.sum, rtol=0, atol=scale),
            "sum_sq": np.isclose(commit.sum_sq, stats.sum_sq, rtol=_TOLERANCE, atol=0),
            "mean_norm": np.isclose(commit.mean_norm, stats.mean_norm, rtol=_TOLERANCE, atol=0),
            "max_abs": commit.max_abs == stats.max_abs,
            "nonfinite": commit.nonfinite == 0,
        }
        if wrong := [name for name, right in pairs.items() if not right]:
            record = self.path / "commits" / commit.split / f"{commit.unit:06d}.{commit.site}.json"
            self.damaged(record, f"has another {', '.join(wrong)} than the values it is of")

    def _extent(self) -> None:
        """What complete.json counts must be committed, and what is committed must be known by token and origin."""
        for split, sites in (self.complete or {}).items():
            for site, wanted in sites.items():
                units = self.commits.get((split, site), {})
                self._missing(split, site, int(wanted))
                have = sum(commit.rows for commit in units.values() if commit)
                for book in (TOKENS, ORIGIN):
                    if have == wanted and book in self._folders(split):
                        for unit in sorted(units.keys() - self.commits.get((split, book), {}).keys()):
                            self._lost(split, unit, book)
        for split in SPLITS:
            self._aligned(split)

    def _lost(self, split: str, unit: int, site: str) -> None:
        path = self.path / "commits" / split / f"{unit:06d}.{site}.json"
        if not any(finding.path == path for finding in self.findings):
            self.damaged(path, "is missing, and complete.json counts its rows")

    def _missing(self, split: str, site: str, wanted: int) -> None:
        """Name the first units without a record, as many as the rows that are missing need."""
        units = self.commits.get((split, site), {})
        if None in units.values():
            return  # a damaged record is named, and how many rows it had is not known
        have = sum(commit.rows for commit in units.values() if commit)
        books = self.commits.get((split, ORIGIN), {}) | self.commits.get((split, TOKENS), {})
        unknown = (unit for unit in count() if unit not in units and unit not in books)
        for unit in chain(sorted(books.keys() - units.keys()), unknown):
            if have >= wanted:
                break
            self._lost(split, unit, site)
            known = books.get(unit)
            have += max(known.rows if known else self.layout.unit_rows, 1)

    def _aligned(self, split: str) -> None:
        """All arrays of a split must have the same rows in a unit."""
        first: dict[int, Commit] = {}
        for (at, site), units in self.commits.items():
            for unit, commit in units.items() if at == split else ():
                if commit and commit.rows != first.setdefault(unit, commit).rows:
                    path = self.path / "commits" / split / f"{unit:06d}.{site}.json"
                    self.damaged(path, f"has {commit.rows} rows where {first[unit].site} has {first[unit].rows}")

    def _leftovers(self) -> None:
        """Files that no record names; of a damaged record's unit, all chunks may be its own."""
        keys, per_unit = set[str](), self.layout.files_per_unit
        for (split, site), units in self.commits.items():
            ends = ("", ".0", ".0.0")
            for unit in units:
                numbers = range(unit * per_unit, (unit + 1) * per_unit)
                if commit := units[unit]:
                    keys |= {chunk.key for chunk in commit.chunks}
                else:
                    keys |= {f"{split}/{site}/c.{number}{end}" for number in numbers for end in ends}
        lost = {str(finding.path)[len(str(self.path)) + 1 :] for finding in self.findings}
        for name in leftovers(self.storage.sizes(), keys | lost):
            self.findings.append(Finding(self.path / name, "is no part of the store", leftover=True))


def verify(path: Location, quiet: bool = False) -> list[Finding]:
    """What is wrong with the store at `path`: nothing, if the list is empty. Shows its progress unless `quiet`."""
    return Verifier(path).run(quiet)

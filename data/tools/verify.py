"""Hold every byte of a store against what its records say, reading each chunk file once.

Records carry a check of their own and must be byte for byte what it was made of; a chunk must have the length, the
crc32c and the statistics of its commit record; what complete.json counts must be committed. What cannot be opened is
named like any other damage, and the rest is looked at; each finding says what to do.
"""

from __future__ import annotations

import errno
import json
from dataclasses import dataclass
from itertools import chain, count

import numpy as np

from data.base.errors import UserError
from data.base.location import Location
from data.base.progress import progress
from data.base.records import Json, seal, seal_array, unseal
from data.storage.open import open_storage
from data.store.commit import RECORD, Chunk, Commit, record_key, remake
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
    """Something wrong with one file, and how to fix it; a leftover is a file of no store, which does no harm."""

    path: Location
    what: str
    remedy: str = ""
    leftover: bool = False

    def __str__(self) -> str:
        line = f"{'leftover' if self.leftover else 'damaged'}: {self.path} {self.what}"
        return f"{line}: {self.remedy}" if self.remedy else line


_RESTORE = "restore it from a copy, or delete the store and run the same harvest again"
_HARVEST = "run the same harvest again, which makes it anew"
_COMPLETE = "delete it and run the same harvest again"


def unreadable(error: OSError) -> str:
    """Return what is wrong with a file that could not be read, as the end of a sentence."""
    if isinstance(error, FileNotFoundError):
        return "is missing"
    reasons = {
        errno.EISDIR: "is a folder and no file",
        errno.ENXIO: "is a pipe or device and no file",
        errno.ELOOP: "is a link that leads back to itself",
        errno.ENOTDIR: "is below a file where a folder is needed",
        errno.EACCES: "cannot be read with your permissions",
    }
    return reasons.get(error.errno or 0, f"cannot be read ({error.strerror})")


def wrong_bytes(chunk: Chunk, content: bytes) -> str | None:
    """Say how a file's content differs from what its record says; None where it does not."""
    import google_crc32c

    if len(content) != chunk.bytes:
        return f"has {len(content)} bytes where {chunk.bytes} were committed"
    if (crc := f"{google_crc32c.value(content):08x}") != chunk.crc32c:
        return f"is damaged (its crc32c is {crc} where {chunk.crc32c} was committed)"
    return None


def read_sealed(data: bytes, path: Location, indent: int | None = None) -> Json:
    """Read a record, which must be byte for byte what was written; a UserError otherwise."""
    obj = unseal(data, path, "")
    if data != seal(obj, indent):
        raise UserError(f"{path} is damaged")
    return obj


def read_array(raw: bytes, layout: Layout, site: str) -> tuple[RowFormat, tuple[int, ...]]:
    """Read the rows that an array's zarr.json tells of, and their shape;
    a UserError where it is not as it was written."""
    try:
        found = json.loads(raw)
        sound = isinstance(found, dict) and raw == seal_array(found) and all(type(n) is int for n in found["shape"])
    except (ValueError, AttributeError, KeyError, TypeError):  # not JSON, or no array's
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
        if found.get(name) != value:
            raise UserError(f"has {name} {found.get(name)} where the manifest wants {value}")
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
        self.capacity: dict[tuple[str, str], int] = {}  # rows of these
        self.named = set[Location]()  # what is damaged
        self.complete: Json | None = None

    def damaged(self, path: Location, what: str, remedy: str) -> None:
        self.findings.append(Finding(path, what, remedy))
        self.named.add(path)

    def unit_damaged(self, path: Location, what: str, split: str, unit: int, site: str) -> None:
        """Name a chunk file or a record; its unit is to be made anew."""
        self.damaged(path, what, remake(self.path, split, unit, site))

    def record_damaged(self, what: str, split: str, unit: int, site: str) -> None:
        self.unit_damaged(self.path / record_key(split, unit, site), what, split, unit, site)

    def run(self, quiet: bool = False) -> list[Finding]:
        """Check everything and return all findings, leftovers last;
        where the manifest is damaged, nothing else is looked at."""
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
            what = "is not as it was written"
        except FileNotFoundError:
            what = "is missing"
        except OSError as error:
            what = unreadable(error)
        except UserError:
            what = "is not as it was written, or of a newer format"
        self.damaged(path, what, "restore it from a copy, or delete the folder and harvest again")
        return None

    def _records(self) -> None:
        """Read complete.json and every commit record, and hold each against its name and the layout."""
        path = self.path / "complete.json"
        try:
            complete = read_sealed(self.storage.read("complete.json"), path)
            if all(isinstance(sites, dict) for sites in complete.values()):
                self.complete = complete
            else:
                self.damaged(path, "is a file of another kind", _COMPLETE)
        except FileNotFoundError:
            pass
        except OSError as error:
            self.damaged(path, unreadable(error), _COMPLETE)
        except UserError:
            self.damaged(path, "is not as it was written", _COMPLETE)
        for split in SPLITS:
            # Not only files: a folder or a link that leads nowhere in a record's place is to be named.
            names = [name for name in self._entries(f"commits/{split}") if RECORD.fullmatch(name)]
            contents = self.storage.read_many([f"commits/{split}/{name}" for name in names])
            for name, data in zip(names, contents, strict=True):
                if parts := RECORD.fullmatch(name):
                    unit, site = int(parts[1]), parts[2]
                    self.commits.setdefault((split, site), {})[unit] = self._record(data, split, unit, site)

    def _entries(self, folder: str) -> list[str]:
        try:
            return open_storage(self.path).entries(folder)
        except OSError as error:
            self.damaged(self.path / folder, unreadable(error), _HARVEST)
            return []

    def _record(self, data: bytes | OSError, split: str, unit: int, site: str) -> Commit | None:
        path = self.path / record_key(split, unit, site)
        if isinstance(data, OSError):
            self.record_damaged(unreadable(data), split, unit, site)
            return None
        try:
            read_sealed(data, path)
            commit = Commit.of(data, path)
        except UserError:
            self.record_damaged("is not as it was written", split, unit, site)
            return None
        if wrong := commit.wrong_name(split, unit, site, self.layout):
            self.record_damaged(wrong, split, unit, site)
            return None
        return commit

    def _metadata(self) -> None:
        """Check every zarr.json: of the store, of its splits, of the arrays that are there or have records."""
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
                    raw = self.storage.read(key)
                    self.arrays[split, site] = read_array(raw, self.layout, site)
                    self.capacity[split, site] = json.loads(raw)["shape"][0]
                except FileNotFoundError:
                    self.damaged(self.path / key, "is missing", _RESTORE)
                except OSError as error:
                    self.damaged(self.path / key, unreadable(error), _RESTORE)
                except UserError as error:
                    self.damaged(self.path / key, str(error), _RESTORE)
        for (split, site), (rows, _) in self.arrays.items():
            first, _ = self.arrays.get((SPLITS[0], site), (rows, ()))
            if first.attributes.get("encoding") != rows.attributes.get("encoding"):
                what = f"is encoded otherwise than in {SPLITS[0]}/"
                self.damaged(self.path / split / site / "zarr.json", what, _RESTORE)

    def _folders(self, split: str) -> list[str]:
        return open_storage(self.path / split).folders()

    def _group(self, key: str) -> None:
        try:
            if json.loads(self.storage.read(key)) != _GROUP:
                self.damaged(self.path / key, "is not a plain group's", _RESTORE)
        except FileNotFoundError:
            if self.arrays or self.commits:
                self.damaged(self.path / key, "is missing", _RESTORE)
        except OSError as error:
            self.damaged(self.path / key, unreadable(error), _RESTORE)
        except ValueError:
            self.damaged(self.path / key, "is not as it was written", _RESTORE)

    def _chunks(self, quiet: bool) -> None:
        """Read every committed chunk once: length, checksum, statistics of its unit."""
        sound = [c for units in self.commits.values() for c in units.values() if c]
        total = sum(chunk.bytes for commit in sound for chunk in commit.chunks)
        with progress(f"verify {self.path.name}", total, "bytes", quiet=quiet) as bar:
            for commit in sound:
                whole = self._fits_array(commit)
                parts: list[Stats] = []
                contents = self.storage.read_many([chunk.key for chunk in commit.chunks])
                for chunk, content in zip(commit.chunks, contents, strict=True):
                    bar.update(chunk.bytes)
                    if not self._is_as_committed(commit, chunk, content):
                        whole = False
                    elif whole and isinstance(content, bytes):
                        whole = self._decoded(commit, chunk, content, parts)
                if whole and parts:
                    self._statistics(commit, Stats.merge(parts))

    def _fits_array(self, commit: Commit) -> bool:
        """Return whether a record is one of its array; false where the array's own metadata is damaged."""
        at = commit.split, commit.site
        if at not in self.arrays:
            return False
        rows, shape = self.arrays[at]
        wrong = commit.wrong_array(rows.format(shape), rows.width(shape), self.capacity[at])
        if wrong:
            self.record_damaged(wrong, commit.split, commit.unit, commit.site)
        return wrong is None

    def _is_as_committed(self, commit: Commit, chunk: Chunk, content: bytes | OSError) -> bool:
        """Return whether a chunk file has the length and the crc32c of its record."""
        what = unreadable(content) if isinstance(content, OSError) else wrong_bytes(chunk, content)
        if what is None:
            return True
        self.unit_damaged(self.path / chunk.key, what, commit.split, commit.unit, commit.site)
        return False

    def _decoded(self, commit: Commit, chunk: Chunk, content: bytes, parts: list[Stats]) -> bool:
        """Add the statistics of a file's chunks to `parts`, none of tokens and origin; False: they do not decode."""
        rows, shape = self.arrays[commit.split, commit.site]
        try:
            for x in rows.format(shape).decode(content, self.layout.chunks(chunk.rows)):
                if not rows.is_book:
                    parts.append(Stats.of(rows.values(x)))
        except ValueError as error:
            what = f"is as it was committed, but its array's metadata wants another ({error})"
            self.unit_damaged(self.path / chunk.key, what, commit.split, commit.unit, commit.site)
            return False
        return True

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
            what = f"has another {', '.join(wrong)} than the values it is of"
            self.record_damaged(what, commit.split, commit.unit, commit.site)

    def _extent(self) -> None:
        """Check that what complete.json counts is committed, and what is committed is known by token and origin."""
        for split, sites in (self.complete or {}).items():
            folders = self._folders(split)
            for site, counted in sites.items():
                if type(counted) is not int:
                    self.damaged(self.path / "complete.json", f"counts {counted!r} rows of {site}", _COMPLETE)
                    continue
                units = self.commits.get((split, site), {})
                self._missing(split, site, counted)
                have = sum(commit.rows for commit in units.values() if commit)
                for book in (TOKENS, ORIGIN):
                    if have == counted and book in folders:
                        for unit in sorted(units.keys() - self.commits.get((split, book), {}).keys()):
                            self._lost(split, unit, book)
        for split in SPLITS:
            self._aligned(split)

    def _lost(self, split: str, unit: int, site: str) -> None:
        path = self.path / record_key(split, unit, site)
        if path not in self.named:
            self.damaged(path, "is missing, and complete.json counts its rows", _HARVEST)

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
        """Check that all arrays of a split have the same rows in a unit."""
        first: dict[int, Commit] = {}
        for (at, site), units in self.commits.items():
            for unit, commit in units.items() if at == split else ():
                if commit and commit.rows != first.setdefault(unit, commit).rows:
                    what = f"has {commit.rows} rows where {first[unit].site} has {first[unit].rows}"
                    self.record_damaged(what, split, unit, site)

    def _leftovers(self) -> None:
        """List files that no record names; of a damaged record's unit, all chunks may be its own."""
        keys, per_unit = set[str](), self.layout.files_per_unit
        for (split, site), units in self.commits.items():
            ends = ("", ".0", ".0.0")
            for unit in units:
                numbers = range(unit * per_unit, (unit + 1) * per_unit)
                if commit := units[unit]:
                    keys |= {chunk.key for chunk in commit.chunks}
                else:
                    keys |= {f"{split}/{site}/c.{number}{end}" for number in numbers for end in ends}
        lost = {str(path)[len(str(self.path)) + 1 :] for path in self.named}
        for name in leftovers(self.storage.sizes(), keys | lost):
            finding = Finding(self.path / name, "is no part of the store", "`python -m data gc` removes it", True)
            self.findings.append(finding)


def verify(path: Location, quiet: bool = False) -> list[Finding]:
    """Find what is wrong with the store at `path`: nothing, if the list is empty.
    Shows its progress unless `quiet`."""
    return Verifier(path).run(quiet)

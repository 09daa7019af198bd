"""Hold every byte of a store against what its records say, reading each chunk file once.

Records carry a check of their own and must be byte for byte what it was made of; a chunk must have the length, the
crc32c and the statistics of its commit record; what complete.json counts must be committed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.commit import Commit
from data.contents import RECORD, SPLITS, file_sizes, leftovers
from data.errors import UserError
from data.manifest import Json, Layout, Manifest, seal, seal_array, unseal
from data.stats import Stats
from data.store import ORIGIN, TOKENS, Store, widen

_GROUP = {"attributes": {}, "zarr_format": 3, "node_type": "group"}
_TOLERANCE = 1e-9  # of float64 sums added in another order


@dataclass(frozen=True)
class Finding:
    """Something wrong with one file; a leftover is a file of no store, which does no harm."""

    path: Path
    what: str
    leftover: bool = False

    def __str__(self) -> str:
        return f"{'leftover' if self.leftover else 'damaged'}: {self.path} {self.what}"


def _sealed(path: Path, indent: int | None = None) -> Json:
    """A record, if it is byte for byte what was written; a UserError otherwise."""
    obj = unseal(path, "")
    if path.read_bytes() != seal(obj, indent):
        raise UserError(f"{path} is damaged")
    return obj


def _row_shape(path: Path, layout: Layout, dtype: str) -> tuple[int, ...]:
    """The row shape in an array's zarr.json; a UserError where that is not as it was written."""
    raw = path.read_bytes()
    try:
        found = json.loads(raw)
        sound = isinstance(found, dict) and raw == seal_array(found)
    except ValueError:
        sound = False
    if not sound:
        raise UserError("is not as it was written")
    wanted = {
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [layout.chunk_rows, *found["shape"][1:]]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
    }
    for name, value in wanted.items():
        if found[name] != value:
            raise UserError(f"has {name} {found[name]} where the manifest wants {value}")
    return tuple(found["shape"][1:])


class Verifier:
    """One store's check; `run` fills `findings`. Letters: N rows of a chunk, D width."""

    def __init__(self, path: Path) -> None:
        self.path, self.findings = path, list[Finding]()
        self.commits: dict[tuple[str, str], dict[int, Commit | None]] = {}  # (split, site) -> unit; None: damaged
        self.shapes: dict[tuple[str, str], tuple[int, ...]] = {}
        self.complete: Json | None = None

    def damaged(self, path: Path, what: str) -> None:
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
            manifest = Manifest.from_json(path)
            if path.read_bytes() == manifest.to_json():
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
        if path.exists():
            try:
                self.complete = _sealed(path)
            except UserError:
                self.damaged(path, "is not as it was written")
        for split in SPLITS:
            for path in sorted((self.path / "commits" / split).glob("*.json")):
                if name := RECORD.fullmatch(path.name):
                    unit, site = int(name[1]), name[2]
                    self.commits.setdefault((split, site), {})[unit] = self._record(path, split, unit, site)

    def _record(self, path: Path, split: str, unit: int, site: str) -> Commit | None:
        try:
            _sealed(path)
            commit = Commit.read(path)
        except UserError:
            self.damaged(path, "is not as it was written")
            return None
        if (commit.split, commit.unit, commit.site) != (split, unit, site):
            self.damaged(path, f"is the record of unit {commit.unit} of {commit.split}/{commit.site}")
            return None
        rows = [chunk.rows for chunk in commit.chunks]
        if rows != self._chunk_rows(commit.rows) or commit.rows > self.layout.unit_rows:
            self.damaged(path, f"has chunks of {rows} rows for its {commit.rows}")
            return None
        return commit

    def _chunk_rows(self, rows: int) -> list[int]:
        """The valid rows of each chunk of a unit with `rows` rows."""
        return [min(self.layout.chunk_rows, rows - at) for at in range(0, rows, self.layout.chunk_rows)]

    def _metadata(self) -> None:
        """Every zarr.json: of the store, of its splits, of the arrays that are there or have records."""
        self._group(self.path / "zarr.json")
        for split in SPLITS:
            folders = {path.parent.name for path in (self.path / split).glob("*/zarr.json")}
            sites = folders | {site for at, site in self.commits if at == split}
            if sites:
                self._group(self.path / split / "zarr.json")
            for site in sorted(sites):
                path = self.path / split / site / "zarr.json"
                dtype = "int32" if site in (TOKENS, ORIGIN) else self.layout.dtype
                try:
                    self.shapes[split, site] = _row_shape(path, self.layout, dtype)
                except FileNotFoundError:
                    self.damaged(path, "is missing")
                except UserError as error:
                    self.damaged(path, str(error))

    def _group(self, path: Path) -> None:
        try:
            if json.loads(path.read_bytes()) != _GROUP:
                self.damaged(path, "is not a plain group's")
        except FileNotFoundError:
            if self.shapes or self.commits:
                self.damaged(path, "is missing")
        except ValueError:
            self.damaged(path, "is not as it was written")

    def _chunks(self, quiet: bool) -> None:
        """Read every committed chunk once: length, checksum, statistics of its unit."""
        from tqdm import tqdm

        sound = [c for units in self.commits.values() for c in units.values() if c]
        total = sum(chunk.bytes for commit in sound for chunk in commit.chunks)
        settings = {"unit": "B", "unit_scale": True, "mininterval": 1.0, "desc": f"verify {self.path.name}"}
        with tqdm(total=total, disable=quiet, **settings) as bar:
            for commit in sound:
                parts = []
                for chunk in self._read(commit):
                    bar.update(commit.chunks[0].bytes)
                    if chunk is not None and len(commit.sum):
                        parts.append(Stats.of(widen(chunk)))
                if len(parts) == len(commit.chunks) and parts:
                    self._statistics(commit, Stats.merge(parts))

    def _read(self, commit: Commit) -> Iterator[NDArray[Any] | None]:
        """The valid rows [N, D] of each chunk of a unit, None where its file is damaged or its shape unknown."""
        import google_crc32c

        shape, dtype = self.shapes.get((commit.split, commit.site)), self.store.dtype(commit.site).newbyteorder("<")
        for index, chunk in enumerate(commit.chunks):
            path = self.path / chunk.key
            number = commit.unit * self.layout.chunks_per_unit + index
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                self.damaged(path, "is missing")
                yield None
                continue
            if len(content) != chunk.bytes:
                self.damaged(path, f"has {len(content)} bytes where {chunk.bytes} were committed")
            elif (crc := f"{google_crc32c.value(content):08x}") != chunk.crc32c:
                self.damaged(path, f"has the crc32c {crc} where {chunk.crc32c} was committed")
            elif shape is not None and self._is_chunk(commit, chunk.key, number, shape, len(content)):
                yield np.frombuffer(content, dtype).reshape(-1, *shape)[: chunk.rows]
                continue
            yield None

    def _is_chunk(self, commit: Commit, key: str, number: int, shape: tuple[int, ...], length: int) -> bool:
        """Whether a record names the right file, and one of the length that the array's metadata wants."""
        record = self.path / "commits" / commit.split / f"{commit.unit:06d}.{commit.site}.json"
        wanted = f"{commit.split}/{commit.site}/c.{number}" + ".0" * len(shape)
        row_bytes = self.store.dtype(commit.site).itemsize * int(np.prod(shape))
        if key != wanted:
            self.damaged(record, f"names the chunk {key} where {wanted} belongs")
        elif length != row_bytes * self.layout.chunk_rows:
            self.damaged(record, f"has chunks of {length} bytes where rows of shape {list(shape)} need others")
        else:
            return True
        return False

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
                    if have == wanted and (self.path / split / book).is_dir():
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
        keys, per_unit = set[str](), self.layout.chunks_per_unit
        for (split, site), units in self.commits.items():
            ends = ("", ".0", ".0.0")
            for unit in units:
                numbers = range(unit * per_unit, (unit + 1) * per_unit)
                if commit := units[unit]:
                    keys |= {chunk.key for chunk in commit.chunks}
                else:
                    keys |= {f"{split}/{site}/c.{number}{end}" for number in numbers for end in ends}
        lost = {str(finding.path.relative_to(self.path)) for finding in self.findings}
        for name in leftovers(file_sizes(self.path), keys | lost):
            self.findings.append(Finding(self.path / name, "is no part of the store", leftover=True))


def verify(path: Path, quiet: bool = False) -> list[Finding]:
    """What is wrong with the store at `path`: nothing, if the list is empty. Shows its progress unless `quiet`."""
    return Verifier(path).run(quiet)

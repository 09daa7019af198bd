"""What is in a store: identity, settings, sizes, statistics, norms by position in the context, outlier tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.base.files import format_bytes
from data.base.location import Location
from data.base.records import canonical, flatten
from data.loading.norm_filter import read_norms, sampled_chunks
from data.store.files import SPLITS, arrays, is_token_store
from data.store.manifest import TRAIN
from data.store.massive import massive_line
from data.store.store import ORIGIN, Store
from data.tools.inventory import Entry, makers_of
from data.tools.tokens import token_report, tokens_of

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Norms:
    """||x|| of some rows [N] and their positions in the context [N] (-1: origin is not committed)."""

    norms: Floats
    positions: NDArray[np.int32]

    @classmethod
    def of(cls, store: Store, split: str, site: str, most: int) -> Norms:
        """Measure over the fewest chunks of a seeded order that hold at least `most` rows, or over all there are."""
        from data.loading.reader import open_reader

        reader, norms, positions = open_reader(store, split, site), [], []
        places = _places(store, split, site)
        books = {place: index for index, place in enumerate(_places(store, split, ORIGIN))}
        origin = open_reader(store, split, ORIGIN) if books else None
        decode = store.rows_of(site).values
        for index in sampled_chunks(reader.sizes, most):
            norms.append(read_norms(reader, index, decode))
            where = np.full((len(norms[-1]), 2), -1, np.int32)
            if origin and places[index] in books:
                origin.read(books[places[index]], where)
            positions.append(where[:, 1])
        return cls(np.concatenate(norms), np.concatenate(positions))

    def by_position(self) -> list[tuple[str, float]]:
        """Return (positions, mean norm): 0, 1, 2, 3, then ranges that double."""
        found, first, last = [], 0, int(self.positions.max())
        while first <= last:
            stop = first + 1 if first < 4 else 2 * first
            inside = (self.positions >= first) & (self.positions < stop)
            if inside.any():
                label = str(first) if stop == first + 1 else f"{first}-{min(stop - 1, last)}"
                found.append((label, float(self.norms[inside].mean())))
            first = stop
        return found

    def outliers(self, times: float) -> NDArray[np.bool_]:
        """Return the rows whose norm is above `times` the median."""
        above: NDArray[np.bool_] = self.norms > times * float(np.median(self.norms))
        return above


def _places(store: Store, split: str, site: str) -> list[tuple[int, int]]:
    """Return (unit, chunk of the unit) of each chunk, in the order in which a reader counts them."""
    units = store.committed(split, site).items()
    return [(unit, i) for unit, commit in units for i in range(len(store.layout.chunks(commit.rows)))]


def _fields(title: str, obj: dict[str, object]) -> Iterator[str]:
    yield title
    for name, value in sorted(obj.items()):
        yield f"  {name}: {value if isinstance(value, str) else canonical(value)}"


def _split(store: Store, split: str) -> Iterator[str]:
    """Yield the sizes and statistics of every array of a split, from the commit records alone."""
    names = arrays(store, split)
    if not names:
        return
    yield f"{split}"
    yield (
        f"  {'array':<20}{'rows':>14}{'units':>7}{'on disk':>10}{'mean norm':>11}{'rms norm':>10}"
        f"{'norm of mean':>14}{'std':>9}{'max |x|':>10}"
    )
    for site in names:
        commits = store.committed(split, site)
        disk = sum(chunk.bytes for commit in commits.values() for chunk in commit.chunks)
        line = f"  {site:<20}{store.rows(split, site):>14,}{len(commits):>7}{format_bytes(disk):>10}"
        if site in store.sites(split) and store.rows(split, site):
            s = store.stats(split, site)
            mean, deviation = float(np.linalg.norm(s.mean)), s.variance**0.5
            line += f"{s.mean_norm:>11.4g}{s.mean_sq_norm**0.5:>10.4g}{mean:>14.4g}{deviation:>9.4g}{s.max_abs:>10.4g}"
        yield line


def _massive(store: Store) -> Iterator[str]:
    """Yield a line for each site with massive activations, from the commit records alone."""
    for site in store.sites(TRAIN):
        if store.rows(TRAIN, site):
            line = massive_line(site, store.stats(TRAIN, site))
            if line is not None:
                yield f"note: {line}"


def _norms(store: Store, split: str, site: str, times: float, most: int) -> Iterator[str]:
    """Yield norms by position and outlier tokens of a site."""
    total = store.rows(split, site)
    found = Norms.of(store, split, site, most)
    n, above = len(found.norms), found.outliers(times)
    yield f"{split} {site}: norms of {'all' if n == total else f'{n:,} of'} {total:,} rows"
    if by_position := found.by_position():
        yield "  mean by position:  " + "  ".join(f"{label}: {norm:.4g}" for label, norm in by_position)
    count = int(above.sum())
    line = f"  median {np.median(found.norms):.4g}; outliers above {times:g} times it: {count:,} ({count / n:.3%})"
    if count and by_position:
        positions, counts = np.unique(found.positions[above], return_counts=True)
        most_at = np.argsort(-counts, kind="stable")[:4]
        line += ", at positions " + ", ".join(f"{positions[i]} ({counts[i]:,})" for i in most_at)
        line += ", ..." if len(positions) > len(most_at) else ""
    yield line


def report(path: Location, times: float, most: int) -> Iterator[str]:
    """Yield the lines of `info`, of a store of tokens too.

    times: what makes an outlier. most: rows of a site whose norms are looked at.
    """
    if is_token_store(path):
        yield from token_report(path)
        return
    store = Store.open(path)
    entry, layout = Entry.of(path), store.layout
    yield entry.line
    yield f"fingerprint {store.manifest.fingerprint}"
    yield from _fields("settings as asked", flatten(store.manifest.settings))
    yield from _fields("identity", flatten(store.manifest.identity))
    yield f"a unit: {layout.unit_rows:,} rows in {layout.chunks_per_unit} chunks of {layout.chunk_rows:,}"
    yield f"tokens: {tokens_of(store) or 'none stored (harvest tokenises the text again for more rows or sites)'}"
    makers = makers_of(store)
    yield f"devices and libraries: {'mixed' if len(makers) > 1 else 'the same throughout'}"
    yield from (f"  {count} records by {maker or 'an unnamed device'}" for maker, count in makers.most_common())
    for split in SPLITS:
        yield from _split(store, split)
    yield from _massive(store)
    for split in SPLITS:
        for site in store.sites(split):
            if store.rows(split, site):
                yield from _norms(store, split, site, times, most)

"""Outlier tokens (attention sinks and the like): which rows are left out, and a reader that leaves them out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Float64
from numpy.typing import NDArray

from data.base.seeded import Ints, seeded_permutation
from data.loading.reader import Reader
from data.store.stats import Stats

SAMPLE = 1_000_000  # rows at least that a median is taken over, where there are so many

DecodeRows = Callable[[NDArray[Any]], NDArray[Any]]


def norms(rows: NDArray[Any]) -> Float64[np.ndarray, " N"]:
    """Return ||x|| of rows [N, D] as floats."""
    wide = rows.astype(np.float64)
    found: NDArray[np.float64] = np.sqrt(np.einsum("nd,nd->n", wide, wide))
    return found


def sampled_chunks(sizes: Ints, most: int) -> Iterator[int]:
    """Yield the fewest chunks of a seeded order that hold at least `most` rows, or all there are."""
    for index in seeded_permutation(len(sizes), "info"):
        yield int(index)
        if (most := most - int(sizes[index])) <= 0:
            return


def read_norms(reader: Reader, chunk: int, decode: DecodeRows) -> Float64[np.ndarray, " N"]:
    """Return ||x|| of a chunk's rows."""
    rows = np.empty((int(reader.sizes[chunk]), reader.width), reader.dtype)
    reader.read(chunk, rows)
    return norms(decode(rows))


def median_norm(reader: Reader, chunks: int, decode: DecodeRows) -> float:
    """Return the median ||x|| of a seeded sample of the first `chunks` chunks."""
    sample = [read_norms(reader, chunk, decode) for chunk in sampled_chunks(reader.sizes[:chunks], SAMPLE)]
    return float(np.median(np.concatenate(sample)))


class NormFilteredReader:
    """A reader's first `chunks` chunks without the rows whose norm is above `limit`; they are all read once to tell.

    `left_out` are the statistics of those rows. `decode` makes floats [n, D] of rows as they are stored. Of the rows of
    a pair of sites it takes the first's and `decode_second` the second's: a row whose norm is above `limit` at the
    first or above `limit_second` at the second is left out of both. `left_out_second` are the statistics of those rows
    at the second, `by_second` says how many of them are above the limit there alone.
    """

    def __init__(
        self,
        reader: Reader,
        chunks: int,
        limit: float,
        decode: DecodeRows,
        *,
        decode_second: DecodeRows | None = None,
        limit_second: float = math.inf,
        threads: int = 2,
    ) -> None:
        self.reader, self.decode, self.decode_second = reader, decode, decode_second
        self.limit, self.limit_second = limit, limit_second
        self.width, self.row_shape = reader.width, reader.row_shape
        self.dtype, self.torch_dtype = reader.dtype, reader.torch_dtype
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(self._look, range(chunks)))
        self.kept = [kept for kept, *_ in found]
        self.sizes = np.array([len(kept) for kept in self.kept], np.int64)
        self.left_out = Stats.merge(stats for _, stats, *_ in found)
        self.left_out_second = Stats.merge(stats for _, _, stats, _ in found)
        self.by_second = sum(count for *_, count in found)

    def _look(self, chunk: int) -> tuple[Ints, Stats, Stats, int]:
        """Find the numbers of the rows that are kept; of the others the statistics at the first and the second site,
        and how many only the second's norm leaves out."""
        rows = np.empty((int(self.reader.sizes[chunk]), self.width), self.dtype)
        self.reader.read(chunk, rows)
        wide = self.decode(rows)
        above = norms(wide) > self.limit
        if self.decode_second is None:
            stats = Stats.of(wide[above])
            return np.flatnonzero(~above), stats, stats, 0
        second = self.decode_second(rows)
        of_second = ~above & (norms(second) > self.limit_second)
        above |= of_second
        return np.flatnonzero(~above), Stats.of(wide[above]), Stats.of(second[above]), int(of_second.sum())

    @property
    def bytes_read(self) -> int:
        return self.reader.bytes_read

    def read(self, chunk: int, out: NDArray[Any], start: int = 0) -> None:
        kept = self.kept[chunk][start : start + len(out)]
        if not len(kept):
            return
        # One read from the first to the last row wanted, those left out among them: they are rare, and one long read
        # beats many short ones.
        rows = np.empty((int(kept[-1] - kept[0]) + 1, *self.row_shape), self.dtype)
        self.reader.read(chunk, rows, int(kept[0]))
        # "clip" (all indices are in range) lets numpy write in place; "raise" would take a copy first.
        np.take(rows, kept - kept[0], axis=0, out=out[: len(kept)], mode="clip")


def moments(total: Stats, left_out: Stats) -> dict[str, float]:
    """Return E ||x||^2 and E ||x - E x||^2 of all rows but those left out."""
    rows = total.rows - left_out.rows
    # From the sums of the commit records less those left out, so the rows that stay need not be read for this.
    mean_sq_norm = (total.sum_sq - left_out.sum_sq) / rows
    mean = (total.sum - left_out.sum) / rows
    return {"mean_sq_norm": mean_sq_norm, "variance": max(mean_sq_norm - float(mean @ mean), 0.0)}

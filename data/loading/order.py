"""The order of rows: pure functions of (sizes, seed, epoch, rank, world).

An epoch is one seeded order of the chunks, cut by rows into one part a rank; a rank's part is grouped into pools of K
chunks. A pool is dealt out in runs of 16 rows as they are stored, each chunk's runs in a seeded order and spread evenly
over the pool: rows are permuted within their unit when they are stored, so a run is 16 random rows of a unit.

A batch of B rows has, on average, as many rows of each chunk as a permutation of the pool gives it, m = B/K. How far it
strays is another matter. Here only the runs at the batch's two ends are left to chance, a variance of at most about a
third of RUN_ROWS^2, 85 rows^2, whatever m is; a permutation's grows with m, about m (1 - 1/K) (1 - B/N). So from about
80 rows of a chunk in a batch on there is less scatter than in a permutation, and below it more: with K=16, 83 beside
225 at B=4,096, and 75 beside 15 at B=256; by default (K=62, B=1,024) 85 beside 17. Fewer chunks in a pool, or larger
batches, are the remedy where that counts; shorter runs would cost reading.

Batch i of a rank is rows [i*B, (i+1)*B) of its pools one after another. `sizes` is the number of valid rows of each
chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data.base.errors import UserError
from data.base.seeded import Ints, seeded_permutation, seeded_words

RUN_ROWS = 16  # rows copied as one block; at most this, less at a chunk's ends


@dataclass(frozen=True)
class Pool:
    """Rows [starts[i], stops[i]) of each of `chunks`, held and mixed together.

    The index-th pool of its rank; its first row is row `begin` of the rank's epoch.
    """

    index: int
    begin: int
    chunks: Ints
    starts: Ints
    stops: Ints

    @property
    def rows(self) -> int:
        return int((self.stops - self.starts).sum())


@dataclass(frozen=True)
class Runs:
    """A pool's rows in their order: `rows[i]` rows from row `starts[i]` on of the pool's chunk number `chunks[i]`."""

    chunks: Ints
    starts: Ints
    rows: Ints

    def cut(self, at: Ints) -> Runs:
        """Return the same rows in the same order, with a new run at each row of the pool's order that `at` names."""
        ends = np.cumsum(self.rows)
        begins = ends - self.rows
        points = np.union1d(begins, at)
        of = np.searchsorted(begins, points, side="right") - 1
        return Runs(self.chunks[of], self.starts[of] + points - begins[of], np.diff(points, append=ends[-1:]))

    def indices(self, begins: Ints) -> Ints:
        """Return where each row lies in an array in which the chunk at place i of the pool begins at row
        `begins[i]`."""
        ends = np.cumsum(self.rows)
        offsets = begins[self.chunks] + self.starts - (ends - self.rows)
        return np.repeat(offsets, self.rows) + np.arange(int(ends[-1]))


def split_calibration(sizes: Ints, rows: int, seed: int) -> tuple[Ints, Ints]:
    """Split chunk ids in (training, reserved): the fewest, by a seeded order, that hold at least `rows` rows.

    Reserved rows serve the calibration, the optimizer never sees them. Raises UserError where nothing would be left.
    """
    # Of its own key: what is set aside must not depend on the epoch's order, which is another with each epoch.
    order = seeded_permutation(len(sizes), "reserve", seed)
    count = int(np.searchsorted(np.cumsum(sizes[order]), rows)) + 1 if rows > 0 else 0
    if count >= len(sizes):
        raise UserError(
            f"{rows} rows cannot be set aside for calibration and leave chunks to train on: the store holds "
            f"{int(sizes.sum())} rows in {len(sizes)} chunks, so harvest more tokens or lower calibration_tokens"
        )
    # Sorted, as the order of chunks is drawn anew each epoch and this one means nothing.
    return np.sort(order[count:]), np.sort(order[:count])


def pools(
    sizes: Ints, *, seed: int, epoch: int, rank: int, world: int, pool_chunks: int, shuffle: bool = True
) -> list[Pool]:
    """Return the pools of one rank in one epoch.

    Each rank has rows [N*rank//world, N*(rank+1)//world) of the chunk order, so a chunk at a border is shared by rows.
    """
    order = seeded_permutation(len(sizes), "chunks", seed, epoch) if shuffle else np.arange(len(sizes))
    ends = np.cumsum(sizes[order])
    begins, total = ends - sizes[order], int(sizes.sum())
    # By rows, not by chunks: ranks then differ by at most one row, however few chunks there are.
    first, last = total * rank // world, total * (rank + 1) // world
    starts, stops = np.maximum(first - begins, 0), np.minimum(last - begins, sizes[order])
    mine = np.flatnonzero(starts < stops)
    found: list[Pool] = []
    for at in range(0, len(mine), pool_chunks):
        group = mine[at : at + pool_chunks]
        begin = found[-1].begin + found[-1].rows if found else 0
        found.append(Pool(len(found), begin, order[group], starts[group], stops[group]))
    return found


def pool_runs(pool: Pool, *, seed: int, epoch: int, rank: int, shuffle: bool = True) -> Runs:
    """Make the order of a pool's rows.

    Each chunk is cut at a random offset and then every RUN_ROWS rows. Its n runs, in a random order, have one random
    place each in the n-ths of the pool, and the runs of all chunks are sorted by place.
    """
    chunks, rows = np.arange(len(pool.chunks)), pool.stops - pool.starts
    if not shuffle:
        return Runs(chunks, pool.starts, rows)
    # An upper limit of the number of runs: a chunk of n rows has a shorter one at each end. All words are drawn by one
    # call, which costs less than one a chunk.
    most = int((rows // RUN_ROWS + 2).sum())
    words = seeded_words(len(rows) + 2 * most, "pool", seed, epoch, rank, pool.index)
    # Without it the same 16 rows would stand together in every epoch; with it a row's neighbours change.
    offsets = (words[: len(rows)] % np.uint64(RUN_ROWS)).astype(np.int64)
    counts = -(-(rows + offsets) // RUN_ROWS)
    of = np.repeat(chunks, counts)
    number = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
    begins = (pool.starts - offsets)[of] + number * RUN_ROWS
    starts, stops = np.maximum(begins, pool.starts[of]), np.minimum(begins + RUN_ROWS, pool.stops[of])
    shuffled, jitter = words[len(rows) :][: len(of)], words[len(rows) + most :][: len(of)]
    turns = np.empty_like(number)
    # Sorting by a random word within each chunk is a permutation of its runs.
    turns[np.lexsort((shuffled, of))] = number
    # (turn + u) / n of the pool, u uniform in [0, 1), in fixed point with 40 bits: integers, so that no machine rounds
    # otherwise.
    places = ((turns << 40) + (jitter >> np.uint64(24)).astype(np.int64)) // counts[of]
    # Stable, so that equal places fall in the same order everywhere.
    order = np.argsort(places, kind="stable")
    return Runs(of[order], starts[order], (stops - starts)[order])


def batches_per_epoch(rows: int, *, batch: int, world: int, drop_last: bool = True) -> int:
    """Return batches of every rank: as many as the rank with the fewest of the `rows` rows has."""
    least = rows // world
    return least // batch if drop_last else -(-least // batch)


def check_order(sizes: Ints, *, seed: int, epoch: int, world: int, pool_chunks: int, shuffle: bool = True) -> None:
    """Prove that the ranks' pools, as they are dealt out, hold each row exactly once."""
    begins, seen = np.cumsum(sizes) - sizes, np.zeros(int(sizes.sum()), np.int64)
    for rank in range(world):
        order = {"seed": seed, "epoch": epoch, "rank": rank}
        for pool in pools(sizes, **order, world=world, pool_chunks=pool_chunks, shuffle=shuffle):
            runs = pool_runs(pool, **order, shuffle=shuffle)
            np.add.at(seen, runs.indices(begins[pool.chunks]), 1)
    assert (seen == 1).all(), f"{int((seen != 1).sum())} rows do not come exactly once"


def mixing_span(unit_rows: int, pool_chunks_units: int, total: int) -> float:
    """Return the uniform shuffle buffer, in rows, that mixes as well: 1 / (1/(H*K) + 1/N).

    H rows of a unit, K units in a pool, N rows in all.
    """
    return 1.0 / (1.0 / (unit_rows * pool_chunks_units) + 1.0 / total)

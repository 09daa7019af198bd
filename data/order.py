"""The order of rows: pure functions of (sizes, seed, epoch, rank, world).

An epoch is one seeded order of the chunks, cut by rows into one part a rank; a rank's part is grouped into pools of K
chunks, and each pool's rows are permuted as a whole. Batch i of a rank is rows [i*B, (i+1)*B) of its permuted pools one
after another. `sizes` is the number of valid rows of each chunk.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.errors import UserError

Ints = NDArray[np.int64]


def seeded_permutation(n: int, *key: int | str) -> Ints:
    """A permutation of 0..n-1 that depends on `key` alone, on any machine and numpy version.

    Sorts random 64-bit words whose low bits carry the index: bit generators are stable between numpy versions where
    `Generator.permutation` is not promised to be, and no two words are equal.
    """
    entropy = int.from_bytes(hashlib.sha256(repr(key).encode()).digest(), "little")
    bits = np.uint64(max(n - 1, 1).bit_length())
    words: NDArray[np.uint64] = np.random.PCG64(entropy).random_raw(n)
    words = np.sort((words >> bits << bits) | np.arange(n, dtype=np.uint64))
    return (words & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)


@dataclass(frozen=True)
class Pool:
    """Rows [starts[i], stops[i]) of each of `chunks`, held and permuted together; the index-th pool of its rank."""

    index: int
    chunks: Ints
    starts: Ints
    stops: Ints

    @property
    def rows(self) -> int:
        return int((self.stops - self.starts).sum())


def reserve(sizes: Ints, rows: int, seed: int) -> tuple[Ints, Ints]:
    """Split chunk ids in (training, reserved): the fewest, by a seeded order, that hold at least `rows` rows.

    Reserved rows serve the calibration, the optimizer never sees them. Raises UserError where nothing would be left.
    """
    order = seeded_permutation(len(sizes), "reserve", seed)
    count = int(np.searchsorted(np.cumsum(sizes[order]), rows)) + 1 if rows > 0 else 0
    if count >= len(sizes):
        raise UserError(
            f"{rows} rows cannot be set aside for calibration and leave chunks to train on: the store holds "
            f"{int(sizes.sum())} rows in {len(sizes)} chunks, so harvest more tokens or lower calibration_tokens"
        )
    return np.sort(order[count:]), np.sort(order[:count])


def pools(
    sizes: Ints, *, seed: int, epoch: int, rank: int, world: int, pool_chunks: int, shuffle: bool = True
) -> list[Pool]:
    """The pools of one rank in one epoch.

    Each rank has rows [N*rank//world, N*(rank+1)//world) of the chunk order, so a chunk at a border is shared by rows.
    """
    order = seeded_permutation(len(sizes), "chunks", seed, epoch) if shuffle else np.arange(len(sizes))
    ends = np.cumsum(sizes[order])
    begins, total = ends - sizes[order], int(sizes.sum())
    first, last = total * rank // world, total * (rank + 1) // world
    starts, stops = np.maximum(first - begins, 0), np.minimum(last - begins, sizes[order])
    mine = np.flatnonzero(starts < stops)
    groups = (mine[at : at + pool_chunks] for at in range(0, len(mine), pool_chunks))
    return [Pool(index, order[group], starts[group], stops[group]) for index, group in enumerate(groups)]


def pool_permutation(pool_rows: int, *, seed: int, epoch: int, rank: int, index: int) -> Ints:
    """Row i of a permuted pool is row `result[i]` of its chunks one after another."""
    return seeded_permutation(pool_rows, "pool", seed, epoch, rank, index)


def batches_per_epoch(rows: int, *, batch: int, world: int, drop_last: bool = True) -> int:
    """Batches of every rank: as many as the rank with the fewest of the `rows` rows has."""
    least = rows // world
    return least // batch if drop_last else -(-least // batch)


def check(sizes: Ints, *, seed: int, epoch: int, world: int, pool_chunks: int, shuffle: bool = True) -> None:
    """Prove that the ranks' permuted pools hold each row exactly once."""
    begins, seen = np.cumsum(sizes) - sizes, np.zeros(int(sizes.sum()), np.int64)
    for rank in range(world):
        order = {"seed": seed, "epoch": epoch, "rank": rank}
        for pool in pools(sizes, **order, world=world, pool_chunks=pool_chunks, shuffle=shuffle):
            spans = zip(begins[pool.chunks], pool.starts, pool.stops, strict=True)
            rows = np.concatenate([begin + np.arange(start, stop) for begin, start, stop in spans])
            np.add.at(seen, rows[pool_permutation(pool.rows, **order, index=pool.index)], 1)
    assert (seen == 1).all(), f"{int((seen != 1).sum())} rows do not come exactly once"


def mixing_span(unit_rows: int, pool_chunks_units: int, total: int) -> float:
    """The uniform shuffle buffer, in rows, that mixes as well: 1 / (1/(H*K) + 1/N).

    H rows of a unit, K units in a pool, N rows in all.
    """
    return 1.0 / (1.0 / (unit_rows * pool_chunks_units) + 1.0 / total)

"""Shuffled batches from a store's chunks: read ahead by threads, resumable at any batch, the same on every machine."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from jaxtyping import Real
from numpy.typing import NDArray
from torch import Tensor

from data import order
from data.errors import UserError
from data.order import Ints, Pool
from data.reader import Reader

_AHEAD = 2  # batches made before they are asked for


def _bits(x: Tensor) -> NDArray[Any]:
    """A tensor's memory as numpy, bfloat16 as uint16."""
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(np.uint16)
    array: NDArray[Any] = x.numpy()
    return array


def _ahead(batches: Iterator[Tensor]) -> Iterator[Tensor]:
    """The same batches, the next ones made in a thread; its errors are raised here, in their place."""
    with ThreadPoolExecutor(1) as maker:
        waiting: deque[Future[Tensor | None]] = deque(maker.submit(next, batches, None) for _ in range(_AHEAD))
        try:
            while (batch := waiting.popleft().result()) is not None:
                waiting.append(maker.submit(next, batches, None))
                yield batch
        finally:
            for future in waiting:
                future.cancel()


class ActivationLoader:
    """Batches [B, W] of rows as they are stored, of which `Store.decoder` makes activations [B, D].

    Each row comes once an epoch, less the last rows that fill no batch. `chunks` restricts it to some of the reader's
    chunks; pools of `pool_chunks` chunks are permuted as a whole (see `data.order`); `threads` threads read the next
    pool while one is used; `limit_batches` caps an epoch. A batch belongs to whoever took it: its memory is never used
    again.

    Each iteration is an epoch of its own order. Broken off, it is over, and the next begins the next epoch; only after
    `load_state_dict` does it go on in the middle of one. UserError: a setting out of range, too few rows for a batch.
    """

    def __init__(
        self,
        reader: Reader,
        *,
        batch: int,
        chunks: Ints | None = None,
        pool_chunks: int = 16,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        threads: int = 2,
        shuffle: bool = True,
        drop_last: bool = True,
        limit_batches: int | None = None,
    ) -> None:
        settings = {"batch": batch, "pool_chunks": pool_chunks, "threads": threads, "limit_batches": limit_batches or 1}
        for name, value in settings.items():
            if value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")
        assert 0 <= rank < world and len(reader.row_shape) == 1
        self.reader, self.batch, self.pool_chunks, self.threads = reader, batch, pool_chunks, threads
        self.seed, self.rank, self.world, self.shuffle = seed, rank, world, shuffle
        self.chunks = np.arange(len(reader.sizes)) if chunks is None else np.asarray(chunks, np.int64)
        self.sizes = reader.sizes[self.chunks]
        self.rows = int(self.sizes.sum())  # of all ranks
        count = order.batches_per_epoch(self.rows, batch=batch, world=world, drop_last=drop_last)
        if count < 1:
            raise UserError(
                f"{self.rows} rows over {world} processes fill no batch of {batch}: lower it or harvest more"
            )
        self._length = count if limit_batches is None else min(count, limit_batches)
        self._stop = min(self._length * batch, self.rows // world)  # rows of an epoch
        self.epoch, self.delivered, self._goes_on = 0, 0, False

    def __len__(self) -> int:
        """Batches of an epoch, the same on every rank."""
        return self._length

    def __iter__(self) -> Iterator[Real[Tensor, "B W"]]:
        # The epoch moves on here: what follows the last yield never runs when the consumer stops asking there.
        if not self._goes_on and self.delivered:
            self.epoch, self.delivered = self.epoch + 1, 0
        self._goes_on = False
        delivered = self.delivered
        for batch in _ahead(self._batches(self.epoch, delivered * self.batch)):
            delivered += 1
            self.delivered = delivered
            yield batch

    def sample(self, n: int) -> Real[Tensor, "N W"]:
        """The first `n` rows (or all there are) of the current epoch's order, without moving on."""
        taken, rows = [], 0
        for batch in self._batches(self.epoch, 0):
            taken.append(batch[: n - rows])
            rows += len(taken[-1])
            if rows >= n:
                break
        return torch.cat(taken)

    def _order(self) -> dict[str, int | bool | str]:
        """What the order of rows depends on, beside epoch and rank."""
        digest = hashlib.sha256(self.chunks.astype("<i8").tobytes() + self.sizes.astype("<i8").tobytes())
        fixed = ("seed", "world", "pool_chunks", "batch", "shuffle", "rows")
        return {name: getattr(self, name) for name in fixed} | {"chunks": digest.hexdigest()[:16]}

    def state_dict(self) -> dict[str, int | bool | str]:
        return {"epoch": self.epoch, "delivered": self.delivered} | self._order()

    def load_state_dict(self, state: dict[str, int | bool | str]) -> None:
        """Go on after the last batch delivered; a UserError names what gives another order than the state's."""
        changed = [
            f"{name} was {state.get(name)}, is {now}" for name, now in self._order().items() if state.get(name) != now
        ]
        if changed:
            raise UserError(f"the loader cannot go on where it stopped: {', '.join(changed)}; use the same settings")
        self.epoch, self.delivered = int(state["epoch"]), int(state["delivered"])
        self._goes_on = self.delivered < len(self)

    def _empty(self, rows: int) -> Real[Tensor, "B W"]:
        return torch.empty(rows, self.reader.width, dtype=self.reader.torch_dtype)

    def _batches(self, epoch: int, at: int) -> Iterator[Tensor]:
        """The batches of an epoch from its row `at` on."""
        out, filled = self._empty(min(self.batch, self._stop - at)), 0
        for rows, wanted in self._permuted(epoch, at):
            while len(wanted):
                n = min(len(wanted), len(out) - filled)
                # "clip" (all indices are in range) lets numpy write in place; "raise" would take a copy first.
                np.take(rows, wanted[:n], axis=0, out=_bits(out)[filled : filled + n], mode="clip")
                wanted, filled = wanted[n:], filled + n
                if filled == len(out):
                    yield out
                    at += filled
                    if at == self._stop:
                        return
                    out, filled = self._empty(min(self.batch, self._stop - at)), 0

    def _permuted(self, epoch: int, at: int) -> Iterator[tuple[NDArray[Any], Ints]]:
        """Pools from row `at` of the epoch on: the rows as read, and which to take one after another.

        Two buffers: one is filled while the other is used.
        """
        place = {"seed": self.seed, "epoch": epoch, "rank": self.rank}
        settings = {"pool_chunks": self.pool_chunks, "world": self.world}
        pools = order.pools(self.sizes, **place, **settings, shuffle=self.shuffle)
        ends = np.cumsum([pool.rows for pool in pools])
        first, last = np.searchsorted(ends, [at, self._stop - 1], side="right")
        pools = pools[first : last + 1]
        most = max(pool.rows for pool in pools)
        buffers = [np.empty((most, self.reader.width), self.reader.dtype) for _ in pools[:2]]
        with ThreadPoolExecutor(self.threads) as threads:
            pending: list[Future[None]] = []
            try:
                pending = self._fill(threads, pools[0], buffers[0])
                for i, pool in enumerate(pools):
                    for future in pending:
                        future.result()
                    pending = self._fill(threads, pools[i + 1], buffers[(i + 1) % 2]) if i + 1 < len(pools) else []
                    wanted = np.arange(pool.rows)
                    if self.shuffle:
                        wanted = order.pool_permutation(pool.rows, **place, index=pool.index)
                    begin = int(ends[pool.index]) - pool.rows
                    yield buffers[i % 2], wanted[max(at - begin, 0) :]
            finally:
                for future in pending:
                    future.cancel()

    def _fill(self, threads: ThreadPoolExecutor, pool: Pool, buffer: NDArray[Any]) -> list[Future[None]]:
        """Start reading a pool's chunks one after another into a buffer."""
        futures, row = [], 0
        for chunk, start, stop in zip(pool.chunks, pool.starts, pool.stops, strict=True):
            out = buffer[row : row + int(stop - start)]
            futures.append(threads.submit(self.reader.read, int(self.chunks[chunk]), out, int(start)))
            row += len(out)
        return futures

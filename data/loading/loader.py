"""Shuffled batches from a store's chunks: read ahead by threads, resumable at any batch, the same on every machine."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Real
from torch import Tensor

from data.base.errors import UserError
from data.base.seeded import Ints
from data.loading import order
from data.loading.epoch import EpochSlice, from_resident, load_all, prefetch, stream_to_cpu, stream_to_device
from data.loading.order import RUN_ROWS
from data.loading.reader import Reader


class ActivationLoader:
    """Batches [B, W] of rows as they are stored, of which `Store.decoder` makes activations [B, D].

    Each row comes once an epoch, less the last rows that fill no batch. `chunks` restricts it to some of the reader's
    chunks; pools of `pool_chunks` chunks are mixed (see `data.loading.order`); `threads` threads read the next pool
    while one is used; `limit_batches` caps an epoch. A batch belongs to whoever took it: its memory is never used
    again. Batches are the same, bit for bit, wherever they come from: read into main memory pool by pool, sent to
    `device` pool by pool, or, with `preload`, drawn from rows that are all read once, when the first batch is asked
    for, and kept there (None: in main memory).

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
        device: torch.device | None = None,
        preload: bool = False,
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
        # Every rank stops after the same number of batches, whatever its part is: in DDP each step waits for all ranks.
        self._stop = min(self._length * batch, self.rows // world)  # rows of an epoch
        self.epoch, self.delivered, self._goes_on = 0, 0, False
        self.waited = 0.0  # seconds that batches were waited for
        self.device, self.preload = device, preload
        self._held: Tensor | None = None

    def __len__(self) -> int:
        """Return batches of an epoch, the same on every rank."""
        return self._length

    def __iter__(self) -> Iterator[Real[Tensor, "B W"]]:
        # The epoch moves on here: what follows the last yield never runs when the consumer stops asking there.
        if not self._goes_on and self.delivered:
            self.epoch, self.delivered = self.epoch + 1, 0
        self._goes_on = False
        delivered = self.delivered
        began = time.perf_counter()
        for batch in self._batches(self.epoch, delivered * self.batch):
            delivered += 1
            # Counted before the batch is handed out: a checkpoint is saved by whoever has it, so the batch counts as
            # used.
            self.delivered = delivered
            self.waited += time.perf_counter() - began
            yield batch
            began = time.perf_counter()

    def sample(self, n: int) -> Real[Tensor, "N W"]:
        """Return the first `n` rows (or all there are) of the current epoch's order, without moving on."""
        taken, rows = [], 0
        for batch in self._batches(self.epoch, 0):
            taken.append(batch[: n - rows])
            rows += len(taken[-1])
            if rows >= n:
                break
        return torch.cat(taken)

    def _order(self) -> dict[str, int | bool | str]:
        """Return what the order of rows depends on, beside epoch and rank."""
        # Little-endian on every machine, as it is compared with what another one wrote.
        digest = hashlib.sha256(self.chunks.astype("<i8").tobytes() + self.sizes.astype("<i8").tobytes())
        fixed = ("seed", "world", "pool_chunks", "batch", "shuffle", "rows")
        return {name: getattr(self, name) for name in fixed} | {"chunks": digest.hexdigest()[:16], "run": RUN_ROWS}

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
        # Saved after its last batch an epoch is over: the next iteration begins the next one.
        self._goes_on = self.delivered < len(self)

    def _batches(self, epoch: int, at: int) -> Iterator[Tensor]:
        """Return the batches of an epoch from its row `at` on."""
        if at >= self._stop:
            return iter(())
        place = {"seed": self.seed, "epoch": epoch, "rank": self.rank}
        settings = {"world": self.world, "pool_chunks": self.pool_chunks}
        # Pools that are done, or lie beyond the last batch, are not read at all: going on costs no more than the pool
        # it is in.
        pools = [
            pool
            for pool in order.pools(self.sizes, **place, **settings, shuffle=self.shuffle)
            if pool.begin < self._stop and pool.begin + pool.rows > at
        ]
        part = EpochSlice(
            self.reader, self.chunks, pools, place, self.shuffle, self.batch, at, self._stop, self.threads
        )
        if self.preload:
            if self._held is None:
                self._held = load_all(self.reader, self.chunks, self.device or torch.device("cpu"), self.threads)
            # The gather from resident rows takes time as well; a thread does it while the batch before is trained on.
            return prefetch(from_resident(part, self._held))
        return stream_to_cpu(part) if self.device is None else prefetch(stream_to_device(part, self.device))

"""How the rows of an epoch come together in batches: scattered as they are read, or drawn from resident rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, Real
from numpy.typing import NDArray
from torch import Tensor

from data.base.seeded import Ints
from data.loading.order import Pool, Runs, pool_runs
from data.loading.reader import Reader, scatter

_AHEAD = 2  # batches drawn before they are asked for


def bits(x: Tensor) -> NDArray[Any]:
    """Return a tensor's memory as numpy, bfloat16 as uint16."""
    if x.dtype == torch.bfloat16:
        return x.view(torch.int16).numpy().view(np.uint16)
    array: NDArray[Any] = x.numpy()
    return array


@dataclass(frozen=True)
class EpochSlice:
    """Rows [at, stop) of a rank's epoch in batches of `batch` rows, of which `at` is a multiple; the last may be short.

    `pools` are those that hold these rows, `chunks` the reader's names of the pools' chunks.
    """

    reader: Reader
    chunks: Ints
    pools: list[Pool]
    place: dict[str, int]  # seed, epoch, rank
    shuffle: bool
    batch: int
    at: int
    stop: int
    threads: int

    def runs(self, pool: Pool) -> Runs:
        return pool_runs(pool, **self.place, shuffle=self.shuffle)

    def sizes(self, first: int, last: int) -> list[int]:
        """Return the rows of each batch that begins in rows [first, last) of the epoch."""
        # -(-a // b) rounds up: the first batch that begins at or after `first`.
        begins = range(-(-first // self.batch) * self.batch, last, self.batch)
        return [min(self.batch, self.stop - begin) for begin in begins]

    def empty(self, rows: int, device: torch.device | None = None) -> Real[Tensor, "_ D"]:
        return torch.empty(rows, self.reader.width, dtype=self.reader.torch_dtype, device=device)


@dataclass(frozen=True)
class CopyPlan:
    """Where rows of a chunk go: `rows[i]` rows from row `starts[i]` on to the rows from `places[i]` on of the epoch."""

    chunk: int
    starts: Ints
    rows: Ints
    places: Ints


def copy_plans(part: EpochSlice, pool: Pool) -> list[CopyPlan]:
    """Return the plans of each chunk of a pool, none over the border of a batch, in the order of the chunk's rows."""
    end = pool.begin + pool.rows
    # Of the pools at the two ends only a part is wanted: a resumed epoch begins in the middle of one, and the last rows
    # that fill no batch are left out.
    first, last = max(pool.begin, part.at), min(end, part.stop)
    borders = np.arange(-(-first // part.batch) * part.batch, last, part.batch)
    # Cut at every border of a batch, so that no run has to be copied into two.
    runs = part.runs(pool).cut(np.array([first, *borders, *([last] if last < end else [])]) - pool.begin)
    places = pool.begin + np.cumsum(runs.rows) - runs.rows
    # The file is read from front to back; the places in memory may be anywhere.
    order = np.lexsort((runs.starts, runs.chunks))
    order = order[(places[order] >= first) & (places[order] < last)]
    edges = np.searchsorted(runs.chunks[order], np.arange(len(pool.chunks) + 1))
    names, ofs = part.chunks[pool.chunks].tolist(), [order[a:b] for a, b in pairwise(edges)]
    targets = [CopyPlan(name, runs.starts[of], runs.rows[of], places[of]) for name, of in zip(names, ofs, strict=True)]
    return [target for target in targets if len(target.rows)]


def _fetch(part: EpochSlice, target: CopyPlan, batches: list[NDArray[Any]], first: int) -> None:
    """Read a chunk's rows into their places; `batches[0]` is the batch number `first` of the epoch."""
    numbers, froms = np.divmod(target.places, part.batch)
    ends = (froms + target.rows).tolist()
    outs = [batches[number - first][a:b] for number, a, b in zip(numbers.tolist(), froms.tolist(), ends, strict=True)]
    gaps = np.flatnonzero(target.starts[1:] != target.starts[:-1] + target.rows[:-1]) + 1
    for a, b in pairwise([0, *gaps.tolist(), len(outs)]):  # what lies together is read at once
        scatter(part.reader, target.chunk, outs[a:b], int(target.starts[a]))


def stream_to_cpu(part: EpochSlice) -> Iterator[Tensor]:
    """Yield batches in memory of their own, each chunk read straight into them;
    the next pool is read while one is used."""
    last: list[Tensor] = []  # the batch that begins in one pool and goes on in the next, if any
    reads: list[Future[None]] = []

    def start(pool: Pool, targets: list[CopyPlan]) -> deque[Tensor]:
        """Begin to read a pool; the batches that are whole when all is read."""
        first, stop = max(pool.begin, part.at), min(pool.begin + pool.rows, part.stop)
        # Memory of its own for each batch, as it then belongs to whoever takes it: nothing here writes to it again.
        batches = last + [part.empty(rows) for rows in part.sizes(first, stop)]
        arrays = list(map(bits, batches))
        reads[:] = [threads.submit(_fetch, part, target, arrays, first // part.batch) for target in targets]
        # The batch over the border is not whole until the next pool has been read, which fills its other rows.
        last[:] = [] if stop == part.stop or stop % part.batch == 0 else [batches.pop()]
        return deque(batches)

    with ThreadPoolExecutor(part.threads) as threads:
        # What goes where is worked out while the pool before is read.
        plans = deque(threads.submit(copy_plans, part, pool) for pool in part.pools[:1])
        coming: deque[Tensor] = deque()
        try:
            # One round more than there are pools: the last round hands out what the last pool's reads filled.
            for pool, after in zip([*part.pools, None], [*part.pools[1:], None, None], strict=True):
                for read in reads:
                    read.result()
                # Reads of this pool begin before the batches of the pool before are handed out, and go on while those
                # are trained on.
                ready, coming = coming, start(pool, plans.popleft().result()) if pool else deque()
                if after:
                    plans.append(threads.submit(copy_plans, part, after))
                while ready:
                    yield ready.popleft()
        finally:
            for read in reads:
                read.cancel()


def _drawn(part: EpochSlice, pools: Iterator[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
    """Yield batches gathered from pools: held rows, and which of them to take one after another."""
    sizes = iter(part.sizes(part.at, part.stop))
    out, filled = None, 0
    for held, wanted in pools:
        while len(wanted):
            out = part.empty(next(sizes), held.device) if out is None else out
            n = min(len(wanted), len(out) - filled)
            # Written in place: a gather followed by a copy would move each row twice.
            torch.index_select(held, 0, wanted[:n], out=out[filled : filled + n])
            wanted, filled = wanted[n:], filled + n
            if filled == len(out):
                yield out
                out, filled = None, 0


def _wanted(part: EpochSlice, pool: Pool, begins: Ints, device: torch.device) -> Int64[Tensor, " N"]:
    """Return which rows of an array to take for a pool, where its i-th chunk's row 0 is,
    or would be, row `begins[i]`."""
    indices = part.runs(pool).indices(begins)
    first, last = max(part.at - pool.begin, 0), part.stop - pool.begin
    return torch.from_numpy(indices[first:last]).to(device)


def load_all(reader: Reader, chunks: Ints, device: torch.device, threads: int) -> Real[Tensor, "_ D"]:
    """Return all rows of the chunks one after another on a device."""
    sizes = reader.sizes[chunks]
    held = torch.empty(int(sizes.sum()), reader.width, dtype=reader.torch_dtype, device=device)

    def fetch(chunk: int, rows: Tensor) -> None:
        # numpy cannot fill a GPU's memory, so each chunk goes there by way of one buffer of its size.
        here = rows if rows.device.type == "cpu" else torch.empty_like(rows, device="cpu")
        reader.read(chunk, bits(here))
        if here is not rows:
            rows.copy_(here)

    with ThreadPoolExecutor(threads) as pool:
        # Asked for one by one, since an error of a thread is raised only where its result is.
        for done in pool.map(fetch, chunks.tolist(), torch.split(held, sizes.tolist())):
            assert done is None
    return held


def from_resident(part: EpochSlice, held: Real[Tensor, "_ D"]) -> Iterator[Tensor]:
    """Return batches from the rows that `load_all` gives for the part's chunks."""
    sizes = part.reader.sizes[part.chunks]
    begins = np.cumsum(sizes) - sizes
    return _drawn(part, ((held, _wanted(part, pool, begins[pool.chunks], held.device)) for pool in part.pools))


def stream_to_device(part: EpochSlice, device: torch.device) -> Iterator[Tensor]:
    """Return batches on a device: each pool goes over in one copy, from pinned memory for CUDA,
    and is put in order there."""
    return _drawn(part, _sent(part, device))


def _sent(part: EpochSlice, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the pools on the device, the next one read and sent while one is used."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
    shape = (max(pool.rows for pool in part.pools), part.reader.width)
    # From pinned memory a GPU copies by itself while the processor goes on; pinning is slow, so one buffer serves all
    # pools.
    staging = torch.empty(shape, dtype=part.reader.torch_dtype, pin_memory=stream is not None)

    def send(pool: Pool) -> Tensor:
        outs = np.split(bits(staging)[: pool.rows], np.cumsum(pool.stops - pool.starts)[:-1])
        list(readers.map(part.reader.read, part.chunks[pool.chunks].tolist(), outs, pool.starts.tolist()))
        with torch.cuda.stream(stream):
            held = part.empty(pool.rows, device)
            held.copy_(staging[: pool.rows], non_blocking=stream is not None)
        if stream is not None:
            # The staging buffer is filled anew for the next pool, so its copy has to be over; the training's own stream
            # goes on meanwhile.
            stream.synchronize()
            held.record_stream(torch.cuda.current_stream(device))  # its memory is not given away while that reads it
        return held

    # One sender: its pools share the staging buffer, and the order of their copies is that of the epoch.
    with ThreadPoolExecutor(part.threads) as readers, ThreadPoolExecutor(1) as sender:
        coming = sender.submit(send, part.pools[0])
        for pool, after in zip(part.pools, [*part.pools[1:], None], strict=True):
            held = coming.result()
            if after is not None:
                coming = sender.submit(send, after)
            yield held, _wanted(part, pool, np.cumsum(pool.stops - pool.starts) - pool.stops, device)


def prefetch(batches: Iterator[Tensor]) -> Iterator[Tensor]:
    """Yield the same batches, the next ones made in a thread; its errors are raised here, in their place."""
    with ThreadPoolExecutor(1) as maker:
        waiting: deque[Future[Tensor | None]] = deque(maker.submit(next, batches, None) for _ in range(_AHEAD))
        try:
            while (batch := waiting.popleft().result()) is not None:
                waiting.append(maker.submit(next, batches, None))
                yield batch
        finally:
            for future in waiting:
                future.cancel()

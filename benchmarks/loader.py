"""What the loader costs beside the least that reading can cost, in ratios of one run.

    python -m benchmarks.loader [--megabytes 800] [--rounds 5] [--folder outputs]

Every method gives the same rows, from the page cache. The methods take turns, round by round, so that another load on
the machine hits all of them; a figure is the median over the rounds. What the checksums cost, which are compared the
first time that a process reads a chunk, is shown as a rate with each chunk checked, and as a share of a training step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from itertools import islice
from multiprocessing import get_context
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler

from benchmarks.contestants.ours import make
from benchmarks.contestants.spec import Spec
from data.base.cli import keep_freed_memory
from data.loading.checksums import crc32c, forget
from data.loading.loader import ActivationLoader
from data.loading.reader import DirectReader, Reader, ZarrReader
from data.store.layout import Layout
from data.store.manifest import TRAIN, Manifest
from data.store.store import Store

SITE, BATCH = "resid_post.0", 4096
SLOW_ROWS = 32_768  # of what takes one row at a time


def build(cache: Path, d_model: int, chunk_rows: int, chunks: int) -> Store:
    """Write a bfloat16 store of one unit a 16 chunks."""
    layout = Layout("bfloat16", context=128, chunk_rows=chunk_rows, chunks_per_unit=16, mixing_seed=0)
    settings = {"model": {"name": "random"}, "text": {}, "packing": {}}
    identity = {"layout": asdict(layout), "model": {"name": "random"}}
    store = Store.create_or_open(cache, Manifest(identity, settings, "random", d_model))
    units = -(-chunks // layout.chunks_per_unit)
    store.require(TRAIN, SITE, d_model, units * layout.unit_rows)
    rng = np.random.default_rng(0)
    for unit in range(units):
        x_ND = rng.standard_normal((layout.unit_rows, d_model), np.float32)
        store.write(TRAIN, unit, SITE, (x_ND.view(np.uint32) >> 16).astype(np.uint16), {"device": "cpu"})
    return store


class Rows(Dataset[Tensor]):
    """The same rows as one memory-mapped file, an item a row (or a batch, for a list of indices)."""

    def __init__(self, path: Path, store: Store) -> None:
        reader = DirectReader(store, TRAIN, SITE)
        self.rows = np.memmap(path, np.uint16, "w+", shape=(int(reader.sizes.sum()), reader.width))
        at = 0
        for chunk, size in enumerate(reader.sizes):
            reader.read(chunk, self.rows[at : at + size])
            at += int(size)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Tensor:
        rows = np.array(self.rows[index])
        return torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16)


Method = Callable[[], tuple[int, float]]  # bytes, seconds


def timed(run: Callable[[], int]) -> Method:
    def method() -> tuple[int, float]:
        began = time.perf_counter()
        return run(), time.perf_counter() - began

    return method


def raw_reads(reader: DirectReader, blocks: int) -> Method:
    """Return a method: each chunk file read into a buffer of so many chunks, used again and again.

    A buffer of one chunk stays in the processor's cache; what is to be shuffled needs one that does not.
    """
    size = max(chunk.bytes for chunk in reader.chunks)
    parts = np.split(np.ones(blocks * size, np.uint8), blocks)
    paths = [Path(str(reader.store.path)) / chunk.key for chunk in reader.chunks]

    def run() -> int:
        total = 0
        for index, path in enumerate(paths):
            with open(path, "rb", buffering=0) as file:
                total += file.readinto(parts[index % blocks].data) or 0
        return total

    return timed(run)


def memory_copies(total: int, block: int) -> Method:
    """Return a method: as many bytes copied from block to block of memory, none of them in a processor's cache."""
    source, target = np.ones(16 * block, np.uint8), np.ones(16 * block, np.uint8)

    def run() -> int:
        done = 0
        while done < total:
            np.copyto(target, source)
            done += len(source)
        return done

    return timed(run)


def loaded(reader: Reader, pool_chunks: int, threads: int, *, checked: bool = False) -> Method:
    """Return a method: the loader in the middle of a long epoch: ten pools, of which the third to the ninth are timed.

    Each pool that is used is timed with the reading of a next one; buffers are warm, as they are after the first two.
    checked: chunks count as never read before, so that their checksums are compared.
    """
    chunks = np.resize(np.arange(len(reader.sizes)), 10 * pool_chunks)
    loader = ActivationLoader(reader, batch=BATCH, chunks=chunks, pool_chunks=pool_chunks, threads=threads)

    def run() -> tuple[int, float]:
        if checked:
            forget()
        batches = iter(loader)
        for _ in islice(batches, len(loader) // 5):
            pass
        began = time.perf_counter()
        total = sum(batch.nbytes for batch in islice(batches, 7 * len(loader) // 10))
        return total, time.perf_counter() - began

    return run


def torch_rows(rows: Rows) -> Method:
    """Return DataLoader as its manual has it: an item a row, shuffled, collated."""

    def run() -> int:
        sampler = RandomSampler(rows, num_samples=min(SLOW_ROWS, len(rows)))
        return sum(batch.nbytes for batch in DataLoader(rows, BATCH, sampler=sampler))

    return timed(run)


def torch_batches(rows: Rows) -> Method:
    """Return DataLoader at its best: a batch is one index of the memory map."""

    def run() -> int:
        sampler = BatchSampler(RandomSampler(rows), BATCH, drop_last=True)
        return sum(batch.nbytes for batch in DataLoader(rows, batch_size=None, sampler=sampler))

    return timed(run)


def check_share(reader: DirectReader, steps: int = 3) -> str:
    """Print the time of a batch's checksums beside that of a training step of TopK at 768 x 12,288 x 4,096, both on
    this machine."""
    spec = Spec("topk", 768, 12_288, 32, BATCH)
    x_BD = torch.randn(BATCH, spec.d_model, generator=torch.Generator().manual_seed(0))
    contestant, step_s, check_s = make("ours", spec, x_BD), [], []
    rows = np.empty((int(reader.sizes[0]), reader.width), reader.dtype)
    reader.read(0, rows)
    batch_bytes = BATCH * spec.d_model * 2
    for _ in range(steps + 1):  # the first warms up
        began = time.perf_counter()
        contestant.step(x_BD)
        step_s.append(time.perf_counter() - began)
        began = time.perf_counter()
        crc32c([rows])
        check_s.append((time.perf_counter() - began) * batch_bytes / rows.nbytes)
    step, check = statistics.median(step_s[1:]), statistics.median(check_s[1:])
    return (
        f"checksums: {batch_bytes / check / 1e9:.2f} GB/s, {1e3 * check:.2f} ms a batch of {BATCH} rows, "
        f"{check / step:.2%} of a training step ({1e3 * step:.0f} ms) in the first epoch, 0 after it"
    )


def rates(methods: dict[str, Method], rounds: int) -> dict[str, list[float]]:
    """Return the GB/s of each method in each round; a first round warms up and does not count."""
    speeds: dict[str, list[float]] = {name: [] for name in methods}
    for turn in range(rounds + 1):
        for name, method in methods.items():
            total, seconds = method()
            if turn:
                speeds[name].append(total / seconds / 1e9)
    return speeds


def _one_of_many(path: Path, pool_chunks: int, barrier: Barrier, spans: Queue[tuple[int, float, float]]) -> None:
    """Read an epoch as one process among several; sends its bytes, and when it began and ended."""
    keep_freed_memory()
    reader = DirectReader(Store.open(path), TRAIN, SITE)
    loader = ActivationLoader(reader, batch=BATCH, pool_chunks=pool_chunks, threads=1, seed=os.getpid())
    for _ in loader:  # memory is warm after it
        pass
    barrier.wait()
    began = time.monotonic()
    total = sum(batch.nbytes for _ in range(3) for batch in loader)
    spans.put((total, began, time.monotonic()))


def together(path: Path, readers: int, pool_chunks: int) -> float:
    """Return the GB/s of so many processes, each with a loader of its own over one store, taken together."""
    context = get_context("spawn")
    barrier, spans = context.Barrier(readers), context.Queue()
    arguments = (path, pool_chunks, barrier, spans)
    processes = [context.Process(target=_one_of_many, args=arguments) for _ in range(readers)]
    for process in processes:
        process.start()
    totals, begans, ends = zip(*(spans.get() for _ in processes), strict=True)
    for process in processes:
        process.join()
    return float(sum(totals) / (max(ends) - min(begans)) / 1e9)


def main() -> None:
    parser = argparse.ArgumentParser(description="Loader throughput beside raw reads.")
    parser.add_argument("--megabytes", type=int, default=800)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--chunk-rows", type=int, default=4096)
    parser.add_argument("--pool-chunks", type=int, nargs="+", default=[16, 62])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--readers", type=int, nargs="*", default=[1, 2, 8], help="processes that read at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs"), help="where the trial store is put, for the run"
    )
    args = parser.parse_args()
    keep_freed_memory()
    args.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        chunk_bytes = 2 * args.d_model * args.chunk_rows
        store = build(Path(folder), args.d_model, args.chunk_rows, args.megabytes * 10**6 // chunk_bytes)
        direct, through_zarr = DirectReader(store, TRAIN, SITE), ZarrReader(store, TRAIN, SITE)
        total, rows = len(direct.chunks) * chunk_bytes, Rows(Path(folder) / "rows", store)
        methods = {
            "raw reads, buffer of a chunk": raw_reads(direct, 1),
            "raw reads, buffer of a pool": raw_reads(direct, args.pool_chunks[0]),
            "memcpy": memory_copies(total, chunk_bytes),
        }
        for pool_chunks in args.pool_chunks:
            methods[f"ours, direct, {pool_chunks} chunks"] = loaded(direct, pool_chunks, args.threads)
        methods[f"ours, checked, {args.pool_chunks[0]} chunks"] = loaded(
            direct, args.pool_chunks[0], args.threads, checked=True
        )
        methods["ours, through zarr"] = loaded(through_zarr, args.pool_chunks[0], args.threads)
        methods["DataLoader, a batch an item"] = torch_batches(rows)
        methods["DataLoader, a row an item"] = torch_rows(rows)
        print(f"{total / 1e6:.0f} MB in chunks of {chunk_bytes / 1e6:.1f} MB, batches of {BATCH}, {args.rounds} rounds")
        speeds = rates(methods, args.rounds)
        show(speeds)
        print(check_share(direct))
        for readers in args.readers:
            rate = together(Path(str(store.path)), readers, args.pool_chunks[0])
            print(f"{readers} process{'es' if readers > 1 else ''} with a loader each, together: {rate:.2f} GB/s")


def show(speeds: dict[str, list[float]]) -> None:
    """Print a line a method: median, least and most GB/s, and the median share of both raw reads of the same round."""
    chunk, pool = list(speeds.values())[:2]
    print(f"{'':<30}{'GB/s':>8}{'least':>8}{'most':>8}{'of raw, chunk':>15}{'of raw, pool':>14}")
    for name, values in speeds.items():
        shares = [statistics.median(v / r for v, r in zip(values, raw, strict=True)) for raw in (chunk, pool)]
        line = f"{name:<30}{statistics.median(values):>8.2f}{min(values):>8.2f}{max(values):>8.2f}"
        print(line + f"{shares[0]:>15.3f}{shares[1]:>14.3f}")


if __name__ == "__main__":
    main()

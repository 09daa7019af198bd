"""Properties of the loader over sizes and seeds, on rows that say which row they are."""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.base.cli import CONF
from data.base.errors import UserError
from data.loading import order
from data.loading.loader import ActivationLoader
from data.loading.reader import DirectReader, ZarrReader, open_reader
from data.store.layout import Layout
from data.store.manifest import TRAIN, Manifest
from data.store.store import Store
from tests.data.conftest import SITE, Build, ids_of, numbered


class Rows:
    """A reader of numbered rows in memory, of chunks of any sizes."""

    width, row_shape, dtype, torch_dtype, bytes_read = 3, (3,), np.dtype(np.float32), torch.float32, 0

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = np.array(sizes, np.int64)
        self.begins = np.cumsum(self.sizes) - self.sizes
        self.reads: list[int] = []

    def read(self, chunk: int, out: np.ndarray, start: int = 0) -> None:
        self.reads.append(chunk)
        count = min(len(out), int(self.sizes[chunk]) - start)
        out[:count] = numbered(self.begins[chunk] + start + np.arange(count), "float32")


def ids(batch: torch.Tensor) -> list[int]:
    raw = batch.view(torch.int16).numpy().view(np.uint16) if batch.dtype == torch.bfloat16 else batch.numpy()
    return ids_of(raw).tolist()


def epoch(loader: ActivationLoader) -> list[list[int]]:
    return [ids(batch) for batch in loader]


def flat(batches: list[list[int]]) -> list[int]:
    return [row for batch in batches for row in batch]


sizes_st = st.lists(st.integers(1, 9), min_size=1, max_size=20)
settings_st = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 12),
        "pool_chunks": st.integers(1, 6),
        "seed": st.integers(0, 99),
        "shuffle": st.booleans(),
    }
)


@given(sizes=sizes_st, settings=settings_st, world=st.integers(1, 4))
def test_each_row_once_and_ranks_disjoint(sizes: list[int], settings: dict[str, Any], world: int) -> None:
    rows, batch = sum(sizes), settings["batch"]
    if rows // world < batch:
        with pytest.raises(UserError, match=f"{rows} rows over {world} processes"):
            ActivationLoader(Rows(sizes), world=world, **settings)
        return
    loaders = [ActivationLoader(Rows(sizes), world=world, rank=rank, **settings) for rank in range(world)]
    for _ in range(2):
        epochs = [epoch(loader) for loader in loaders]
        assert {len(e) for e in epochs} == {len(loaders[0])} == {rows // world // batch}
        assert all(len(b) == batch for e in epochs for b in e)
        together = flat(flat(epochs))
        assert len(together) == len(set(together)) and set(together) <= set(range(rows))
        # What is left out fills no batch of any rank.
        assert rows - len(together) < world * batch + world


@given(sizes=sizes_st, settings=settings_st)
def test_without_drop_last_every_row_comes(sizes: list[int], settings: dict[str, Any]) -> None:
    loader = ActivationLoader(Rows(sizes), drop_last=False, **settings)
    batches = epoch(loader)
    assert sorted(flat(batches)) == list(range(sum(sizes)))
    assert len(batches) == len(loader) and {len(b) for b in batches[:-1]} <= {settings["batch"]}


@given(sizes=sizes_st, settings=settings_st, data=st.data())
def test_batches_are_cut_from_the_pools_one_after_another(
    sizes: list[int], settings: dict[str, Any], data: st.DataObject
) -> None:
    """The order, made again from its definition in `order`."""
    world = data.draw(st.integers(1, 2))
    rank = data.draw(st.integers(0, world - 1))
    settings |= {"batch": 1, "shuffle": True}
    if sum(sizes) < world:
        return
    reader, place = Rows(sizes), {"seed": settings["seed"], "rank": rank}
    loader = ActivationLoader(reader, world=world, rank=rank, **settings)
    for number in range(2):
        expected: list[int] = []
        pools = order.pools(reader.sizes, **place, epoch=number, world=world, pool_chunks=settings["pool_chunks"])
        for pool in pools:
            runs = order.pool_runs(pool, **place, epoch=number)
            for chunk, start, rows in zip(runs.chunks, runs.starts, runs.rows, strict=True):
                begin = int(reader.begins[pool.chunks[chunk]] + start)
                expected += range(begin, begin + int(rows))
        assert flat(epoch(loader)) == expected[: sum(sizes) // world]


@given(sizes=sizes_st, settings=settings_st, data=st.data())
@hypothesis.settings(max_examples=60)
def test_resume_at_any_batch_is_bit_equal(sizes: list[int], settings: dict[str, Any], data: st.DataObject) -> None:
    settings |= {"drop_last": data.draw(st.booleans())}
    if sum(sizes) < settings["batch"]:
        settings["batch"] = sum(sizes)
    whole = ActivationLoader(Rows(sizes), **settings)
    epochs = [epoch(whole) for _ in range(3)]
    at, cut = data.draw(st.integers(0, 1)), data.draw(st.integers(0, len(whole)))
    first = ActivationLoader(Rows(sizes), **settings)
    for _ in range(at):
        epoch(first)
    iterator = iter(first)
    head = [ids(next(iterator)) for _ in range(cut)]
    assert head == epochs[at][:cut]
    state = json.loads(json.dumps(first.state_dict()))
    second = ActivationLoader(Rows(sizes), **settings)
    second.load_state_dict(state)
    assert second.state_dict() == state
    # At the end of an epoch the next one begins.
    expected = [epochs[at][cut:], *epochs[at + 1 :]] if cut < len(whole) else epochs[at + 1 :]
    assert [epoch(second) for _ in expected] == expected


def test_epochs_and_seeds_differ() -> None:
    sizes = [8] * 16
    loader, other = (ActivationLoader(Rows(sizes), batch=128, seed=seed) for seed in (0, 1))
    orders = [flat(epoch(loader)), flat(epoch(loader)), flat(epoch(other))]
    assert len({tuple(o) for o in orders}) == 3


@given(sizes=sizes_st, settings=settings_st, data=st.data())
@hypothesis.settings(max_examples=60)
def test_the_same_batches_wherever_they_come_from(
    sizes: list[int], settings: dict[str, Any], data: st.DataObject
) -> None:
    """Read pool by pool, sent to a device pool by pool, or drawn from rows read once; from any batch on."""
    world = data.draw(st.integers(1, 2))
    settings |= {"world": world, "rank": world - 1, "drop_last": data.draw(st.booleans()), "threads": 1}
    settings["batch"] = min(settings["batch"], sum(sizes) // world)
    if not settings["batch"]:
        return
    cpu = torch.device("cpu")
    ways: list[dict[str, Any]] = [{}, {"device": cpu}, {"preload": True}, {"preload": True, "device": cpu}]
    loaders = [ActivationLoader(Rows(sizes), **settings, **way) for way in ways]
    state = loaders[0].state_dict() | {"delivered": data.draw(st.integers(0, len(loaders[0]) - 1))}
    for loader in loaders:
        loader.load_state_dict(state)
    for _ in range(2):
        plain, *others = map(epoch, loaders)
        assert others == [plain] * 3


@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_preloaded_rows_are_read_once(device: torch.device | None) -> None:
    reader = Rows([8] * 8)
    loader = ActivationLoader(reader, batch=4, chunks=np.arange(1, 7), preload=True, device=device)
    assert reader.reads == []
    epochs = [epoch(loader) for _ in range(3)]
    assert sorted(reader.reads) == list(range(1, 7))
    assert all(sorted(flat(e)) == list(range(8, 56)) for e in epochs)


def test_the_time_waited_for_is_counted() -> None:
    class Slow(Rows):
        def read(self, chunk: int, out: np.ndarray, start: int = 0) -> None:
            time.sleep(0.01)
            super().read(chunk, out, start)

    loader = ActivationLoader(Slow([4] * 8), batch=4, pool_chunks=1, threads=1)
    began = time.perf_counter()
    for _ in loader:
        pass
    assert 0.07 < loader.waited <= time.perf_counter() - began
    quick = ActivationLoader(Rows([4] * 8), batch=4, pool_chunks=1)
    for _ in quick:
        time.sleep(0.01)
    assert quick.waited < 0.07


def test_a_batch_has_rows_of_every_chunk_of_its_pool() -> None:
    reader = Rows([96] * 24)
    loader = ActivationLoader(reader, batch=12 * 32, pool_chunks=12)
    for number, batch in enumerate(epoch(loader)):
        counts = np.bincount(np.array(batch) // 96, minlength=24)
        # Of each chunk 32 rows, give or take what a run of 16 at either end brings or takes.
        assert (counts > 0).sum() == 12, number
        assert counts[counts > 0].max() <= 64


def test_unshuffled_is_the_stored_order() -> None:
    loader = ActivationLoader(Rows([3, 5, 2]), batch=4, pool_chunks=2, shuffle=False, drop_last=False)
    assert epoch(loader) == epoch(loader) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_broken_off_epoch_is_over() -> None:
    whole = ActivationLoader(Rows([8] * 8), batch=4)
    epochs = [epoch(whole) for _ in range(3)]
    loader = ActivationLoader(Rows([8] * 8), batch=4)
    for batch in loader:
        assert ids(batch) == epochs[0][0]
        break
    iter(loader)  # taken but not started: nothing happens
    assert epoch(loader) == epochs[1] and loader.epoch == 1


def test_limit_caps_an_epoch_and_what_is_read() -> None:
    reader = Rows([4] * 32)
    loader = ActivationLoader(reader, batch=4, pool_chunks=2, limit_batches=3)
    free = ActivationLoader(Rows([4] * 32), batch=4, pool_chunks=2)
    assert len(loader) == 3
    assert epoch(loader) == epoch(free)[:3]
    assert len(reader.reads) <= 4
    assert epoch(loader) == epoch(free)[:3]
    assert len(ActivationLoader(Rows([4]), batch=2, limit_batches=99)) == 2


def test_sample_is_the_head_of_the_order_and_moves_nothing() -> None:
    loader = ActivationLoader(Rows([8] * 8), batch=4)
    state = loader.state_dict()
    sample = ids(loader.sample(10))
    assert loader.state_dict() == state
    assert flat(epoch(loader))[:10] == sample
    assert len(loader.sample(10**6)) == 64 and len(loader.sample(4)) == 4


@given(subset=st.sets(st.integers(0, 7), min_size=1))
def test_a_subset_of_chunks(subset: set[int]) -> None:
    reader = Rows([1, 2, 3, 4, 5, 6, 7, 8])
    chunks = np.array(sorted(subset))
    loader = ActivationLoader(reader, batch=2, chunks=chunks, drop_last=False)
    expected = [int(reader.begins[c]) + row for c in chunks for row in range(reader.sizes[c])]
    assert sorted(flat(epoch(loader))) == expected
    assert set(reader.reads) == subset


@pytest.mark.parametrize(
    "name, value", [("seed", 1), ("pool_chunks", 3), ("batch", 2), ("world", 2), ("shuffle", False)]
)
def test_a_state_of_another_order_is_refused_by_name(name: str, value: int) -> None:
    settings: dict[str, Any] = {"seed": 0, "pool_chunks": 2, "batch": 4, "world": 1, "shuffle": True}
    state = ActivationLoader(Rows([4] * 8), **settings).state_dict()
    other = ActivationLoader(Rows([4] * 8), **settings | {name: value})
    with pytest.raises(UserError, match=f"{name} was {settings[name]}, is {value}"):
        other.load_state_dict(state)
    assert other.state_dict()["delivered"] == 0


def test_a_state_of_other_rows_is_refused_by_name() -> None:
    state = ActivationLoader(Rows([4] * 8), batch=4).state_dict()
    with pytest.raises(UserError, match="run was None, is 16"):
        ActivationLoader(Rows([4] * 8), batch=4).load_state_dict({k: v for k, v in state.items() if k != "run"})
    with pytest.raises(UserError, match="rows was 32, is 36"):
        ActivationLoader(Rows([4] * 9), batch=4).load_state_dict(state)
    with pytest.raises(UserError, match="chunks was"):
        ActivationLoader(Rows([4] * 9), batch=4, chunks=np.arange(1, 9)).load_state_dict(state)


@pytest.mark.parametrize("name", ["batch", "pool_chunks", "threads", "limit_batches"])
def test_settings_out_of_range_are_named(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} must be at least 1, not -1"):
        ActivationLoader(Rows([4]), **{"batch": 2, name: -1})


def test_too_few_rows_are_named() -> None:
    with pytest.raises(UserError, match="8 rows over 1 processes fill no batch of 9"):
        ActivationLoader(Rows([4, 4]), batch=9)
    with pytest.raises(UserError, match="0 rows"):
        ActivationLoader(Rows([]), batch=9, drop_last=False)


class Broken(Rows):
    def read(self, chunk: int, out: np.ndarray, start: int = 0) -> None:
        if chunk == 5:
            raise UserError("chunk 5 is gone")
        super().read(chunk, out, start)


def test_an_error_of_a_thread_reaches_the_consumer_in_its_place() -> None:
    loader = ActivationLoader(Broken([4] * 8), batch=4, pool_chunks=1, shuffle=False)
    seen = []
    with pytest.raises(UserError, match="chunk 5 is gone"):
        for batch in loader:
            seen.append(ids(batch))
    assert flat(seen) == list(range(20)) and loader.state_dict()["delivered"] == 5


def test_batches_belong_to_their_consumer() -> None:
    loader = ActivationLoader(Rows([8] * 16), batch=8, pool_chunks=2)
    kept = [(batch, ids(batch)) for batch in loader]
    assert all(ids(batch) == was for batch, was in kept)
    spans = sorted((batch.data_ptr(), batch.data_ptr() + batch.nbytes) for batch, _ in kept)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert all(batch.untyped_storage().nbytes() == batch.nbytes for batch, _ in kept)  # holds no pool alive


def test_no_threads_are_left_behind() -> None:
    before = threading.active_count()
    loader = ActivationLoader(Rows([8] * 16), batch=8, pool_chunks=2, threads=3)
    epoch(loader)
    iterator: Iterator[torch.Tensor] = iter(loader)
    next(iterator)
    assert threading.active_count() > before
    gone = weakref.ref(iterator)
    del iterator
    gc.collect()
    assert gone() is None and threading.active_count() == before


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_from_a_store_in_its_dtype(build: Build, dtype: str) -> None:
    store = build([16, 9, 13], dtype)
    loaders = [
        ActivationLoader(cls(store, TRAIN, SITE), batch=5, pool_chunks=3, drop_last=False)
        for cls in (DirectReader, ZarrReader)
    ]
    preloaded = {"preload": True, "device": torch.device("cpu")}
    loaders.append(
        ActivationLoader(open_reader(store, TRAIN, SITE), batch=5, pool_chunks=3, drop_last=False, **preloaded)
    )
    direct, by_zarr, held = (list(loader) for loader in loaders)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(direct, held, strict=True))
    assert all(batch.dtype == getattr(torch, dtype) and batch.shape[1] == 3 for batch in direct)
    assert all(torch.equal(a, b) for a, b in zip(direct, by_zarr, strict=True))
    assert sorted(row for batch in direct for row in ids(batch)) == list(range(38))
    # Whole rows travel, not only the columns that carry the number.
    taken = torch.cat(direct)
    rows = numbered(np.array(flat([ids(b) for b in direct])), dtype)
    bits = torch.from_numpy(rows.view(np.int16)).view(torch.bfloat16) if dtype == "bfloat16" else torch.from_numpy(rows)
    assert torch.equal(taken, bits)


def test_a_missing_chunk_file_stops_the_epoch(build: Build) -> None:
    store = build([16, 16])
    loader = ActivationLoader(open_reader(store, TRAIN, SITE), batch=4)
    (store.path / TRAIN / SITE / "c.3.0").unlink()
    with pytest.raises(UserError, match=r"c\.3\.0 is missing"):
        epoch(loader)


ONE_OF_MANY = """
import hashlib, resource, sys
from data.loading.loader import ActivationLoader
from data.store.manifest import TRAIN, Layout, Manifest
from data.loading.reader import open_reader
from data.store.store import Store

reader = open_reader(Store.open(sys.argv[1]), TRAIN, sys.argv[2])
loader = ActivationLoader(reader, batch=512, pool_chunks=4, seed=int(sys.argv[3]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
digest = hashlib.sha256()
for batch in loader:
    digest.update(batch.float().numpy().tobytes())
print(digest.hexdigest(), 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.slow
def test_eight_processes_read_one_store_each_in_its_own_order(tmp_path: Path) -> None:
    """None waits for or changes another's; what each holds is a few pools, not the store."""
    layout = Layout("bfloat16", context=64, chunk_rows=1024, chunks_per_unit=16, mixing_seed=0)
    store = Store.create_or_open(tmp_path, Manifest({"layout": asdict(layout)}, {}, "many", 768))
    store.require(TRAIN, SITE, 768, 8 * layout.unit_rows)
    rng = np.random.default_rng(0)
    for unit in range(8):
        rows = rng.integers(0, 0x7F00, (layout.unit_rows, 768)).astype(np.uint16)
        store.write(TRAIN, unit, SITE, rows, {"device": "cpu"})
    pool_bytes, store_bytes = 4 * 1024 * 768 * 2, 8 * layout.unit_rows * 768 * 2
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    command = [sys.executable, "-c", ONE_OF_MANY, str(store.path), SITE]
    processes = [
        subprocess.Popen([*command, str(seed)], stdout=subprocess.PIPE, text=True, cwd=CONF.parent) for seed in range(8)
    ]
    for seed, process in enumerate(processes):
        out, _ = process.communicate()
        digest, grown = out.split()
        alone = hashlib.sha256()
        loader = ActivationLoader(open_reader(store, TRAIN, SITE), batch=512, pool_chunks=4, seed=seed)
        for batch in loader:
            alone.update(batch.float().numpy().tobytes())
        assert digest == alone.hexdigest()
        assert int(grown) < 6 * pool_bytes < store_bytes / 4
    assert files == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

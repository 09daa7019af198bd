"""The store's contract, checked through raw file access only: json, bytes and a checksum of our own."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st

import data.store.zarr_bfloat16  # noqa: F401  registers the type
from data.base.errors import UserError
from data.base.lock import alone
from data.storage.base import LeaseLost
from data.storage.local import LocalStorage
from data.store.find import find, find_fingerprint, open_store, pick
from data.store.manifest import HELDOUT, TRAIN
from data.store.store import ORIGIN, TOKENS, Store
from tests.data.conftest import SITE, Build, manifest, numbered


def crc32c(content: bytes) -> int:
    """Castagnoli's polynomial, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def contents(root: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below a folder with its bytes and time of writing."""
    return {
        str(path.relative_to(root)): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in root.rglob("*")
        if path.is_file()
    }


def record(store: Store, unit: int, split: str = TRAIN, site: str = SITE) -> Path:
    return store.path / f"commits/{split}/{unit:06d}.{site}.json"


def test_crc32c_of_the_standard_s_example() -> None:
    assert crc32c(b"123456789") == 0xE3069283


def test_manifest_is_the_first_file(tmp_path: Path) -> None:
    store = Store.create_or_open(tmp_path, manifest())
    assert list(contents(tmp_path)) == [f"{manifest().folder}/manifest.json"]
    assert Store.open(store.path).manifest == manifest()


@pytest.mark.parametrize("dtype, disk", [("bfloat16", "<u2"), ("float16", "<f2"), ("float32", "<f4")])
def test_bytes_on_disk_and_the_record(build: Build, dtype: str, disk: str) -> None:
    store = build([16, 9], dtype)
    rows = numbered(np.arange(25), dtype)
    padded = np.zeros((32, 3), disk)
    padded[:16], padded[16:25] = rows[:16], rows[16:]
    for number in range(7):
        raw = (store.path / f"{TRAIN}/{SITE}/c.{number}.0").read_bytes()
        assert raw == padded[4 * number : 4 * number + 4].tobytes()
    assert not (store.path / f"{TRAIN}/{SITE}/c.7.0").exists()  # holds no row
    commit = json.loads(record(store, 1).read_text())
    assert [c["rows"] for c in commit["chunks"]] == [4, 4, 1]
    assert [c["key"] for c in commit["chunks"]] == [f"{TRAIN}/{SITE}/c.{n}.0" for n in (4, 5, 6)]
    for chunk in commit["chunks"]:
        raw = (store.path / chunk["key"]).read_bytes()
        assert (chunk["bytes"], int(chunk["crc32c"], 16)) == (len(raw), crc32c(raw))
    assert (commit["split"], commit["unit"], commit["site"], commit["rows"]) == (TRAIN, 1, SITE, 9)
    assert (commit["nonfinite"], commit["made_by"]) == (0, {"device": "cpu"})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_statistics_against_torch_in_float64(build: Build, dtype: str) -> None:
    store = build([16, 9], dtype)
    rows = numbered(np.arange(25), dtype)
    bits = torch.from_numpy(rows.view(np.int16) if dtype == "bfloat16" else rows)
    x = (bits.view(torch.bfloat16) if dtype == "bfloat16" else bits).double()
    stats = store.stats(TRAIN, SITE)
    assert stats.rows == store.rows(TRAIN, SITE) == 25
    np.testing.assert_allclose(stats.sum, x.sum(0).numpy(), rtol=1e-12)
    expected = [float(x.square().sum()), float(x.norm(dim=1).mean()), float(x.abs().max())]
    np.testing.assert_allclose([stats.sum_sq, stats.mean_norm, stats.max_abs], expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_plain_zarr_reads_the_same_values(build: Build, dtype: str) -> None:
    store = build([16, 9], dtype)
    array = zarr.open_group(store.path, mode="r")[f"{TRAIN}/{SITE}"]
    assert array.shape == (32, 3) and array.metadata.to_dict()["data_type"] == dtype
    np.testing.assert_array_equal(array[:25], numbered(np.arange(25), dtype))
    assert not np.asarray(array[25:]).any()


def test_tokens_and_origin(tmp_path: Path) -> None:
    store = Store.create_or_open(tmp_path, manifest())
    tokens, origin = np.arange(10, dtype=np.int32) * -7, np.arange(20, dtype=np.int32).reshape(10, 2)
    for site, width, rows in ((TOKENS, 1, tokens), (ORIGIN, 2, origin)):
        store.require(HELDOUT, site, width, 10)
        store.write(HELDOUT, 0, site, rows, {})
    assert (store.path / HELDOUT / TOKENS / "c.0").read_bytes() == tokens[:4].astype("<i4").tobytes()
    assert (store.path / HELDOUT / ORIGIN / "c.1.0").read_bytes() == origin[4:8].astype("<i4").tobytes()
    group = zarr.open_group(store.path / HELDOUT, mode="r")
    np.testing.assert_array_equal(group[TOKENS][:10], tokens)
    np.testing.assert_array_equal(group[ORIGIN][:10], origin)
    assert store.sites(HELDOUT) == [] and store.rows(HELDOUT, TOKENS) == 10
    assert store.committed(HELDOUT, TOKENS)[0].sum == []


def test_growth_touches_nothing_committed(build: Build) -> None:
    store = build([16, 9])
    before = contents(store.path)
    store.require(TRAIN, SITE, 3, 5 * 16)
    store.require(TRAIN, "mlp_out.0", 7, 16)
    store.write(TRAIN, 4, SITE, numbered(np.arange(16), "bfloat16"), {})
    store.write(TRAIN, 0, "mlp_out.0", np.ones((2, 7), np.uint16), {})
    after = contents(store.path)
    assert json.loads(after[f"{TRAIN}/{SITE}/zarr.json"][0])["shape"] == [80, 3]
    changed = {name for name, was in before.items() if after[name] != was}
    assert changed == {f"{TRAIN}/{SITE}/zarr.json"}
    assert store.sites(TRAIN) == ["mlp_out.0", SITE]
    assert list(store.committed(TRAIN, SITE)) == [0, 1, 4]


def test_requiring_less_or_the_same_changes_nothing(build: Build) -> None:
    store = build([16, 9])
    before = contents(store.path)
    store.require(TRAIN, SITE, 3, 1)
    store.require(TRAIN, SITE, 3, 32)
    assert contents(store.path) == before
    with pytest.raises(AssertionError, match="rows of shape"):
        store.require(TRAIN, SITE, 4, 32)


def test_capacity_is_in_whole_units(tmp_path: Path) -> None:
    store = Store.create_or_open(tmp_path, manifest())
    store.require(TRAIN, SITE, 3, 17)
    assert json.loads((store.path / TRAIN / SITE / "zarr.json").read_text())["shape"] == [32, 3]


def test_a_committed_unit_is_never_written_again(build: Build) -> None:
    store = build([16])
    before, commit = contents(store.path), store.committed(TRAIN, SITE)[0]
    again = store.write(TRAIN, 0, SITE, numbered(np.arange(3), "bfloat16"), {"device": "another"})
    assert again == commit
    assert contents(store.path) == before
    assert not (store.path / "claims").exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_values_that_are_not_finite_are_refused(build: Build, dtype: str, bad: float) -> None:
    store = build([], dtype)
    x = torch.ones(9, 3)
    x[8, 1] = bad
    cast = x.to(getattr(torch, dtype))
    rows = cast.view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else cast.numpy()
    with pytest.raises(UserError, match=rf"unit 0 of {TRAIN}/{SITE} holds .* not finite"):
        store.write(TRAIN, 0, SITE, rows, {})
    assert not store.is_committed(TRAIN, 0, SITE) and store.committed(TRAIN, SITE) == {}


@pytest.mark.parametrize("rows", [np.zeros((17, 3), np.uint16), np.zeros((4, 2), np.uint16), np.zeros((4, 3), "f4")])
def test_rows_that_do_not_fit_are_our_own_fault(build: Build, rows: np.ndarray) -> None:
    with pytest.raises(AssertionError):
        build([]).write(TRAIN, 0, SITE, rows, {})


def test_a_unit_beyond_the_capacity_is_our_own_fault(build: Build) -> None:
    with pytest.raises(AssertionError):
        build([]).write(TRAIN, 1, SITE, numbered(np.arange(3), "bfloat16"), {})


@pytest.mark.parametrize("at", range(6))
def test_a_crash_before_the_record_is_not_committed(build: Build, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Stop at each fsync in turn: four chunk files, their folder, and the record under its temporary name."""
    store = build([])
    calls = iter(range(100))
    real: Callable[[int], None] = os.fsync

    def fsync(fd: int) -> None:
        if next(calls) == at:
            raise KeyboardInterrupt
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    rows = numbered(np.arange(16), "bfloat16")
    with pytest.raises(KeyboardInterrupt):
        store.write(TRAIN, 0, SITE, rows, {})
    again = Store.open(store.path)
    assert not again.is_committed(TRAIN, 0, SITE)
    assert again.committed(TRAIN, SITE) == {} and again.sites(TRAIN) == [] and again.rows(TRAIN, SITE) == 0
    commit = again.write(TRAIN, 0, SITE, rows, {})
    assert again.committed(TRAIN, SITE) == {0: commit}
    assert not [name for name in contents(store.path) if "tmp" in name]


def test_chunks_are_on_the_disk_before_their_record(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    store, synced = build([]), []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).relative_to(store.path.resolve()))
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    store.write(TRAIN, 0, SITE, numbered(np.arange(16), "bfloat16"), {})
    staged = [path.relative_to("claims") for path in synced[:4]]
    assert [(path.parent.name[:26], path.name) for path in staged] == [
        (f"{TRAIN}.000000.{SITE}."[:26], f"c.{n}.0") for n in range(4)
    ]
    assert synced[4] == Path(TRAIN) / SITE
    assert synced[5].parent == synced[6] == Path("commits") / TRAIN


def test_a_full_disk_names_the_file_and_leaves_no_part_of_it(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    store = build([])

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    before = contents(store.path)
    with pytest.raises(OSError, match=r"c\.0\.0") as told:
        store.write(TRAIN, 0, SITE, numbered(np.arange(16), "bfloat16"), {})
    assert told.value.errno == errno.ENOSPC
    assert contents(store.path) == before


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, bytes]:
    """A store with one unit, and the bytes of its record."""
    store = Store.create_or_open(tmp_path_factory.mktemp("s"), manifest())
    store.require(TRAIN, SITE, 3, 16)
    store.write(TRAIN, 0, SITE, numbered(np.arange(7), "bfloat16"), {"device": "cpu"})
    return store, record(store, 0).read_bytes()


@given(st.data())
def test_a_flipped_bit_in_a_record_is_seen(committed: tuple[Store, bytes], data: st.DataObject) -> None:
    store, whole = committed
    path = record(store, 0)
    path.write_bytes(whole)
    expected = Store.open(store.path).committed(TRAIN, SITE)
    damaged = bytearray(whole)
    bit = data.draw(st.integers(0, 8 * (len(damaged) - 1) - 1))
    damaged[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(damaged))
    try:
        found = Store.open(store.path).committed(TRAIN, SITE)
    except UserError as error:
        assert str(path) in str(error) and "run the same harvest again" in str(error)
    else:
        assert found == expected and list(found) == [0]


def test_another_identity_is_refused_naming_the_fields(tmp_path: Path) -> None:
    base = manifest(lm_batch=8, packing={"context": 8, "bos": "none"})
    store = Store.create_or_open(tmp_path, base)
    other = manifest(lm_batch=4, packing={"context": 8, "bos": "context"})
    os.rename(store.path, tmp_path / other.folder)
    with pytest.raises(UserError, match=r'lm_batch: 8 here, 4 asked; packing.bos: "none" here, "context" asked'):
        Store.create_or_open(tmp_path, other)
    assert (tmp_path / other.folder / "manifest.json").read_bytes() == base.to_json()


def test_opening_again_finds_what_is_there(build: Build) -> None:
    store = build([16, 9])
    before = contents(store.path)
    again = Store.create_or_open(store.path.parent, store.manifest)
    assert again.committed(TRAIN, SITE) == store.committed(TRAIN, SITE)
    assert contents(store.path) == before


def test_what_is_no_store_is_said(tmp_path: Path, build: Build) -> None:
    with pytest.raises(UserError, match=r"is not a store .*manifest\.json"):
        Store.open(tmp_path / "nothing")
    store = build([16])
    (store.path / "manifest.json").write_bytes((store.path / "manifest.json").read_bytes()[:-40])
    for opened in (lambda: Store.open(store.path), lambda: Store.create_or_open(tmp_path, store.manifest)):
        with pytest.raises(UserError, match=r"manifest\.json is damaged"):
            opened()
    (store.path / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"lost its manifest\.json"):
        Store.create_or_open(tmp_path, store.manifest)


def test_missing_site_is_named_with_those_there(build: Build) -> None:
    store = build([16])
    with pytest.raises(UserError, match=rf"no site mlp_out.7 in split train \(it has: {SITE}\)"):
        store.metadata(TRAIN, "mlp_out.7")
    with pytest.raises(UserError, match=r"holds no rows of mlp_out\.7"):
        store.stats(TRAIN, "mlp_out.7")
    (store.path / TRAIN / SITE / "zarr.json").write_text("{")
    with pytest.raises(UserError, match=r"zarr\.json is damaged"):
        store.metadata(TRAIN, SITE)


def test_mixing_depends_on_seed_split_and_unit_alone(tmp_path: Path, build: Build) -> None:
    store, base = build([16]), manifest()
    other = Store(tmp_path, replace(base, identity={"layout": asdict(replace(base.layout, mixing_seed=4))}))
    orders = [store.permutation(TRAIN, 0, 999), store.permutation(TRAIN, 1, 999), store.permutation(HELDOUT, 0, 999)]
    orders.append(other.permutation(TRAIN, 0, 999))
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == list(range(999)) for order in orders)
    np.testing.assert_array_equal(Store.open(store.path).permutation(TRAIN, 1, 999), orders[1])


def test_complete_is_what_was_marked_last(build: Build) -> None:
    store = build([16])
    assert store.complete is None
    store.mark_complete(lambda: {"tokens": 1})
    store.mark_complete(lambda: {"tokens": 2, "sites": [SITE]})
    assert Store.open(store.path).complete == {"tokens": 2, "sites": [SITE]}
    (store.path / "complete.json").write_text('{"tokens": 3}')
    with pytest.raises(UserError, match=r"complete\.json is damaged"):
        _ = store.complete


def test_growth_and_commits_wait_for_the_lock(build: Build) -> None:
    store = build([16])
    acts: list[Callable[[], object]] = [
        lambda: store.require(TRAIN, SITE, 3, 64),
        lambda: store.write(TRAIN, 1, SITE, numbered(np.arange(16), "bfloat16"), {}),
    ]
    store.require(TRAIN, SITE, 3, 32)
    for act in acts:
        thread = threading.Thread(target=act)
        before = {name: was for name, was in contents(store.path).items() if not name.startswith("claims/")}
        with alone(store.path / "manifest.json"):
            thread.start()
            thread.join(0.2)
            assert thread.is_alive()
            now = {name: was for name, was in contents(store.path).items() if not name.startswith("claims/")}
            assert now == before
        thread.join(10)
        assert contents(store.path) != before
    assert list(store.committed(TRAIN, SITE)) == [0, 1]


def test_two_writers_of_a_unit_leave_one_whole_commit(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower one, on another device with other bits, comes to commit when the faster one has: nothing changes."""
    store = build([])
    settle, started = LocalStorage.commit_staged, []

    def late(self: LocalStorage, *args: Any) -> bytes:
        if not started:
            started.append(1)
            Store.open(store.path).write(TRAIN, 0, SITE, numbered(np.arange(16), "bfloat16"), {"device": "fast"})
            started.append(contents(store.path / TRAIN))
        return settle(self, *args)

    monkeypatch.setattr(LocalStorage, "commit_staged", late)
    commit = store.write(TRAIN, 0, SITE, numbered(np.arange(1, 17), "bfloat16"), {"device": "slow"})
    assert commit.made_by == {"device": "fast"} == store.committed(TRAIN, SITE)[0].made_by
    assert contents(store.path / TRAIN) == started[1]
    assert not (store.path / "claims").exists()


@pytest.mark.parametrize("at", [1, 3])
def test_a_writer_whose_chunks_were_cleared_away_is_told(
    build: Build, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Told when it writes the next chunk, or when it moves them to their places."""
    store, put_staged = build([]), LocalStorage.put_staged

    def cleared(self: LocalStorage, stage: Path, name: str, pieces: Iterable[bytes]) -> None:
        put_staged(self, stage, name, pieces)
        if name == f"c.{at}.0":
            shutil.rmtree(stage)

    monkeypatch.setattr(LocalStorage, "put_staged", cleared)
    with pytest.raises(LeaseLost, match=f"unit 0 of {TRAIN}/{SITE}"):
        store.write(TRAIN, 0, SITE, numbered(np.arange(16), "bfloat16"), {})
    assert not store.is_committed(TRAIN, 0, SITE)
    assert not (store.path / "claims").exists()


def test_a_manifest_that_two_write_at_once_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced, first = os.replace, []

    def beaten(source: Path, target: Path) -> None:
        if not first:
            first.append(1)
            Store.create_or_open(tmp_path, manifest())
        replaced(source, target)

    (tmp_path / manifest().folder).mkdir()
    (tmp_path / manifest().folder / ".manifest.json.0a1b.tmp").write_text("of one that was killed")
    monkeypatch.setattr(os, "replace", beaten)
    assert Store.create_or_open(tmp_path, manifest()).manifest == manifest()
    assert first
    assert list(contents(tmp_path)) == [f"{manifest().folder}/manifest.json"]


def test_find_by_settings(tmp_path: Path) -> None:
    stores = [Store.create_or_open(tmp_path, manifest(files=n)) for n in (1, 2)]
    other = Store.create_or_open(tmp_path, manifest(name="other"))
    found = find(tmp_path, manifest().settings)
    assert {store.path for store in found} == {store.path for store in stores}
    assert find(tmp_path, {"model": {}}) == [] == find(tmp_path / "no cache", manifest().settings)
    assert pick(find(tmp_path, other.manifest.settings)).path == other.path
    with pytest.raises(UserError, match="2 stores match") as told:
        pick(found)
    assert all(str(store.path) in str(told.value) for store in stores)
    assert "store=<name or path>" in str(told.value)


def test_find_by_fingerprint(tmp_path: Path) -> None:
    stores = [Store.create_or_open(tmp_path, manifest(files=n)) for n in (1, 2)]
    assert find_fingerprint(tmp_path, stores[1].manifest.fingerprint).path == stores[1].path
    with pytest.raises(UserError, match="fingerprint 0123456789ab"):
        find_fingerprint(tmp_path, hashlib.sha256(b"").hexdigest().replace("e3b0c44298fc", "0123456789ab"))


def test_a_damaged_neighbour_hides_nothing_and_is_not_hidden(tmp_path: Path) -> None:
    good, bad = (Store.create_or_open(tmp_path, manifest(name=name)) for name in ("good", "bad"))
    (bad.path / "manifest.json").write_text("{}")
    assert [store.path for store in find(tmp_path, good.manifest.settings)] == [good.path]
    with pytest.raises(UserError, match=f"{bad.path.name}.*is damaged"):
        find(tmp_path, bad.manifest.settings)


def test_a_store_opens_by_its_name_or_the_beginning_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    stores = [Store.create_or_open(cache, manifest(name=name)) for name in ("one", "other")]
    twins = [Store.create_or_open(cache, manifest(name="twin", n=n)) for n in (1, 2)]
    (cache / "oneself").mkdir()  # no store
    assert open_store(stores[0].path.name, cache).path == stores[0].path
    assert open_store("one", cache).path == open_store("one-", cache).path == stores[0].path
    assert open_store("oth", cache).path == open_store(str(stores[1].path), cache).path == stores[1].path
    with pytest.raises(UserError, match=f"2 stores in {cache} begin with twin") as told:
        open_store("twin", cache)
    assert all(twin.path.name in str(told.value) for twin in twins)
    with pytest.raises(UserError, match=f"no store in {cache} has a name that begins with three"):
        open_store("three", cache)
    monkeypatch.chdir(cache)
    assert open_store(stores[1].path.name, tmp_path).path == Path(stores[1].path.name)
    with pytest.raises(UserError, match="oneself is not a store"):
        open_store("oneself", tmp_path)


def test_a_neighbour_that_cannot_be_read_hides_nothing(tmp_path: Path) -> None:
    good = Store.create_or_open(tmp_path, manifest())
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "odd").mkdir()
    os.mkfifo(tmp_path / "odd" / "manifest.json")
    assert [store.path for store in find(tmp_path, manifest().settings)] == [good.path]
    assert open_store("tiny", tmp_path).path == good.path

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
import torch

from data.base.errors import UserError
from data.loading.reader import DirectReader, Reader, ZarrReader, open_reader, scatter
from data.store.manifest import TRAIN
from data.store.store import ORIGIN, TOKENS, Store
from tests.data.conftest import SITE, Build, numbered

READERS = [DirectReader, ZarrReader]
UNITS = [16, 9, 0, 3, 16]  # rows; chunks of 4


def all_rows(reader: Reader) -> np.ndarray:
    parts = []
    for chunk, size in enumerate(reader.sizes):
        parts.append(np.full((size, *reader.row_shape), 77, reader.dtype))
        reader.read(chunk, parts[-1])
    return np.concatenate(parts)


@pytest.mark.parametrize("cls", READERS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_gives_the_rows_that_were_written(build: Build, cls: type[DirectReader | ZarrReader], dtype: str) -> None:
    reader = cls(build(UNITS, dtype), TRAIN, SITE)
    assert reader.sizes.tolist() == [4, 4, 4, 4, 4, 4, 1, 3, 4, 4, 4, 4]
    assert (reader.width, reader.row_shape, reader.torch_dtype) == (3, (3,), getattr(torch, dtype))
    np.testing.assert_array_equal(all_rows(reader), numbered(np.arange(44), dtype))


@pytest.mark.parametrize("cls", READERS)
@pytest.mark.parametrize("most, part", [(1024, 1), (2, 1), (2, 3)])
def test_rows_are_scattered(
    build: Build, cls: type[DirectReader | ZarrReader], most: int, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever one call of the system takes, and where it gives less than it has."""
    monkeypatch.setattr("data.loading.reader.MOST_PARTS", most)
    plain = os.preadv

    def short(file: int, outs: list[np.ndarray], at: int) -> int:
        first = memoryview(outs[0]).cast("B")
        return plain(file, [first[: max(1, len(first) - 1)]], at)

    monkeypatch.setattr(os, "preadv", short)
    reader = cls(build(UNITS), TRAIN, SITE)
    outs = [np.zeros((n, 3), np.uint16) for n in (part, 1, 4 - part - 1) if n]
    scatter(reader, 1, outs, 0)
    np.testing.assert_array_equal(np.concatenate(outs), numbered(np.arange(4, 8), "bfloat16"))


def test_units_committed_out_of_order_are_read_in_order(build: Build) -> None:
    store = build([16])
    store.require(TRAIN, SITE, 3, 12 * 16)
    for unit in (11, 2):
        store.write(TRAIN, unit, SITE, numbered(np.arange(5) + 100 * unit, "bfloat16"), {})
    reader = open_reader(store, TRAIN, SITE)
    ids = np.concatenate([np.arange(16), np.arange(5) + 200, np.arange(5) + 1100])
    np.testing.assert_array_equal(all_rows(reader), numbered(ids, "bfloat16"))


@pytest.mark.parametrize("chunk, size", [(0, 4), (6, 1), (7, 3)])
def test_direct_equals_zarr_on_every_part(build: Build, chunk: int, size: int) -> None:
    store = build(UNITS)
    readers = [cls(store, TRAIN, SITE) for cls in READERS]
    for start in range(size + 1):
        for room in range(6):
            outs = [np.full((room, 3), 77, np.uint16) for _ in readers]
            for reader, out in zip(readers, outs, strict=True):
                reader.read(chunk, out, start)
            np.testing.assert_array_equal(outs[0], outs[1])
            filled = min(room, size - start)
            assert (outs[0][filled:] == 77).all() and (outs[0][:filled] != 77).any(1).all()


@pytest.mark.parametrize("cls", READERS)
def test_tokens_and_origin(build: Build, cls: type[DirectReader | ZarrReader]) -> None:
    store = build([])
    for site, rows in ((TOKENS, np.arange(6, dtype=np.int32)), (ORIGIN, np.arange(12, dtype=np.int32).reshape(6, 2))):
        store.require(TRAIN, site, 1, 16)
        store.write(TRAIN, 0, site, rows, {})
        reader = cls(store, TRAIN, site)
        assert reader.torch_dtype == torch.int32 and reader.width == rows[0].size
        np.testing.assert_array_equal(all_rows(reader), rows)


@pytest.mark.parametrize("cls", READERS)
@pytest.mark.parametrize("harm", ["missing", "short", "empty", "long"])
@pytest.mark.parametrize("when", ["before opening", "after"])
def test_a_damaged_chunk_is_named_never_zeros(
    build: Build, cls: type[DirectReader | ZarrReader], harm: str, when: str
) -> None:
    store = build(UNITS)
    reader = cls(store, TRAIN, SITE) if when == "after" else None
    path = store.path / TRAIN / SITE / "c.2.0"
    whole = path.read_bytes()
    if harm == "missing":
        path.unlink()
    else:
        path.write_bytes({"short": whole[:-1], "empty": b"", "long": whole + b"\0"}[harm])
    reader = reader or cls(store, TRAIN, SITE)
    out = np.zeros((4, 3), np.uint16)
    reader.read(1, out)
    said = "is missing" if harm == "missing" else r"bytes where 24 were committed"
    with pytest.raises(UserError, match=rf"{path}.*{said}.*harvest again"):
        reader.read(2, out)


def test_open_reader_is_direct_for_plain_chunks_only(build: Build) -> None:
    import zarr

    from data.store.zarr_bfloat16 import BFloat16

    store = build([16])
    assert isinstance(open_reader(store, TRAIN, SITE), DirectReader)
    plain = (store.path / TRAIN / SITE / "zarr.json").read_text()
    codecs = {"compressors": zarr.codecs.ZstdCodec(), "chunk_key_encoding": {"name": "default", "separator": "."}}
    other = zarr.create_array(store.path / "x", shape=(16, 3), chunks=(4, 3), dtype=BFloat16(), fill_value=0, **codecs)
    assert other.metadata.to_dict()["codecs"] != []
    (store.path / TRAIN / SITE / "zarr.json").write_text((store.path / "x" / "zarr.json").read_text())
    assert isinstance(open_reader(store, TRAIN, SITE), ZarrReader)
    (store.path / TRAIN / SITE / "zarr.json").write_text(plain)
    with pytest.raises(UserError, match="no site mlp_out"):
        open_reader(store, TRAIN, "mlp_out.3")


@pytest.mark.parametrize("cls", READERS)
def test_threads_read_at_once(build: Build, cls: type[DirectReader | ZarrReader]) -> None:
    store: Store = build([16] * 8)
    reader = cls(store, TRAIN, SITE)
    wrong: list[int] = []

    def read(seed: int) -> None:
        for chunk in np.random.default_rng(seed).integers(0, 32, 50):
            out = np.empty((4, 3), np.uint16)
            reader.read(int(chunk), out)
            if not np.array_equal(out, numbered(np.arange(4) + 4 * chunk, "bfloat16")):
                wrong.append(int(chunk))

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []

"""Others read a store bit for bit: zarr-python with the data type registered, tensorstore without any of our code."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

import data.store.zarr_bfloat16  # noqa: F401  registers the type
from data.store.manifest import TRAIN
from data.store.store import ORIGIN, TOKENS, Store
from tests.data.conftest import SITE, manifest

# Runs with -I: neither this folder nor PYTHONPATH is on its path, so nothing of ours can be imported.
TENSORSTORE = """
import sys, numpy as np, tensorstore as ts
array = ts.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": sys.argv[1]}}, open=True).result()
values = np.ascontiguousarray(array.read().result())
assert not any(name.split(".")[0] in ("data", "zarr") for name in sys.modules), "read with our code"
print(array.dtype.name, values.shape, float(values.ravel()[0]))
values.tofile(sys.argv[2])
"""


def every_finite_bfloat16() -> np.ndarray:
    """All bit patterns but infinities and NaNs, in rows of 3; both zeros and the denormals are among them."""
    bits = np.arange(2**16, dtype=np.uint16)
    bits = bits[(bits & 0x7F80) != 0x7F80]
    return bits[: len(bits) // 3 * 3].reshape(-1, 3)


def values(dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return every_finite_bfloat16()
    return np.random.default_rng(0).standard_normal((15_000, 3)).astype(dtype)


def stored(cache: Path, dtype: str) -> tuple[Store, np.ndarray]:
    """A store whose array begins with `values`, in two units of which the last chunk is not full; and the values."""
    base, rows = manifest(dtype), values(dtype)
    layout = replace(base.layout, chunk_rows=2048, chunks_per_unit=6)
    store = Store.create_or_open(cache, replace(base, identity={"layout": asdict(layout)}))
    store.require(TRAIN, SITE, 3, len(rows))
    for unit, begin in enumerate(range(0, len(rows), layout.unit_rows)):
        store.write(TRAIN, unit, SITE, rows[begin : begin + layout.unit_rows], {})
    return store, rows


def read_by_tensorstore(path: Path, out: Path, dtype: str) -> tuple[str, np.ndarray]:
    command = [sys.executable, "-I", "-c", TENSORSTORE, str(path), str(out)]
    told = subprocess.run(command, capture_output=True, text=True, check=True, cwd="/")
    return told.stdout, np.fromfile(out, dtype)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_tensorstore_reads_the_same_bits(tmp_path: Path, dtype: str) -> None:
    store, rows = stored(tmp_path, dtype)
    told, found = read_by_tensorstore(store.array_path(TRAIN, SITE), tmp_path / "out", rows.dtype.name)
    assert told.split()[0] == dtype
    found = found.reshape(-1, 3)
    assert found[: len(rows)].tobytes() == rows.tobytes()
    assert not found[len(rows) :].any()


def test_tensorstore_knows_them_as_numbers(tmp_path: Path) -> None:
    store = Store.create_or_open(tmp_path, manifest())
    store.require(TRAIN, SITE, 3, 4)
    x = torch.tensor([[-1.5, 2.0, 0.1]]).bfloat16()
    store.write(TRAIN, 0, SITE, x.view(torch.int16).numpy().view(np.uint16), {})
    told, _ = read_by_tensorstore(store.array_path(TRAIN, SITE), tmp_path / "out", "u2")
    assert told.split()[0] == "bfloat16" and told.split()[-1] == "-1.5"


@pytest.mark.parametrize("site, shape", [(TOKENS, ()), (ORIGIN, (2,))])
def test_tensorstore_reads_tokens_and_origin(tmp_path: Path, site: str, shape: tuple[int, ...]) -> None:
    store = Store.create_or_open(tmp_path, manifest())
    store.require(TRAIN, site, 1, 16)
    rows = np.random.default_rng(0).integers(-(2**31), 2**31, (16, *shape)).astype(np.int32)
    store.write(TRAIN, 0, site, rows, {})
    told, found = read_by_tensorstore(store.array_path(TRAIN, site), tmp_path / "out", "i4")
    assert told.startswith("int32") and found.tobytes() == rows.tobytes()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_plain_zarr_reads_the_same_bits(tmp_path: Path, dtype: str) -> None:
    store, rows = stored(tmp_path, dtype)
    array = zarr.open_array(store.array_path(TRAIN, SITE), mode="r")
    assert array.metadata.to_dict()["data_type"] == dtype
    found = np.asarray(array[: len(rows)])
    assert found.tobytes() == rows.tobytes()
    if dtype == "bfloat16":
        seen = torch.from_numpy(found.view(np.int16)).view(torch.bfloat16)
        expected = torch.from_numpy((rows.astype(np.uint32) << 16).view(np.float32))
        assert torch.equal(seen.float().view(torch.int32), expected.view(torch.int32))

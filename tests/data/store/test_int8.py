"""What is stored decodes to what was given: the formula in float64, plain zarr and tensorstore without our code."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from zarr.codecs import BloscCodec, ZstdCodec

from data.base.errors import UserError
from data.loading.loader import ActivationLoader
from data.loading.reader import DirectReader, ZarrReader, open_reader
from data.store.int8 import FeatureScale, RowDecoder, encode_int8
from data.store.layout import Layout
from data.store.manifest import HELDOUT, TRAIN
from data.store.store import ORIGIN, TOKENS, Store
from data.store.zarr_bfloat16 import BFloat16, from_float32, to_float32
from data.tools.info import Norms, report
from tests.data.conftest import SITE, manifest

D = 6
FORMATS = [
    dict(zip(("encoding", "codec", "shards"), choice, strict=True))
    for choice in itertools.product((None, "int8"), (None, "zstd", "blosc"), (False, True))
]
ROWS = [64, 41]  # of two units of 64 in four chunks


def name_of(layout: dict[str, Any]) -> str:
    return "-".join(str(value) for value in layout.values())


def activations(rows: int, seed: int = 0) -> np.ndarray:
    """Dimensions of very different size and centre, rows too."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, D)) * 10.0 ** (np.arange(D) / 2) + 3.0 * np.arange(D)
    return (x * rng.uniform(0.5, 2, (rows, 1))).astype(np.float32)


def stored(cache: Path, dtype: str = "float32", **layout: Any) -> tuple[Store, np.ndarray]:
    """A store of two units, the second not full, and the rows that it was given, as float32."""
    base = manifest(dtype)
    made = replace(base.layout, chunk_rows=16, **layout)
    store = Store.create_or_open(cache, replace(base, identity={"layout": made.json}))
    x = activations(sum(ROWS))
    given_rows = from_float32(x) if dtype == "bfloat16" else x.astype(dtype)
    begin = 0
    for unit, n in enumerate(ROWS):
        part = given_rows[begin : begin + n]
        store.require(TRAIN, SITE, D, 2 * made.unit_rows, FeatureScale.of(x[:50]))
        store.require(TRAIN, ORIGIN, 2, 2 * made.unit_rows)
        store.require(TRAIN, TOKENS, 1, 2 * made.unit_rows)
        store.write(TRAIN, unit, SITE, part, {})
        store.write(TRAIN, unit, ORIGIN, np.arange(2 * n, dtype=np.int32).reshape(n, 2) + begin, {})
        store.write(TRAIN, unit, TOKENS, np.arange(n, dtype=np.int32) + begin, {})
        begin += n
    return store, to_float32(given_rows) if dtype == "bfloat16" else given_rows.astype(np.float32)


def by_the_formula(rows: np.ndarray, standard: FeatureScale) -> np.ndarray:
    """In float64, row by row, from the formula alone."""
    scale = np.array([np.frombuffer(row[-4:].tobytes(), "<f4")[0] for row in rows], np.float64)
    return rows[:, :-4].astype(np.float64) * scale[:, None] * standard.std + standard.mean


def test_the_standard_is_mean_and_deviation() -> None:
    x = activations(500)
    standard = FeatureScale.of(x)
    np.testing.assert_allclose(standard.mean, [column.mean() for column in x.T.astype(np.float64)], rtol=1e-6)
    np.testing.assert_allclose(standard.std, [column.std() for column in x.T.astype(np.float64)], rtol=1e-6)
    assert FeatureScale.from_attributes(json.loads(json.dumps(standard.attributes("s")))).mean.tobytes() == (
        standard.mean.tobytes()
    )


def test_a_dead_dimension_and_a_bad_row_do_no_harm() -> None:
    x = activations(100)
    x[:, 2] = 7.0
    bad = np.concatenate([x, np.full((1, D), np.nan, np.float32), np.full((1, D), np.inf, np.float32)])
    standard, same = FeatureScale.of(bad), FeatureScale.of(x)
    assert standard.mean.tolist() == same.mean.tolist() and standard.std.tolist() == same.std.tolist()
    assert 0 < standard.std[2] == np.float32(1e-3 * np.sqrt(np.mean(x.astype(np.float64).std(0) ** 2)))
    x[50, 2] = 8.0  # what the pilot did not see
    decoded = RowDecoder(D, standard)(encode_int8(torch.from_numpy(x), standard)).numpy()
    assert abs(decoded[50, 2] - 8.0) < 0.1 and np.isfinite(decoded).all()
    constant = FeatureScale.of(np.full((3, D), 2.5, np.float32))
    assert (RowDecoder(D, constant)(encode_int8(torch.full((4, D), 2.5), constant)) == 2.5).all()
    assert (FeatureScale.of(np.full((2, D), np.nan, np.float32)).std == 1).all()


@given(
    arrays.arrays(np.float32, (5, D), elements=st.floats(-(2.0**20), 2.0**20, width=32)),
    arrays.arrays(np.float32, (4, D), elements=st.integers(-512, 512)),
)
def test_no_value_is_off_by_more_than_half_a_step(x: np.ndarray, pilot: np.ndarray) -> None:
    """Half a step of its row's scale, and what float32 rounds."""
    standard = FeatureScale.of(pilot)
    rows = encode_int8(torch.from_numpy(x), standard)
    exact = by_the_formula(rows.numpy(), standard)
    z = (x.astype(np.float64) - standard.mean) / standard.std
    step = np.abs(z).max(1, keepdims=True) / 127 * standard.std
    slack = 1e-5 * (np.abs(x) + np.abs(standard.mean) + 127 * step) + 1e-37
    assert (np.abs(exact - x) <= step / 2 + slack).all()
    decoded = RowDecoder(D, standard)(rows).numpy()
    np.testing.assert_allclose(decoded, exact, rtol=1e-5, atol=float(slack.max()))


@pytest.mark.parametrize("width", [3, 4, 6])
def test_a_single_row_decodes_too(width: int) -> None:
    """Its scale lies at any byte, and torch's views as float32 do not."""
    x = torch.from_numpy(activations(5))[:, :width]
    standard = FeatureScale.of(x.numpy())
    rows, decoder = encode_int8(x, standard), RowDecoder(width, standard)
    assert torch.equal(torch.cat([decoder(rows[i : i + 1]) for i in range(5)]), decoder(rows))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_not_stored(tmp_path: Path, bad: float) -> None:
    store, _ = stored(tmp_path, encoding="int8")
    x = activations(16)
    x[7, 3] = bad
    store.require(TRAIN, SITE, D, 3 * 64)
    with pytest.raises(UserError, match="not finite"):
        store.write(TRAIN, 2, SITE, x, {})


@pytest.mark.parametrize(
    "cls, layout",
    [
        (cls, layout)
        for cls in (DirectReader, ZarrReader)
        for layout in FORMATS
        if cls is ZarrReader or not layout["codec"]
    ],
    ids=lambda value: name_of(value) if isinstance(value, dict) else value.__name__,
)
def test_readers_give_the_same_rows_and_close_to_what_was_given(
    tmp_path: Path, cls: type[DirectReader | ZarrReader], layout: dict[str, Any]
) -> None:
    store, x = stored(tmp_path, **layout)
    assert type(open_reader(store, TRAIN, SITE)) is (ZarrReader if layout["codec"] else DirectReader)
    reader = cls(store, TRAIN, SITE)
    assert reader.sizes.tolist() == [16, 16, 16, 16, 16, 16, 9]
    decoder = store.decoder(TRAIN, SITE)
    assert decoder.width == D and reader.width == D + 4 * (layout["encoding"] is not None)
    read = np.full((len(x), reader.width), 77, reader.dtype)
    begin = 0
    for chunk, n in enumerate(reader.sizes):
        cut = chunk % 3  # a read may begin in the midst of a chunk
        for start in {0, cut}:
            reader.read(chunk, read[begin + start : begin + n], start)
        begin += n
    found = decoder(torch.from_numpy(read)).numpy()
    standard = store.rows_of(SITE).standard
    if standard is None:
        assert found.tobytes() == x.tobytes()
    else:
        np.testing.assert_allclose(found, by_the_formula(read, standard), rtol=1e-6, atol=1e-4)
        assert (
            np.abs((found - x) / standard.std).max(1) <= np.abs((x - standard.mean) / standard.std).max(1) / 253
        ).all()
    for site, wanted in ((TOKENS, np.arange(105)), (ORIGIN, None)):
        books, out = cls(store, TRAIN, site), np.zeros((9, *store.row_shape(TRAIN, site)), np.int32)
        books.read(6, out)
        assert wanted is None or out.tolist() == wanted[-9:].tolist()


@pytest.mark.parametrize("layout", FORMATS, ids=name_of)
def test_statistics_are_of_the_values_as_they_are_read(tmp_path: Path, layout: dict[str, Any]) -> None:
    store, _ = stored(tmp_path, **layout)
    array = zarr.open_array(store.array_path(TRAIN, SITE), mode="r")
    rows = np.asarray(array[: sum(ROWS)])
    standard = store.rows_of(SITE).standard
    x = rows.astype(np.float64) if standard is None else by_the_formula(rows, standard)
    stats = store.stats(TRAIN, SITE)
    np.testing.assert_allclose(stats.sum, x.sum(0), rtol=1e-5)
    np.testing.assert_allclose(stats.sum_sq, (x**2).sum(), rtol=1e-6)
    np.testing.assert_allclose(stats.max_abs, np.abs(x).max(), rtol=1e-6)


STRANGER = """
import sys, numpy as np, zarr
array = zarr.open_array(sys.argv[1], mode="r")
said = array.attrs["encoding"]
assert said["name"] == "int8" and not any(name == "data" or name.startswith("data.") for name in sys.modules)
row = array[:]
q, s = row[:, :-4].astype("f4"), np.ascontiguousarray(row[:, -4:]).view("<f4")
x = (q * s) * np.array(said["std"], "f4") + np.array(said["mean"], "f4")
assert x.dtype == np.float32
x.tofile(sys.argv[2])
"""

TENSORSTORE = """
import sys, numpy as np, tensorstore as ts
array = ts.open({"driver": "zarr3", "kvstore": {"driver": "file", "path": sys.argv[1]}}, open=True).result()
np.ascontiguousarray(array.read().result()).tofile(sys.argv[2])
"""


def run(code: str, path: Path, out: Path) -> None:
    """Without anything of ours on the path."""
    subprocess.run([sys.executable, "-I", "-c", code, str(path), str(out)], check=True, cwd="/")


@pytest.mark.parametrize("layout", [FORMATS[6], FORMATS[11]], ids=name_of)
def test_a_stranger_decodes_from_the_attributes_alone(tmp_path: Path, layout: dict[str, Any]) -> None:
    """Plain zarr and numpy; the very bits that training gets."""
    store, x = stored(tmp_path, **layout)
    run(STRANGER, store.array_path(TRAIN, SITE), tmp_path / "out")
    theirs = np.fromfile(tmp_path / "out", np.float32).reshape(-1, D)[: len(x)]
    loader = ActivationLoader(open_reader(store, TRAIN, SITE), batch=len(x), shuffle=False)
    ours = store.decoder(TRAIN, SITE)(next(iter(loader))).numpy()
    assert theirs.tobytes() == ours.tobytes()


@pytest.mark.parametrize("site", [SITE, TOKENS])
@pytest.mark.parametrize("codec, shards", [("zstd", False), ("blosc", True), (None, True)])
def test_tensorstore_reads_codecs_and_shards(tmp_path: Path, site: str, codec: str | None, shards: bool) -> None:
    store, x = stored(tmp_path, "bfloat16", codec=codec, shards=shards)
    run(TENSORSTORE, store.array_path(TRAIN, site), tmp_path / "out")
    found = np.fromfile(tmp_path / "out", store.rows_of(site).dtype)
    wanted = from_float32(x) if site == SITE else np.arange(len(x), dtype=np.int32)
    assert found[: wanted.size].tobytes() == wanted.tobytes() and not found[wanted.size :].any()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("layout", [layout for layout in FORMATS if layout["codec"] or layout["shards"]], ids=name_of)
def test_files_are_what_zarr_itself_writes(tmp_path: Path, layout: dict[str, Any], dtype: str) -> None:
    """Metadata and every byte of the full unit; the codecs are named here once more, by zarr's own classes."""
    store, _ = stored(tmp_path, dtype, **layout)
    ours = store.array_path(TRAIN, SITE)
    there = zarr.open_array(ours, mode="r")
    kind = store.rows_of(SITE)
    codecs = {
        None: None,
        "zstd": ZstdCodec(level=1),
        "blosc": BloscCodec(typesize=kind.dtype.itemsize, cname="lz4", clevel=5, shuffle="bitshuffle"),
    }
    theirs = zarr.create_array(
        tmp_path / "theirs",
        shape=there.shape,
        chunks=(16, there.shape[1]),
        shards=(64, there.shape[1]) if layout["shards"] else None,
        dtype=BFloat16() if kind.dtype == np.uint16 else kind.dtype,
        compressors=codecs[layout["codec"]],
        filters=None,
        fill_value=0,
        chunk_key_encoding={"name": "default", "separator": "."},
    )
    assert theirs.metadata.to_dict()["codecs"] == there.metadata.to_dict()["codecs"]
    theirs[:64] = there[:64]
    written = sorted(path.name for path in (tmp_path / "theirs").glob("c.*"))
    assert written == (["c.0.0"] if layout["shards"] else [f"c.{i}.0" for i in range(4)])
    for name in written:
        assert (ours / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


@pytest.mark.parametrize("layout", FORMATS, ids=name_of)
def test_a_unit_is_one_file_with_shards(tmp_path: Path, layout: dict[str, Any]) -> None:
    store, _ = stored(tmp_path, **layout)
    names = sorted(path.name for path in store.array_path(TRAIN, SITE).glob("c.*"))
    assert names == ([f"c.{unit}.0" for unit in range(2)] if layout["shards"] else [f"c.{i}.0" for i in range(7)])
    for unit, commit in store.committed(TRAIN, SITE).items():
        assert sum(chunk.rows for chunk in commit.chunks) == ROWS[unit]


def test_a_damaged_chunk_is_named_by_the_reader(tmp_path: Path) -> None:
    for number, codec in enumerate(("zstd", "blosc")):
        store, _ = stored(tmp_path / str(number), codec=codec, shards=codec == "blosc")
        path = store.array_path(TRAIN, SITE) / "c.0.0"
        content = bytearray(path.read_bytes())
        content[:4] = b"\xff\xff\xff\xff"
        path.write_bytes(content)
        reader = open_reader(store, TRAIN, SITE)
        with pytest.raises(UserError, match=r"c\.0\.0 is damaged .*: .*harvest again"):
            reader.read(0, np.zeros((16, D), np.float32))


def test_both_splits_are_encoded_alike_and_an_array_keeps_what_it_says(tmp_path: Path) -> None:
    store, x = stored(tmp_path, encoding="int8")
    first = store.rows_of(SITE).standard
    store = Store.open(store.path)
    store.require(HELDOUT, SITE, D, 64, FeatureScale.of(7 * x))
    store.require(TRAIN, SITE, D, 10 * 64, FeatureScale.of(9 * x))
    said = [store.metadata(split, SITE)["attributes"]["encoding"] for split in (TRAIN, HELDOUT)]
    assert first is not None and said == [first.attributes(SITE)] * 2


@pytest.mark.parametrize("layout", [FORMATS[6], FORMATS[11]], ids=name_of)
def test_info_is_of_activations(tmp_path: Path, layout: dict[str, Any]) -> None:
    store, x = stored(tmp_path, **layout)
    norms = np.linalg.norm(x.astype(np.float64), axis=1)
    found = Norms.of(store, TRAIN, SITE, 1000).norms
    np.testing.assert_allclose(np.sort(found), np.sort(norms), rtol=0.02)
    assert any("int8" in line for line in report(store.path, 10.0, 1000))


def test_a_default_layout_is_written_as_it_always_was() -> None:
    layout = manifest().layout
    assert layout.json == {"dtype": "bfloat16", "context": 8, "chunk_rows": 4, "chunks_per_unit": 4, "mixing_seed": 3}
    assert Layout(**layout.json) == layout
    other = replace(layout, encoding="int8", shards=True, codec="zstd")
    assert other.json == layout.json | {"encoding": "int8", "codec": "zstd", "shards": True}


@pytest.mark.parametrize(
    "asked, told",
    [
        ({"encoding": "int4"}, "store.encoding 'int4' is unknown: choose one of null, int8"),
        ({"codec": "gzip"}, "store.codec 'gzip' is unknown: choose one of null, zstd, blosc"),
        ({"shards": 1}, "store.shards 1 is unknown: choose one of false, true"),
    ],
)
def test_what_a_layout_cannot_be_is_told(asked: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        replace(manifest().layout, **asked)

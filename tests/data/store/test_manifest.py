from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from data.base.errors import UserError
from data.base.records import canonical, diff_fields
from data.loading.reader import open_reader
from data.store.find import find
from data.store.layout import ITEMSIZE, Layout, choose_layout
from data.store.manifest import TRAIN, Manifest, store_settings
from data.store.store import Store
from data.tools.verify import verify
from tests.data.conftest import SITE, manifest


def chosen(**asked: object) -> Layout:
    base: dict[str, object] = {"rows": 500_000, "d_model": 128, "n_sites": 1, "context": 128, "dtype": "bfloat16"}
    return choose_layout(**base | {"mixing_seed": 0, "chunk_rows": None, "chunks_per_unit": None} | asked)


@given(
    rows=st.integers(1, 10**11),
    d=st.sampled_from([16, 128, 768, 5120]),
    n_sites=st.integers(1, 12),
    context=st.integers(1, 2048),
    dtype=st.sampled_from(sorted(ITEMSIZE)),
)
def test_defaults_keep_to_the_bounds(rows: int, d: int, n_sites: int, context: int, dtype: str) -> None:
    layout = chosen(rows=rows, d_model=d, n_sites=n_sites, context=context, dtype=dtype)
    row_bytes = d * ITEMSIZE[dtype]
    assert layout.unit_rows % context == 0
    assert 8 <= layout.chunks_per_unit <= 128
    # Not cut finer than 128 rows, nor than whole contexts allow.
    floor = max(128, context) * layout.chunks_per_unit
    assert layout.unit_rows <= max(rows // 32, floor)
    assert layout.unit_rows * row_bytes * n_sites <= max(10**9, floor * row_bytes * n_sites)
    assert layout.chunk_rows * row_bytes <= max(6 << 20, max(128, context) * row_bytes)


def test_defaults_use_the_room_they_have() -> None:
    layout = chosen(rows=10**9, d_model=768, context=1024)
    assert (layout.chunk_rows, layout.chunks_per_unit) == (4096, 128)
    layout = chosen()
    assert 32 <= 500_000 / layout.unit_rows < 34


@given(context=st.integers(1, 300), asked=st.integers(1, 300), rows=st.integers(1, 10**7))
def test_one_number_given_the_other_fits(context: int, asked: int, rows: int) -> None:
    by_rows = chosen(rows=rows, context=context, chunk_rows=asked)
    by_count = chosen(rows=rows, context=context, chunks_per_unit=asked)
    assert by_rows.chunk_rows == asked and by_rows.unit_rows % context == 0
    assert by_count.chunks_per_unit == asked and by_count.unit_rows % context == 0


def test_both_numbers_given_stand_or_are_refused() -> None:
    assert chosen(context=6, chunk_rows=4, chunks_per_unit=3).contexts_per_unit == 2
    with pytest.raises(UserError, match=r"chunk_rows 4 .*chunks_per_unit 4 .*packing.context 6"):
        chosen(context=6, chunk_rows=4, chunks_per_unit=4)


@pytest.mark.parametrize(
    "asked, named",
    [({"rows": 0}, "rows"), ({"context": 0}, "packing.context"), ({"chunk_rows": -1}, "store.chunk_rows")],
)
def test_sizes_out_of_range_are_named(asked: dict[str, int], named: str) -> None:
    with pytest.raises(UserError, match=f"{named} must be at least 1"):
        chosen(**asked)


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(UserError, match=r"float8.*bfloat16, float16, float32"):
        chosen(dtype="float8")


def test_canonical_is_one_text_for_one_value() -> None:
    assert canonical({"b": [1, None], "a": "é"}) == '{"a":"é","b":[1,null]}' == canonical({"a": "é", "b": [1, None]})
    with pytest.raises(ValueError):
        canonical({"a": float("nan")})


def test_fingerprint_is_of_the_identity_alone() -> None:
    base = manifest()
    assert replace(base, settings={"model": {}}).fingerprint == base.fingerprint
    assert manifest(lm_batch=3).fingerprint != base.fingerprint
    assert base.folder == f"tiny-{base.fingerprint[:12]}"


def test_round_trip(tmp_path: Path) -> None:
    path, base = tmp_path / "manifest.json", manifest(text={"docs": [1, 2], "name": "ü"})
    path.write_bytes(base.to_json())
    assert Manifest.from_json(path.read_bytes(), path) == base
    assert base.layout == Layout("bfloat16", 8, 4, 4, 3)


@given(st.data())
def test_any_flipped_bit_is_seen(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    whole = manifest().to_json()
    bit = data.draw(st.integers(0, 8 * (len(whole) - 1) - 1))  # the last byte is a newline
    damaged = bytearray(whole)
    damaged[bit // 8] ^= 1 << bit % 8
    path = tmp_path_factory.mktemp("m") / "manifest.json"
    path.write_bytes(bytes(damaged))
    try:
        same = Manifest.from_json(path.read_bytes(), path) == manifest()
    except UserError as error:
        assert str(path) in str(error)
    else:
        assert same  # a changed space between two fields changes nothing


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"format": 1}', b"\xff\xfe"])
def test_damage_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest.json is damaged: .*harvest again"):
        Manifest.from_json((tmp_path / "manifest.json").read_bytes(), tmp_path / "manifest.json")


def test_newer_format_is_refused(tmp_path: Path) -> None:
    import hashlib

    obj = json.loads(manifest().to_json())
    del obj["check"]
    obj["format"] = 2
    check = hashlib.sha256(canonical(obj).encode()).hexdigest()
    (tmp_path / "manifest.json").write_text(json.dumps(obj | {"check": check}))
    with pytest.raises(UserError, match="newer format"):
        Manifest.from_json((tmp_path / "manifest.json").read_bytes(), tmp_path / "manifest.json")


def test_settings_name_numbers_only() -> None:
    config = OmegaConf.create(
        {
            "model": {"name": "m", "device": "cuda", "device_map": None, "dtype": "float32"},
            "text": {"_target_": "x.Y", "files": ["a", "b"], "nested": {"_target_": "z", "on": True}},
            "packing": {"context": 128, "heldout": 0.1, "shuffle": None},
            "sites": ["resid_pre.0"],
        }
    )
    settings = store_settings(config)
    assert settings == {
        "model": {"name": "m", "dtype": "float32"},
        "text": {"files": ["a", "b"], "nested": {"on": True}},
        "packing": {"context": 128, "heldout": 0.1, "shuffle": None},
    }
    assert store_settings(OmegaConf.to_container(config)) == settings
    assert json.loads(canonical(settings)) == settings
    assert type(settings["text"]["files"]) is list


def test_differing_names_the_fields_with_both_values() -> None:
    here = {"packing": {"context": 128, "bos": "none"}, "text": {"files": [1, 2]}, "model": {"name": "a"}}
    asked = {
        "packing": {"context": 256, "bos": "none"},
        "text": {"files": [1]},
        "model": {"name": "a", "revision": None},
    }
    assert diff_fields(here, asked) == [
        "packing.context: 128 here, 256 asked",
        "text.files: [1,2] here, [1] asked",
    ]
    assert diff_fields(here, here) == []


@given(st.recursive(st.none() | st.integers() | st.text(), lambda s: st.dictionaries(st.text(), s), max_leaves=8))
def test_nothing_differs_from_itself_and_a_change_always_shows(value: object) -> None:
    assert diff_fields({"a": value}, {"a": value}) == []
    assert diff_fields({"a": value}, {"a": [value]}) != []
    assert diff_fields({}, {"a": 1}) == ["a: absent here, 1 asked"]


@pytest.mark.parametrize("bitround", [None, 3])
def test_a_store_of_rounded_floats_opens_and_reads(tmp_path: Path, bitround: int | None) -> None:
    """An option of older versions: its stores hold plain floats, and their identity still says how they were made."""
    base = manifest("float32")
    layout = base.layout.json | {"bitround": bitround}
    store = Store.create_or_open(tmp_path, replace(base, identity={**base.identity, "layout": layout}))
    store.require(TRAIN, SITE, 3, 16)
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    store.write(TRAIN, 0, SITE, x, {})
    again = Store.open(store.path)
    out = np.zeros((4, 3), np.float32)
    open_reader(again, TRAIN, SITE).read(0, out)
    np.testing.assert_array_equal(out, x)
    assert again.manifest.identity["layout"]["bitround"] == bitround
    assert verify(store.path, quiet=True) == []
    plain = {**base.identity, "layout": base.layout.json}
    assert bool(diff_fields(again.manifest.identity, plain)) == (bitround is not None)


def test_a_setting_that_is_null_or_at_its_default_finds_yesterday_s_stores(tmp_path: Path) -> None:
    base = manifest()
    store = Store.create_or_open(tmp_path, base)
    settings = base.settings
    later = {
        "model": {**settings["model"], "adapter": None, "generation": {"seed": None}},
        "text": {**settings["text"], "columns": []},
        "packing": {**settings["packing"], "new": None},
    }
    assert [found.path for found in find(tmp_path, later)] == [store.path]
    strict = {**later, "packing": {**settings["packing"], "strict": True}}
    assert find(tmp_path, strict) == []
    assert [found.path for found in find(tmp_path, strict, {"packing.strict": True})] == [store.path]
    off = {**later, "packing": {**settings["packing"], "strict": False}}
    assert find(tmp_path, off, {"packing.strict": True}) == []
    assert find(tmp_path, {**settings, "packing": {"context": None}}) == []


def test_fields_that_are_null_differ_from_no_absent_ones() -> None:
    assert diff_fields({"a": {"b": None}}, {}) == [] == diff_fields({}, {"a": {"b": None}, "c": None})
    assert diff_fields({"a": None}, {"a": 1}) == ["a: absent here, 1 asked"]

"""What `verify` finds: every planted damage, with the file's name, and nothing in a sound store."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data.base.errors import UserError
from data.base.records import seal, seal_array
from data.loading.reader import open_reader
from data.store.commit import Commit
from data.store.manifest import HELDOUT, TRAIN
from data.store.store import ORIGIN, TOKENS, Store
from data.tools import verify as module
from data.tools.verify import Finding, verify
from tests.data.conftest import SITE
from tests.helpers.damage import DAMAGES, ROWS, SITES, flip, harvested, restore


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return harvested(tmp_path)


def damages(store: Store) -> list[Finding]:
    return [finding for finding in verify(store.path, quiet=True) if not finding.leftover]


def plant(store: Store, count: int, seed: int) -> tuple[Counter[str], list[str]]:
    """Plant `count` damages one after another; what was planted, and what was not reported with every file named."""
    rng = random.Random(seed)
    whole = {path: path.read_bytes() for path in store.path.rglob("*") if path.is_file()}
    planted, missed = Counter[str](), []
    for index in range(count):
        damage = DAMAGES[index % len(DAMAGES)] if index % 2 else flip
        paths = damage(store.path, rng)
        planted[damage.__name__] += 1
        named = {finding.path for finding in damages(store)}
        if not named.issuperset(paths):
            missed.append(f"{damage.__name__} of {paths}: {named}")
        restore(store.path, whole)
    return planted, missed


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_sound_store_is_sound(tmp_path: Path, dtype: str) -> None:
    assert verify(harvested(tmp_path, dtype).path, quiet=True) == []


ENCODED = {
    "int8": {"encoding": "int8"},
    "int8 shards": {"encoding": "int8", "shards": True},
    "zstd": {"codec": "zstd"},
    "blosc shards": {"codec": "blosc", "shards": True},
}


@pytest.mark.parametrize("name", ENCODED)
def test_planted_damages_of_encoded_stores_are_reported(tmp_path: Path, name: str) -> None:
    store = harvested(tmp_path, **ENCODED[name])
    assert verify(store.path, quiet=True) == []
    planted, missed = plant(store, 28, seed=3)
    assert missed == [] and planted.keys() == {damage.__name__ for damage in DAMAGES}
    assert verify(store.path, quiet=True) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODED)
def test_hundreds_of_planted_damages_of_encoded_stores_are_reported(tmp_path: Path, name: str) -> None:
    planted, missed = plant(harvested(tmp_path, **ENCODED[name]), 300, seed=4)
    print(f"{name}: {300 - len(missed)} of 300 planted damages reported: {dict(planted)}")
    assert missed == []


def test_every_bit_of_what_says_how_rows_are_encoded(tmp_path: Path) -> None:
    store = harvested(tmp_path, encoding="int8")
    path = store.array_path(TRAIN, SITE) / "zarr.json"
    whole = path.read_bytes()
    begin = whole.index(b'"encoding"')
    for bit in range(8 * begin, 8 * len(whole), 41):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        with pytest.raises(UserError):
            module.read_array(path.read_bytes(), store.layout, SITE)
    path.write_bytes(whole)
    assert module.read_array(path.read_bytes(), store.layout, SITE)


def test_a_site_encoded_by_another_s_standard_is_named(tmp_path: Path) -> None:
    """Metadata whose own check is right: of another site, of one split only, of none."""
    store = harvested(tmp_path, encoding="int8")
    path = store.array_path(HELDOUT, SITE) / "zarr.json"
    metadata = json.loads(path.read_text())
    said = metadata["attributes"]["encoding"]
    for other in ({**said, "site": "mlp_out.0"}, {**said, "std": [2 * std for std in said["std"]]}, None):
        path.write_bytes(seal_array(metadata | {"attributes": {} if other is None else {"encoding": other}}))
        assert path in {finding.path for finding in damages(store)}


def test_planted_damages_are_reported(store: Store) -> None:
    planted, missed = plant(store, 140, seed=1)
    assert missed == [] and planted.keys() == {damage.__name__ for damage in DAMAGES}
    assert verify(store.path, quiet=True) == []


@pytest.mark.slow
def test_a_thousand_of_a_thousand_planted_damages_are_reported(store: Store) -> None:
    planted, missed = plant(store, 1000, seed=2)
    print(f"{1000 - len(missed)} of 1000 planted damages reported: {dict(planted)}")
    assert missed == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["complete.json", "zarr.json", "train/zarr.json", "train/resid_post.1/zarr.json"])
def test_bits_all_over_a_record(store: Store, name: str) -> None:
    path = store.path / name
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 11):  # each bit of a byte in turn, all over the file
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        assert path in {finding.path for finding in damages(store)}, (bit, bytes(content))


def test_every_bit_of_a_commit_record(store: Store) -> None:
    """Where a bit gives the same value (1e-05 and 1E-05, digits beyond a float64) its own check would not see it."""
    path = store.path / f"commits/{TRAIN}/000002.{SITE}.json"
    record = json.loads(path.read_bytes())
    del record["check"]
    record["sum_sq"], record["mean_norm"] = 1e-05, 0.30000000000000004
    whole = seal(record)
    for bit in range(8 * len(whole)):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        with pytest.raises(UserError, match="damaged"):
            module.read_sealed(bytes(content), path)
    assert module.read_sealed(whole, path) == record


def test_a_leftover_is_named_and_is_no_damage(store: Store) -> None:
    extra = [
        "writer.lock",
        ".manifest.json.1.tmp",
        "train/resid_post.1/c.99.0",
        "commits/train/notes.txt",
        "a/zarr.json",
    ]
    for name in extra:
        (store.path / name).parent.mkdir(exist_ok=True)
        (store.path / name).write_text("x")
    found = verify(store.path, quiet=True)
    assert {str(finding.path.relative_to(store.path)) for finding in found} == set(extra)
    assert all(finding.leftover and str(finding).startswith("leftover: ") for finding in found)


def test_an_unfinished_store_may_lack_records(store: Store) -> None:
    (store.path / "complete.json").unlink()
    (store.path / f"commits/{TRAIN}/000001.{SITE}.json").unlink()
    found = verify(store.path, quiet=True)
    assert found and all(finding.leftover and "/c." in str(finding.path) for finding in found)


@pytest.mark.parametrize("units", [[0], [2], [0, 1], [0, 1, 2]])
@pytest.mark.parametrize("site", [*SITES, TOKENS, ORIGIN])
def test_each_record_missing_from_a_complete_store_is_named(store: Store, site: str, units: list[int]) -> None:
    lost = {store.path / f"commits/{TRAIN}/{unit:06d}.{site}.json" for unit in units}
    for path in lost:
        path.unlink()
    assert {finding.path for finding in damages(store)} == lost


def test_a_unit_no_array_knows_any_more_is_named(store: Store) -> None:
    for path in (store.path / "commits" / TRAIN).glob("000002.*"):
        path.unlink()
    assert {f.path.name for f in damages(store)} == {f"000002.{site}.json" for site in SITES}


def test_a_site_of_fewer_units_than_the_tokens_is_sound(store: Store) -> None:
    store.require(TRAIN, "mlp_out.0", 2, 16)
    store.write(TRAIN, 0, "mlp_out.0", np.ones((16, 2), np.uint16), {})
    extent = {split: {site: sum(units) for site in SITES} for split, units in ROWS.items()}
    store.mark_complete(lambda: extent | {TRAIN: extent[TRAIN] | {"mlp_out.0": 16}})
    assert verify(store.path, quiet=True) == []


@pytest.mark.parametrize("field", ["sum", "sum_sq", "mean_norm", "max_abs", "nonfinite"])
def test_statistics_of_other_values_are_found(store: Store, field: str) -> None:
    """A record whose own check is right, written by a program that computed wrongly."""
    path = store.path / f"commits/{TRAIN}/000000.{SITE}.json"
    record = json.loads(path.read_bytes())
    del record["check"]
    value = record[field]
    record[field] = (
        [value[0] + 1e-5, *value[1:]] if field == "sum" else value + 1 if field == "nonfinite" else value * 1.0001
    )
    path.write_bytes(seal(record))
    assert Commit.of(path.read_bytes(), path)
    (finding,) = damages(store)
    assert finding.path == path and f"another {field} than" in finding.what


def test_arrays_that_do_not_align_are_found(store: Store) -> None:
    store.require(TRAIN, SITE, 3, 4 * 16)
    store.require(TRAIN, TOKENS, 1, 4 * 16)
    store.write(TRAIN, 3, SITE, np.ones((7, 3), np.uint16), {})
    store.write(TRAIN, 3, TOKENS, np.ones(6, np.int32), {})
    assert any(f.path.name == f"000003.{TOKENS}.json" and "6 rows where" in f.what for f in damages(store))


def test_capacity_is_under_the_check_too(store: Store) -> None:
    """16 rows more is as sound as before to any reader, and is not what was written."""
    path = store.path / TRAIN / SITE / "zarr.json"
    metadata = json.loads(path.read_text())
    metadata["shape"][0] += 16
    path.write_text(json.dumps(metadata, indent=2))
    assert [finding.path for finding in damages(store)] == [path]


def test_what_growth_writes_is_sealed(store: Store) -> None:
    store.require(TRAIN, SITE, 3, 10 * 16)
    assert verify(store.path, quiet=True) == []


def in_place_of(path: Path, kind: str) -> None:
    """Put something else where a file is."""
    path.unlink()
    if kind == "folder":
        path.mkdir()
        (path / "x").touch()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")


@pytest.mark.parametrize("kind", ["folder", "loop", "pipe", "device"])
def test_what_cannot_be_opened_is_named_and_the_rest_looked_at(store: Store, kind: str) -> None:
    odd = [
        store.path / TRAIN / SITE / "c.2.0",
        store.path / TRAIN / TOKENS / "c.0",
        store.path / f"commits/{TRAIN}/000001.{SITE}.json",
        store.path / HELDOUT / SITE / "zarr.json",
        store.path / "complete.json",
    ]
    flipped = store.path / HELDOUT / ORIGIN / "c.0.0"
    flip_bit(flipped)
    for path in odd:
        in_place_of(path, kind)
    found = {finding.path: finding for finding in damages(store)}
    assert found.keys() >= {*odd, flipped}
    assert all(finding.remedy for finding in found.values())


def flip_bit(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])


def test_a_finding_says_what_the_reader_says(store: Store) -> None:
    """One remedy, whoever meets the damage."""
    path = store.path / TRAIN / SITE / "c.5.0"
    flip_bit(path)
    (finding,) = damages(store)
    reader = open_reader(store, TRAIN, SITE)
    with pytest.raises(UserError) as error:
        reader.read(5, np.empty((4, 3), np.uint16))
    assert str(finding) == f"damaged: {error.value}"


def test_foreign_records_are_named(store: Store) -> None:
    """Sealed JSON of another kind in each place where one is read."""
    seals = {name: (store.path / name).read_bytes() for name in ("manifest.json", "complete.json")}
    record = store.path / f"commits/{TRAIN}/000000.{SITE}.json"
    for path, foreign in (
        (record, seals["manifest.json"]),
        (store.path / "complete.json", record.read_bytes()),
        (store.path / TRAIN / SITE / "zarr.json", seals["complete.json"]),
        (store.path / "manifest.json", seals["complete.json"]),
    ):
        whole = path.read_bytes()
        path.write_bytes(foreign)
        assert path in {finding.path for finding in damages(store)}
        path.write_bytes(whole)


def test_the_time_is_linear_in_missing_units(tmp_path: Path) -> None:
    """Twenty thousand records are gone; a search through all names for each would make this test take minutes."""
    store = harvested(tmp_path)
    rows = 20_000 * store.layout.unit_rows
    store.mark_complete(lambda: {TRAIN: {SITE: rows}})
    missing = [finding for finding in damages(store) if "complete.json counts" in finding.what]
    assert len(missing) > 19_000

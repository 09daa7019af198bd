"""A flipped bit in a chunk stops whatever reads it, in each encoding and storage, before a row of it is given out."""

from __future__ import annotations

import random
import re
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data.base.errors import UserError
from data.base.location import Location, parse_location
from data.loading.checksums import crc32c, forget
from data.loading.loader import ActivationLoader
from data.loading.reader import DirectReader, RangeReader, ZarrReader, open_reader
from data.storage.open import open_storage
from data.store.commit import Commit, record_key
from data.store.manifest import HELDOUT, TRAIN
from data.store.store import ORIGIN, TOKENS, Store
from tests.helpers.damage import ROWS, SITES, harvested

LAYOUTS: list[dict[str, Any]] = [
    {},
    {"shards": True},
    {"encoding": "int8"},
    {"codec": "zstd"},
    {"codec": "blosc", "shards": True},
    {"encoding": "int8", "codec": "zstd", "shards": True},
]
SITE = "resid_post.1"


def place_of(storage: str, tmp_path: Path) -> Location:
    return tmp_path if storage == "folder" else parse_location(f"memory://{uuid.uuid4().hex}/cache")


def chunk_files(store: Store) -> list[str]:
    return sorted(key for key in store.storage.sizes() if "/c." in key and not key.startswith("claims/"))


def flip(store: Store, key: str, rng: random.Random) -> bytes:
    """Flip one bit of a file; returns the content that it had."""
    whole = store.storage.read(key)
    damaged = bytearray(whole)
    bit = rng.randrange(8 * len(damaged))
    damaged[bit // 8] ^= 1 << bit % 8
    store.storage.update(key, lambda _: bytes(damaged))
    return whole


def read_all(store: Store, split: str, site: str) -> None:
    """Read a site as a new process would."""
    forget()
    reader = open_reader(Store.open(store.path), split, site)
    for chunk, rows in enumerate(reader.sizes.tolist()):
        reader.read(chunk, np.empty((rows, *reader.row_shape), reader.dtype))


def refuse(store: Store, key: str) -> None:
    """Read the site of a damaged chunk file: the sentence must name the file, the record to delete and the remedy."""
    split, site, file = key.split("/")
    per_unit = store.layout.files_per_unit
    unit = int(file.split(".")[1]) // per_unit
    record = record_key(split, unit, site)
    said = (
        f"{store.path / key} is damaged .*: delete {store.path / record} and run the same harvest again, "
        f"which makes unit {unit} of {split}/{site} anew$"
    )
    with pytest.raises(UserError, match=said):
        read_all(store, split, site)


def flip_and_refuse(store: Store, count: int, seed: int) -> None:
    """So many flipped bits, one at a time, each of which must stop reading; sound again, all reads."""
    rng, files = random.Random(seed), chunk_files(store)
    for _ in range(count):
        key = rng.choice(files)
        whole = flip(store, key, rng)
        refuse(store, key)
        store.storage.update(key, lambda _, whole=whole: whole)  # type: ignore[misc]
    for split in ROWS:
        for site in (*SITES, TOKENS, ORIGIN):
            read_all(store, split, site)


@pytest.mark.parametrize("storage", ["folder", "memory"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_flipped_bit_stops_reading(tmp_path: Path, layout: dict[str, Any], storage: str) -> None:
    flip_and_refuse(harvested(place_of(storage, tmp_path), **layout), 4, seed=1)


@pytest.mark.slow
def test_a_flipped_bit_stops_reading_from_s3(bucket: str) -> None:
    flip_and_refuse(harvested(parse_location(bucket)), 2, seed=2)


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["folder", "memory"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_hundreds_of_flipped_bits_stop_reading(tmp_path: Path, layout: dict[str, Any], storage: str) -> None:
    flip_and_refuse(harvested(place_of(storage, tmp_path), **layout), 300, seed=3)


@pytest.mark.parametrize("way", ["stream", "resident", "to a device", "in the middle"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_no_batch_comes_of_a_damaged_chunk(tmp_path: Path, layout: dict[str, Any], way: str) -> None:
    """Whichever way batches are made, and where an epoch begins with a part of a chunk."""
    store, rng = harvested(tmp_path, **layout), random.Random(4)
    files = [key for key in chunk_files(store) if key.startswith(f"{TRAIN}/{SITE}/")]
    for key in files if way == "in the middle" else [rng.choice(files)]:
        flip(store, key, rng)
    forget()
    options: dict[str, Any] = {"resident": {"preload": True}, "to a device": {"device": torch.device("cpu")}}
    loader = ActivationLoader(open_reader(store, TRAIN, SITE), batch=3, pool_chunks=99, **options.get(way, {}))
    if way == "in the middle":
        loader.load_state_dict(loader.state_dict() | {"delivered": 5})
    with pytest.raises(UserError, match=r"is damaged .* run the same harvest again"):
        list(loader)


def test_every_reader_compares_once_a_process(tmp_path: Path) -> None:
    """What was compared is not compared again: damage that comes later is for a later process to see."""
    store = harvested(tmp_path)
    for cls in (DirectReader, RangeReader, ZarrReader):
        forget()
        reader = cls(store, TRAIN, SITE)
        out = np.empty((4, 3), np.uint16)
        reader.read(0, out)
        key = reader.chunks[0].key
        whole = flip(store, key, random.Random(5))
        cls(store, TRAIN, SITE).read(0, out)
        refuse(store, key)
        store.storage.update(key, lambda _, whole=whole: whole)  # type: ignore[misc]


def test_a_part_of_a_chunk_has_all_of_it_checked(tmp_path: Path) -> None:
    """The flipped bit is in the chunk's first row, the row that is read is its last; and in a tail that pads it."""
    store = harvested(tmp_path)
    for chunk, start in ((0, 3), (10, 0)):
        forget()
        reader = open_reader(store, TRAIN, SITE)
        key = reader.chunks[chunk].key
        damaged = bytearray(store.storage.read(key))
        damaged[-1 if chunk else 0] ^= 1
        store.storage.update(key, lambda _, damaged=damaged: bytes(damaged))  # type: ignore[misc]
        with pytest.raises(UserError, match=re.escape(key)):
            reader.read(chunk, np.empty((1, 3), np.uint16), start)


def test_crc32c_of_parts_is_that_of_the_whole() -> None:
    """The example of RFC 3720, in pieces and in arrays of other types."""
    assert crc32c([np.frombuffer(b"1234", np.uint8), np.frombuffer(b"56789", np.uint8)]) == "e3069283"
    zeros = np.zeros(8, np.float32)
    assert crc32c([zeros[:3], zeros[3:]]) == "8a9136aa"


def test_the_remedy_repairs(tmp_path: Path) -> None:
    store, rng = harvested(tmp_path), random.Random(6)
    commit = store.committed(TRAIN, SITE)[1]
    flip(store, commit.chunks[0].key, rng)
    refuse(store, commit.chunks[0].key)
    (tmp_path / store.path.name / record_key(TRAIN, 1, SITE)).unlink()
    with pytest.raises(UserError, match=r"000001\.resid_post\.1\.json is missing: .* run the same harvest again"):
        read_all(store, TRAIN, SITE)
    rows = np.ones((16, 3), np.uint16)
    Store.open(store.path).write(TRAIN, 1, SITE, rows, {"device": "cpu"})
    read_all(store, TRAIN, SITE)


def test_records_are_held_against_name_unit_and_array(tmp_path: Path) -> None:
    """Sealed records in another's place: of a unit, a site, a split, a store of other widths."""
    store = harvested(tmp_path / "a")
    wide = harvested(tmp_path / "b", dtype="float32")
    records = [
        store.storage.read(record_key(TRAIN, 0, SITE)),
        store.storage.read(record_key(TRAIN, 1, "attn_out.0")),
        store.storage.read(record_key(HELDOUT, 1, SITE)),
        store.storage.read(record_key(TRAIN, 1, TOKENS)),
        wide.storage.read(record_key(TRAIN, 1, SITE)),
        store.storage.read("manifest.json"),
        store.storage.read("complete.json"),
        b"{}",
    ]
    key = record_key(TRAIN, 1, SITE)
    right = store.storage.read(key)
    for foreign in records:
        store.storage.update(key, lambda _, foreign=foreign: foreign)  # type: ignore[misc]
        with pytest.raises(UserError, match=f"{store.path / key} .*: delete .*run the same harvest again"):
            Store.open(store.path).committed(TRAIN, SITE)
    store.storage.update(key, lambda _: right)
    assert Store.open(store.path).committed(TRAIN, SITE)[1] == Commit.of(right, key)


def test_a_manifest_is_held_against_its_folder(tmp_path: Path) -> None:
    store, other = harvested(tmp_path / "a"), harvested(tmp_path / "b", dtype="float16")
    store.storage.update("manifest.json", lambda _: other.storage.read("manifest.json"))
    with pytest.raises(UserError, match=f"is the manifest of {other.path.name}: give the folder that name"):
        Store.open(store.path)
    (tmp_path / "link").symlink_to(other.path)
    assert Store.open(tmp_path / "link").manifest == other.manifest


def test_an_array_s_metadata_is_held_against_its_check(tmp_path: Path) -> None:
    """A digit of int8's mean is another activation in every row."""
    store = harvested(tmp_path, encoding="int8")
    path = tmp_path / store.path.name / TRAIN / SITE / "zarr.json"
    text = path.read_text()
    at = text.index('"mean"')
    digit = re.compile(r"[1-8]").search(text, at)
    assert digit is not None
    path.write_text(text[: digit.start()] + str(int(digit[0]) + 1) + text[digit.end() :])
    with pytest.raises(UserError, match=r"zarr\.json is damaged: restore it from a copy, or delete the store"):
        open_reader(Store.open(store.path), TRAIN, SITE)


def test_storage_is_closed_to_another_prefix(tmp_path: Path) -> None:
    """A store's checks are its own: the same key in another store is compared anew."""
    one, two = harvested(tmp_path / "a"), harvested(tmp_path / "b")
    read_all(one, TRAIN, SITE)
    key = chunk_files(two)[0]
    flip(two, key, random.Random(7))
    assert open_storage(two.path).size(key) == open_storage(one.path).size(key)
    refuse(two, key)

"""What every place for stores does alike: a folder, memory, an S3 bucket."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from data.base.errors import UserError
from data.base.location import Url, parse_location
from data.storage.base import Storage
from data.storage.local import LocalStorage
from data.storage.open import open_storage

RECORD = "commits/train/000003.a.b.json"
KEYS = ["train/a.b/c.12.0", "train/a.b/c.13.0"]


@pytest.fixture
def place(anywhere: str) -> Storage:
    found = open_storage(parse_location(anywhere))
    found.create("manifest.json", b"{}")
    return found


def test_locations() -> None:
    url = parse_location("s3://bucket//a/b/")
    assert url == Url("s3", "bucket", "a/b") and str(url / "c.json") == "s3://bucket/a/b/c.json"
    assert isinstance(url, Url) and (url.name, str(url.parent)) == ("b", "s3://bucket/a")
    assert url.parent.parent.name == "bucket"
    assert str(url.parent.parent / "x") == "s3://bucket/x"
    assert parse_location("memory://m") == Url("memory", "m") and parse_location(url) is url
    assert parse_location("a/b") == Path("a/b") == parse_location(Path("a/b"))


@pytest.mark.parametrize("text", ["s3://key:hidden@bucket/a", "s3://hidden@bucket", "s3://bucket/a?secret=hidden"])
def test_credentials_in_a_url_are_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(UserError, match="AWS_ACCESS_KEY_ID") as refused:
        parse_location(text)
    assert "hidden" not in str(refused.value)


@pytest.mark.parametrize("text", ["gs://bucket/a", "s3:///a", "file:///tmp"])
def test_other_urls_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="no place for a store: name a folder, or give s3://bucket/prefix"):
        parse_location(text)


def test_what_is_there(place: Storage) -> None:
    for number, key in enumerate((RECORD, "train/zarr.json", "train/a.b/zarr.json", "trainer")):
        place.update(key, lambda old, number=number: b"x" * number)  # type: ignore[misc]
    assert place.sizes() == {
        "manifest.json": 2,
        RECORD: 0,
        "train/zarr.json": 1,
        "train/a.b/zarr.json": 2,
        "trainer": 3,
    }
    assert place.folders() == ["commits", "train"]
    assert open_storage(place.path / "train").folders() == ["a.b"]
    assert (place.list_files("train"), place.list_files("commits/train")) == (["zarr.json"], ["000003.a.b.json"])
    assert place.list_files("nothing") == [] == open_storage(place.path / "nothing").folders()
    assert [place.size(key) for key in ("trainer", "train", "train/zarr", RECORD)] == [3, None, None, 0]
    first, missing, *rest = place.read_many(["trainer", "no", "manifest.json", *["trainer"] * 20])
    assert first == b"xxx" and isinstance(missing, FileNotFoundError)
    assert rest == [b"{}", *[b"xxx"] * 20]
    assert place.seconds_since_write() < 3600
    with pytest.raises(FileNotFoundError, match="nothing"):
        place.read("nothing")
    place.remove(["trainer", "train/zarr.json"])
    assert place.size("trainer") is None and "train/zarr.json" not in place.sizes()
    place.remove_all()
    assert place.sizes() == {}


def test_parts_of_a_file_go_into_place(place: Storage) -> None:
    data = bytes(range(100))
    place.update("a/b", lambda _: data)
    for start, room in ((0, 100), (0, 10), (7, 50), (90, 10), (90, 50), (100, 4), (120, 4), (100, 0), (0, 0)):
        out = bytearray(b"\xff" * room)
        assert place.read_into("a/b", start, memoryview(out)) in (100, 100 - (room if start > 100 else 0))
        part = data[start : start + room]
        assert bytes(out) == part + b"\xff" * (room - len(part))
    with pytest.raises(FileNotFoundError, match="a/c"):
        place.read_into("a/c", 3, memoryview(bytearray(4)))
    with pytest.raises(FileNotFoundError, match="a/c"):
        place.read_into("a/c", 0, memoryview(bytearray()))


def test_an_update_is_of_what_it_saw(place: Storage) -> None:
    def count() -> None:
        mine = open_storage(place.path)
        for _ in range(5):
            mine.update("complete.json", lambda old: str(int(old or b"0") + 1).encode())

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert place.read("complete.json") == b"20"


def attempt(place: Storage, fill: bytes) -> bytes:
    """Stage two chunks and settle; the record that stands."""
    stage: Any = place.leases.stage("train", 3, "a.b")
    for key in KEYS:
        place.put_staged(stage, key.rpartition("/")[2], [fill * 100])
    record = place.commit_staged(stage, KEYS, RECORD, json.dumps(fill.decode()).encode())
    place.leases.unstage(stage)
    return record


def test_the_first_to_settle_stands(place: Storage) -> None:
    place.update("train/a.b/zarr.json", lambda _: b"{}")
    stands: list[bytes] = [attempt(place, b"1"), attempt(open_storage(place.path), b"2")]
    assert stands == [b'"1"', b'"1"'] == [place.read(RECORD)] * 2
    assert [place.read(key) for key in KEYS] == [b"1" * 100] * 2
    assert not place.leases.any() and len(place.sizes()) == 5


def test_of_many_that_settle_at_once_one_stands_whole(place: Storage) -> None:
    place.update("train/a.b/zarr.json", lambda _: b"{}")
    start, stands = threading.Barrier(4), list[bytes]()

    def enter(fill: bytes) -> None:
        mine = open_storage(place.path)
        start.wait()
        stands.append(attempt(mine, fill))

    threads = [threading.Thread(target=enter, args=(fill,)) for fill in (b"1", b"2", b"3", b"4")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stands == [place.read(RECORD)] * 4
    assert [place.read(key) for key in KEYS] == [json.loads(stands[0]).encode() * 100] * 2
    assert not place.leases.any() and len(place.sizes()) == 5


def test_stages_can_be_made_while_others_remove_the_folder_they_lie_in(tmp_path: Path) -> None:
    """Whoever discards the last stage removes claims/ too: no other may fail for it."""
    storage = LocalStorage(tmp_path)

    def often(name: str) -> int:
        for number in range(400):
            stage = tmp_path / "claims" / f"train.000000.{name}.{number}"
            storage.make_stage(stage)
            storage.discard(stage)
        return 400

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(often, "abcd")) == [400] * 4
    assert not (tmp_path / "claims").exists()

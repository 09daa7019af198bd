"""Object stores: writers of one unit that pause, die and wake at any request; claims; what is refused and how."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any

import obstore
import pytest

from data.base.errors import UserError
from data.base.location import Url, parse_location
from data.storage import leases as rules
from data.storage import object_store as module
from data.storage.object_store import ObjectStorage
from tests.helpers.s3 import Server

ME = {"device": "cpu"}
KEYS = ["train/a.b/c.12.0", "train/a.b/c.13.0"]
RECORD = "commits/train/000003.a.b.json"
SETTLED = "claims/train.000003.a.b.settled"


@pytest.fixture
def memory() -> Url:
    return Url("memory", uuid.uuid4().hex, "store")


class Killed(BaseException):
    """Nothing of a process runs after it."""


class AtOnce:
    """An executor that works in the caller's thread, so that a writer is one thread and its requests have an order."""

    def __init__(self, _: int = 0) -> None: ...

    def __enter__(self) -> AtOnce:
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, work: Callable[..., Any], *args: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(work(*args))
        return done

    def map(self, work: Callable[..., Any], items: Iterable[Any]) -> Iterator[Any]:
        return iter([work(item) for item in items])


class Writer(threading.Thread):
    """Writes the unit with chunks of `fill`. It stops before its `stop`th request: for ever, or until it is woken."""

    def __init__(self, url: Url, fill: str, stop: int | None = None, *, dies: bool = False) -> None:
        super().__init__()
        self.url, self.fill, self.left, self.dies = url, fill, stop, dies
        self.stopped, self.woken = threading.Event(), threading.Event()
        self.stands: bytes | None = None

    def request(self) -> None:
        if self.left is not None and (left := self.left) >= 0:
            self.left -= 1
            if left == 0:
                self.stopped.set()
                if self.dies:
                    raise Killed
                self.woken.wait(10)

    def run(self) -> None:
        place = ObjectStorage(self.url)
        try:
            stage = place.leases.stage("train", 3, "a.b")
            for key in KEYS:
                place.put_staged(stage, key.rpartition("/")[2], [self.fill.encode() * 100])
            self.stands = place.commit_staged(stage, KEYS, RECORD, json.dumps(self.fill).encode())
            place.leases.unstage(stage)
        except Killed:
            pass
        finally:
            self.stopped.set()

    def go(self) -> Writer:
        """Run until it stops or ends."""
        self.start()
        assert self.stopped.wait(10)
        return self

    def wake(self) -> None:
        self.woken.set()
        self.join(10)
        assert not self.is_alive()


@pytest.fixture
def stepwise(monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def request(*args: Any, **options: Any) -> Any:
            if isinstance(thread := threading.current_thread(), Writer):
                thread.request()
            return real(*args, **options)

        return request

    for name in ("put", "get", "copy", "delete", "list"):
        monkeypatch.setattr(obstore, name, counted(getattr(obstore, name)))
    monkeypatch.setattr(module, "ThreadPoolExecutor", AtOnce)
    monkeypatch.setattr(module, "uploaders", AtOnce)


def check(url: Url, *writers: Writer) -> None:
    """One record stands, whoever says so, and the chunks are its own; a sweep leaves nothing else."""
    place = ObjectStorage(url)
    stands = place.read(RECORD)
    assert {writer.stands for writer in writers} == {stands}
    assert [place.read(key) for key in KEYS] == [json.loads(stands).encode() * 100] * 2
    place.leases.sweep(lambda split, unit, site: (split, unit, site) == ("train", 3, "a.b"))
    assert place.sizes().keys() == {RECORD, *KEYS}


def requests_of_one(url: Url) -> int:
    writer = Writer(url, "0", stop=1000).go()
    writer.join()
    assert writer.left is not None
    return 1000 - writer.left


@pytest.mark.usefixtures("stepwise")
def test_a_writer_that_paused_changes_no_byte_under_another_s_record(memory: Url) -> None:
    """At each request in turn; the chunks of the two differ, as those of two devices may."""
    steps = requests_of_one(memory / "count")
    assert steps == 8
    first = set()
    for step in range(steps):
        url = memory / str(step)
        paused = Writer(url, "1", step).go()
        other = Writer(url, "2").go()
        other.join()
        before = ObjectStorage(url).read(KEYS[0])
        paused.wake()
        assert ObjectStorage(url).read(KEYS[0]) == before
        check(url, paused, other)
        first.add(other.stands)
    assert first == {b'"1"', b'"2"'}  # before it had settled, and after


@pytest.mark.usefixtures("stepwise")
def test_what_a_killed_writer_left_is_finished_or_dropped(memory: Url) -> None:
    for step in range(requests_of_one(memory / "count")):
        url = memory / str(step)
        Writer(url, "1", step, dies=True).go().join()
        other = Writer(url, "2").go()
        other.join()
        check(url, other)


@pytest.mark.usefixtures("stepwise")
def test_three_writers_of_which_one_pauses_and_one_dies(memory: Url) -> None:
    steps = requests_of_one(memory / "count")
    for step in range(steps):
        for then in range(steps + 4):
            url = memory / f"{step}-{then}"
            paused = Writer(url, "1", step).go()
            Writer(url, "2", then, dies=True).go().join()
            if (step + then) % 2:
                paused.wake()
            other = Writer(url, "3").go()
            other.join()
            paused.wake()
            check(url, paused, other)


def test_a_writer_that_fails_after_it_settled_leaves_what_was_settled_on(
    memory: Url, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, place = obstore.copy, ObjectStorage(memory)
    stage = place.leases.stage("train", 3, "a.b")
    for key in KEYS:
        place.put_staged(stage, key.rpartition("/")[2], [b"1" * 100])

    def failing(*_: Any) -> None:
        raise UserError("cannot be reached")

    monkeypatch.setattr(obstore, "copy", failing)
    with pytest.raises(UserError, match="cannot be reached"):
        place.commit_staged(stage, KEYS, RECORD, b'"1"')
    place.leases.unstage(stage)
    monkeypatch.setattr(obstore, "copy", real)
    other = Writer(memory, "2").go()
    other.join()
    assert other.stands == b'"1"'
    check(memory, other)


def take(url: Url) -> bool:
    with ObjectStorage(url).leases.take("train", 3, ["a"], ME) as mine:
        return mine


def plant(url: Url, pid: int = 1, host: str = "elsewhere") -> str:
    """Another process' claim."""
    key, owner = "claims/train.000003", {"host": host, "pid": pid, "token": "x", "names": ["a"], "made_by": ME}
    ObjectStorage(url).put(key, json.dumps(owner).encode())
    return key


def test_a_claim_is_one_s_alone_and_gone_after(memory: Url) -> None:
    claims = ObjectStorage(memory).leases
    with pytest.raises(KeyError), claims.take("train", 3, ["a"], ME) as mine:
        assert mine and not take(memory) and claims.any()
        assert [owner["names"] for owner in claims.owners()] == [["a"]]
        with claims.take("train", 4, ["a"], ME) as other:
            assert other
        raise KeyError
    assert not claims.any() and take(memory)


def test_a_dead_owner_s_claim_is_taken_over(memory: Url) -> None:
    plant(memory, os.getpid(), rules.this_host())  # our number, and none of our claims
    assert take(memory)
    plant(memory, os.getppid(), rules.this_host())
    assert not take(memory)


def test_a_claim_that_stands_still_is_taken_over(memory: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the watcher's own clock, from when it first saw this version."""
    now = [1000.0]
    monkeypatch.setattr(rules.time, "monotonic", lambda: now[0])
    key, place = plant(memory), ObjectStorage(memory)

    def can_take() -> bool:
        with place.leases.take("train", 3, ["a"], ME) as mine:
            return mine

    assert not can_take()
    now[0] += rules.LEASE_S - 1
    assert not can_take()
    text, tag = place.look(key)
    assert place.put(key, json.dumps(json.loads(text) | {"beat": 1}).encode(), tag)
    now[0] += 2
    assert not can_take()
    now[0] += rules.LEASE_S - 1
    assert not can_take()
    now[0] += 2
    assert can_take() and not place.leases.any()


def test_a_claim_judged_dead_that_beats_meanwhile_is_not_taken(memory: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    key, place = plant(memory), ObjectStorage(memory)
    judge = rules.is_gone

    def slowly(owner: dict[str, Any]) -> bool:
        place.put(key, json.dumps(owner | {"beat": 1}).encode())
        return True

    monkeypatch.setattr(rules, "is_gone", slowly)
    assert not take(memory)
    monkeypatch.setattr(rules, "is_gone", judge)
    assert json.loads(place.read(key))["token"] == "x"


def test_a_held_claim_s_heart_beats_until_it_is_another_s(memory: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "BEAT_S", 0.01)
    place = ObjectStorage(memory)

    def beats(fewer: int) -> None:
        deadline = time.monotonic() + 10
        while json.loads(place.read("claims/train.000003")).get("beat", 0) <= fewer:
            assert time.monotonic() < deadline
            time.sleep(0.005)

    with place.leases.take("train", 3, ["a"], ME) as mine:
        assert mine
        beats(2)
        key = plant(memory)
        time.sleep(0.05)
        assert json.loads(place.read(key))["token"] == "x"
    assert place.size(key) is not None, "another's claim was removed"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("heartbeat")]


def test_of_many_at_once_one_has_it(bucket: str) -> None:
    url = parse_location(bucket)
    assert isinstance(url, Url)
    got, start, leave = list[bool](), threading.Barrier(6), threading.Event()

    def enter() -> None:
        claims = ObjectStorage(url).leases
        start.wait()
        with claims.take("train", 3, ["a"], ME) as has:
            got.append(has)
            if len(got) == 6:
                leave.set()
            leave.wait(10)

    threads = [threading.Thread(target=enter) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [False] * 5 + [True]
    assert not ObjectStorage(url).leases.any()


def test_sweep_removes_what_is_dead_or_done_and_nothing_else(memory: Url) -> None:
    place = ObjectStorage(memory)
    for unit, names, host in ((0, ["a"], rules.this_host()), (1, ["b"], "elsewhere"), (2, ["a", "b"], "elsewhere")):
        owner = {"host": host, "pid": os.getpid(), "token": "x", "names": names, "made_by": ME}
        place.put(f"claims/train.{unit:06d}", json.dumps(owner).encode())
        for end in ("a.0f/c.0", "b.settled", "b.0f/c.0"):
            place.put(f"claims/train.{unit:06d}.{end}", b"x")
    place.leases.sweep(lambda split, unit, site: site == "b")
    kept = {"train.000000.a.0f/c.0", "train.000001.a.0f/c.0", "train.000002.a.0f/c.0", "train.000002"}
    assert {key.removeprefix("claims/") for key in place.sizes()} == kept


@pytest.fixture
def patient(server: Server) -> Iterator[Server]:
    yield server
    server.before = server.after = lambda method, path: None


@pytest.mark.slow
def test_answers_that_are_lost_change_nothing(bucket: str, patient: Server) -> None:
    """Every write is done, its answer lost once; the request is repeated, and finds its own work in its way."""
    seen = set[tuple[str, str]]()

    def lose(method: str, path: str) -> tuple[str, str] | None:
        again = (method, path) in seen
        seen.add((method, path))
        return None if again else ("503 Service Unavailable", "SlowDown")

    patient.after = lose
    url = parse_location(bucket)
    assert isinstance(url, Url)
    place = ObjectStorage(url)
    with place.leases.take("train", 3, ["a.b"], ME) as mine:
        assert mine
        writer = Writer(url, "1").go()
        writer.join()
    check(url, writer)
    place.update("complete.json", lambda old: b"1")
    assert place.read("complete.json") == b"1" and len(seen) > 8


def refused(url: str) -> str:
    """Return the sentence with which a look is refused."""
    module.open_bucket.cache_clear()
    at = parse_location(url)
    assert isinstance(at, Url)
    with pytest.raises(UserError) as error:
        ObjectStorage(at).read("manifest.json")
    text = str(error.value)
    assert "\n" not in text and "a-secret" not in text
    return text


def test_what_goes_wrong_is_said_in_a_sentence(bucket: str, patient: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "the bucket s3://no-such-bucket does not exist" in refused("s3://no-such-bucket/a")
    patient.before = lambda method, path: ("403 Forbidden", "InvalidAccessKeyId")
    assert "(InvalidAccessKeyId): check AWS_ACCESS_KEY_ID" in refused(bucket)
    patient.before = lambda method, path: ("500 Internal Server Error", "InternalError")
    assert "failed" in (told := refused(bucket)) and "(500 InternalError)" in told
    patient.before = lambda method, path: ("403 Forbidden", "asked http://169.254.169.254/latest/api/token")
    assert "needs credentials: set AWS_ACCESS_KEY_ID and" in refused(bucket)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://name:a-secret@127.0.0.1:1")
    assert "http://127.0.0.1:1 cannot be reached" in refused(bucket)


def test_a_store_that_minds_no_conditions_is_refused(memory: Url, monkeypatch: pytest.MonkeyPatch) -> None:
    real = obstore.put

    def heedless(*args: Any, mode: Any, **options: Any) -> Any:
        return real(*args, **options)

    monkeypatch.setattr(obstore, "put", heedless)
    with pytest.raises(UserError, match="ignores the condition If-None-Match"):
        ObjectStorage(memory).create("manifest.json", b"{}")


def test_without_the_extra_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(UserError, match=r'pip install -e "\.\[s3\]"'):
        ObjectStorage(Url("memory", uuid.uuid4().hex))

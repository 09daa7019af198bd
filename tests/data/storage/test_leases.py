"""Leases of a folder and the lock, with owners that live, die, stand still or are elsewhere."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data.base.lock import alone
from data.storage import leases as module
from data.storage.leases import UnitLeases, read_owner
from data.storage.local import LocalStorage

ME = {"device": "cpu"}


@pytest.fixture
def claims(tmp_path: Path) -> UnitLeases:
    return another(tmp_path)


def another(folder: Path) -> UnitLeases:
    """As another process sees the same store."""
    (folder / "manifest.json").touch()
    return LocalStorage(folder).leases


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def plant(
    claims: UnitLeases, pid: int, host: str | None = None, names: tuple[str, ...] = ("a",), unit: int = 3
) -> Path:
    """A claim of another process, and a chunk it has staged."""
    path = claims.folder / f"train.{unit:06d}"
    stage = claims.stage("train", unit, "resid_post.1")
    (stage / "c.0.0").write_bytes(b"half a chunk")
    owner = {"host": host or module.this_host(), "pid": pid, "token": "x", "names": names, "made_by": ME}
    path.write_text(json.dumps(owner))
    return path


def left(claims: UnitLeases) -> list[str]:
    return sorted(path.name.split(".")[-1] if path.is_file() else "stage" for path in claims.folder.glob("*"))


def test_a_claim_says_who_andis_gone_after(claims: UnitLeases, tmp_path: Path) -> None:
    with claims.take("train", 3, ["resid_post.1"], ME) as mine:
        assert mine
        owner = json.loads((tmp_path / "claims/train.000003").read_text())
        assert (owner["pid"], owner["names"], owner["made_by"]) == (os.getpid(), ["resid_post.1"], ME)
        assert claims.owners() == [owner]
        with another(tmp_path).take("train", 3, ["resid_post.1"], ME) as theirs:
            assert not theirs
        assert left(claims) == ["000003"]
        with (
            another(tmp_path).take("train", 4, ["resid_post.1"], ME) as other,
            claims.take("heldout", 3, [], ME) as too,
        ):
            assert other and too
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_claim_is_given_back_after_an_error(claims: UnitLeases) -> None:
    with pytest.raises(KeyError), claims.take("train", 0, [], ME):
        raise KeyError
    assert not claims.folder.exists()


@pytest.mark.parametrize("who", ["dead", "own number", "before it wrote"])
def test_a_dead_owner_s_claim_is_taken_over_with_what_it_staged(claims: UnitLeases, dead_pid: int, who: str) -> None:
    path = plant(claims, dead_pid if who == "dead" else os.getpid())
    if who == "before it wrote":
        path.write_text("")
    with claims.take("train", 3, ["a"], ME) as mine:
        assert mine and json.loads(path.read_text())["token"] != "x"
        assert left(claims) == ["000003"]
    assert not claims.folder.exists()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the heartbeat tells, later")
def test_a_process_that_only_waits_to_be_reaped_is_dead(claims: UnitLeases) -> None:
    with subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE) as process:
        plant(claims, process.pid)
        assert process.stdout is not None and process.stdout.read() == b""  # it has ended, or is about to
        deadline, mine = time.monotonic() + 10, False
        while not mine and time.monotonic() < deadline:
            with claims.take("train", 3, ["a"], ME) as mine:
                pass
            time.sleep(0.01)
        assert mine
        os.kill(process.pid, 0)


@pytest.mark.parametrize("who", ["alive", "elsewhere", "another user's"])
def test_a_living_or_unknown_owner_s_claim_is_not(claims: UnitLeases, dead_pid: int, who: str) -> None:
    pids = {"alive": os.getppid(), "elsewhere": dead_pid, "another user's": 1}
    plant(claims, pids[who], "elsewhere" if who == "elsewhere" else None)
    with claims.take("train", 3, ["a"], ME) as mine:
        assert not mine
    assert left(claims) == ["000003", "stage"]


@pytest.mark.parametrize("host", [None, "elsewhere"])
def test_a_heartbeat_that_stands_still_is_death(
    claims: UnitLeases, monkeypatch: pytest.MonkeyPatch, host: str | None
) -> None:
    """The age counts from when this process first saw it: other hosts' clocks may be far off."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    path = plant(claims, os.getppid(), host)
    os.utime(path, (1.0, 1.0))

    def can_take() -> bool:
        with claims.take("train", 3, ["a"], ME) as mine:
            return mine

    assert not can_take()
    now[0] += module.LEASE_S - 1
    assert not can_take()
    os.utime(path, (2.0, 2.0))
    now[0] += 2
    assert not can_take()
    now[0] += module.LEASE_S - 1
    assert not can_take()
    now[0] += 2
    assert can_take()
    assert not claims.folder.exists()


def test_a_held_claim_s_heart_beats(claims: UnitLeases, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_S", 0.01)
    with claims.take("train", 0, [], ME):
        path = claims.folder / "train.000000"
        os.utime(path, (1.0, 1.0))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime == 1.0:
            assert time.monotonic() < deadline
            time.sleep(0.005)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("heartbeat")]


def test_an_owner_taken_over_leaves_the_claim_to_the_other(claims: UnitLeases, tmp_path: Path) -> None:
    with claims.take("train", 0, [], ME):
        path = claims.folder / "train.000000"
        path.write_text(path.read_text().replace('"token": "', '"token": "another'))
    assert path.exists()


def test_sweep_removes_what_is_dead_or_done_and_nothing_else(claims: UnitLeases, dead_pid: int) -> None:
    plant(claims, dead_pid, unit=0)
    plant(claims, os.getppid(), names=("resid_post.1", "tokens"), unit=1)  # alive, all it does is committed
    plant(claims, os.getppid(), names=("resid_post.1", "mlp_out.0"), unit=2)  # alive, and half done
    plant(claims, os.getppid(), names=("mlp_out.0",), unit=3)
    plant(claims, 0, unit=4).unlink()  # staged, and no claim

    def is_committed(split: str, unit: int, site: str) -> bool:
        assert split == "train"
        return site in ("resid_post.1", "tokens") and unit != 3

    claims.sweep(is_committed)
    assert left(claims) == ["000002", "000003", "stage"]
    assert [path.name[:13] for path in claims.folder.iterdir() if path.is_dir()] == ["train.000003."]


def test_a_claim_that_cannot_be_written_leaves_nothing(claims: UnitLeases, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk takes the name, and not the content."""
    opened = Path.open

    class Full(io.FileIO):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def open_full(self: Path, mode: str = "r", *rest: object, **options: object) -> object:
        return Full(self, "xb") if mode == "xb" else opened(self, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", open_full)
    with pytest.raises(OSError, match=r"No space left .*train\.000000"), claims.take("train", 0, [], ME):
        pass
    assert not claims.folder.exists()


def test_of_many_at_once_one_has_it(tmp_path: Path, dead_pid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = module.is_gone

    def slowly(owner: dict[str, object]) -> bool:
        """Leave time between reading a claim and removing it."""
        gone = judge(owner)
        time.sleep(0.01)
        return gone

    monkeypatch.setattr(module, "is_gone", slowly)
    for _ in range(5):
        plant(another(tmp_path), dead_pid)
        got: list[bool] = []
        start, leave = threading.Barrier(6), threading.Event()

        def enter(got: list[bool], start: threading.Barrier, leave: threading.Event) -> None:
            mine = another(tmp_path)
            start.wait()
            with mine.take("train", 3, ["a"], ME) as has:
                got.append(has)
                if len(got) == 6:
                    leave.set()
                leave.wait(10)

        threads = [threading.Thread(target=enter, args=(got, start, leave)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(got) == [False] * 5 + [True], "two owners at once"
        assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text("kept")
    code = (
        f"import time\nfrom pathlib import Path\nfrom data.base.lock import alone\nwith alone(Path({str(path)!r})):\n"
    )
    root = Path(__file__).resolve().parents[3]
    held = subprocess.Popen(
        [sys.executable, "-c", code + "    print('in', flush=True)\n    time.sleep(60)"],
        stdout=subprocess.PIPE,
        cwd=root,
    )
    with held:
        assert held.stdout is not None and held.stdout.readline() == b"in\n"
        entered = threading.Event()

        def enter() -> None:
            with alone(path):
                entered.set()

        thread = threading.Thread(target=enter)
        thread.start()
        assert not entered.wait(0.2)
        held.kill()
        assert entered.wait(10)
        thread.join()
    assert path.read_text() == "kept"


@pytest.mark.parametrize("content", [b"{}", b"[]", b'"x"', b"\xff", b'{"host": 3, "pid": "x"}', b'{"check": "0"}'])
def test_what_no_owner_wrote_stops_no_one(claims: UnitLeases, tmp_path: Path, content: bytes) -> None:
    """Damaged and foreign files where leases are: they are no one's, and a name that is no lease's is left alone."""
    (tmp_path / "claims").mkdir()
    for name in ("train.000003", "notes.txt", "x", ".train.000004.tmp"):
        (tmp_path / "claims" / name).write_bytes(content)
    (tmp_path / "claims" / "a folder").mkdir()
    assert read_owner(content) is None and claims.owners() == []
    with claims.take("train", 3, ["a"], ME) as mine:
        assert mine
    (tmp_path / "claims" / "train.000003").write_bytes(content)
    claims.sweep(lambda split, unit, site: False)
    assert sorted(path.name for path in (tmp_path / "claims").iterdir()) == ["a folder", "notes.txt", "x"]


def test_a_lease_of_an_older_version_is_its_owner_s(claims: UnitLeases, tmp_path: Path) -> None:
    """It set the file's time of change as its heartbeat, and left the content as it was."""
    path = plant(claims, os.getppid(), host="elsewhere")
    before = LocalStorage(tmp_path).look("claims/train.000003")
    os.utime(path, (5.0, 5.0))
    assert LocalStorage(tmp_path).look("claims/train.000003") != before
    with claims.take("train", 3, ["a"], ME) as mine:
        assert not mine

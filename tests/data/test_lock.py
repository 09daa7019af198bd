from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from data import lock
from data.errors import UserError
from data.lock import writer_lock


def held_by(path: Path, pid: int, host: str | None = None) -> None:
    path.write_text(json.dumps({"pid": pid, "host": host or socket.gethostname(), "token": "x"}))


@pytest.fixture
def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_held_says_who_and_is_gone_after(tmp_path: Path) -> None:
    path = tmp_path / "writer.lock"
    with writer_lock(path):
        assert json.loads(path.read_text())["pid"] == os.getpid()
        with pytest.raises(UserError, match=f"process {os.getpid()} on .* is writing"), writer_lock(path):
            pass
        assert path.exists()
    assert list(tmp_path.iterdir()) == []


def test_given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError), writer_lock(tmp_path / "writer.lock"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("who", ["dead", "own number"])
def test_a_dead_owner_s_lock_is_taken_over(tmp_path: Path, dead_pid: int, who: str) -> None:
    path = tmp_path / "writer.lock"
    held_by(path, dead_pid if who == "dead" else os.getpid())
    with writer_lock(path):
        assert json.loads(path.read_text())["token"] != "x"
    assert list(tmp_path.iterdir()) == []


def test_a_living_or_unknown_owner_s_lock_is_not(tmp_path: Path, dead_pid: int) -> None:
    path = tmp_path / "writer.lock"
    for pid, host in [(os.getppid(), None), (dead_pid, "elsewhere"), (1, None)]:
        held_by(path, pid, host)
        with pytest.raises(UserError, match=rf"process {pid} on .*writer\.lock"), writer_lock(path):
            pass
        assert json.loads(path.read_text())["pid"] == pid
    path.write_text("{")
    with pytest.raises(UserError, match="damaged"), writer_lock(path):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["writer.lock"]


def test_of_many_at_once_one_holds_it(tmp_path: Path, dead_pid: int, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "writer.lock"
    judge = lock._is_dead

    def slowly(owner: dict[str, object]) -> bool:
        """Leave time between reading a lock and removing it."""
        dead = judge(owner)
        time.sleep(0.01)
        return dead

    monkeypatch.setattr(lock, "_is_dead", slowly)
    for _ in range(5):
        held_by(path, dead_pid)
        inside, refused = [], []
        start, leave = threading.Barrier(6), threading.Event()

        def enter(inside: list[int], refused: list[int], start: threading.Barrier, leave: threading.Event) -> None:
            start.wait()
            try:
                with writer_lock(path):
                    inside.append(1)
                    leave.wait(10)
            except UserError:
                refused.append(1)
            if len(refused) == 5:
                leave.set()

        threads = [threading.Thread(target=enter, args=(inside, refused, start, leave)) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(inside), len(refused)) == (1, 5), "two writers at once"
        assert list(tmp_path.iterdir()) == []

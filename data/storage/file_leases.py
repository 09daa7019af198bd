"""FileLeases: which process works on which unit, so that no two work on one.

    claims/<split>.<unit>                who has it; the file's time of change is its owner's heartbeat
    claims/<split>.<unit>.<site>.<id>/   chunk files of a write that is not committed yet

A claim is made by create-if-absent. It ends with its unit, or is taken over where its owner is dead: its process is
gone from this host, or its heartbeat stood still for LEASE_S by the watcher's own clock (hosts' clocks may differ).

FileLeases save work, and no more hangs on them: what a store holds is decided under its lock, where a unit is committed
once. An owner taken for dead that was only slow finds its unit committed, or what it had staged gone (`LeaseLost`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from data.store.commit import naming
from data.store.manifest import Json

LEASE_S = 120.0  # above the 60 s for which an NFS client may show a file's old times
BEAT_S = 15.0

# Tokens of this process: its own number in a claim is a dead process's (numbers repeat in containers) unless here.
_held: set[str] = set()


class LeaseLost(Exception):
    """Another process took this unit over in the belief that this one was dead."""


def _host() -> str:
    """This host and, on Linux, this boot and container: within them a process number says who."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _is_zombie(pid: int) -> bool:
    """Whether a process ended and its parent has not asked how, which in a container may be for ever (Linux only)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False


def is_gone(owner: Json) -> bool:
    """Whether the process of a claim is known to be gone; on another host that is never known."""
    if owner["host"] != _host():
        return False
    if owner["pid"] == os.getpid():
        return owner["token"] not in _held
    try:
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's, so it is there
        pass
    return _is_zombie(owner["pid"])


@contextlib.contextmanager
def owning(names: Sequence[str], made_by: Json) -> Iterator[Json]:
    """What a claim of this process says of its owner, who lives as long as the `with` block."""
    token = uuid.uuid4().hex
    _held.add(token)
    try:
        yield {"host": _host(), "pid": os.getpid(), "token": token, "names": [*names], "made_by": made_by}
    finally:
        _held.discard(token)


@contextlib.contextmanager
def _beating(path: Path) -> Iterator[None]:
    """Show every BEAT_S that the owner of a claim lives."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEAT_S):
            with contextlib.suppress(OSError):  # taken over; or the next beat will tell
                os.utime(path)

    thread = threading.Thread(target=beat, name=f"heartbeat {path.name}", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class FileLeases:
    """The claims of one store. lock: enters the store's lock, which the caller must not hold."""

    def __init__(self, folder: Path, lock: Callable[[], AbstractContextManager[None]]) -> None:
        self.folder, self._lock = folder, lock
        self._seen: dict[Path, tuple[object, float]] = {}  # a claim's last heartbeat, and when it was first seen

    @contextlib.contextmanager
    def take(self, split: str, unit: int, names: Sequence[str], made_by: Json) -> Iterator[bool]:
        """Hold the claim to `names` of a unit for the `with` block; False, and nothing held, where another has it."""
        path = self.folder / f"{split}.{unit:06d}"
        with owning(names, made_by) as owner:
            text = json.dumps(owner).encode()
            try:
                if self._create(path, text):
                    with _beating(path):
                        yield True
                else:
                    yield False
            finally:
                self._release(path, text)

    def stage(self, split: str, unit: int, site: str) -> Path:
        """A new folder for the chunk files of one write."""
        path = self.folder / f"{split}.{unit:06d}.{site}.{uuid.uuid4().hex}"
        path.mkdir(parents=True)
        return path

    def unstage(self, stage: Path) -> None:
        """Remove what is left of a write."""
        shutil.rmtree(stage, ignore_errors=True)
        self._remove_if_empty()

    def owners(self) -> list[Json]:
        """What the claims say of their owners."""
        return [owner for path in self._files() if (owner := self._read(path)[1]) is not None]

    def any(self) -> bool:
        """Whether anything is claimed or staged, or left of either."""
        return self.folder.exists()

    def sweep(self, is_committed: Callable[[str, int, str], bool]) -> None:
        """Remove what dead processes left, and whatever belongs to names committed by now."""
        with self._lock():
            self._sweep(is_committed)

    def _sweep(self, is_committed: Callable[[str, int, str], bool]) -> None:
        for path in self._files():
            split, unit = path.name.split(".")
            owner = self._read(path)[1]
            if self._is_free(path) or (owner and all(is_committed(split, int(unit), n) for n in owner["names"])):
                path.unlink(missing_ok=True)
        for stage in self.folder.glob("*.*.*"):
            split, unit, rest = stage.name.split(".", 2)
            claim = self.folder / f"{split}.{unit}"
            if not claim.exists() or is_committed(split, int(unit), rest.rpartition(".")[0]):
                shutil.rmtree(stage, ignore_errors=True)
        self._remove_if_empty()

    def _files(self) -> list[Path]:
        return [path for path in self.folder.glob("*.*") if path.is_file()]

    def _read(self, path: Path) -> tuple[object, Json | None]:
        """(what changes with each heartbeat, the owner); None for either that is not there."""
        try:
            text = path.read_bytes()
            return (path.stat().st_mtime_ns, text), json.loads(text)
        except FileNotFoundError:
            return None, None
        except ValueError:  # under the lock: its maker died before it had written
            return text, None

    def _is_free(self, path: Path) -> bool:
        """Whether a claim is absent or its owner dead; certain under the lock only."""
        beat, owner = self._read(path)
        now = time.monotonic()
        if beat is None or self._seen.get(path, (None, 0.0))[0] != beat:
            self._seen[path] = (beat, now)
        return owner is None or is_gone(owner) or now - self._seen[path][1] > LEASE_S

    def _create(self, path: Path, text: bytes) -> bool:
        """Make a claim, a dead owner's out of the way; False where a living one has it."""
        if not self._is_free(path):
            return False
        with self._lock():
            if not self._is_free(path):
                return False
            path.unlink(missing_ok=True)
            for stage in self.folder.glob(f"{path.name}.*"):
                shutil.rmtree(stage, ignore_errors=True)
            self.folder.mkdir(exist_ok=True)
            try:
                file = path.open("xb", buffering=0)
            except FileExistsError:  # by another host, on a file system whose locks do not reach it
                return False
            with file:
                try:
                    with naming(path):
                        file.write(text)
                except BaseException:
                    path.unlink(missing_ok=True)
                    self._remove_if_empty()
                    raise
        return True

    def _release(self, path: Path, text: bytes) -> None:
        """Remove a claim where it is still the one that says `text`."""
        if self._says(path, text):
            with self._lock():
                if self._says(path, text):
                    path.unlink()
                self._remove_if_empty()

    @staticmethod
    def _says(path: Path, text: bytes) -> bool:
        try:
            return path.read_bytes() == text
        except FileNotFoundError:
            return False

    def _remove_if_empty(self) -> None:
        with contextlib.suppress(OSError):
            self.folder.rmdir()

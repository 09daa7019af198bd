"""Leases: which process works on which unit, so that no two work on one. The same in a folder and an object store.

    claims/<split>.<unit>                who has it; each change of the file is its owner's heartbeat
    claims/<split>.<unit>.<site>.<id>    a stage: the chunk files of a write that is not committed yet

A lease is made by create-if-absent and ends with its unit. It is taken over, by a put over just the version that was
judged, where its owner is dead: its process is gone from this host, or the file stood still for LEASE_S by the
watcher's own clock, so that no two clocks have to agree.

Leases save work, and no more hangs on them: what a store holds is decided where a unit is committed, once, by the
storage. An owner taken for dead that was only slow finds its unit committed, or what it had staged gone (`LeaseLost`).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from data.base.errors import UserError
from data.base.location import Location
from data.base.records import Json
from data.storage.base import LEASES_FOLDER, LeaseStorage

LEASE_S = 120.0  # above the 60 s for which an NFS client may show a file's old content
BEAT_S = 15.0

_LEASE = re.compile(r"(\w+)\.(\d+)")
_STAGE = re.compile(r"(\w+)\.(\d+)\.(.+)\.[^.]+")  # split, unit, site, id
_BROKEN_OFF = re.compile(r"\..*\.tmp")  # a write that a killed process did not end

# Tokens of this process: its own number in a lease is a dead process's (numbers repeat in containers) unless here.
_held: set[str] = set()


def this_host() -> str:
    """Return this host and, on Linux, this boot and container: within them a process number says who."""
    with contextlib.suppress(OSError):
        # The boot's id, since process numbers begin anew after a restart; the namespace of processes, since two
        # containers of one host each have a process 1.
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _is_zombie(pid: int) -> bool:
    """Return whether a process ended and its parent has not asked how,
    which in a container may be for ever (Linux only)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False


def is_gone(owner: Json) -> bool:
    """Return whether the process of a lease is known to be gone; on another host that is never known."""
    if owner["host"] != this_host():
        return False
    if owner["pid"] == os.getpid():
        return owner["token"] not in _held
    try:
        # Signal 0 sends nothing: it only asks whether the process is there.
        os.kill(owner["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # another user's, so it is there
        pass
    return _is_zombie(owner["pid"])


def read_owner(data: bytes) -> Json | None:
    """Read what a lease says of its owner; None for what no owner wrote, or had not written when it died."""
    try:
        owner = json.loads(data)
    except ValueError:
        return None
    # A lease may be cut off in the middle of its write: what is not whole names no living owner.
    kinds = {"host": str, "pid": int, "token": str, "names": list, "made_by": dict}
    if isinstance(owner, dict) and all(isinstance(owner.get(name), kind) for name, kind in kinds.items()):
        return owner
    return None


@contextlib.contextmanager
def owning(names: Sequence[str], made_by: Json) -> Iterator[Json]:
    """Yield what a lease of this process says of its owner, who lives as long as the `with` block."""
    token = uuid.uuid4().hex
    _held.add(token)
    try:
        yield {"host": this_host(), "pid": os.getpid(), "token": token, "names": [*names], "made_by": made_by}
    finally:
        _held.discard(token)


class UnitLeases:
    """The leases of one store."""

    def __init__(self, storage: LeaseStorage) -> None:
        self._storage, self.folder = storage, storage.path / LEASES_FOLDER
        self._seen: dict[str, tuple[str, float]] = {}  # a lease's last version, and when it was first seen

    @contextlib.contextmanager
    def take(self, split: str, unit: int, names: Sequence[str], made_by: Json) -> Iterator[bool]:
        """Have the lease of `names` of a unit for the `with` block; False, and nothing taken, where another has it."""
        key = f"{LEASES_FOLDER}/{split}.{unit:06d}"
        with owning(names, made_by) as owner:
            tried = True  # until it is known to be another's: an interrupt may come right after it was written
            try:
                tag = self._create(key, owner)
                if tag is None:
                    tried = False
                    yield False
                else:
                    with self._beating(key, owner, tag):
                        yield True
            finally:
                # Only this owner's own version: one that was taken over belongs to another by now.
                if tried and (still := self._still(key, owner)):
                    self._storage.delete_if(key, still)

    def stage(self, split: str, unit: int, site: str) -> Location:
        """Make a new folder or prefix for the chunk files of one write."""
        # A new name for every attempt, so a slow writer and the one that took over never write the same file.
        stage = self.folder / f"{split}.{unit:06d}.{site}.{uuid.uuid4().hex}"
        self._storage.make_stage(stage)
        return stage

    def unstage(self, stage: Location) -> None:
        """Remove what is left of a write."""
        self._storage.discard(stage)

    def owners(self) -> list[Json]:
        """Return what the leases say of their owners."""
        files = [self._look(f"{LEASES_FOLDER}/{name}") for name in self._entries() if _LEASE.fullmatch(name)]
        owners = [read_owner(file[0]) for file in files if file is not None]
        return [owner for owner in owners if owner is not None]

    def any(self) -> bool:
        """Return whether anything is leased or staged, or left of either."""
        return bool(self._entries())

    def sweep(self, is_committed: Callable[[str, int, str], bool]) -> None:
        """Remove what dead processes left, and whatever belongs to names committed by now."""
        # Stages are listed before leases are judged: a stage begins after its lease and ends before it, so one that
        # has no lease now is a dead process's.
        entries = self._entries()
        gone = [name for name in entries if _BROKEN_OFF.fullmatch(name)]
        leased = set()
        for name in entries:
            if (match := _LEASE.fullmatch(name)) and not self._sweep_lease(match, is_committed):
                leased.add(name)
        for name in entries:
            if _LEASE.fullmatch(name) or not (match := _STAGE.fullmatch(name)):
                continue
            split, unit, site = match[1], int(match[2]), match[3]
            # In an object store a stage may be what others have settled on, so only a commit makes it litter.
            abandoned = self._storage.stages_are_private and f"{split}.{match[2]}" not in leased
            if abandoned or is_committed(split, unit, site):
                gone.append(name)
        self._storage.discard_entries(gone)

    def _sweep_lease(self, match: re.Match[str], is_committed: Callable[[str, int, str], bool]) -> bool:
        """Remove a lease that is a dead process's or of names committed by now; False where it stays."""
        key = f"{LEASES_FOLDER}/{match[0]}"
        file = self._look(key)
        if file is None:
            return True
        owner = read_owner(file[0])
        is_done = owner is not None and all(is_committed(match[1], int(match[2]), site) for site in owner["names"])
        if not is_done and not self._is_free(key, *file):
            return False
        self._storage.delete_if(key, file[1])  # unless it was taken over since it was judged
        return True

    def _entries(self) -> list[str]:
        return self._storage.entries(LEASES_FOLDER)

    def _look(self, key: str) -> tuple[bytes, str] | None:
        try:
            return self._storage.look(key)
        except FileNotFoundError:
            return None

    def _is_free(self, key: str, data: bytes, tag: str) -> bool:
        """Return whether the owner of a lease is dead."""
        now = time.monotonic()
        # The clock starts when this process first sees a version: how old the file says it is would compare two hosts'
        # clocks.
        if self._seen.get(key, ("", 0.0))[0] != tag:
            self._seen[key] = (tag, now)
        owner = read_owner(data)
        return owner is None or is_gone(owner) or now - self._seen[key][1] > LEASE_S

    def _create(self, key: str, owner: Json) -> str | None:
        """Make a lease, or take a dead owner's over; its version, or None where a living one has it."""
        file = self._look(key)
        if file is not None and not self._is_free(key, *file):
            return None
        tag = self._storage.put_if(key, json.dumps(owner).encode(), file[1] if file else None)
        # The answer to a put that was done may be lost and the request repeated, which then fails on our own lease.
        tag = tag or self._still(key, owner)
        if tag is not None and self._storage.stages_are_private:
            # What is staged of this unit is a dead process's: the lease is ours, and we staged nothing yet.
            begins = key.rpartition("/")[2] + "."
            self._storage.discard_entries([name for name in self._entries() if name.startswith(begins)])
        return tag

    def _still(self, key: str, owner: Json) -> str | None:
        """Return the version of a lease that is this owner's, whatever an answer that was lost would have said."""
        file = self._look(key)
        there = read_owner(file[0]) if file else None
        return file[1] if file and there and there["token"] == owner["token"] else None

    @contextlib.contextmanager
    def _beating(self, key: str, owner: Json, tag: str) -> Iterator[None]:
        """Show every BEAT_S that the owner of a lease lives, for as long as it is this owner's."""
        # A thread of its own: a forward that takes minutes must not make its process look dead.
        done = threading.Event()

        def beat(tag: str | None) -> None:
            count = 0
            while tag is not None and not done.wait(BEAT_S):
                count += 1
                with contextlib.suppress(UserError, OSError):  # the next beat will tell
                    text = json.dumps(owner | {"beat": count}).encode()
                    # None where the lease was taken over: the thread ends, and the commit will find out.
                    tag = self._storage.put_if(key, text, tag) or self._still(key, owner)

        thread = threading.Thread(target=beat, args=(tag,), name=f"heartbeat {key}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

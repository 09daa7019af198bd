"""One writer at a time: a lock file that says who holds it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

from data.errors import UserError

# Tokens of this process: its own number in a lock file is a dead process's (numbers repeat in containers) unless here.
_held: set[str] = set()


def _is_dead(owner: dict[str, object]) -> bool:
    """Whether the process named in a lock file is known to be gone; on another host that is never known."""
    pid = owner.get("pid")
    if owner.get("host") != socket.gethostname() or not isinstance(pid, int):
        return False
    if pid == os.getpid():
        return owner.get("token") not in _held
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _create(path: Path, text: str) -> bool:
    """Make the lock file with its content in one step; False where it exists."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.write_text(text)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Only one process of this host at a time; the kernel ends it with the process."""
    import fcntl

    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _remove_dead(path: Path) -> None:
    """Take a dead process's lock away; a UserError where its owner may be alive.

    Only processes of the owner's host get as far as removing, so reading and removing need to be alone only there.
    """
    with _alone(path.parent):
        try:
            owner = json.loads(path.read_text())
        except FileNotFoundError:
            return
        except ValueError:
            raise UserError(f"{path} is damaged: delete it if no other harvest is running") from None
        if not _is_dead(owner):
            raise UserError(
                f"process {owner.get('pid')} on {owner.get('host')} is writing to {path.parent}: wait for it, "
                f"or delete {path.name} there if it no longer runs"
            )
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def writer_lock(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; a UserError names the process that holds it."""
    token = uuid.uuid4().hex
    text = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "token": token})
    _held.add(token)
    try:
        while not _create(path, text):
            _remove_dead(path)
        yield
    finally:
        _held.discard(token)
        with contextlib.suppress(FileNotFoundError):
            if path.read_text() == text:
                path.unlink()

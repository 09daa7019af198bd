"""Files of a local disk: written whole or not at all, synced, found by patterns, their sizes said for people."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from data.base.errors import UserError


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError say which file it is about, which calls on open files do not."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def fsync(folder: Path) -> None:
    """Make the names in a folder (or a file's content) last through a power failure; an OSError names it."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(fd)
    finally:
        os.close(fd)


def open_plain(path: Path) -> int:
    """Open a file to read; an OSError where a folder, pipe or device is in its place, which could be waited for."""
    # Opening a named pipe without a writer waits for ever; with O_NONBLOCK it returns and is refused below.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.ENXIO, os.strerror(errno.ENXIO), str(path))


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write and fsync it; what fails leaves no file, and an OSError names it."""
    try:
        with naming(path), open(path, "wb") as file:
            yield file
            file.flush()
            # flush() hands the bytes to the system only; after a power failure a renamed file could be there and be
            # empty.
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a file to write that takes its place when the `with` block ends: whole, or as it was before.

    No other process may write it at the same time (in a store: it is under the lock). What a killed process leaves has
    the one name that the next one to write this file writes to.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with whole_file(temporary) as file:
        yield file
    os.replace(temporary, path)
    fsync(path.parent)


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file, text as UTF-8 with its line ends as they are: all of it or nothing, and what was there stays."""
    with atomic_file(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


def write_atomic_shared(path: Path, data: bytes) -> None:
    """Write a file that others may be writing at the same time, with the same bytes and without a lock."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    with contextlib.suppress(FileNotFoundError):  # another was first, and removed this one
        with whole_file(temporary) as file:
            file.write(data)
        os.replace(temporary, path)
    # Killed processes may have left theirs. One that is being written now is removed as well; its writer finds the file
    # made.
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        left.unlink(missing_ok=True)
    fsync(path.parent)


def expand_globs(pattern: str) -> list[str]:
    """Return the paths that a name or a pattern such as `runs/**/topk-*` stands for, sorted;
    none where nothing matches."""
    # A name may hold brackets, so one that exists is never read as a pattern.
    return [pattern] if Path(pattern).exists() else sorted(glob.glob(pattern, recursive=True))


def format_bytes(count: float) -> str:
    """Return a number of bytes for people: `1.3 GB`."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:,.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def refuse_full(out: Path) -> None:
    """Refuse a folder that something is in already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already: choose another folder with out=<folder>, or remove it")

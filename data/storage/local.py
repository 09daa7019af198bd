"""A folder of a file system as the storage of a store: changes under one lock, each lasting through a power failure."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from data.base.files import fsync, naming, open_plain, whole_file, write_atomic, write_atomic_shared
from data.base.lock import alone
from data.storage.base import LEASES_FOLDER, MANIFEST, RECORD_FOLDERS
from data.storage.leases import UnitLeases

TRIES = 100  # to make something in a folder that others may remove when it is empty


def _tag(data: bytes, status: os.stat_result) -> str:
    """Make a tag that changes with the content and with the time of change,
    which processes of an older version set as heartbeat."""
    return f"{status.st_mtime_ns}.{hashlib.sha256(data).hexdigest()[:16]}"


def _is(entry: os.DirEntry[str], wanted: Callable[[os.DirEntry[str]], bool]) -> bool:
    try:
        return wanted(entry)
    except OSError:  # a link that leads back to itself is neither a file nor a folder
        return False


class LocalStorage:
    """A folder of a file system."""

    stages_are_private = True  # a stage is brought to its place by a rename, which only its writer does

    def __init__(self, path: Path, first: str = MANIFEST) -> None:
        self.path, self._first = path, first
        self.leases = UnitLeases(self)

    def _alone(self) -> AbstractContextManager[None]:
        """Be the only one to change what the store holds, for a moment; not to be entered twice."""
        return alone(self.path / self._first)

    def _open(self, key: str) -> io.FileIO:
        """Open a file to read; an OSError where something else is in its place, which reading would wait for."""
        # Unbuffered: reads are of whole files or large parts, which a buffer would copy once more.
        return os.fdopen(open_plain(self.path / key), "rb", buffering=0)

    def read(self, key: str) -> bytes:
        with self._open(key) as file, naming(self.path / key):
            return file.read()

    def read_into(self, key: str, start: int, out: memoryview) -> int:
        with self._open(key) as file, naming(self.path / key):
            length = file.seek(0, os.SEEK_END)
            file.seek(start)
            while out and (got := file.readinto(out)):
                out, start = out[got:], start + got
        return min(length, start) if out else length

    def read_many(self, keys: Sequence[str]) -> Iterator[bytes | OSError]:
        for key in keys:
            try:
                content: bytes | OSError = self.read(key)
            except OSError as error:
                content = error
            yield content

    def size(self, key: str) -> int | None:
        path = self.path / key
        return path.stat().st_size if path.is_file() else None

    def list_files(self, folder: str) -> list[str]:
        return self._entries(folder, os.DirEntry.is_file)

    def folders(self) -> list[str]:
        return self._entries("", os.DirEntry.is_dir)

    def entries(self, folder: str) -> list[str]:
        return self._entries(folder, lambda entry: True)

    def _entries(self, folder: str, wanted: Callable[[os.DirEntry[str]], bool]) -> list[str]:
        try:
            with os.scandir(self.path / folder) as entries:
                return sorted(entry.name for entry in entries if _is(entry, wanted))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def sizes(self) -> dict[str, int]:
        found = {}
        for at, _, names in os.walk(self.path):
            for name in names:
                path = os.path.join(at, name)
                with contextlib.suppress(FileNotFoundError):  # removed by another process since it was listed
                    found[os.path.relpath(path, self.path)] = os.lstat(path).st_size
        return found

    def seconds_since_write(self) -> float:
        return time.time() - max((os.lstat(self.path / name).st_mtime for name in self.sizes()), default=0.0)

    def create(self, key: str, data: bytes) -> None:
        path = self.path / key
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic_shared(path, data)
        fsync(path.parent.parent)

    def update(self, key: str, change: Callable[[bytes | None], bytes]) -> None:
        path = self.path / key
        with self._alone():
            old = path.read_bytes() if path.exists() else None
            new = change(old)
            # A rewrite with the same bytes would cost two fsyncs, and make an idle store look written to.
            if new == old:
                return
            made = [folder.parent for folder in path.parents if not folder.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, new)
            for folder in made:
                fsync(folder)

    # What leases are made of. None of it has to last through a power failure, after which every owner is dead.

    def look(self, key: str) -> tuple[bytes, str]:
        with self._open(key) as file:
            data = file.read()
            return data, _tag(data, os.fstat(file.fileno()))

    def put_if(self, key: str, data: bytes, tag: str | None) -> str | None:
        path = self.path / key
        with self._alone():
            if self._tag_of(key) != tag:
                return None
            if tag is None:
                return self._make(path, data)
            temporary = path.with_name(f".{path.name}.tmp")
            with naming(temporary):
                temporary.write_bytes(data)
            os.replace(temporary, path)
            return self._tag_of(key)

    def _tag_of(self, key: str) -> str | None:
        try:
            return self.look(key)[1]
        except FileNotFoundError:
            return None

    def _make(self, path: Path, data: bytes) -> str | None:
        """Create a file; None where there is one, made on a file system whose locks do not reach it."""
        try:
            file = self._open_new(path)
        except FileExistsError:
            return None
        with file:
            try:
                with naming(path):
                    file.write(data)
                    return _tag(data, os.fstat(file.fileno()))
            except BaseException:
                path.unlink(missing_ok=True)
                self._remove_if_empty(path.parent)
                raise

    def delete_if(self, key: str, tag: str) -> None:
        path = self.path / key
        with self._alone():
            if self._tag_of(key) == tag:
                path.unlink()
                self._remove_if_empty(path.parent)

    @staticmethod
    def _open_new(path: Path) -> BinaryIO:
        """Open a file that is not there, in a folder that may be removed, when it is empty, by another process."""
        for _ in range(TRIES):
            with contextlib.suppress(FileExistsError):  # which mkdir also says of one that is removed meanwhile
                path.parent.mkdir(exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                return path.open("xb", buffering=0)
        return path.open("xb", buffering=0)

    def make_stage(self, stage: Path) -> None:
        # Whoever ends a write removes an empty claims/, which may come between the making of the two folders.
        for _ in range(TRIES):
            with contextlib.suppress(FileExistsError):  # which mkdir also says of one that is removed meanwhile
                stage.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                stage.mkdir()
                return
        stage.mkdir()

    def discard(self, stage: Path) -> None:
        shutil.rmtree(stage, ignore_errors=True)
        self._remove_if_empty(stage.parent)

    def discard_entries(self, names: Collection[str]) -> None:
        if not names:
            return
        folder = self.path / LEASES_FOLDER
        with self._alone():  # not while its writer brings a stage to its place
            for name in names:
                if (folder / name).is_dir():
                    shutil.rmtree(folder / name, ignore_errors=True)
                else:
                    (folder / name).unlink(missing_ok=True)
            self._remove_if_empty(folder)

    @staticmethod
    def _remove_if_empty(folder: Path) -> None:
        with contextlib.suppress(OSError):
            folder.rmdir()

    def put_staged(self, stage: Path, name: str, pieces: Iterable[bytes]) -> None:
        with whole_file(stage / name) as file:
            for piece in pieces:
                file.write(piece)

    def commit_staged(self, stage: Path, keys: Sequence[str], record: str, data: bytes) -> bytes:
        path = self.path / record
        with self._alone():
            if path.exists():
                return path.read_bytes()
            places = [self.path / key for key in keys]
            for place in places:
                # A rename within one file system is atomic. If the process dies between two of them the record is
                # missing, so the chunks that came to their places are no part of the store, and the next writer's take
                # theirs.
                os.replace(stage / place.name, place)
            # The names of the chunks are on the disk before the record that names them is: after a power failure no
            # record can be there without its chunks.
            for folder in {place.parent for place in places}:
                fsync(folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, data)
        return data

    def remove(self, keys: Collection[str]) -> None:
        for key in keys:
            (self.path / key).unlink(missing_ok=True)

    def remove_all(self) -> None:
        # First what says that the store is whole, then what says that units are: killed at any point this leaves a
        # store with fewer rows, never one with records of files that are gone.
        (self.path / "complete.json").unlink(missing_ok=True)
        for folder in RECORD_FOLDERS:
            shutil.rmtree(self.path / folder, ignore_errors=True)
        shutil.rmtree(self.path)

    def zarr(self, key: str) -> dict[str, Any]:
        return {"store": self.path / key}

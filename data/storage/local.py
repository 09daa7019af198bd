"""Where the files of a store lie: a folder, or a prefix of an object store, with the same few operations on both.

A location is a Path or a Url; a place holds the files below one, each by its key, the path below it with `/`. In a
folder (here) one process at a time changes what a store holds, under a lock that the kernel keeps, and what is there
lasts through a power failure. In an object store (`data.storage.object_store`) puts that hold only while nothing
changed do that.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data.base.errors import UserError
from data.base.lock import alone
from data.storage.file_leases import FileLeases
from data.store.commit import fsync, put, put_first, whole_file
from data.store.manifest import Json

SCHEMES = ("s3", "memory")
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://([^/]*)/*(.*)", re.IGNORECASE)


@dataclass(frozen=True, order=True)
class Url:
    """`s3://bucket/prefix`, or `memory://name/prefix` within this process; joined and named as a Path is."""

    scheme: str
    bucket: str
    key: str = ""  # without / at either end

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}" + (f"/{self.key}" if self.key else "")

    def __truediv__(self, below: str) -> Url:
        return Url(self.scheme, self.bucket, f"{self.key}/{below}" if self.key else below)

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2] or self.bucket

    @property
    def parent(self) -> Url:
        return Url(self.scheme, self.bucket, self.key.rpartition("/")[0])


Location = Path | Url


def refuse_credentials(text: str) -> None:
    """UserError, which does not repeat it, for a URL in `text` with what must not be written down."""
    if re.search(r"\w://[^/\s]*@", text) or re.search(r"\b(s3|memory)://\S*[?#]", text):
        raise UserError(
            "a URL is given as s3://bucket/prefix and nothing more: take the credentials or parameters out of it and "
            "set them in the environment, as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )


def parse_location(text: str | Location) -> Location:
    """What a setting such as `cache` names; UserError for a URL of another kind or one with credentials in it."""
    found = None if isinstance(text, Path | Url) else _URL.fullmatch(str(text))
    if found is None:
        return text if isinstance(text, Url) else Path(text)
    refuse_credentials(str(text))
    if found[1] not in SCHEMES or not found[2]:
        kinds = " or ".join(f"{scheme}://bucket/prefix" for scheme in SCHEMES)
        raise UserError(f"{text} is no place for a store: name a folder, or give {kinds}")
    return Url(found[1], found[2], "/".join(part for part in found[3].split("/") if part))


class LeaseProtocol(Protocol):
    """Which process works on which unit, and where its chunks wait for their commit: `file_leases`, `object_leases`."""

    def take(self, split: str, unit: int, names: Sequence[str], made_by: Json) -> AbstractContextManager[bool]: ...
    def stage(self, split: str, unit: int, site: str) -> Any: ...
    def unstage(self, stage: Any) -> None: ...
    def owners(self) -> list[Json]: ...
    def sweep(self, is_committed: Callable[[str, int, str], bool]) -> None: ...
    def any(self) -> bool: ...


class Storage(Protocol):
    """The files below a location. What reads raises FileNotFoundError where there is none, unless it says otherwise."""

    @property
    def path(self) -> Location: ...

    @property
    def claims(self) -> LeaseProtocol: ...

    def read(self, key: str) -> bytes: ...

    def read_into(self, key: str, start: int, out: memoryview) -> int:
        """Fill `out` from byte `start` on as far as the file goes; returns its length, or less if it was cut short."""
        ...

    def reads(self, keys: Sequence[str]) -> Iterator[bytes | None]:
        """The content of many files, in their order; None for one that is not there."""
        ...

    def size(self, key: str) -> int | None:
        """None where there is no such file."""
        ...

    def names(self, folder: str) -> list[str]:
        """The names of the files in a folder, sorted; none where it does not exist."""
        ...

    def folders(self) -> list[str]:
        """The names of the folders right below, sorted; none where there is nothing."""
        ...

    def sizes(self) -> dict[str, int]:
        """{key: bytes} of every file; links count as themselves."""
        ...

    def seconds_since_write(self) -> float:
        """Seconds since anything below was written."""
        ...

    def create(self, key: str, data: bytes) -> None:
        """Write a file that others may be writing at the same time with the same bytes."""
        ...

    def update(self, key: str, change: Callable[[bytes | None], bytes]) -> None:
        """Replace a file by what `change` makes of its content (None: not there), which no other changes meanwhile."""
        ...

    def put_staged(self, stage: Any, name: str, pieces: Iterable[bytes]) -> None:
        """Write a file, piece after piece, that a `commit_staged` will bring to its place."""
        ...

    def commit_staged(self, stage: Any, keys: Sequence[str], record: str, data: bytes) -> bytes:
        """Bring what is staged to its `keys`, then write the record, unless there is one; returns the one that stands.

        FileNotFoundError: another process took what was staged for a dead one's.
        """
        ...

    def remove(self, keys: Collection[str]) -> None:
        """Remove files; one that is gone already is none the worse."""
        ...

    def remove_all(self) -> None:
        """Remove a store, first what says that it is whole: broken off in between, an unfinished store is left."""
        ...

    def zarr(self, key: str) -> dict[str, Any]:
        """The arguments by which zarr opens the array at `key`."""
        ...


def open_storage(location: Location) -> Storage:
    """The files below a location; UserError where an object store is named and cannot be used."""
    if isinstance(location, Path):
        return LocalStorage(location)
    from data.storage.object_store import ObjectStorage

    return ObjectStorage(location)


class LocalStorage:
    """A folder of a file system."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.claims = FileLeases(path / "claims", self._alone)

    def _alone(self) -> AbstractContextManager[None]:
        """Be the only one to change what the store holds, for a moment; not to be entered twice."""
        return alone(self.path / "manifest.json")

    def read(self, key: str) -> bytes:
        return (self.path / key).read_bytes()

    def read_into(self, key: str, start: int, out: memoryview) -> int:
        with open(self.path / key, "rb", buffering=0) as file:
            length = file.seek(0, os.SEEK_END)
            file.seek(start)
            while out and (got := file.readinto(out)):
                out, start = out[got:], start + got
        return min(length, start) if out else length

    def reads(self, keys: Sequence[str]) -> Iterator[bytes | None]:
        for key in keys:
            try:
                yield self.read(key)
            except FileNotFoundError:
                yield None

    def size(self, key: str) -> int | None:
        path = self.path / key
        return path.stat().st_size if path.is_file() else None

    def names(self, folder: str) -> list[str]:
        return self._entries(folder, os.DirEntry.is_file)

    def folders(self) -> list[str]:
        return self._entries("", os.DirEntry.is_dir)

    def _entries(self, folder: str, wanted: Callable[[os.DirEntry[str]], bool]) -> list[str]:
        try:
            with os.scandir(self.path / folder) as entries:
                return sorted(entry.name for entry in entries if wanted(entry))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def sizes(self) -> dict[str, int]:
        found = {}
        for at, _, names in os.walk(self.path):
            for name in names:
                path = os.path.join(at, name)
                found[os.path.relpath(path, self.path)] = os.lstat(path).st_size
        return found

    def seconds_since_write(self) -> float:
        return time.time() - max((os.lstat(self.path / name).st_mtime for name in self.sizes()), default=0.0)

    def create(self, key: str, data: bytes) -> None:
        path = self.path / key
        path.parent.mkdir(parents=True, exist_ok=True)
        put_first(path, data)
        fsync(path.parent.parent)

    def update(self, key: str, change: Callable[[bytes | None], bytes]) -> None:
        path = self.path / key
        with self._alone():
            old = path.read_bytes() if path.exists() else None
            if (new := change(old)) == old:
                return
            made = [folder.parent for folder in path.parents if not folder.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            put(path, new)
            for folder in made:
                fsync(folder)

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
                os.replace(stage / place.name, place)
            for folder in {place.parent for place in places}:
                fsync(folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            put(path, data)
        return data

    def remove(self, keys: Collection[str]) -> None:
        for key in keys:
            (self.path / key).unlink(missing_ok=True)

    def remove_all(self) -> None:
        (self.path / "complete.json").unlink(missing_ok=True)
        shutil.rmtree(self.path / "commits", ignore_errors=True)
        shutil.rmtree(self.path)

    def zarr(self, key: str) -> dict[str, Any]:
        return {"store": self.path / key}

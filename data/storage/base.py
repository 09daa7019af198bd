"""What a storage can do: the same few operations on a folder and on a prefix of an object store.

A location is a Path or a Url; a storage has the files below one, each by its key, the path below it with `/`. In a
folder (`local`) one process at a time changes what a store holds, under a lock that the kernel keeps, and what is there
lasts through a power failure. In an object store (`object_store`) nothing can be locked or renamed: puts that hold only
while nothing else changed the object take that place.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from data.base.location import Location
from data.base.records import Json

MANIFEST = "manifest.json"  # the first file of a store of activations; in a folder its lock, too
RECORD_FOLDERS = ("commits", "records")  # of stores of activations and of tokens: what says that units are there
LEASES_FOLDER = "claims"  # its name on disk, where stores of every age have it


class LeaseLost(Exception):
    """Another process took this unit over in the belief that this one was dead."""


class LeaseStorage(Protocol):
    """The operations on which leases and stages are built (`data.storage.leases`)."""

    @property
    def path(self) -> Location: ...

    @property
    def stages_are_private(self) -> bool:
        """Return whether what is staged is committed by its own writer or by no one.

        In an object store another may settle on it at any time, so it must not be removed before its unit is committed.
        """
        ...

    def look(self, key: str) -> tuple[bytes, str]:
        """Read a file's content, and a tag that changes with every change of it."""
        ...

    def put_if(self, key: str, data: bytes, tag: str | None) -> str | None:
        """Write a file where it still is what `tag` says, or (None) where there is none.

        Returns its new tag; None where something else is there, and nothing was written. In an object store a request
        that was repeated after its answer was lost gives None too, though it was done.
        """
        ...

    def delete_if(self, key: str, tag: str) -> None:
        """Remove a file where it still is what `tag` says."""
        ...

    def entries(self, folder: str) -> list[str]:
        """List files and folders right below a folder, sorted; none where it does not exist."""
        ...

    def make_stage(self, stage: Any) -> None:
        """Make room for the chunk files of one write."""
        ...

    def discard(self, stage: Any) -> None:
        """Remove what is left of a write, unless it may be committed yet."""
        ...

    def discard_entries(self, names: Collection[str]) -> None:
        """Remove entries of the leases' folder: files, or stages with all that is in them."""
        ...


class Leases(Protocol):
    """Which process works on which unit, and where its chunks wait for their commit."""

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
    def leases(self) -> Leases: ...

    def read(self, key: str) -> bytes: ...

    def read_into(self, key: str, start: int, out: memoryview) -> int:
        """Fill `out` from byte `start` on as far as the file goes; returns its length, or less if it was cut short."""
        ...

    def read_many(self, keys: Sequence[str]) -> Iterator[bytes | OSError]:
        """Read many files in their order: the content, or the error for which one could not be read."""
        ...

    def size(self, key: str) -> int | None:
        """Return the bytes of a file; None where there is no such file."""
        ...

    def list_files(self, folder: str) -> list[str]:
        """List the files in a folder, sorted; none where it does not exist."""
        ...

    def folders(self) -> list[str]:
        """List the folders right below, sorted; none where there is nothing."""
        ...

    def entries(self, folder: str) -> list[str]:
        """List all that is right below a folder, sorted; none where it does not exist."""
        ...

    def sizes(self) -> dict[str, int]:
        """Return {key: bytes} of every file; links count as themselves."""
        ...

    def seconds_since_write(self) -> float:
        """Return the seconds since anything below was written."""
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
        """Return the arguments by which zarr opens the array at `key`."""
        ...

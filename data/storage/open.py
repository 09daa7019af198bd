"""Open the storage of a location, whichever kind it is."""

from __future__ import annotations

from pathlib import Path

from data.base.location import Location
from data.storage.base import MANIFEST, Storage
from data.storage.local import LocalStorage


def open_storage(location: Location, first: str = MANIFEST) -> Storage:
    """Open the files below a location; UserError where an object store is named and cannot be used.

    first: the file that is written first and says what the others are.
    """
    if isinstance(location, Path):
        return LocalStorage(location, first)
    from data.storage.object_store import ObjectStorage  # an extra: obstore

    return ObjectStorage(location, first)

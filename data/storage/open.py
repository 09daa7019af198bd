"""Open the storage of a location, whichever kind it is."""

from __future__ import annotations

from pathlib import Path

from data.base.location import Location
from data.storage.base import Storage
from data.storage.local import LocalStorage


def open_storage(location: Location) -> Storage:
    """Open the files below a location; UserError where an object store is named and cannot be used."""
    if isinstance(location, Path):
        return LocalStorage(location)
    from data.storage.object_store import ObjectStorage  # an extra: obstore

    return ObjectStorage(location)

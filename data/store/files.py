"""What lies in a folder of stores, and which files belong to a store."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from data.base.errors import UserError
from data.base.location import Location
from data.base.records import Json
from data.storage.open import open_storage
from data.store.commit import RECORD
from data.store.manifest import HELDOUT, TRAIN
from data.store.store import Store
from data.store.token_store import DESCRIPTION

SPLITS = (TRAIN, HELDOUT)


def is_store(path: Location) -> bool:
    """Return whether a folder is a store or what is left of one; one that cannot be looked into may be."""
    storage = open_storage(path)
    try:
        return storage.size("manifest.json") is not None or "commits" in storage.folders()
    # Refused to look: `gc` must not take it for an empty folder and delete it.
    except OSError:
        return True


def stores_below(path: Location) -> list[Location]:
    """Return the folder itself, if it is a store, else all stores below it, by path;
    a UserError where it does not exist."""
    if isinstance(path, Path) and not path.is_dir():
        raise UserError(f"{path} is no folder: name a store, or a folder that holds some")
    if is_store(path):
        return [path]
    below = (path / name for name in open_storage(path).folders())
    # Links are not followed: they may lead in a circle, or to a store that is listed where it really lies.
    return [store for at in below if not (isinstance(at, Path) and at.is_symlink()) for store in stores_below(at)]


def is_token_store(path: Location) -> bool:
    """Return whether a folder is a store of tokens (data/store/token_store.py); not one that cannot be looked into."""
    try:
        return open_storage(path).size(DESCRIPTION) is not None
    except OSError:
        return False


def token_stores_below(path: Location) -> list[Location]:
    """Return the folder itself, if it is a store of tokens, else all such stores below it, by path."""
    if is_token_store(path):
        return [path]
    if is_store(path):
        return []
    below = (path / name for name in open_storage(path).folders())
    return [store for at in below if not (isinstance(at, Path) and at.is_symlink()) for store in token_stores_below(at)]


def leftovers(names: Collection[str], keys: Collection[str]) -> list[str]:
    """Return those of a store's files that are no part of it; `keys` are the chunk files its records name."""

    def belongs(name: str) -> bool:
        *folders, file = name.split("/")
        # The root's, a split's and an array's are zarr's own groups; deeper ones are no part of a store.
        if file == "zarr.json":
            return len(folders) <= 2 and folders[:1] in ([], *([split] for split in SPLITS))
        if folders[:1] == ["commits"]:
            return len(folders) == 2 and folders[1] in SPLITS and bool(RECORD.fullmatch(file))
        return name in ("manifest.json", "complete.json") or name in keys

    return sorted(name for name in names if not belongs(name))


def arrays(store: Store, split: str) -> list[str]:
    """Return every array of a split that has a commit record, tokens and origin among them."""
    records = (RECORD.fullmatch(name) for name in store.storage.list_files(f"commits/{split}"))
    return sorted({record[2] for record in records if record})


def chunk_keys(store: Store) -> set[str]:
    """Return the chunk files that the commit records name; a UserError names a damaged record."""
    return {
        chunk.key
        for split in SPLITS
        for site in arrays(store, split)
        for commit in store.committed(split, site).values()
        for chunk in commit.chunks
    }


def extent(store: Store) -> Json:
    """Return {split: {site: committed rows}}, as complete.json says it when all that was asked for is there."""
    return {split: {site: store.rows(split, site) for site in store.sites(split)} for split in SPLITS}

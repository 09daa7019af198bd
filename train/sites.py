"""The sites that a run joins into one row: whose activations they are, and whether row i of all is the same token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data.base.errors import UserError
from data.loading.joined import JoinedReader
from data.loading.reader import Reader, open_reader
from data.loading.same_tokens import require_same_tokens
from data.store.manifest import TRAIN
from data.store.store import Store
from train.config import Group


@dataclass(frozen=True)
class StoredSite:
    """A site of a store."""

    store: Store
    name: str

    @property
    def width(self) -> int:
        """Return the width of its activations."""
        return self.store.decoder(TRAIN, self.name).width

    def record(self) -> Group:
        """Return what config.json says of it; `model_name` has no folder of this machine in it."""
        manifest = self.store.manifest
        names = {"site": self.name, "fingerprint": manifest.fingerprint, "store": manifest.folder}
        return {**names, "model_name": manifest.identity["model"]["name"]}


def joined_name(sites: Sequence[StoredSite]) -> str:
    """Name several sites in a line, with their stores where these are several."""
    several = len({site.store.manifest.fingerprint for site in sites}) > 1
    return " + ".join(f"{site.name} of {site.store.path.name}" if several else site.name for site in sites)


def require_joinable(stores: Sequence[Store], splits: Sequence[str]) -> None:
    """Raise UserError unless the rows of all stores stand for the same tokens in these splits, encoded alike."""
    fingerprints = [store.manifest.fingerprint for store in stores]
    if len(set(fingerprints)) < len(fingerprints):
        paths = ", ".join(str(store.path) for store in stores)
        raise UserError(f"store=[{paths}] names one store twice: give each once, its sites by site=[...]")
    for other in stores[1:]:
        for split in splits:
            require_same_tokens(stores[0], other, split)


def joined_reader(sites: Sequence[StoredSite], split: str) -> Reader:
    """Open one site's reader, or that of several joined."""
    readers = [open_reader(site.store, split, site.name) for site in sites]
    return readers[0] if len(readers) == 1 else JoinedReader(*readers)

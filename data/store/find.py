"""Find the stores of a cache: by the settings they were asked for with, by name, by fingerprint."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from data.base.errors import UserError
from data.base.location import Location
from data.base.records import Json
from data.storage.open import open_storage
from data.store.store import Store


def _stores(cache: Location) -> tuple[list[Store], list[UserError]]:
    """All stores of a cache folder by name, and what is wrong with those that cannot be opened."""
    found, wrong = [], []
    for path in (cache / name for name in open_storage(cache).folders()):
        if open_storage(path).size("manifest.json") is None:
            continue
        try:
            found.append(Store.open(path))
        except UserError as error:
            wrong.append(error)
    return found, wrong


def _matching(cache: Location, matches: Callable[[Store], bool]) -> list[Store]:
    """The stores that match; where none does but some could not be opened, the first such error."""
    stores, wrong = _stores(cache)
    found = [store for store in stores if matches(store)]
    if not found and wrong:
        raise wrong[0]
    return found


def find(cache: Location, settings: Json) -> list[Store]:
    """All stores of a cache that were asked for with just these settings."""
    return _matching(cache, lambda store: store.manifest.settings == settings)


def find_fingerprint(cache: Location, fingerprint: str) -> Store:
    """The store with this fingerprint; a UserError where there is none."""
    found = _matching(cache, lambda store: store.manifest.fingerprint == fingerprint)
    if not found:
        raise UserError(f"no store in {cache} has the fingerprint {fingerprint[:12]}: harvest it again or set cache=")
    return found[0]


def pick(stores: Sequence[Store]) -> Store:
    """The one store of `stores` (at least one); a UserError lists several, for nothing is guessed."""
    assert stores, "no store to pick from"
    if len(stores) > 1:
        names = ", ".join(str(store.path) for store in stores)
        raise UserError(f"{len(stores)} stores match these settings ({names}): choose one with store=<path>")
    return stores[0]

"""Find the stores of a cache: by the settings they were asked for with, by name, by fingerprint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from data.base.errors import UserError, to_sentence
from data.base.location import Location, parse_location
from data.base.records import Json
from data.storage.open import open_storage
from data.store.manifest import normalised
from data.store.store import Store

CACHE = Path("outputs/cache")  # where harvests put stores unless they are told otherwise


def _stores(cache: Location) -> tuple[list[Store], list[UserError]]:
    """Open all stores of a cache folder by name, return them and what is wrong with those that cannot be opened."""
    found, wrong = [], []
    for path in (cache / name for name in open_storage(cache).folders()):
        # Folders of other programs, and what is left of a removed store, are not worth a message.
        if open_storage(path).size("manifest.json") is None:
            continue
        try:
            found.append(Store.open(path))
        # One damaged neighbour must not keep others from being found; it is named only if nothing else matches.
        except UserError as error:
            wrong.append(error)
        except OSError as error:  # a neighbour that cannot be read
            wrong.append(UserError(to_sentence(error) or f"{path} cannot be opened ({error}): remove or repair it"))
    return found, wrong


def _matching(cache: Location, matches: Callable[[Store], bool]) -> list[Store]:
    """Choose the stores that match; where none does but some could not be opened, the first such error."""
    stores, wrong = _stores(cache)
    found = [store for store in stores if matches(store)]
    if not found and wrong:
        raise wrong[0]
    return found


def find(cache: Location, settings: Json, defaults: Mapping[str, object] | None = None) -> list[Store]:
    """Find all stores of a cache that were asked for with just these settings.

    Nulls and defaults do not count (`manifest.normalised`), so that a setting that was added since finds older stores.
    defaults: {dotted name: value} in place of `manifest.DEFAULTS`.
    """
    wanted = normalised(settings, defaults)
    return _matching(cache, lambda store: normalised(store.manifest.settings, defaults) == wanted)


def find_fingerprint(cache: Location, fingerprint: str) -> Store:
    """Find the store with this fingerprint; a UserError where there is none."""
    stores = _matching(cache, lambda store: store.manifest.fingerprint == fingerprint)
    if not stores:
        raise UserError(f"no store in {cache} has the fingerprint {fingerprint[:12]}: harvest it again or set cache=")
    return stores[0]


def open_store(name: str | Location, cache: str | Location = CACHE) -> Store:
    """Open the store in a folder or at a URL, or the one in `cache` whose folder's name is, or begins with, `name`.

    A UserError lists several of that beginning, or says what is there where none is of it.
    """
    location = parse_location(name)
    cache = parse_location(cache)
    # A bare word is a name in the cache, unless a store lies at just that path.
    if not isinstance(location, Path) or len(location.parts) != 1 or (location / "manifest.json").is_file():
        return Store.open(location)
    folders = [folder for folder in open_storage(cache).folders() if folder.startswith(str(name))]
    # Before prefixes: one store's whole name may begin another's.
    if str(name) in folders:
        return Store.open(cache / str(name))
    stores = [folder for folder in folders if open_storage(cache / folder).size("manifest.json") is not None]
    if len(stores) == 1:
        return Store.open(cache / stores[0])
    if stores:
        raise UserError(
            f"{len(stores)} stores in {cache} begin with {name} ({', '.join(stores)}): give more of the name"
        )
    if location.exists():
        return Store.open(location)  # which says what is wrong with it
    raise UserError(
        f"no store in {cache} has a name that begins with {name}: `python -m data list {cache}` shows what there is, "
        "or give the path of a folder"
    )


def pick(stores: Sequence[Store]) -> Store:
    """Choose the one store of `stores` (at least one); a UserError lists several, for nothing is guessed."""
    assert stores, "no store to pick from"
    if len(stores) > 1:
        names = ", ".join(str(store.path) for store in stores)
        raise UserError(f"{len(stores)} stores match these settings ({names}): choose one with store=<name or path>")
    return stores[0]

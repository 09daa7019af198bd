"""Stores and files that nothing needs any more: shown with their sizes, removed only when told to."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.base.errors import UserError
from data.base.files import format_bytes
from data.base.location import Location
from data.storage.base import MANIFEST
from data.storage.open import open_storage
from data.store.files import chunk_keys, is_store, leftovers
from data.store.token_store import DESCRIPTION
from data.tools.inventory import DAMAGED, UNFINISHED, Entry, entries
from data.tools.tokens import stores_of, token_entries, token_leftovers


@dataclass(frozen=True)
class Candidate:
    """A store (no `files`), or what is left over in one, that may be removed.

    first: the file that is written first and removed last.
    """

    path: Location
    why: str
    bytes: int
    files: tuple[str, ...] = ()
    first: str = MANIFEST

    def __str__(self) -> str:
        what = f"{len(self.files)} files in {self.path}" if self.files else str(self.path)
        return f"{what}  {self.why}, {format_bytes(self.bytes)}"

    def remove(self) -> None:
        place = open_storage(self.path, self.first)
        if self.files:
            place.remove(self.files)
        else:
            place.remove_all()


def references(outputs: Path) -> set[str]:
    """Return the fingerprints that SAEs below a folder name;
    a UserError where one cannot be read, for nothing is guessed."""
    if not outputs.is_dir():
        raise UserError(f"{outputs} is no folder: name with --outputs where the trained SAEs are")
    found: set[object] = set()
    for at, folders, names in os.walk(outputs, onerror=_refuse):
        if is_store(Path(at)):
            folders.clear()
            continue
        for name in {"config.json", "run.json"}.intersection(names):  # of an SAE, and of its training, ended or not
            record = _object(Path(at) / name)
            run = record.get("numbers")
            found.update((record.get("fingerprint"), run.get("store") if isinstance(run, dict) else None))
    return {fingerprint for fingerprint in found if isinstance(fingerprint, str)}


def _refuse(error: OSError) -> None:
    raise error  # what cannot be looked into may need any store


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        raise UserError(f"{path} cannot be read, so what it needs is unknown: fix or remove it") from None
    return found if isinstance(found, dict) else {}


def _leftovers(entry: Entry) -> list[Candidate]:
    assert entry.store is not None
    sizes = entry.store.storage.sizes()
    names = leftovers(sizes, chunk_keys(entry.store))
    return [Candidate(entry.path, "left over", sum(sizes[name] for name in names), tuple(names))] if names else []


def candidates(folder: Location, outputs: Path, idle_minutes: float) -> tuple[list[Candidate], list[str]]:
    """Find what may go, and why other stores were not considered."""
    needed, found, spared = references(outputs), list[Candidate](), []
    for entry in entries(folder):
        if entry.state == DAMAGED or entry.store is None:
            spared.append(f"{entry.line}: whether it is needed cannot be read ({entry.wrong})")
        elif isinstance(entry.path, Path) and entry.path.is_symlink():
            spared.append(f"{entry.line}: a link")
        elif open_storage(entry.path).seconds_since_write() < 60 * idle_minutes:
            spared.append(f"{entry.line}: written to in the last {idle_minutes:g} minutes")
        elif entry.store.manifest.fingerprint in needed:
            found += _leftovers(entry)
        else:
            why = f"unfinished and no SAE in {outputs} is of it"
            why = why if entry.state == UNFINISHED else f"no SAE in {outputs} is of it"
            found.append(Candidate(entry.path, why, entry.bytes))
    _token_candidates(folder, idle_minutes, found, spared)
    return found, spared


def _token_candidates(folder: Location, idle_minutes: float, found: list[Candidate], spared: list[str]) -> None:
    """Add the stores of tokens that no store of activations beside them is cut from, and what is left over in others.

    A store of activations may be extended as long as it is there, so its tokens stay.
    """
    for entry in token_entries(folder):
        try:
            stores = stores_of(entry)
        except UserError as error:
            spared.append(f"{entry.line}: whether it is needed cannot be read ({error})")
            continue
        if entry.store is None:
            spared.append(f"{entry.line}: whether it is needed cannot be read ({entry.wrong})")
        elif open_storage(entry.path).seconds_since_write() < 60 * idle_minutes:
            spared.append(f"{entry.line}: written to in the last {idle_minutes:g} minutes")
        elif not stores:
            why = f"no store in {entry.cache} is of its text"
            found.append(Candidate(entry.path, why, entry.bytes, first=DESCRIPTION))
        elif names := token_leftovers(entry.store):
            sizes = entry.store.storage.sizes()
            size = sum(sizes.get(name, 0) for name in names)
            found.append(Candidate(entry.path, "left over", size, tuple(names), DESCRIPTION))


def collect_garbage(
    folder: Location, outputs: Path, idle_minutes: float, confirm: Callable[[Candidate], bool] | None
) -> list[str]:
    """Remove what `confirm` agrees to, each after it was shown; with None, only show. Returns the summary."""
    found, spared = candidates(folder, outputs, idle_minutes)
    for line in spared:
        print(f"left alone: {line}")
    for candidate in found:
        print(f"may go: {candidate}", flush=True)
    if not found:
        return ["nothing to remove"]
    if confirm is None:
        room = format_bytes(sum(candidate.bytes for candidate in found))
        return [f"nothing was removed ({room} may go): run it in a terminal, or with --yes"]
    gone = [candidate for candidate in found if confirm(candidate)]
    for candidate in gone:
        candidate.remove()
    return [f"removed {len(gone)} of {len(found)}, {format_bytes(sum(c.bytes for c in gone))}"]

"""Stores and files that nothing needs any more: shown with their sizes, removed only when told to."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.base.errors import UserError
from data.base.files import format_bytes
from data.base.location import Location
from data.storage.base import MANIFEST
from data.storage.open import open_storage
from data.store.files import chunk_keys, leftovers
from data.store.token_store import DESCRIPTION
from data.tools.inventory import DAMAGED, UNFINISHED, Entry, entries
from data.tools.tokens import stores_of, token_entries, token_leftovers
from data.tools.trained import checkpoint_files, trainings


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
    """Return the fingerprints that trainings below a folder name;
    a UserError where one cannot be read, for nothing is guessed."""
    return {fingerprint for training in trainings(outputs) for fingerprint in training.fingerprints}


def old_checkpoints(outputs: Path, idle_minutes: float) -> list[Candidate]:
    """Find the checkpoints of trainings that have ended, from which nothing goes on any more; none of the last
    `idle_minutes`."""
    since = time.time() - 60 * idle_minutes
    paths = [path for training in trainings(outputs) if training.ended for path in checkpoint_files(training.folder)]
    old = [path for path in paths if path.stat().st_mtime <= since]
    total = sum(path.stat().st_size for path in old)
    names = tuple(path.relative_to(outputs).as_posix() for path in old)
    return [Candidate(outputs, "checkpoints of trainings that have ended", total, names)] if names else []


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
    return found + old_checkpoints(outputs, idle_minutes), spared


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

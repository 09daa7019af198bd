"""What stores there are below a folder, and what made them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.base.errors import UserError, to_sentence
from data.base.files import format_bytes
from data.base.location import Location
from data.base.records import canonical, flatten
from data.storage.open import open_storage
from data.store.files import SPLITS, arrays, extent, stores_below
from data.store.store import Store
from data.tools.trained import Training, trainings

MOST_SAES = 20  # of a store that are listed one by one
COMPLETE, UNFINISHED, DAMAGED = "complete", "unfinished", "damaged"


@dataclass(frozen=True)
class Entry:
    """One store folder. `store` is None, and `wrong` says why, where it cannot be read."""

    path: Location
    bytes: int
    state: str
    store: Store | None = None
    wrong: str = ""

    @classmethod
    def of(cls, path: Location) -> Entry:
        total = sum(open_storage(path).sizes().values())
        try:
            store = Store.open(path)
            whole = store.complete is not None and store.complete == extent(store)
            return cls(path, total, COMPLETE if whole else UNFINISHED, store)
        except (UserError, OSError) as error:
            return cls(path, total, DAMAGED, wrong=to_sentence(error) or str(error))

    @property
    def line(self) -> str:
        return f"{self.path}  {self.state}, {format_bytes(self.bytes)}"


def entries(folder: Location) -> list[Entry]:
    """Find every store at or below a folder."""
    return [Entry.of(path) for path in stores_below(folder)]


def makers_of(store: Store) -> Counter[str]:
    """Count how many commit records each kind of device and set of libraries made;
    more than one kind: the store is mixed."""
    found = Counter[str]()
    for split in SPLITS:
        for site in arrays(store, split):
            for commit in store.committed(split, site).values():
                found[", ".join(f"{name} {value}" for name, value in flatten(commit.made_by).items())] += 1
    return found


def describe_entry(entry: Entry) -> list[str]:
    """Describe an entry in a few lines."""
    if entry.store is None:
        return [entry.line, f"  {entry.wrong}"]
    asked = flatten(entry.store.manifest.settings)
    settings = (
        f"{name}={value if isinstance(value, str) else canonical(value)}" for name, value in sorted(asked.items())
    )
    rows = (
        f"{split} {site} {count:,} rows"
        for split, sites in extent(entry.store).items()
        for site, count in sites.items()
    )
    makers = makers_of(entry.store)
    mixed = "mixed: " if len(makers) > 1 else "made by "
    return [
        entry.line,
        f"  {' '.join(settings)}",
        f"  {'; '.join(rows) or 'no rows yet'}",
        *([f"  {mixed}{'; '.join(makers)}"] if makers else []),
    ]


def listing(folder: Location, outputs: Path) -> list[str]:
    """List all stores below a folder, each with the SAEs trained from it, in lines for people; then what the trainings
    below `outputs` take, which may be no folder yet."""
    found = entries(folder)
    trained = list(trainings(outputs)) if outputs.is_dir() else []
    total = sum(entry.bytes for entry in found)
    lines = [line for entry in found for line in [*describe_entry(entry), *_saes_of(entry, trained)]]
    lines.append(f"{len(found)} store{'' if len(found) == 1 else 's'}, {format_bytes(total)}")
    return [*lines, *_disk_of(trained, outputs)]


def dependents(entry: Entry, trained: Sequence[Training]) -> list[Training]:
    """Return the trainings of a store."""
    fingerprint = entry.store.manifest.fingerprint if entry.store else None
    return [training for training in trained if fingerprint in training.fingerprints]


def _saes_of(entry: Entry, trained: Sequence[Training]) -> list[str]:
    own = dependents(entry, trained)
    lines = [f"  {describe_training(training)}" for training in own[:MOST_SAES]]
    return lines + ([f"  and {len(own) - MOST_SAES} more trainings"] if len(own) > MOST_SAES else [])


def describe_training(training: Training) -> str:
    """Describe a training in a line: its SAE, or how far it is."""
    what = f"SAE {training.variant}".rstrip() if training.ended else "training that has not ended"
    sizes = [f"{format_bytes(training.weights)}"] if training.weights else []
    sizes += [f"checkpoint {format_bytes(training.checkpoint)}"] if training.checkpoint else []
    return f"{what}  {training.folder}" + (f"  {', '.join(sizes)}" if sizes else "")


def _disk_of(trained: Sequence[Training], outputs: Path) -> list[str]:
    if not trained:
        return []
    ended = [training for training in trained if training.ended]
    lines = [f"{len(ended)} SAE{'' if len(ended) == 1 else 's'} in {outputs}, {_sum(t.weights for t in ended)}"]
    old = _sum(training.checkpoint for training in ended)
    if any(training.checkpoint for training in ended):
        lines.append(f"checkpoints of trainings that have ended: {old} (python -m data gc removes those an hour old)")
    if any(not training.ended and training.checkpoint for training in trained):
        going = _sum(training.checkpoint for training in trained if not training.ended)
        lines.append(f"checkpoints of trainings that go on from them: {going}")
    return lines


def _sum(sizes: Iterable[int]) -> str:
    return format_bytes(sum(sizes))

"""What stores there are below a folder, and what made them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from data.base.errors import UserError, to_sentence
from data.base.files import format_bytes
from data.base.location import Location
from data.base.records import canonical, flatten
from data.storage.open import open_storage
from data.store.files import SPLITS, arrays, extent, stores_below
from data.store.store import Store

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


def listing(folder: Location) -> list[str]:
    """List all stores below a folder in lines for people."""
    found = entries(folder)
    total = sum(entry.bytes for entry in found)
    lines = [line for entry in found for line in describe_entry(entry)]
    return [*lines, f"{len(found)} store{'' if len(found) == 1 else 's'}, {format_bytes(total)}"]

"""What is left to do: the units a text makes, less those committed. No torch here.

A unit is a fixed range of a split's contexts, the same whatever was asked for before it or with it, so that what is
committed never has to be made again. Where the text ends, the last unit is shorter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, takewhile

import numpy as np

from data.base.errors import UserError
from data.base.records import Json, diff_fields
from data.base.sites import Site
from data.store.files import extent
from data.store.layout import Layout
from data.store.manifest import HELDOUT, TRAIN
from data.store.store import ORIGIN, TOKENS, Store
from harvest.packing import PackedText

INDEX_WIDTHS = {TOKENS: 1, ORIGIN: 2}  # what each row is, in int32 values


@dataclass(frozen=True)
class Unit:
    """What is left to do of one unit: the `sites` and `index_arrays` (tokens, origin) that have no commit record."""

    split: str
    index: int
    contexts: slice
    rows: int
    sites: tuple[str, ...]
    index_arrays: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.sites, *self.index_arrays)

    def left(self, store: Store) -> Unit:
        """Return the plan less what has been committed since."""
        left = {name for name in self.names if not store.is_committed(self.split, self.index, name)}
        return replace(
            self,
            sites=tuple(site for site in self.sites if site in left),
            index_arrays=tuple(name for name in self.index_arrays if name in left),
        )

    def bytes(self, widths: Mapping[str, int], layout: Layout) -> int:
        """Return the size on disk before any codec: whole chunks, the last one's tail included."""
        stored = -(-self.rows // layout.chunk_rows) * layout.chunk_rows
        values = sum(layout.row_bytes(widths[site]) for site in self.sites)
        return stored * (values + sum(INDEX_WIDTHS[name] for name in self.index_arrays) * np.dtype(np.int32).itemsize)


def plan(store: Store | None, layout: Layout, packed: Mapping[str, PackedText], sites: Sequence[Site]) -> list[Unit]:
    """Plan the units of `packed` with anything not yet committed in `store` (None: a store yet to be made), in order.

    The splits take turns in proportion to their sizes, so that a harvest that is broken off has rows of each.
    """
    ranked: list[tuple[float, Unit]] = []
    names = [*map(str, sites), *INDEX_WIDTHS]
    for split, text in packed.items():
        done = {name: set(store.committed(split, name)) if store else set() for name in names}
        n_units = -(-len(text.contexts) // layout.contexts_per_unit)
        for index in range(n_units):
            contexts = slice(index * layout.contexts_per_unit, (index + 1) * layout.contexts_per_unit)
            left = [name for name in names if index not in done[name]]
            if left:
                index_arrays = tuple(name for name in left if name in INDEX_WIDTHS)
                rows = text.rows(contexts)
                unit = Unit(split, index, contexts, rows, tuple(n for n in left if n not in index_arrays), index_arrays)
                # By its share of the split: both splits are then begun early and end together.
                ranked.append((index / n_units, unit))
    return [unit for _, unit in sorted(ranked, key=lambda one: one[0])]


def covered(store: Store, sites: Sequence[Site], rows: Mapping[str, int]) -> bool:
    """Return whether the committed units, without a gap, hold the `rows` asked of each split at every site."""
    for split, wanted in rows.items():
        for name in [*map(str, sites), *INDEX_WIDTHS]:
            commits = store.committed(split, name)
            # Rows behind a gap do not count: `tokens` asks for the first rows of the text.
            if sum(commits[index].rows for index in takewhile(commits.__contains__, count())) < wanted:
                return False
    return True


def refuse_mixed(store: Store, mine: Json) -> None:
    """Raise UserError where a unit of the store was made, or is being made, on another device or by other versions."""
    # Claims first: a unit that is committed in between is then seen at least once.
    makers = [owner["made_by"] for owner in store.leases.owners()]
    for split in (TRAIN, HELDOUT):
        for site in store.sites(split):
            makers += [commit.made_by for commit in store.committed(split, site).values()]
    for made_by in makers:
        if fields := diff_fields(made_by, mine):
            raise UserError(
                f"{store.path} was begun elsewhere ({'; '.join(fields)}) and the bits may differ: "
                "go on there, or set allow_mixed_devices=true"
            )


def finish(store: Store) -> None:
    """Write complete.json once all that was asked for is committed, and remove what killed processes left."""
    if store.leases.any():
        store.leases.sweep(store.is_committed)
    if store.complete != extent(store):  # looked at first, as a folder that can only be read gives no lock
        store.mark_complete(lambda: extent(store))

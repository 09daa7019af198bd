"""Small stores whose every row says which row it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from data.store.layout import Layout
from data.store.manifest import TRAIN, Manifest
from data.store.store import Store

SITE = "resid_post.1"


def manifest(dtype: str = "bfloat16", name: str = "tiny", **identity: object) -> Manifest:
    layout = Layout(dtype, context=8, chunk_rows=4, chunks_per_unit=4, mixing_seed=3)
    settings = {"model": {"name": name}, "text": {"files": "a.txt"}, "packing": {"context": 8}}
    return Manifest({"format": 1, "layout": asdict(layout), **identity}, settings, name, d_model=3)


def numbered(ids: NDArray[np.int64], dtype: str) -> NDArray[np.generic]:
    """Rows of width 3 from which `ids_of` reads the ids back; as bits all are finite bfloat16."""
    digits = np.stack([ids % 1000, ids // 1000 % 1000, ids % 7], 1)
    return digits.astype(np.uint16 if dtype == "bfloat16" else dtype)


def ids_of(rows: NDArray[np.generic]) -> NDArray[np.int64]:
    return rows[:, 0].astype(np.int64) + 1000 * rows[:, 1].astype(np.int64)


Build = Callable[..., Store]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Make a store with units of so many rows, ids counting up over all of them."""

    def make(units: Sequence[int], dtype: str = "bfloat16", model: str | None = None, **layout: int) -> Store:
        base = manifest(dtype)
        identity: dict[str, object] = {"layout": asdict(replace(base.layout, **layout)), "units": list(units)}
        base = replace(base, identity=identity if model is None else identity | {"model": model})
        store = Store.create_or_open(tmp_path, base)
        store.require(TRAIN, SITE, 3, max(1, len(units)) * store.layout.unit_rows)
        begin = 0
        for unit, rows in enumerate(units):
            store.write(TRAIN, unit, SITE, numbered(np.arange(begin, begin + rows), dtype), {"device": "cpu"})
            begin += rows
        return store

    return make

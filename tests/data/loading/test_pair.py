"""Two sites read as one: row i of both is the same token, whatever the order, and each file is read once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.loading.epoch import bits
from data.loading.loader import ActivationLoader
from data.loading.pair import PairReader
from data.loading.reader import open_reader
from data.store.manifest import TRAIN
from data.store.store import Store
from tests.data.conftest import SITE, Build, numbered

SECOND = "mlp_out.1"
UNITS = [16, 9, 3, 16]  # rows; chunks of 4


def two_sites(build: Build, second: Sequence[int] = range(len(UNITS)), **layout: int) -> Store:
    """Rows of both sites say which row they are; a unit's are permuted alike. The second has only some of the units."""
    store = build([], **layout)
    begins = np.cumsum(UNITS) - UNITS
    for site in (SITE, SECOND):
        store.require(TRAIN, site, 3, len(UNITS) * store.layout.unit_rows)
        for unit, rows in enumerate(UNITS):
            order = np.random.default_rng(unit).permutation(rows)
            native = numbered(begins[unit] + np.arange(rows), "bfloat16")
            if site == SITE or unit in second:
                store.write(TRAIN, unit, site, native, {}, order)
    return store


def pair_of(store: Store) -> PairReader:
    return PairReader(open_reader(store, TRAIN, SITE), open_reader(store, TRAIN, SECOND))


@pytest.fixture
def reader(build: Build) -> PairReader:
    return pair_of(two_sites(build))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 9),
    pool_chunks=st.integers(1, 6),
    seed=st.integers(0, 5),
    world=st.integers(1, 2),
    source=st.sampled_from([{}, {"preload": True}, {"device": torch.device("cpu")}]),
)
def test_row_i_of_both_is_the_same_token(
    reader: PairReader, batch: int, pool_chunks: int, seed: int, world: int, source: dict[str, Any]
) -> None:
    """In every batch; and the order is the one in which a loader of the first site alone gives its rows."""
    order = {"batch": batch, "pool_chunks": pool_chunks, "seed": seed, "world": world}
    for rank in range(world):
        both = list(ActivationLoader(reader, rank=rank, **source, **order))
        first = list(ActivationLoader(reader.first, rank=rank, **order))
        assert len(both) == len(first)
        for rows, alone in zip(both, first, strict=True):
            np.testing.assert_array_equal(bits(rows)[:, :3], bits(rows)[:, 3:])
            np.testing.assert_array_equal(bits(rows)[:, :3], bits(alone))


def test_parts_of_a_chunk_are_read(reader: PairReader) -> None:
    for start in range(5):
        for room in range(6):
            out = np.full((room, 6), 77, np.uint16)
            reader.read(1, out, start)
            filled = min(room, 4 - start)
            np.testing.assert_array_equal(out[:filled, :3], out[:filled, 3:])
            assert (out[filled:] == 77).all() and (out[:filled] != 77).any(1).all()


def test_each_sites_bytes_are_read_once(reader: PairReader) -> None:
    assert sum(len(batch) for batch in ActivationLoader(reader, batch=4)) == 44
    assert reader.bytes_read == 2 * 44 * 3 * 2


@pytest.mark.parametrize(
    ("units", "rows"), [((0, 1), 25), ((0, 2, 3), 16), ((1, 2, 3), 0)], ids=["fewer", "a hole", "a hole at the start"]
)
def test_chunks_are_taken_as_far_as_both_sites_have_them(build: Build, units: tuple[int, ...], rows: int) -> None:
    """As where a site was added by a harvest that is still running: rows after a hole would be of other tokens."""
    assert int(pair_of(two_sites(build, units)).sizes.sum()) == rows

"""Sites read as one: row i of all is the same token, whatever the order, and each file is read once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.base.errors import UserError
from data.loading.epoch import bits
from data.loading.joined import JoinedReader
from data.loading.loader import ActivationLoader
from data.loading.reader import open_reader
from data.loading.same_tokens import require_same_tokens
from data.store.manifest import TRAIN
from data.store.store import TOKENS, Store
from tests.data.conftest import SITE, Build, numbered

SECOND, THIRD = "mlp_out.1", "resid_post.7"
UNITS = [16, 9, 3, 16]  # rows; chunks of 4


def sites_of(build: Build, second: Sequence[int] = range(len(UNITS)), odd_token: int = 21, **others: Any) -> Store:
    """Rows of all sites say which row they are; a unit's are permuted alike. The second has only some of the units."""
    store = build([], **others)
    begins = np.cumsum(UNITS) - UNITS
    for site in (SITE, SECOND, THIRD, TOKENS):
        store.require(TRAIN, site, 1 if site == TOKENS else 3, len(UNITS) * store.layout.unit_rows)
        for unit, rows in enumerate(UNITS):
            order = np.random.default_rng(unit).permutation(rows)
            native = numbered(begins[unit] + np.arange(rows), "bfloat16")
            if site == TOKENS:
                ids = (begins[unit] + np.arange(rows)).astype(np.int32)
                store.write(TRAIN, unit, site, np.where(ids == 21, odd_token, ids).astype(np.int32), {}, order)
            elif site != SECOND or unit in second:
                store.write(TRAIN, unit, site, native, {}, order)
    return store


def joined(*places: tuple[Store, str]) -> JoinedReader:
    return JoinedReader(*(open_reader(store, TRAIN, site) for store, site in places))


def pair_of(store: Store) -> JoinedReader:
    return joined((store, SITE), (store, SECOND))


@pytest.fixture
def reader(build: Build) -> JoinedReader:
    return pair_of(sites_of(build))


@pytest.fixture
def store(build: Build) -> Store:
    return sites_of(build)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=40)
@given(
    batch=st.integers(1, 9),
    pool_chunks=st.integers(1, 6),
    seed=st.integers(0, 5),
    world=st.integers(1, 2),
    source=st.sampled_from([{}, {"preload": True}, {"device": torch.device("cpu")}]),
    sites=st.sampled_from([(SITE, SECOND), (SITE, THIRD, SECOND), (SECOND, SITE, THIRD, SITE), (SITE,)]),
)
def test_row_i_of_all_is_the_same_token(
    store: Store,
    batch: int,
    pool_chunks: int,
    seed: int,
    world: int,
    source: dict[str, Any],
    sites: tuple[str, ...],
) -> None:
    """In every batch; and the order is the one in which a loader of the first site alone gives its rows."""
    reader = joined(*((store, site) for site in sites))
    order = {"batch": batch, "pool_chunks": pool_chunks, "seed": seed, "world": world}
    for rank in range(world):
        both = list(ActivationLoader(reader, rank=rank, **source, **order))
        first = list(ActivationLoader(reader.readers[0], rank=rank, **order))
        assert len(both) == len(first)
        for rows, alone in zip(both, first, strict=True):
            np.testing.assert_array_equal(bits(rows), np.tile(bits(alone), len(sites)))


def test_parts_of_a_chunk_are_read(reader: JoinedReader) -> None:
    for start in range(5):
        for room in range(6):
            out = np.full((room, 6), 77, np.uint16)
            reader.read(1, out, start)
            filled = min(room, 4 - start)
            np.testing.assert_array_equal(out[:filled, :3], out[:filled, 3:])
            assert (out[filled:] == 77).all() and (out[:filled] != 77).any(1).all()


def test_each_sites_bytes_are_read_once(reader: JoinedReader) -> None:
    assert sum(len(batch) for batch in ActivationLoader(reader, batch=4)) == 44
    assert reader.bytes_read == 2 * 44 * 3 * 2


@pytest.mark.parametrize(
    ("units", "rows"), [((0, 1), 25), ((0, 2, 3), 16), ((1, 2, 3), 0)], ids=["fewer", "a hole", "a hole at the start"]
)
def test_chunks_are_taken_as_far_as_both_sites_have_them(build: Build, units: tuple[int, ...], rows: int) -> None:
    """As where a site was added by a harvest that is still running: rows after a hole would be of other tokens."""
    assert int(pair_of(sites_of(build, units)).sizes.sum()) == rows


def test_sites_of_two_stores_are_joined_where_their_tokens_are_equal(build: Build) -> None:
    first, second = sites_of(build), sites_of(build, model="tuned")
    assert first.path != second.path
    require_same_tokens(first, second, TRAIN)
    for rows in ActivationLoader(joined((first, SITE), (second, THIRD)), batch=4):
        np.testing.assert_array_equal(bits(rows)[:, :3], bits(rows)[:, 3:])


def test_stores_of_other_tokens_or_another_layout_are_refused(build: Build) -> None:
    """One token of 44 differs, in the second unit, which begins with chunk 4."""
    first = sites_of(build)
    with pytest.raises(UserError, match=r"hold different tokens in chunk [456] of train: sites of several stores need"):
        require_same_tokens(first, sites_of(build, odd_token=22, model="tuned"), TRAIN)
    with pytest.raises(UserError, match="lay their rows out differently"):
        require_same_tokens(first, sites_of(build, mixing_seed=9), TRAIN)

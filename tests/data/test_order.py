from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import order
from data.errors import UserError

sizes_st = st.lists(st.integers(0, 9), min_size=1, max_size=24).map(lambda x: np.array(x, np.int64))


def rows_of(sizes: np.ndarray, pools: list[order.Pool]) -> list[tuple[int, int]]:
    """(chunk, row in chunk) of every row of the pools, unpermuted."""
    return [
        (int(chunk), row)
        for pool in pools
        for chunk, start, stop in zip(pool.chunks, pool.starts, pool.stops, strict=True)
        for row in range(start, stop)
    ]


@given(st.integers(0, 3000), st.integers(), st.text(max_size=5))
def test_a_seeded_permutation_is_one(n: int, seed: int, word: str) -> None:
    first = order.seeded_permutation(n, word, seed)
    assert sorted(first.tolist()) == list(range(n))
    np.testing.assert_array_equal(first, order.seeded_permutation(n, word, seed))


def test_permutations_never_change() -> None:
    # Written down once: a store's rows and a training's order must be the same on every machine and numpy.
    assert order.seeded_permutation(10, "mixing", 0, "train", 1).tolist() == [5, 7, 6, 8, 2, 3, 4, 9, 0, 1]
    assert order.seeded_permutation(10, "pool", 1, 2, 3, 4).tolist() == [5, 6, 9, 7, 0, 8, 1, 2, 4, 3]


@pytest.mark.parametrize("a, b", [((0, 1), (0, 2)), ((0, 1), (1, 0)), ((1,), (1, 0)), (("train", 0), ("heldout", 0))])
def test_other_keys_give_other_permutations(a: tuple[int | str, ...], b: tuple[int | str, ...]) -> None:
    assert (order.seeded_permutation(200, *a) != order.seeded_permutation(200, *b)).mean() > 0.9


def test_every_pool_of_every_rank_has_its_own_permutation() -> None:
    base = {"seed": 0, "epoch": 0, "rank": 0, "index": 0}
    keys = [base, *(base | {name: 1} for name in base)]
    assert len({tuple(order.pool_permutation(50, **key)) for key in keys}) == len(keys)


def test_permutations_are_uniform() -> None:
    counts = np.zeros((6, 6))
    for seed in range(3000):
        counts[np.arange(6), order.seeded_permutation(6, seed)] += 1
    # chi-squared with 25 degrees of freedom: above 52.6 once in a thousand
    assert ((counts - 500) ** 2 / 500).sum() < 52.6


@given(
    sizes=sizes_st,
    seed=st.integers(0, 99),
    epoch=st.integers(0, 3),
    world=st.integers(1, 5),
    k=st.integers(1, 7),
    shuffle=st.booleans(),
)
def test_every_row_exactly_once_over_the_ranks(
    sizes: np.ndarray, seed: int, epoch: int, world: int, k: int, shuffle: bool
) -> None:
    settings = {"seed": seed, "epoch": epoch, "world": world, "pool_chunks": k, "shuffle": shuffle}
    parts = [rows_of(sizes, order.pools(sizes, rank=rank, **settings)) for rank in range(world)]
    expected = {(chunk, row) for chunk, size in enumerate(sizes) for row in range(size)}
    together = [row for part in parts for row in part]
    assert len(together) == len(expected) and set(together) == expected
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    order.check(sizes, **settings)


@given(sizes=sizes_st, k=st.integers(1, 7), world=st.integers(1, 3))
def test_pools_are_full_but_for_the_last(sizes: np.ndarray, k: int, world: int) -> None:
    found = order.pools(sizes, seed=0, epoch=0, rank=0, world=world, pool_chunks=k)
    assert [len(pool.chunks) for pool in found[:-1]] == [k] * (len(found) - 1)
    assert [pool.index for pool in found] == list(range(len(found)))
    assert all(pool.rows > 0 for pool in found)


def test_check_sees_a_row_that_comes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = np.array([0, 0, 2, 3], np.int64)
    monkeypatch.setattr(order, "pool_permutation", lambda rows, **_: wrong)
    with pytest.raises(AssertionError, match="2 rows"):
        order.check(np.array([4]), seed=0, epoch=0, world=1, pool_chunks=1)


def test_epochs_and_seeds_differ_and_unshuffled_ones_do_not() -> None:
    sizes = np.full(64, 4)
    place = {"rank": 0, "world": 1, "pool_chunks": 64}
    runs = [(0, 0, True), (0, 1, True), (1, 0, True)]
    orders = {tuple(order.pools(sizes, seed=s, epoch=e, shuffle=m, **place)[0].chunks) for s, e, m in runs}
    assert len(orders) == 3
    plain = order.pools(sizes, seed=5, epoch=1, shuffle=False, **place)[0]
    assert plain.chunks.tolist() == list(range(64))


@given(sizes=sizes_st, seed=st.integers(0, 99), share=st.floats(0, 1))
def test_reserved_chunks_hold_enough_and_no_more_than_needed(sizes: np.ndarray, seed: int, share: float) -> None:
    rows = int(share * sizes.sum())
    try:
        training, reserved = order.reserve(sizes, rows, seed)
    except UserError:
        # Refused only where the chunks left could all be needed: nothing would be left to train on.
        assert rows + sizes.max() > sizes.sum() or rows == 0
        return
    assert sorted([*training, *reserved]) == list(range(len(sizes)))
    assert len(training) and sizes[reserved].sum() >= rows
    assert rows == 0 or sizes[reserved].sum() - rows < sizes.max()


def test_reserve_names_what_is_short() -> None:
    with pytest.raises(UserError, match=r"20 rows .* holds 20 rows in 2 chunks"):
        order.reserve(np.array([10, 10]), 20, 0)


@pytest.mark.parametrize(
    "rows, batch, world, drop_last, expected",
    [(10, 5, 1, True, 2), (11, 5, 1, True, 2), (11, 5, 1, False, 3), (11, 5, 2, True, 1), (3, 5, 1, True, 0)],
)
def test_batches_per_epoch(rows: int, batch: int, world: int, drop_last: bool, expected: int) -> None:
    assert order.batches_per_epoch(rows, batch=batch, world=world, drop_last=drop_last) == expected


def test_mixing_span() -> None:
    assert order.mixing_span(100, 4, 400) == pytest.approx(200.0)
    assert order.mixing_span(1000, 16, 10**12) == pytest.approx(16000.0, rel=1e-6)

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.base.errors import UserError
from data.base.seeded import seeded_permutation
from data.loading import order

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
    first = seeded_permutation(n, word, seed)
    assert sorted(first.tolist()) == list(range(n))
    np.testing.assert_array_equal(first, seeded_permutation(n, word, seed))


def test_permutations_never_change() -> None:
    # Written down once: a store's rows and a training's order must be the same on every machine and numpy.
    assert seeded_permutation(10, "mixing", 0, "train", 1).tolist() == [5, 7, 6, 8, 2, 3, 4, 9, 0, 1]
    pool = order.pools(np.array([40, 7, 33]), seed=1, epoch=2, rank=0, world=1, pool_chunks=3)[0]
    runs = order.pool_runs(pool, seed=1, epoch=2, rank=0)
    found = list(zip(pool.chunks[runs.chunks].tolist(), runs.starts.tolist(), runs.rows.tolist(), strict=True))
    assert found == [(2, 0, 4), (1, 0, 7), (0, 25, 15), (0, 0, 9), (2, 20, 13), (2, 4, 16), (0, 9, 16)]


@pytest.mark.parametrize("a, b", [((0, 1), (0, 2)), ((0, 1), (1, 0)), ((1,), (1, 0)), (("train", 0), ("heldout", 0))])
def test_other_keys_give_other_permutations(a: tuple[int | str, ...], b: tuple[int | str, ...]) -> None:
    assert (seeded_permutation(200, *a) != seeded_permutation(200, *b)).mean() > 0.9


def test_every_pool_of_every_rank_has_its_own_order() -> None:
    pools = [order.Pool(index, 0, np.arange(8), np.zeros(8, np.int64), np.full(8, 64)) for index in (0, 1)]
    places = [{"seed": 0, "epoch": 0, "rank": 0} | other for other in ({}, {"seed": 1}, {"epoch": 1}, {"rank": 1})]
    found = [order.pool_runs(pools[0], **place) for place in places] + [order.pool_runs(pools[1], **places[0])]
    assert len({tuple(runs.indices(np.arange(8) * 64)) for runs in found}) == 5


lengths_st = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 70)), min_size=1, max_size=8)


@given(lengths_st, st.integers(0, 99), st.booleans(), st.lists(st.integers(0, 99)))
def test_runs_hold_a_pool_s_rows_once_and_cutting_changes_nothing(
    lengths: list[tuple[int, int]], seed: int, shuffle: bool, at: list[int]
) -> None:
    starts, rows = np.array(lengths, np.int64).T
    pool = order.Pool(0, 0, np.arange(len(rows)), starts, starts + rows)
    begins = np.cumsum(rows) - rows - starts
    runs = order.pool_runs(pool, seed=seed, epoch=0, rank=0, shuffle=shuffle)
    found = runs.indices(begins)
    assert sorted(found.tolist()) == list(range(pool.rows))
    assert (runs.rows > 0).all() and (not shuffle or runs.rows.max() <= order.RUN_ROWS)
    borders = np.array([border for border in at if border < pool.rows], np.int64)
    cut = runs.cut(borders)
    assert (cut.rows > 0).all() and set(borders) <= {0, *np.cumsum(cut.rows).tolist()}
    np.testing.assert_array_equal(cut.indices(begins), found)


def test_a_chunk_s_runs_are_spread_evenly_and_cut_elsewhere_each_time() -> None:
    pool = order.Pool(0, 0, np.arange(4), np.zeros(4, np.int64), np.full(4, 160))
    cuts, firsts = set(), np.zeros(11)
    for epoch in range(600):
        runs = order.pool_runs(pool, seed=0, epoch=epoch, rank=0)
        cuts.add(int(runs.starts[(runs.chunks == 0) & (runs.starts > 0)].min()))
        owners = np.repeat(runs.chunks, runs.rows)
        # In every stretch of a quarter of the pool each chunk has a quarter of its rows, but for a run at either end.
        quarters = np.stack([np.bincount(owners[at : at + 160], minlength=4) for at in range(0, 640, 160)])
        assert quarters.min() >= 40 - 3 * order.RUN_ROWS and quarters.max() <= 40 + 3 * order.RUN_ROWS
        firsts[runs.starts[runs.chunks == 0][0] // order.RUN_ROWS] += 1
    assert cuts == set(range(1, 17))
    # Any run of a chunk may come first: about 57 times each of ten and a half, chi-squared with 9 degrees of freedom.
    assert ((firsts[:10] - 57) ** 2 / 57).sum() < 60


def test_permutations_are_uniform() -> None:
    counts = np.zeros((6, 6))
    for seed in range(3000):
        counts[np.arange(6), seeded_permutation(6, seed)] += 1
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
    order.check_order(sizes, **settings)


@given(sizes=sizes_st, k=st.integers(1, 7), world=st.integers(1, 3))
def test_pools_are_full_but_for_the_last(sizes: np.ndarray, k: int, world: int) -> None:
    found = order.pools(sizes, seed=0, epoch=0, rank=0, world=world, pool_chunks=k)
    assert [len(pool.chunks) for pool in found[:-1]] == [k] * (len(found) - 1)
    assert [pool.index for pool in found] == list(range(len(found)))
    assert all(pool.rows > 0 for pool in found)


def test_check_sees_a_row_that_comes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = order.Runs(np.array([0, 0]), np.array([0, 2]), np.array([3, 1]))
    monkeypatch.setattr(order, "pool_runs", lambda pool, **_: wrong)
    with pytest.raises(AssertionError, match="2 rows"):
        order.check_order(np.array([4]), seed=0, epoch=0, world=1, pool_chunks=1)


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
        training, reserved = order.split_calibration(sizes, rows, seed)
    except UserError:
        # Refused only where the chunks left could all be needed: nothing would be left to train on.
        assert rows + sizes.max() > sizes.sum() or rows == 0
        return
    assert sorted([*training, *reserved]) == list(range(len(sizes)))
    assert len(training) and sizes[reserved].sum() >= rows
    assert rows == 0 or sizes[reserved].sum() - rows < sizes.max()


def test_reserve_names_what_is_short() -> None:
    with pytest.raises(UserError, match=r"20 rows .* holds 20 rows in 2 chunks"):
        order.split_calibration(np.array([10, 10]), 20, 0)


@pytest.mark.parametrize(
    "rows, batch, world, drop_last, expected",
    [(10, 5, 1, True, 2), (11, 5, 1, True, 2), (11, 5, 1, False, 3), (11, 5, 2, True, 1), (3, 5, 1, True, 0)],
)
def test_batches_per_epoch(rows: int, batch: int, world: int, drop_last: bool, expected: int) -> None:
    assert order.batches_per_epoch(rows, batch=batch, world=world, drop_last=drop_last) == expected


def test_mixing_span() -> None:
    assert order.mixing_span(100, 4, 400) == pytest.approx(200.0)
    assert order.mixing_span(1000, 16, 10**12) == pytest.approx(16000.0, rel=1e-6)


def counts_by_batch(of: np.ndarray, batch: int, chunks: int) -> np.ndarray:
    """Rows of each chunk in each whole batch, from the chunk of each row."""
    batches = of[: len(of) // batch * batch].reshape(-1, batch)
    return np.array([np.bincount(rows, minlength=chunks) for rows in batches])


def scatter(chunks: int, batch: int, epochs: int = 8) -> tuple[float, float]:
    """The variance of a batch's rows of each chunk, over some epochs: in the module's order and in a permutation."""
    ours, permuted = [], []
    for epoch in range(epochs):
        (pool,) = order.pools(np.full(chunks, 4096), seed=0, epoch=epoch, rank=0, world=1, pool_chunks=chunks)
        runs = order.pool_runs(pool, seed=0, epoch=epoch, rank=0)
        of = np.repeat(runs.chunks, runs.rows)
        ours.append(counts_by_batch(of, batch, chunks))
        permuted.append(counts_by_batch(of[seeded_permutation(len(of), "test", epoch)], batch, chunks))
    assert np.mean(ours) == pytest.approx(batch / chunks) == np.mean(permuted)
    return float(np.var(np.concatenate(ours))), float(np.var(np.concatenate(permuted)))


@pytest.mark.parametrize(
    ("chunks", "batch", "ours", "permuted"),
    [(16, 256, 75, 15), (16, 1280, 77, 74), (16, 4096, 83, 225), (62, 1024, 85, 17)],
)
def test_scatter_of_a_batch_is_as_the_module_says(chunks: int, batch: int, ours: float, permuted: float) -> None:
    assert scatter(chunks, batch) == pytest.approx((ours, permuted), rel=0.1)


@settings(max_examples=25)
@given(chunks=st.integers(2, 24), rows_of_each=st.integers(1, 300))
def test_scatter_is_that_of_two_runs_at_any_batch_while_a_permutation_s_grows(chunks: int, rows_of_each: int) -> None:
    """So it is the smaller one from some 85 rows of a chunk in a batch on, wherever little of the pool is one batch."""
    ours, permuted = scatter(chunks, chunks * rows_of_each, epochs=4)
    assert ours < 1.3 * order.RUN_ROWS**2 / 3
    wanted = rows_of_each * (1 - 1 / chunks) * (1 - rows_of_each / 4096)
    assert permuted == pytest.approx(wanted, rel=0.35)
    if wanted > 1.6 * order.RUN_ROWS**2 / 3:
        assert ours < permuted

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.store.stats import Stats


def same(a: Stats, b: Stats) -> None:
    assert a.rows == b.rows
    np.testing.assert_allclose(a.sum, b.sum, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose([a.sum_sq, a.mean_norm, a.max_abs], [b.sum_sq, b.mean_norm, b.max_abs], rtol=1e-12)


def test_by_hand() -> None:
    stats = Stats.of(np.array([[3.0, -4.0, 0.0], [0.0, 0.0, 1.0]], np.float32))
    assert (stats.rows, stats.sum.tolist(), stats.sum_sq) == (2, [3.0, -4.0, 1.0], 26.0)
    assert (stats.mean_norm, stats.max_abs) == (3.0, 4.0)
    assert stats.mean.tolist() == [1.5, -2.0, 0.5]
    assert stats.mean_sq_norm == 13.0
    assert stats.variance == 13.0 - (2.25 + 4.0 + 0.25)


@given(seed=st.integers(0, 2**32), cuts=st.lists(st.integers(0, 2500), max_size=4))
def test_parts_merge_to_the_whole(seed: int, cuts: list[int]) -> None:
    x = np.random.default_rng(seed).normal(2.0, 3.0, (2500, 5)).astype(np.float32)
    same(Stats.merge(Stats.of(part) for part in np.split(x, sorted(cuts))), Stats.of(x))


def test_against_numpy_s_own_in_float64() -> None:
    x = np.random.default_rng(0).normal(100.0, 0.5, (3000, 4)).astype(np.float32)
    stats, wide = Stats.of(x), x.astype(np.float64)
    np.testing.assert_allclose(stats.mean, wide.mean(0), rtol=1e-13)
    np.testing.assert_allclose(stats.variance, wide.var(0).sum(), rtol=1e-8)
    np.testing.assert_allclose(stats.mean_norm, np.linalg.norm(wide, axis=1).mean(), rtol=1e-13)


def test_half_precision_is_summed_in_float64() -> None:
    stats = Stats.of(np.full((5000, 1), 60000.0, np.float16))
    assert stats.sum[0] == 5000 * 60000.0
    assert stats.sum_sq == 5000 * 60000.0**2


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 1500, 2999])
def test_a_value_that_is_not_finite_shows_in_max_abs(bad: float, row: int) -> None:
    x = np.ones((3000, 2), np.float32)
    x[row, 1] = bad
    assert not np.isfinite(Stats.of(x).max_abs)
    assert not np.isfinite(Stats.merge([Stats.of(x[:1000]), Stats.of(x[1000:])]).max_abs)


def test_no_rows() -> None:
    empty = Stats.of(np.zeros((0, 3), np.float32))
    assert (empty.rows, empty.mean_norm, empty.variance, empty.mean.tolist()) == (0, 0.0, 0.0, [0.0] * 3)

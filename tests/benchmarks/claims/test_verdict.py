"""Differences with known intervals give known verdicts; figures at equal L0 lie on the line they were planted on."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.claims.verdict import (
    FAILS,
    HOLDS,
    UNDECIDED,
    UNTESTED,
    Estimate,
    cells,
    common,
    counted,
    curve,
    judged,
    student,
)


def around(value: float, se: float, samples: int = 4001) -> Estimate:
    """A figure whose resamples have exactly this mean and standard deviation."""
    spread = np.linspace(-1, 1, samples)
    return Estimate(value, value + se * spread / spread.std(ddof=1))


def test_the_interval_of_one_seed_is_that_of_the_resamples() -> None:
    (cell,) = cells({"here": [around(-0.3, 0.1)]}, kind="share")
    assert cell.seeds == 1
    assert (cell.low, cell.high) == pytest.approx((-0.3 - 0.196, -0.3 + 0.196))


def test_the_spread_over_seeds_is_shared_by_the_cells_and_added_in_quadrature() -> None:
    """Two cells of two seeds: deviations sqrt(0.02) and 0 pool to 0.1 with two degrees of freedom."""
    found = cells(
        {"a": [around(-0.4, 0.0), around(-0.6, 0.0)], "b": [around(-0.2, 0.05), around(-0.2, 0.05)]}, kind="share"
    )
    of_seeds = 4.303 * 0.1 / 2**0.5
    assert found[0].value == pytest.approx(-0.5) and found[0].high == pytest.approx(-0.5 + of_seeds)
    assert found[1].high == pytest.approx(-0.2 + np.hypot(1.96 * 0.05, of_seeds))


@pytest.mark.parametrize(
    ("differences", "margin", "verdict", "told"),
    [
        ([(-0.5, 0.1), (-0.3, 0.1)], 0.0, HOLDS, "2 as claimed"),
        ([(-0.5, 0.1), (-0.1, 0.1)], 0.0, UNDECIDED, "1 as claimed, 1 open"),
        ([(-0.5, 0.1), (0.3, 0.1)], 0.0, FAILS, "1 as claimed, 1 reversed"),
        ([(0.3, 0.1)], 0.6, HOLDS, "1 as claimed"),
        ([], 0.0, UNTESTED, ""),
    ],
)
def test_known_differences_give_known_verdicts(
    differences: list[tuple[float, float]], margin: float, verdict: str, told: str
) -> None:
    compared = {str(i): [around(*one)] for i, one in enumerate(differences)}
    found = cells(compared, kind="nats", margin=margin)
    assert judged(found) == verdict
    assert counted(found) == told


def test_pairs_drawn_alike_differ_by_what_they_differ() -> None:
    one = around(2.0, 0.5)
    other = Estimate(1.0, one.drawn_M - 1)
    assert one.less(other).value == 1 and np.ptp(one.less(other).drawn_M) == pytest.approx(0)
    half = Estimate(1.0, one.drawn_M / 2)
    assert half.over(one).value == -0.5 and np.ptp(half.over(one).drawn_M) == pytest.approx(0)


@pytest.mark.parametrize("l0", [4.0, 7.0, 20.0, 2.0, 60.0])
def test_a_power_law_is_met_between_its_members_and_beyond(l0: float) -> None:
    """y = 2 L0^-0.5 is a line in the logarithms; in each resample L0 and the figure are others."""
    rng = np.random.default_rng(0)
    grid = [32.0, 4.0, 16.0]
    drawn = [rng.uniform(0.9, 1.1, 50) * x for x in grid]
    found = curve(
        [Estimate(x, d) for x, d in zip(grid, drawn, strict=True)],
        [Estimate(2 * x**-0.5, 2 * d**-0.5) for x, d in zip(grid, drawn, strict=True)],
        log=True,
    )
    assert found is not None
    at = found.at(l0)
    assert at.value == pytest.approx(2 * l0**-0.5)
    np.testing.assert_allclose(at.drawn_M, 2 * l0**-0.5)


def test_an_sae_of_the_sweep_is_met_by_itself_in_every_resample() -> None:
    """Read at its own L0, which differs from resample to resample, a member gives its own figures."""
    l0, y = [around(4, 0.2), around(16, 0.5)], [around(0.5, 0.1), around(0.2, 0.05)]
    found = curve(l0, y)
    assert found is not None
    for i in range(2):
        at = found.at(l0[i])
        assert at.value == pytest.approx(y[i].value)
        np.testing.assert_allclose(at.drawn_M, y[i].drawn_M)


def test_a_figure_that_may_be_negative_is_linear_in_log_l0() -> None:
    found = curve([around(4, 0), around(16, 0)], [around(0.3, 0), around(-0.1, 0)])
    assert found is not None and found.at(8).value == pytest.approx(0.1)


def test_curves_meet_where_both_reach() -> None:
    one = curve([around(4, 0), around(16, 0)], [around(1, 0), around(1, 0)])
    two = curve([around(8, 0), around(32, 0)], [around(1, 0), around(1, 0)])
    far = curve([around(17, 0), around(32, 0)], [around(1, 0), around(1, 0)])
    assert one is not None and two is not None and far is not None
    assert common([one, two]) == pytest.approx([8, 8 * 2**0.5, 16])
    assert common([one, far]) == []
    assert curve([around(4, 0)], [around(1, 0)]) is None
    assert curve([around(4, 0), around(4, 0)], [around(1, 0), around(2, 0)]) is None


@pytest.mark.parametrize(("freedom", "point"), [(1, 12.706), (5, 2.571), (10, 2.228), (30, 2.042)])
def test_students_points_are_those_of_the_tables(freedom: int, point: float) -> None:
    assert student(freedom) == pytest.approx(point, rel=0.01)

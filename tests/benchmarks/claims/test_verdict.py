"""Known differences give known verdicts, by chance no more often than is said; curves give back what was planted."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from benchmarks.claims.verdict import (
    FAILS,
    HOLDS,
    UNDECIDED,
    UNTESTED,
    Estimate,
    common,
    comparisons_of,
    count_outcomes,
    curve,
    verdict_of,
)


def around(value: float, se: float, samples: int = 4001) -> Estimate:
    """A figure whose resamples have exactly this mean and standard deviation."""
    spread = np.linspace(-1, 1, samples)
    return Estimate(value, value + se * spread / spread.std(ddof=1))


def test_the_interval_of_one_seed_is_that_of_the_resamples() -> None:
    (cell,) = comparisons_of({"here": [around(-0.3, 0.1)]}, kind="share")
    assert cell.seeds == 1
    assert (cell.low, cell.high) == pytest.approx((-0.3 - 0.1959964, -0.3 + 0.1959964))


def test_the_spread_over_seeds_is_shared_by_the_cells_and_added_in_quadrature() -> None:
    """Two cells of two seeds: deviations sqrt(0.02) and 0 pool to 0.1 with two degrees of freedom."""
    found = comparisons_of(
        {"a": [around(-0.4, 0.0), around(-0.6, 0.0)], "b": [around(-0.2, 0.05), around(-0.2, 0.05)]}, kind="share"
    )
    of_seeds = 4.3026527 * 0.1 / 2**0.5  # Student's t of two degrees of freedom
    assert found[0].value == pytest.approx(-0.5) and found[0].high == pytest.approx(-0.5 + of_seeds)
    assert found[1].high == pytest.approx(-0.2 + np.hypot(1.959964 * 0.05, of_seeds))


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
    found = comparisons_of(compared, kind="nats", margin=margin)
    assert verdict_of(found) == verdict
    assert count_outcomes(found) == told


def test_pairs_drawn_alike_differ_by_what_they_differ() -> None:
    one = around(2.0, 0.5)
    other = Estimate(1.0, one.drawn_M - 1)
    assert one.minus(other).value == 1 and np.ptp(one.minus(other).drawn_M) == pytest.approx(0)
    half = Estimate(1.0, one.drawn_M / 2)
    assert half.relative_to(one).value == -0.5 and np.ptp(half.relative_to(one).drawn_M) == pytest.approx(0)


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


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("count", [1, 9])
def test_a_claim_at_its_boundary_fails_in_at_most_five_percent(seeds: int, count: int) -> None:
    """Simulated: every true difference is 0, each seed adds its own spread and all seeds share the documents'."""
    rng = np.random.default_rng(0)
    document_error, seed_error, runs = 1.0, 0.7 if seeds > 1 else 0.0, 1000
    drawn_M = document_error * np.linspace(-1, 1, 50)
    drawn_M *= document_error / drawn_M.std(ddof=1)
    failed = 0
    for _ in range(runs):
        of_documents = rng.normal(0, document_error, count)
        values = of_documents[:, None] + rng.normal(0, seed_error, (count, seeds))
        differences = {str(i): [Estimate(value, value + drawn_M) for value in row] for i, row in enumerate(values)}
        failed += verdict_of(comparisons_of(differences, kind="nats")) == FAILS
    assert failed / runs <= 0.05
    assert failed > 0  # no verdict is out of reach


def test_one_of_many_has_to_stand_out_further() -> None:
    """2.2 standard errors above the margin contradict a claim of one comparison, and not one of nine."""
    others = {str(i): [around(-1.0, 0.1)] for i in range(8)}
    alone = {"here": [around(0.22, 0.1)]}
    assert verdict_of(comparisons_of(alone, kind="nats")) == FAILS
    assert verdict_of(comparisons_of(others | alone, kind="nats")) == UNDECIDED
    assert verdict_of(comparisons_of(others | {"here": [around(0.3, 0.1)]}, kind="nats")) == FAILS


def test_an_error_of_reading_widens_the_interval_by_itself() -> None:
    read = Estimate(2.0, around(2.0, 0.1).drawn_M, reading_error=0.3)
    measured = Estimate(1.0, np.ones(4001))
    (difference,) = comparisons_of({"": [read.minus(measured)]}, kind="nats")
    assert (difference.low, difference.high) == pytest.approx((1 - 0.196 - 0.3, 1 + 0.196 + 0.3), abs=1e-4)
    (ratio,) = comparisons_of({"": [measured.relative_to(read)]}, kind="share")
    assert ratio.reading_error == pytest.approx(0.5 * 0.3 / 2)


Frontier = Callable[[float], float]


def frontiers(rng: np.random.Generator) -> list[Frontier]:
    """NMSE against L0 as frontiers bend: down to an error that no latent explains, saturating, exponential."""
    a, b, c = rng.uniform(0.02, 0.1), rng.uniform(0.6, 1.0), rng.uniform(0.1, 0.5)
    return [
        lambda x: float(a + 0.3 * x**-b),
        lambda x: float(1 / (1 + c * x**b)),
        lambda x: float(0.5 * np.exp(-c * x ** (0.7 * b))),
    ]


@pytest.mark.parametrize("grid", [(4.0, 8.0, 16.0), (4.0, 8.0, 16.0, 24.0), (1.0, 3.0, 5.0, 9.0), (4, 8, 12, 16, 32)])
def test_the_true_frontier_lies_within_the_error_of_reading(grid: tuple[float, ...]) -> None:
    """Without noise the interval is the error of reading alone, where a straight line is off by 1% and more."""
    rng = np.random.default_rng(0)
    off = []
    straight = []
    missed = []
    for frontier in (one for _ in range(40) for one in frontiers(rng)):
        found = curve([around(x, 0.0, 2) for x in grid], [around(frontier(x), 0.0, 2) for x in grid], log=True)
        assert found is not None
        for low, high in itertools.pairwise(grid):
            for share in (0.05, 0.3, 0.5, 0.8):
                l0 = low ** (1 - share) * high**share
                true, read = frontier(l0), found.at(l0)
                off.append(abs(read.value / true - 1))
                missed.append(abs(read.value - true) > read.reading_error)
                straight.append(abs(frontier(low) ** (1 - share) * frontier(high) ** share / true - 1))
    assert np.mean(missed) <= 0.01
    assert np.max(straight) > 0.05 and np.quantile(off, 0.99) < np.max(straight) / 4


def test_nothing_is_read_at_a_measured_l0() -> None:
    found = curve([around(x, 0.0) for x in (4, 8, 16)], [around(y, 0.0) for y in (0.3, 0.19, 0.13)], log=True)
    assert found is not None
    for l0, y in ((4, 0.3), (8, 0.19), (16, 0.13)):
        assert found.at(l0).value == pytest.approx(y) and found.at(l0).reading_error == pytest.approx(0)


def test_two_members_leave_the_figure_between_open() -> None:
    """Nothing checks how it bends: the error reaches to the nearer member's figure."""
    found = curve([around(4, 0.0), around(16, 0.0)], [around(0.4, 0.0), around(0.1, 0.0)], log=True)
    assert found is not None
    assert found.at(8).value == pytest.approx(0.2) and found.at(8).reading_error == pytest.approx(0.1)
    assert found.at(4.4).reading_error == pytest.approx(0.4 - found.at(4.4).value)

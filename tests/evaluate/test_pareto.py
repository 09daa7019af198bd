"""The paired comparison against hand-worked fronts and a float64 reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluate.metrics import SetSums, deltas, statistics, totals
from evaluate.pareto import add_excess, best_at_equal_l0, compare, excess_at_equal_l0, front, verdict
from train.sae.metrics import one_l0_groups

NAMES = [
    *("tokens", "predicted", "error", "deviation", "error_token", "deviation_token", "error_btk", "l0", "cosine"),
    *("norm", "dot", "norm_c", "dot_c", "clean", "spliced", "zero", "mean", "kl"),
]


def some(sequences: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: rng.uniform(1, 2, sequences) for name in NAMES} | {"tokens": np.full(sequences, 7.0)}


def test_front_worked_by_hand() -> None:
    assert front([(1, 5), (2, 4), (2, 6), (3, 4), (4, 1)]) == [True, True, False, False, True]
    assert front([(1, 1), (1, 1)]) == [True, True]  # equals do not beat each other


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_what_is_off_the_front_is_beaten_by_a_point_on_it(points: list[tuple[int, int]]) -> None:
    on = [point for point, best in zip(points, front(points), strict=True) if best]
    assert on
    for x, y in set(points) - set(on):
        assert any(a <= x and b <= y for a, b in on)


def test_best_at_equal_l0_is_not_the_densest_of_a_sweep() -> None:
    """NMSE = 0.4 / sqrt(L0) for all, but one SAE has three quarters of that at its own L0."""
    l0 = [4.0, 8.0, 16.0, 32.0, 64.0]
    nmse = [0.4 / value**0.5 for value in l0]
    nmse[1] *= 0.75
    rows = [{"metrics": {"l0": {"value": x}, "nmse": {"value": y}}} for x, y in zip(l0, nmse, strict=True)]
    assert min(rows, key=lambda row: row["metrics"]["nmse"]["value"]) is rows[4]
    assert best_at_equal_l0([rows]) is rows[1]
    # A second site's best must lie further below its own line to be chosen, whatever its NMSE.
    others = [{"metrics": {"l0": {"value": x}, "nmse": {"value": y / 100}}} for x, y in zip(l0, nmse, strict=True)]
    others[1]["metrics"]["nmse"]["value"] *= 0.9
    assert best_at_equal_l0([rows, others]) is others[1]


def test_at_one_l0_the_lowest_nmse_is_best_and_of_equals_the_sparsest() -> None:
    points = [(32.0, 0.2), (32.5, 0.1), (31.9, 0.3)]
    rows = [{"metrics": {"l0": {"value": x}, "nmse": {"value": y}}} for x, y in points]
    assert best_at_equal_l0([rows]) is rows[1]
    two = [{"metrics": {"l0": {"value": x}, "nmse": {"value": y}}} for x, y in ((64.0, 0.1), (8.0, 0.3))]
    assert best_at_equal_l0([two]) is two[1]  # a line through two points has nothing above or below
    unknown = [{"metrics": {"l0": {"value": 0.0}, "nmse": {"value": None}}}]
    assert best_at_equal_l0([unknown]) is unknown[0]
    assert best_at_equal_l0([[*unknown, rows[0]]]) is rows[0]


@given(st.lists(st.tuples(st.floats(1, 100), st.floats(0.01, 1)), min_size=1, max_size=8))
def test_excess_is_about_0_and_does_not_depend_on_units(points: list[tuple[float, float]]) -> None:
    excess = excess_at_equal_l0(points)
    assert sum(excess) == pytest.approx(0, abs=1e-9)
    scaled = excess_at_equal_l0([(l0, nmse * 7) for l0, nmse in points])
    assert scaled == pytest.approx(excess, abs=1e-9)


def test_deltas_are_paired() -> None:
    """A constant addition to every sequence has no error, however much the sequences differ."""
    base = some(50, 0)
    more = base | {"kl": base["kl"] + 0.25 * base["predicted"]}
    got = deltas(SetSums(more, more), SetSums(base, base), samples=200, seed=3)
    assert got["kl"]["value"] == pytest.approx(0.25) and got["kl"]["se"] == pytest.approx(0, abs=1e-12)
    assert got["kl"]["low"] == pytest.approx(0.25) and got["nmse"] == {"value": 0, "se": 0, "low": 0, "high": 0}


def test_deltas_equal_the_bootstrap_by_its_definition() -> None:
    one, base = some(20, 1), some(20, 2)
    got = deltas(SetSums(one, one), SetSums(base, base), samples=300, seed=5)["nmse"]
    rng = np.random.default_rng(5)
    draws = []
    for _ in range(300):
        rows = rng.integers(20, size=20)
        draws.append(
            one["error"][rows].sum() / one["deviation"][rows].sum()
            - base["error"][rows].sum() / base["deviation"][rows].sum()
        )
    assert got["se"] == pytest.approx(np.std(draws, ddof=1))
    assert [got["low"], got["high"]] == pytest.approx(list(np.percentile(draws, [2.5, 97.5])))
    assert got["value"] == pytest.approx(float((statistics(totals(one))["nmse"] - statistics(totals(base))["nmse"])[0]))


def test_unknown_values_are_on_no_front() -> None:
    rows = [
        {"metrics": {"l0": {"value": l0}, "nmse": {"value": nmse}, "ce_increase": {"value": None}}}
        for l0, nmse in ((1.0, 2.0), (2.0, 1.0), (3.0, 1.0))
    ]
    compare(rows, [], None, 10, 0)
    assert [row["pareto"] for row in rows] == [["nmse"], ["nmse"], []]
    assert "delta" not in rows[0]


def rows_of(*points: tuple[float, float]) -> list[dict[str, Any]]:
    """Rows of a report by (L0, CE increase)."""
    return [
        {"folder": str(i), "metrics": {"l0": {"value": l0}, "ce_increase": {"value": cost}}}
        for i, (l0, cost) in enumerate(points)
    ]


def test_the_verdict_ranks_saes_of_one_l0_alone() -> None:
    rows = rows_of((32.0, 0.3), (33.0, 0.1), (64.0, 0.01), (31.9, 0.2))
    base = some(20, 0)
    sums = [SetSums(own, own) for own in (base | {"spliced": base["spliced"] + row["metrics"]["l0"]["value"]}
                                          for row in rows)]  # fmt: skip
    first, second = verdict(rows, sums, samples=50, seed=0)
    assert first["l0"] == [31.9, 33.0] and first["saes"] == ["1", "3", "0"]
    assert (first["best"], first["next"]) == ("1", "3")
    assert first["difference"] == deltas(sums[3], sums[1], samples=50, seed=0)["ce_increase"]
    assert (second["saes"], second["next"], second["difference"]) == (["2"], None, None)
    rows[2]["metrics"]["ce_increase"]["value"] = None
    assert len(verdict(rows, sums, samples=50, seed=0)) == 1


def test_groups_of_one_l0_begin_with_the_sparsest() -> None:
    assert one_l0_groups([10.0, 10.4, 10.8, 5.0]) == [[3], [0, 1], [2]]
    assert one_l0_groups([]) == []


def test_excess_ce_is_of_the_saes_own_l0() -> None:
    """CE increase = 1 / L0 for all, but the second has a tenth more than that."""
    base = some(30, 0) | {"clean": np.zeros(30)}
    base["predicted"] = base["tokens"]
    l0 = [4.0, 8.0, 16.0, 32.0]
    cost = [1 / 4, 1.1 / 8, 1 / 16, 1 / 32]
    sums = []
    for x, y in zip(l0, cost, strict=True):
        own = base | {"l0": x * base["tokens"], "spliced": y * base["predicted"]}
        sums.append(SetSums(own, own))
    rows = rows_of(*zip(l0, cost, strict=True))
    add_excess(rows, sums, samples=20, seed=0)
    shares = [row["at_equal_l0"] for row in rows]
    line = [float(np.log(y)) for y in cost]
    slope, at_0 = np.polyfit(np.log(l0), line, 1)
    expected = [np.exp(y - slope * np.log(x) - at_0) - 1 for x, y in zip(l0, line, strict=True)]
    assert [share["value"] for share in shares] == pytest.approx(expected)
    assert max(range(4), key=lambda i: shares[i]["value"]) == 1


def test_excess_ce_is_left_out_where_l0_says_nothing() -> None:
    alike = rows_of((32.0, 0.3), (33.0, 0.1), (32.5, 0.2))
    two = rows_of((8.0, 0.3), (33.0, 0.1))
    for rows in (alike, two):
        add_excess(rows, [], samples=20, seed=0)
        assert not any("at_equal_l0" in row for row in rows)

"""The law recovers planted coefficients, and tells a grid that does not follow it."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.claims.law import Law, fit, left_out, residuals

N, K = (axis.ravel().astype(float) for axis in np.meshgrid([768, 1536, 3072, 6144], [4, 8, 16, 32]))


def test_the_value_is_the_formula() -> None:
    law = Law((-0.5, -0.26, -0.02, -0.04, -3.0, -0.1))
    n, k = 1024.0, 8.0
    first = np.exp(-0.5 - 0.26 * np.log(k) - 0.02 * np.log(n) - 0.04 * np.log(k) * np.log(n))
    assert law.at(np.array([n]), np.array([k]))[0] == pytest.approx(first + np.exp(-3.0 - 0.1 * np.log(k)))


def test_planted_coefficients_are_recovered_without_a_floor() -> None:
    planted = (1.2, -0.2, -0.15, -0.03)
    found = fit(N, K, Law(planted).at(N, K), floor=False)
    assert found.coefficients == pytest.approx(planted, abs=1e-9)


def test_planted_coefficients_are_recovered_with_a_floor() -> None:
    planted = (1.2, 0.4, -0.35, -0.12, -2.5, -0.2)
    y = Law(planted).at(N, K)
    found = fit(N, K, y, floor=True)
    assert found.coefficients == pytest.approx(planted, abs=1e-3)
    assert np.abs(residuals(found, N, K, y)).max() < 1e-6
    assert np.abs(residuals(fit(N, K, y, floor=False), N, K, y)).max() > 1e-3


def test_a_point_left_out_is_met_where_the_law_holds_and_missed_where_it_does_not() -> None:
    y = Law((1.2, -0.2, -0.15, -0.03)).at(N, K)
    assert np.abs(left_out(N, K, y, floor=False)).max() < 1e-9
    y[5] *= 1.3
    assert left_out(N, K, y, floor=False)[5] == pytest.approx(np.log(1.3))

"""Gao et al.'s law of the NMSE over width and k (2406.04093, section 3), fitted to a grid of SAEs.

    L(n, k) = exp(alpha + beta_k log k + beta_n log n + gamma log k log n) + exp(zeta + eta log k)

The second term is what no width can explain. The form is as the paper prints it; its coefficients are not compared, as
they belong to its model and tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

NAMES = ("alpha", "beta_k", "beta_n", "gamma", "zeta", "eta")
_STARTS = (0.1, 0.4, 0.8)  # the second term's first share of the least NMSE
_EVALUATIONS = 2000

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Law:
    """Coefficients in the order of NAMES, the first four alone where there is no second term."""

    coefficients: tuple[float, ...]

    def at(self, n: Array, k: Array) -> Array:
        """Give L(n, k)."""
        terms = _terms(np.asarray(n, float), np.asarray(k, float), np.array(self.coefficients))
        total: Array = terms.sum(0)
        return total


def _features(n: Array, k: Array) -> Array:
    ln, lk = np.log(n), np.log(k)
    return np.stack([np.ones_like(lk), lk, ln, lk * ln, np.ones_like(lk), lk], 1)


def _terms(n: Array, k: Array, c: Array) -> Array:
    """Give the law's terms, [1 or 2, points]."""
    x = _features(n, k)
    parts = [x[:, :4] @ c[:4]] + ([x[:, 4:] @ c[4:]] if len(c) > 4 else [])
    return np.exp(np.clip(np.stack(parts), -80, 80))


def _descend(n: Array, k: Array, y: Array, start: Array) -> tuple[Array, float]:
    """Minimise the squared residuals of log L by Levenberg and Marquardt; give where it ends, and their sum there."""
    features = _features(n, k)

    def residual(c: Array) -> Array:
        return np.asarray(np.log(_terms(n, k, c).sum(0) / y))

    def slope(c: Array) -> Array:
        terms = _terms(n, k, c)
        first, second = terms / terms.sum(0)
        return np.concatenate([first[:, None] * features[:, :4], second[:, None] * features[:, 4:]], 1)

    # x_scale="jac": the terms' slopes differ by orders of magnitude, as log n is near 10 and zeta's term may be tiny.
    end = least_squares(residual, start, slope, method="lm", x_scale="jac", max_nfev=_EVALUATIONS)
    return end.x, float(2 * end.cost)


def fit(n: Array, k: Array, y: Array, *, floor: bool) -> Law:
    """Fit the law whose logarithm is nearest to log `y`; `floor` with its second term."""
    n, k, y = (np.asarray(part, float) for part in (n, k, y))
    plain = np.linalg.lstsq(_features(n, k)[:, :4], np.log(y), rcond=None)[0]
    if not floor:
        return Law(tuple(map(float, plain)))
    ends = []
    for share in _STARTS:
        least = share * y.min()
        first_term = np.linalg.lstsq(_features(n, k)[:, :4], np.log(y - least), rcond=None)[0]
        ends.append(_descend(n, k, y, np.r_[first_term, np.log(least), 0.0]))
    best, _ = min(ends, key=lambda end: end[1])
    return Law(tuple(map(float, best)))


def residuals(law: Law, n: Array, k: Array, y: Array) -> Array:
    """Give log(y / L), a relative error where it is small."""
    return np.asarray(np.log(np.asarray(y, float) / law.at(n, k)))


def left_out(n: Array, k: Array, y: Array, *, floor: bool) -> Array:
    """Give log(y / L) at each point, L fitted to the others."""
    n, k, y = (np.asarray(part, float) for part in (n, k, y))
    errors = np.empty(len(y))
    for i in range(len(y)):
        others = np.arange(len(y)) != i
        law = fit(n[others], k[others], y[others], floor=floor)
        errors[i] = residuals(law, n[[i]], k[[i]], y[[i]])[0]
    return errors

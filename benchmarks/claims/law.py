"""Gao et al.'s law of the NMSE over width and k (2406.04093, section 3), fitted to a grid of SAEs.

    L(n, k) = exp(alpha + beta_k log k + beta_n log n + gamma log k log n) + exp(zeta + eta log k)

The second term is what no width can explain. The form is as the paper prints it; its coefficients are not compared, as
they belong to its model and tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NAMES = ("alpha", "beta_k", "beta_n", "gamma", "zeta", "eta")
_STARTS = (0.1, 0.4, 0.8)  # the second term's first share of the least NMSE
_ROUNDS = 400

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Law:
    """Coefficients in the order of NAMES, the first four alone where there is no second term."""

    coefficients: tuple[float, ...]

    def at(self, n: Array, k: Array) -> Array:
        """L(n, k)."""
        terms = _terms(np.asarray(n, float), np.asarray(k, float), np.array(self.coefficients))
        total: Array = terms.sum(0)
        return total


def _features(n: Array, k: Array) -> Array:
    ln, lk = np.log(n), np.log(k)
    return np.stack([np.ones_like(lk), lk, ln, lk * ln, np.ones_like(lk), lk], 1)


def _terms(n: Array, k: Array, c: Array) -> Array:
    """The law's terms, [1 or 2, points]."""
    x = _features(n, k)
    parts = [x[:, :4] @ c[:4]] + ([x[:, 4:] @ c[4:]] if len(c) > 4 else [])
    return np.exp(np.clip(np.stack(parts), -80, 80))


def _descend(n: Array, k: Array, y: Array, c: Array) -> tuple[Array, float]:
    """Levenberg and Marquardt's descent of the squared residuals of log L; where it ends, and their sum there."""
    x, damping = _features(n, k), 1e-2
    residual = np.log(_terms(n, k, c).sum(0) / y)
    for _ in range(_ROUNDS):
        terms = _terms(n, k, c)
        first, second = terms / terms.sum(0)
        slope = np.concatenate([first[:, None] * x[:, :4], second[:, None] * x[:, 4:]], 1)
        scale = np.sqrt(damping * (slope**2).sum(0)) + 1e-12
        step = np.linalg.lstsq(np.vstack([slope, np.diag(scale)]), np.r_[-residual, np.zeros(6)], rcond=None)[0]
        tried = np.log(_terms(n, k, c + step).sum(0) / y)
        better = tried @ tried < residual @ residual
        if better:
            c, residual = c + step, tried
        damping = max(damping / 5, 1e-12) if better else damping * 4
        if damping > 1e12 or (better and np.abs(step).max() < 1e-10):
            break
    return c, float(residual @ residual)


def fit(n: Array, k: Array, y: Array, *, floor: bool) -> Law:
    """The law whose logarithm is nearest to log `y`; `floor` with its second term."""
    n, k, y = (np.asarray(part, float) for part in (n, k, y))
    plain = np.linalg.lstsq(_features(n, k)[:, :4], np.log(y), rcond=None)[0]
    if not floor:
        return Law(tuple(map(float, plain)))
    ends = []
    for share in _STARTS:
        at = share * y.min()
        over = np.linalg.lstsq(_features(n, k)[:, :4], np.log(y - at), rcond=None)[0]
        ends.append(_descend(n, k, y, np.r_[over, np.log(at), 0.0]))
    return Law(tuple(map(float, min(ends, key=lambda end: end[1])[0])))


def residuals(law: Law, n: Array, k: Array, y: Array) -> Array:
    """log(y / L), a relative error where it is small."""
    found: Array = np.log(np.asarray(y, float) / law.at(n, k))
    return found


def left_out(n: Array, k: Array, y: Array, *, floor: bool) -> Array:
    """log(y / L) at each point, L fitted to the others."""
    n, k, y = (np.asarray(part, float) for part in (n, k, y))
    found = np.empty(len(y))
    for i in range(len(y)):
        others = np.arange(len(y)) != i
        law = fit(n[others], k[others], y[others], floor=floor)
        found[i] = residuals(law, n[[i]], k[[i]], y[[i]])[0]
    return found

"""From paired figures to a verdict: differences with an interval, figures at equal L0, and what they decide.

Letters: M samples of the bootstrap over sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

HOLDS, FAILS, UNDECIDED, UNTESTED = "holds", "does not hold", "undecided", "not tested"

_Z = 1.96
_STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # 97.5% points of few degrees of freedom


@dataclass(frozen=True)
class Estimate:
    """A figure over the whole set, and over each of M resampled sets; the same resamples make estimates paired."""

    value: float
    drawn_M: NDArray[np.float64]

    def to(self, function: Callable[[Any], Any]) -> Estimate:
        """A function of the figure."""
        return Estimate(float(function(self.value)), np.asarray(function(self.drawn_M)))

    def less(self, other: Estimate) -> Estimate:
        """self - other."""
        return Estimate(self.value - other.value, self.drawn_M - other.drawn_M)

    def over(self, other: Estimate) -> Estimate:
        """self / other - 1."""
        return Estimate(self.value / other.value - 1, self.drawn_M / other.drawn_M - 1)


@dataclass(frozen=True)
class Cell:
    """One comparison: its difference, mean over seeds, with a 95% interval. Below `margin` it is as claimed.

    shown: the figures behind it, by name, mean over seeds. kind: "share" (a relative difference) or a unit.
    """

    label: str
    kind: str
    value: float
    low: float
    high: float
    seeds: int
    margin: float = 0.0
    shown: dict[str, float] = field(default_factory=dict)


def student(freedom: int) -> float:
    """The 97.5% point of Student's t, within 1%."""
    if freedom in _STUDENT:
        return _STUDENT[freedom]
    z = _Z
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)


def spread(values: Sequence[Sequence[float]]) -> tuple[float, int]:
    """The standard deviation over seeds that the comparisons have in common, and its degrees of freedom."""
    freedom = sum(len(seeds) - 1 for seeds in values)
    squares = sum(float(np.var(seeds)) * len(seeds) for seeds in values)
    return (math.sqrt(squares / freedom) if freedom else 0.0), freedom


def cells(
    compared: Mapping[str, Sequence[Estimate]],
    *,
    kind: str,
    margin: float = 0.0,
    shown: Mapping[str, dict[str, float]] | None = None,
) -> list[Cell]:
    """A cell a comparison, from its difference at each seed.

    The interval has two parts, added in quadrature: the bootstrap over sequences (the same sequences at all seeds),
    and, from two seeds on, the spread over seeds, which the comparisons of one claim share.
    """
    if not compared:
        return []
    deviation, freedom = spread([[one.value for one in seeds] for seeds in compared.values()])
    found = []
    for label, seeds in compared.items():
        value = float(np.mean([one.value for one in seeds]))
        drawn_M = np.mean([one.drawn_M for one in seeds], axis=0)
        of_sequences = _Z * float(np.std(drawn_M, ddof=1))
        of_seeds = student(freedom) * deviation / math.sqrt(len(seeds)) if freedom else 0.0
        half = math.hypot(of_sequences, of_seeds)
        figures = (shown or {}).get(label, {})
        found.append(Cell(label, kind, value, value - half, value + half, len(seeds), margin, figures))
    return found


def judged(found: Sequence[Cell]) -> str:
    """Holds where every interval lies below its margin, does not where one lies above it; else undecided."""
    if not found:
        return UNTESTED
    if any(cell.low > cell.margin for cell in found):
        return FAILS
    if all(cell.high < cell.margin for cell in found):
        return HOLDS
    return UNDECIDED


def counted(found: Sequence[Cell]) -> str:
    """How many comparisons are as claimed, the reverse, or neither."""
    wins = sum(cell.high < cell.margin for cell in found)
    losses = sum(cell.low > cell.margin for cell in found)
    rest = len(found) - wins - losses
    return ", ".join(f"{n} {what}" for n, what in ((wins, "as claimed"), (losses, "reversed"), (rest, "open")) if n)


@dataclass(frozen=True)
class Curve:
    """A figure against L0 along a sweep of two members or more, L0 ascending.

    `log` interpolates the figure's logarithm.
    """

    l0: Sequence[Estimate]
    y: Sequence[Estimate]
    log: bool = False

    def reach(self) -> tuple[float, float]:
        """The least and the largest L0."""
        return self.l0[0].value, self.l0[-1].value

    def at(self, l0: float | Estimate) -> Estimate:
        """The figure at this L0 (in each resample at its own, where l0 is an estimate), linear in log L0 between two
        members; beyond the ends the last line goes on."""
        wanted = l0 if isinstance(l0, Estimate) else Estimate(l0, np.full(len(self.l0[0].drawn_M), l0))
        after = int(np.searchsorted([one.value for one in self.l0], wanted.value))
        left = min(max(after - 1, 0), len(self.l0) - 2)
        (x0, x1), (y0, y1) = self.l0[left : left + 2], self.y[left : left + 2]

        def line(x: Any, x0: Any, x1: Any, y0: Any, y1: Any) -> Any:
            x, x0, x1 = np.log(x), np.log(x0), np.log(x1)
            y0, y1 = (np.log(y0), np.log(y1)) if self.log else (y0, y1)
            y = y0 + (y1 - y0) * (x - x0) / (x1 - x0)
            return np.exp(y) if self.log else y

        value = float(line(wanted.value, x0.value, x1.value, y0.value, y1.value))
        return Estimate(value, line(wanted.drawn_M, x0.drawn_M, x1.drawn_M, y0.drawn_M, y1.drawn_M))


def curve(l0: Sequence[Estimate], y: Sequence[Estimate], *, log: bool = False) -> Curve | None:
    """A `Curve` of members in any order; None of fewer than two, of two of one L0, or where one may never fire."""
    order = np.argsort([one.value for one in l0])
    if len(order) < 2 or np.diff([l0[i].value for i in order]).min() <= 0 or min(np.min(x.drawn_M) for x in l0) <= 0:
        return None
    return Curve([l0[i] for i in order], [y[i] for i in order], log)


def common(curves: Sequence[Curve], points: int = 3) -> list[float]:
    """L0s that all curves reach, evenly spaced in log L0 between the ends; none where they do not overlap."""
    low, high = max(one.reach()[0] for one in curves), min(one.reach()[1] for one in curves)
    return [float(x) for x in np.geomspace(low, high, points)] if low < high else []

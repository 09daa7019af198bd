"""From paired figures to a verdict: differences with an interval, figures at equal L0, and what they decide.

Letters: M samples of the bootstrap over documents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

HOLDS, FAILS, UNDECIDED, UNTESTED = "holds", "does not hold", "undecided", "not tested"

LEVEL = 0.95  # of every interval, and of all intervals of a claim at once where it is said not to hold
_NODES = 4  # members of a sweep that a figure between them is read off

Array = NDArray[np.float64]


@cache
def normal_point(share: float) -> float:
    """Give the value that a standard normal is below with this probability."""
    return float(stats.norm.ppf(share))


@cache
def student_point(share: float, freedom: int) -> float:
    """Give the value that Student's t with so many degrees of freedom is below with this probability."""
    return float(stats.t.ppf(share, freedom))


@dataclass(frozen=True)
class Estimate:
    """A figure over the whole set, and over each of M resampled sets; the same resamples make estimates paired.

    reading_error: how far the true figure may be from `value` because it was read between measured ones. It is a bias
    that resampling cannot show, 0 for what was measured.
    """

    value: float
    drawn_M: Array
    reading_error: float = 0.0

    def to(self, function: Callable[[Any], Any]) -> Estimate:
        """Apply a monotone function to the figure."""
        value = float(function(self.value))
        ends = [float(function(self.value + sign * self.reading_error)) for sign in (-1, 1)]
        return Estimate(value, np.asarray(function(self.drawn_M)), max(abs(end - value) for end in ends))

    def minus(self, other: Estimate) -> Estimate:
        """Give self - other."""
        error = self.reading_error + other.reading_error
        return Estimate(self.value - other.value, self.drawn_M - other.drawn_M, error)

    def relative_to(self, other: Estimate) -> Estimate:
        """Give self / other - 1."""
        ratio = self.value / other.value
        error = (self.reading_error + abs(ratio) * other.reading_error) / abs(other.value)
        return Estimate(ratio - 1, self.drawn_M / other.drawn_M - 1, error)


@dataclass(frozen=True)
class Comparison:
    """One difference, mean over seeds; below `margin` it is as claimed."""

    label: str
    kind: str
    """"share" (a relative difference) or a unit."""
    value: float
    document_error: float
    """Standard error over documents, by the bootstrap."""
    seed_error: float = 0.0
    """Standard error over seeds, 0 where there is one."""
    seed_freedom: int = 0
    """Degrees of freedom of the spread over seeds; 0: it is not known."""
    reading_error: float = 0.0
    seeds: int = 1
    margin: float = 0.0
    shown: dict[str, float] = field(default_factory=dict)
    """The figures behind it, by name, mean over seeds."""

    def half_width(self, comparisons: int = 1) -> float:
        """Give half the width of the interval; of `comparisons`, all hold their true value at once in 95% (Bonferroni).

        What is random, over documents and over seeds, is added in quadrature; the error of reading is a bias, and
        widens the interval by all it may be.
        """
        share = 1 - (1 - LEVEL) / (2 * comparisons)
        of_documents = normal_point(share) * self.document_error
        of_seeds = student_point(share, self.seed_freedom) * self.seed_error if self.seed_freedom else 0.0
        return math.hypot(of_documents, of_seeds) + self.reading_error

    @property
    def low(self) -> float:
        return self.value - self.half_width()

    @property
    def high(self) -> float:
        return self.value + self.half_width()

    def as_claimed(self) -> bool:
        return self.high < self.margin

    def reversed(self, comparisons: int = 1) -> bool:
        """Tell whether it contradicts the claim, being one of so many comparisons that were made."""
        return self.value - self.half_width(comparisons) > self.margin


def pooled_deviation(values: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Give the standard deviation over seeds that the comparisons have in common, and its degrees of freedom."""
    freedom = sum(len(seeds) - 1 for seeds in values)
    squares = sum(float(np.var(seeds)) * len(seeds) for seeds in values)
    return (math.sqrt(squares / freedom) if freedom else 0.0), freedom


def comparisons_of(
    differences: Mapping[str, Sequence[Estimate]],
    *,
    kind: str,
    margin: float = 0.0,
    shown: Mapping[str, dict[str, float]] | None = None,
) -> list[Comparison]:
    """Make a comparison of each label, from its difference at each seed.

    The bootstrap draws the same documents for all seeds; the spread over seeds is shared by the comparisons.
    """
    if not differences:
        return []
    deviation, freedom = pooled_deviation([[one.value for one in seeds] for seeds in differences.values()])
    comparisons = []
    for label, seeds in differences.items():
        drawn_M = np.mean([one.drawn_M for one in seeds], axis=0)
        comparison = Comparison(
            label,
            kind,
            value=float(np.mean([one.value for one in seeds])),
            document_error=float(np.std(drawn_M, ddof=1)),
            seed_error=deviation / math.sqrt(len(seeds)),
            seed_freedom=freedom,
            reading_error=float(np.mean([one.reading_error for one in seeds])),
            seeds=len(seeds),
            margin=margin,
            shown=(shown or {}).get(label, {}),
        )
        comparisons.append(comparison)
    return comparisons


def verdict_of(comparisons: Sequence[Comparison]) -> str:
    """Decide a claim that is made of every comparison.

    It holds where each one's 95% interval lies below its margin: all have to, so none needs a correction. It does not
    hold where one lies above: with many comparisons one would by chance, so each interval is widened for their number,
    and a claim that is exactly at its boundary fails in at most 5%.
    """
    if not comparisons:
        return UNTESTED
    if any(one.reversed(len(comparisons)) for one in comparisons):
        return FAILS
    if all(one.as_claimed() for one in comparisons):
        return HOLDS
    return UNDECIDED


def count_outcomes(comparisons: Sequence[Comparison]) -> str:
    """Say how many comparisons are as claimed, the reverse, or neither."""
    claimed = sum(one.as_claimed() for one in comparisons)
    contrary = sum(one.reversed(len(comparisons)) for one in comparisons)
    counts = {"as claimed": claimed, "reversed": contrary, "open": len(comparisons) - claimed - contrary}
    return ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)


@dataclass(frozen=True)
class Curve:
    """A figure against L0 along a sweep of two members or more, L0 ascending.

    Between its members it is read off the polynomial in log L0 through the four nearest (a straight line is off by 1
    to 4% where a frontier bends); with `log` it is the figure's logarithm that is interpolated.
    """

    l0: Sequence[Estimate]
    y: Sequence[Estimate]
    log: bool = False

    def reach(self) -> tuple[float, float]:
        """Give the least and the largest L0."""
        return self.l0[0].value, self.l0[-1].value

    def at(self, l0: float | Estimate) -> Estimate:
        """Read the figure at this L0 (in each resample at its own, where l0 is an estimate), with its reading error.

        The error is checked against a member that is left out: the distance, at this L0, from the curve without its
        farthest member, which has one degree less. Where that happens to be small, it is a quarter of the distance
        from the straight line between the nearest two. At a measured L0 it is 0. Of two members none can be left out:
        the error is the distance to the nearer one's figure.
        """
        wanted = l0 if isinstance(l0, Estimate) else Estimate(l0, np.full(len(self.l0[0].drawn_M), l0))
        distance = [abs(math.log(one.value / wanted.value)) for one in self.l0]
        nearest = [int(i) for i in np.argsort(distance, kind="stable")[:_NODES]]
        value = self._read(wanted.value, [self._point(i) for i in nearest])
        drawn_M = self._read(wanted.drawn_M, [(self.l0[i].drawn_M, self.y[i].drawn_M) for i in nearest])
        if len(nearest) > 2:
            without_farthest = self._read(wanted.value, [self._point(i) for i in nearest[:-1]])
            straight = self._read(wanted.value, [self._point(i) for i in nearest[:2]])
            error = float(max(abs(value - without_farthest), abs(value - straight) / 4))
        else:
            error = float(min(abs(value - self.y[i].value) for i in nearest))
        return Estimate(float(value), np.asarray(drawn_M), error)

    def _point(self, i: int) -> tuple[float, float]:
        return self.l0[i].value, self.y[i].value

    def _read(self, l0: Any, points: Sequence[tuple[Any, Any]]) -> Any:
        """Evaluate the polynomial through the points (Lagrange's form), in log L0 and, with `log`, in log y."""
        x = np.log(l0)
        nodes = [np.log(one) for one, _ in points]
        total = 0.0
        for i, (_, y) in enumerate(points):
            weight = 1.0
            for j, node in enumerate(nodes):
                if j != i:
                    weight = weight * (x - node) / (nodes[i] - node)
            total = total + weight * (np.log(y) if self.log else y)
        return np.exp(total) if self.log else total


def curve(l0: Sequence[Estimate], y: Sequence[Estimate], *, log: bool = False) -> Curve | None:
    """Make a `Curve` of members in any order; None of fewer than two, of two of one L0, or where one may never fire."""
    order = np.argsort([one.value for one in l0])
    if len(order) < 2 or np.diff([l0[i].value for i in order]).min() <= 0 or min(np.min(x.drawn_M) for x in l0) <= 0:
        return None
    return Curve([l0[i] for i in order], [y[i] for i in order], log)


def common(curves: Sequence[Curve], points: int = 3) -> list[float]:
    """Give L0s that all curves reach, evenly spaced in log L0 between the ends; none where they do not overlap."""
    low, high = max(one.reach()[0] for one in curves), min(one.reach()[1] for one in curves)
    return [float(x) for x in np.geomspace(low, high, points)] if low < high else []

"""Statistics of activation rows, accumulated in float64 and mergeable without loss."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64

# Rows taken to float64 at once: the block stays in cache.
_BLOCK = 256


@dataclass(frozen=True)
class Stats:
    """Sums over `rows` rows of width D."""

    rows: int
    sum: Float64[np.ndarray, " D"]
    sum_sq: float  # over rows and entries
    mean_norm: float  # mean over rows of ||x||
    max_abs: float

    @classmethod
    @np.errstate(invalid="ignore")  # sums over NaN and infinities: the caller looks at max_abs
    def of(cls, x: Float[np.ndarray, "N D"]) -> Stats:
        """Compute the statistics of rows `x`."""
        total, sum_sq, norms, max_abs = np.zeros(x.shape[1]), 0.0, 0.0, 0.0
        wide = np.empty((min(len(x), _BLOCK), x.shape[1]))
        for start in range(0, len(x), _BLOCK):
            # One buffer for all blocks; float64 because a float32 sum loses digits as rows add up.
            block = wide[: len(x) - start]
            block[...] = x[start : start + _BLOCK]
            squares = np.einsum("nd,nd->n", block, block)
            total += block.sum(0)
            sum_sq += float(squares.sum())
            norms += float(np.sqrt(squares).sum())
            # np.maximum keeps a NaN, which max() would drop or keep by the order of its arguments.
            max_abs = float(np.maximum(max_abs, np.abs(block, out=block).max(initial=0.0)))
        return cls(len(x), total, sum_sq, norms / max(len(x), 1), max_abs)

    @classmethod
    def merge(cls, parts: Iterable[Stats]) -> Stats:
        """Merge `parts` (at least one) to the statistics of all their rows."""
        parts = list(parts)
        assert parts, "nothing to merge"
        rows = sum(part.rows for part in parts)
        return cls(
            rows,
            np.sum([part.sum for part in parts], axis=0),
            float(sum(part.sum_sq for part in parts)),
            # Means are weighted by rows: units differ in size, as the last of a split does.
            float(sum(part.mean_norm * part.rows for part in parts)) / max(rows, 1),
            float(np.max([part.max_abs for part in parts])),
        )

    @property
    def mean(self) -> Float64[np.ndarray, " D"]:
        return self.sum / max(self.rows, 1)

    @property
    def mean_sq_norm(self) -> float:
        """Return E ||x||^2."""
        return self.sum_sq / max(self.rows, 1)

    @property
    def variance(self) -> float:
        """Return E ||x - E x||^2."""
        # E||x||^2 - ||E x||^2 cancels where the mean dominates; float64 has the digits for it, and rounding must not
        # make it negative.
        return max(self.mean_sq_norm - float(self.mean @ self.mean), 0.0)

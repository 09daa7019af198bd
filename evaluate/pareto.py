"""Several SAEs of one site beside each other: which none beats, which is best at its L0, and how each differs from a
baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.base.errors import UserError
from evaluate.metrics import SetSums, deltas

COSTS = ("nmse", "ce_increase")  # what should be low at a low L0
ONE_L0 = 1.05  # a sweep whose L0 differ by less than this factor is of one L0


def _is_named(folder: Path, name: str) -> bool:
    return folder.name == name or folder.resolve() == Path(name).resolve()


def require_baseline(folders: Sequence[Path], name: str | None) -> None:
    """Raise UserError where a baseline is named and none of the SAEs is it."""
    if name is not None and not any(_is_named(folder, name) for folder in folders):
        raise UserError(
            f"baseline={name} is none of the SAEs in saes: name the folder of one of them, or its last part"
        )


def baseline_of(folders: Sequence[Path], name: str | None) -> int | None:
    """Find which of the SAEs of a site is named, by folder or by the folder's last part; None where none is.

    Raises UserError where several are.
    """
    matches = [i for i, folder in enumerate(folders) if name is not None and _is_named(folder, name)]
    if len(matches) > 1:
        raise UserError(
            f"baseline={name} names {len(matches)} SAEs of one site: give the whole folder of the one meant"
        )
    return matches[0] if matches else None


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Mark the points where no other point is at most as large in both numbers and smaller in one."""
    return [not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points) for x, y in points]


def front_points(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points of the front, each once, from the smallest first number on."""
    return sorted({point for point, best in zip(points, front(points), strict=True) if best})


def compare(
    rows: Sequence[dict[str, Any]], sums: Sequence[SetSums], baseline: int | None, samples: int, seed: int
) -> None:
    """Add to each row `pareto`, the costs in which no SAE with at most its L0 is better, and, where there is a
    baseline, `delta` (metrics.deltas). `sums` are those of the SAEs, row by row."""
    for row in rows:
        row["pareto"] = []
    for cost in COSTS:
        known = [row for row in rows if row["metrics"][cost]["value"] is not None]
        points = [(row["metrics"]["l0"]["value"], row["metrics"][cost]["value"]) for row in known]
        for row, best in zip(known, front(points), strict=True):
            row["pareto"] += [cost] * best
    if baseline is not None:
        for row, own in zip(rows, sums, strict=True):
            row["delta"] = deltas(own, sums[baseline], samples=samples, seed=seed)


def excess_at_equal_l0(points: Sequence[tuple[float, float]]) -> list[float]:
    """Compute how far each SAE's log NMSE lies above what the sweep has at its L0 (or below, as a negative number).

    Points are (L0, NMSE), both above 0. What the sweep has is the line of least squares through log NMSE against log L0
    of all SAEs, its slope never above 0, since more active latents do not reconstruct worse. Where all L0 are within
    ONE_L0 of each other there is no slope to be read, and the plain log NMSE is compared.
    """
    log_l0 = np.log([l0 for l0, _ in points])
    log_nmse = np.log([nmse for _, nmse in points])
    moved = log_l0 - log_l0.mean()
    slope = 0.0
    if np.ptp(log_l0) > math.log(ONE_L0):
        slope = min(0.0, float((moved * log_nmse).sum() / np.square(moved).sum()))
    excess = log_nmse - log_nmse.mean() - slope * moved
    return [float(value) for value in excess]


def best_at_equal_l0(sites: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Return the row of the SAE that lies furthest below its site's NMSE at equal L0; of equal ones the sparsest.

    In a sweep the densest SAE has the lowest NMSE whatever its quality; this one is best for its number of active
    latents. An SAE whose NMSE or L0 is 0 or unknown takes no part; where none can, the first row is taken.
    """
    ranked: list[tuple[float, float, int, dict[str, Any]]] = []
    for rows in sites:
        known = [row for row in rows if (row["metrics"]["nmse"]["value"] or 0) > 0 and row["metrics"]["l0"]["value"]]
        points = [(row["metrics"]["l0"]["value"], row["metrics"]["nmse"]["value"]) for row in known]
        for row, excess in zip(known, excess_at_equal_l0(points) if points else [], strict=True):
            # Rounded, so that SAEs that are equal but for rounding tie and the sparser one is taken on every machine.
            ranked.append((round(excess, 9), row["metrics"]["l0"]["value"], len(ranked), row))
    if not ranked:
        return sites[0][0]
    return min(ranked, key=lambda entry: entry[:3])[3]

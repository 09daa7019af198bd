"""Several SAEs of one site beside each other: which none beats, which is best at its L0, and how each differs from a
baseline."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.base.errors import UserError
from evaluate.metrics import SetSums, deltas, resampled, statistics, without_empty
from train.sae.metrics import ONE_L0, one_l0_groups

COSTS = ("nmse", "ce_increase")  # what should be low at a low L0


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


def verdict(rows: Sequence[dict[str, Any]], sums: Sequence[SetSums], samples: int, seed: int) -> list[dict[str, Any]]:
    """Name the best SAE by CE increase at each L0: a record for each group of SAEs of about one L0, sparsest first.

    l0: the smallest and the largest of the group. saes: their folders, the lowest CE increase first. best, next: the
    first two of them, `next` None where the group has one SAE. difference: CE increase of `next` less that of `best`,
    with its interval by the paired bootstrap (metrics.deltas). SAEs whose CE increase is not known take no part.
    """
    known = [i for i, row in enumerate(rows) if row["metrics"]["ce_increase"]["value"] is not None]
    l0s = [float(rows[i]["metrics"]["l0"]["value"]) for i in known]
    groups = []
    for places in one_l0_groups(l0s):
        ranked = sorted((known[place] for place in places), key=lambda i: rows[i]["metrics"]["ce_increase"]["value"])
        best, second = ranked[0], ranked[1] if len(ranked) > 1 else None
        difference = None
        if second is not None:
            difference = deltas(sums[second], sums[best], samples=samples, seed=seed)["ce_increase"]
        groups.append(
            {
                "l0": [l0s[places[0]], l0s[places[-1]]],
                "saes": [rows[i]["folder"] for i in ranked],
                "best": rows[best]["folder"],
                "next": None if second is None else rows[second]["folder"],
                "difference": difference,
            }
        )
    return groups


def add_excess(rows: Sequence[dict[str, Any]], sums: Sequence[SetSums], samples: int, seed: int) -> None:
    """Add to each row `at_equal_l0` where the L0 of three SAEs or more differ: how far its CE increase lies above what
    the sweep has at its L0, as a share of that, with its 95% interval (bootstrap over documents, paired)."""
    known = [i for i, row in enumerate(rows) if (row["metrics"]["ce_increase"]["value"] or 0) > 0]
    known = [i for i in known if rows[i]["metrics"]["l0"]["value"] > 0]
    l0_n = np.array([rows[i]["metrics"]["l0"]["value"] for i in known])
    if len(known) < 3 or l0_n.max() <= ONE_L0 * l0_n.min():
        return
    cost_n = np.array([rows[i]["metrics"]["ce_increase"]["value"] for i in known])
    drawn = [statistics(resampled(without_empty(sums[i].documents), samples=samples, seed=seed)) for i in known]
    share_n = np.expm1(_excess(l0_n[None], cost_n[None])[0])
    low_n = high_n = np.full(len(known), np.nan)
    l0_Sn = np.stack([draws["l0"] for draws in drawn], 1)
    cost_Sn = np.stack([draws["ce_increase"] for draws in drawn], 1)
    if len(np.unique(l0_Sn, axis=0)) > 1 and (cost_Sn > 0).all() and (l0_Sn > 0).all():
        low_n, high_n = np.percentile(np.expm1(_excess(l0_Sn, cost_Sn)), [2.5, 97.5], axis=0)
    for i, share, low, high in zip(known, share_n, low_n, high_n, strict=True):
        bounds = {name: float(bound) if np.isfinite(bound) else None for name, bound in (("low", low), ("high", high))}
        rows[i]["at_equal_l0"] = {"value": float(share), "se": None, **bounds}


def _excess(l0_Sn: NDArray[np.float64], cost_Sn: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute how far each log cost lies above the line of least squares through its draw's n SAEs."""
    log_l0_Sn, log_cost_Sn = np.log(l0_Sn), np.log(cost_Sn)
    moved_Sn = log_l0_Sn - log_l0_Sn.mean(1, keepdims=True)
    spread_S = np.ptp(log_l0_Sn, axis=1)
    slope_S = (moved_Sn * log_cost_Sn).sum(1) / np.maximum(np.square(moved_Sn).sum(1), np.finfo(float).tiny)
    slope_S = np.where(spread_S > math.log(ONE_L0), np.minimum(0.0, slope_S), 0.0)
    excess_Sn: NDArray[np.float64] = log_cost_Sn - log_cost_Sn.mean(1, keepdims=True) - slope_S[:, None] * moved_Sn
    return excess_Sn


def excess_at_equal_l0(points: Sequence[tuple[float, float]]) -> list[float]:
    """Compute how far each SAE's log NMSE lies above what the sweep has at its L0 (or below, as a negative number).

    Points are (L0, NMSE), both above 0. What the sweep has is the line of least squares through log NMSE against log L0
    of all SAEs, its slope never above 0, since more active latents do not reconstruct worse. Where all L0 are within
    ONE_L0 of each other there is no slope to be read, and the plain log NMSE is compared.
    """
    l0_n, nmse_n = np.array(points).T
    return [float(value) for value in _excess(l0_n[None], nmse_n[None])[0]]


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

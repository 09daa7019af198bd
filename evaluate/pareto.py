"""Several SAEs of one site beside each other: which none beats, and what each has more or less than a baseline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.base.errors import UserError
from evaluate.metrics import Columns, deltas

COSTS = ("nmse", "ce_increase")  # what is wanted low at a low L0


def _named(folder: Path, asked: str) -> bool:
    return folder.name == asked or folder.resolve() == Path(asked).resolve()


def require_baseline(folders: Sequence[Path], asked: str | None) -> None:
    """UserError where a baseline is asked for and none of the SAEs is it."""
    if asked is not None and not any(_named(folder, asked) for folder in folders):
        raise UserError(
            f"baseline={asked} is none of the SAEs in saes: name the folder of one of them, or its last part"
        )


def baseline_of(folders: Sequence[Path], asked: str | None) -> int | None:
    """Which of the SAEs of a site is `asked` for by folder or by the folder's last part; None where none is.

    UserError where several are.
    """
    found = [i for i, folder in enumerate(folders) if asked is not None and _named(folder, asked)]
    if len(found) > 1:
        raise UserError(f"baseline={asked} names {len(found)} SAEs of one site: give the whole folder of the one meant")
    return found[0] if found else None


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Whether no other point is at most as large in both numbers and smaller in one."""
    return [not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points) for x, y in points]


def compare(
    rows: Sequence[dict[str, Any]], columns: Sequence[Columns], baseline: int | None, samples: int, seed: int
) -> None:
    """Add to each row `pareto`, the costs in which no SAE with at most its L0 is better, and, where there is a
    baseline, `delta` (metrics.deltas). `columns` are the per-context sums, row by row."""
    for row in rows:
        row["pareto"] = []
    for cost in COSTS:
        known = [row for row in rows if row["metrics"][cost]["value"] is not None]
        points = [(row["metrics"]["l0"]["value"], row["metrics"][cost]["value"]) for row in known]
        for row, best in zip(known, front(points), strict=True):
            row["pareto"] += [cost] * best
    if baseline is not None:
        for row, own in zip(rows, columns, strict=True):
            row["delta"] = deltas(own, columns[baseline], samples=samples, seed=seed)

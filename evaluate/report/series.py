"""The numbers of each figure of a report, worked out once; png.py and figures.py draw them.

Letters: n SAEs of a line.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ReportRow = dict[str, Any]  # one SAE of the report

# Okabe and Ito's colours, told apart with any colour vision; each variant has its colour and marker in every figure.
STYLES = {
    "relu": ("#000000", "o"),
    "topk": ("#E69F00", "s"),
    "batchtopk": ("#0072B2", "^"),
    "matryoshka": ("#009E73", "D"),
    "gated": ("#CC79A7", "v"),
    "jumprelu": ("#D55E00", "P"),
}
OTHER = ("#56B4E9", "X")
WIDE = 4.0  # a quantity that spans more than this factor is drawn on a log axis
MOST_BINS = 60  # of the histogram of L0
METRICS_CSV = "metrics.csv"  # in an SAE's folder, where training logged into one


def is_wide(values: Sequence[float]) -> bool:
    """Return whether an axis with these values should be logarithmic."""
    return bool(values) and min(values) > 0 and max(values) > WIDE * min(values)


def families(rows: Sequence[ReportRow]) -> Iterator[tuple[str, str, list[ReportRow]]]:
    """Yield (label, variant, rows in order of L0) of each line to draw:
    a variant, split by width where the widths differ."""
    several = len({row["width"] for row in rows}) > 1
    keys = sorted({(row["variant"], row["width"]) for row in rows})
    for variant, width in keys:
        label = f"{variant}, F={width:,}" if several else variant
        own = [row for row in rows if (row["variant"], row["width"]) == (variant, width)]
        yield label, variant, sorted(own, key=lambda row: float(row["metrics"]["l0"]["value"]))


@dataclass(frozen=True)
class Line:
    """A metric of the SAEs of one variant and width against their mean L0, with one standard error of each."""

    label: str
    variant: str
    rows: list[ReportRow]
    l0: list[float]
    l0_error: list[float]
    value: list[float]
    value_error: list[float]


@dataclass(frozen=True)
class AgainstL0:
    """A metric against mean L0: a line a variant and width, and the points of the Pareto front in order of L0."""

    lines: list[Line]
    front: list[tuple[float, float]]

    @property
    def l0(self) -> list[float]:
        """Return the L0 of every SAE."""
        return [l0 for line in self.lines for l0 in line.l0]

    @property
    def value(self) -> list[float]:
        """Return the metric of every SAE."""
        return [value for line in self.lines for value in line.value]


def against_l0(rows: Sequence[ReportRow], metric: str) -> AgainstL0:
    """Choose the SAEs whose metric is known; the front is what `pareto` in their rows says (evaluate/pareto.py)."""
    known = [row for row in rows if row["metrics"].get(metric, {}).get("value") is not None]
    lines = []
    for label, variant, own in families(known):
        values = {name: [float(row["metrics"][name]["value"]) for row in own] for name in ("l0", metric)}
        errors = {name: [row["metrics"][name]["se"] or 0.0 for row in own] for name in ("l0", metric)}
        lines.append(Line(label, variant, own, values["l0"], errors["l0"], values[metric], errors[metric]))
    best = {
        (float(row["metrics"]["l0"]["value"]), float(row["metrics"][metric]["value"]))
        for row in known
        if metric in row["pareto"]
    }
    return AgainstL0(lines, sorted(best))


@dataclass(frozen=True)
class L0Histogram:
    """The share of tokens at each number of active latents, in bins of `step` numbers each.

    first: the smallest number of each bin. shares: of each SAE, the share of its tokens at one number of a bin.
    least: below the share of one token, for a log axis.
    """

    step: int
    first: list[int]
    shares: list[list[float]]
    least: float


def l0_histogram(rows: Sequence[ReportRow]) -> L0Histogram:
    """Count as far as 99.9% of each SAE's tokens reach, in at most MOST_BINS bins that hold as many numbers each."""
    histograms = [row["l0"]["histogram"] for row in rows]
    top = max(int(np.searchsorted(np.cumsum(counts), 0.999 * sum(counts))) for counts in histograms)
    step = max(1, math.ceil((top + 1) / MOST_BINS))
    bins = top // step + 1
    shares = []
    for counts in histograms:
        padded = np.pad(np.asarray(counts, dtype=float), (0, max(0, bins * step - len(counts))))
        shares.append((padded[: bins * step].reshape(-1, step).sum(1) / sum(counts) / step).tolist())
    least = 0.5 / max(sum(counts) for counts in histograms)
    return L0Histogram(step, [number * step for number in range(bins)], shares, least)


@dataclass(frozen=True)
class Densities:
    """How many latents of each SAE fire on which share of the tokens; bins are equal on a log axis."""

    edges: list[float]
    counts: list[list[int]]


def densities(rows: Sequence[ReportRow], tokens: int) -> Densities:
    """Count the latents by density; those that never fire are in no bin."""
    edges = np.logspace(math.floor(math.log10(1 / tokens)), 0, 41)
    counts = []
    for row in rows:
        density = np.asarray(row["l0"]["fired"], dtype=float) / tokens
        counts.append(np.histogram(density[density > 0], bins=edges)[0].tolist())
    return Densities(edges.tolist(), counts)


def training_log(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Read the steps and values of each `train/` column of an SAE's metrics.csv;
    empty where there is no such file."""
    try:
        with (folder / METRICS_CSV).open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
    except OSError:
        return {}
    logged: dict[str, tuple[list[int], list[float]]] = {}
    for line in lines:
        for name, text in line.items():
            value = _number(text) if isinstance(name, str) and name.startswith("train/") else None
            step = _number(line.get("step"))
            if value is None or step is None:
                continue
            steps, values = logged.setdefault(name.removeprefix("train/"), ([], []))
            steps.append(int(step))
            values.append(value)
    return logged


def _number(text: Any) -> float | None:
    """Read a finite number, or None for whatever else a damaged log may hold."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None

"""What a sweep varied: the settings in which the SAEs of a site differ, as columns of its tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from data.base.records import Json
from evaluate.report.columns import Column

# Settings that every SAE has, whatever its variant: these may differ between variants too.
OF_ALL_VARIANTS = ("width", "tokens", "batch", "seed", "lr")
# Of the record of a training: what was asked for, not what came out of it.
ASKED = ("tokens", "batch", "seed", "clip", "ema", "lr_at_width", "outliers")
LONG_NAMES = {"tokens": "training tokens", "lr": "learning rate"}


def run_settings(row: Json) -> dict[str, Any]:
    """Return the settings of an SAE that a sweep may vary, by their short names."""
    training, optimizer = row["training"], row["training"].get("optimizer") or {}
    own = {name: value for name, value in row["settings"].items() if name != "d_in"}
    own |= {name: training[name] for name in ASKED if name in training}
    return own | {name: value for name, value in optimizer.items() if name != "fused"}


def varied(rows: Sequence[Json]) -> list[str]:
    """Name the settings in which the SAEs differ: within a variant any, between variants those that all have.

    A learning rate that the training chose by itself is no setting, so it alone does not count between variants.
    """
    settings = [run_settings(row) for row in rows]
    chosen = [row["training"].get("lr_asked") == "auto" for row in rows]
    names = list(dict.fromkeys(name for one in settings for name in one))

    def differ(name: str, among: Sequence[int]) -> bool:
        return len({repr(settings[i][name]) for i in among if name in settings[i]}) > 1

    variants = dict.fromkeys(row["variant"] for row in rows)
    of_variant = [[i for i, row in enumerate(rows) if row["variant"] == variant] for variant in variants]
    between = [name for name in OF_ALL_VARIANTS if name != "lr" or not all(chosen)]
    everyone = range(len(rows))
    return [
        name
        for name in names
        if any(differ(name, among) for among in of_variant) or (name in between and differ(name, everyone))
    ]


def sweep_columns(rows: Sequence[Json]) -> list[Column]:
    """Return a column for each setting in which the SAEs differ."""

    def column(name: str) -> Column:
        definition = "a setting in which these SAEs differ."
        return Column(name, LONG_NAMES.get(name, name), 0, definition, lambda row: written(run_settings(row).get(name)))

    return [column(name) for name in varied(rows)]


def written(value: Any) -> int | str | None:
    """Return a setting as a table shows it."""
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(str(written(part)) for part in value) if isinstance(value, list | tuple) else str(value)

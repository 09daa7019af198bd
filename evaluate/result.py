"""What a call of `evaluate.evaluate` gives back: the report as numbers, as a table and as files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data.base.records import Json


@dataclass(frozen=True)
class Report:
    """A finished evaluation.

    path: of report.md; report.json, report.html and plots/ lie beside it.
    """

    path: Path

    @property
    def page(self) -> Path:
        """Return the page to be opened in a browser."""
        return self.path.with_suffix(".html")

    @cached_property
    def content(self) -> Json:
        """Read report.json: every number, by site and SAE, with its standard error."""
        content: Json = json.loads(self.path.with_suffix(".json").read_text(encoding="utf-8"))
        return content

    def rows(self) -> list[Json]:
        """List the SAEs as flat rows, as for `pandas.DataFrame`: site, variant, width, folder and each metric's value.

        A metric's standard error, where it has one, is beside it as `<metric>_se`.
        """
        return [_flat(site["site"], row) for site in self.content["sites"] for row in site["saes"]]

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def _repr_markdown_(self) -> str:
        """Show the table where a notebook shows the value of a cell."""
        return self.path.read_text(encoding="utf-8")


def _flat(site: str, row: Json) -> Json:
    flat = {"site": site, **{name: row[name] for name in ("variant", "width", "folder")}}
    for name, metric in row["metrics"].items():
        flat[name] = metric["value"]
        if metric.get("se") is not None:
            flat[f"{name}_se"] = metric["se"]
    return flat

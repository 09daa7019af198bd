"""The report's JSON as tables: the columns known here first, in their order, then whatever else an SAE's row holds."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from data.base.records import Json
from evaluate.report.columns import (
    ARROWS,
    BY_KEY,
    DEFINITIONS,
    EQUAL_L0,
    OF_SITE,
    PARETO,
    SHIPPED,
    SPLICE,
    sae_name,
    sparsity_setting,
)
from evaluate.report.digits import measured, plain, with_interval
from evaluate.report.series import OTHER, STYLES
from evaluate.report.sweep import sweep_columns
from evaluate.report.together import TOGETHER, together_rows

FIRST = tuple(column.key for column in SPLICE)  # the metrics of the first table
SITE = tuple(column.key for column in OF_SITE)
HEADINGS = {column.key: column.heading for column in (*BY_KEY.values(), EQUAL_L0, PARETO)} | {"asked": "asked"}
BETTER = {column.heading: column.better for column in (*BY_KEY.values(), EQUAL_L0)}
TITLES = {
    "delta": "Differences from the baseline, with their intervals",
    "gao": "Feature metrics (Gao et al.)",
    "all_rows": "Over all rows, the massive ones among them",
}
# Of an SAE's row: what tables and figures already show.
SHOWN = {"number", "variant", "metrics", "l0", "settings", "training", "storage_share", "pareto", EQUAL_L0.key}
# The markers of the plots, as text.
SIGNS = {"o": "●", "s": "■", "^": "▲", "D": "◆", "v": "▼", "P": "✚", "X": "✖"}
BLACK = "#000000"  # would not be seen on a dark page, which the text's own colour is


@dataclass(frozen=True)
class Cell:
    """What stands in a table; `key` is what it is sorted by.

    sign, colour: the marker of an SAE in the plots. best: whether it names the best SAE at its L0.
    """

    text: str
    error: str = ""
    key: float | str = ""
    sign: str = ""
    colour: str = ""
    best: bool = False


@dataclass(frozen=True)
class Head:
    """The heading of a column, what it means, and whether lower or higher values are better."""

    text: str
    definition: str = ""
    better: str = ""

    @property
    def arrow(self) -> str:
        """Return the arrow to the better values."""
        return ARROWS.get(self.better, "")


@dataclass(frozen=True)
class Table:
    title: str
    heads: list[Head]
    rows: list[list[Cell]]

    @property
    def worded(self) -> list[bool]:
        """Return of each column whether it holds words, which stand at its left; a dash among them stands there too."""
        return [any(isinstance(cell.key, str) for cell in column) for column in zip(*self.rows, strict=True)]


def heading(name: str) -> str:
    return HEADINGS.get(name, name.replace("_", " "))


def head(text: str) -> Head:
    """Return the heading of a column with what is known of it."""
    return Head(text, DEFINITIONS.get(text, ""), BETTER.get(text, ""))


def sae_cell(row: Json, best: Collection[str] = frozenset()) -> Cell:
    """Name an SAE, with its marker in the plots."""
    colour, marker = STYLES.get(row["variant"], OTHER)
    return Cell(
        sae_name(row),
        key=float(row["number"]),
        sign=SIGNS.get(marker, "✖"),
        colour="" if colour == BLACK else colour,
        best=row["folder"] in best,
    )


def is_entry(value: Any) -> bool:
    """Return whether this is a statistic with its standard error, its interval or both."""
    return isinstance(value, dict) and "value" in value and set(value) <= {"value", "se", "low", "high"}


def is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float) or is_entry(value) or is_words(value)


def is_words(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(word, str) for word in value)


def cell(value: Any) -> Cell:
    """Format a value; one that is not known is a dash and sorts last."""
    if is_entry(value):
        if value["value"] is None:
            return cell(None)
        if value.get("low") is not None:
            text, error = with_interval(value["value"], value["low"], value["high"])
            return Cell(text, error, float(value["value"]))
        text, error = measured(value["value"], value.get("se"))
        return Cell(text, f"± {error}" if error else "", float(value["value"]))
    if value is None or value == []:
        return Cell("–", key=float("inf"))
    if isinstance(value, list):
        return cell(", ".join(map(heading, value)))
    if isinstance(value, str | bool):
        return Cell(str(value), key=str(value))
    return Cell(f"{value:,}" if isinstance(value, int) else plain(value), key=float(value))


def rows_table(
    title: str, rows: Sequence[Json], parts: Sequence[Json], best: Collection[str] = frozenset()
) -> Table | None:
    """Make a table, a line an SAE, of what `parts` hold of each, columns in the order met; None where there are none.

    The SAEs whose folders are in `best` are marked.
    """
    names = list(dict.fromkeys(name for part in parts for name, value in part.items() if is_plain(value)))
    if not names:
        return None
    lines = [
        [sae_cell(row, best), *(cell(part.get(name)) for name in names)] for row, part in zip(rows, parts, strict=True)
    ]
    return Table(title, [head("SAE"), *(head(heading(name)) for name in names)], lines)


def in_key_order(part: Any, first: Sequence[str], without: Sequence[str] = ()) -> Json:
    """Choose of a dict the names in `first`, or where that is empty all but those in `without`;
    nothing of what is no dict."""
    if not isinstance(part, dict):
        return {}
    return {name: part[name] for name in first or part if name in part and name not in without}


def sae_tables(rows: Sequence[Json], best: Collection[str] = frozenset()) -> list[Table]:
    """Give the tables of the SAEs of a site; those whose folders are in `best` are marked."""
    swept = sweep_columns(rows)
    first = [
        {column.heading: column.read(row) for column in swept}
        | in_key_order(row["metrics"], FIRST)
        | ({EQUAL_L0.key: row[EQUAL_L0.key]} if EQUAL_L0.key in row else {})
        | {PARETO.key: PARETO.read(row) if "pareto" in row else None}
        for row in rows
    ]
    detail = [
        {name: value for name, value in row["metrics"].items() if name not in (*FIRST, *SITE)}
        | {"L0 sd": row["l0"]["std"], "silent": row["l0"]["silent"], "dead": row["training"].get("dead")}
        | {"storage share": row["storage_share"]}
        for row in rows
    ]
    sizes = [
        {"asked": sparsity_setting(row["settings"])}
        | {
            name: value
            for name, value in row.items()
            if (name, value) != ("form", SHIPPED) and name not in {*SHOWN, "folder"}
        }
        | {"training tokens": row["training"].get("tokens"), "seed": row["training"].get("seed")}
        | {"folder": row["folder"]}
        for row in rows
    ]
    more = dict.fromkeys(name for row in rows for name, v in row.items() if name not in SHOWN and not is_plain(v))
    others = [(name, [in_key_order(row.get(name), (), SITE) for row in rows]) for name in more]
    titled = [("What the splice costs", first), ("Reconstruction and firing", detail), ("The SAEs", sizes)]
    titled += [(title_of(name), parts) for name, parts in others]
    return [table for title, parts in titled if (table := rows_table(title, rows, parts, best))]


def together_table(report: Json, together: Json) -> Table:
    """Make the table of a replacement model, of each of its parts alone and of the ablations."""
    rows = [
        [Cell(row.name, key=float(number)), *(cell(row.metrics[column.key]) for column in TOGETHER)]
        for number, row in enumerate(together_rows(report, together))
    ]
    return Table("What they cost together and alone", [head("replaced"), *(head(c.heading) for c in TOGETHER)], rows)


def title_of(*names: str) -> str:
    first, *rest = names
    return ", ".join([TITLES.get(first, heading(first).capitalize()), *map(heading, rest)])


def plain_table(title: str, lines: Iterable[Json]) -> Table | None:
    """Make a table of dicts, those within them as columns of their own; None where nothing in them is plain."""
    flat = [
        {
            name: value
            for key, part in line.items()
            for name, value in ([(key, part)] if is_plain(part) or not isinstance(part, dict) else inner(key, part))
            if is_plain(value)
        }
        for line in lines
    ]
    names = list(dict.fromkeys(name for line in flat for name in line))
    rows = [[cell(line.get(name)) for name in names] for line in flat]
    return Table(title, [head(heading(name)) for name in names], rows) if names and rows else None


def inner(key: str, part: Json) -> list[tuple[str, Any]]:
    return [(f"{key} {name}", value) for name, value in part.items()]


def site_tables(site: Json, shown: set[str]) -> list[Table]:
    """Make tables of what else a site holds: a table of each list of dicts, as deep as there are,
    and of each dict of dicts."""
    tables: list[Table | None] = []

    def add(value: Any, *names: str) -> None:
        if isinstance(value, list) and value and all(isinstance(line, dict) for line in value):
            tables.append(plain_table(title_of(*names), value))
        elif isinstance(value, dict) and value and not is_entry(value):
            if all(isinstance(part, dict) and not is_entry(part) for part in value.values()):
                tables.append(plain_table(title_of(*names), [{names[-1]: key} | part for key, part in value.items()]))
                return
            tables.append(plain_table(title_of(*names), [{k: part for k, part in value.items() if is_plain(part)}]))
            for key, part in value.items():
                add(part, *names, key)

    for name, value in site.items():
        if name not in shown:
            add(value, name)
    return [table for table in tables if table is not None]

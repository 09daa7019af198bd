"""The report's JSON as tables: the columns known here first, in their order, then whatever else an SAE's row holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from data.base.records import Json
from evaluate.report.columns import BY_KEY, OF_SITE, SHIPPED, SPLICE, sae_name, sparsity_setting

FIRST = tuple(column.key for column in SPLICE)  # the metrics of the first table
SITE = tuple(column.key for column in OF_SITE)
HEADINGS = {column.key: column.heading for column in BY_KEY.values()} | {"asked": "asked"}
TITLES = {
    "delta": "Differences from the baseline, with their intervals",
    "gao": "Feature metrics (Gao et al.)",
    "all_rows": "Over all rows, the massive ones among them",
}
# Of an SAE's row: what tables and figures already show.
SHOWN = {"number", "variant", "metrics", "l0", "settings", "training", "storage_share"}


@dataclass(frozen=True)
class Cell:
    """What stands in a table; `key` is what it is sorted by."""

    text: str
    error: str = ""
    key: float | str = ""


@dataclass(frozen=True)
class Table:
    title: str
    heads: list[str]
    rows: list[list[Cell]]


def heading(name: str) -> str:
    return HEADINGS.get(name, name.replace("_", " "))


def figure(value: float, digits: int = 4) -> str:
    """Format so many significant digits, trailing zeros kept, as a plain number where that is short."""
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:#.{digits}g}".removesuffix(".")


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
        inner, error = cell(value["value"]), ""
        if value.get("low") is not None:
            error = f"[{figure(value['low'], 3)}, {figure(value['high'], 3)}]"
        elif value.get("se") is not None:
            error = f"± {figure(value['se'], 2)}"
        return Cell(inner.text, error, inner.key)
    if value is None or value == []:
        return Cell("–", key=float("inf"))
    if isinstance(value, list):
        return cell(", ".join(map(heading, value)))
    if isinstance(value, str | bool):
        return Cell(str(value), key=str(value))
    return Cell(f"{value:,}" if isinstance(value, int) else figure(value), key=float(value))


def rows_table(title: str, rows: Sequence[Json], parts: Sequence[Json]) -> Table | None:
    """Make a table, a line an SAE, of what `parts` hold of each, columns in the order met;
    None where there are none."""
    names = list(dict.fromkeys(name for part in parts for name, value in part.items() if is_plain(value)))
    if not names:
        return None
    lines = [
        [Cell(sae_name(row), key=float(row["number"])), *(cell(part.get(name)) for name in names)]
        for row, part in zip(rows, parts, strict=True)
    ]
    return Table(title, ["SAE", *map(heading, names)], lines)


def in_key_order(part: Any, first: Sequence[str], without: Sequence[str] = ()) -> Json:
    """Choose of a dict the names in `first`, or where that is empty all but those in `without`;
    nothing of what is no dict."""
    if not isinstance(part, dict):
        return {}
    return {name: part[name] for name in first or part if name in part and name not in without}


def sae_tables(rows: Sequence[Json]) -> list[Table]:
    """Give the tables of the SAEs of a site."""
    metrics = [row["metrics"] for row in rows]
    first = [in_key_order(part, FIRST) for part in metrics]
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
    return [table for title, parts in titled if (table := rows_table(title, rows, parts))]


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
    return Table(title, [heading(name) for name in names], rows) if names and rows else None


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

"""The report's JSON as tables: the columns known here first, in their order, then whatever else an SAE's row holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]

# Metrics of the first table, and how headings are written; what is not named here keeps its own name.
FIRST = ("l0", "nmse", "ce_spliced", "ce_increase", "recovered_zero", "recovered_mean", "kl")
HEADINGS = {
    **{"l0": "L0", "nmse": "NMSE", "nmse_token": "NMSE token", "nmse_btk": "NMSE btk", "ev": "EV"},
    **{"ce_spliced": "CE", "ce_clean": "CE clean", "ce_zero": "CE zero", "ce_mean": "CE mean", "kl": "KL"},
    **{"ce_increase": "CE increase"},
}
SITE = ("ce_clean", "ce_zero", "ce_mean")  # the same for all SAEs of a site
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
    """So many significant digits, trailing zeros kept, as a plain number where that is short."""
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:#.{digits}g}".removesuffix(".")


def is_entry(value: Any) -> bool:
    """Whether this is a statistic with its standard error."""
    return isinstance(value, dict) and set(value) == {"value", "se"}


def is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float) or is_entry(value)


def cell(value: Any) -> Cell:
    """A value that is not known is a dash and sorts last."""
    if is_entry(value):
        inner = cell(value["value"])
        return inner if value["se"] is None else Cell(inner.text, f"± {figure(value['se'], 2)}", inner.key)
    if value is None:
        return Cell("–", key=float("inf"))
    if isinstance(value, str | bool):
        return Cell(str(value), key=str(value))
    return Cell(f"{value:,}" if isinstance(value, int) else figure(value), key=float(value))


def sae_name(row: Json) -> str:
    """An SAE of the report by its number."""
    return f"{row['number']} {row['variant']}"


def rows_table(title: str, rows: Sequence[Json], parts: Sequence[Json]) -> Table | None:
    """A line an SAE of what `parts` hold of each, columns in the order met; None where there are none."""
    names = list(dict.fromkeys(name for part in parts for name, value in part.items() if is_plain(value)))
    if not names:
        return None
    lines = [
        [Cell(sae_name(row), key=float(row["number"])), *(cell(part.get(name)) for name in names)]
        for row, part in zip(rows, parts, strict=True)
    ]
    return Table(title, ["SAE", *map(heading, names)], lines)


def asked(settings: Json) -> str:
    """How sparse an SAE was asked to be."""
    known = ((name, settings.get(name)) for name in ("k", "sparsity"))
    return ", ".join(f"{name}={value:g}" for name, value in known if value is not None)


def sae_tables(rows: Sequence[Json]) -> list[Table]:
    """All that is told of the SAEs of a site."""
    metrics = [row["metrics"] for row in rows]
    first = [{name: part[name] for name in FIRST if name in part} for part in metrics]
    detail = [
        {name: value for name, value in row["metrics"].items() if name not in (*FIRST, *SITE)}
        | {"L0 sd": row["l0"]["std"], "silent": row["l0"]["silent"], "dead": row["training"].get("dead")}
        | {"storage share": row["storage_share"]}
        for row in rows
    ]
    sizes = [
        {"asked": asked(row["settings"])}
        | {name: value for name, value in row.items() if name not in SHOWN and name != "folder"}
        | {"training tokens": row["training"].get("tokens"), "seed": row["training"].get("seed")}
        | {"folder": row["folder"]}
        for row in rows
    ]
    more = dict.fromkeys(name for row in rows for name, v in row.items() if name not in SHOWN and not is_plain(v))
    others = [(name, [part if isinstance(part := row.get(name), dict) else {} for row in rows]) for name in more]
    titled = [("What the splice costs", first), ("Reconstruction and firing", detail), ("The SAEs", sizes)]
    titled += [(heading(name).capitalize(), parts) for name, parts in others]
    return [table for title, parts in titled if (table := rows_table(title, rows, parts))]


def plain_table(title: str, lines: Iterable[Any]) -> Table | None:
    """A table of dicts with plain values; None where they are not that."""
    lines = list(lines)
    if not lines or not all(isinstance(line, dict) for line in lines):
        return None
    names = list(dict.fromkeys(name for line in lines for name, value in line.items() if is_plain(value)))
    cells = [[cell(line.get(name)) for name in names] for line in lines]
    return Table(title, [heading(name) for name in names], cells) if names else None


def site_tables(site: Json, shown: set[str]) -> list[Table]:
    """What else a site holds: a table for each list of dicts, and for each dict of dicts, its names in front."""
    tables = []
    for name, value in site.items():
        if name in shown:
            continue
        if isinstance(value, dict) and value and all(isinstance(part, dict) for part in value.values()):
            value = [{name: key} | part for key, part in value.items()]
        if isinstance(value, list | dict):
            tables.append(plain_table(heading(name).capitalize(), value if isinstance(value, list) else [value]))
    return [table for table in tables if table is not None]

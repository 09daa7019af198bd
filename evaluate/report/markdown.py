"""The report: `report.json` holds every number, `report.md` the tables one reads, `plots/` the figures."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from pathlib import Path

from data.base.files import write_atomic
from data.base.records import Json
from evaluate.feature_metrics.table import feature_section
from evaluate.report.columns import (
    ALL_ROWS,
    BATCH,
    BY_KEY,
    DEFINITIONS,
    DELTAS,
    DETAIL,
    EQUAL_L0,
    OF_SITE,
    PARETO,
    SIZES,
    SPLICE,
    STAR,
    Column,
    best_at_their_l0,
    few_documents,
    massive_rows,
    sae_name,
)
from evaluate.report.crosscoders import (
    HEADS,
    METRICS,
    crosscoder_cells,
    crosscoder_sentences,
    crosscoder_title,
    draw_shares,
)
from evaluate.report.digits import measured, with_interval
from evaluate.report.sweep import sweep_columns
from evaluate.report.together import TOGETHER, together_rows, together_sentences, together_title
from evaluate.report.verdict import verdict_sentences


def write_markdown(report: Json, out: Path) -> Path:
    """Write `report.json`, the figures and, last, `report.md` into `out`; the path of `report.md`."""
    from evaluate.report.png import draw_site

    out.mkdir(parents=True, exist_ok=True)
    for site, stem in zip(report["sites"], stems(report["sites"]), strict=True):
        site["plots"] = [f"plots/{name}" for name in draw_site(site, out / "plots", stem)]
    for number, entry in enumerate(report.get("crosscoders", []), 1):
        name = f"plots/crosscoder-{number}-shares.png"
        entry["plots"] = [name] if draw_shares(entry, out / name) else []
    write_atomic(out / "report.json", dumps(report))
    write_atomic(out / "report.md", markdown(report))
    return out / "report.md"


def stems(sites: list[Json]) -> list[str]:
    """Return a short file name for each site, with the store's folder only where two stores are in one report."""
    several = len({site["fingerprint"] for site in sites}) > 1
    names = [f"{site['store']}-{site['site']}" if several else site["site"] for site in sites]
    return [re.sub(r"[^\w.-]+", "-", name) for name in names]


def dumps(report: Json) -> str:
    """Write indented JSON in which a list of plain numbers stays on one line."""
    text = json.dumps(report, indent=1, allow_nan=False)
    return re.sub(r"\[[\s\d.,eE+-]*(?:null[\s\d.,eE+-]*)*\]", lambda match: re.sub(r"\s+", " ", match[0]), text) + "\n"


def format_number(value: float | None, digits: int = 3) -> str:
    """Format with a fixed number of decimals, more where the value is small; a dash for what is not known."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if value == 0 or abs(value) >= 10**-digits else f"{value:.1e}"


def statistic(entry: Json, digits: int = 3) -> str:
    """Format `value ± standard error`, or `value [low, high]`, with digits that agree with the error."""
    if entry["value"] is not None and entry.get("low") is not None:
        return " ".join(with_interval(entry["value"], entry["low"], entry["high"]))
    if entry["value"] is None or not entry["se"]:
        return format_number(entry["value"], digits)
    return " ± ".join(measured(entry["value"], entry["se"]))


def table(heads: list[str], rows: list[list[str]]) -> str:
    """Write a Markdown table, its first column to the left and the rest to the right."""
    lines = [heads, [":--"] + ["--:"] * (len(heads) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def column_cell(row: Json, column: Column, *, error: bool = True) -> str:
    """Format a column's value of an SAE, with its standard error where it has one and `error`."""
    value = column.read(row)
    if isinstance(value, dict):
        return statistic(value, column.digits) if error else format_number(value["value"], column.digits)
    if value is None or isinstance(value, float):
        return format_number(value, column.digits)
    return f"{value:,}" if isinstance(value, int) else str(value)


def sae_table(
    rows: list[Json], columns: Sequence[Column], *, error: bool = True, best: Collection[str] = frozenset()
) -> str:
    """Write a table of the SAEs of a site; those whose folders are in `best` are marked."""
    names = [f"**{sae_name(row)}** {STAR}" if row["folder"] in best else sae_name(row) for row in rows]
    cells = [
        [name, *(column_cell(row, column, error=error) for column in columns)]
        for name, row in zip(names, rows, strict=True)
    ]
    return table(["SAE", *(column.titled for column in columns)], cells)


def _delta(row: Json, metric: str, digits: int) -> str:
    """Format `difference [low, high]`, bold where the interval does not hold 0."""
    entry = row["delta"][metric]
    if entry["low"] is None:
        return format_number(entry["value"], digits)
    text = " ".join(with_interval(entry["value"], entry["low"], entry["high"], signed=True))
    return f"**{text}**" if entry["low"] > 0 or entry["high"] < 0 else text


def _comparison(site: Json) -> list[str]:
    """Write a heading line and the table of differences, where there is a baseline."""
    if site["baseline"] is None:
        return []
    l0, columns = BY_KEY["l0"], [BY_KEY[key] for key in DELTAS]
    (named,) = [sae_name(row) for row in site["saes"] if row["folder"] == site["baseline"]]
    rows = [
        [sae_name(row), column_cell(row, l0), *(_delta(row, column.key, column.digits) for column in columns)]
        for row in site["saes"]
        if row["folder"] != site["baseline"]
    ]
    heads = ["SAE", l0.heading, *(f"Δ {column.heading}" for column in columns)]
    return [f"Differences from **{named}** (`{site['baseline']}`):", table(heads, rows)]


def _all_rows(rows: list[Json]) -> list[str]:
    """Write a heading line and the table over all rows, where massive ones are among them."""
    if "all_rows" not in rows[0]:
        return []
    columns = [BY_KEY[key] for key in ALL_ROWS]
    cells = [[sae_name(row), *(statistic(row["all_rows"][c.key], c.digits) for c in columns)] for row in rows]
    return ["Over all rows, the massive ones among them:", table(["SAE", *(c.heading for c in columns)], cells)]


def _site_lines(site: Json) -> list[str]:
    first = site["saes"][0]
    ce = ", ".join(f"{column.heading.removeprefix('CE ')} {column_cell(first, column)}" for column in OF_SITE)
    storage = site["storage"]
    documents = f" of {site['documents']:,} documents" if "documents" in site else ""
    lines = [
        f"LM: {site['model']}; site {site['site']}, width {site['d_model']:,};"
        f" store `{site['store']}` (fingerprint `{site['fingerprint']}`).",
        f"Token set: {site['tokens']:,} held-out tokens in {site['sequences']:,} contexts of {site['context']:,}"
        f"{documents} ({site['excluded']:,} special tokens excluded: neither scored nor replaced);"
        f" CE over {site['predicted']:,} predicted tokens: each kept token that is not the first of its context.",
        f"CE in nats: {ce} (zero and mean: the kept tokens' x set to 0, or to the training mean).",
        f"Storage: x is rounded to {storage['dtype']} in the store;"
        f" rounding alone has NMSE {format_number(storage['nmse'], 6)}."
        " The splice itself uses x unrounded.",
    ]
    if "inputs" in site:
        lines.append(
            f"Transcoders read {', '.join(site['inputs'])}; their x̂ is what they predict of {site['site']}, and takes"
            " its place."
        )
    if "crosscoders" in site:
        lines.append(
            f"Crosscoders read {'; '.join(site['crosscoders'])}, all untouched; their x̂ of {site['site']} takes its"
            " place, and no other site is replaced."
        )
    if "text" in site:
        text = site["text"]
        lines.append(
            f"Text: the user's own ({', '.join(text['paths'])}; {text['documents']:,} documents, sha256"
            f" `{text['sha256'][:16]}`), none of it in the training split."
        )
    few = few_documents(site)
    return [f"- {line}" for line in [*lines, *massive_rows(site), *([f"**{few}**"] if few else [])]]


def _site_section(site: Json) -> str:
    rows = site["saes"]
    equal_l0 = [EQUAL_L0] if any(EQUAL_L0.read(row) is not None for row in rows) else []
    figures = "\n\n".join(f"![{Path(plot).stem}]({plot})" for plot in site["plots"])
    parts = [
        f"## {site['site']} of {site['model']}",
        "\n".join(_site_lines(site)),
        "\n\n".join(f"**{sentence}**" for sentence in verdict_sentences(site)),
        sae_table(rows, [*sweep_columns(rows), *SPLICE, *equal_l0, PARETO], best=best_at_their_l0(site)),
        *_all_rows(rows),
        *_comparison(site),
        *(feature_section(site["gao"], table) if "gao" in site else []),
        sae_table(rows, DETAIL, error=False),
        sae_table(rows, SIZES),
        figures,
    ]
    return "\n\n".join(parts)


def _together_section(report: Json, together: Json) -> str:
    """Write what all SAEs and transcoders of a store cost at work in one forward, and what each costs alone."""
    lines = [
        [row.name, *(statistic(row.metrics[c.key] or {"value": None, "se": None}, c.digits) for c in TOGETHER)]
        for row in together_rows(report, together)
    ]
    return "\n\n".join(
        [
            f"## {together_title(together)}",
            "\n".join(f"- {sentence}" for sentence in together_sentences(report, together)),
            table(["replaced", *(column.titled for column in TOGETHER)], lines),
        ]
    )


def _crosscoder_section(entry: Json) -> str:
    """Write a crosscoder's errors by site and the division of its latents."""
    rows = [
        [
            site,
            *(statistic(value, column.digits) for value, column in zip(values, METRICS, strict=True)),
            f"{only:,}",
            format_number(share),
        ]
        for site, values, only, share in crosscoder_cells(entry)
    ]
    return "\n\n".join(
        [
            f"## {crosscoder_title(entry)}",
            "\n".join(f"- {sentence}" for sentence in crosscoder_sentences(entry)),
            table([*HEADS], rows),
            *(f"![{Path(plot).stem}]({plot})" for plot in entry["plots"]),
        ]
    )


def _made(report: Json) -> str:
    return f"Made {report['made'][:16].replace('T', ' ')} UTC. " if "made" in report else ""


def markdown(report: Json) -> str:
    """Write the whole report as Markdown."""
    settings = report["settings"]
    form = "with the SAE in its inference form"
    if settings["form"] == BATCH:
        form = "**with BatchTopK and Matryoshka SAEs in their training form (`form=batch`), not their inference form**"
    head = (
        "# Evaluation\n\n"
        f"{_made(report)}"
        f"Every number is measured on held-out documents, {form}."
        " ± is one standard error"
        f" (paired bootstrap over documents, {settings['bootstrap']:,} samples, seed {settings['seed']}):"
        " each SAE is one training, so the spread over training seeds is in no interval."
    )
    words = "\n".join(f"- **{name}**: {text}" for name, text in DEFINITIONS.items())
    sections = [_site_section(site) for site in report["sites"]]
    sections += [_together_section(report, together) for together in report.get("together", [])]
    sections += map(_crosscoder_section, report.get("crosscoders", []))
    return "\n\n".join([head, *sections, f"## Columns\n\n{words}"]) + "\n"

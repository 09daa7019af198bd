"""The report: `report.json` holds every number, `report.md` the tables one reads, `plots/` the figures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from data.base.files import write_atomic
from evaluate.feature_metrics.table import section

Json = dict[str, Any]

FORMAT = 1  # of report.json
BATCH = "batch"  # the form of an SAE that is not the one that ships
PARETO = {"nmse": "NMSE", "ce_increase": "CE"}
ASKED = ("k", "target_l0", "sparsity")  # the settings that say how sparse an SAE was asked to be

# One line a column: heading, how it is read from an SAE's row, definition.
DEFINITIONS = {
    "SAE": "variant; the number is the row of the sizes table below, which names the folder.",
    "L0": "mean number of latents above 0 on a held-out token.",
    "L0 sd": "standard deviation of L0 over tokens.",
    "NMSE": "sum ||x - x̂||² / sum ||x - mean x||² over the set, in the model's units (FVU); EV = 1 - NMSE.",
    "NMSE token": "the same with each token's entries brought to mean 0 and standard deviation 1, x̂ by x's map.",
    "NMSE btk": "mean squared error over tokens and entries in that space, not divided by a variance.",
    "cosine": "mean cosine of x and x̂.",
    "gamma": "E||x̂||² / E[x̂·x]: 1 is unbiased, below 1 shrinks; gamma c: the same after b_dec is taken from both.",
    "CE": "next-token cross-entropy in nats over the predicted tokens, with x̂ in place of x at every kept token.",
    "CE increase": "CE spliced - CE clean.",
    "recovered zero": "(CE zero - CE spliced) / (CE zero - CE clean), of pooled means; recovered mean: likewise.",
    "KL": "KL(clean || spliced) of the next-token distributions, in nats, mean over the predicted tokens.",
    "Pareto": "the costs (NMSE, CE) in which no other SAE of the table is at most as large at an L0 at most as large.",
    "Δ": "difference from the baseline on the same contexts, with its 95% interval (paired bootstrap over contexts), in"
    " bold where the interval leaves 0 out.",
    "silent": "latents that fire on none of the held-out tokens scored.",
    "dead": "latents that fired on none of the last training tokens (how many: in brackets), as training recorded.",
    "storage share": "NMSE of rounding x to the store's dtype, divided by the SAE's NMSE.",
    "±": "one standard error, paired bootstrap over contexts.",
}


def write(report: Json, out: Path) -> Path:
    """Write `report.json`, the figures and, last, `report.md` into `out`; the path of `report.md`."""
    from evaluate.report.png import draw_site

    out.mkdir(parents=True, exist_ok=True)
    for site, stem in zip(report["sites"], stems(report["sites"]), strict=True):
        site["plots"] = [f"plots/{name}" for name in draw_site(site, out / "plots", stem)]
    write_atomic(out / "report.json", dumps(report))
    write_atomic(out / "report.md", markdown(report))
    return out / "report.md"


def stems(sites: list[Json]) -> list[str]:
    """A short file name for each site, with the store's folder only where two stores are in one report."""
    several = len({site["fingerprint"] for site in sites}) > 1
    names = [f"{site['store']}-{site['site']}" if several else site["site"] for site in sites]
    return [re.sub(r"[^\w.-]+", "-", name) for name in names]


def dumps(report: Json) -> str:
    """Indented JSON in which a list of plain numbers stays on one line."""
    text = json.dumps(report, indent=1, allow_nan=False)
    return re.sub(r"\[[\s\d.,eE+-]*(?:null[\s\d.,eE+-]*)*\]", lambda found: re.sub(r"\s+", " ", found[0]), text) + "\n"


def number(value: float | None, digits: int = 3) -> str:
    """A fixed number of decimals, more where the value is small; a dash for what is not known."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if value == 0 or abs(value) >= 10**-digits else f"{value:.1e}"


def with_error(row: Json, metric: str, digits: int = 3) -> str:
    """`value ± standard error`."""
    entry = row["metrics"][metric]
    if entry["value"] is None or entry["se"] is None:
        return number(entry["value"], digits)
    return f"{number(entry['value'], digits)} ± {number(entry['se'], digits)}"


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its first column to the left and the rest to the right."""
    lines = [heads, [":--"] + ["--:"] * (len(heads) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def title(row: Json) -> str:
    """What an SAE is called in the report."""
    marked = " (batch form)" if row["form"] == BATCH else ""
    return f"{row['number']} {row['variant']}{marked}"


def _splice_table(rows: list[Json]) -> str:
    heads = ["SAE", "L0", "NMSE", "CE", "CE increase", "recovered zero", "recovered mean", "KL", "Pareto"]
    metrics = ["l0", "nmse", "ce_spliced", "ce_increase", "recovered_zero", "recovered_mean", "kl"]
    digits = [2, 4, 4, 4, 4, 4, 4]
    cells = [[with_error(row, m, d) for m, d in zip(metrics, digits, strict=True)] for row in rows]
    fronts = [", ".join(PARETO[cost] for cost in row["pareto"]) or "–" for row in rows]
    return table(heads, [[title(row), *own, best] for row, own, best in zip(rows, cells, fronts, strict=True)])


def _delta(row: Json, metric: str, digits: int) -> str:
    """`difference [low, high]`, bold where the interval does not hold 0."""
    entry = row["delta"][metric]
    if entry["low"] is None:
        return number(entry["value"], digits)
    text = f"{entry['value']:+.{digits}f} [{entry['low']:+.{digits}f}, {entry['high']:+.{digits}f}]"
    return f"**{text}**" if entry["low"] > 0 or entry["high"] < 0 else text


def _comparison(site: Json) -> list[str]:
    """A heading line and the table of differences, where there is a baseline."""
    if site["baseline"] is None:
        return []
    heads = ["SAE", "L0", "Δ L0", "Δ NMSE", "Δ CE increase", "Δ recovered zero", "Δ KL"]
    metrics = {"l0": 2, "nmse": 4, "ce_increase": 4, "recovered_zero": 4, "kl": 4}
    (named,) = [title(row) for row in site["saes"] if row["folder"] == site["baseline"]]
    rows = [
        [title(row), with_error(row, "l0", 2), *(_delta(row, metric, digits) for metric, digits in metrics.items())]
        for row in site["saes"]
        if row["folder"] != site["baseline"]
    ]
    return [f"Differences from **{named}** (`{site['baseline']}`):", table(heads, rows)]


def _detail_table(rows: list[Json]) -> str:
    heads = [
        "SAE",
        "EV",
        "NMSE token",
        "NMSE btk",
        "cosine",
        "gamma",
        "gamma c",
        "L0 sd",
        "silent",
        "dead",
        "storage share",
    ]
    metrics = ["ev", "nmse_token", "nmse_btk", "cosine", "gamma", "gamma_c"]
    return table(
        heads,
        [
            [
                title(row),
                *(number(row["metrics"][m]["value"], 4) for m in metrics),
                number(row["l0"]["std"], 2),
                f"{row['l0']['silent']:,}",
                _dead(row),
                number(row["storage_share"], 4),
            ]
            for row in rows
        ],
    )


def _dead(row: Json) -> str:
    dead, window = row["training"].get("dead"), row["training"].get("dead_after")
    return "–" if dead is None else f"{dead:,}" + (f" (in {window:,})" if window else "")


def _whole(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "–" if value is None else str(value)


def _sizes_table(rows: list[Json]) -> str:
    heads = ["SAE", "asked", "latents F", "expansion", "training tokens", "seed", "folder"]
    cells = [
        [
            title(row),
            ", ".join(f"{name}={row['settings'][name]:g}" for name in ASKED if row["settings"].get(name) is not None),
            f"{row['width']:,}",
            f"{row['expansion']:g}",
            _whole(row["training"].get("tokens")),
            _whole(row["training"].get("seed")),
            f"`{row['folder']}`",
        ]
        for row in rows
    ]
    return table(heads, cells)


def _site_lines(site: Json) -> list[str]:
    first = site["saes"][0]
    ce = ", ".join(f"{name} {with_error(first, f'ce_{name}', 4)}" for name in ("clean", "zero", "mean"))
    storage = site["storage"]
    return [
        f"- LM: {site['model']}; site {site['site']}, width {site['d_model']:,};"
        f" store `{site['store']}` (fingerprint `{site['fingerprint']}`).",
        f"- Token set: {site['tokens']:,} held-out tokens in {site['sequences']:,} contexts of {site['context']:,}"
        f" ({site['excluded']:,} special tokens excluded: neither scored nor replaced);"
        f" CE over {site['predicted']:,} predicted tokens: each kept token that is not the first of its context.",
        f"- CE in nats: {ce} (zero and mean: the kept tokens' x set to 0, or to the training mean).",
        f"- Storage: x is rounded to {storage['dtype']} in the store;"
        f" rounding alone has NMSE {number(storage['nmse'], 6)}."
        " The splice itself uses x unrounded.",
    ]


def _site_section(site: Json) -> str:
    rows = site["saes"]
    figures = "\n\n".join(f"![{Path(plot).stem}]({plot})" for plot in site["plots"])
    parts = [
        f"## {site['site']} of {site['model']}",
        "\n".join(_site_lines(site)),
        _splice_table(rows),
        *_comparison(site),
        *(section(site["gao"], table) if "gao" in site else []),
        _detail_table(rows),
        _sizes_table(rows),
        figures,
    ]
    return "\n\n".join(parts)


def markdown(report: Json) -> str:
    """The whole report as Markdown."""
    settings = report["settings"]
    form = "with the SAE in the form that ships"
    if settings["form"] == BATCH:
        form = "**with BatchTopK and Matryoshka SAEs in their training form (`form=batch`), which is not what ships**"
    head = (
        "# Evaluation\n\n"
        f"Every number is measured on held-out documents, {form}."
        " ± is one standard error"
        f" (paired bootstrap over contexts, {settings['bootstrap']:,} samples, seed {settings['seed']})."
    )
    words = "\n".join(f"- **{name}**: {text}" for name, text in DEFINITIONS.items())
    return "\n\n".join([head, *map(_site_section, report["sites"]), f"## Columns\n\n{words}"]) + "\n"

"""The sentences that a report begins with: which SAE is best at each L0, by how much, and what cannot be ranked."""

from __future__ import annotations

from collections.abc import Sequence

from data.base.records import Json
from evaluate.report.columns import STAR, best_at_their_l0, sae_name
from evaluate.report.digits import measured, with_interval
from evaluate.report.sweep import sweep_columns

MOST_NAMED = 6  # SAEs that a sentence names one by one


def l0_range(low: float, high: float) -> str:
    """Write the L0 of a group of SAEs."""
    first, last = f"{low:.3g}", f"{high:.3g}"
    return first if first == last else f"{first} to {last}"


def verdict_sentences(site: Json) -> list[str]:
    """Say which SAE of a site has the lowest CE increase at each L0, with the interval of its lead.

    SAEs whose L0 differ by more than 5% are not ranked by CE, for it falls with L0 whatever the SAE.
    """
    rows = {row["folder"]: row for row in site["saes"]}
    groups = site.get("verdict", [])
    if not groups:
        return ["The CE increase is not known, so the SAEs are not ranked."]
    ranked = [group for group in groups if group["next"] is not None]
    sentences = [_of_group(group, rows) for group in ranked]
    alone = [rows[group["best"]] for group in groups if group["next"] is None]
    if len(rows) == 1:
        row = alone[0]
        sentences.append(f"One SAE, so there is nothing to rank: {_cost(row)} at L0 {_l0(row)}.")
    elif alone and ranked:
        sentences.append(f"Not ranked, as no other SAE has their L0 within 5%: {_named(alone)}.")
    elif alone:
        sentences.append(
            f"No two of the {len(rows)} SAEs have an L0 within 5% of each other ({_named(alone)}), so their CE ranks "
            "nothing: compare them along the Pareto front."
        )
    return sentences


def ranking(site: Json) -> list[str]:
    """Write the SAEs of a site for a terminal: by L0, those of about one L0 together and the best first."""
    rows = {row["folder"]: row for row in site["saes"]}
    groups = site.get("verdict", [])
    best = best_at_their_l0(site)
    swept = sweep_columns(site["saes"])
    named = [row for group in groups for row in (rows[folder] for folder in group["saes"])]
    lines = [["SAE", *(column.heading for column in swept), "L0", "NMSE", "CE increase"]]
    for row in named:
        settings = [str(column.read(row)) for column in swept]
        name = sae_name(row) + (f" {STAR}" if row["folder"] in best else "")
        lines.append([name, *settings, *(_figure(row, key) for key in ("l0", "nmse", "ce_increase"))])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _figure(row: Json, key: str) -> str:
    value, error = measured(row["metrics"][key]["value"], row["metrics"][key]["se"])
    return f"{value} ± {error}" if error else value


def _of_group(group: Json, rows: dict[str, Json]) -> str:
    best, second, difference = rows[group["best"]], rows[group["next"]], group["difference"]
    at = l0_range(*group["l0"])
    count = len(group["saes"])
    if difference["low"] is None:
        return (
            f"Lowest CE increase of {count} SAEs at L0 {at}: {sae_name(best)}, {_cost(best)}, before"
            f" {sae_name(second)}, {_cost(second)}; one document gives the difference no interval."
        )
    value, bounds = with_interval(difference["value"], difference["low"], difference["high"])
    if difference["low"] <= 0:
        return (
            f"No clear best of {count} SAEs at L0 {at}: {sae_name(best)} has the lowest CE increase ({_cost(best)}),"
            f" but that of {sae_name(second)} is higher by only {value} nats, 95% interval {bounds}, which holds 0."
        )
    return (
        f"Best of {count} SAEs at L0 {at}: {sae_name(best)}, {_cost(best)}; the next, {sae_name(second)}, is higher by"
        f" {value} {bounds} nats."
    )


def _cost(row: Json) -> str:
    entry = row["metrics"]["ce_increase"]
    value, error = measured(entry["value"], entry["se"])
    return f"CE increase {value}" + (f" ± {error}" if error else "") + " nats"


def _l0(row: Json) -> str:
    return f"{row['metrics']['l0']['value']:.3g}"


def _named(rows: Sequence[Json]) -> str:
    named = [f"{sae_name(row)} at {_l0(row)}" for row in rows[:MOST_NAMED]]
    return ", ".join(named) + (f" and {len(rows) - MOST_NAMED} more" if len(rows) > MOST_NAMED else "")

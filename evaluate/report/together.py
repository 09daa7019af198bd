"""The replacement model in a report: what all SAEs and transcoders cost at work together, beside what each costs alone.

Both renderers (markdown.py, page.py) read the rows and the sentences from here.
"""

from __future__ import annotations

from dataclasses import dataclass

from data.base.records import Json
from evaluate.report.columns import BY_KEY, sae_name

TOGETHER = tuple(BY_KEY[key] for key in ("l0", "ce_spliced", "ce_increase", "recovered_zero", "recovered_mean", "kl"))


@dataclass(frozen=True)
class TogetherRow:
    """A line of the table: what is replaced, and its statistics by key, None where one is not known."""

    name: str
    metrics: dict[str, Json | None]


def together_title(together: Json) -> str:
    """Name the replacement model."""
    return f"All {len(together['saes'])} together in {together['model']}"


def together_rows(report: Json, together: Json) -> list[TogetherRow]:
    """Give the replacement model first, each SAE or transcoder alone, then the ablations of every target at once."""
    metrics = together["metrics"]
    lines = [TogetherRow("all together", {column.key: metrics[column.key] for column in TOGETHER})]
    alone = _alone(report, together)
    for part in together["saes"]:
        row = alone[part["folder"]]
        name = f"{part['target']} alone: {sae_name(row)}"
        lines.append(TogetherRow(name, {column.key: row["metrics"][column.key] for column in TOGETHER}))
    ablations = {"mean": "mean ablation of all", "zero": "zero ablation of all"}
    return lines + [_ablation(name, metrics, kind) for kind, name in ablations.items()]


def together_sentences(report: Json, together: Json) -> list[str]:
    """Say what is at work, on which tokens, and how the errors add up."""
    parts = [
        part["target"] + (f" from {part['site']}" if part["site"] != part["target"] else "")
        for part in together["saes"]
    ]
    sentences = [
        f"Replaced in one forward, each reading behind the replacements below it: {', '.join(parts)}.",
        f"Token set: {together['tokens']:,} tokens of {together['documents']:,} documents; L0 of all together is the"
        " sum over them, and the ablations are of every target at once.",
    ]
    increases = [row["metrics"]["ce_increase"]["value"] for row in _alone(report, together).values()]
    increase = together["metrics"]["ce_increase"]["value"]
    if None in (increase, *increases):  # where no token is predicted
        return sentences
    added = f"Together they raise CE by {increase:.4g} nats; the increases of each alone sum to {sum(increases):.4g}."
    return [added, *sentences]


def _alone(report: Json, together: Json) -> dict[str, Json]:
    """Find the rows of the parts in the tables of their sites, by folder."""
    folders = {part["folder"] for part in together["saes"]}
    return {row["folder"]: row for site in report["sites"] for row in site["saes"] if row["folder"] in folders}


def _ablation(name: str, metrics: Json, kind: str) -> TogetherRow:
    """Give the line of an ablation, whose CE is known."""
    ce = metrics[f"ce_{kind}"]
    increase = None if ce["value"] is None else ce["value"] - metrics["ce_clean"]["value"]
    known: dict[str, Json | None] = {"ce_spliced": ce, "ce_increase": {"value": increase, "se": None}}
    return TogetherRow(name, dict.fromkeys(column.key for column in TOGETHER) | known)

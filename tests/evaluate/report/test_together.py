"""The replacement model in the report: its line, those of its parts alone, and the ablations, in both renderings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from evaluate.report.markdown import markdown
from evaluate.report.page import write_page
from evaluate.report.together import together_rows, together_sentences
from tests.helpers.reports import METRICS, a_report, a_row


def entry(value: float | None, se: float | None = 0.01) -> dict[str, float | None]:
    return {"value": value, "se": se}


@pytest.fixture
def report() -> dict[str, Any]:
    """Two layers' transcoders that cost 0.1 and 0.3 nats alone and 0.7 together, where zero ablation costs 2."""
    rows = [a_row(1, "topk transcoder", 32.0, 0.1), a_row(1, "topk skip transcoder", 32.0, 0.2)]
    sites = []
    for layer, (row, increase) in enumerate(zip(rows, (0.1, 0.3), strict=True)):
        row["folder"] = f"outputs/mlps/{layer}"
        row["metrics"]["ce_increase"] = entry(increase)
        sites.append({**a_report([row])["sites"][0], "site": f"mlp_out.{layer}", "plots": []})
    metrics = dict.fromkeys(METRICS, entry(0.5)) | {"l0": entry(64.0), "ce_increase": entry(0.7)}
    metrics |= {"ce_clean": entry(3.0), "ce_spliced": entry(3.7), "ce_zero": entry(5.0), "ce_mean": entry(4.5)}
    saes = [
        {"folder": f"outputs/mlps/{layer}", "site": f"mlp_in.{layer}", "target": f"mlp_out.{layer}"} for layer in (0, 1)
    ]
    together = {"model": "lm", "tokens": 1000, "documents": 60, "saes": saes, "metrics": metrics}
    return {**a_report([]), "sites": sites, "together": [together]}


def test_the_set_stands_beside_each_alone_and_the_ablations_of_all(report: dict[str, Any]) -> None:
    (together,) = report["together"]
    rows = together_rows(report, together)
    assert [row.name for row in rows] == [
        "all together",
        "mlp_out.0 alone: 1 topk transcoder",
        "mlp_out.1 alone: 1 topk skip transcoder",
        "mean ablation of all",
        "zero ablation of all",
    ]
    increases = [row.metrics["ce_increase"] or {} for row in rows]
    assert [one["value"] for one in increases] == pytest.approx([0.7, 0.1, 0.3, 1.5, 2.0])
    assert rows[0].metrics["l0"] == entry(64.0) and rows[-1].metrics["kl"] is None


def test_the_first_sentence_says_how_the_errors_add_up(report: dict[str, Any]) -> None:
    first, second, _ = together_sentences(report, report["together"][0])
    assert first == "Together they raise CE by 0.7 nats; the increases of each alone sum to 0.4."
    assert second.endswith("mlp_out.0 from mlp_in.0, mlp_out.1 from mlp_in.1.")
    report["together"][0]["metrics"]["ce_increase"] = entry(None, None)
    assert together_sentences(report, report["together"][0]) == together_sentences(report, report["together"][0])[-2:]


def test_both_renderings_have_its_table(report: dict[str, Any], tmp_path: Path) -> None:
    text = markdown(report)
    assert "## All 2 together in lm" in text
    assert "| all together | 64.000 ± 0.010 | 3.700 ± 0.010 | 0.700 ± 0.010 |" in text
    assert "| zero ablation of all | – | 5.000 ± 0.010 | 2.0000 | – | – | – |" in text
    page = write_page(report, {"out": str(tmp_path)}, {"0123456789abcdef": {}}, {}).read_text()
    section = page[page.index('id="together-1"') : page.index('id="columns"')]
    lines = re.findall(r"<tr.*?</tr>", section, re.DOTALL)
    words = [" ".join(re.sub(r"<[^>]+>", " ", line).split()) for line in lines]
    assert words[1].startswith("all together 64.000 ± 0.010 3.700 ± 0.010 0.700 ± 0.010")
    assert words[3].startswith("mlp_out.1 alone: 1 topk skip transcoder 32.00 ± 0.10") and len(words) == 6
    assert '<a href="#together-1">All 2 together in lm</a>' in page


def test_a_report_without_a_set_has_no_such_section(report: dict[str, Any], tmp_path: Path) -> None:
    del report["together"]
    page = write_page(report, {"out": str(tmp_path)}, {"0123456789abcdef": {}}, {}).read_text()
    assert "together-1" not in page and "together in lm" not in markdown(report)

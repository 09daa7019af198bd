"""Sweeps in a report: the settings that vary, the verdict at each L0, digits that agree with their error."""

from __future__ import annotations

from typing import Any

import pytest

from evaluate.report.digits import measured, plain, with_interval
from evaluate.report.markdown import markdown
from evaluate.report.sweep import sweep_columns, varied
from evaluate.report.tables import sae_tables
from evaluate.report.verdict import ranking, verdict_sentences
from tests.helpers.reports import a_report, a_row


def group(l0: tuple[float, float], *rows: dict[str, Any], low: float | None = 0.001) -> dict[str, Any]:
    """A group of the verdict, its rows the best first."""
    named = [row["folder"] for row in rows]
    difference = {"value": 0.004, "se": 0.0015, "low": low, "high": None if low is None else 0.007}
    alone = len(rows) == 1
    return {
        "l0": list(l0),
        "saes": named,
        "best": named[0],
        "next": None if alone else named[1],
        "difference": None if alone else difference,
    }


def test_settings_that_vary_within_a_variant_are_columns() -> None:
    rows = [a_row(i, "topk", 4.0 * i, 0.1) for i in (1, 2, 3)]
    for row, k, rate in zip(rows, (4, 8, 8), (1e-3, 1e-3, 2.5e-4), strict=True):
        row["settings"]["k"] = k
        row["training"] |= {"optimizer": {"name": "Adam", "lr": rate, "fused": k == 4}}
    assert varied(rows) == ["k", "lr"]
    assert [[column.read(row) for column in sweep_columns(rows)] for row in rows] == [
        [4, "0.001"],
        [8, "0.001"],
        [8, "0.00025"],
    ]
    (first, *_) = sae_tables(rows)
    assert [head.text for head in first.heads][:4] == ["SAE", "k", "learning rate", "L0"]
    assert "| SAE | k | learning rate | L0 |" in markdown(a_report(rows, plots=[]))


def test_what_only_the_variant_decides_is_no_column() -> None:
    rows = [a_row(1, "topk", 4.0, 0.1), a_row(2, "relu", 4.0, 0.1)]
    rows[1]["settings"] = {"d_in": 16, "width": 64, "target_l0": 4, "sparsity": 0.1}
    for row, rate in zip(rows, (1e-3, 2e-3), strict=True):
        row["training"] |= {"optimizer": {"lr": rate}, "lr_asked": "auto"}
    assert varied(rows) == []
    rows[1]["training"]["seed"] = 8
    assert varied(rows) == ["seed"]
    rows[1]["training"]["lr_asked"] = 2e-3
    assert varied(rows) == ["seed", "lr"]


def test_the_best_at_an_l0_leads_by_an_interval() -> None:
    rows = [a_row(1, "topk", 32.0, 0.1), a_row(2, "relu", 33.0, 0.2)]
    site = a_report(rows, verdict=[group((32.0, 33.0), *rows)])["sites"][0]
    (sentence,) = verdict_sentences(site)
    assert sentence == (
        "Best of 2 SAEs at L0 32 to 33: 1 topk, CE increase 0.200 ± 0.010 nats; the next, 2 relu, is higher by 0.0040 "
        "[0.0010, 0.0070] nats."
    )
    text = markdown(a_report(rows, plots=[], verdict=[group((32.0, 33.0), *rows)]))
    assert f"**{sentence}**" in text and "| **1 topk** ★ |" in text and "| 2 relu |" in text
    (first, *_) = sae_tables(rows, {rows[0]["folder"]})
    assert [line[0].best for line in first.rows] == [True, False]


def test_a_terminal_sees_the_best_of_each_l0_first() -> None:
    rows = [a_row(i, "topk", l0, nmse) for i, (l0, nmse) in enumerate(((32.0, 0.2), (33.0, 0.1), (64.0, 0.05)), 1)]
    groups = [group((32.0, 33.0), rows[1], rows[0]), group((64.0, 64.0), rows[2])]
    assert ranking(a_report(rows, verdict=groups)["sites"][0]) == [
        "SAE       L0            NMSE             CE increase",
        "2 topk ★  33.00 ± 0.10  0.1000 ± 0.0020  0.200 ± 0.010",
        "1 topk    32.00 ± 0.10  0.2000 ± 0.0020  0.400 ± 0.010",
        "3 topk    64.00 ± 0.10  0.0500 ± 0.0020  0.100 ± 0.010",
    ]


def test_a_lead_that_may_be_none_is_no_clear_best() -> None:
    rows = [a_row(1, "topk", 32.0, 0.1), a_row(2, "relu", 33.0, 0.2)]
    site = a_report(rows, verdict=[group((32.0, 33.0), *rows, low=-0.002)])["sites"][0]
    assert verdict_sentences(site)[0].startswith("No clear best of 2 SAEs at L0 32 to 33: 1 topk has the lowest")
    site = a_report(rows, verdict=[group((32.0, 33.0), *rows, low=None)])["sites"][0]
    assert "no interval" in verdict_sentences(site)[0]


def test_what_has_no_equal_is_not_ranked() -> None:
    rows = [a_row(i, "topk", l0, 0.1) for i, l0 in enumerate((8.0, 8.1, 64.0), 1)]
    both = [group((8.0, 8.1), *rows[:2]), group((64.0, 64.0), rows[2])]
    _, other = verdict_sentences(a_report(rows, verdict=both)["sites"][0])
    assert other == "Not ranked, as no other SAE has their L0 within 5%: 3 topk at 64."
    alone = [group((l0, l0), row) for l0, row in ((8.0, rows[0]), (64.0, rows[2]))]
    (sentence,) = verdict_sentences(a_report([rows[0], rows[2]], verdict=alone)["sites"][0])
    assert sentence.startswith("No two of the 2 SAEs have an L0 within 5% of each other (1 topk at 8, 3 topk at 64)")
    (sentence,) = verdict_sentences(a_report(rows[:1], verdict=alone[:1])["sites"][0])
    assert sentence == "One SAE, so there is nothing to rank: CE increase 0.200 ± 0.010 nats at L0 8."


@pytest.mark.parametrize(
    "value, error, written",
    [
        (0.12345, 0.00214, ("0.1235", "0.0021")),
        (2.4369, 0.0996, ("2.44", "0.10")),  # the error is rounded up to a power of ten
        (12345.6, 214.0, ("12,346", "214")),
        (32.0, 0.0, ("32", "")),
        (0.5, None, ("0.5000", "")),
        (1.0, 1e-9, ("1", "1.0e-09")),
    ],
)
def test_digits_agree_with_the_error(value: float, error: float | None, written: tuple[str, str]) -> None:
    assert measured(value, error) == written


def test_an_interval_has_the_digits_of_its_width() -> None:
    assert with_interval(-0.25, -0.375, -0.125) == ("-0.250", "[-0.375, -0.125]")
    assert with_interval(0.00734, 0.0051, 0.0094, signed=True) == ("+0.0073", "[+0.0051, +0.0094]")
    assert with_interval(0.0, 0.0, 0.0) == ("0", "[0, 0]")


def test_plain_numbers_have_no_idle_decimals() -> None:
    assert [plain(value) for value in (8.0, 0.0, 0.917, 12345.6, 1e-7)] == ["8", "0", "0.9170", "12,346", "1.000e-07"]

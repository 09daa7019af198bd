"""The report's page: every SAE and every column of its JSON, whatever else is in it, and no text as markup."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from evaluate.report import figures, series
from evaluate.report.page import write_page
from evaluate.report.tables import cell, sae_tables, site_tables
from tests.helpers.pages import HOSTILE
from tests.helpers.reports import VARIANTS, a_report, a_row

LOG = "step,train/nmse,train/l0,train/lr,final/nmse\n50,0.5,32,0.001,\n100,0.25,31,0.0005,\n100,,,,0.2\n"


class Page(HTMLParser):
    """What a page holds: cells of tables by row, texts of data scripts, how often each tag, other text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.data: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self._within: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._within.append((tag, dict(attrs)))
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.tables[-1][-1][-1] = " ".join(self.tables[-1][-1][-1].split())
        while self._within and self._within.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        tags = [tag for tag, _ in self._within]
        if "script" in tags:
            if self._within[-1][1].get("type") == "application/json":
                self.data.append(data)
        elif {"td", "th"} & set(tags):
            self.tables[-1][-1][-1] += data
        else:
            self.text += data


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    rows = [a_row(i, variant, 4.0 + i, 0.1 + i / 50) for i, variant in enumerate(VARIANTS, 1)]
    for row in rows:
        folder = tmp_path / "saes" / row["variant"]
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text(LOG)
        row["folder"] = str(folder)
    return rows


Written = Callable[..., Page]


@pytest.fixture
def written(harvested: dict[str, Any], tmp_path: Path) -> Written:
    def make(rows: list[dict[str, Any]], features: dict[str, Path] | None = None, **site: Any) -> Page:
        manifest = harvested["store"].manifest
        report = a_report(rows, fingerprint=manifest.fingerprint, store=manifest.folder, **site)
        config = {"cache": harvested["config"]["cache"], "out": str(tmp_path), "saes": HOSTILE[2], "features": None}
        identities = {manifest.fingerprint: manifest.identity}
        return Page(write_page(report, config, identities, features or {}).read_text(encoding="utf-8"))

    return make


def test_every_sae_and_metric_stands_in_the_tables(written: Written, rows: list[dict[str, Any]]) -> None:
    page = written(rows)
    first, detail, sizes = page.tables
    assert first[0][:3] == ["SAE", "L0", "NMSE ↓"]
    assert first[2][:3] == ["2 gated", "6.00 ± 0.10", "0.1400 ± 0.0020"]
    for table in page.tables:
        assert [line[0] for line in table[1:]] == [f"{i} {variant}" for i, variant in enumerate(VARIANTS, 1)]
    heads = {head.rstrip(" ↓↑") for head in first[0] + detail[0] + sizes[0]}
    assert {"KL", "EV", "NMSE btk", "gamma c", "silent", "dead", "asked", "width", "training tokens", "seed"} <= heads
    assert sizes[1][sizes[0].index("folder")].endswith("/saes/batchtopk")


def test_the_page_says_what_store_text_and_settings_it_is_of(
    written: Written, rows: list[dict[str, Any]], harvested: dict[str, Any]
) -> None:
    page = written(rows)
    manifest = harvested["store"].manifest
    for told in (manifest.fingerprint, manifest.folder, manifest.identity["tokenizer"], '"mixing_seed": 0', "1,000"):
        assert told in page.text, told
    assert "100 samples, seed 0" in " ".join(page.text.split())
    assert '"dead_after": 1000' in page.text and "features: null" in page.text


def test_figures_hold_the_reports_numbers(written: Written, rows: list[dict[str, Any]]) -> None:
    nmse, cost, l0, density, *curves = map(json.loads, written(rows).data)
    for name, drawn in (("nmse", nmse), ("ce_increase", cost)):
        points = {trace["name"]: trace for trace in drawn["data"]}
        for row in rows:
            trace = points[row["variant"]]
            assert trace["x"] == [row["metrics"]["l0"]["value"]] and trace["y"] == [row["metrics"][name]["value"]]
            assert trace["error_y"]["array"] == [row["metrics"][name]["se"]]
            assert f"{row['number']} {row['variant']}" in trace["hovertext"][0]
    for row, trace in zip(rows, density["data"], strict=True):
        assert sum(trace["y"]) == sum(count > 0 for count in row["l0"]["fired"])
    for row, trace in zip(rows, l0["data"], strict=True):
        shares = dict(zip(trace["x"], trace["customdata"], strict=True))
        assert trace["y"] == [max(share, 0.0005) for share in trace["customdata"]]
        counts = row["l0"]["histogram"]
        assert shares == pytest.approx({x: sum(counts[int(x) : int(x) + 1]) / 1000 for x in shares})
        assert sum(shares.values()) >= 0.999
    assert len(curves) == 3  # no column `dead` was logged
    assert curves[0]["data"][0]["x"] == [50, 100] and curves[0]["data"][0]["y"] == [0.5, 0.25]


def test_the_front_is_of_the_saes_that_no_other_beats() -> None:
    rows = [a_row(i, "topk", l0, nmse) for i, (l0, nmse) in enumerate([(4, 0.2), (2, 0.5), (3, 0.6), (5, 0.1)], 1)]
    rows[2]["pareto"] = ["ce_increase"]
    assert series.against_l0(rows, "nmse").front == [(2, 0.5), (4, 0.2), (5, 0.1)]
    page = figures.figure_against_l0(rows, "nmse", "NMSE")
    assert page is not None
    drawn = {trace["name"]: trace for trace in page["data"]}["Pareto front"]
    assert list(zip(drawn["x"], drawn["y"], strict=True)) == [(2, 0.5), (4, 0.2), (5, 0.1)]


def test_wide_bins_of_the_l0_histogram_keep_every_token() -> None:
    row = a_row(1, "relu", 300.0, 0.1)
    (trace,) = figures.l0_figure([row])["data"]
    step = trace["x"][1] - trace["x"][0]
    assert step > 1 and len(trace["x"]) <= 60
    assert sum(trace["customdata"]) * step == pytest.approx(1, abs=0.002)


def test_no_metrics_and_no_values_are_left_out_not_invented(written: Written, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        (Path(row["folder"]) / "metrics.csv").unlink()
        row["metrics"]["ce_increase"] = {"value": None, "se": None}
        row["training"] = {}
    page = written(rows)
    assert len(page.data) == 3 and "CE increase against L0" not in page.text
    column = page.tables[0][0].index("CE increase ↓")
    assert {line[column] for line in page.tables[0][1:]} == {"–"}


def test_what_a_later_report_adds_is_shown_too(written: Written, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        row["metrics"]["new_loss"] = {"value": 1.25, "se": 0.5}
        row["form"] = "batch"
        row["pareto"] = ["nmse", "ce_increase"]
        row["delta"] = {"nmse": {"value": -0.25, "se": 0.1, "low": -0.375, "high": 0.125}, "ce_clean": {"value": 0.0}}
        row["probes"] = {"best": {"value": 0.5, "se": None}, "tasks": 12}
    page = written(
        rows,
        pairs=[{"of": "2 gated", "delta": {"value": -0.25, "se": 0.125}}],
        baselines={"pca": {"loss": 0.75}, "random": {"loss": 0.5}},
        gao={"left_out": ["x", "y"], "bases": [{"name": "pca", "probe": {"loss": 0.5, "tasks": {"a": {"loss": 1}}}}]},
        note="a line of its own",
    )
    assert "new loss" in page.tables[1][0] and "1.25 ± 0.50" in page.tables[1][1]
    assert page.tables[0][0][-1] == "Pareto" and page.tables[0][1][-1] == "NMSE, CE"
    sizes = dict(zip(page.tables[2][0], page.tables[2][1], strict=True))
    assert sizes["SAE"] == "1 batchtopk (batch form)"
    assert [table[:2] for table in page.tables[3:]] == [
        [["SAE", "NMSE ↓"], ["1 batchtopk (batch form)", "-0.25 [-0.38, 0.12]"]],
        [["SAE", "best", "tasks"], ["1 batchtopk (batch form)", "0.5000", "12"]],
        [["of", "delta"], ["2 gated", "-0.25 ± 0.12"]],
        [["baselines", "loss"], ["pca", "0.7500"]],
        [["left out"], ["x, y"]],
        [["name", "probe loss"], ["pca", "0.5000"]],
    ]
    assert "a line of its own" in page.text


def test_hostile_names_are_text(written: Written, rows: list[dict[str, Any]]) -> None:
    rows[0]["folder"] = HOSTILE[0]
    rows[1]["folder"] = HOSTILE[2]
    rows[2]["settings"]["k"] = 3
    page = written(rows, model=HOSTILE[1], site=HOSTILE[6])
    assert page.tags.count("script") == 2 + len(page.data) and "img" not in page.tags
    assert HOSTILE[1] in page.text and HOSTILE[6] in page.text and HOSTILE[2] in page.text
    assert page.tables[2][1][-1] == HOSTILE[0]
    hovers = [trace["hovertext"][0] for trace in json.loads(page.data[0])["data"] if "hovertext" in trace]
    assert any("&lt;script>" in hover for hover in hovers) and not any("<script" in hover for hover in hovers)


def test_nothing_outside_is_asked_for(written: Written, rows: list[dict[str, Any]], tmp_path: Path) -> None:
    page = written(rows, {rows[1]["folder"]: tmp_path / "features" / "index.html"})
    assert [link for link in page.links if not link.startswith("#")] == ["features/index.html"]
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', (tmp_path / "report.html").read_text())
    assert policy and policy[1].startswith("default-src 'none';") and "http" not in policy[1]


def test_cells_keep_their_digits() -> None:
    assert (cell(None).text, cell(True).text, cell(1234).text, cell(8.0).text) == ("–", "True", "1,234", "8")
    entry = cell({"value": 32.0, "se": 0.21})
    assert (entry.text, entry.error, entry.key) == ("32.00", "± 0.21", 32.0)
    exact = cell({"value": 32.0, "se": 0.0})
    assert (exact.text, exact.error) == ("32", "")
    assert cell({"value": None, "se": None}) == cell(None)


def test_the_page_opens_with_the_verdict_and_leads_to_its_parts(
    written: Written, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    best, second = rows[0]["folder"], rows[1]["folder"]
    difference = {"value": 0.5, "se": 0.1, "low": 0.3, "high": 0.7}
    group = {"l0": [5.0, 5.2], "saes": [best, second], "best": best, "next": second, "difference": difference}
    page = written(rows, verdict=[group])
    assert "Best of 2 SAEs at L0 5 to 5.2: 1 batchtopk" in page.text
    assert page.tables[0][1][0] == "1 batchtopk ★" and page.tables[0][2][0] == "2 gated"
    html = (tmp_path / "report.html").read_text()
    targets = [link.removeprefix("#") for link in page.links]
    assert len(targets) >= 6 and all(f'id="{target}"' in html for target in targets)
    assert 'title="sum ||x - x̂||² / sum ||x - mean x||²' in html and 'title="lower is better">↓' in html
    assert 'data-sign="▲" style="--own: #0072B2"' in html  # the marker that the plots give BatchTopK


def test_tables_of_nothing_are_no_tables(rows: list[dict[str, Any]]) -> None:
    assert site_tables({"a": [], "b": {}, "c": [1, 2], "d": "text"}, set()) == []
    assert [table.title for table in sae_tables(rows)] == [
        "What the splice costs",
        "Reconstruction and firing",
        "The SAEs",
    ]


def test_a_dash_among_words_stands_where_they_do(rows: list[dict[str, Any]]) -> None:
    few = [{**rows[0], "pareto": []}, {**rows[1], "pareto": ["nmse"]}]
    first, *_ = sae_tables(few)
    worded = {head.text: words for head, words in zip(first.heads, first.worded, strict=True)}
    assert worded["Pareto"] and not worded["NMSE"]

"""The pages in a real browser, opened from disk: nothing fails, everything works, hostile text runs nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evaluate.features import pages
from evaluate.report.page import write_page
from evaluate.run import evaluate
from harvest.run import harvest
from tests.helpers.browser import NEEDS_BROWSER, PHONE, Browser, contrast
from tests.helpers.pages import HOSTILE
from tests.helpers.reports import a_report, a_row
from tests.helpers.settings import stage_config
from tests.helpers.tiny_lm import write_tokenizer
from train.sae.io import save
from train.sae.variants.relu import ReLU

pytestmark = NEEDS_BROWSER


@pytest.fixture
def harvested_hostile(
    harvested: dict[str, Any], rough_sae: Callable[[int], ReLU], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The report, with features, of an SAE over documents that are hostile in name and text; its path."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(60):
        name = "<img src=x onerror=window.hacked=1>" if number % 2 else "<script>window.hacked=1"
        text = " ".join(HOSTILE[(number + i) % len(HOSTILE)] for i in range(60))
        (texts / f"{name}{number}.txt").write_text(f"{number} {text}", encoding="utf-8")
    write_tokenizer(tmp_path / "tokenizer", [path.read_text(encoding="utf-8") for path in texts.iterdir()])
    model = {**harvested["config"]["model"], "name": str(tmp_path / "lm")}
    shutil.copytree(harvested["config"]["model"]["name"], tmp_path / "lm")
    shutil.copytree(tmp_path / "tokenizer", tmp_path / "lm", dirs_exist_ok=True)
    text = {"kind": "files", "paths": [str(texts / "*.txt")], "field": "text"}
    config = {**harvested["config"], "model": model, "text": text, "cache": str(tmp_path / "cache")}
    store = harvest(config)
    record = {"site": "resid_post.0", "fingerprint": store.manifest.fingerprint, "store": store.manifest.folder}
    save(rough_sae(16), tmp_path / "saes" / "<b>rough", record)
    defaults = stage_config("evaluate")
    own = {"saes": str(tmp_path / "saes"), "cache": config["cache"], "out": str(tmp_path / "out"), "device": "cpu"}
    monkeypatch.setattr(pages, "LATENTS_A_PIECE", 20)
    return evaluate({**defaults, **own, "tokens": 250, "bootstrap": 10, "features": "best"}).path


def test_hostile_documents_from_the_harvest_to_the_pages(browser: Browser, harvested_hostile: Path) -> None:
    browser.open(harvested_hostile.parent / "report.html")
    browser.until("document.querySelectorAll('.plot .main-svg').length >= 4")
    assert browser.run("document.querySelector('b') === null") and "<b>rough" in browser.text("main")
    browser.click(".open a")
    for latent in range(48):
        browser.run("(() => { location.hash = arguments[0]; })()", f"#{latent}")
        browser.until("document.querySelector('#latent h1')?.textContent === arguments[0]", f"Latent #{latent}")
        assert browser.run("window.hacked === undefined && document.querySelector('img') === null")
    assert "onerror=window.hacked=1>" in "".join(browser.texts("#latent .from"))
    assert "window" in browser.text("#latent .text") and "<" in browser.text("#latent .text")


@pytest.fixture
def report(harvested: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    """Writes the page of four SAEs, whose second is in a folder of hostile name."""

    def make(features: dict[str, Path] | None = None) -> Path:
        rows = [a_row(i, ("relu", "topk")[i % 2], 3.0 + i, 0.3 - i / 50, seed=i) for i in range(1, 5)]
        for row in rows:
            folder = tmp_path / "saes" / str(row["number"])
            folder.mkdir(parents=True)
            (folder / "metrics.csv").write_text("step,train/nmse,train/dead\n5,0.5,0\n10,0.2,3\n")
            row["folder"] = str(folder)
        rows[1]["folder"] = HOSTILE[1]
        manifest = harvested["store"].manifest
        config = {"cache": harvested["config"]["cache"], "out": str(tmp_path), "saes": HOSTILE[2]}
        return write_page(
            a_report(rows, fingerprint=manifest.fingerprint),
            config,
            {manifest.fingerprint: manifest.identity},
            features or {},
        )

    return make


def test_the_report_draws_every_figure_and_runs_nothing_hostile(browser: Browser, report: Callable[..., Path]) -> None:
    browser.open(report())
    assert browser.until("document.querySelectorAll('.plot .main-svg').length >= 6")
    counts = browser.run("[...document.querySelectorAll('.plot')].map((one) => one.data.length)")
    assert counts == [3, 3, 4, 4, 3, 3]  # two variants and the front; four SAEs; three logs
    points = browser.run("document.querySelector('.plot').querySelectorAll('.scatterlayer path.point').length")
    assert points == 4
    assert browser.run("window.hacked === undefined && document.querySelector('img') === null")
    assert HOSTILE[1] in browser.texts("table")[2] and HOSTILE[2] in browser.text("main > section:last-child pre")
    assert browser.run("performance.getEntriesByType('resource').every((one) => one.name.startsWith('file:'))")


def test_a_point_tells_its_sae_when_pointed_at(browser: Browser, report: Callable[..., Path]) -> None:
    browser.open(report())
    browser.until("document.querySelectorAll('.plot .main-svg').length >= 6")
    for trace, expected in ((0, ["2 relu", "4 relu"]), (1, ["1 topk", "3 topk"])):
        for point, name in enumerate(expected):
            at = f"[{{curveNumber: {trace}, pointNumber: {point}}}]"
            browser.run(f"Plotly.Fx.hover(document.querySelector('.plot'), {at})")
            label = "document.querySelector('.plot .hoverlayer').textContent"
            browser.until(f"{label}.includes(arguments[0])", name)
            told = browser.run(label)
            assert "NMSE" in told and "L0" in told and "64 latents" in told
    assert browser.run("window.hacked === undefined && document.querySelector('img') === null")


def test_tables_sort_by_their_numbers(browser: Browser, report: Callable[..., Path]) -> None:
    browser.open(report())
    nmse = "table th:nth-child(3) button"
    column = "[...document.querySelector('table').tBodies[0].rows].map((row) => Number(row.cells[2].dataset.key))"
    browser.click(nmse)
    rising = browser.run(column)
    assert rising == sorted(rising) and len(set(rising)) == 4
    browser.click(nmse)
    assert browser.run(column) == rising[::-1]
    assert browser.run("document.querySelector('th[aria-sort]').getAttribute('aria-sort')") == "descending"


def test_the_report_leads_to_the_latents(browser: Browser, report: Callable[..., Path], features: Path) -> None:
    browser.open(report({HOSTILE[1]: features}))
    browser.click(".open a")
    browser.until("document.querySelector('#latent h1')")
    assert browser.run("location.pathname").endswith("/features/index.html")


@pytest.mark.parametrize("dark", [False, True])
def test_the_report_fits_a_phone_and_the_dark(browser: Browser, report: Callable[..., Path], dark: bool) -> None:
    browser.size(PHONE, dark)
    browser.open(report())
    browser.until("document.querySelectorAll('.plot .main-svg').length >= 6")
    assert browser.run("document.documentElement.scrollWidth") <= PHONE[0]
    assert contrast(browser, "p, dt, dd, td, td small, th button, summary, a") >= 4.5
    lines = "[...document.querySelectorAll('.plot')].flatMap((one) => one.data.map((trace) => trace.line.color))"
    black = "#000000" in browser.run(lines)
    assert black is False
    size = browser.run("(({width}) => width)(document.querySelector('.plot .main-svg').getBoundingClientRect())")
    assert 300 < size <= PHONE[0]


def test_the_first_column_stays_on_a_phone(browser: Browser, report: Callable[..., Path]) -> None:
    browser.size(PHONE)
    browser.open(report())
    browser.until("document.querySelectorAll('.plot .main-svg').length >= 6")
    browser.run("(() => { document.querySelector('.wide').scrollLeft = 200; })()")
    left = "document.querySelector('td').getBoundingClientRect().left"
    assert browser.run("document.querySelector('.wide').scrollLeft") == 200 and 0 <= browser.run(left) < 60

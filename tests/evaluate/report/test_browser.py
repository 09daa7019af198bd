"""The pages in a real browser, opened from disk: nothing fails, everything works, hostile text runs nothing."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from evaluate.features import pages
from evaluate.report.page import write_page
from evaluate.run import evaluate
from harvest.run import harvest
from tests.helpers.pages import HOSTILE, a_page, called
from tests.helpers.reports import a_report, a_row
from tests.helpers.settings import stage_config
from tests.helpers.tiny_lm import write_tokenizer
from train.sae.io import save
from train.sae.variants.relu import ReLU

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
DRIVER = shutil.which("chromedriver") or ""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver here (apt: chromium-driver)"),
]

DESKTOP, PHONE = (1440, 900), (390, 844)


class Browser:
    """A headless Chromium; `run` gives what a script returns."""

    def __init__(self) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        self.size(DESKTOP)

    def size(self, size: tuple[int, int], dark: bool = False) -> None:
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        media = {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)

    def open(self, path: Path, fragment: str = "") -> None:
        self.driver.get("about:blank")  # a change of the fragment alone loads nothing
        self.driver.get(path.as_uri() + fragment)

    def run(self, script: str, *values: Any) -> Any:
        return self.driver.execute_script(f"return {script}", *values)  # type: ignore[no-untyped-call]

    def until(self, script: str, *values: Any) -> Any:
        """What a script returns once that is true."""
        end = time.monotonic() + 10
        while not (found := self.run(script, *values)):
            assert time.monotonic() < end, f"not within 10 s: {script}"
            time.sleep(0.02)
        return found

    def text(self, selector: str) -> str:
        return str(self.run("document.querySelector(arguments[0]).textContent", selector))

    def texts(self, selector: str) -> list[str]:
        return list(self.run("[...document.querySelectorAll(arguments[0])].map((one) => one.textContent)", selector))

    def type(self, selector: str, text: str) -> None:
        from selenium.webdriver.common.by import By

        box = self.driver.find_element(By.CSS_SELECTOR, selector)
        box.clear()
        box.send_keys(text)

    def click(self, selector: str) -> None:
        from selenium.webdriver.common.by import By

        self.driver.find_element(By.CSS_SELECTOR, selector).click()

    def complaints(self) -> list[str]:
        """What the console holds since the last time."""
        return [entry["message"] for entry in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def running() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.driver.quit()


@pytest.fixture
def browser(running: Browser) -> Iterator[Browser]:
    running.size(DESKTOP)
    running.complaints()
    yield running
    assert running.complaints() == []


@pytest.fixture
def features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pages of 11 latents in pieces of 3, all text hostile."""
    monkeypatch.setattr(pages, "LATENTS_A_PIECE", 3)
    return a_page(tmp_path / "features", 11)[1]


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


def numbers(browser: Browser) -> list[int]:
    return [int(text.removeprefix("#")) for text in browser.texts("#list b")]


def test_hostile_text_shows_as_text_and_runs_nothing(browser: Browser, features: Path) -> None:
    for latent in range(11):
        browser.open(features, f"#{latent}")
        browser.until("document.querySelector('#latent h1')?.textContent === arguments[0]", f"Latent #{latent}")
        assert browser.run("window.hacked === undefined && document.querySelector('img') === null")
        scripts = browser.run("[...document.scripts].map((one) => one.getAttribute('src') ?? one.type)")
        assert scripts == [f"part-{latent // 3:03d}.js", "application/json", "", "index.js"]
    shown = browser.text("#latent") + browser.text("#list")
    for text in HOSTILE:
        assert text.replace("\u2028\u2029", "¶¶") in shown
    assert HOSTILE[0] in browser.text("header") and HOSTILE[2] in browser.text("header")
    assert browser.run("performance.getEntriesByType('resource').every((one) => one.name.startsWith('file:'))")


def test_a_script_that_did_get_into_the_page_would_not_run(running: Browser, features: Path) -> None:
    """The page's own policy stands behind the escaping."""
    running.open(features)
    running.run(
        "(() => { const bad = document.createElement('script'); bad.textContent = 'window.hacked = 1';"
        " document.body.append(bad); document.body.insertAdjacentHTML('beforeend', arguments[0]); })()",
        "<img src=x onerror='window.hacked=1'>",
    )
    time.sleep(0.2)
    assert running.run("window.hacked === undefined")
    assert any("Content Security Policy" in message for message in running.complaints())


def test_search_finds_numbers_and_tokens(browser: Browser, features: Path) -> None:
    (index,) = called(features.parent / "index.js")
    browser.open(features)
    assert browser.until("document.querySelectorAll('#list b').length") == 11
    for query in ("5", "#5"):
        browser.type("#search", query)
        assert browser.until("document.querySelector('#list b')?.textContent === '#5'")
    assert numbers(browser) == [5]
    assert browser.text("#count") == "1 of 11"
    browser.type("#search", "ONERROR")
    carry = {t for t, text in enumerate(index["tokens"]) if "onerror" in text}
    expected = {i for i in range(11) if carry & {*index["peaks"][i], *index["raised"][i]}}
    assert browser.until("document.querySelector('#count').textContent !== '1 of 11'")
    assert 0 < len(expected) < 11 and set(numbers(browser)) == expected
    browser.type("#search", "no such token")
    assert browser.until("document.querySelector('#count').textContent === '0 of 11'") and numbers(browser) == []


def test_sort_is_by_each_figure(browser: Browser, features: Path) -> None:
    (index,) = called(features.parent / "index.js")
    browser.open(features)
    browser.until("document.querySelectorAll('#list b').length === 11")
    for name, key in (("density", "fired"), ("max", "max"), ("interest", "interest")):
        browser.click(f"#sort option[value={name}]")
        assert numbers(browser) == sorted(range(11), key=lambda i, key=key: (-index[key][i], i))  # type: ignore[misc]
    browser.click("#sort option[value=number]")
    assert numbers(browser) == list(range(11))


def test_the_shading_follows_the_activations(browser: Browser, features: Path) -> None:
    browser.open(features, "#4")
    browser.until("document.querySelector('#latent h1')?.textContent === 'Latent #4'")
    spans = browser.run(
        "[...document.querySelectorAll('.text span')].map((one) =>"
        " [Number(one.dataset.value ?? 0), getComputedStyle(one).backgroundColor, one.className])"
    )
    assert any(name == "peak" for _, _, name in spans)
    shades = []
    for value, colour, _ in spans:
        alpha = re.fullmatch(r"rgba\(245, 145, 20, ([\d.]+)\)", colour)
        assert (alpha is not None) == (value > 0), (value, colour)
        shades += [(value, float(alpha[1]))] if alpha else []
    assert len({value for value, _ in shades}) > 3
    assert sorted(shades) == sorted(shades, key=lambda one: (one[1], one[0]))
    assert max(shades)[1] == pytest.approx(0.8, abs=0.01)


def test_permalinks_and_links_between_latents(browser: Browser, features: Path) -> None:
    browser.open(features, "#10")
    browser.until("document.querySelector('#latent h1')?.textContent === 'Latent #10'")
    assert browser.text("#list a[aria-current] b") == "#10" and "#10" in browser.driver.title
    browser.click(".pairs a")  # its neighbour is latent 0, which is silent
    browser.until("document.querySelector('#latent h1')?.textContent === 'Latent #0'")
    assert browser.run("location.hash") == "#0" and "fired on none" in browser.text("#latent")
    browser.driver.back()
    browser.until("document.querySelector('#latent h1')?.textContent === 'Latent #10'")
    browser.open(features, "#11")
    browser.until("document.querySelector('#latent').textContent.includes('no latent #11')")
    browser.open(features)
    browser.until("document.querySelector('#latent h1')")
    assert browser.run("location.hash") == browser.texts("#list b")[0]


def test_a_missing_piece_is_named(running: Browser, features: Path) -> None:
    (features.parent / "part-002.js").unlink()
    running.open(features, "#7")
    running.until("document.querySelector('#latent').textContent.includes('part-002.js is missing')")
    running.complaints()


@pytest.mark.parametrize("dark", [False, True])
def test_on_a_phone_list_and_latent_take_turns(browser: Browser, features: Path, dark: bool) -> None:
    browser.size(PHONE, dark)
    browser.open(features)
    browser.until("document.querySelectorAll('#list b').length === 11")
    shown = "[...document.querySelectorAll('#side, main')].map((one) => getComputedStyle(one).display !== 'none')"
    assert browser.run(shown) == [True, False]
    browser.click("#list a")
    browser.until("document.querySelector('#latent h1')")
    assert browser.run(shown) == [False, True]
    assert browser.run("document.documentElement.scrollWidth") <= PHONE[0]
    assert browser.run("document.querySelector('main').scrollWidth") <= PHONE[0]
    assert contrast(browser, "#latent .from") >= 4.5 and contrast(browser, "#latent .text span[data-value]") >= 4.5
    browser.click(".back")
    assert browser.until(f"String({shown}) === 'true,false'")


def contrast(browser: Browser, selector: str) -> float:
    """The least contrast by WCAG of the texts chosen against all that is painted behind them."""
    found = browser.run(
        """[...document.querySelectorAll(arguments[0])].map((one) => {
          const colours = [getComputedStyle(one).color];
          for (let at = one; at; at = at.parentElement) colours.push(getComputedStyle(at).backgroundColor);
          return colours;
        })""",
        selector,
    )
    assert found

    def numbers_of(colour: str) -> list[float]:
        parts = [float(part) for part in re.findall(r"[\d.]+", colour)]
        return parts if len(parts) == 4 else [*parts, 1.0]

    def light(colour: list[float]) -> float:
        linear = [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    least = 21.0
    for text, *behind in found:
        ground = [255.0, 255.0, 255.0]
        for colour in reversed(behind):
            *new, alpha = numbers_of(colour)
            ground = [alpha * n + (1 - alpha) * g for n, g in zip(new, ground, strict=True)]
        pair = sorted((light(numbers_of(text)[:3]), light(ground)))
        least = min(least, (pair[1] + 0.05) / (pair[0] + 0.05))
    return least


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

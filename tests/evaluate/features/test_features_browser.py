"""The feature pages and the page of an own text in a real browser: hostile text runs nothing, everything works."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evaluate.features.own_text import write_own_text
from evaluate.features.pages import OtherSAE
from tests.helpers.browser import DESKTOP, NEEDS_BROWSER, PHONE, Browser, contrast
from tests.helpers.pages import HOSTILE, a_page, called

pytestmark = NEEDS_BROWSER


def numbers(browser: Browser) -> list[int]:
    return [int(text.removeprefix("#")) for text in browser.texts("#list b")]


def test_hostile_text_shows_as_text_and_runs_nothing(browser: Browser, features: Path) -> None:
    for latent in range(11):
        browser.open(features, f"#{latent}")
        browser.until("document.querySelector('#latent h1')?.textContent === arguments[0]", f"Latent #{latent}")
        assert browser.run("window.hacked === undefined && document.querySelector('img') === null")
        scripts = browser.run("[...document.scripts].map((one) => one.getAttribute('src') ?? one.type)")
        assert scripts == [f"part-{latent // 3:03d}.js", "application/json", "", "index.js", "labels.js"]
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
    browser.click(".beside > .card:last-child a")  # its neighbour is latent 0, which is silent
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


def test_contexts_come_first_and_are_seen_without_scrolling(browser: Browser, features: Path) -> None:
    browser.open(features, "#4")
    browser.until("document.querySelector('#latent h1')?.textContent === 'Latent #4'")
    boxes = browser.run(
        "[...document.querySelectorAll('.context')].map((one) => one.getBoundingClientRect())"
        ".map(({top, bottom, left}) => [top, bottom, left])"
    )
    assert len(boxes) >= 4 and all(0 < top < bottom < DESKTOP[1] for top, bottom, _ in boxes[:2])
    beside = browser.run("document.querySelector('.beside').getBoundingClientRect().left")
    assert all(left < beside for _, _, left in boxes)


def test_a_context_opens_to_the_whole_of_it(browser: Browser, features: Path) -> None:
    _, piece = called(features.parent / "part-001.js")
    _, text = called(features.parent / "text-000.js")
    example = piece["latents"][1]["g"][0]["c"][0]
    sequence, position = example["s"]
    browser.open(features, "#4")
    browser.until("document.querySelector('.context .more')")
    browser.click(".context .more")
    whole = "document.querySelector('.context.whole .text').children"
    browser.until(f"document.querySelector('.context.whole') && {whole}.length === 8")
    shown = browser.run(f"[...{whole}].map((one) => [one.textContent, Number(one.dataset.value ?? 0), one.className])")
    expected = {position - example["p"] + place: value for place, value in paired(example["a"])} | dict(
        paired(example["o"])
    )
    assert [value for _, value, _ in shown] == [expected.get(place, 0) for place in range(8)]
    assert shown[position][2] == "peak" and shown[0][2] == "unread"
    tokens = [text["tokens"][i] for i in text["contexts"][sequence]]
    assert [seen for seen, _, _ in shown] == [token.replace("\u2028\u2029", "¶¶") for token in tokens]
    browser.press("e")  # all whole, then all short
    browser.until("[...document.querySelectorAll('.context')].every((one) => one.classList.contains('whole'))")
    browser.press("e")
    browser.until("document.querySelector('.context.whole') === null")


def paired(numbers: list[Any]) -> list[tuple[int, float]]:
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def test_keys_walk_the_list_and_a_favourite_is_remembered(browser: Browser, features: Path) -> None:
    browser.open(features)
    browser.until("document.querySelector('#latent h1')")
    listed = numbers(browser)
    for key, latent in (("j", listed[1]), ("j", listed[2]), ("k", listed[1])):
        browser.press(key)
        browser.until("document.querySelector('#latent h1')?.textContent === arguments[0]", f"Latent #{latent}")
        assert browser.text("#list a[aria-current] b") == f"#{latent}"
    browser.press("f")
    browser.until("document.querySelector('#star').getAttribute('aria-pressed') === 'true'")
    browser.open(features)
    browser.until("document.querySelectorAll('#list b').length === 11")
    browser.click("#favourites")
    assert numbers(browser) == [listed[1]]
    browser.click("#favourites")
    browser.press("/")
    browser.press("j")  # words in the search box are no keys
    assert browser.run("document.querySelector('#search').value") == "j"
    browser.press("\ue00c")  # Escape leaves the box
    browser.press("?")
    assert browser.run("document.querySelector('#keys').hidden") is False


def test_the_list_goes_to_the_latent_of_a_link(browser: Browser, tmp_path: Path) -> None:
    """Of 700 latents 200 are listed at a time, and a link may be to any."""
    _, index = a_page(tmp_path, 700)
    browser.open(index)
    browser.until("document.querySelectorAll('#list b').length === 200")
    browser.click("#sort option[value=number]")
    browser.run("(() => { location.hash = '#600'; })()")
    browser.until("document.querySelector('#list a[aria-current] b')?.textContent === '#600'")
    box = browser.run(
        "(({top, bottom}) => [top, bottom])(document.querySelector('[aria-current]').getBoundingClientRect())"
    )
    assert 0 < box[0] < box[1] <= DESKTOP[1] + 1  # of fractions of a pixel
    browser.click("#earlier")
    assert numbers(browser)[0] == 300


def test_two_saes_are_seen_side_by_side(browser: Browser, tmp_path: Path) -> None:
    a_page(tmp_path / "other", 4)
    near = (np.array([[(i + 1) % 4, i % 4] for i in range(5)]), np.full((5, 2), 0.5, np.float32))
    other = OtherSAE(HOSTILE[1], "other", near, [[0], [1], [2], [3]])
    _, index = a_page(tmp_path, 5, other)
    browser.open(index, "#2")
    browser.until("document.querySelector('#latent h1')")
    assert "#3" in browser.text(".beside .card") and HOSTILE[1] in browser.text(".beside h2")
    browser.press("s")
    browser.until("document.querySelector('iframe')")
    browser.driver.switch_to.frame(0)
    browser.until("document.querySelector('#latent h1')?.textContent === 'Latent #3'")
    assert browser.run("getComputedStyle(document.querySelector('#side')).display") == "none"
    browser.driver.switch_to.default_content()
    browser.press("s")
    browser.until("document.querySelector('iframe') === null")


@pytest.fixture
def own_text(tmp_path: Path) -> Path:
    """Three tokens after a BOS, on which latents 5 and 7 fire."""
    tokens = ["<s>", HOSTILE[0], "\n", HOSTILE[1]]
    latents = [{"i": 5, "a": [1, 2.0, 3, 1.0], "r": [1]}, {"i": 7, "a": [3, 4.0], "r": []}]
    page = {"ids": [0, 1, 2, 3], "read": [1, 2, 3], "latents": latents, "tokens": tokens}
    about = {"variant": HOSTILE[0], "width": 9, "folder": HOSTILE[2], "site": "s", "model": "m", "l0": 1.0}
    return write_own_text(page, about, tmp_path)


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_own_text_is_shaded_by_the_latent_chosen(browser: Browser, own_text: Path, size: tuple[int, int]) -> None:
    browser.size(size)
    browser.open(own_text)
    rows = "[...document.querySelectorAll('#latents tr')].map((one) => one.cells[0].textContent)"
    assert browser.until(rows) == ["#7", "#5"]
    browser.click("#latents tr:last-child button")
    values = "[...document.querySelectorAll('#text > span')].map((one) => Number(one.dataset.value ?? 0))"
    assert browser.run(values) == [0, 2, 0, 1]
    browser.click("#text > span:nth-child(2)")
    assert browser.run(rows) == ["#5"] and "1 fire" in browser.text("#count")
    browser.click("#all")
    assert browser.run(rows) == ["#7", "#5"]
    assert browser.run("document.documentElement.scrollWidth") <= size[0]
    assert browser.run("window.hacked === undefined && document.querySelector('img') === null")
    assert HOSTILE[1] in browser.text("#text")

"""A headless Chromium for the tests of pages, and what they read off it."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), ""
)
DRIVER = shutil.which("chromedriver") or ""
NEEDS_BROWSER = [
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

    def press(self, keys: str) -> None:
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(keys).perform()

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

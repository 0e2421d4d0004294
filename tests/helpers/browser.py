"""A report, opened in headless Chromium: what the browser says of it."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTH = 1280


@dataclass
class Opened:
    """What was seen: console messages and page errors, addresses asked for, each figure's size as drawn, the width."""

    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    figures: dict[str, tuple[int, int]] = field(default_factory=dict)
    width: int = 0
    screenshot: bytes = b""


def look(path: Path, then: Callable[[Any], None] = lambda page: None) -> Opened:
    """Open the file at a width of 1,280 pixels, and hand the page to `then`. Skips the test without a browser."""
    if CHROMIUM is None:
        pytest.skip("needs chromium on the PATH")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra `dev`")
    seen = Opened()
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 1000})
        page.set_default_timeout(120_000)
        page.on("console", lambda message: seen.complaints.append(message.text))
        page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        page.on("request", lambda request: seen.requests.append(request.url))
        page.goto(path.resolve().as_uri())
        size = "els => Object.fromEntries(els.map(el => [el.closest('figure').id, [el.naturalWidth, el.width]]))"
        seen.figures = {name: (own[0], own[1]) for name, own in page.eval_on_selector_all("figure img", size).items()}
        seen.width = page.evaluate("document.documentElement.scrollWidth")
        seen.screenshot = page.screenshot(full_page=True)
        then(page)
        browser.close()
    return seen

"""A page in headless Chromium: what the browser reports about it."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTH = 1280


@dataclass
class OpenedPage:
    """Console messages and page errors, requested URLs, widths of the panels of each figure, width of the page."""

    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    figures: dict[str, list[float]] = field(default_factory=dict)
    width: int = 0
    screenshot: bytes = b""

    @property
    def external_requests(self) -> list[str]:
        """The requested URLs without embedded data."""
        return [url for url in self.requests if not url.startswith("data:")]


def open_page(path: Path, interact: Callable[[Any], None] = lambda page: None) -> OpenedPage:
    """Open the file at a width of 1,280 pixels and pass the page to `interact`. Skips the test without a browser."""
    if CHROMIUM is None:
        pytest.skip("needs chromium on the PATH")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra `dev`")
    opened = OpenedPage()
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 1000})
        page.set_default_timeout(120_000)
        page.on("console", lambda message: opened.messages.append(message.text))
        page.on("pageerror", lambda error: opened.messages.append(str(error)))
        page.on("request", lambda request: opened.requests.append(request.url))
        page.goto(path.resolve().as_uri())
        widths = "[...el.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect().width)"
        sizes = f"els => Object.fromEntries(els.map(el => [el.id, {widths}]))"
        opened.figures = page.eval_on_selector_all("figure", sizes)
        opened.width = page.evaluate("document.documentElement.scrollWidth")
        opened.screenshot = page.screenshot(full_page=True)
        interact(page)
        browser.close()
    return opened

"""A page in headless Chromium: what the browser and axe report about it."""

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTH = 1280


SMALLEST_TEXT = """Math.min(99, ...[...document.querySelectorAll("figure svg text")].map((text) => {
  const svg = text.ownerSVGElement;
  return parseFloat(getComputedStyle(text).fontSize) * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
}))"""


@dataclass
class OpenedPage:
    """Console messages and page errors, requested URLs, widths of the panels of each figure, width of the page, the
    size of the smallest text in the figures in pixels, and what axe finds serious."""

    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    figures: dict[str, list[float]] = field(default_factory=dict)
    width: int = 0
    smallest_text: float = 0.0
    violations: list[str] = field(default_factory=list)
    screenshot: bytes = b""

    @property
    def external_requests(self) -> list[str]:
        """The requested URLs without embedded data."""
        return [url for url in self.requests if not url.startswith("data:")]


def open_page(
    path: Path, interact: Callable[[Any], None] = lambda page: None, width: int = WIDTH, scheme: Any = "light"
) -> OpenedPage:
    """Open the file at a width in pixels and pass the page to `interact`. Skips the test without a browser.

    scheme: "light" or "dark", which the user prefers.
    """
    if CHROMIUM is None:
        pytest.skip("needs chromium on the PATH")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright, of the extra `dev`")
    opened = OpenedPage()
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 1000}, color_scheme=scheme)
        page.set_default_timeout(120_000)
        page.on("console", lambda message: opened.messages.append(message.text))
        page.on("pageerror", lambda error: opened.messages.append(str(error)))
        page.on("request", lambda request: opened.requests.append(request.url))
        page.goto(path.resolve().as_uri())
        widths = "[...el.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect().width)"
        sizes = f"els => Object.fromEntries(els.map(el => [el.id, {widths}]))"
        opened.figures = page.eval_on_selector_all("figure", sizes)
        opened.width = page.evaluate("document.documentElement.scrollWidth")
        opened.smallest_text = page.evaluate(SMALLEST_TEXT)
        opened.screenshot = page.screenshot(full_page=True)
        interact(page)
        opened.violations = list(serious_violations(page))
        browser.close()
    return opened


def serious_violations(page: Any) -> Iterator[str]:
    """Yield the rules of accessibility that a page breaks, those that axe calls serious or critical, with an example.

    None if axe is not installed.
    """
    spec = importlib.util.find_spec("axe_playwright_python")
    if spec is None or spec.origin is None:
        return
    page.evaluate(Path(spec.origin).with_name("axe.min.js").read_text())
    for violation in page.evaluate("axe.run()")["violations"]:
        if violation["impact"] in ("serious", "critical"):
            yield f"{violation['id']}: {violation['nodes'][0]['html'][:200]} {violation['nodes'][0]['failureSummary']}"

"""The report in a browser: it shows every figure, requests nothing from the network, and executes no foreign text."""

import re
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from helpers.browser import WIDTH, open_page
from helpers.planted import plant, planted_run
from helpers.reports import make_complete_report

from opdctl.analysis import analyze, report, samples
from opdctl.analysis.figures import FIGURES

HOSTILE_TEXT = "</span><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>\x1b[31m\u202e"


@pytest.fixture(scope="module")
def report_path(tmp_path_factory) -> Path:
    return make_complete_report(tmp_path_factory.mktemp("report") / "run")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, WIDTH])
def test_report_is_readable_without_the_network(report_path, width, scheme):
    opened = open_page(report_path, width=width, scheme=scheme)
    assert opened.messages == []
    assert opened.external_requests == [report_path.resolve().as_uri()]
    assert opened.width <= width  # no horizontal scrolling
    assert {"position", "steps", "weights", "continuations", "accuracy"} <= opened.figures.keys() <= FIGURES.keys()
    assert all(panels and min(panels) > 300 for panels in opened.figures.values())
    assert opened.smallest_text >= 9
    assert opened.violations == []


def test_colors_of_figures_contrast_with_the_page():
    """Curves at least 3:1 and text at least 4.5:1 (WCAG 2.2, 1.4.3 and 1.4.11), on a light and on a dark page."""
    style = (resources.files("opdctl.analysis") / "report.css").read_text()
    for block in re.findall(r":root \{(.*?)\}", style, re.DOTALL):
        colors = dict(re.findall(r"--(\w+): (#\w+)", block))
        for name in ("orange", "blue", "green", "purple", "cyan", "pink", "grey"):
            assert contrast(colors[name], colors["paper"]) >= 3, name
        for name in ("ink", "soft", "link"):
            assert contrast(colors[name], colors["paper"]) >= 4.5, name
            assert contrast(colors[name], colors["ground"]) >= 4.5, name


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(color: str) -> float:
    digits = "".join(2 * digit for digit in color[1:]) if len(color) == 4 else color[1:]
    channels = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_script_shows_numbers_and_sorts_the_responses(report_path):
    seen = {}

    def use(page):
        token = page.locator(".tokens span[data-n]").first
        token.hover()
        seen["token"] = page.locator("#tip").inner_text()
        seen["signal"] = token.evaluate("el => getComputedStyle(el).backgroundColor")
        page.locator("#by-weight").check()
        seen["weight"] = token.evaluate("el => getComputedStyle(el).backgroundColor")
        token.focus()
        page.keyboard.press("ArrowRight")
        seen["next"] = page.locator("#tip").inner_text()
        page.locator("#steps svg").first.hover()
        seen["curve"] = page.locator("#tip").inner_text()
        page.locator("#steps .choose input").first.uncheck()
        seen["hidden"] = page.locator("#steps [data-series=k1][hidden]").count()
        page.locator(".controls select").select_option("length")
        seen["lengths"] = page.locator("article").evaluate_all("all => all.map(el => +el.dataset.length)")
        page.locator(".controls input[type=search]").fill("no prompt has this text")
        seen["found"] = page.locator("article:visible").count()

    opened = open_page(report_path, use)
    assert opened.messages == []
    assert "token 1: A = " in seen["token"]
    assert "weight iw_opd" in seen["token"]
    assert "student’s first: " in seen["token"]
    assert "token 2: A = " in seen["next"]
    assert re.search(r"training step: [01]\nk1: [\d.]+\nk3: [\d.]+", seen["curve"])
    assert seen["hidden"] > 0
    assert seen["lengths"] == sorted(seen["lengths"], reverse=True)
    assert seen["found"] == 0
    assert seen["weight"].startswith("rgba(29, 78, 216")
    assert seen["signal"] != seen["weight"]


def test_hostile_names_and_tokens_are_not_executed(tmp_path, monkeypatch):
    run = planted_run(tmp_path / "<script>alert(1)<")
    plant(run, 0, [np.array([-1.0, -2.0])] * 3)
    monkeypatch.setattr(samples, "token_decoder", lambda run: lambda ids: [HOSTILE_TEXT for _ in ids])
    page = Path(report.write_report(run.path / "analysis", analyze.analyze_run(run))["report"])
    text = page.read_text()
    assert text.count("<script") == 1  # its own
    assert "&lt;script&gt;alert(1)" in text
    assert not {"\x1b", "\u202e"} & set(text)
    opened = open_page(page)
    assert opened.messages == []
    assert opened.external_requests == [page.resolve().as_uri()]

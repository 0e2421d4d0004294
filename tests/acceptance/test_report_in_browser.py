"""The report in a browser: it shows every figure, requests nothing from the network, and executes no foreign text."""

from pathlib import Path

import numpy as np
from helpers.browser import WIDTH, open_page
from helpers.planted import plant, planted_run
from helpers.reports import make_complete_report

from opdctl.analysis import analyze, figures, report, samples

HOSTILE_TEXT = "</span><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>\x1b[31m\u202e"


def test_browser_shows_every_figure_without_the_network(tmp_path):
    path = make_complete_report(tmp_path / "run")
    hovered = {}

    def hover(page):
        token = page.locator(".tokens span[data-n]").first
        token.hover()
        hovered["tooltip"] = token.evaluate("el => getComputedStyle(el, '::after').content")
        hovered["signal"] = token.evaluate("el => getComputedStyle(el).backgroundColor")
        page.locator("#by-weight").check()
        hovered["weight"] = token.evaluate("el => getComputedStyle(el).backgroundColor")

    opened = open_page(path, hover)
    assert opened.messages == []
    assert opened.external_requests == [path.resolve().as_uri()]
    assert list(opened.figures) == list(figures.FIGURES)
    assert all(panels and min(panels) > 300 for panels in opened.figures.values())
    assert opened.width <= WIDTH  # no horizontal scrolling
    assert "token 1: A = " in hovered["tooltip"]
    assert "iw_opd" in hovered["tooltip"]
    assert hovered["weight"].startswith("rgba(29, 78, 216")
    assert hovered["signal"].startswith("rgba(194, 65, 12")


def test_hostile_names_and_tokens_are_not_executed(tmp_path, monkeypatch):
    run = planted_run(tmp_path / "<script>alert(1)<")
    plant(run, 0, [np.array([-1.0, -2.0])] * 3)
    monkeypatch.setattr(samples, "token_decoder", lambda run: lambda ids: [HOSTILE_TEXT for _ in ids])
    page = Path(report.write_report(run.path / "analysis", analyze.analyze_run(run))["report"])
    text = page.read_text()
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert not {"\x1b", "\u202e"} & set(text)
    opened = open_page(page)
    assert opened.messages == []
    assert opened.external_requests == [page.resolve().as_uri()]

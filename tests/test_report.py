"""The report: one file that a browser shows whole, asks nobody for anything, and cannot be talked into markup."""

import re
from pathlib import Path

import numpy as np
import pytest
from helpers.browser import WIDTH, look
from helpers.commands import QUICKSTART, invoke, sets
from helpers.planted import plant, planted_run

from opdctl.analysis import analyze, report, samples

HOSTILE = "</span><script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>\x1b[31m\u202e"


@pytest.fixture(scope="module")
def analysed(tmp_path_factory):
    """A run of the quickstart's kind, of two steps, with everything that a report can show."""
    path = tmp_path_factory.mktemp("report") / "run"
    stored = ("rollout.entropy=true", "score.entropy=true", "rollout.top_k=4", "score.top_k=4")
    small = ("eval.every_steps=1", "continuations.responses=2", *stored)
    assert invoke("train", "--recipe", QUICKSTART, *sets(*small), "--output", path).code == 0
    result = invoke("analyze-position", path, "--continuations", "--json")
    assert result.code == 0, result.err
    return Path(result.json()["report"])


def test_a_browser_shows_every_figure_and_asks_nobody_for_anything(analysed):
    hovered = {}

    def hover(page):
        token = page.locator(".tokens span[data-n]").first
        token.hover()
        hovered["note"] = token.evaluate("el => getComputedStyle(el, '::after').content")
        hovered["signal"] = token.evaluate("el => getComputedStyle(el).backgroundColor")
        page.locator("#by-weight").check()
        hovered["weight"] = token.evaluate("el => getComputedStyle(el).backgroundColor")

    seen = look(analysed, hover)
    assert seen.complaints == []
    assert [url for url in seen.requests if not url.startswith("data:")] == [analysed.resolve().as_uri()]
    assert list(seen.figures) == list(report.TITLES)
    assert all(natural > 0 and shown > 0.8 * WIDTH for natural, shown in seen.figures.values())
    assert seen.width <= WIDTH  # nothing to scroll to the side for
    assert "token 1: A = " in hovered["note"]
    assert "iw_opd" in hovered["note"]
    assert hovered["weight"].startswith("rgba(29, 78, 216")
    assert hovered["signal"].startswith("rgba(194, 65, 12")


def test_each_figure_has_a_sentence_with_a_number(analysed):
    captions = re.findall(r"<figcaption><strong>(.*?)</strong> (.*?)</figcaption>", analysed.read_text(), re.DOTALL)
    assert [title for title, _ in captions] == list(report.TITLES.values())
    for _, said in captions:
        assert re.search(r"\d", said)
        assert "nan" not in said


def test_nothing_in_it_leads_out(analysed):
    page = analysed.read_text()
    assert "default-src 'none'" in page
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", page)
    assert "<script" not in page


def test_a_hostile_name_prompt_and_token_cannot_reach_the_page_as_markup(tmp_path, monkeypatch):
    run = planted_run(tmp_path / "<script>alert(1)<")
    plant(run, 0, [np.array([-1.0, -2.0])] * 3)
    monkeypatch.setattr(samples, "token_decoder", lambda run: lambda ids: [HOSTILE for _ in ids])
    found = analyze.analyze_run(run)
    page = Path(report.write_report(run.path / "analysis", found)["report"])
    text = page.read_text()
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert not {"\x1b", "\u202e"} & set(text)
    seen = look(page)
    assert seen.complaints == []
    assert [url for url in seen.requests if not url.startswith("data:")] == [page.resolve().as_uri()]


def test_a_long_response_is_cut_and_says_so(tmp_path):
    run = planted_run(tmp_path / "run")
    plant(run, 0, [np.full(report.SHOWN + 5, -1.0)] * 2)
    page = Path(report.write_report(run.path / "analysis", analyze.analyze_run(run))["report"]).read_text()
    assert "… 5 more" in page
    assert page.count("data-n=") == report.SHOWN  # both samples are the same response's like: one is shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a b", "a b"), ("\n", "↵\n"), ("\x1b[31m", r"\x1b[31m"), ("\u202e", r"\u202e"), ("", "∅"), ("é🎉", "é🎉")],
)
def test_what_is_not_seen_is_written_out(text, shown):
    assert samples.printable(text) == shown


def test_tokens_keep_their_text_where_one_character_takes_several(tmp_path):
    run = planted_run(tmp_path / "run")
    ids = run.student.tokenizer("abc?x")["input_ids"]
    assert samples.token_decoder(run)(ids) == list("abc?x")


def test_without_a_tokenizer_the_ids_are_shown(tmp_path, monkeypatch):
    run = planted_run(tmp_path / "run")
    plant(run, 0, [np.array([-1.0, -2.0])] * 3)
    (tmp_path / "empty").mkdir()
    models = {**run.models, "student": type(run.student)(tmp_path / "empty", "float32")}
    run = type(run)(run.recipe, run.path, models, run.digests)
    assert analyze.analyze_run(run).samples[0].pieces == ["⟨3⟩", "⟨3⟩"]

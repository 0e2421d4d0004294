"""Evaluations at the terminal."""

from pathlib import Path

import pytest
from helpers.evaluations import plant_evaluation

from opdctl.cli.eval_view import print_failures, print_summary
from opdctl.evaluation.results import load_evaluation

INTERVAL = {"mean": 0.5, "ci": [0.25, 0.75]}
SUMMARY = {
    "bench": "mine",
    "model": "teacher",
    "problems": 4,
    "samples": 2,
    "avg": 0.5,
    "ci": [0.25, 0.75],
    "ci_same_problems": None,
    "pass_at": {"1": INTERVAL, "2": {"mean": 0.625, "ci": [0.125, 0.875]}},
    "maj_at": {},
    "truncated_fraction": 0.5,
    "response_length": 12.0,
    "response_lengths": {"p50": 11.0, "p90": 19.0},
    "verdicts": {"ok": 7, "timeout": 1},
    "grader_failures": [{"sample_id": "mine/a/0", "verdict": "timeout", "extracted": "9^9"}],
    "benchmark": {
        "unparsable_golds": ["b"],
        "contamination": {"ngram": 8, "problems": 4, "contaminated": 1, "fractions": {"c": 1.0, "d": 0.1}},
    },
}


def test_summary_has_intervals_and_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(SUMMARY)
    text = " ".join("".join(capsys.readouterr()).split())
    for part in (
        *("mine, teacher: 4 problems", "Avg@2", "50.0%", "[25.0%, 75.0%]", "pass@2", "62.5%", "[12.5%, 87.5%]"),
        *("50.0% truncated", "7 ok, 1 timeout", "mine/a/0 (timeout)", "1 gold answers", "contain 1 of its 4 problems"),
    ):
        assert part in text
    assert "pass@1 " not in text


def test_answers_on_which_math_verify_differs_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(SUMMARY | {"avg_math_verify": 0.25, "math_verify_differences": 3})
    assert "math-verify alone: 25.0%; it differs on 3 responses" in " ".join(capsys.readouterr().out.split())
    print_failures(load_evaluation(plant_evaluation(tmp_path / "one", {"a": [True]}, math_verify=False)), 1)
    assert "mine/a/0: answer '1', gold '1': correct, math-verify: incorrect" in capsys.readouterr().out


def test_untrusted_text_is_not_interpreted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "\x1b[2J\x1b]0;owned\x07 [red]\u202e"
    print_failures(load_evaluation(plant_evaluation(tmp_path / "one", {"a": [False]}, text=text)), 1)
    shown = capsys.readouterr().out
    assert "owned" in shown
    assert "[red]" in shown
    assert not {"\x1b", "\x07", "\u202e"} & {*shown}

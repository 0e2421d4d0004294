"""analyze-position and run show as commands, on planted artifacts."""

import html
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import invoke
from helpers.planted import plant, planted_run
from helpers.reports import make_complete_report

from opdctl.analysis import figures
from opdctl.runs.run import Run


@pytest.fixture
def run(tmp_path) -> Run:
    return planted_run(tmp_path / "run")


# ── analyze-position ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_run_without_scores_is_rejected_with_the_next_command(run):
    result = invoke("analyze-position", run.path)
    assert (result.code, result.kind) == (1, "missing_input")
    assert "opdctl rollout" in result.err


def test_weights_that_cannot_be_shown_are_rejected(run):
    plant(run, 0, [np.array([-1.0])])
    result = invoke("analyze-position", run.path, "--weights", "linear_decai")
    assert (result.code, result.kind, "did you mean `linear_decay`?" in result.err) == (2, "unknown_name", True)
    result = invoke("analyze-position", run.path, "--weights", "fire")
    assert (result.code, result.kind, "score.entropy = true" in result.err) == (4, "settings_mismatch", True)
    result = invoke("run", "show", run.path, "planted/00000/0", "--weights", "iw_opd:gama=1")
    assert (result.code, result.kind, "did you mean `gamma`?" in result.err) == (2, "invalid_usage", True)


def test_figures_and_tables_are_counted_once(run):
    """Each is in files of several formats."""
    plant(run, 0, [np.array([-1.0, -2.0, 0.5])])
    result = invoke("analyze-position", run.path, "--paper", "--weights", "uniform")
    for kind in ("figures", "tables"):
        paths = list((run.path / "analysis" / kind).iterdir())
        count = len({path.stem for path in paths})
        assert f"{count} {kind}" in " ".join(result.err.split())
        assert len(paths) == 2 * count


UNTESTABLE = {
    "one response": [np.array([-1.0, -2.0, 0.5])],
    "one token": [np.array([-1.0])],
    "all of length 1": [np.array([-1.0])] * 30,
    "an empty one among others": [np.zeros(0), np.array([-1.0])],
    "all empty": [np.zeros(0)] * 3,
    "no signal": [np.zeros(5)] * 30,
}


@pytest.mark.parametrize("advantages", UNTESTABLE.values(), ids=UNTESTABLE)
def test_unusual_runs_give_a_report_without_a_test_of_bias(run, advantages):
    plant(run, 0, advantages)
    result = invoke("analyze-position", run.path, "--json")
    assert result.code == 0, result.err
    summary = result.json()["summary"]
    assert summary["bias"]["direction"] == "unknown"
    assert summary["phases"][0]["responses"] == len(advantages)
    assert summary["bias"]["reason"] in " ".join(result.err.split())
    page = re.sub(r"</?a\b[^>]*>", "", Path(result.json()["report"]).read_text())  # without links to the glossary
    assert summary["bias"]["reason"] in page
    assert not re.search(r"\bnan\b|\binf\b", page + result.err)


def test_skipped_steps_are_named(run):
    plant(run, 0, [np.full(4, -1.0)] * 3)
    plant(run, 1, [np.full(4, -9.0)] * 3)
    run.score_stage(1, "teacher").manifest_path.unlink()
    result = invoke("analyze-position", run.path, "--json")
    assert result.code == 0
    assert re.search(r"incomplete scores are skipped: 1\b", result.err)
    assert result.json()["summary"]["steps"] == [0]
    assert result.json()["summary"]["skipped"] == [1]
    assert result.json()["summary"]["phases"][0]["abs_advantage"] == 1.0


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_corrupt_part_is_named_with_the_command_that_repairs_it(run, damage):
    plant(run, 0, [np.full(4, -1.0)] * 3)
    part = run.score_stage(0, "teacher").path / run.score_stage(0, "teacher").names[0]
    if damage == "missing":
        part.unlink()
    else:
        part.write_bytes(part.read_bytes()[:-1] + b"\0")
    result = invoke("analyze-position", run.path)
    assert (result.code, result.kind) == (3, {"missing": "corrupt_artifact", "changed": "checksum_mismatch"}[damage])
    error = " ".join(result.err.split())
    assert str(part) in error
    assert f"opdctl score-teacher {run.path} --step 0 --only teacher" in error
    assert ("opdctl run repair" in error) == (damage == "changed")
    assert not (run.path / "analysis").exists()


def test_dry_run_writes_nothing(run):
    plant(run, 0, [np.array([-1.0])])
    result = invoke("analyze-position", run.path, "--dry-run", "--json")
    assert result.json()["steps"] == [0]
    assert not (run.path / "analysis").exists()


def test_ends_compare_the_first_step_with_the_final_student(run):
    for step in range(3):
        plant(run, step, [np.full(4, -1.0)] * 3)
    result = invoke("analyze-position", run.path, "--phases", "ends", "--json")
    phases = ["before training (step 0)", "after 2 updates (step 2)"]
    assert [phase["phase"] for phase in result.json()["summary"]["phases"]] == phases
    assert all(phase in result.err for phase in phases)
    assert "opdctl rollout" not in result.err


def test_terminal_shows_the_numbers_of_the_summary(run):
    rng = np.random.default_rng(0)
    plant(run, 0, [-rng.exponential(np.where(np.arange(100) < 30, 1.0, 3.0)) for _ in range(100)])
    result = invoke("analyze-position", run.path, "--json")
    bias, terminal = result.json()["summary"]["bias"], " ".join(result.err.split())
    assert bias["direction"] == "late"
    assert f"{bias['prefix_fraction']['value']:.1%}" in terminal
    assert f"{bias['change_point']['position']['value']:.0%}" in terminal
    assert bias["change_point"]["position"]["value"] == pytest.approx(0.3, abs=0.02)


@pytest.fixture(scope="module")
def complete_report_path(tmp_path_factory) -> Path:
    return make_complete_report(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def complete_report(complete_report_path) -> str:
    return complete_report_path.read_text()


def test_each_figure_has_a_caption_with_a_number(complete_report):
    captions = re.findall(r"<figcaption><h3.*?>(.*?)</h3>\n<p>(.*?)</p></figcaption>", complete_report, re.DOTALL)
    assert [title for title, _ in captions] == [figure.title for figure in figures.FIGURES.values()]
    for _, caption in captions:
        assert re.search(r"\d", caption)
        assert "nan" not in caption


def test_report_links_to_the_files_beside_it_and_to_no_others(complete_report, complete_report_path):
    policy = html.unescape(complete_report)
    assert "default-src 'none'; img-src data:; style-src 'sha256-" in policy
    assert "unsafe" not in policy
    links = set(re.findall(r"href=\"(?!data:|#)(.*?)\"", complete_report))
    assert links
    assert all((complete_report_path.parent / link).is_file() for link in links)
    assert not re.findall(r"src=[\"']|url\((?!#)|@import|style=\"", complete_report)


# ── run show ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shade", ["signal", "weight", "log_ratio"])
def test_one_response_is_shown_with_its_numbers(run, shade):
    plant(run, 0, [np.array([-1.0, -2.0]), np.array([-0.5])])
    result = invoke("run", "show", run.path, "planted/00000/0", "--shade", shade, "--json")
    assert result.code == 0
    sample = result.json()
    assert sample["advantage"] == [-1.0, -2.0]
    assert sample["iw_opd gamma=1"] == pytest.approx([2.0, 1 + 2 / 3])
    assert len(sample["tokens"]) == 2
    assert "-2.000" in result.err


def test_shade_that_is_not_stored_is_rejected(run):
    plant(run, 0, [np.array([-1.0, -2.0])])
    result = invoke("run", "show", run.path, "planted/00000/0", "--shade", "entropy")
    assert (result.code, result.kind) == (4, "settings_mismatch")
    assert "rollout.entropy = true" in " ".join(result.err.split())


def test_weights_with_parameters_are_shown(run):
    plant(run, 0, [np.array([-1.0, -2.0])])
    result = invoke("run", "show", run.path, "planted/00000/0", "--weights", "iw_opd:gamma=3,uniform", "--json")
    assert result.json()["iw_opd gamma=3"] == pytest.approx([4.0, 3.0])  # a third of |A| is before the second token
    assert result.json()["uniform"] == [1.0, 1.0]


@pytest.mark.parametrize("name", ["planted/00000/7", "planted/00003/0", "nonsense", "a/b/c"])
def test_unknown_response_is_rejected_with_an_example(run, name):
    plant(run, 0, [np.array([-1.0])])
    result = invoke("run", "show", run.path, name)
    assert (result.code, result.kind) == (2, "unknown_name")
    assert name in result.err
    assert "such as planted/00000/0" in result.err

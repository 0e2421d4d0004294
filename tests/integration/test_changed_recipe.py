"""A run whose recipe.toml was edited between two steps: each step is reported with the settings of its own update."""

import numpy as np
import pytest
from helpers.commands import invoke
from helpers.planted import plant, planted_run
from matplotlib.figure import Figure

from opdctl.analysis import analyze, captions, figures, verdict
from opdctl.artifacts.files import write_json
from opdctl.recipe.dependencies import fingerprint_settings
from opdctl.runs.run import Run

SIGNAL = [np.array([-2.0, -1.0, -1.0, -1.0])] * 12


@pytest.fixture
def changed(tmp_path) -> Run:
    """Steps 0 and 1 were trained with iw_opd of gamma 1, steps 2 and 3 with uniform weights."""
    run = planted_run(tmp_path / "run")
    for step in range(4):
        plant(run, step, SIGNAL)
    settings = fingerprint_settings(run.recipe, "update")
    uniform = {key: value for key, value in settings.items() if not key.startswith("weight.")} | {
        "weight.name": "uniform"
    }
    for step in range(3):
        write_json(run.update_path(step), {**run.update(step), "settings": settings if step < 2 else uniform})
    text = (run.path / "recipe.toml").read_text()
    before, _, after = text.partition("[weight]\n")
    rest = after.partition("\n[")[2]
    (run.path / "recipe.toml").write_text(f'{before}[weight]\nname = "uniform"\n\n[{rest}')
    return Run.load(run.path)


def test_each_phase_has_the_weight_that_it_was_trained_with(changed):
    summary = analyze.analyze_run(changed, "linear_decay").summary()
    assert [each["name"] for each in summary["training"]] == ["steps 0–1", "steps 2–3"]
    assert [each["weight"] for each in summary["training"]] == ["iw_opd gamma=1", "uniform"]
    first, last = summary["phases"]
    assert (first["phase"], last["phase"]) == ("steps 0–1", "steps 2–3")
    # w = 2 - F, F the fraction of |A| before the token: 0, 2, 3 and 4 fifths
    assert first["weight"] == pytest.approx((2 + 1.6 + 1.4 + 1.2) / 4)
    assert last["weight"] == 1.0
    by_phase = {(row["phase"], row["weight"]): row["mean"] for row in summary["weights"]}
    assert by_phase["steps 0–3", "as trained"] == pytest.approx((first["weight"] + 1) / 2)
    assert by_phase["steps 2–3", "iw_opd gamma=1"] == pytest.approx(first["weight"])


def test_sentences_name_the_phases(changed):
    analysis = analyze.analyze_run(changed)
    text = verdict.overview(analysis)
    assert "steps 0–1: objective policy_gradient, token weight iw_opd gamma=1" in text
    assert "steps 2–3: objective policy_gradient, token weight uniform" in text
    assert "steps 2–3" in captions.figure_captions(analysis)["position"]
    command = invoke("analyze-position", changed.path)
    assert command.code == 0
    assert "as trained" in command.out


def test_a_weight_of_the_command_is_shown_beside_the_own_one(changed):
    result = invoke("analyze-position", changed.path, "--set", "weight.name=suffix_only", "--json")
    assert result.code == 0, result.err
    summary = result.json()["summary"]
    weights = [row["weight"] for row in summary["weights"] if row["phase"] == "steps 0–3"]
    assert weights[:2] == ["as trained", "what if: suffix_only"]
    assert [each["weight"] for each in summary["training"]] == ["iw_opd gamma=1", "uniform"]
    assert summary["phases"][1]["weight"] == 1.0


def test_figures_by_step_mark_the_change(changed):
    panels = [*figures.step_panels(analyze.analyze_run(changed)), *figures.heatmap_panels(analyze.analyze_run(changed))]
    for panel in panels:
        axis = Figure().subplots()
        panel.draw(axis)
        marks = [line for line in axis.get_lines() if line.get_label() == "the recipe changed"]
        assert [list(line.get_xdata()) for line in marks] == [[1.5, 1.5]]

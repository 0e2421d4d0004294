"""docs/study.md and the code that generates it."""

import re
from pathlib import Path

import numpy as np
import pytest
from arms import FULL, UNIFORM, Student
from helpers.commands import ROOT
from page import assess_claim, format_page, format_rank_correlation, write
from results import Interval, Results, select_learning_rates
from store import MeasurementStore
from students import degradations, degraded_student


def random_results(seed: int, noise: float = 1.0) -> Results:
    """Return results with the keys of the complete study and random values. With little noise, arms differ clearly."""
    rng = np.random.default_rng(seed)
    gains = {arm.name: rng.uniform(0.1, 1) for arm in FULL.arms}
    degraded = [Student(each.name, each.task, each.name, each.teacher) for each in degradations()]
    learning_rates = {arm.name: float(rng.choice(FULL.learning_rates)) for arm in FULL.arms}
    learning_rates |= {UNIFORM.name: max(FULL.learning_rates), FULL.arms[-1].name: min(FULL.learning_rates)}
    rows = {}
    for training in [*FULL.selection(), *FULL.comparison(learning_rates), *FULL.conditions(degraded)]:
        measures = dict(zip(("final", "length", "onset", "prefix_signal"), rng.random(4), strict=True))
        accuracy = np.linspace(0, gains[training.arm.name], FULL.steps) + noise * rng.random(FULL.steps)
        rows[training.key] = {"accuracy": accuracy.tolist(), "seconds": 1.0, **measures}
    for student in FULL.students:
        rows[f"prefixes/{student.name}"] = random_prefixes(rng) | {"seconds": 1.0}
        rows[f"noise/{student.name}"] = {when: random_floor(rng) for when in ("before", "after")} | {"seconds": 1.0}
    return Results(rows, FULL, learning_rates, degraded)


def random_prefixes(rng: np.random.Generator) -> dict[str, object]:
    accuracy = [
        {"model": model, "percent": percent, "accuracy": rng.random(), "low": 0.0, "high": 1.0, "problems": 9}
        for model in ("teacher", "student")
        for percent in range(0, 100, 10)
    ]
    by_prefix = [row | {"prefix": kind} for row in accuracy for kind in ("right so far", "gone wrong")]
    return {"accuracy": accuracy, "by_prefix": by_prefix}


def random_floor(rng: np.random.Generator) -> dict[str, object]:
    scorers = [f"{name}, {dtype}" for name in ("itself", "teacher") for dtype in ("float32", "bfloat16")]
    medians = [f"{name}_{kind}" for name in ("abs_sum", "mean_weight") for kind in ("correct", "incorrect")]
    return {
        "mean_abs_advantage": {name: rng.random() for name in scorers},
        "weight_rms_change": rng.random(),
        **{name: rng.random() for name in medians},
    }


@pytest.fixture(scope="module")
def pages() -> list[str]:
    return [format_page(random_results(seed, noise), 60 * seed) for seed, noise in ((1, 1.0), (2, 0.01))]


def test_page_follows_from_the_stored_measurements() -> None:
    rows = MeasurementStore(ROOT / "tests/study/measured.jsonl").rows
    degraded = [degraded_student(each, Path()) for each in degradations()]
    results = Results(rows, FULL, select_learning_rates(rows, FULL), degraded)
    assert format_page(results, results.total_seconds() / 2) == (ROOT / "docs/study.md").read_text(encoding="utf-8")


def test_every_table_has_one_cell_per_column(pages: list[str]) -> None:
    for table in re.findall(r"(?:^\|.*\n)+", pages[0], flags=re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table


def test_page_links_to_its_figures(tmp_path) -> None:
    write(tmp_path, random_results(0), 3600)
    images = {path.name for path in (tmp_path / "images").iterdir()}
    assert images == {f"study-{name}.png" for name in ("accuracy", "differences", "prefixes", "conditions")}
    assert all(f"images/{name}" in (tmp_path / "study.md").read_text() for name in images)


@pytest.mark.parametrize(
    ("mean", "assessment"), [(-0.001, "supported here"), (-0.019, "open"), (-0.1, "contradicted here")]
)
def test_equality_within_a_margin_can_be_supported(mean: float, assessment: str) -> None:
    difference = Interval(mean, 0.003, 12)
    assert assess_claim(difference, difference.p_value(-0.02), 1, -0.02) == assessment


def test_conditions_of_one_student_are_one_observation() -> None:
    conditions = random_results(0).conditions()
    assert "8 students" in format_rank_correlation(conditions, "onset")

"""The accuracy of the toy models, measured by `opdctl eval`."""

import pytest
from helpers.commands import QUICKSTART, invoke, sets


@pytest.mark.parametrize(
    ("benchmark", "model", "low", "high"),
    [
        ("sort12", "toy:teacher", 0.95, 1.0),
        ("sort12", "toy:student", 0.10, 0.40),
        ("sort12", "toy:student-spread", 0.10, 0.40),
        ("perm", "toy:perm-teacher", 0.90, 1.0),
        ("perm", "toy:perm-student", 0.10, 0.40),
    ],
)
def test_sampled_accuracy_is_in_range(benchmark, model, low, high, tmp_path):
    overrides = sets(f"student.model={model}", "eval.limit=256", "eval.batch_size=256", f'eval.bench=["{benchmark}"]')
    result = invoke("eval", "--recipe", QUICKSTART, *overrides, "--output", tmp_path / "run", "--json")
    assert result.code == 0, result.err
    assert low <= result.json()["avg"] <= high

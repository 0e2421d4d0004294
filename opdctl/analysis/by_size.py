"""Final accuracy and relative gain of compared runs by the sizes of student and teacher.

This is Figure 2b of arXiv 2606.22600.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from opdctl import console
from opdctl.evaluation.compared_runs import ComparedRun
from opdctl.evaluation.result_table import ResultCell, ResultRow, ResultTable
from opdctl.evaluation.settings import Setting
from opdctl.models.shapes import count_parameters
from opdctl.runs.run import Run, read_run_record


def by_size_rows(table: ResultTable) -> list[dict[str, Any]]:
    """Return a row for each setting; none if all runs have the same models, or a student's size is unknown.

    compression: the teacher's parameters divided by the student's. accuracy: that of the table's last column. gain: its
    difference to the baseline of the same models, divided by the baseline's accuracy, as its interval is. None: there
    is no such number.
    """
    settings = {row.setting: row for row in table.rows if row.setting}
    if len({setting.pair for setting in settings}) < 2:
        return []
    overall, rows = table.columns[-1].name, []
    for setting, row in settings.items():
        baseline = settings.get(Setting(setting.pair, table.baseline))
        of_baseline = baseline.cells[overall] if baseline else None
        rows.append(_describe_models(row) | _describe_accuracy(row.cells[overall], of_baseline))
    sizes = {row[size_axis(rows)] for row in rows}
    if None in sizes:
        console.warn(
            "no figure by size: the number of parameters of a student, or of the teacher of students of one size, is "
            "unknown; [student.shape] and [teacher.shape] state it"
        )
    return rows if len(sizes) > 1 and None not in sizes else []


def size_axis(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the column of sizes that differ: the student's parameters, or the compression if they are equal."""
    return "student_parameters" if len({row["student_parameters"] for row in rows}) > 1 else "compression"


def _describe_models(row: ResultRow) -> dict[str, Any]:
    assert row.setting is not None
    run = row.models[0].run
    teachers = run.recipe.teacher_models()
    student = find_parameters(run, "student")
    teacher = find_parameters(run, *teachers) if len(teachers) == 1 else None  # several may have several sizes
    return {
        "setting": row.setting.method or "student",
        "student": run.recipe.student.model,
        "teacher": ", ".join(model.model for model in teachers.values()),
        "student_parameters": student,
        "teacher_parameters": teacher,
        "compression": teacher / student if student and teacher else None,
        "seeds": len(row.models),
    }


def _describe_accuracy(cell: ResultCell, baseline: ResultCell | None) -> dict[str, Any]:
    accuracy = {"accuracy": cell.mean.value, "accuracy_low": cell.mean.low, "accuracy_high": cell.mean.high}
    if cell.difference is None or baseline is None or not baseline.mean.value:
        return accuracy | dict.fromkeys(("gain", "gain_low", "gain_high"))
    bounds = {"gain": cell.difference.value, "gain_low": cell.difference.low, "gain_high": cell.difference.high}
    return accuracy | {name: value / baseline.mean.value for name, value in bounds.items()}


def find_parameters(run: ComparedRun, name: str) -> int | None:
    """Return the number of parameters of a model of a run, or None if it is unknown.

    It is the recorded one. Older runs have none: then it is that of the model directory, or of the shape in the recipe.
    """
    if (run.path / "run.json").exists():
        if recorded := read_run_record(run.path)["models"][name].get("parameters"):
            return recorded
        model = Run.load(run.path).models[name]
        if model.path.is_dir() and model.weights.files:
            return model.weights.num_parameters
    shape = run.recipe.models()[name].shape
    return count_parameters(shape) if shape else None

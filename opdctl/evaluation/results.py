"""Finished evaluations, read back: their tables, the failures in them, two of them compared problem by problem."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opdctl.artifacts import files
from opdctl.artifacts.records import GradedResponse
from opdctl.artifacts.stage_dir import recorded_stage
from opdctl.errors import ExitCode, OpdctlError
from opdctl.evaluation import stats

PROTOCOL_KEYS = (
    "samples",
    "temperature",
    "top_p",
    "max_tokens",
    "suffix",
    "template_arguments",
    "grader",
    "engine",
    "dtype",
)


@dataclass(frozen=True)
class Evaluation:
    """One finished evaluation: its folder and what its summary says."""

    path: Path
    summary: Mapping[str, Any]

    def rows(self) -> list[GradedResponse]:
        """Return the graded responses. Raises OpdctlError if a part is corrupt."""
        stage = recorded_stage(self.path, "opdctl eval")
        return stage.read_all(GradedResponse) if stage else []

    def shares(self) -> dict[str, float]:
        """Return the share of right samples of each problem, by id."""
        correct: dict[str, list[bool]] = defaultdict(list)
        for row in self.rows():
            correct[row.problem_id].append(row.correct)
        return {name: float(np.mean(samples)) for name, samples in correct.items()}

    def same_problems_as(self, other: "Evaluation") -> bool:
        """Whether both were asked the same problems."""
        digests = [each.summary["benchmark"]["digest"] for each in (self, other)]
        return digests[0] == digests[1]


def load_evaluation(path: Path) -> Evaluation:
    """Open an evaluation's folder. Raises OpdctlError when it holds no finished one."""
    if not (path / "summary.json").exists():
        raise OpdctlError(
            f"{path}: no finished evaluation: it has no summary.json",
            hint="give a run directory, or a folder such as runs/NAME/eval/BENCH/step-00064",
        )
    return Evaluation(path, files.read_json(path / "summary.json"))


def latest_by_benchmark(path: Path) -> dict[str, Evaluation]:
    """Return the evaluations that `path` stands for, by benchmark: its own, or of a run directory the newest student's.

    Raises OpdctlError when there is none.
    """
    if (path / "summary.json").exists() or not (path / "eval").is_dir():
        found = load_evaluation(path)
        return {found.summary["bench"]: found}
    newest = {
        folder.name: max(steps)
        for folder in sorted((path / "eval").iterdir())
        if (steps := [step.parent for step in folder.glob("step-*/summary.json")])
    }
    if not newest:
        raise OpdctlError(f"{path}: no student of this run was evaluated", hint=f"run `opdctl eval --run {path}`")
    return {bench: load_evaluation(step) for bench, step in newest.items()}


def compare_evaluations(one: Path, other: Path, benches: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Compare two evaluations, or two runs' newest ones, on every benchmark that both have: `other` minus `one`.

    Raises OpdctlError: 2 where they share no benchmark, 4 where one benchmark's problems are not the same.
    """
    left, right = latest_by_benchmark(one), latest_by_benchmark(other)
    shared = [bench for bench in left if bench in right and (benches is None or bench in benches)]
    if not shared or {*(benches or ())} - {*shared}:
        raise OpdctlError(
            f"--compare: {one} was evaluated on {', '.join(left)}, {other} on {', '.join(right)}",
            hint="evaluate both on the same benchmarks",
        )
    return [_compared(left[bench], right[bench]) for bench in shared]


def check_same_problems(a: Evaluation, b: Evaluation) -> None:
    """Raise OpdctlError (code 4) unless both were asked the same problems."""
    if not a.same_problems_as(b):
        raise OpdctlError(
            f"--compare: {a.path} and {b.path} were asked other problems",
            hint="evaluate one of them again: same --data, same eval.limit",
            code=ExitCode.RECIPE_MISMATCH,
        )


def _compared(a: Evaluation, b: Evaluation) -> dict[str, Any]:
    check_same_problems(a, b)
    one, other = a.shares(), b.shares()
    found = stats.compare([one[name] for name in one], [other[name] for name in one])
    protocols = a.summary["protocol"], b.summary["protocol"]
    return {
        "bench": a.summary["bench"],
        "a": {"path": str(a.path), "avg": a.summary["avg"], "ci": a.summary["ci"]},
        "b": {"path": str(b.path), "avg": b.summary["avg"], "ci": b.summary["ci"]},
        "problems": len(one),
        "better": sum(other[name] > one[name] for name in one),
        "worse": sum(other[name] < one[name] for name in one),
        "difference": found.difference,
        "ci": list(found.ci),
        "p_value": found.p_value,
        "other_protocol": [key for key in PROTOCOL_KEYS if protocols[0][key] != protocols[1][key]],
    }


def failures(evaluation: Evaluation, count: int) -> list[GradedResponse]:
    """Return wrong responses, the first one of every problem before any second one."""
    seen: dict[str, int] = defaultdict(int)
    ranked = []
    for order, row in enumerate(evaluation.rows()):
        if not row.correct:
            ranked.append((seen[row.problem_id], order, row))
            seen[row.problem_id] += 1
    return [row for _, _, row in sorted(ranked, key=lambda each: each[:2])[:count]]

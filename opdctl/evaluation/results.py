"""Finished evaluations, read from disk: their responses, the incorrect ones, and the comparison of two by problem."""

import shlex
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from opdctl import console
from opdctl.artifacts import files
from opdctl.artifacts.records import EvalPrompt, GradedResponse, sample_seed
from opdctl.artifacts.stage_dir import recorded_stage
from opdctl.errors import OpdctlError
from opdctl.evaluation import statistics
from opdctl.evaluation.statistics import Estimate
from opdctl.runs.layout import PROMPTS, list_steps

PROTOCOL_KEYS = (
    "samples",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "max_tokens",
    "eos_token_ids",
    "stop",
    "stop_token_ids",
    "max_thinking_tokens",
    "end_thinking",
    "few_shot",
    "few_shot_file",
    "suffix",
    "template_arguments",
    "system",
    "chat_template",
    "source",
    "split",
    "release_version",
    "start_date",
    "end_date",
    "grader",
    "grader_version",
    "min_time_limit_seconds",
    "gt_time_limit_factor",
    "time_limit_seconds",
    "engine",
    "dtype",
)
"""Keys of the protocol that must be equal for two accuracies to be comparable. A protocol lacks settings that have no
effect, and what belongs to other graders or benchmarks; that of an older summary has no grader_version."""


@dataclass(frozen=True)
class Evaluation:
    """One finished evaluation: its directory and its summary."""

    path: Path
    summary: Mapping[str, Any]

    @property
    def accuracy(self) -> Estimate:
        """The mean accuracy, with the interval over problems."""
        return Estimate(float(self.summary["avg"]), *map(float, self.summary["ci"]))

    def rows(self) -> list[GradedResponse]:
        """Return the graded responses.

        Raises:
            OpdctlError: a part is missing or corrupt.
        """
        stage = recorded_stage(self.path, "opdctl eval")
        if stage is None:
            hint = f"remove {shlex.quote(str(self.path))} and run `opdctl eval`"
            raise files.corrupt_artifact(self.path, "has a summary.json but no responses", hint)
        return stage.read_all(GradedResponse)

    @cached_property
    def accuracies(self) -> Mapping[str, float]:
        """The fraction of correct samples of each problem, by id. A table compares the baseline with every setting."""
        correct: dict[str, list[bool]] = defaultdict(list)
        for row in self.rows():
            correct[row.problem_id].append(row.correct)
        return {name: float(np.mean(samples)) for name, samples in correct.items()}

    def samples(self) -> Iterator[dict[str, Any]]:
        """Yield each problem with its prompt, its gold answer and its responses, as JSON values.

        The prompt is None in evaluations of earlier versions.

        Raises:
            OpdctlError: a part is missing or corrupt.
        """
        stage = recorded_stage(self.path / PROMPTS, "opdctl eval")
        prompts = {row.problem_id: row.text for row in stage.read_all(EvalPrompt)} if stage else {}
        for name, group in groupby(self.rows(), key=lambda row: row.problem_id):
            rows = list(group)
            yield {
                **{key: self.summary[key] for key in ("bench", "model")},
                "id": name,
                "prompt": prompts.get(name),
                "gold": rows[0].gold,
                "accuracy": float(np.mean([row.correct for row in rows])),
                "responses": [_describe_response(row, self.summary["protocol"]["seed"]) for row in rows],
            }

    def has_same_problems(self, other: "Evaluation") -> bool:
        """Whether both evaluations are on the same problems, with the same gold answers."""
        return bool(self.summary["benchmark"]["digest"] == other.summary["benchmark"]["digest"])

    def has_same_protocol(self, other: "Evaluation") -> bool:
        """Whether the accuracies are comparable: the problems and the complete protocol are the same."""
        return self.has_same_problems(other) and bool(self.summary["protocol"] == other.summary["protocol"])

    def protocol_differences(self, other: "Evaluation") -> list[str]:
        """Return the protocol keys whose values differ."""
        protocols = self.summary["protocol"], other.summary["protocol"]
        return [key for key in PROTOCOL_KEYS if protocols[0].get(key) != protocols[1].get(key)]


def _describe_response(row: GradedResponse, seed: int) -> dict[str, Any]:
    return {
        "sample_id": row.sample_id,
        "seed": sample_seed(seed, row.sample_id),
        "text": row.text,
        "extracted": row.extracted,
        "correct": row.correct,
        "verdict": row.verdict,
        "math_verify": row.math_verify,
        "num_tokens": len(row.response_ids),
        "finish_reason": row.finish_reason,
    }


def load_evaluation(path: Path) -> Evaluation:
    """Load the evaluation in the directory `path`.

    Raises:
        OpdctlError: there is no finished evaluation.
    """
    if not (path / "summary.json").exists():
        raise OpdctlError(
            "missing_evaluation",
            f"{path} has no summary.json",
            hint="give a run, or a finished evaluation such as runs/NAME/eval/BENCH/step-00064",
        )
    return Evaluation(path, files.read_json(path / "summary.json"))


def load_student_evaluations(path: Path) -> dict[str, dict[int, Evaluation]]:
    """Return the evaluations of the students of the run in `path`, by benchmark and step.

    Those of a benchmark have the protocol of the newest one; a warning names the others.
    """
    by_bench = {}
    for bench in sorted({summary.parent.parent.name for summary in path.glob("eval/*/step-*/summary.json")}):
        directories = list_steps(path / "eval" / bench)
        evaluations = {
            step: load_evaluation(directory)
            for step, directory in directories.items()
            if (directory / "summary.json").exists()
        }
        if not evaluations:
            continue
        newest = evaluations[max(evaluations)]
        by_bench[bench] = {step: each for step, each in evaluations.items() if each.has_same_protocol(newest)}
        if skipped := sorted(evaluations.keys() - by_bench[bench].keys()):
            steps = ", ".join(map(str, skipped))
            console.warn(f"{path}: {bench}: skipped, since their protocol is not that of the newest: steps {steps}")
    return by_bench


def latest_by_benchmark(path: Path) -> dict[str, Evaluation]:
    """Return evaluations by benchmark: the one in `path`, or those of the newest evaluated student of the run `path`.

    Raises:
        OpdctlError: there is no finished evaluation.
    """
    is_run = (path / "run.json").exists() or (path / "eval").is_dir()
    if (path / "summary.json").exists() or not is_run:
        evaluation = load_evaluation(path)
        return {evaluation.summary["bench"]: evaluation}
    latest = {}
    for directory in sorted(path.glob("eval/*")):
        finished = [step for step in list_steps(directory).values() if (step / "summary.json").exists()]
        if finished:
            latest[directory.name] = load_evaluation(finished[-1])
    if not latest:
        detail = f"{path}: no student of this run is evaluated"
        raise OpdctlError("missing_evaluation", detail, hint=f"run `opdctl eval {shlex.quote(str(path))}`")
    return latest


def compare_evaluations(one: Path, other: Path, benches: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Compare `other` with `one` on every benchmark that both have. Of a run, the newest evaluated student counts.

    Raises:
        OpdctlError: there is no shared benchmark, one of `benches` is not shared, or the problems differ.
    """
    latest, latest_other = latest_by_benchmark(one), latest_by_benchmark(other)
    shared = [bench for bench in latest if bench in latest_other and (benches is None or bench in benches)]
    if not shared or {*(benches or ())} - {*shared}:
        raise OpdctlError(
            "missing_evaluation",
            f"{one} is evaluated on {', '.join(latest)}; {other} on {', '.join(latest_other)}",
            hint="evaluate both on the same benchmarks",
        )
    return [_compare_pair(latest[bench], latest_other[bench]) for bench in shared]


def check_same_problems(a: Evaluation, b: Evaluation) -> None:
    """Check that both evaluations are on the same problems.

    Raises:
        OpdctlError: the problems differ.
    """
    if not a.has_same_problems(b):
        raise OpdctlError(
            "different_problems",
            f"{a.path} and {b.path}",
            hint="evaluate one of them again with the same --data and eval.limit",
        )


def _compare_pair(a: Evaluation, b: Evaluation) -> dict[str, Any]:
    check_same_problems(a, b)
    accuracies_a, accuracies_b = a.accuracies, b.accuracies
    pairs = [(accuracies_a[name], accuracies_b[name]) for name in accuracies_a]
    comparison = statistics.compare_paired([in_a for in_a, _ in pairs], [in_b for _, in_b in pairs])
    return {
        "bench": a.summary["bench"],
        "a": {"path": str(a.path), "avg": a.summary["avg"], "ci": a.summary["ci"]},
        "b": {"path": str(b.path), "avg": b.summary["avg"], "ci": b.summary["ci"]},
        "problems": len(pairs),
        "better": sum(in_b > in_a for in_a, in_b in pairs),
        "worse": sum(in_b < in_a for in_a, in_b in pairs),
        "difference": comparison.difference,
        "ci": list(comparison.ci),
        "p_value": comparison.p_value,
        "protocol_differences": a.protocol_differences(b),
    }


def incorrect_responses(rows: Sequence[GradedResponse], limit: int) -> list[GradedResponse]:
    """Return up to `limit` incorrect responses: the first of each problem before the second of any."""
    return _first_of_problems([row for row in rows if not row.correct], limit)


def differing_responses(rows: Sequence[GradedResponse], limit: int) -> list[GradedResponse]:
    """Return up to `limit` responses on which the grader differs from math-verify, in the same order."""
    return _first_of_problems([row for row in rows if row.math_verify not in (None, row.correct)], limit)


def _first_of_problems(rows: Sequence[GradedResponse], limit: int) -> list[GradedResponse]:
    counts: dict[str, int] = defaultdict(int)
    ranked = []
    for order, row in enumerate(rows):
        ranked.append((counts[row.problem_id], order, row))
        counts[row.problem_id] += 1
    return [row for _, _, row in sorted(ranked, key=lambda entry: entry[:2])[:limit]]

"""eval: a model answers a benchmark's problems, several times each, and the answers are graded."""

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from opdctl import SCHEMA_VERSION, log, store
from opdctl.benchmarks import Benchmark
from opdctl.config import Eval, Model, settings_of
from opdctl.engines import Completion, EnginePool, Request
from opdctl.grading import Grade
from opdctl.model import ModelDir, locate
from opdctl.prompts import Problem, template
from opdctl.records import Graded, sample_seed
from opdctl.registry import BENCHMARKS
from opdctl.run import Run
from opdctl.stats import average
from opdctl.store import Fingerprint, StageDir, digest_of, read_rows, write_rows


@dataclass(frozen=True)
class Subject:
    """The model that is evaluated: the name of its folder, its files, their digest, the engine role that it takes, and
    the options of `opdctl eval` that choose it."""

    name: str
    model: ModelDir
    digest: str
    role: str
    options: str


def student(run: Run, step: int) -> Subject:
    return Subject(f"step-{step:05d}", run.student_at(step), run.policy_digest(step), "student", f"--step {step}")


def scorer(run: Run, name: str) -> Subject:
    """A model of the run that scores responses: a teacher, or the reference."""
    return Subject(name, run.models[name], run.digests[name], name, f"--model {name}")


def other(path: Path, like: ModelDir) -> Subject:
    """A model directory that is no part of the run."""
    model = ModelDir(path, like.dtype, like.trust_remote_code)
    digest = model.digest()
    return Subject(f"model-{path.name}-{digest[:8]}", model, digest, "model", f"--model {path}")


def subject(run: Run, model: str | None, step: int) -> Subject:
    """Return what to evaluate: the student of `step`, a teacher of the run by name, or a model directory."""
    if model is None:
        return student(run, step)
    if model in run.scorers():
        return scorer(run, model)
    path = locate(Model(model=model), "--model")
    return other(path, run.student)


def is_evaluated(run: Run, bench: str, subject: str) -> bool:
    """Whether there is a finished evaluation, under whatever protocol."""
    return (run.evaluation_path(bench, subject) / "summary.json").exists()


def stored_summary(run: Run, bench: str, subject: str) -> dict[str, Any] | None:
    """Return the summary of a finished evaluation under the recipe's own protocol, or None."""
    path = run.evaluation_path(bench, subject) / "summary.json"
    summary = store.read_json(path) if path.exists() else None
    return summary if summary and summary["protocol"] == _protocol(run.recipe.eval) else None


def _protocol(settings: Eval) -> dict[str, Any]:
    return settings.model_dump(exclude={"bench", "every", "parts", "batch_size"})


def run(
    run: Run, bench: str, subject: Subject, engines: EnginePool, data: Path | None = None, *, repair: bool = False
) -> tuple[dict[str, Any], int]:
    """Answer and grade what is missing of a benchmark, with `repair` what is damaged too.

    Returns its summary and how many parts were made.

    Raises OpdctlError: 3 for bad benchmark data, 4 when it was begun with other settings, 5 when data are out of reach.
    """
    benchmark: Benchmark = BENCHMARKS.get(bench)()
    settings = run.recipe.eval
    problems = benchmark.problems(settings.problems, data)
    folder = run.evaluation_path(bench, subject.name)
    stage = StageDir(
        folder,
        stage="eval",
        parts=min(settings.parts, len(problems)),
        suffix=".parquet",
        fingerprint=Fingerprint(
            settings_of(run.recipe, "eval"),
            {"model": subject.digest, "problems": digest_of([(p.id, p.text, p.answer) for p in problems])},
        ),
        redo=f"{run.command('eval')} --bench {bench} {subject.options}",
    )
    with stage.work(repair=repair) as todo:
        if todo:
            _answer(run, benchmark, problems, subject, engines, stage, todo)
    summary = _summarise(
        bench,
        subject.name,
        settings,
        [row for index in range(len(stage.names)) for row in read_rows(stage.verify(index), Graded)],
    )
    if stored_summary(run, bench, subject.name) != summary:
        store.write_json(folder / "summary.json", summary)
    return summary, len(todo)


def _answer(
    run: Run,
    benchmark: Benchmark,
    problems: list[Problem],
    subject: Subject,
    engines: EnginePool,
    stage: StageDir,
    todo: list[int],
) -> None:
    settings = run.recipe.eval
    engine = engines.get(subject.role, run.recipe.rollout.engine, subject.model)
    stage.begin(engine.meaning | {"temperature": settings.temperature, "top_p": settings.top_p})
    parts = {index: stage.share(problems, index) for index in todo}
    total = settings.samples * sum(map(len, parts.values()))
    with log.progress(f"eval {benchmark.name}, {subject.name}", total) as advance:
        for index, part in parts.items():
            draws = [
                (problem, f"{benchmark.name}/{problem.id}/{n}") for problem in part for n in range(settings.samples)
            ]
            requests = [
                Request(_prompt_ids(run, benchmark, subject.model, p), sample_seed(run.recipe.seed, name))
                for p, name in draws
            ]
            completions = engine.generate(requests, settings, settings.batch_size, advance)
            rows = _grade(benchmark, subject.model, draws, completions)
            tokens = sum(len(row.response_ids) for row in rows)
            stage.write(index, partial(write_rows, rows=rows, kind=Graded), rows=len(rows), tokens=tokens)


def _prompt_ids(run: Run, benchmark: Benchmark, model: ModelDir, problem: Problem) -> np.ndarray:
    asked = replace(problem, text=problem.text + (run.recipe.eval.suffix if benchmark.boxed else ""))
    ids = template(asked, model.tokenizer, run.recipe.prompts.template_arguments)
    return np.asarray(ids, np.int32)


def _grade(
    benchmark: Benchmark, model: ModelDir, draws: list[tuple[Problem, str]], completions: list[Completion]
) -> list[Graded]:
    texts = model.tokenizer.batch_decode([c.response_ids for c in completions], skip_special_tokens=True)
    grades = benchmark.grade([(problem.answer or "", text) for (problem, _), text in zip(draws, texts, strict=True)])
    return [
        _row(name, problem, completion, text, grade)
        for (problem, name), completion, text, grade in zip(draws, completions, texts, grades, strict=True)
    ]


def _row(name: str, problem: Problem, completion: Completion, text: str, grade: Grade) -> Graded:
    return Graded(
        sample_id=name,
        problem_id=problem.id,
        response_ids=completion.response_ids,
        text=text,
        finish_reason=completion.finish_reason,
        gold=problem.answer or "",
        extracted=grade.extracted,
        correct=grade.correct,
        verdict=grade.verdict,
    )


def _summarise(bench: str, subject: str, settings: Eval, rows: list[Graded]) -> dict[str, Any]:
    by_problem: dict[str, list[bool]] = defaultdict(list)
    verdicts: dict[str, int] = defaultdict(int)
    for row in rows:
        by_problem[row.problem_id].append(row.correct)
        verdicts[row.verdict] += 1
    estimate = average(list(by_problem.values()))
    return {
        "schema_version": SCHEMA_VERSION,
        "bench": bench,
        "model": subject,
        "problems": len(by_problem),
        "samples": settings.samples,
        "avg": estimate.mean,
        "ci": [estimate.low, estimate.high],
        "truncated_share": sum(row.finish_reason == "length" for row in rows) / len(rows),
        "response_length": sum(len(row.response_ids) for row in rows) / len(rows),
        "verdicts": dict(sorted(verdicts.items())),
        "protocol": _protocol(settings),
    }

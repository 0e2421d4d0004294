"""eval: a model answers a benchmark's problems, several times each, and the answers are graded."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from opdctl import console
from opdctl.artifacts import files
from opdctl.artifacts.files import digest_of
from opdctl.artifacts.records import SCHEMA_VERSION, GradedResponse, sample_seed
from opdctl.artifacts.stage_dir import ALL_PARTS, Fingerprint, StageDir, WorkerShard
from opdctl.artifacts.tables import read_rows, write_rows
from opdctl.data.prompts import Problem, apply_chat_template
from opdctl.engines.base import Completion, Request
from opdctl.engines.pool import EnginePool
from opdctl.errors import OpdctlError
from opdctl.evaluation import contamination, stats
from opdctl.evaluation.benchmarks import Benchmark, find
from opdctl.evaluation.graders import Grade
from opdctl.models.directory import ModelDir
from opdctl.recipe.dependencies import fingerprint_settings
from opdctl.recipe.schema import Eval, Model, Recipe
from opdctl.runs.layout import step_name
from opdctl.runs.open import find_model
from opdctl.runs.run import Run, open_stage_dir

MAX_SHOWN_ANSWER_CHARS = 200  # characters of an answer that killed its grader, in the summary


@dataclass(frozen=True)
class EvalTarget:
    """The model that is evaluated: the name of its folder, its files, their digest, the engine role that it takes, and
    the options of `opdctl eval` that choose it."""

    name: str
    model: ModelDir
    digest: str
    role: str
    options: str


def student_target(run: Run, step: int) -> EvalTarget:
    return EvalTarget(step_name(step), run.student_at(step), run.student_digest(step), "student", f"--step {step}")


def scorer_target(run: Run, name: str) -> EvalTarget:
    """A model of the run that scores responses: a teacher, or the reference."""
    return EvalTarget(name, run.models[name], run.digests[name], name, f"--model {name}")


def external_target(name: str, like: Model) -> EvalTarget:
    """A model that is no part of the run: a directory or a hub id, loaded as `like` says."""
    if like.model != name:  # what was said of another model's revision and code does not hold for this one
        like = like.model_copy(update={"model": name, "revision": None, "trust_remote_code": False})
    model = find_model(like, "--model")
    digest = model.digest()
    label = name if name.startswith("toy:") else Path(name).name
    return EvalTarget(f"{label.replace(':', '-')}-{digest[:8]}", model, digest, "model", f"--model {name}")


def find_target(run: Run, model: str | None, step: int | None) -> EvalTarget:
    """Return what to evaluate: the student of `step`, the newest by default; a teacher of the run; or another model."""
    if model is None:
        return student_target(run, run.current_step() if step is None else step)
    if model in run.scorers():
        return scorer_target(run, model)
    return external_target(model, run.recipe.student)


def is_evaluated(run: Run, bench: str, subject: str) -> bool:
    """Whether there is a finished evaluation, under whatever protocol."""
    return (run.evaluation_path(bench, subject) / "summary.json").exists()


def stored_summary(run: Run, bench: str, subject: str) -> dict[str, Any] | None:
    """Return the summary of a finished evaluation under the recipe's own protocol, or None."""
    path = run.evaluation_path(bench, subject) / "summary.json"
    summary = files.read_json(path) if path.exists() else None
    protocol = _protocol(run.recipe, find(bench, run.recipe.eval)) if summary else None
    return summary if summary and summary["protocol"] == protocol else None


def _protocol(recipe: Recipe, benchmark: Benchmark) -> dict[str, Any]:
    """Return all that decides what is asked and how it is answered and graded."""
    settings = recipe.eval
    return {
        "samples": benchmark.samples_under(settings),
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_tokens": settings.max_tokens,
        "suffix": benchmark.suffix_under(settings),
        "template_arguments": settings.template_arguments,
        "problems": settings.limit,
        "grader": benchmark.grader.name,
        "seed": recipe.seed,
        "engine": recipe.rollout.engine,
        "dtype": recipe.student.dtype,
    }


def run_eval(
    run: Run,
    bench: str,
    subject: EvalTarget,
    engines: EnginePool,
    data: Path | None = None,
    *,
    repair: bool = False,
    shard: WorkerShard = ALL_PARTS,
    wait: bool = False,
) -> tuple[dict[str, Any] | None, int]:
    """Answer and grade what is missing of the shard's parts of a benchmark, with `repair` what is damaged too.

    Returns its summary, None while other workers are at it, which is waited for with `wait`, and how many parts were
    made.

    Raises OpdctlError: 2 when it would run code and may not, 3 for bad benchmark data, 4 when it was begun with other
    settings, 5 when data are out of reach.
    """
    benchmark = find(bench, run.recipe.eval)
    _refuse_code(benchmark, run.recipe.eval)
    problems = benchmark.problems(run.recipe.eval.limit, data)
    stage = _stage(run, benchmark, problems, subject)
    for folder in (stage.path, stage.path.parent):
        files.remove_temporary_files(folder)
    with stage.claim_parts(repair=repair, shard=shard, wait=wait) as parts:
        made = _answer(run, benchmark, problems, subject, engines, stage, parts) if parts else 0
    if not stage.is_finished():
        return None, made
    rows = [row for index in range(len(stage.names)) for row in read_rows(stage.verify(index), GradedResponse)]
    summary = {
        "schema_version": SCHEMA_VERSION,
        "bench": benchmark.name,
        "model": subject.name,
        **summarise(rows),
        "protocol": _protocol(run.recipe, benchmark),
        "benchmark": _about(run, benchmark, problems, data),
    }
    path = stage.path / "summary.json"
    if not path.exists() or files.read_json(path) != summary:
        files.write_json(path, summary)
    return summary, made


def _refuse_code(benchmark: Benchmark, settings: Eval) -> None:
    if benchmark.grader.runs_code and not settings.allow_code_execution:
        raise OpdctlError(
            f"--bench {benchmark.name}: would run code that a model wrote",
            hint="give --allow-code-execution; docs/eval.md says within which limits it runs",
        )


def _stage(run: Run, benchmark: Benchmark, problems: Sequence[Problem], subject: EvalTarget) -> StageDir:
    return open_stage_dir(
        run.evaluation_path(benchmark.name, subject.name),
        stage="eval",
        parts=min(run.recipe.eval.num_parts, len(problems)),
        suffix=".parquet",
        fingerprint=Fingerprint(
            fingerprint_settings(run.recipe, "eval") | {"eval.samples": benchmark.samples_under(run.recipe.eval)},
            {"model": subject.digest, "problems": _digest(problems)},
        ),
        rerun_command=f"{run.command_line('eval')} --bench {benchmark.name} {subject.options}",
    )


def _digest(problems: Sequence[Problem]) -> str:
    return digest_of([(problem.id, problem.text, problem.answer) for problem in problems])


def _about(run: Run, benchmark: Benchmark, problems: Sequence[Problem], data: Path | None) -> dict[str, Any]:
    """Return what there is to know of the benchmark itself: where it came from, golds that no answer can be compared
    with, and what the training prompts hold of it. Kept beside the evaluations, since it takes a while."""
    path = run.evaluation_path(benchmark.name, "benchmark.json")
    key = {"digest": _digest(problems), "prompts": digest_of(run.prompts_digest)}
    if path.exists() and (known := files.read_json(path))["key"] == key:
        return known["about"]
    golds = benchmark.grader.readable([problem.answer or "" for problem in problems])
    about = {
        "source": str(data or benchmark.source.where),
        "digest": key["digest"],
        "unparsable_golds": [problem.id for problem, readable in zip(problems, golds, strict=True) if not readable],
        "contamination": _contamination(run, problems),
    }
    files.write_json(path, {"key": key, "about": about})
    return about


def _contamination(run: Run, problems: Sequence[Problem]) -> dict[str, Any] | None:
    """Return what the run's prompts hold of the problems, or None where there is no training."""
    if run.prompts_digest is None:
        return None
    prompts = run.student.tokenizer.batch_decode([p.prompt_ids for p in run.prompts], skip_special_tokens=True)
    return contamination.report({problem.id: problem.text for problem in problems}, prompts)


def _answer(
    run: Run,
    benchmark: Benchmark,
    problems: list[Problem],
    subject: EvalTarget,
    engines: EnginePool,
    stage: StageDir,
    parts: Iterator[int],
) -> int:
    settings, made = run.recipe.eval, 0
    samples = benchmark.samples_under(settings)
    engine = engines.get(subject.role, run.recipe.rollout.engine, subject.model)
    stage.start(engine.logprob_metadata | {"temperature": settings.temperature, "top_p": settings.top_p})
    with console.progress(f"eval {benchmark.name}, {subject.name}", samples * len(problems)) as advance:
        for index in parts:
            part = stage.items_of_part(problems, index)
            draws = [(problem, f"{benchmark.name}/{problem.id}/{n}") for problem in part for n in range(samples)]
            requests = [
                Request(_prompt_ids(run, benchmark, subject.model, p), sample_seed(run.recipe.seed, name))
                for p, name in draws
            ]
            completions = engine.generate(requests, settings, settings.batch_size, advance)
            rows = _graded(benchmark, subject.model, draws, completions)
            tokens = sum(len(row.response_ids) for row in rows)
            made += stage.write(
                index, partial(write_rows, rows=rows, kind=GradedResponse), rows=len(rows), tokens=tokens
            )
    return made


def _prompt_ids(run: Run, benchmark: Benchmark, model: ModelDir, problem: Problem) -> np.ndarray:
    settings = run.recipe.eval
    text = problem.text + benchmark.suffix_under(settings)
    return np.asarray(apply_chat_template(problem.id, text, model.tokenizer, settings.template_arguments), np.int32)


def _graded(
    benchmark: Benchmark, model: ModelDir, draws: list[tuple[Problem, str]], completions: list[Completion]
) -> list[GradedResponse]:
    """Return the rows of whole problems: the vote of a sample depends on the problem's other samples."""
    texts = model.tokenizer.batch_decode([c.response_ids for c in completions], skip_special_tokens=True)
    golds = [problem.answer or "" for problem, _ in draws]
    grades = benchmark.grader.grade(list(zip(golds, texts, strict=True)))
    by_problem = [
        (group[0][0][0].answer or "", [grade for _, grade in group])
        for _, found in groupby(zip(draws, grades, strict=True), key=lambda pair: pair[0][0].id)
        if (group := list(found))
    ]
    votes = [vote for own in benchmark.grader.votes(by_problem) for vote in own]
    return [
        _row(name, problem, completion, text, grade, vote)
        for (problem, name), completion, text, grade, vote in zip(draws, completions, texts, grades, votes, strict=True)
    ]


def _row(
    name: str, problem: Problem, completion: Completion, text: str, grade: Grade, vote: str | None
) -> GradedResponse:
    return GradedResponse(
        sample_id=name,
        problem_id=problem.id,
        response_ids=completion.response_ids,
        text=text,
        finish_reason=completion.finish_reason,
        gold=problem.answer or "",
        extracted=grade.extracted,
        correct=grade.correct,
        verdict=grade.verdict,
        vote=vote,
    )


def summarise(rows: Sequence[GradedResponse]) -> dict[str, Any]:
    """Return the accuracies with their intervals, the lengths and the verdicts of an evaluation's rows."""
    by_problem: dict[str, list[GradedResponse]] = defaultdict(list)
    for row in rows:
        by_problem[row.problem_id].append(row)
    correct = [[row.correct for row in own] for own in by_problem.values()]
    votes = [[row.vote for row in own] for own in by_problem.values()]
    samples = min(map(len, correct))
    avg, these = stats.problem_bootstrap([float(np.mean(own)) for own in correct]), stats.sampling_interval(correct)
    passed = {k: [stats.pass_at_k(own, k) for own in correct] for k in stats.k_values(samples)}
    majority = {
        k: [stats.maj_at_k(vote, own, k) for vote, own in zip(votes, correct, strict=True)]
        for k in (stats.k_values(samples) if any(vote for own in votes for vote in own) else ())
    }
    lengths = [len(row.response_ids) for row in rows]
    return {
        "problems": len(by_problem),
        "samples": samples,
        "avg": avg.value,
        "ci": [avg.low, avg.high],
        "ci_same_problems": [these.low, these.high] if these else None,
        "pass_at": _estimates(passed),
        "maj_at": _estimates(majority),
        "truncated_fraction": sum(row.finish_reason == "length" for row in rows) / len(rows),
        "response_length": float(np.mean(lengths)),
        "response_lengths": {f"p{q}": float(np.percentile(lengths, q)) for q in (10, 50, 90)} | {"max": max(lengths)},
        "verdicts": dict(sorted(Counter(row.verdict for row in rows).items())),
        "grader_failures": [
            {
                "sample_id": row.sample_id,
                "verdict": row.verdict,
                "extracted": (row.extracted or "")[:MAX_SHOWN_ANSWER_CHARS],
            }
            for row in rows
            if row.verdict in ("timeout", "crash")
        ],
    }


def _estimates(by_k: dict[int, list[float]]) -> dict[str, dict[str, Any]]:
    found = {k: stats.problem_bootstrap(values) for k, values in by_k.items()}
    return {str(k): {"mean": each.value, "ci": [each.low, each.high]} for k, each in found.items()}

"""Continuations: teacher and student continue the student's own prefixes, and the complete answers are graded.

The teacher's accuracy falls with the length of the prefix if the student's errors mislead it (arXiv 2606.22600,
Figure 1b). Reads the prefixes of 0, 10 … 90% of stored responses, writes Parquet parts of graded responses in one
directory for each model, then a summary.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from opdctl.artifacts import files
from opdctl.artifacts.records import Completion, GradedResponse, Ids, Response, sample_seed
from opdctl.artifacts.stage_dir import Fingerprint, StageDir
from opdctl.artifacts.tables import read_rows
from opdctl.artifacts.versions import versioned
from opdctl.engines.base import Request
from opdctl.engines.pool import EnginePool, open_engine_pool
from opdctl.errors import OpdctlError
from opdctl.evaluation import statistics
from opdctl.evaluation.benchmarks import Benchmark, find_benchmark
from opdctl.evaluation.evaluate import graded_response
from opdctl.models.directory import ModelDir
from opdctl.recipe.dependencies import fingerprint_settings
from opdctl.recipe.schema import Recipe
from opdctl.runs.layout import step_name
from opdctl.runs.models import check_positions
from opdctl.runs.run import Run, open_stage_dir
from opdctl.runs.stage_loop import MakePart, Part, make_missing_parts, rows_part

PREFIX_PERCENTS = range(0, 100, 10)
"""Lengths of the prefixes in percent of the response, rounded down to tokens: never with the last token."""


@dataclass(frozen=True)
class Continuation:
    """One continuation to make: of the first `percent` percent of a response, the sample with this number."""

    response: Response
    percent: int
    sample: int

    @property
    def id(self) -> str:
        return f"{self.response.sample_id}/{self.percent}/{self.sample}"

    @property
    def prefix_ids(self) -> Ids:
        return _prefix(self.response, self.percent)


@dataclass(frozen=True)
class ContinuationsResult:
    """The continuations of a step. summary: None while other workers make the remaining parts."""

    path: Path
    summary: dict[str, Any] | None
    parts_made: int


def make_continuations(run: Run, device: str, step: int) -> ContinuationsResult:
    """Open the engines and make the continuations of a step.

    Raises:
        OpdctlError: see `run_continuations`.
    """
    with open_engine_pool(_recipe_for_engines(run.recipe), device) as engines:
        summary, made = run_continuations(run, step, engines)
    return ContinuationsResult(continuations_path(run, step), summary, made)


def run_continuations(run: Run, step: int, engines: EnginePool) -> tuple[dict[str, Any] | None, int]:
    """Make the continuations of a step's prefixes that are missing.

    Returns their summary, None while other workers make parts, and the number of parts made here.

    Raises:
        OpdctlError: the step's rollout is unfinished; its student was pruned; the benchmark runs code; the prompts have
            no answers; the continuations were started with different settings.
    """
    benchmark, responses = _benchmark(run), _responses(run, step)
    stages = {name: _stage(run, step, name, benchmark, responses) for name in _models(run, responses)}
    made = sum(
        _generate_continuations(run, step, name, benchmark, responses, engines, stage) for name, stage in stages.items()
    )
    if not all(stage.is_finished() for stage in stages.values()):
        return None, made
    rows = {name: stage.read_all(GradedResponse) for name, stage in stages.items()}
    summary = {
        **versioned("continuations"),
        "step": step,
        "student": step_name(step),
        "bench": benchmark.name,
        "problems": len({response.prompt_id for response in responses}),
        "responses": len(responses),
        **summarize_continuations(rows, _on_track(run, benchmark, responses)),
    }
    files.write_json_if_changed(continuations_path(run, step) / "summary.json", summary)
    return summary, made


def describe_plan(run: Run, step: int) -> str:
    """Return the number of continuations of a step, in a sentence.

    Raises:
        OpdctlError: see `run_continuations`.
    """
    _benchmark(run)
    responses, samples = _responses(run, step), run.recipe.continuations.samples
    models = _models(run, responses)
    count = sum(len(_continued_by(responses, name)) for name in models) * len(PREFIX_PERCENTS) * samples
    return f"continuations of step {step} by {', '.join(models)}: {count}, of prefixes of {len(responses)} responses"


def continuations_path(run: Run, step: int) -> Path:
    return run.path / "continuations" / step_name(step)


def _recipe_for_engines(recipe: Recipe) -> Recipe:
    """Return the recipe for engines whose prompts include a prefix of a response."""
    max_tokens = recipe.prompts.max_tokens + recipe.rollout.max_tokens
    return recipe.model_copy(update={"prompts": recipe.prompts.model_copy(update={"max_tokens": max_tokens})})


def _benchmark(run: Run) -> Benchmark:
    """Return the recipe's first benchmark, whose grader grades the answers to the prompts."""
    benchmark = find_benchmark(run.recipe.eval.bench[0], run.recipe.eval)
    if benchmark.grader.runs_code:
        raise OpdctlError(
            "unsupported_setting",
            f"eval.bench: {benchmark.name} is graded by running programs, not by the prompts' answers",
            hint="put a benchmark of mathematics or text first in eval.bench",
        )
    return benchmark


def _responses(run: Run, step: int) -> list[Response]:
    """Return the step's first non-empty responses."""
    rollout, count = run.rollout_stage(step), run.recipe.continuations.responses
    if not rollout.is_finished():
        raise OpdctlError("missing_input", f"{rollout.path} is not finished", hint=f"run `{rollout.rerun_command}`")
    responses: list[Response] = []
    for index in range(len(rollout.names)):
        if len(responses) < count:
            responses += [row for row in read_rows(rollout.verify(index), Response) if len(row.response_ids)]
    responses = responses[:count]
    if not responses or any(response.answer is None for response in responses):
        why = "the prompts have no answers to grade by" if responses else "every response is empty"
        raise OpdctlError("invalid_data", f"{rollout.path}: {why}", hint="set prompts.answer_column to their column")
    return responses


def _models(run: Run, responses: Sequence[Response]) -> list[str]:
    teachers = {response.teacher for response in responses}
    return ["student", *(name for name in run.recipe.teacher_models() if name in teachers)]


def _stage(run: Run, step: int, name: str, benchmark: Benchmark, responses: Sequence[Response]) -> StageDir:
    digest = run.student_digest(run.policy_version(step)) if name == "student" else run.digests[name]
    settings = fingerprint_settings(run.recipe, "continuations") | {"grader": benchmark.grader.name}
    return open_stage_dir(
        continuations_path(run, step) / name,
        stage="continuations",
        num_parts=min(run.recipe.rollout.num_parts, len(responses)),
        suffix=".parquet",
        fingerprint=Fingerprint(settings, {"rollout": run.rollout_stage(step).digest, name: digest}),
        rerun_command=run.manage_command_line("continuations", step),
    )


def _model(run: Run, step: int, name: str) -> ModelDir:
    return run.student_at(run.policy_version(step)) if name == "student" else run.models[name]


def _generate_continuations(
    run: Run,
    step: int,
    name: str,
    benchmark: Benchmark,
    responses: list[Response],
    engines: EnginePool,
    stage: StageDir,
) -> int:
    settings, samples = run.recipe.rollout, run.recipe.continuations.samples

    def prepare() -> tuple[Mapping[str, Any], MakePart]:
        model, longest_percent = _model(run, step, name), max(PREFIX_PERCENTS)
        prompt_tokens = max(
            len(run.prompt_ids(name, response)) + len(_prefix(response, longest_percent))
            for response in _continued_by(responses, name)
        )
        check_positions(model, prompt_tokens, settings.max_tokens, "rollout.max_tokens")
        engine = engines.get(name, settings.engine, model)

        def make_part(index: int, on_progress: Callable[[int], None]) -> Part:
            continued = [
                Continuation(response, percent, n)
                for response in _continued_by(stage.items_of_part(responses, index), name)
                for percent in PREFIX_PERCENTS
                for n in range(samples)
            ]
            requests = [
                Request(
                    np.concatenate([run.prompt_ids(name, each.response), each.prefix_ids]),
                    sample_seed(run.recipe.seed, f"{name}/{each.id}"),
                )
                for each in continued
            ]
            completions = engine.generate(requests, settings, settings.batch_size, on_progress)
            return rows_part(_grade(run, benchmark, continued, completions), GradedResponse)

        return engine.logprob_metadata | {"temperature": settings.temperature, "top_p": settings.top_p}, make_part

    num_items = len(_continued_by(responses, name)) * len(PREFIX_PERCENTS) * samples
    return make_missing_parts(stage, f"continuations, {name}, step {step}", num_items, prepare)


def _grade(
    run: Run, benchmark: Benchmark, continued: Sequence[Continuation], completions: Sequence[Completion]
) -> list[GradedResponse]:
    """Return the rows of a part. The answer is that of the prefix and its continuation together."""
    pairs = list(zip(continued, completions, strict=True))
    complete_ids = [np.concatenate([each.prefix_ids, completion.response_ids]) for each, completion in pairs]
    texts = run.student.tokenizer.batch_decode(complete_ids, skip_special_tokens=True)
    golds = [str(each.response.answer) for each in continued]
    grades = benchmark.grader.grade(list(zip(golds, texts, strict=True)))
    return [
        graded_response(each.id, each.response.prompt_id, gold, completion, text, grade, grade.extracted)
        for (each, completion), gold, text, grade in zip(pairs, golds, texts, grades, strict=True)
    ]


def _continued_by(responses: Sequence[Response], name: str) -> list[Response]:
    """Return the responses that a model continues: a teacher those to its own prompts."""
    return [response for response in responses if name in ("student", response.teacher)]


def _prefix(response: Response, percent: int) -> Ids:
    return response.response_ids[: len(response.response_ids) * percent // 100]


# ── Summary ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _on_track(run: Run, benchmark: Benchmark, responses: Sequence[Response]) -> dict[tuple[str, int], bool]:
    """Return whether each prefix is right so far, by sample id and percent; {} if the benchmark cannot check it."""
    if benchmark.on_track is None:
        return {}
    decode = partial(run.student.tokenizer.batch_decode, skip_special_tokens=True)
    prompts = decode([response.prompt_ids for response in responses])
    on_track = {}
    for percent in PREFIX_PERCENTS:
        prefixes = decode([_prefix(response, percent) for response in responses])
        for response, prompt, prefix in zip(responses, prompts, prefixes, strict=True):
            on_track[response.sample_id, percent] = benchmark.on_track(prompt, prefix)
    return on_track


def summarize_continuations(
    rows: dict[str, list[GradedResponse]], on_track: dict[tuple[str, int], bool]
) -> dict[str, list[dict[str, Any]]]:
    """Return the accuracies by model and prefix length, with 95% intervals over problems.

    accuracy: from any prefix. by_prefix: separately from prefixes that are right so far and from those that have gone
    wrong, if `on_track` contains them.
    """
    by_length: dict[tuple[str, int], list[GradedResponse]] = defaultdict(list)
    by_prefix: dict[tuple[str, int, str], list[GradedResponse]] = defaultdict(list)
    for model, row in ((model, row) for model, rows_of_model in rows.items() for row in rows_of_model):
        sample_id, percent, _ = row.sample_id.rsplit("/", 2)
        by_length[model, int(percent)].append(row)
        if (is_right := on_track.get((sample_id, int(percent)))) is not None:
            by_prefix[model, int(percent), "right so far" if is_right else "gone wrong"].append(row)
    return {
        "accuracy": [{"model": model, "percent": p, **_accuracy(group)} for (model, p), group in by_length.items()],
        "by_prefix": [
            {"model": model, "percent": p, "prefix": prefix, **_accuracy(group)}
            for (model, p, prefix), group in by_prefix.items()
        ],
    }


def _accuracy(rows: Sequence[GradedResponse]) -> dict[str, Any]:
    by_problem: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        by_problem[row.problem_id].append(row.correct)
    accuracy = statistics.problem_bootstrap([float(np.mean(correct)) for correct in by_problem.values()])
    return {"problems": len(by_problem), "accuracy": accuracy.value, "low": accuracy.low, "high": accuracy.high}

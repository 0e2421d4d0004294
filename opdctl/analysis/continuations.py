"""continuations: teacher and student go on from the student's own prefixes, and the whole answers are graded.

What a prefix is worth to a model that goes on from it: the teacher's accuracy falls with the length of the prefix as
far as the student has led it astray (arXiv 2606.22600, Figure 1b). Prefixes of 0, 10 … 90 % of stored responses in,
Parquet parts of graded responses out, one folder a model; then a summary.
"""

import shlex
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from opdctl import console
from opdctl.artifacts import files
from opdctl.artifacts.records import SCHEMA_VERSION, GradedResponse, Ids, Response, sample_seed
from opdctl.artifacts.stage_dir import ALL_PARTS, Fingerprint, StageDir, WorkerShard
from opdctl.artifacts.tables import read_rows, write_rows
from opdctl.engines.base import Completion, Request
from opdctl.engines.pool import EnginePool
from opdctl.errors import ExitCode, OpdctlError
from opdctl.evaluation import stats
from opdctl.evaluation.benchmarks import Benchmark, find
from opdctl.models.directory import ModelDir
from opdctl.recipe.dependencies import fingerprint_settings
from opdctl.recipe.schema import Recipe
from opdctl.runs.layout import step_name
from opdctl.runs.run import Run, open_stage_dir

PERCENTS = range(0, 100, 10)
"""Lengths of the prefixes, in hundredths of the response, rounded down to tokens: never with its last token."""


@dataclass(frozen=True)
class Draw:
    """One continuation to make: the response, the share of it that is kept, in hundredths, and the sample's number."""

    response: Response
    percent: int
    sample: int

    @property
    def id(self) -> str:
        return f"{self.response.sample_id}/{self.percent}/{self.sample}"

    @property
    def prefix_ids(self) -> Ids:
        return _prefix(self.response, self.percent)


def run_continuations(
    run: Run, step: int, engines: EnginePool, *, repair: bool = False, shard: WorkerShard = ALL_PARTS
) -> tuple[dict[str, Any] | None, int]:
    """Make the continuations of a step's prefixes that are missing, with `repair` damaged ones too.

    Returns their summary, None while other shards are at work, and how many parts were made. Raises OpdctlError: 1 when
    the step has no finished rollout, 2 when its student is not kept or the benchmark runs code, 3 when the prompts have
    no answers, 4 when it was begun with other settings.
    """
    benchmark, responses = _benchmark(run), _responses(run, step)
    made, stages = 0, {name: _stage(run, step, name, benchmark, responses) for name in _models(run, step, responses)}
    for name, stage in stages.items():
        with stage.claim_parts(repair=repair, shard=shard) as parts:
            made += (
                _generate_continuations(run, step, name, benchmark, responses, engines, stage, parts) if parts else 0
            )
    if not all(stage.is_finished() for stage in stages.values()):
        return None, made
    rows = {
        name: [row for i in range(len(s.names)) for row in read_rows(s.verify(i), GradedResponse)]
        for name, s in stages.items()
    }
    summary = {
        "schema_version": SCHEMA_VERSION,
        "step": step,
        "student": step_name(step),
        "bench": benchmark.name,
        "problems": len({response.prompt_id for response in responses}),
        "responses": len(responses),
        **summarise(rows, _on_track(run, benchmark, responses)),
    }
    path = continuations_path(run, step) / "summary.json"
    if not path.exists() or files.read_json(path) != summary:
        files.write_json(path, summary)
    return summary, made


def describe_plan(run: Run, step: int) -> str:
    """Return what there is to do for a step, all of it. Raises OpdctlError as `run` does."""
    _benchmark(run)
    responses, samples = _responses(run, step), run.recipe.continuations.samples
    models = _models(run, step, responses)
    count = sum(len(_own(responses, name)) for name in models) * len(PERCENTS) * samples
    return f"continuations of step {step} by {', '.join(models)}: {count} from prefixes of {len(responses)} responses"


def continuations_path(run: Run, step: int) -> Path:
    return run.path / "continuations" / step_name(step)


def recipe_for_engines(recipe: Recipe) -> Recipe:
    """Return the recipe to make engines by: a prompt may have a response behind it now."""
    longest = recipe.prompts.max_tokens + recipe.rollout.max_tokens
    return recipe.model_copy(update={"prompts": recipe.prompts.model_copy(update={"max_tokens": longest})})


def _benchmark(run: Run) -> Benchmark:
    """Return the recipe's first benchmark, whose grader says whether an answer to a prompt is right."""
    benchmark = find(run.recipe.eval.bench[0], run.recipe.eval)
    if benchmark.grader.runs_code:
        raise OpdctlError(
            f"--continuations: {benchmark.name} is judged by running programs, not by the prompts' answers",
            hint="put a benchmark of mathematics or text first in eval.bench",
        )
    return benchmark


def _responses(run: Run, step: int) -> list[Response]:
    """Return the step's first responses that have a token."""
    rollout, wanted = run.rollout_stage(step), run.recipe.continuations.responses
    if not rollout.is_finished():
        raise OpdctlError(
            f"{rollout.path}: no finished rollout to go on from",
            hint=f"run `{rollout.rerun_command}`",
            code=ExitCode.FAILED,
        )
    found: list[Response] = []
    for index in range(len(rollout.names)):
        if len(found) < wanted:
            found += [row for row in read_rows(rollout.verify(index), Response) if len(row.response_ids)]
    found = found[:wanted]
    if not found or any(response.answer is None for response in found):
        what = "the prompts have no answers to grade by" if found else "every response is empty"
        raise OpdctlError(
            f"{rollout.path}: {what}", hint="prompts.answer_column names their column", code=ExitCode.BAD_DATA
        )
    return found


def _models(run: Run, step: int, responses: Sequence[Response]) -> list[str]:
    teachers = {response.teacher for response in responses}
    return ["student", *(name for name in run.recipe.teacher_models() if name in teachers)]


def _stage(run: Run, step: int, name: str, benchmark: Benchmark, responses: Sequence[Response]) -> StageDir:
    digest = run.student_digest(run.policy_version(step)) if name == "student" else run.digests[name]
    settings = fingerprint_settings(run.recipe, "continuations") | {"grader": benchmark.grader.name}
    return open_stage_dir(
        continuations_path(run, step) / name,
        stage="continuations",
        parts=min(run.recipe.rollout.num_parts, len(responses)),
        suffix=".parquet",
        fingerprint=Fingerprint(settings, {"rollout": run.rollout_stage(step).digest, name: digest}),
        rerun_command=f"opdctl analyze-position {shlex.quote(str(run.path))} --continuations --step {step}",
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
    parts: Iterator[int],
) -> int:
    settings, samples, made = run.recipe.rollout, run.recipe.continuations.samples, 0
    engine = engines.get(name, settings.engine, _model(run, step, name))
    stage.start(engine.logprob_metadata | {"temperature": settings.temperature, "top_p": settings.top_p})
    total = len(_own(responses, name)) * len(PERCENTS) * samples
    with console.progress(f"continuations, {name}, step {step}", total) as advance:
        for index in parts:
            part = _own(stage.items_of_part(responses, index), name)
            draws = [Draw(response, percent, n) for response in part for percent in PERCENTS for n in range(samples)]
            requests = [
                Request(
                    np.concatenate([run.prompt_ids(name, draw.response), draw.prefix_ids]),
                    sample_seed(run.recipe.seed, f"{name}/{draw.id}"),
                )
                for draw in draws
            ]
            completions = engine.generate(requests, settings, settings.batch_size, advance)
            rows = _graded(run, benchmark, draws, completions)
            tokens = sum(len(row.response_ids) for row in rows)
            made += stage.write(
                index, partial(write_rows, rows=rows, kind=GradedResponse), rows=len(rows), tokens=tokens
            )
    return made


def _graded(
    run: Run, benchmark: Benchmark, draws: Sequence[Draw], completions: Sequence[Completion]
) -> list[GradedResponse]:
    """Return the rows of a part: the answer is that of prefix and continuation together."""
    pairs = list(zip(draws, completions, strict=True))
    whole = [np.concatenate([draw.prefix_ids, completion.response_ids]) for draw, completion in pairs]
    texts = run.student.tokenizer.batch_decode(whole, skip_special_tokens=True)
    golds = [str(draw.response.answer) for draw in draws]
    grades = benchmark.grader.grade(list(zip(golds, texts, strict=True)))
    return [
        GradedResponse(
            sample_id=draw.id,
            problem_id=draw.response.prompt_id,
            response_ids=completion.response_ids,
            text=text,
            finish_reason=completion.finish_reason,
            gold=gold,
            extracted=grade.extracted,
            correct=grade.correct,
            verdict=grade.verdict,
            vote=grade.extracted,
        )
        for (draw, completion), gold, text, grade in zip(pairs, golds, texts, grades, strict=True)
    ]


def _own(part: Sequence[Response], name: str) -> list[Response]:
    """Return the responses that a model goes on from: a teacher from those of its own prompts."""
    return [response for response in part if name in ("student", response.teacher)]


def _prefix(response: Response, percent: int) -> Ids:
    return response.response_ids[: len(response.response_ids) * percent // 100]


# ── What it comes to ─────────────────────────────────────────────────────────────────────────────────────────────────


def _on_track(run: Run, benchmark: Benchmark, responses: Sequence[Response]) -> dict[tuple[str, int], bool]:
    """Return of each prefix, by sample id and length, whether it is right so far; nothing if the task cannot tell."""
    if benchmark.on_track is None:
        return {}
    decode = partial(run.student.tokenizer.batch_decode, skip_special_tokens=True)
    prompts = decode([response.prompt_ids for response in responses])
    found = {}
    for percent in PERCENTS:
        prefixes = decode([_prefix(response, percent) for response in responses])
        for response, prompt, prefix in zip(responses, prompts, prefixes, strict=True):
            found[response.sample_id, percent] = benchmark.on_track(prompt, prefix)
    return found


def summarise(
    rows: dict[str, list[GradedResponse]], on_track: dict[tuple[str, int], bool]
) -> dict[str, list[dict[str, Any]]]:
    """Return the accuracy of each model by the length of the prefix, with 95 % intervals over problems; and the same of
    prefixes that are right so far and of those that have gone wrong, where the task can tell."""
    whole: dict[tuple[str, int], list[GradedResponse]] = defaultdict(list)
    split: dict[tuple[str, int, str], list[GradedResponse]] = defaultdict(list)
    for model, row in _each(rows):
        sample_id, percent, _ = row.sample_id.rsplit("/", 2)
        whole[model, int(percent)].append(row)
        if (right := on_track.get((sample_id, int(percent)))) is not None:
            split[model, int(percent), "right so far" if right else "gone wrong"].append(row)
    return {
        "accuracy": [{"model": model, "percent": p, **_accuracy(own)} for (model, p), own in whole.items()],
        "by_prefix": [
            {"model": model, "percent": p, "prefix": prefix, **_accuracy(own)}
            for (model, p, prefix), own in split.items()
        ],
    }


def _each(rows: dict[str, list[GradedResponse]]) -> Iterator[tuple[str, GradedResponse]]:
    return ((model, row) for model, own in rows.items() for row in own)


def _accuracy(rows: Sequence[GradedResponse]) -> dict[str, Any]:
    by_problem: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        by_problem[row.problem_id].append(row.correct)
    found = stats.problem_bootstrap([float(np.mean(own)) for own in by_problem.values()])
    return {"problems": len(by_problem), "accuracy": found.value, "low": found.low, "high": found.high}

"""Continuations: teacher and student continue the student's own prefixes, and the complete answers are graded.

The teacher's accuracy falls with the length of the prefix if the student's errors mislead it (arXiv 2606.22600,
Figure 1b). Reads prefixes of stored responses, by relative and by absolute length, and writes Parquet parts of graded
responses in one directory for each model, then a summary. Each continuation has the same budget of tokens.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from opdctl.artifacts.records import Completion, GradedResponse, Ids, Response, sample_seed
from opdctl.artifacts.stage_dir import Fingerprint, StageDir, write_summary
from opdctl.artifacts.versions import versioned
from opdctl.cluster import open_engines
from opdctl.engines.base import Request
from opdctl.engines.pool import EnginePool
from opdctl.errors import OpdctlError
from opdctl.evaluation import statistics
from opdctl.evaluation.benchmarks import Benchmark, find_benchmark
from opdctl.evaluation.evaluate import graded_response
from opdctl.models.directory import ModelDir
from opdctl.recipe.dependencies import fingerprint_settings
from opdctl.recipe.schema import Continuations, Recipe, Sampling
from opdctl.runs.layout import step_name
from opdctl.runs.models import check_positions
from opdctl.runs.run import Run, open_stage_dir
from opdctl.runs.stage_loop import BuildPart, StageWork, make_missing_parts, rows_part


@dataclass(frozen=True, order=True)
class PrefixLength:
    """The length of a prefix, in percent of the response or in tokens."""

    unit: Literal["percent", "tokens"]
    value: int

    @property
    def label(self) -> str:
        """The length in the ids of continuations: "50" for 50%, "512-tokens" for 512 tokens."""
        return str(self.value) if self.unit == "percent" else f"{self.value}-tokens"

    @classmethod
    def parse(cls, label: str) -> "PrefixLength":
        """Return the length with this label."""
        digits = label.removesuffix("-tokens")
        return cls("percent" if digits == label else "tokens", int(digits))

    def prefix(self, response: Response) -> Ids | None:
        """Return the ids of the prefix, or None if the response is not longer.

        A percentage is rounded down to tokens. No prefix contains the last token of the response.
        """
        size = len(response.response_ids)
        end = size * self.value // 100 if self.unit == "percent" else self.value
        return response.response_ids[:end] if end < size else None


@dataclass(frozen=True)
class Continuation:
    """One continuation to make: of a prefix of a response, the sample with this number."""

    response: Response
    length: PrefixLength
    prefix_ids: Ids
    sample: int

    @property
    def id(self) -> str:
        return f"{self.response.sample_id}/{self.length.label}/{self.sample}"


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
    with open_engines(run, device, _recipe_for_engines(run.recipe)) as engines:
        summary, made = run_continuations(run, step, engines)
    return ContinuationsResult(continuations_path(run, step), summary, made)


def run_continuations(run: Run, step: int, engines: EnginePool) -> tuple[dict[str, Any] | None, int]:
    """Make the continuations of a step's prefixes that are missing.

    Returns their summary, None while other workers make parts, and the number of parts made here.

    Raises:
        OpdctlError: the step's rollout is unfinished; its student was pruned; the benchmark runs code; the prompts have
            no answers; no response is longer than a prefix; a model has too few positions; the continuations were
            started with different settings.
    """
    benchmark, responses = _benchmark(run), _responses(run, step)
    _check_positions(run, responses)
    stages = {name: _stage(run, step, name, benchmark, responses) for name in _models(run, responses)}
    made = sum(
        _generate_continuations(run, step, name, benchmark, responses, engines, stage) for name, stage in stages.items()
    )
    if not all(stage.is_finished() for stage in stages.values()):
        return None, made

    def sum_up() -> dict[str, Any]:
        rows = {name: stage.read_all(GradedResponse) for name, stage in stages.items()}
        return {
            **versioned("continuations"),
            "step": step,
            "student": step_name(step),
            "bench": benchmark.name,
            "problems": len({response.prompt_id for response in responses}),
            "responses": len(responses),
            "max_tokens": _sampling(run.recipe).max_tokens,
            **summarize_continuations(rows, _on_track(run, benchmark, responses)),
        }

    return write_summary(continuations_path(run, step) / "summary.json", stages.values(), sum_up), made


def describe_plan(run: Run, step: int) -> str:
    """Return the number of continuations of a step and their maximum length, in a sentence.

    Raises:
        OpdctlError: see `run_continuations`.
    """
    _benchmark(run)
    responses = _responses(run, step)
    models = _models(run, responses)
    if all(run.models[name].path.is_dir() for name in models):
        _check_positions(run, responses)
    count = sum(_count_continuations(run, name, responses) for name in models)
    return (
        f"continuations of step {step} by {', '.join(models)}: {count}, of prefixes of {len(responses)} responses, "
        f"at most {_sampling(run.recipe).max_tokens} tokens each"
    )


def continuations_path(run: Run, step: int) -> Path:
    return run.path / "continuations" / step_name(step)


def _sampling(recipe: Recipe) -> Sampling:
    """Return how continuations are sampled: from the model's own distribution. They end as rollouts do."""
    rollout = recipe.rollout
    max_tokens = recipe.continuations.max_tokens or rollout.max_tokens
    return Sampling(max_tokens=max_tokens, stop=rollout.stop, stop_token_ids=rollout.stop_token_ids)


def _recipe_for_engines(recipe: Recipe) -> Recipe:
    """Return the recipe for engines whose prompts include a prefix of a response."""
    prompt_tokens = recipe.prompts.max_tokens + recipe.rollout.max_tokens
    prompts = recipe.prompts.model_copy(update={"max_tokens": prompt_tokens})
    rollout = recipe.rollout.model_copy(update={"max_tokens": _sampling(recipe).max_tokens})
    return recipe.model_copy(update={"prompts": prompts, "rollout": rollout})


def _prefix_lengths(settings: Continuations) -> list[PrefixLength]:
    percents = {PrefixLength("percent", value) for value in settings.prefix_percents}
    return sorted(percents | {PrefixLength("tokens", value) for value in settings.prefix_tokens})


def _continuations(run: Run, name: str, responses: Sequence[Response]) -> Iterator[Continuation]:
    """Yield the continuations of responses by a model: a teacher continues those to its own prompts."""
    settings = run.recipe.continuations
    lengths = _prefix_lengths(settings)
    for response in responses:
        for length in lengths if name in ("student", response.teacher) else ():
            prefix_ids = length.prefix(response)
            if prefix_ids is not None:
                yield from (Continuation(response, length, prefix_ids, n) for n in range(settings.samples))


def _count_continuations(run: Run, name: str, responses: Sequence[Response]) -> int:
    return sum(1 for _ in _continuations(run, name, responses))


def _check_positions(run: Run, responses: Sequence[Response]) -> None:
    """Check that prompts, prefixes and continuations fit into the positions of every model.

    Raises:
        OpdctlError: they do not fit into a table of positions.
    """
    key = "continuations.max_tokens" if run.recipe.continuations.max_tokens else "rollout.max_tokens"
    for name in _models(run, responses):
        lengths = [
            len(run.prompt_ids(name, each.response)) + len(each.prefix_ids)
            for each in _continuations(run, name, responses)
        ]
        check_positions(run.models[name], max(lengths, default=0), _sampling(run.recipe).max_tokens, key)


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
            responses += [row for row in rollout.read_part(index, Response) if len(row.response_ids)]
    responses = responses[:count]
    if not responses or any(response.answer is None for response in responses):
        why = "the prompts have no answers to grade by" if responses else "every response is empty"
        raise OpdctlError("invalid_data", f"{rollout.path}: {why}", hint="set prompts.answer_column to their column")
    if masked := [response.sample_id for response in responses if response.loss_mask is not None]:
        why = f"{masked[0]} has tokens that the student did not sample: its prefixes need the environment to continue"
        raise OpdctlError("unsupported_setting", f"{rollout.path}: {why}", hint="use a step of single-turn rollouts")
    if not _count_continuations(run, "student", responses):
        detail = f"{rollout.path}: none of {len(responses)} responses is longer than one of continuations.prefix_tokens"
        raise OpdctlError("invalid_data", detail, hint="set shorter prefixes, or continuations.prefix_percents")
    return responses


def _models(run: Run, responses: Sequence[Response]) -> list[str]:
    teachers = {response.teacher for response in responses}
    return ["student", *(name for name in run.recipe.teacher_models() if name in teachers)]


def _stage(run: Run, step: int, name: str, benchmark: Benchmark, responses: Sequence[Response]) -> StageDir:
    digest = run.student_digest(run.policy_version(step)) if name == "student" else run.digests[name]
    settings = (
        fingerprint_settings(run.recipe, "continuations") | {"grader": benchmark.grader.name} | benchmark.grader.rules
    )
    return open_stage_dir(
        continuations_path(run, step) / name,
        stage="continuations",
        num_parts=min(run.recipe.rollout.num_parts, len(responses)),
        suffix=".parquet",
        fingerprint=Fingerprint(settings, {"rollout": run.rollout_stage(step).digest, name: digest}),
        rerun_command=run.manage_command_line("continuations", step),
        repair_command=run.manage_command_line("repair"),
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
    settings = run.recipe.rollout

    def prepare() -> StageWork[Request, Completion]:
        engine = engines.get(name, settings.engine, _model(run, step, name))

        def open_part(index: int) -> tuple[list[Request], BuildPart[Completion]]:
            continued = list(_continuations(run, name, stage.items_of_part(responses, index)))
            requests = [
                Request(
                    np.concatenate([run.prompt_ids(name, each.response), each.prefix_ids]),
                    sample_seed(run.recipe.seed, f"{name}/{each.id}"),
                )
                for each in continued
            ]
            return requests, lambda done: rows_part(_grade(run, benchmark, continued, done), GradedResponse)

        return StageWork(
            engine.logprob_metadata | {"temperature": 1.0, "top_p": 1.0},
            open_part,
            partial(engine.stream_completions, sampling=_sampling(run.recipe), batch_size=settings.batch_size),
            engine.batches_across_parts,
        )

    num_items = _count_continuations(run, name, responses)
    makers = engines.part_makers("rollout", name, partial(continue_prefixes, step, name))
    return make_missing_parts(stage, f"continuations, {name}, step {step}", num_items, prepare, makers=makers)


def continue_prefixes(step: int, name: str, run: Run, engines: EnginePool) -> int:
    """Make the missing parts of the continuations by one model, but for those of other workers; return how many."""
    benchmark, responses = _benchmark(run), _responses(run, step)
    stage = _stage(run, step, name, benchmark, responses)
    return _generate_continuations(run, step, name, benchmark, responses, engines, stage)


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


# ── Summary ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _on_track(run: Run, benchmark: Benchmark, responses: Sequence[Response]) -> dict[str, bool]:
    """Return whether each prefix is right so far, by the id of its continuation without the sample; {} if the benchmark
    cannot check it."""
    if benchmark.on_track is None:
        return {}
    decode = partial(run.student.tokenizer.batch_decode, skip_special_tokens=True)
    continued = [each for each in _continuations(run, "student", responses) if each.sample == 0]
    prompts, prefixes = (
        decode([each.response.prompt_ids for each in continued]),
        decode([each.prefix_ids for each in continued]),
    )
    return {
        _prefix_id(each.id): benchmark.on_track(prompt, prefix)
        for each, prompt, prefix in zip(continued, prompts, prefixes, strict=True)
    }


def _prefix_id(continuation_id: str) -> str:
    return continuation_id.rpartition("/")[0]


def summarize_continuations(
    rows: Mapping[str, Sequence[GradedResponse]], on_track: Mapping[str, bool]
) -> dict[str, list[dict[str, Any]]]:
    """Return the accuracies by model and prefix length, with 95% intervals over problems.

    accuracy: from any prefix. by_prefix: separately from prefixes that are right so far and from those that have gone
    wrong, if `on_track` contains them by id.
    """
    summary: dict[str, list[dict[str, Any]]] = {"accuracy": [], "by_prefix": []}
    for model, rows_of_model in rows.items():
        by_length: dict[PrefixLength, list[GradedResponse]] = defaultdict(list)
        for row in rows_of_model:
            by_length[PrefixLength.parse(row.sample_id.split("/")[-2])].append(row)
        for length, group in sorted(by_length.items()):
            place = {"model": model, "percent": None, "tokens": None, length.unit: length.value}
            summary["accuracy"].append(place | _accuracy(group))
            for is_right, prefix in ((True, "right so far"), (False, "gone wrong")):
                of_kind = [row for row in group if on_track.get(_prefix_id(row.sample_id)) == is_right]
                if of_kind:
                    summary["by_prefix"].append(place | {"prefix": prefix} | _accuracy(of_kind))
    return summary


def _accuracy(rows: Sequence[GradedResponse]) -> dict[str, Any]:
    """Return the accuracy of continuations, with the numbers of responses and problems that they belong to."""
    by_problem: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        by_problem[row.problem_id].append(row.correct)
    accuracies = [float(np.mean(correct)) for correct in by_problem.values()]
    accuracy = statistics.problem_interval(accuracies, samples=len(rows) / len(by_problem))
    return {
        "responses": len({_prefix_id(row.sample_id) for row in rows}),
        "problems": len(by_problem),
        "accuracy": accuracy.value,
        "low": accuracy.low,
        "high": accuracy.high,
        "truncated_fraction": float(np.mean([row.finish_reason == "length" for row in rows])),
    }

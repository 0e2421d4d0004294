"""eval: a model answers a benchmark's problems, several times each, and the answers are graded."""

import importlib.metadata
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from opdctl import distributed
from opdctl.artifacts import files
from opdctl.artifacts.files import digest_of
from opdctl.artifacts.records import Completion, EvalPrompt, GradedResponse, Ids, sample_seed
from opdctl.artifacts.stage_dir import (
    STAGE_MARKERS,
    Fingerprint,
    FingerprintMismatchError,
    PartMakers,
    StageDir,
    corrupt_file_hint,
    write_summary,
)
from opdctl.artifacts.tables import write_rows
from opdctl.artifacts.versions import versioned
from opdctl.cluster import open_engines
from opdctl.data.formats import evaluation_format
from opdctl.data.messages import Message
from opdctl.data.prompts import Problem, append_suffix
from opdctl.data.rendering import PromptFormat, PromptRenderer
from opdctl.engines.base import Request
from opdctl.engines.pool import EnginePool
from opdctl.engines.stop_strings import text_before_stop
from opdctl.errors import OpdctlError
from opdctl.evaluation import contamination, statistics
from opdctl.evaluation.benchmarks import Benchmark, find_benchmark, is_of_unknown_plugin
from opdctl.evaluation.few_shot import add_examples, read_examples, to_plain_text
from opdctl.evaluation.graders import Grade
from opdctl.evaluation.thinking import BudgetedCompletion, ThinkingBudget
from opdctl.models.directory import ModelDir, find_local, find_or_download
from opdctl.recipe.dependencies import fingerprint_settings
from opdctl.recipe.schema import AUTO, Eval, Model, Recipe
from opdctl.runs.layout import PROMPTS, step_name
from opdctl.runs.models import check_positions, find_model
from opdctl.runs.run import Run, open_stage_dir
from opdctl.runs.stage_loop import BuildPart, StageWork, make_missing_parts, rows_part

MAX_SHOWN_ANSWER_CHARS = 200  # of an answer that crashed its grader, in the summary


# ── Targets ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class EvalTarget:
    """The model that is evaluated.

    name: of its directory under eval/BENCH. role: of its engine. options: of `opdctl eval`, to evaluate it again.
    """

    name: str
    model: ModelDir
    digest: str
    role: str
    options: str


def student_target(run: Run, step: int) -> EvalTarget:
    """Return policy version `step` of a run."""
    return EvalTarget(step_name(step), run.student_at(step), run.student_digest(step), "student", f"--step {step}")


def scorer_target(run: Run, name: str) -> EvalTarget:
    """Return a teacher or the reference model of a run."""
    return EvalTarget(name, run.models[name], run.digests[name], name, f"--model {name}")


def _external_settings(name: str, recipe: Recipe) -> Model:
    """Return the student's settings for another model, without what belongs to the student's directory."""
    if recipe.student.model == name:
        return recipe.student
    own = {"revision": None, "trust_remote_code": False, "tokenizer": AUTO}
    return recipe.student.model_copy(update={"model": name, **own})


def external_target(name: str, recipe: Recipe) -> EvalTarget:
    """Return a model that is not part of the run: a directory or a hub id, loaded with the student's settings."""
    model = find_model(recipe, _external_settings(name, recipe), "--model", recipe.rollout.engine)
    digest = model.digest()
    label = name if name.startswith("toy:") else Path(name).name
    return EvalTarget(f"{label.replace(':', '-')}-{digest[:8]}", model, digest, "model", f"--model {name}")


def find_target(run: Run, model: str | None, step: int | None) -> EvalTarget:
    """Return what to evaluate: the student of `step`, the newest by default; a scorer of the run; or another model."""
    if model is None:
        return student_target(run, distributed.call_on_main(run.current_step) if step is None else step)
    if model in run.scorers():
        return scorer_target(run, model)
    return external_target(model, run.recipe)


# ── Stored evaluations ───────────────────────────────────────────────────────────────────────────────────────────────


def is_evaluated(run: Run, bench: str, target: str) -> bool:
    """Whether there is a finished evaluation, under any protocol."""
    return (run.evaluation_path(bench, target) / "summary.json").exists()


def stored_summary(run: Run, bench: str, target: str) -> dict[str, Any] | None:
    """Return the summary of a finished evaluation under the recipe's protocol, or None."""
    path = run.evaluation_path(bench, target) / "summary.json"
    hint = corrupt_file_hint(
        path, run.evaluation_command_line(path.parent.parent.name, path.parent.name), _repair_command(run)
    )
    summary: dict[str, Any] | None = files.read_json(path, hint=hint) if path.exists() else None
    if summary is None:
        return None
    benchmark = find_benchmark(bench, run.recipe.eval)
    protocol = _protocol(_with_prompt_settings(run, target), benchmark, _template_digest(run, target))
    return summary if summary["protocol"] == protocol else None


def _with_prompt_settings(run: Run, name: str) -> Run:
    """Return the run with the prompt settings of an evaluation of the model `name` in its [eval]."""
    return replace(run, recipe=run.recipe.model_copy(update={"eval": run.recipe.eval_of(name)}))


def _template_digest(run: Run, name: str) -> dict[str, str]:
    """Return the digest of the chat template in place of that of the model `name`, if there is one."""
    template = evaluation_format(run.recipe, name, run.chat_templates).chat_template
    return {"chat_template": digest_of(template)} if template else {}


def _protocol(run: Run, benchmark: Benchmark, template: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings that decide which problems are asked, and how they are answered and graded."""
    recipe, settings = run.recipe, run.recipe.eval
    added: dict[str, Any] = {"eos_token_ids": recipe.rollout.eos_token_ids, "system": settings.system, **template}
    return {
        **{key: value for key, value in added.items() if value not in ([], None)},  # older summaries lack these keys
        **settings.changes,
        "samples": benchmark.samples_per_problem(settings),
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_tokens": settings.max_tokens,
        "suffix": benchmark.prompt_suffix(settings),
        "template_arguments": settings.template_arguments,
        "limit": settings.limit,
        **benchmark.selection,
        "grader": benchmark.grader.name,
        **benchmark.grader.rules,
        "seed": recipe.seed,
        "engine": recipe.rollout.engine,
        "dtype": recipe.student.dtype,
    }


# ── Checks before an evaluation ──────────────────────────────────────────────────────────────────────────────────────


def check_benchmark(
    recipe: Recipe,
    name: str,
    model: ModelDir | None,
    data: Path | None = None,
    templates: Mapping[str, str] | None = None,
) -> None:
    """Check what an evaluation needs besides an engine: permission to run code, problems, and their prompts.

    model: the student, whose tokenizer and positions the prompts have to fit, if it is known. data: as in `run_eval`.
    templates: the chat templates that the recipe names, by section.

    Raises:
        OpdctlError: as `run_eval` does.
    """
    benchmark = find_benchmark(name, recipe.eval)
    _check_code_execution(benchmark, recipe.eval)
    problems = benchmark.problems(recipe.eval.limit, data)
    if benchmark.grader.runs_code:
        benchmark.grader.grade([])  # checks the sandbox
    if model is not None:
        form = evaluation_format(recipe, "student", templates or {})
        prompts = _render(form, recipe.eval, benchmark, problems, model)
        model.end_ids(recipe.eval.stop_token_ids)  # checks them
        if recipe.eval.max_thinking_tokens:
            ThinkingBudget.from_settings(recipe.eval, model)
        longest = max(len(prompt.prompt_ids) for prompt in prompts)
        check_positions(model, longest, recipe.eval.max_tokens, "eval.max_tokens")


def check_evaluation(run: Run, model: str | None, step: int | None, data: Path | None) -> None:
    """Check what `evaluate_benchmarks` needs besides an engine. Nothing is written.

    Raises:
        OpdctlError: as `evaluate_benchmarks` does.
    """
    recipe = run.recipe
    settings = _external_settings(model, recipe) if model is not None and model not in run.scorers() else None
    is_on_hub = settings is not None and find_local(settings, "--model") is None
    target = None if is_on_hub else find_target(run, model, step)
    if settings is not None and target is None:  # its weights are not downloaded
        directory = ModelDir.from_recipe(find_or_download(settings, "--model", weights=False), settings, recipe)
    for name in [name for name in recipe.eval.bench if not is_of_unknown_plugin(recipe, name)]:
        check_benchmark(recipe, name, target.model if target else directory, data)
        if target:
            benchmark = find_benchmark(name, recipe.eval)
            problems = benchmark.problems(recipe.eval.limit, data)
            _stage(_with_prompt_settings(run, target.role), benchmark, problems, target)


# ── Evaluation ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class EvalResult:
    """An evaluation on one benchmark. summary: None while other workers make the remaining parts."""

    path: Path
    summary: dict[str, Any] | None
    parts_made: int


def evaluate_benchmarks(
    run: Run, device: str, model: str | None, step: int | None, data: Path | None
) -> Iterator[EvalResult]:
    """Evaluate a model on the recipe's benchmarks and yield each result as soon as it is there.

    Raises:
        OpdctlError: as `run_eval` does; the model is missing.
    """
    target = find_target(run, model, step)
    with open_engines(run, device) as engines:
        for bench in run.recipe.eval.bench:
            summary, made = run_eval(run, bench, target, engines, data, wait=distributed.world_size() > 1)
            yield EvalResult(run.evaluation_path(bench, target.name), summary, made)


def run_eval(
    run: Run, bench: str, target: EvalTarget, engines: EnginePool, data: Path | None = None, *, wait: bool = False
) -> tuple[dict[str, Any] | None, int]:
    """Answer and grade the missing parts of a benchmark, and return its summary and the number of parts made here.

    The summary is None while other workers make parts; `wait` waits for them. Of several ranks only rank 0 sums up.
    data: a file of problems, or a directory.

    Raises:
        OpdctlError: code execution is disabled; the benchmark's data are invalid or unavailable; the evaluation was
            started with different settings.
    """
    run, benchmark, problems, stage = _open_evaluation(run, bench, target, data)
    for directory in (stage.path, stage.path.parent):
        files.remove_temporary_files(directory)
    makers = engines.part_makers("rollout", target.role, partial(answer_benchmark, bench, target, data))
    made = _answer_problems(run, benchmark, problems, target, engines, stage, wait=wait, makers=makers)
    if not distributed.is_main() or not stage.is_finished():
        return None, made
    summarize_stage = partial(_summarize_stage, run, benchmark, problems, target, stage, data)
    return write_summary(stage.path / "summary.json", [stage], summarize_stage), made


def answer_benchmark(bench: str, target: EvalTarget, data: Path | None, run: Run, engines: EnginePool) -> int:
    """Answer and grade the missing parts of a benchmark, but for those of other workers; return how many."""
    run, benchmark, problems, stage = _open_evaluation(run, bench, target, data)
    return _answer_problems(run, benchmark, problems, target, engines, stage)


def _open_evaluation(
    run: Run, bench: str, target: EvalTarget, data: Path | None
) -> tuple[Run, Benchmark, list[Problem], StageDir]:
    """Return the run with the target's prompt settings, the benchmark, its problems, and the directory of results."""
    run = _with_prompt_settings(run, target.role)
    benchmark = find_benchmark(bench, run.recipe.eval)
    _check_code_execution(benchmark, run.recipe.eval)
    problems = benchmark.problems(run.recipe.eval.limit, data)
    return run, benchmark, problems, _stage(run, benchmark, problems, target)


def _summarize_stage(
    run: Run,
    benchmark: Benchmark,
    problems: Sequence[Problem],
    target: EvalTarget,
    stage: StageDir,
    data: Path | None,
) -> dict[str, Any]:
    rows = stage.read_all(GradedResponse)
    return {
        **versioned("eval"),
        "bench": benchmark.name,
        "model": target.name,
        "model_digest": target.digest,
        **summarize(rows),
        **_summarize_thinking(rows, run.recipe.eval),
        "protocol": _protocol(run, benchmark, _template_digest(run, target.role)),
        "benchmark": _describe_benchmark(run, benchmark, problems, data),
    }


def _check_code_execution(benchmark: Benchmark, settings: Eval) -> None:
    if benchmark.grader.runs_code and not settings.allow_code_execution:
        raise OpdctlError(
            "code_execution_disabled",
            f"--bench {benchmark.name} runs model-generated code",
            hint="give --allow-code-execution; docs/eval.md describes the sandbox",
        )


def _stage(run: Run, benchmark: Benchmark, problems: Sequence[Problem], target: EvalTarget) -> StageDir:
    rules = {f"eval.{key}": value for key, value in (*benchmark.grader.rules.items(), *benchmark.selection.items())}
    samples = {"eval.samples": benchmark.samples_per_problem(run.recipe.eval)}
    return open_stage_dir(
        run.evaluation_path(benchmark.name, target.name),
        stage="eval",
        num_parts=min(run.recipe.eval.num_parts, len(problems)),
        suffix=".parquet",
        fingerprint=Fingerprint(
            fingerprint_settings(run.recipe, "eval") | samples | rules,
            {
                "model": target.digest,
                "problems": _problems_digest(problems),
                **_examples_digest(run.recipe.eval, benchmark),
                **_template_digest(run, target.role),
            },
        ),
        rerun_command=f"{run.command_line('eval')} --bench {benchmark.name} {target.options}",
        repair_command=_repair_command(run),
    )


def _repair_command(run: Run) -> str:
    """Return the command that moves corrupt files of a run away, "" for an evaluation without a run."""
    return run.manage_command_line("repair") if (run.path / "run.json").exists() else ""


def _problems_digest(problems: Sequence[Problem]) -> str:
    others = [[_message_values(message) for message in (*each.earlier, *each.later)] for each in problems]
    rows = zip(problems, others, strict=True)
    return digest_of([(problem.id, problem.text, problem.answer, *messages) for problem, messages in rows])


def _examples_digest(settings: Eval, benchmark: Benchmark) -> dict[str, str]:
    """Return the digest of the examples, if there are any."""
    examples = read_examples(settings, benchmark.answer_format)
    return {"examples": digest_of([(each.problem, each.solution) for each in examples])} if examples else {}


def _message_values(message: Message) -> list[Any]:
    return [message.role, message.text, *([message.extra] if message.extra else [])]


def _describe_benchmark(
    run: Run, benchmark: Benchmark, problems: Sequence[Problem], data: Path | None
) -> dict[str, Any]:
    """Return the benchmark's source, the gold answers that cannot be parsed, and its overlap with the prompts.

    The result is stored beside the evaluations, since it takes a while.
    """
    path = run.evaluation_path(benchmark.name, "benchmark.json")
    key = {"digest": _problems_digest(problems), "prompts": digest_of(run.prompts_digest)}
    hint = corrupt_file_hint(path, run.evaluation_command_line(benchmark.name), _repair_command(run))
    if path.exists() and (stored := files.read_json(path, hint=hint))["key"] == key:
        description: dict[str, Any] = stored["description"]
        return description
    parsable = benchmark.grader.are_parsable([problem.answer or "" for problem in problems])
    description = {
        "source": str(data or benchmark.source.location),
        "digest": key["digest"],
        "unparsable_golds": [problem.id for problem, ok in zip(problems, parsable, strict=True) if not ok],
        "contamination": _find_contamination(run, problems),
    }
    files.write_json(path, {"key": key, "description": description})
    return description


def _find_contamination(run: Run, problems: Sequence[Problem]) -> dict[str, Any] | None:
    """Return the overlap of the problems with the training prompts, or None without training."""
    if run.prompts_digest is None:
        return None
    prompts = run.student.tokenizer.batch_decode([p.prompt_ids for p in run.prompts], skip_special_tokens=True)
    return contamination.measure_contamination({problem.id: problem.text for problem in problems}, prompts)


def _answer_problems(
    run: Run,
    benchmark: Benchmark,
    problems: list[Problem],
    target: EvalTarget,
    engines: EnginePool,
    stage: StageDir,
    *,
    wait: bool = False,
    makers: PartMakers = PartMakers(),  # noqa: B008 - immutable
) -> int:
    settings, samples = run.recipe.eval, benchmark.samples_per_problem(run.recipe.eval)

    def prepare() -> StageWork[Request, Completion]:
        prompts = _render_once(run, benchmark, problems, target, stage)
        check_positions(target.model, max(map(len, prompts.values())), settings.max_tokens, "eval.max_tokens")
        engine = engines.get(target.role, run.recipe.rollout.engine, target.model)

        def open_part(index: int) -> tuple[list[Request], BuildPart[Completion]]:
            part = stage.items_of_part(problems, index)
            asked = [(problem, f"{benchmark.name}/{problem.id}/{n}") for problem in part for n in range(samples)]
            requests = [Request(prompts[p.id], sample_seed(run.recipe.seed, name)) for p, name in asked]
            grade = partial(_grade, benchmark, target.model, asked, stop=settings.stop)
            return requests, lambda done: rows_part(grade(done), GradedResponse)

        stream: Callable[..., Generator[tuple[int, Completion]]] = engine.stream_completions
        if settings.max_thinking_tokens:
            stream = partial(ThinkingBudget.from_settings(settings, target.model).stream_completions, engine)
        sampling = {"temperature": settings.temperature, "top_p": settings.top_p} | settings.modifications
        return StageWork(
            engine.logprob_metadata | sampling | _grader_package(benchmark),
            open_part,
            partial(stream, sampling=settings, batch_size=settings.batch_size),
            engine.batches_across_parts and not settings.max_thinking_tokens,
        )

    return make_missing_parts(
        stage,
        f"eval {benchmark.name}, {target.name}",
        samples * len(problems),
        prepare,
        wait=wait,
        makers=makers,
    )


def _grader_package(benchmark: Benchmark) -> dict[str, str]:
    """Return the version of the package that compares the answers, for the manifest."""
    package = benchmark.grader.package
    return {package: importlib.metadata.version(package)} if package else {}


def _render_once(
    run: Run, benchmark: Benchmark, problems: Sequence[Problem], target: EvalTarget, stage: StageDir
) -> dict[str, Ids]:
    """Return the prompt of each problem, as the first worker rendered it: a chat template may contain the date."""
    prompts = _prompts_stage(stage)
    with prompts.claim_parts(wait=True) as parts:
        for index in parts or ():
            form = evaluation_format(run.recipe, target.role, run.chat_templates)
            rows = _render(form, run.recipe.eval, benchmark, problems, target.model)
            prompts.start({})
            tokens = sum(len(row.prompt_ids) for row in rows)
            prompts.write(index, partial(write_rows, rows=rows, record=EvalPrompt), rows=len(rows), tokens=tokens)
    return {row.problem_id: row.prompt_ids for row in prompts.read_all(EvalPrompt)}


def _prompts_stage(stage: StageDir) -> StageDir:
    """Return the stage of an evaluation's prompts: one part, with the fingerprint of the evaluation."""
    path = stage.path / PROMPTS
    form: dict[str, Any] = {"stage": "eval", "num_parts": 1, "suffix": ".parquet"}
    form |= {"fingerprint": stage.fingerprint, "rerun_command": stage.rerun_command}
    form |= {"repair_command": stage.repair_command}
    try:
        return StageDir(path, **form)
    except FingerprintMismatchError:
        if any((stage.path / name).exists() for name in STAGE_MARKERS):
            raise
        files.remove_directory(path)  # of an evaluation with other settings that ended before it started
        return StageDir(path, **form)


def _render(
    form: PromptFormat, settings: Eval, benchmark: Benchmark, problems: Sequence[Problem], model: ModelDir
) -> list[EvalPrompt]:
    suffix = benchmark.prompt_suffix(settings)
    renderer = PromptRenderer(model.tokenizer, model.vocab_size, form, "eval")
    examples = read_examples(settings, benchmark.answer_format)
    has_template = bool(form.chat_template or model.tokenizer.chat_template)
    rows = []
    for problem in problems:
        chat = replace(problem.chat, text=append_suffix(problem.text, suffix))
        if examples:
            add = add_examples if has_template else to_plain_text
            chat = add(chat, problem.text, examples, settings, suffix)
        ids = renderer.token_ids(chat, str(problem), problem.tools)
        rows.append(EvalPrompt(problem.id, ids, model.tokenizer.decode(ids)))
    return rows


def _grade(
    benchmark: Benchmark,
    model: ModelDir,
    asked: list[tuple[Problem, str]],
    completions: list[Completion],
    stop: Sequence[str],
) -> list[GradedResponse]:
    """Return the rows of complete problems: the vote of a sample depends on the problem's other samples.

    What is graded is the text before a stop string.
    """
    texts = model.tokenizer.batch_decode([c.response_ids for c in completions], skip_special_tokens=True)
    texts = [text_before_stop(text, stop) for text in texts]
    golds = [problem.answer or "" for problem, _ in asked]
    grades = benchmark.grader.grade(list(zip(golds, texts, strict=True)))
    by_problem = [
        (group[0][0][0].answer or "", [grade for _, grade in group])
        for _, pairs in groupby(zip(asked, grades, strict=True), key=lambda pair: pair[0][0].id)
        if (group := list(pairs))
    ]
    votes = [vote for problem_votes in benchmark.grader.votes(by_problem) for vote in problem_votes]
    return [
        graded_response(name, problem.id, problem.answer or "", completion, text, grade, vote)
        for (problem, name), completion, text, grade, vote in zip(asked, completions, texts, grades, votes, strict=True)
    ]


def graded_response(
    sample_id: str, problem_id: str, gold: str, completion: Completion, text: str, grade: Grade, vote: str | None
) -> GradedResponse:
    """Return the row of a graded completion. text: what was graded, as decoded."""
    return GradedResponse(
        sample_id=sample_id,
        problem_id=problem_id,
        response_ids=completion.response_ids,
        text=text,
        finish_reason=completion.finish_reason,
        gold=gold,
        extracted=grade.extracted,
        correct=grade.correct,
        verdict=grade.verdict,
        vote=vote,
        math_verify=grade.math_verify,
        ended_thinking=completion.ended_thinking if isinstance(completion, BudgetedCompletion) else None,
    )


# ── Summary ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def summarize(rows: Sequence[GradedResponse]) -> dict[str, Any]:
    """Return the accuracies with their intervals, the lengths in tokens, and the verdicts of an evaluation's rows."""
    by_problem: dict[str, list[GradedResponse]] = defaultdict(list)
    for row in rows:
        by_problem[row.problem_id].append(row)
    correct = [[row.correct for row in samples] for samples in by_problem.values()]
    votes = [[row.vote for row in samples] for samples in by_problem.values()]
    samples_per_problem = min(map(len, correct))
    k_values = statistics.k_values(samples_per_problem)
    avg = statistics.problem_interval([float(np.mean(samples)) for samples in correct], samples_per_problem)
    same_problems = statistics.sampling_interval(correct)
    pass_at = {k: [statistics.pass_at_k(samples, k) for samples in correct] for k in k_values}
    maj_at = {
        k: [statistics.maj_at_k(vote, samples, k) for vote, samples in zip(votes, correct, strict=True)]
        for k in (k_values if any(vote for samples in votes for vote in samples) else ())
    }
    lengths = [len(row.response_ids) for row in rows]
    return {
        "problems": len(by_problem),
        "samples": samples_per_problem,
        "avg": avg.value,
        "stderr": statistics.standard_error([float(np.mean(samples)) for samples in correct]),
        "ci": [avg.low, avg.high],
        "ci_same_problems": [same_problems.low, same_problems.high] if same_problems else None,
        "pass_at": _estimates(pass_at, samples_per_problem),
        "maj_at": _estimates(maj_at, samples_per_problem),
        "truncated_fraction": sum(row.finish_reason == "length" for row in rows) / len(rows),
        "response_length": float(np.mean(lengths)),
        "response_lengths": {f"p{q}": float(np.percentile(lengths, q)) for q in (10, 50, 90)} | {"max": max(lengths)},
        "verdicts": dict(sorted(Counter(row.verdict for row in rows).items())),
        **_summarize_math_verify(rows),
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


def _summarize_thinking(rows: Sequence[GradedResponse], settings: Eval) -> dict[str, Any]:
    """Return the fraction of responses whose thinking was ended, if the recipe has a budget."""
    if not settings.max_thinking_tokens:
        return {}
    return {"ended_thinking_fraction": float(np.mean([row.ended_thinking is not None for row in rows]))}


def _summarize_math_verify(rows: Sequence[GradedResponse]) -> dict[str, Any]:
    """Return the accuracy by math-verify alone, and the number of responses on which the grader differs from it."""
    if any(row.math_verify is None for row in rows):
        return {"avg_math_verify": None, "math_verify_differences": None}
    return {
        "avg_math_verify": float(np.mean([bool(row.math_verify) for row in rows])),
        "math_verify_differences": sum(row.correct != row.math_verify for row in rows),
    }


def _estimates(by_k: dict[int, list[float]], samples: int) -> dict[str, dict[str, Any]]:
    estimates = {k: statistics.problem_interval(values, samples) for k, values in by_k.items()}
    return {str(k): {"mean": each.value, "ci": [each.low, each.high]} for k, each in estimates.items()}

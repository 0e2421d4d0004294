"""`opdctl eval`."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opdctl import console
from opdctl.cli import completion
from opdctl.cli.options import (
    DryRun,
    Json,
    Launcher,
    Overrides,
    Recipes,
    RunDir,
    RunOption,
    Verbose,
    split_names,
    with_launcher,
)
from opdctl.cli.session import (
    command_session,
    join_process_group,
    named_run,
    open_run_and_device,
    print_json,
    read_recipe_options,
    set_up_device,
)
from opdctl.errors import OpdctlError

if TYPE_CHECKING:
    from opdctl.evaluation.results import Evaluation
    from opdctl.recipe.load import Purpose
    from opdctl.recipe.schema import Recipe
    from opdctl.runs.run import Run


EvaluatedStep = Annotated[
    int | None, typer.Option("--step", min=0, help="The student of this step. Default: the newest.")
]
EvaluatedModel = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="PATH_OR_ID",
        help="Another model: a directory, a hub id, `toy:…`, or `teacher` of the run. Without a run: into eval/.",
    ),
]
Benchmarks = Annotated[
    str | None,
    typer.Option(
        "--bench",
        metavar="A,B,…",
        help="Benchmarks, files of problems, or `hub:ORG/NAME:SUBSET`. Default: the recipe's.",
        autocompletion=completion.complete_benchmarks,
    ),
]
Data = Annotated[Path | None, typer.Option("--data", help="Local benchmark file, or a directory of them.")]
ShowFailures = Annotated[
    int, typer.Option("--show-failures", metavar="K", min=0, help="Print K incorrect responses per benchmark.")
]
LogSamples = Annotated[
    Path | None,
    typer.Option("--log-samples", metavar="FILE", help="Write every prompt and response to a JSON Lines file."),
]
AllowCodeExecution = Annotated[
    bool, typer.Option("--allow-code-execution", help="Let benchmarks of code run model-generated code.")
]


def evaluate(
    run_dir: RunDir = None,
    recipe: Recipes = None,
    set_: Overrides = None,
    run: RunOption = None,
    step: EvaluatedStep = None,
    model: EvaluatedModel = None,
    bench: Benchmarks = None,
    data: Data = None,
    show_failures: ShowFailures = 0,
    log_samples: LogSamples = None,
    allow_code_execution: AllowCodeExecution = False,
    launcher: Launcher = None,
    dry_run: DryRun = False,
    json_: Json = False,
    verbose: Verbose = None,
) -> None:
    """Grade a student, a teacher or any model on benchmarks, with intervals.

    \b
    opdctl eval --bench sort12                 the newest run under runs/
    opdctl eval runs/quickstart --model teacher
    opdctl eval --model Qwen/Qwen3-0.6B --bench aime25,math500
    then: opdctl compare runs/uniform runs/quickstart
    """
    with command_session(verbose, as_json=json_):
        from opdctl.cli.plan import show_evaluation_plan
        from opdctl.recipe.load import with_benchmarks

        overrides = [
            *with_launcher(set_, launcher),
            *(["eval.allow_code_execution=true"] if allow_code_execution else []),
        ]
        purpose: Purpose = "plan" if dry_run else "run"
        resolved, path = _select_recipe(recipe, overrides, named_run(run_dir, run), model, purpose)
        chosen = with_benchmarks(resolved, resolved.eval.bench if bench is None else split_names(bench))
        if data is not None and not data.exists():
            raise OpdctlError("missing_file", f"--data {data}")
        if model is not None and step is not None:
            raise OpdctlError("invalid_usage", "--step cannot be combined with --model", hint="give one of them")
        if log_samples is not None and log_samples.is_dir():
            raise OpdctlError("unusable_output", f"--log-samples {log_samples}: is a directory", hint="name a file")
        if dry_run:
            unavailable = _check(chosen, recipe, path, model, step, data)
            show_evaluation_plan(chosen, path, data, json_)
            if unavailable:
                raise unavailable
            return
        opened, device = _open(resolved, recipe, path, model)
        opened = replace(opened, recipe=with_benchmarks(opened.recipe, chosen.eval.bench))
        evaluations = _evaluate(opened, device, model, step, data, show_failures)
        if log_samples is not None and evaluations:
            _log_samples(evaluations, log_samples)
        summaries = [evaluation.summary for evaluation in evaluations]
        console.info(f"next: {_next_command(opened, summaries)}")
        if json_:
            print_json(summaries[0] if len(summaries) == 1 else {"benches": summaries})


def _select_recipe(
    recipes: list[str] | None, overrides: list[str], named: Path | None, model: str | None, purpose: "Purpose"
) -> tuple["Recipe", Path]:
    """Return the recipe to evaluate by, and the run directory or, for a model of no run, the directory of results."""
    from opdctl.recipe.load import default_eval_recipe
    from opdctl.recipe.schema import is_scorer

    has_run = recipes or (named is not None and (named / "recipe.toml").exists())
    if model is not None and not is_scorer(model) and not has_run:
        return default_eval_recipe(model, overrides), named or Path()
    return read_recipe_options(recipes, overrides, named, purpose)


def _open(recipe: "Recipe", given: list[str] | None, path: Path, model: str | None) -> tuple["Run", str]:
    """Open the run to evaluate in, or a directory of results for a model of no run."""
    from opdctl.runs.open import standalone_eval_run

    if not given and not (path / "recipe.toml").exists():
        join_process_group(recipe, path)
        return standalone_eval_run(recipe, path), set_up_device(recipe)
    needs = model if model in recipe.scorers() else "student"
    return open_run_and_device(recipe, path, str(needs), check_source=False)


def _check(
    recipe: "Recipe", given: list[str] | None, path: Path, model: str | None, step: int | None, data: Path | None
) -> OpdctlError | None:
    """Check what the evaluation needs. Nothing is written. Return the error of a resource that is unavailable."""
    from opdctl.evaluation.evaluate import check_benchmark, check_evaluation
    from opdctl.pipeline.plan import defer_unavailable, make_plan
    from opdctl.runs.open import check_run, resolve_open_settings, standalone_eval_run

    unavailable: list[OpdctlError] = []
    is_run = (path / "run.json").exists()
    with defer_unavailable(unavailable):
        if is_run or not (given or (path / "recipe.toml").exists()):
            needs = [model if model in recipe.scorers() else "student"]
            resolved = resolve_open_settings(recipe, path)
            run = check_run(resolved, path, needs, check_source=False) if is_run else standalone_eval_run(recipe, path)
            check_evaluation(run, model, step, data)
        elif error := make_plan(recipe, path).unavailable:
            raise error
        else:
            for name in recipe.eval.bench:
                check_benchmark(recipe, name, None, data)
    return unavailable[0] if unavailable else None


def _evaluate(
    run: "Run", device: str, model: str | None, step: int | None, data: Path | None, failures: int
) -> list["Evaluation"]:
    """Evaluate on each benchmark, print the results, and return the finished evaluations."""
    from opdctl.cli.eval_view import print_failures, print_summary
    from opdctl.evaluation.evaluate import evaluate_benchmarks
    from opdctl.evaluation.results import Evaluation

    evaluations = []
    for result in evaluate_benchmarks(run, device, model, step, data):
        if result.summary is None:
            console.info(f"wrote {result.parts_made} parts of {result.path}; other workers are producing the rest")
            continue
        evaluations.append(evaluation := Evaluation(result.path, result.summary))
        print_summary(evaluation.summary)
        if failures:
            print_failures(evaluation, failures)
        console.info(f"wrote {result.path}" if result.parts_made else f"nothing to do: {result.path} is finished")
    return evaluations


def _log_samples(evaluations: Sequence["Evaluation"], path: Path) -> None:
    """Write the samples of the evaluations, one problem a line."""
    from opdctl.artifacts import files

    lines = (json.dumps(sample, ensure_ascii=False) + "\n" for each in evaluations for sample in each.samples())
    with files.atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(lines)
    console.info(f"wrote {path}")


def _next_command(run: "Run", summaries: Sequence[Mapping[str, Any]]) -> str:
    """Return the command that continues the run or, without a run, one that compares models."""
    if (run.path / "run.json").exists():
        return run.next_command()
    if not summaries:
        return "the same command, once the other workers are done"
    path = shlex.quote(str(run.evaluation_path(summaries[0]["bench"], summaries[0]["model"])))
    return f"evaluate another model, then `opdctl compare {path} OTHER`"

"""TODO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from opdctl import console
from opdctl.cli.options import (
    AllowCode,
    Benches,
    Compare,
    Data,
    DryRun,
    EvaluatedModel,
    EvaluatedRun,
    EvaluatedStep,
    Json,
    Overrides,
    Quiet,
    Recipes,
    ShardOption,
    ShowFailures,
    Verbose,
)
from opdctl.cli.plan import show_evaluation_plan
from opdctl.cli.session import (
    error_handling,
    open_run_and_device,
    print_json,
    read_recipe_options,
    resolve_shard,
    set_up_device,
)
from opdctl.errors import OpdctlError

if TYPE_CHECKING:
    from opdctl.evaluation.results import Evaluation
    from opdctl.recipe.schema import Recipe
    from opdctl.runs.run import Run


def evaluate(
    recipe: Recipes = None,
    set_: Overrides = None,
    run_dir: EvaluatedRun = None,
    step: EvaluatedStep = None,
    model: EvaluatedModel = None,
    bench: Benches = None,
    data: Data = None,
    list_: Annotated[bool, typer.Option("--list", help="List the benchmarks, and stop.")] = False,
    compare: Compare = None,
    show_failures: ShowFailures = 0,
    allow_code_execution: AllowCode = False,
    shard: ShardOption = None,
    repair: Annotated[bool, typer.Option("--repair", help="Make damaged parts of the evaluation again.")] = False,
    dry_run: DryRun = False,
    json_: Json = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Grade a student, a teacher or any model on benchmarks, with intervals.

    \b
    opdctl eval --bench sort12                 the newest run under runs/
    opdctl eval --run runs/quickstart --model teacher
    opdctl eval --model Qwen/Qwen3-0.6B --bench aime25,math500
    opdctl eval --compare runs/uniform runs/quickstart
    """
    with error_handling(verbose, quiet):
        from opdctl.recipe.load import with_benchmarks

        if list_:
            _list_benches(json_)
            return
        names = bench.split(",") if bench is not None else None
        if compare is not None:
            _compare(*compare, names, json_)
            return
        overrides = [*(set_ or []), *(["eval.allow_code_execution=true"] if allow_code_execution else [])]
        resolved, output = _evaluation_recipe(recipe, overrides, run_dir, model)
        chosen = with_benchmarks(resolved, resolved.eval.bench if names is None else names)
        if data is not None and not data.exists():
            raise OpdctlError(f"--data {data}: no such file or folder")
        if model is not None and step is not None:
            raise OpdctlError("--step and --model name two different models", hint="give one of them")
        if dry_run:
            show_evaluation_plan(chosen, output, data, json_)
            return
        run, device = _open_evaluation(resolved, recipe, output, model)
        run = replace(run, recipe=with_benchmarks(run.recipe, chosen.eval.bench))
        _evaluate(run, device, model, step, data, repair, shard, show_failures, json_)


def _list_benches(as_json: bool) -> None:
    from opdctl.evaluation.benchmarks import Benchmark
    from opdctl.registry import BENCHMARKS

    found: list[Benchmark] = [BENCHMARKS.get(name)() for name in BENCHMARKS.names()]
    rows = [
        {
            "bench": each.name,
            "source": each.source.where,
            "grader": each.grader.name,
            "samples": each.samples,
        }
        for each in found
    ]
    console.print_table(
        "benchmarks", ("name", "data", "grader", "samples"), [list(map(str, each.values())) for each in rows], left=3
    )
    console.info("or a file of your own: --bench mine.jsonl (.parquet, .csv)")
    if as_json:
        print_json({"benchmarks": rows})


def _compare(one: Path, other: Path, benches: list[str] | None, as_json: bool) -> None:
    from opdctl.evaluation import results

    found = results.compare_evaluations(one, other, benches)
    show_comparison(found)
    if as_json:
        print_json({"comparisons": found})


def _evaluation_recipe(
    recipes: list[Path] | None, overrides: list[str], output: Path | None, model: str | None
) -> tuple[Recipe, Path | None]:
    """Return the recipe to evaluate by and the run directory, or where a model that is of no run has its results."""
    from opdctl.recipe.load import default_eval_recipe
    from opdctl.recipe.schema import is_scorer
    from opdctl.runs.layout import newest_run

    of_a_run = recipes or (output is not None and (output / "recipe.toml").exists())
    if model is not None and not is_scorer(model) and not of_a_run:
        return default_eval_recipe(model, overrides), output or Path()
    if not recipes and output is None:
        output = newest_run()
        console.info(f"using the newest run, {output}")
    return read_recipe_options(recipes, overrides, output), output


def _open_evaluation(
    recipe: Recipe, given: list[Path] | None, output: Path | None, model: str | None
) -> tuple[Run, str]:
    """Open the run to evaluate in, or its stand-in where there is none."""
    from opdctl.runs.open import standalone_eval_run

    if not given and output is not None and not (output / "recipe.toml").exists():
        return standalone_eval_run(recipe, output), set_up_device(recipe)
    needs = model if model in recipe.scorers() else "student"
    return open_run_and_device(recipe, output, str(needs), record=False)


def _evaluate(
    run: Run,
    device: str,
    model: str | None,
    step: int | None,
    data: Path | None,
    repair: bool,
    shard: str | None,
    failures: int,
    as_json: bool,
) -> None:
    from opdctl.engines.pool import open_engine_pool
    from opdctl.evaluation import evaluate, results

    subject, own = evaluate.find_target(run, model, step), resolve_shard(shard)
    summaries = []
    with open_engine_pool(run.recipe, device) as engines:
        for name in run.recipe.eval.bench:
            summary, made = evaluate.run_eval(run, name, subject, engines, data, repair=repair, shard=own)
            folder = run.evaluation_path(name, subject.name)
            if summary is None:
                console.info(f"wrote {made} parts of {folder}; the summary comes with the last shard's parts")
                continue
            summaries.append(summary)
            show_summary(summary)
            show_failures(results.load_evaluation(folder), failures)
            console.info(f"wrote {folder}" if made else f"nothing to do: {folder} is finished")
    console.info(f"next: {_after_evaluation(run, summaries)}")
    if as_json:
        print_json(summaries[0] if len(summaries) == 1 else {"benches": summaries})


def _after_evaluation(run: Run, summaries: list[dict[str, Any]]) -> str:
    """Return the command that goes on with the run, or one that looks at the responses."""
    from opdctl.runs.run import next_stage_command

    if (run.path / "run.json").exists():
        return next_stage_command(run)
    folders = [run.evaluation_path(each["bench"], each["model"]) for each in summaries]
    return f"evaluate another model, then `opdctl eval --compare {folders[0]} OTHER`" if folders else "the other shards"


SHOWN_TAIL_CHARS = 600  # characters shown of a failure


def show_comparison(found: Sequence[Mapping[str, Any]]) -> None:
    """Print what `compare` found, and warn of differences in the protocol."""
    rows = [
        [
            f"{each['bench']}, {each['problems']} problems",
            f"{each['a']['avg']:.1%}",
            f"{each['b']['avg']:.1%}",
            f"{100 * each['difference']:+.1f}",
            f"[{100 * each['ci'][0]:+.1f}, {100 * each['ci'][1]:+.1f}]",
            f"{each['p_value']:.3g}",
            f"{each['better']} / {each['worse']}",
        ]
        for each in found
    ]
    console.info(f"A  {found[0]['a']['path']}\nB  {found[0]['b']['path']}")
    header = ("benchmark", "A", "B", "B − A, points", "95 %, paired", "p", "better / worse")
    console.print_table("compared problem by problem", header, rows)
    for each in found:
        if each["other_protocol"]:
            console.warn(f"{each['bench']}: not the same protocol: {', '.join(each['other_protocol'])} differ")


def show_summary(summary: Mapping[str, Any]) -> None:
    """Print one evaluation's accuracies with both intervals."""
    rows = [_line(f"Avg@{summary['samples']}", summary["avg"], summary["ci"], summary["ci_same_problems"])]
    for name, key in (("pass", "pass_at"), ("maj", "maj_at")):
        found = summary[key].items()
        rows += [_line(f"{name}@{k}", each["mean"], each["ci"], None) for k, each in found if k != "1"]
    title = f"{summary['bench']}, {summary['model']}: {summary['problems']} problems, {summary['samples']} samples each"
    console.print_table(title, ("", "", "95 %, such problems", "95 %, these problems"), rows)
    verdicts = ", ".join(f"{count} {name}" for name, count in summary["verdicts"].items())
    lengths = summary["response_lengths"]
    console.info(
        f"responses: {summary['response_length']:.0f} tokens in the mean (median {lengths['p50']:.0f}, 90 % below "
        f"{lengths['p90']:.0f}), {summary['truncated_fraction']:.1%} truncated; verdicts: {verdicts}"
    )
    _warn(summary)


def _line(name: str, value: float, ci: Sequence[float] | None, these: Sequence[float] | None) -> list[str]:
    intervals = (f"[{low_high[0]:.1%}, {low_high[1]:.1%}]" if low_high else "–" for low_high in (ci, these))
    return [name, f"{value:.1%}", *intervals]


def _warn(summary: Mapping[str, Any]) -> None:
    about, name = summary["benchmark"], summary["bench"]
    if killers := summary["grader_failures"]:
        shown = ", ".join(f"{each['sample_id']} ({each['verdict']})" for each in killers[:3])
        console.warn(f"{name}: {len(killers)} answers killed or outlasted their grader and count as wrong: {shown}")
    if golds := about["unparsable_golds"]:
        console.warn(f"{name}: {len(golds)} gold answers can only be met word for word: {', '.join(golds[:5])}")
    found = about["contamination"]
    if found and found["seen"]:
        console.warn(
            f"{name}: the training prompts hold {found['seen']} of its {found['problems']} problems (half of their "
            f"{found['ngram']}-grams or more): {', '.join(list(found['shares'])[:5])}"
        )


def show_failures(evaluation: Evaluation, count: int) -> None:
    """Print wrong responses: what was wanted, what was read, and how the response ends."""
    from opdctl.evaluation.results import failures

    for row in failures(evaluation, count):
        answer = "no answer" if row.extracted is None else f"answer {row.extracted[:200]!r}"
        console.info(
            f"{row.sample_id}: {answer}, gold {row.gold[:200]!r}, verdict {row.verdict}, {row.finish_reason}", "bold"
        )
        console.info(("… " if len(row.text) > SHOWN_TAIL_CHARS else "") + row.text[-SHOWN_TAIL_CHARS:])

"""`opdctl compare`: two evaluations problem by problem, the learning curves of runs, or the table of their results."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from opdctl import console
from opdctl.cli import completion
from opdctl.cli.options import Json, Verbose, split_names
from opdctl.cli.session import command_session, print_json
from opdctl.errors import OpdctlError

if TYPE_CHECKING:
    from opdctl.evaluation.result_table import ResultTable


Paths = Annotated[
    list[Path],
    typer.Argument(
        metavar="A B …",
        help="Runs, or two evaluations such as runs/NAME/eval/BENCH/step-00064.",
        autocompletion=completion.complete_runs,
    ),
]
SharedBenchmarks = Annotated[
    str | None, typer.Option("--bench", metavar="A,B,…", help="Benchmarks. Default: all that they share.")
]
Target = Annotated[
    float | None,
    typer.Option("--target", min=0, max=1, help="Accuracy to reach. Default: the highest that all settings reach."),
]
AsTable = Annotated[bool, typer.Option("--table", help="One table of settings and benchmarks, not the curves.")]
At = Annotated[
    str | None,
    typer.Option(
        "--at",
        metavar="last|best|STEP",
        help="Students in the table: the newest (default), those with the highest mean accuracy, or those of a step.",
    ),
]
Format = Annotated[
    Literal["text", "csv", "markdown", "latex"],
    typer.Option("--format", help="The format of the table. All except text go to stdout."),
]
Figures = Annotated[
    Path | None, typer.Option("--output", metavar="DIR", help="Write a report, figures and tables here.")
]


def compare(
    paths: Paths,
    bench: SharedBenchmarks = None,
    target: Target = None,
    table: AsTable = False,
    at: At = None,
    format_: Format = "text",
    output: Figures = None,
    json_: Json = False,
    verbose: Verbose = None,
) -> None:
    """Compare evaluations or runs on the benchmarks that all of them have.

    Two evaluations are compared problem by problem. Runs are compared by their accuracy by step, two runs also problem
    by problem in their newest evaluations. Runs that differ in the seed alone are one setting. `--table` compares
    settings at one step.

    \b
    opdctl compare runs/uniform runs/quickstart
    opdctl compare runs/a/eval/sort12/step-00064 runs/a/eval/sort12/teacher
    opdctl compare runs/uniform-0 runs/uniform-1 runs/iw_opd-0 runs/iw_opd-1 --target 0.8 --output comparison
    opdctl compare runs/uniform-0 runs/uniform-1 runs/iw_opd-0 runs/iw_opd-1 --table --at best --format latex
    """
    with command_session(verbose, as_json=json_):
        from opdctl.recipe.data_names import benchmark_directory

        options = {"--target": target is not None, "--output": output is not None, "--table": table}
        are_runs = _check_usage(paths, options)
        _check_table_options(table, at, format_, target, json_)
        benches = None if bench is None else [benchmark_directory(name) for name in split_names(bench)]
        comparison: dict[str, Any] = {"evaluations": [], "curves": [], "table": None, "files": []}
        if len(paths) == 2 and not table:
            comparison["evaluations"] = _compare_evaluations(paths[0], paths[1], benches)
        if table:
            comparison |= _compare_results(paths, benches, at or "last", format_, output)
        elif are_runs:
            comparison |= _compare_curves(paths, target, benches, output)
        if json_:
            print_json(comparison)


def _check_usage(paths: list[Path], options: Mapping[str, bool]) -> bool:
    """Return whether the paths are runs. options: those that only runs have, and whether they are given."""
    if len(paths) < 2 and not options["--table"]:
        hint = "give another one, or --table"
        raise OpdctlError("invalid_usage", f"compare {paths[0]}: two paths are required", hint=hint)
    if all((path / "recipe.toml").exists() for path in paths):
        return True
    if len(paths) > 2 or any(options.values()):
        names = ", ".join(str(path) for path in paths if not (path / "recipe.toml").exists())
        raise OpdctlError("missing_run", names, hint=f"give runs, or two evaluations without {', '.join(options)}")
    return False


def _check_table_options(table: bool, at: str | None, format_: str, target: float | None, json_: bool) -> None:
    if at is not None and at not in ("last", "best") and not at.isdecimal():
        raise OpdctlError("invalid_usage", f"--at {at}", hint="give `last`, `best` or a step")
    if not table and (at is not None or format_ != "text"):
        raise OpdctlError("invalid_usage", "--at and --format are options of --table", hint="give --table")
    if table and target is not None:
        raise OpdctlError("invalid_usage", "--target cannot be combined with --table", hint="give one of them")
    if json_ and format_ != "text":
        raise OpdctlError("invalid_usage", "--json cannot be combined with --format", hint="give one of them")


def _compare_evaluations(one: Path, other: Path, benches: list[str] | None) -> list[dict[str, Any]]:
    from opdctl.cli.eval_view import print_evaluation_comparison
    from opdctl.evaluation.results import compare_evaluations

    comparisons = compare_evaluations(one, other, benches)
    print_evaluation_comparison(comparisons)
    return comparisons


# ── The table ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _compare_results(
    paths: list[Path], benches: list[str] | None, at: str, format_: str, output: Path | None
) -> dict[str, Any]:
    from opdctl.analysis import comparison, result_formats
    from opdctl.evaluation.compared_runs import load_compared_runs
    from opdctl.evaluation.result_table import tabulate_results

    results = tabulate_results(*load_compared_runs(paths, benches), at)
    if format_ == "text":
        _print_results(results)
    else:
        sys.stdout.write(result_formats.FORMATS[format_](results))
    written = []
    if output:
        written = [*comparison.write_result_table(output, results), *comparison.write_by_size(output, results)]
    table = {"at": at, "baseline": results.baseline, "records": result_formats.table_records(results)}
    return {"table": table, "files": _report_files(written)}


def _print_results(table: "ResultTable") -> None:
    from opdctl.analysis.result_formats import lay_out

    layout = lay_out(table)
    console.print_table("results", layout.header, layout.text_rows())
    for note in layout.notes:
        console.answer(note)


def _report_files(written: list[Path]) -> list[str]:
    paths = [str(path) for path in written]
    if paths:
        console.info(f"wrote {', '.join(paths)}")
    return paths


# ── Curves ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _compare_curves(
    paths: list[Path], target: float | None, benches: list[str] | None, output: Path | None
) -> dict[str, Any]:
    from opdctl.analysis import comparison
    from opdctl.analysis.run_comparison import compare_positions
    from opdctl.evaluation.compared_runs import load_compared_runs
    from opdctl.evaluation.learning_curves import compare_curves
    from opdctl.evaluation.result_table import tabulate_results

    runs, columns = load_compared_runs(paths, benches)
    curves = [compare_curves(runs, column, target) for column in columns]
    for each in curves:
        console.answer(comparison_line(each))
        console.print_table(f"{each['bench']}, {each['problems']} problems", *comparison_rows(each))
    written = comparison.write_curves(output, curves) if output else []
    if output and len({run.setting.pair for run in runs}) > 1:
        written += comparison.write_by_size(output, tabulate_results(runs, columns))
    if output and (positions := compare_positions(paths)):
        for line in positions.difference_sentences():
            console.answer(line)
        written = [*comparison.write_comparison_report(output, positions, curves), *written]
    return {"curves": curves, "files": _report_files(written)}


def comparison_line(comparison: Mapping[str, Any]) -> str:
    """Return a comparison of learning curves as a sentence."""
    parts = []
    for setting in comparison["settings"]:
        last = setting["curve"][-1]
        steps, reached, seeds = setting["steps_to_target"], setting["reached"], setting["seeds"]
        when = "never" if steps is None else f"after {steps:.3g} steps"
        some = "" if reached in (0, seeds) else f" ({reached} of {seeds} seeds)"
        final = f"{last['accuracy']:.1%} at step {last['step']}"
        parts.append(f"{setting['label']} reaches it {when}{some} and is at {final}")
    return f"{comparison['bench']}, target {comparison['target']:.1%}: {'; '.join(parts)}."


def comparison_rows(comparison: Mapping[str, Any]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Return a comparison of learning curves as a table: the header, and a row for each setting."""
    steps = sorted({point["step"] for setting in comparison["settings"] for point in setting["curve"]})
    rows = []
    for setting in comparison["settings"]:
        accuracies = {point["step"]: f"{point['accuracy']:.1%}" for point in setting["curve"]}
        reached = setting["steps_to_target"]
        steps_to = "–" if reached is None else f"{reached:.3g}"
        rows.append([setting["label"], str(setting["seeds"]), *(accuracies.get(step, "–") for step in steps), steps_to])
    return ("setting", "seeds", *map(str, steps), f"steps to {comparison['target']:.1%}"), rows

"""`opdctl compare`: two evaluations problem by problem, or the learning curves of runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from opdctl import console
from opdctl.cli import completion
from opdctl.cli.options import Json, Verbose
from opdctl.cli.session import command_session, print_json
from opdctl.errors import OpdctlError


def compare(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="A B …",
            help="Runs, or two evaluations such as runs/NAME/eval/BENCH/step-00064.",
            autocompletion=completion.complete_runs,
        ),
    ],
    bench: Annotated[
        str | None, typer.Option("--bench", metavar="A,B,…", help="Benchmarks. Default: all that they share.")
    ] = None,
    target: Annotated[
        float | None,
        typer.Option("--target", min=0, max=1, help="Accuracy to reach. Default: the highest that all settings reach."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="Write figures and tables of the curves here.")
    ] = None,
    json_: Json = False,
    verbose: Verbose = None,
) -> None:
    """Compare evaluations or runs on the benchmarks that all of them have.

    Two evaluations are compared problem by problem. Runs are compared by their accuracy by step, two runs also problem
    by problem in their newest evaluations. Runs that differ in the seed alone are one setting.

    \b
    opdctl compare runs/uniform runs/quickstart
    opdctl compare runs/a/eval/sort12/step-00064 runs/a/eval/sort12/teacher
    opdctl compare runs/uniform-0 runs/uniform-1 runs/iw_opd-0 runs/iw_opd-1 --target 0.8 --output comparison
    """
    with command_session(verbose):
        if len(paths) < 2:
            raise OpdctlError("invalid_usage", f"compare {paths[0]}: two paths are required", hint="give another one")
        are_runs = all((path / "recipe.toml").exists() for path in paths)
        if not are_runs and (len(paths) > 2 or target is not None or output is not None):
            names = ", ".join(str(path) for path in paths if not (path / "recipe.toml").exists())
            hint = "give runs, or two evaluations without --target and --output"
            raise OpdctlError("missing_run", names, hint=hint)
        benches = None if bench is None else bench.split(",")
        comparison: dict[str, Any] = {"evaluations": [], "curves": [], "files": []}
        if len(paths) == 2:
            comparison["evaluations"] = _compare_evaluations(paths[0], paths[1], benches)
        if are_runs:
            comparison |= _compare_curves(paths, target, benches, output)
        if json_:
            print_json(comparison)


def _compare_evaluations(one: Path, other: Path, benches: list[str] | None) -> list[dict[str, Any]]:
    from opdctl.cli.eval_view import print_evaluation_comparison
    from opdctl.evaluation.results import compare_evaluations

    comparisons = compare_evaluations(one, other, benches)
    print_evaluation_comparison(comparisons)
    return comparisons


def _compare_curves(
    paths: list[Path], target: float | None, benches: list[str] | None, output: Path | None
) -> dict[str, Any]:
    from opdctl.analysis.report import write_comparison
    from opdctl.evaluation.learning_curves import compare_curves

    comparisons = compare_curves(paths, target, benches)
    for each in comparisons:
        console.info(comparison_line(each))
        console.print_table(f"{each['bench']}, {each['problems']} problems", *comparison_rows(each))
    files = [str(path) for path in write_comparison(output, comparisons)] if output else []
    if files:
        console.info(f"wrote {', '.join(files)}")
    return {"curves": comparisons, "files": files}


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

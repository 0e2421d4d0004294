"""The size of an evaluation, before anything is loaded or downloaded."""

import operator
from dataclasses import dataclass
from pathlib import Path

from opdctl.evaluation.benchmarks import find_benchmark, is_of_unknown_plugin
from opdctl.pipeline.costs import if_known
from opdctl.recipe.schema import Recipe


@dataclass(frozen=True)
class BenchmarkPlan:
    """The size of an evaluation on a benchmark. None is unknown: the benchmark is on the hub, without a fixed size."""

    bench: str
    problems: int | None
    responses: int | None
    max_response_tokens: int | None


def plan_benchmarks(recipe: Recipe, data: Path | None = None) -> list[BenchmarkPlan]:
    """Return the size of each of the recipe's benchmarks. data: local copies of them; nothing is downloaded.

    Raises:
        OpdctlError: a local benchmark is missing or invalid.
    """
    settings, plans = recipe.eval, []
    for name in settings.bench:
        if is_of_unknown_plugin(recipe, name):
            plans.append(BenchmarkPlan(name, None, None, None))
            continue
        benchmark = find_benchmark(name, settings)
        if data is not None or benchmark.source.is_local:
            problems: int | None = len(benchmark.problems(settings.limit, data))
        else:
            problems = min((count for count in (settings.limit, benchmark.size) if count), default=None)
        responses = if_known(operator.mul, problems, benchmark.samples_per_problem(settings))
        plans.append(BenchmarkPlan(name, problems, responses, if_known(operator.mul, responses, settings.max_tokens)))
    return plans

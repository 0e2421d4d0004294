"""analyze-position: where in the response the teacher's signal is, from stored artifacts alone. No model, no torch.

One pass over the parts, with one part or one step in memory at a time.
"""

from collections.abc import Iterator, Mapping, Sequence

from opdctl import console
from opdctl.analysis import samples
from opdctl.analysis.position_bias import assess_bias
from opdctl.analysis.position_sums import RESERVED_NAMES, Batch, PositionStats, split_by_tokens
from opdctl.analysis.results import Analysis, Phase, StepResult, summarize_step
from opdctl.analysis.samples import CHUNK_TOKENS, Sample
from opdctl.artifacts import files
from opdctl.errors import OpdctlError, did_you_mean
from opdctl.evaluation import learning_curves
from opdctl.losses.token_weights import PrefixRatio, Weight, weigh
from opdctl.recipe.components import build_token_weight, unmet_requirements
from opdctl.recipe.schema import Component
from opdctl.registry import WEIGHTS
from opdctl.runs.layout import list_steps
from opdctl.runs.run import Run
from opdctl.runs.scored_responses import to_weight_inputs

PREFIX_RATIO_ALPHAS = (0.02, 0.1, 0.5)
"""Exponents of the prefix ratio that are shown."""
DEFAULT_WEIGHTS = ("iw_opd", "linear_decay", "prefix_ratio")
"""Weights that are shown beside the recipe's by default."""


def analyze_run(run: Run, names: Sequence[str] | None = None) -> Analysis:
    """Analyze every scored step of a run.

    names: of the weights to show beside the recipe's; `all` for every weight whose columns the run has stored.

    Raises:
        OpdctlError: no step is scored; a weight is unknown, or needs columns that are not stored; an artifact is
            corrupt.
    """
    weights = chosen_weights(run, names)
    steps, skipped = scored_steps(run)
    if not steps:
        raise OpdctlError(
            "missing_input", f"{run.path}: no step has teacher scores", hint=f"run `{run.next_command()}`"
        )
    if skipped:
        console.warn(f"steps with incomplete scores are skipped: {', '.join(map(str, skipped))}")
    all_steps, phases, results = Phase(_step_range(steps), PositionStats()), _phases(steps), []
    with console.progress("analyze-position", len(steps)) as advance:
        for step in steps:
            numbers = _position_stats(run, step, weights, all_steps.numbers.responses)
            for phase_steps, phase in [(steps, all_steps), *phases]:
                if step in phase_steps:
                    phase.numbers.merge(numbers)
            results.append(summarize_step(step, numbers))
            advance(1)
    return _analysis(run, weights, all_steps, [phase for _, phase in phases], results, skipped)


def _analysis(
    run: Run,
    weights: Mapping[str, Weight],
    all_steps: Phase,
    phases: list[Phase],
    results: list[StepResult],
    skipped: list[int],
) -> Analysis:
    summaries = sorted(run.path.glob("continuations/step-*/summary.json"))
    return Analysis(
        run=run.path.resolve().name,
        recipe=files.read_text(run.path / "recipe.toml"),
        weights=list(weights),
        all_steps=all_steps,
        phases=phases,
        steps=results,
        skipped=skipped,
        bias=assess_bias(all_steps.numbers.profile),
        samples=list(_representative_samples(run, [result.step for result in results], weights)),
        continuations=[files.read_json(path) for path in summaries],
        accuracy=learning_curves.accuracy_curve(run.path),
    )


def chosen_weights(run: Run, names: Sequence[str] | None = None) -> dict[str, Weight]:
    """Return the weights to show by their labels: the recipe's first, then those of `names`, or the default ones.

    Raises:
        OpdctlError: a weight is unknown, or needs columns that are not stored.
    """
    weights = {_label(run.recipe.weight): build_token_weight(run.recipe)}
    _check_requirements(run, run.recipe.weight.name, build_token_weight(run.recipe))
    known = [*WEIGHTS.names(), "all"]
    if unknown := [name for name in names or () if name not in known]:
        raise OpdctlError("unknown_name", f"--weights: weight `{unknown[0]}`{did_you_mean(unknown[0], known)}")
    shows_all = names is not None and "all" in names
    for name in WEIGHTS.names() if shows_all else DEFAULT_WEIGHTS if names is None else names:
        for label, weight in _variants(name).items():
            if shows_all and unmet_requirements(run.recipe, weight.needs):
                continue
            _check_requirements(run, name, weight)
            if weight not in weights.values():
                weights[label] = weight
    # The weight of a plugin can have any name.
    return {f"{label} (weight)" if label in RESERVED_NAMES else label: weight for label, weight in weights.items()}


def _variants(name: str) -> dict[str, Weight]:
    if name == "prefix_ratio":
        return {f"prefix_ratio alpha={alpha:g}": PrefixRatio(alpha) for alpha in PREFIX_RATIO_ALPHAS}
    return {name: WEIGHTS.build(name, {})}


def _label(component: Component) -> str:
    """Return the name of a component with the parameters that differ from its defaults."""
    (entry,) = (entry for entry in WEIGHTS.entries() if entry.name == component.name)
    params = {k: v for k, v in component.params.items() if v != entry.parameters[k]}
    text = " ".join([component.name, *(f"{key}={value}" for key, value in params.items())])
    times = getattr(component, "times", None)
    return f"{text} × {_label(times)}" if times else text


def _check_requirements(run: Run, name: str, weight: Weight) -> None:
    """Raise OpdctlError if the run has not stored the columns that a weight needs."""
    if missing := unmet_requirements(run.recipe, weight.needs):
        settings = ", ".join(f"`{key} = {str(value).lower()}`" for key, value in missing.items())
        raise OpdctlError(
            "settings_mismatch",
            f"{run.path}: weight `{name}` needs {settings}",
            hint="start a run with these settings, or with this weight in its recipe, which enables them",
        )


def scored_steps(run: Run) -> tuple[list[int], list[int]]:
    """Return the steps whose rollout and scores are finished, and the started steps whose are not."""
    started = [step for step, path in list_steps(run.path).items() if (path / "rollout").exists()]
    scored = [step for step in started if _is_scored(run, step)]
    return scored, [step for step in started if step not in scored]


def _is_scored(run: Run, step: int) -> bool:
    """Whether a step was once complete: a part that is missing since then is an error when it is read."""
    return bool(run.rollout_stage(step).manifest()) and all(
        stage.manifest() for stage in run.score_stages(step).values()
    )


def _phases(steps: list[int]) -> list[tuple[list[int], Phase]]:
    """Return the first and the last quarter of the steps, at least one step each."""
    quarter = max(1, len(steps) // 4)
    parts = [steps[:quarter], steps[-quarter:]] if len(steps) > 1 else [steps]
    return [(part, Phase(_step_range(part), PositionStats())) for part in parts]


def _step_range(steps: list[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]}–{steps[-1]}"


def _position_stats(run: Run, step: int, weights: Mapping[str, Weight], num_earlier: int) -> PositionStats:
    """Return the sums of a step. num_earlier: responses of the run before this step."""
    total = PositionStats()
    for group in samples.response_groups(run, step, weights):
        responses = [to_weight_inputs(scored, step, run.recipe.train.extrapolation) for scored in group]
        weights_by_name = {name: weigh(weight, responses) for name, weight in weights.items()}
        for part in split_by_tokens(responses, CHUNK_TOKENS):
            batch = Batch(responses[part], num_earlier + total.responses)
            total.merge(PositionStats.of(batch, {name: weight_RT[part] for name, weight_RT in weights_by_name.items()}))
    return total


def _representative_samples(run: Run, steps: list[int], weights: Mapping[str, Weight]) -> Iterator[Sample]:
    for step in dict.fromkeys((steps[0], steps[-1])):
        yield from samples.load_samples(run, step, samples.representative_ids(run, step), weights)

"""analyze-position: where in the response the teacher's signal lies. From stored artifacts alone: no model, no torch.

One pass over the parts: each is read, verified, joined, summed up and forgotten.
"""

from collections.abc import Iterator, Mapping, Sequence

from opdctl import console
from opdctl.analysis import samples
from opdctl.analysis.position_bias import assess_bias
from opdctl.analysis.position_sums import RESERVED_NAMES, Batch, PositionStats, chunks
from opdctl.analysis.results import Analysis, Phase, Step, step_of
from opdctl.analysis.samples import CHUNK_TOKENS, Sample
from opdctl.artifacts import files
from opdctl.errors import ExitCode, OpdctlError, did_you_mean
from opdctl.evaluation import learning_curves
from opdctl.losses.token_weights import PrefixRatio, Weight, weigh
from opdctl.recipe.components import build_token_weight, unmet_requirements
from opdctl.recipe.schema import Component
from opdctl.registry import WEIGHTS
from opdctl.runs.layout import list_steps
from opdctl.runs.run import Run
from opdctl.runs.scored_responses import to_weight_inputs

PREFIX_RATIO_ALPHAS = (0.02, 0.1, 0.5)
"""Exponents of the prefix ratio that are drawn beside one another."""
DEFAULT_WEIGHTS = ("iw_opd", "linear_decay", "prefix_ratio")
"""Weights that are drawn unless others are named; the recipe's own always is, first."""


def analyze_run(run: Run, names: Sequence[str] | None = None) -> Analysis:
    """Read every scored step and return what they show. names: of the weights to draw besides the recipe's own; `all`
    is every one that the run has stored the columns for.

    Raises OpdctlError when no step is scored yet (code 1), when a weight is unknown (code 2) or needs what is not
    stored (code 4), or an artifact is damaged (code 3).
    """
    weights = chosen_weights(run, names)
    steps, left_out = scored_steps(run)
    if not steps:
        hint = f"run `{run.next_command()}`"
        raise OpdctlError(f"{run.path}: no step has teacher scores yet", hint=hint, code=ExitCode.FAILED)
    if left_out:
        console.warn(f"left out, since not wholly scored: steps {', '.join(map(str, left_out))}")
    whole, phases = Phase(_span(steps), PositionStats()), _phases(steps)
    rows: list[Step] = []
    with console.progress("analyze-position", len(steps)) as advance:
        for step in steps:
            numbers = _numbers(run, step, weights, whole.numbers.responses)
            whole.numbers.merge(numbers)
            for own, phase in phases:
                if step in own:
                    phase.numbers.merge(numbers)
            rows.append(step_of(step, numbers))
            advance(1)
    return Analysis(
        run=run.path.resolve().name,
        recipe=files.read_text(run.path / "recipe.toml"),
        weights=list(weights),
        whole=whole,
        phases=[phase for _, phase in phases],
        steps=rows,
        left_out=left_out,
        verdict=assess_bias(whole.numbers.shares),
        samples=list(_samples(run, steps, weights)),
        continuations=[files.read_json(path) for path in sorted(run.path.glob("continuations/step-*/summary.json"))],
        accuracy=learning_curves.accuracy_curve(run.path),
    )


def chosen_weights(run: Run, names: Sequence[str] | None = None) -> dict[str, Weight]:
    """Return the weights to draw by their labels: the recipe's own, then those of `names`, or the usual ones. Raises
    OpdctlError as `run` does."""
    found = {_label(run.recipe.weight): build_token_weight(run.recipe)}
    _refuse_lacking(run, run.recipe.weight.name, build_token_weight(run.recipe))
    known = [*WEIGHTS.names(), "all"]
    if unknown := [name for name in names or () if name not in known]:
        raise OpdctlError(f"--weights: no weight `{unknown[0]}`{did_you_mean(unknown[0], known)}")
    everything = names is not None and "all" in names
    for name in WEIGHTS.names() if everything else DEFAULT_WEIGHTS if names is None else names:
        for label, weight in _variants(name).items():
            if everything and unmet_requirements(run.recipe, weight.needs):
                continue
            _refuse_lacking(run, name, weight)
            if weight not in found.values():
                found[label] = weight
    # A plugin may call its weight as it likes.
    return {f"{label} (weight)" if label in RESERVED_NAMES else label: weight for label, weight in found.items()}


def _variants(name: str) -> dict[str, Weight]:
    if name == "prefix_ratio":
        return {f"prefix_ratio alpha={alpha:g}": PrefixRatio(alpha) for alpha in PREFIX_RATIO_ALPHAS}
    return {name: WEIGHTS.build(name, {})}


def _label(component: Component) -> str:
    """Return a component's name with the parameters that are not its defaults."""
    (entry,) = (entry for entry in WEIGHTS.entries() if entry.name == component.name)
    params = {k: v for k, v in component.params.items() if v != entry.parameters[k]}
    text = " ".join([component.name, *(f"{key}={value}" for key, value in params.items())])
    times = getattr(component, "times", None)
    return f"{text} × {_label(times)}" if times else text


def _refuse_lacking(run: Run, name: str, weight: Weight) -> None:
    if missing := unmet_requirements(run.recipe, weight.needs):
        settings = ", ".join(f"`{key} = {str(value).lower()}`" for key, value in missing.items())
        raise OpdctlError(
            f"{run.path}: weight `{name}` needs what this run did not store",
            hint=f"a run with {settings} in its recipe stores it; name the weight in the recipe and it is so by itself",
            code=ExitCode.RECIPE_MISMATCH,
        )


def scored_steps(run: Run) -> tuple[list[int], list[int]]:
    """Return the steps whose rollout and teacher scores were finished, and those that were begun and are not yet."""
    begun = [step for step, path in list_steps(run.path).items() if (path / "rollout").exists()]
    scored = [step for step in begun if _is_scored(run, step)]
    return scored, [step for step in begun if step not in scored]


def _is_scored(run: Run, step: int) -> bool:
    """Whether a step was once whole: a part that is missing since is damage, which reading it says."""
    return bool(run.rollout_stage(step).manifest()) and all(
        stage.manifest() for stage in run.score_stages(step).values()
    )


def _phases(steps: list[int]) -> list[tuple[list[int], Phase]]:
    """Split the steps into a first and a last quarter, at least one step each."""
    quarter = max(1, len(steps) // 4)
    parts = [steps[:quarter], steps[-quarter:]] if len(steps) > 1 else [steps]
    return [(part, Phase(_span(part), PositionStats())) for part in parts]


def _span(steps: list[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]}–{steps[-1]}"


def _numbers(run: Run, step: int, weights: Mapping[str, Weight], first: int) -> PositionStats:
    """Return a step's numbers. first: responses of the run before it."""
    total = PositionStats()
    for group in samples.response_groups(run, step, weights):
        responses = [to_weight_inputs(scored, step, run.recipe.train.extrapolation) for scored in group]
        weighed = {name: weigh(weight, responses) for name, weight in weights.items()}
        for part in chunks(responses, CHUNK_TOKENS):
            batch = Batch(responses[part], first + total.responses)
            total.merge(PositionStats.of(batch, {name: weight_RT[part] for name, weight_RT in weighed.items()}))
    return total


def _samples(run: Run, steps: list[int], weights: Mapping[str, Weight]) -> Iterator[Sample]:
    for step in dict.fromkeys((steps[0], steps[-1])):
        yield from samples.load_samples(run, step, samples.representative_ids(run, step), weights)

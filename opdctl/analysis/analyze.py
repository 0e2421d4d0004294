"""analyze-position: where in the response the teacher's signal is, from stored artifacts alone. No model, no torch.

One pass over the parts, with one part or one step in memory at a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from opdctl import console
from opdctl.analysis import samples
from opdctl.analysis.correlations import TokenSample
from opdctl.analysis.phase import Phase, is_prefix_ratio, summarize_step
from opdctl.analysis.position_quantiles import CohortHistograms
from opdctl.analysis.position_sums import Batch, PositionStats, PromptGroups, split_by_tokens
from opdctl.analysis.results import Analysis, TrainedSteps
from opdctl.analysis.samples import CHUNK_TOKENS, Sample
from opdctl.analysis.shown_weights import ShownWeights, chosen_weights, weight_label
from opdctl.artifacts import files
from opdctl.errors import OpdctlError
from opdctl.evaluation import learning_curves
from opdctl.losses.token_weights import Weight, weigh
from opdctl.runs.layout import list_steps
from opdctl.runs.phases import TrainingPhase, training_phases
from opdctl.runs.run import Run
from opdctl.runs.scored_responses import to_weight_inputs

PhaseChoice = Literal["quarters", "ends"]
"""The steps that are compared: the first and the last quarter, or the first step and the final student."""
MAX_PHASES = 4
"""Training phases that are compared: the last ones."""


def analyze_run(
    run: Run,
    weights_text: str | None = None,
    phase_choice: PhaseChoice = "quarters",
    groups: PromptGroups | None = None,
) -> Analysis:
    """Analyze every scored step of a run.

    weights_text: the weights to show besides the recipe's, in the form of `--weights`. groups: those of other
    runs, with which this one is compared.

    Raises:
        OpdctlError: no step is scored; a weight is unknown, or needs columns that are not stored; an artifact is
            corrupt.
    """
    weights = chosen_weights(run, weights_text)
    steps, skipped = scored_steps(run)
    if not steps:
        raise OpdctlError(
            "missing_input", f"{run.path}: no step has teacher scores", hint=f"run `{run.next_command()}`"
        )
    if skipped:
        console.warn(f"steps with incomplete scores are skipped: {', '.join(map(str, skipped))}")
    training = [phase for phase in training_phases(run) if {*phase.steps} & {*steps}]
    ranges = _compared_steps(run, steps, training, phase_choice)
    ratios = list(filter(is_prefix_ratio, weights.labels))
    phases = [(compared, _empty_phase(run, name, compared, ratios)) for name, compared in ranges.items()]
    all_steps, results, groups = Phase(_step_range(steps), PositionStats()), [], groups or PromptGroups()
    with console.progress("analyze-position", len(steps)) as advance:
        for step in steps:
            phases_of_step = [phase for compared, phase in phases if step in compared]
            numbers = _add_step(run, step, weights.at(step), groups, phases_of_step)
            all_steps.numbers.merge(numbers, positions=False)
            for phase in phases_of_step:
                phase.numbers.merge(numbers)
            results.append(summarize_step(step, numbers))
            advance(1)
    summaries = sorted(run.path.glob("continuations/step-*/summary.json"))
    return Analysis(
        run=run.path.resolve().name,
        recipe=files.read_text(run.path / "recipe.toml"),
        training=[_describe_training(run, phase) for phase in training],
        weights=weights.labels,
        what_if=weights.what_if,
        all_steps=all_steps,
        phases=[phase for _, phase in phases],
        steps=results,
        skipped=skipped,
        samples=list(_representative_samples(run, steps, weights)),
        continuations=[files.read_json(path) for path in summaries],
        accuracy=learning_curves.accuracy_curve(run.path),
        draw_commands=_draw_commands(run, steps) if phase_choice == "ends" else (),
    )


def _describe_training(run: Run, phase: TrainingPhase) -> TrainedSteps:
    extrapolation = float(phase.settings.get("train.extrapolation", 1.0))
    return TrainedSteps(
        phase.name,
        phase.steps[0],
        weight_label(run, phase.weight),
        phase.objective.name,
        extrapolation,
        phase.changes,
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


def _compared_steps(
    run: Run, steps: list[int], training: Sequence[TrainingPhase], phase_choice: PhaseChoice
) -> dict[str, list[int]]:
    """Return the steps that are compared, by name: the first and the last step, or the training phases if there are
    several, or the first and the last quarter of the steps, at least one step each."""
    if phase_choice == "ends":
        return {_student_name(run.policy_version(step), step): [step] for step in (steps[0], steps[-1])}
    if len(training) > 1:
        parts = [[step for step in phase.steps if step in steps] for phase in training[-MAX_PHASES:]]
    else:
        quarter = max(1, len(steps) // 4)
        parts = [steps[:quarter], steps[-quarter:]] if len(steps) > 1 else [steps]
    return {_step_range(part): part for part in parts}


def _empty_phase(run: Run, name: str, steps: list[int], ratios: Sequence[str]) -> Phase:
    manifests = [manifest for step in steps if (manifest := run.rollout_stage(step).manifest())]
    tokens = sum(part["tokens"] for manifest in manifests for part in manifest["parts"])
    return Phase(name, PositionStats(), TokenSample(tokens), {ratio: CohortHistograms() for ratio in ratios})


def _student_name(updates: int, step: int) -> str:
    if not updates:
        return f"before training (step {step})"
    return f"after {updates} {'update' if updates == 1 else 'updates'} (step {step})"


def _draw_commands(run: Run, steps: list[int]) -> list[str]:
    """Return the commands that draw and score responses of the final student, none if its step is scored."""
    final = run.current_step()
    return [] if final in steps else [run.command_line(name, final) for name in ("rollout", "score-teacher")]


def _step_range(steps: list[int]) -> str:
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]}–{steps[-1]}"


def _add_step(
    run: Run, step: int, weights: Mapping[str, Weight], groups: PromptGroups, phases: Sequence[Phase]
) -> PositionStats:
    """Return the sums of a step, and add its tokens to the phases."""
    total = PositionStats()
    for group in samples.response_groups(run, step, weights):
        responses = [to_weight_inputs(scored, step) for scored in group]
        by_step = {name: weigh(weight, responses) for name, weight in weights.items() if weight.needs_full_step}
        for part in split_by_tokens(responses, CHUNK_TOKENS):
            group_R = groups.assign(scored.response.prompt_id for scored in group[part])
            truncated_R = np.array([scored.response.finish_reason == "length" for scored in group[part]], np.bool_)
            batch = Batch(responses[part], group_R, truncated_R)
            token_ids = [scored.response.own_ids for scored in group[part]]
            weights_by_name = {
                name: by_step[name][part] if name in by_step else weigh(weight, batch.responses)
                for name, weight in weights.items()
            }
            for phase in phases:
                phase.add_tokens(batch, token_ids, weights_by_name)
            total.merge(PositionStats.of(batch, weights_by_name))
    return total


def _representative_samples(run: Run, steps: list[int], weights: ShownWeights) -> Iterator[Sample]:
    for step in dict.fromkeys((steps[0], steps[-1])):
        yield from samples.load_samples(run, step, samples.representative_ids(run, step), weights.at(step))

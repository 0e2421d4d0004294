"""The sentences of the report and of the terminal, written from the numbers of an analysis."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from opdctl.analysis.position_bias import BIAS_CONFIDENCE_LEVEL, MIN_PROMPTS, PositionBias, PrefixEstimate
from opdctl.analysis.position_sums import GROUPS, PREFIX_PERCENT
from opdctl.analysis.results import (
    Analysis,
    Phase,
    continuation_rows,
    is_prefix_ratio,
    overall_means,
    ratio_table,
    table_rows,
)
from opdctl.analysis.samples import Sample
from opdctl.evaluation.statistics import Estimate

METHOD_NOTES = (
    f"Fraction of the signal: Σ|A| over the first {PREFIX_PERCENT}% of each response's tokens, divided by Σ|A| over "
    "all tokens: a few responses with most of the signal decide it. The mean of the responses' own fractions gives "
    f"each response the same weight. Without a position bias both are {PREFIX_PERCENT}% in expectation, whatever the "
    "lengths and the mean |A| of the responses. A truncated response ends before its last part. The intervals are "
    f"Fieller's, at {BIAS_CONFIDENCE_LEVEL:.0%}. Their unit is the prompt with all of its responses, or a group of "
    f"prompts if there are more than {GROUPS}.",
    f"Position bias: the fraction of the signal is tested against {PREFIX_PERCENT}% if there are at least "
    f"{MIN_PROMPTS} prompts. A bias is reported if p < {1 - BIAS_CONFIDENCE_LEVEL:.2g}, for the mean of the responses' "
    "own fractions and without truncated responses too, in one direction: early if they are greater, late if they are "
    "less. The test covers all steps together.",
    "Change point: the position that best divides the response into two parts with different mean |A|, by least "
    "squares. Its interval is that of the percentiles over resampled prompts. It is reported if the difference "
    "exceeds 99% of the differences under random signs. It can serve as the fraction of prefix_only and prefix_boost; "
    "whether a student learns more with it can only be found by training.",
)

LOW_RATIO = 0.01
"""A median prefix ratio below this is reported with the first token at which it is."""
PREFIX_RATIO_NOTE = (
    "Lines are the medians of the prefix ratio over the responses at a position, bands their 10% and 90% quantiles; "
    "their mean is 1 unless the ratio is normalized otherwise. Below, the effective sample size as a fraction of these "
    "responses."
)
CORRELATIONS_NOTE = (
    "Rank correlations with |A|; a partial one controls for all other properties. |A| is computed from the two "
    "log-probs, so its correlations with these are in part by construction."
)


def overview(analysis: Analysis) -> str:
    """Return the size of the analyzed run in a sentence."""
    numbers = analysis.all_steps.numbers
    skipped = f"; {len(analysis.skipped)} steps with incomplete scores skipped" if analysis.skipped else ""
    steps = "1 step" if len(analysis.steps) == 1 else f"{len(analysis.steps)} steps"
    return (
        f"{steps}, {numbers.responses:,} responses, {numbers.tokens:,} tokens; "
        f"token weight {analysis.weights[0]}{skipped}. All intervals are 95% intervals over responses or over prompts."
    )


def bias_sentence(bias: PositionBias) -> str:
    """Return the result of the test of position bias in a sentence."""
    if bias.direction == "unknown" or bias.prefix_fraction is None:
        return f"Position bias not tested: {bias.reason}."
    p_values = [each.p_value for each in bias.estimates if each.p_value is not None]
    values = f"the first {PREFIX_PERCENT}% of a response contain {_describe_estimates(bias.estimates)}"
    expected = f"{PREFIX_PERCENT}% expected without a bias; {BIAS_CONFIDENCE_LEVEL:.0%} intervals"
    if bias.direction == "mixed":
        return f"The estimates of a position bias disagree: {values} ({expected})."
    if bias.direction == "none found":
        return f"No position bias found: {values} ({expected}, p {_format_p(bias.p_value or 0.0)})."
    return f"The signal has a {bias.direction} position bias: {values} ({expected}, p {_format_p(max(p_values))})."


def estimate_label(estimate: PrefixEstimate) -> str:
    """Return the quantity of an estimate, for the report."""
    quantity = "of the signal" if estimate.of == "signal" else "of a response’s own signal, mean"
    subset = ", without truncated responses" if estimate.responses == "complete" else ""
    return f"{quantity} in the first {PREFIX_PERCENT}%{subset}"


def _describe_estimates(estimates: Sequence[PrefixEstimate]) -> str:
    texts = {(each.of, each.responses): each.fraction.format() for each in estimates}
    text = f"{texts['signal', 'all']} of the signal, and on average {texts['response', 'all']} of a response’s own"
    if ("signal", "complete") not in texts:
        return text
    return f"{text}; without truncated responses {texts['signal', 'complete']} and {texts['response', 'complete']}"


def change_point_sentence(bias: PositionBias) -> str:
    """Return the change point of the signal in a sentence, "" if the bias was not tested."""
    if bias.direction == "unknown":
        return ""
    if bias.change_point is None:
        return "No change point found."
    change = bias.change_point
    advice = ""
    if bias.direction == "early" and change.before > change.after:
        advice = f" Suggested fraction of a prefix weight: {change.position.value:.0%}."
    elif bias.direction == "late" and change.before < change.after:
        advice = " A prefix weight would leave out the part with the greater signal."
    return (
        f"Change point at {change.position.format('.0%')} of the response: mean |A| is {change.before:.3g} nats per "
        f"token before it and {change.after:.3g} after it.{advice}"
    )


def _format_p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def phase_sentence(phase: Phase) -> str:
    """Return the main numbers of a phase in a sentence."""
    numbers, means = phase.numbers, overall_means(phase.numbers.overall)
    if not numbers.tokens:
        return f"{phase.name}: {numbers.responses} responses without tokens."
    return (
        f"{phase.name}: {numbers.responses} responses, {numbers.tokens} tokens; mean |A| "
        f"{means['abs_advantage'].value:.4f} nats per token, reverse KL {means['k1'].value:.4f}; "
        f"{_prefix_fraction_clause(phase.prefix_fraction())}."
    )


def omission_sentence(phase: Phase) -> str:
    """Return what a figure by position leaves out of a phase in a sentence, "" if it leaves out nothing."""
    tokens, signal = phase.omitted_fractions()
    if not tokens:
        return ""
    shown = len(phase.shown_positions())
    return (
        f"{phase.name}: tokens after position {shown}, which fewer than a tenth of the responses reach, are not shown: "
        f"{tokens:.1%} of the tokens with {signal:.1%} of the signal."
    )


def final_student_sentence(analysis: Analysis) -> str:
    """Return how to draw the responses of the final student, "" if it has some or was not to be compared."""
    if not analysis.draw_commands:
        return ""
    commands = " and ".join(f"`{command}`" for command in analysis.draw_commands)
    return f"The final student has no scored responses; to compare it, run {commands}, then the analysis again."


def _prefix_fraction_clause(fraction: Estimate) -> str:
    if math.isnan(fraction.value):
        return "no signal"
    return f"the first {PREFIX_PERCENT}% of the tokens contain {fraction.value:.1%} of the signal"


def figure_captions(analysis: Analysis) -> dict[str, str]:
    """Return the caption of each figure by its name."""
    draw, omitted = final_student_sentence(analysis), " ".join(filter(None, map(omission_sentence, analysis.phases)))
    captions = {
        "position": " ".join(filter(None, [*map(phase_sentence, analysis.phases), omitted, draw])),
        "cumulative_signal": f"{bias_sentence(analysis.bias)} {_half_signal_caption(analysis.all_steps)}",
        "prefix_logp": " ".join(filter(None, [*map(_prefix_logp_caption, analysis.phases), omitted, draw])),
        "weights": f"{_weights_caption(analysis)} {omitted}".rstrip(),
        "entropy": f"{'; '.join(_entropy_caption(phase) for phase in analysis.phases)}. {omitted}".rstrip(),
    }
    if ratios := analysis.prefix_ratios():
        by_phase = [_prefix_ratio_caption(phase, ratios) for phase in analysis.phases]
        captions["prefix_ratio"] = " ".join([PREFIX_RATIO_NOTE, *by_phase])
    if analysis.has_correlations():
        captions["correlations"] = " ".join([CORRELATIONS_NOTE, *map(_correlations_caption, analysis.phases)])
    if analysis.samples:
        captions["one_response"] = _response_caption(analysis.samples[0])
    if len(analysis.steps) > 1:
        captions |= _step_captions(analysis)
    if analysis.continuations:
        captions["continuations"] = " ".join(map(continuations_sentence, analysis.continuations))
    if analysis.accuracy:
        captions["accuracy"] = _accuracy_caption(analysis.accuracy)
    return captions


def _step_captions(analysis: Analysis) -> dict[str, str]:
    """Return the captions of the figures that compare the first with the last step."""
    first, last = analysis.steps[0], analysis.steps[-1]
    k1 = [step.means["k1"].format(".4f") for step in (first, last)]
    return {
        "steps": (
            f"Reverse KL (k1) is {k1[0]} nats per token at step {first.step} and {k1[1]} at step {last.step}, "
            f"{analysis.relative_kl()[-1].format()} of the first. The first {PREFIX_PERCENT}% of the tokens contain "
            f"{first.prefix_fraction.format()} and {last.prefix_fraction.format()} of the signal."
        ),
        "heatmap": (
            f"Mean |A| is greatest {_greatest_signal_bin(first.signal_L)} at step {first.step}, and "
            f"{_greatest_signal_bin(last.signal_L)} at step {last.step}."
        ),
    }


def _half_signal_caption(phase: Phase) -> str:
    fractions = [estimate.value for estimate in phase.cumulative_signal()]
    percent = next((percent for percent, value in enumerate(fractions) if value >= 0.5), None)
    return "" if percent is None else f"The first {percent}% of a response contain half of the signal."


def _prefix_logp_caption(phase: Phase) -> str:
    sums, positions = phase.numbers.position, phase.shown_positions()
    if not len(positions):
        return f"{phase.name}: too few responses."
    last = positions[-1]
    student, teacher = (sums.mean(f"{name}_prefix_logp")[last] for name in ("student", "teacher"))
    return (
        f"{phase.name}: the mean log-prob of a prefix of {last + 1} tokens is {student:.1f} nats under the student and "
        f"{teacher:.1f} under the teacher."
    )


def _weights_caption(analysis: Analysis) -> str:
    rows = [row for row in table_rows(analysis.weight_table()) if not is_prefix_ratio(row["weight"])]
    sizes = [f"{row['weight']} {row['effective_sample_size']:.1%}" for row in rows]
    parts = [f"Effective sample size as a fraction of the tokens: {', '.join(sizes)}."]
    for name in analysis.weights:
        unsigned = name.replace(" signed=true", "")
        if unsigned != name and unsigned in analysis.weights:
            differences = [_greatest_difference(phase, name, unsigned) for phase in analysis.phases]
            phases = ", ".join(f"{d:.3f} ({p.name})" for d, p in zip(differences, analysis.phases, strict=True))
            parts.append(f"The means of {name} and {unsigned} at a position differ by at most {phases}.")
    return " ".join(parts)


def _greatest_difference(phase: Phase, a: str, b: str) -> float:
    sums, positions = phase.numbers.position, phase.shown_positions()
    return float(np.abs(sums.mean(a)[positions] - sums.mean(b)[positions]).max(initial=0.0))


def _prefix_ratio_caption(phase: Phase, names: Sequence[str]) -> str:
    parts = []
    for name in names:
        table = ratio_table(phase, name)
        if not table["position"]:
            return f"{phase.name}: too few responses."
        low = [
            position for position, ratio in zip(table["position"], table["median"], strict=True) if ratio < LOW_RATIO
        ]
        median = f"below {LOW_RATIO} from token {low[0]}" if low else f"{table['median'][-1]:.3g}"
        parts.append(f"{name} {median}, effective sample size {table['effective_sample_size'][-1]:.1%}")
    return f"{phase.name}, median at token {table['position'][-1]}: {'; '.join(parts)}."


def _entropy_caption(phase: Phase) -> str:
    means, names = overall_means(phase.numbers.overall), ("student_entropy", "teacher_entropy", "top_k_overlap")
    parts = [f"{name.replace('_', ' ')} {means[name].format('.3f')}" for name in names if name in means]
    return f"{phase.name}: {', '.join(parts)}"


def _correlations_caption(phase: Phase) -> str:
    sampled = phase.sample.sampled if phase.sample else 0
    parts = [f"{phase.name}, {sampled:,} of {phase.numbers.tokens:,} tokens"]
    for each in phase.correlations:
        if not math.isnan(each.raw.value):
            partial = "" if math.isnan(each.partial.value) else f", partial {each.partial.format('+.2f')}"
            parts.append(f"{property_title(each.name)} {each.raw.format('+.2f')}{partial}")
    return f"{'; '.join(parts)}."


def property_title(name: str) -> str:
    """Return the name of a property of the tokens for a figure or a caption."""
    return name.replace("logp", "log-prob").replace("_", " ")


def _response_caption(sample: Sample) -> str:
    signal_T = np.abs(sample.tokens.advantage_T)
    greatest = int(signal_T.argmax())
    return (
        f"{sample.sample_id}, the response with the median |A| of step {sample.step}: |A| is greatest at token "
        f"{greatest + 1} of {len(signal_T)}, {signal_T[greatest]:.2f} nats."
    )


def _greatest_signal_bin(signal_L: np.ndarray) -> str:
    if not np.isfinite(signal_L).any():
        return "nowhere"
    width = 100 // len(signal_L)
    start = int(np.nanargmax(signal_L)) * width
    return f"between {start}% and {start + width}% of the response"


def continuations_sentence(summary: Mapping[str, Any]) -> str:
    """Return the accuracies of a step's continuations, from the shortest and the longest prefix, in sentences."""
    rows, parts = [row for row in continuation_rows(summary) if row["prefix"] == "any"], []
    for model, unit in itertools.product(dict.fromkeys(row["model"] for row in rows), ("percent", "tokens")):
        of_model = [row for row in rows if row["model"] == model and row[unit] is not None]
        accuracies = [
            f"{Estimate(row['accuracy'], row['low'], row['high']).format()} after {_format_length(row)}"
            for row in of_model[:: max(len(of_model) - 1, 1)]
        ]
        parts += [f"{model} {', '.join(accuracies)}"] if accuracies else []
    budget = f" A continuation has at most {summary['max_tokens']} tokens." if "max_tokens" in summary else ""
    return (
        f"Accuracy on {summary['problems']} problems when a prefix of a response of {summary['student']} is continued: "
        f"{'; '.join(parts)}.{budget}"
    )


def _format_length(row: Mapping[str, Any]) -> str:
    """Return the length of a prefix; an absolute one with the number of responses that are longer."""
    if row["percent"] is not None:
        return f"{row['percent']}%"
    return f"{row['tokens']} tokens ({row['responses']} responses)"


def _accuracy_caption(accuracy: Mapping[str, Any]) -> str:
    first, last = accuracy["curve"][0], accuracy["curve"][-1]
    teachers = ", ".join(f"{name} {value:.1%}" for name, value in accuracy["teachers"].items())
    return (
        f"{accuracy['bench']}: {first['accuracy']:.1%} at step {first['step']}, {last['accuracy']:.1%} at step "
        f"{last['step']}{f' ({teachers})' if teachers else ''}."
    )

"""The captions of the figures, written from the numbers of an analysis."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from opdctl.analysis.phase import ALL_RESPONSES, TRUNCATED, Phase, is_prefix_ratio, overall_means
from opdctl.analysis.phase_tables import continuation_rows, ratio_table, table_rows
from opdctl.analysis.position_sums import PREFIX_PERCENT, position_bounds
from opdctl.analysis.results import Analysis
from opdctl.analysis.samples import Sample
from opdctl.analysis.verdict import bias_sentence, change_point_sentence
from opdctl.evaluation.statistics import Estimate
from opdctl.losses.token_weights import Floats

LOW_RATIO = 0.01
"""A median prefix ratio below this is reported with the first token at which it is."""
PREFIX_RATIO_NOTE = (
    "Lines are the medians of the prefix ratio at a position, bands its 10% and 90% quantiles. Below, the effective "
    "sample size as a fraction of the tokens at the position."
)
COHORTS_NOTE = (
    "Responses of similar length, and the truncated ones, each up to the length of the shortest one: the mean at each "
    "position is over the same responses."
)
PREFIX_LOGP_NOTE = (
    "The log-prob of a prefix is the sum of the mean log-probs of the tokens at its positions, each over the responses "
    "that reach it. Responses that end do not change it."
)
CORRELATIONS_NOTE = (
    "Rank correlations with |A|; a partial one controls for all other properties. |A| is computed from the two "
    "log-probs, so its correlations with these are in part by construction."
)


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
    """Return what a curve over all responses leaves out of a phase in a sentence, "" if it leaves out nothing."""
    tokens, signal = phase.omitted_fractions()
    if not tokens:
        return ""
    last_L = position_bounds(phase.shown_bins())[1]
    where = f"tokens after position {last_L[-1]}" if len(last_L) else "all tokens"
    return (
        f"{phase.name}: {where}, which fewer than a tenth of the responses or only one reach, are not shown: "
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
    """Return the caption of each figure that the analysis has numbers for, by its name."""
    draw, omitted = final_student_sentence(analysis), " ".join(filter(None, map(omission_sentence, analysis.phases)))
    shown, nonempty = ([phase for phase in analysis.phases if has(phase)] for has in (Phase.shown_bins, _has_tokens))
    captions = {}
    if shown:
        captions["position"] = " ".join(filter(None, [*map(phase_sentence, analysis.phases), omitted, draw]))
    if any(len(phase.cohorts) > 1 for phase in shown):
        captions["cohorts"] = " ".join([COHORTS_NOTE, *map(_cohorts_caption, shown)])
    if analysis.bias.estimates:
        parts = (
            bias_sentence(analysis.bias),
            change_point_sentence(analysis.bias),
            _half_signal_caption(analysis.all_steps),
        )
        captions["cumulative_signal"] = " ".join(filter(None, parts))
    if shown:
        captions["prefix_logp"] = " ".join([PREFIX_LOGP_NOTE, *map(_prefix_logp_caption, shown), omitted]).rstrip()
        if optional_quantities(analysis):
            captions["entropy"] = f"{'; '.join(map(_entropy_caption, shown))}. {omitted}".rstrip()
    if nonempty:
        captions["weights"] = _weights_caption(analysis)
    if (ratios := analysis.prefix_ratios()) and nonempty:
        by_phase = [_prefix_ratio_caption(phase, ratios) for phase in nonempty]
        captions["prefix_ratio"] = " ".join([PREFIX_RATIO_NOTE, *by_phase])
    if analysis.has_correlations():
        captions["correlations"] = " ".join([CORRELATIONS_NOTE, *map(_correlations_caption, nonempty)])
    if analysis.samples:
        captions["one_response"] = _response_caption(analysis.samples[0])
    if len(analysis.steps) > 1 and nonempty:
        captions |= _step_captions(analysis)
    if analysis.continuations:
        captions["continuations"] = " ".join(map(continuations_sentence, analysis.continuations))
    if analysis.accuracy:
        captions["accuracy"] = _accuracy_caption(analysis.accuracy)
    return captions


def _has_tokens(phase: Phase) -> bool:
    return phase.numbers.tokens > 0


def optional_quantities(analysis: Analysis) -> list[str]:
    """Return the quantities that a run stores on request only, and that this run has."""
    names = ("student_entropy", "teacher_entropy", "top_k_overlap")
    return [name for name in names if name in analysis.all_steps.numbers.overall.values]


def _step_captions(analysis: Analysis) -> dict[str, str]:
    """Return the captions of the figures that compare the first with the last step that has tokens."""
    steps = [step for step in analysis.steps if step.tokens]
    first, last = steps[0], steps[-1]
    k1 = [step.means["k1"].format(".4f") for step in (first, last)]
    ratio = analysis.relative_kl()[-1]
    relative = f", {ratio.format()} of the first" if last is analysis.steps[-1] and not math.isnan(ratio.value) else ""
    texts = {
        "steps": f"Reverse KL (k1) is {k1[0]} nats per token at step {first.step} and {k1[1]} at step "
        f"{last.step}{relative}."
    }
    fractions = [step.prefix_fraction for step in (first, last)]
    if not any(math.isnan(each.value) for each in fractions):
        own = [step.own_fraction.format() for step in (first, last)]
        texts["steps"] += (
            f" The first {PREFIX_PERCENT}% of the tokens contain {fractions[0].format()} and {fractions[1].format()} "
            f"of the signal, and on average {own[0]} and {own[1]} of a response’s own."
        )
        places = [_greatest_signal_bins(step.signal_L) for step in (first, last)]
        texts["heatmap"] = (
            f"Mean |A| is greatest {places[0]} at step {first.step}, and {places[1]} at step {last.step}."
        )
    return texts


def _cohorts_caption(phase: Phase) -> str:
    count = phase.numbers.count
    sizes = [
        f"{sum(count[each] for each in cohorts)} {'' if label == TRUNCATED else 'of '}{label}"
        for label, cohorts in phase.cohorts.items()
        if label != ALL_RESPONSES
    ]
    shown = {cohort for label, cohorts in phase.cohorts.items() if label != ALL_RESPONSES for cohort in cohorts}
    others = sum(count[cohort] for cohort in count if cohort not in shown)
    left_out = f"; {others} of other lengths are not shown" if others else ""
    return f"{phase.name}: {', '.join(sizes)}{left_out}." if sizes else ""


def _half_signal_caption(phase: Phase) -> str:
    fractions = [estimate.value for estimate in phase.cumulative_signal()]
    percent = next((percent for percent, value in enumerate(fractions) if value >= 0.5), None)
    return "" if percent is None else f"The first {percent}% of a response contain at least half of the signal."


def _prefix_logp_caption(phase: Phase) -> str:
    student, teacher = (phase.cumulative_logp(model) for model in ("student", "teacher"))
    return (
        f"{phase.name}: the log-prob of a prefix of {student.last_L[-1]:.0f} tokens is {student.mean_L[-1]:.1f} nats "
        f"under the student and {teacher.mean_L[-1]:.1f} under the teacher."
    )


def _weights_caption(analysis: Analysis) -> str:
    rows = [row for row in table_rows(analysis.weight_table()) if row["phase"] == analysis.all_steps.name]
    sizes = [
        f"{row['weight']} {row['effective_sample_size']:.1%}" for row in rows if not is_prefix_ratio(row["weight"])
    ]
    parts = [f"Effective sample size as a fraction of the tokens: {', '.join(sizes)}."] if sizes else []
    if analysis.what_if:
        parts.append(f"The run was not trained with {analysis.what_if.removeprefix('what if: ')}.")
    parts += [
        f"{phase.name}: by token position over {_describe_long(phase)}, the same ones at each position."
        for phase in filter(_has_tokens, analysis.phases)
    ]
    return " ".join([*parts, *_signed_differences(analysis)])


def _signed_differences(analysis: Analysis) -> Iterator[str]:
    for name in analysis.weights:
        unsigned = name.replace(" signed=true", "")
        if unsigned != name and unsigned in analysis.weights:
            differences = [
                f"{_greatest_difference(phase, name, unsigned):.3f} ({phase.name})"
                for phase in filter(_has_tokens, analysis.phases)
            ]
            yield f"The means of {name} and {unsigned} at a position differ by at most {', '.join(differences)}."


def _greatest_difference(phase: Phase, a: str, b: str) -> float:
    mean_L, other_L = (phase.by_position_of_long(name).mean_L for name in (a, b))
    return float(np.abs(mean_L - other_L).max(initial=0.0))


def _prefix_ratio_caption(phase: Phase, names: Sequence[str]) -> str:
    parts = []
    for name in names:
        table = ratio_table(phase, name)
        low = [row["from_position"] for row in table_rows(table) if row["median"] < LOW_RATIO]
        median = f"below {LOW_RATIO} from token {low[0]}" if low else f"{table['median'][-1]:.3g}"
        parts.append(f"{name} {median}, effective sample size {table['effective_sample_size'][-1]:.1%}")
    return (
        f"{phase.name}, over {_describe_long(phase)}, median at token {table['to_position'][-1]}: {'; '.join(parts)}."
    )


def _describe_long(phase: Phase) -> str:
    count = phase.numbers.count
    long = sum(count[cohort] for cohort in phase.long_cohorts())
    return f"the {long} of {sum(count.values())} responses that have at least {phase.common_length} tokens"


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


def _greatest_signal_bins(signal_L: Floats) -> str:
    """Return the part of the response with the greatest mean |A|: several bins if one token covers them."""
    width, greatest = 100 // len(signal_L), int(np.nanargmax(signal_L))
    is_greatest_L = np.isclose(signal_L, signal_L[greatest], rtol=1e-9)
    end = greatest + int(np.argmin(np.append(is_greatest_L[greatest:], False)))
    return f"between {greatest * width}% and {end * width}% of the response"


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

"""The headline of an analysis and its answers: sentences that the numbers entail."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from opdctl.analysis.bootstrap import MIN_INTERVAL_PROMPTS
from opdctl.analysis.phase import overall_means
from opdctl.analysis.position_bias import BIAS_CONFIDENCE_LEVEL, MIN_PROMPTS, PositionBias, PrefixEstimate
from opdctl.analysis.position_sums import GROUPS, PREFIX_PERCENT
from opdctl.analysis.results import Analysis
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
    "less. The test is made for all steps together and for each of the compared phases. The headline states what all "
    "of them agree on.",
    "Change point: the position that best divides the response into two parts with different mean |A|, by least "
    "squares. Its interval is that of the percentiles over resampled prompts. It is reported if the difference "
    "exceeds 99% of the differences under random signs. Where the signal is early, it can serve as the fraction of "
    "prefix_only and prefix_boost; whether a student learns more with it can only be found by training.",
    f"All other intervals are at 95%, with the prompt as the unit. There is none for fewer than {MIN_INTERVAL_PROMPTS} "
    "prompts.",
)


def overview(analysis: Analysis) -> str:
    """Return the size of the analyzed run and how it was trained, in sentences."""
    numbers = analysis.all_steps.numbers
    skipped = f"; {len(analysis.skipped)} steps with incomplete scores skipped" if analysis.skipped else ""
    steps = "1 step" if len(analysis.steps) == 1 else f"{len(analysis.steps)} steps"
    return (
        f"{steps}, {numbers.responses:,} responses, {numbers.tokens:,} tokens{skipped}. {_describe_training(analysis)}"
    )


def _describe_training(analysis: Analysis) -> str:
    phases = analysis.training
    described = [f"objective {each.objective}, token weight {each.weight}" for each in phases]
    if len(phases) == 1:
        return f"{described[0][0].upper()}{described[0][1:]}."
    named = [f"{each.name}: {text}" for each, text in zip(phases, described, strict=True)]
    return f"The recipe changed during the run. {'; '.join(named)}."


def objective_note(analysis: Analysis) -> str:
    """Return what |A| does not show of the run's objectives, "" if the gradient of all tokens is proportional to it."""
    others = sorted({each.objective for each in analysis.training} - {"policy_gradient"})
    if others:
        return (
            f"The gradient of {' and '.join(others)} at a token is not proportional to |A|. This report measures |A| "
            "of the sampled token, not that gradient."
        )
    if factors := sorted({each.extrapolation for each in analysis.training} - {1.0}):
        values = " and ".join(f"{factor:g}" for factor in factors)
        return (
            f"With reward extrapolation (λ = {values}) the gradient at a token is not proportional to |A|. This report "
            "measures |A|, the difference between the log-probs of teacher and student."
        )
    return ""


# ── Position bias ────────────────────────────────────────────────────────────────────────────────────────────────────


def bias_sentence(bias: PositionBias) -> str:
    """Return the result of a test of position bias and its numbers, in sentences."""
    return f"{_state_direction(bias)} {_describe_test(bias)}".rstrip()


def _state_direction(bias: PositionBias) -> str:
    match bias.direction:
        case "unknown":
            return f"Position bias not tested: {bias.reason}."
        case "mixed":
            return "The estimates of a position bias disagree."
        case "none found":
            return "No position bias found."
    return f"The signal has {'an' if bias.direction == 'early' else 'a'} {bias.direction} position bias."


def _describe_test(bias: PositionBias) -> str:
    """Return the estimates of a test that was made, with its p-value where it decides: the greatest one for a bias."""
    if bias.direction == "unknown":
        return ""
    p_values = [each.p_value for each in bias.estimates if each.p_value is not None]
    deciding = {"mixed": [], "none found": p_values[:1]}.get(bias.direction, p_values)
    parts = [f"{PREFIX_PERCENT}% expected without a bias", f"{BIAS_CONFIDENCE_LEVEL:.0%} intervals"]
    note = "; ".join(parts) + (f", p {_format_p(max(deciding))}" if deciding else "")
    return f"The first {PREFIX_PERCENT}% of a response contain {_describe_estimates(bias.estimates)} ({note})."


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


def _format_p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def change_point_sentence(bias: PositionBias) -> str:
    """Return the change point of the signal in a sentence, "" if the bias was not tested."""
    if bias.direction == "unknown":
        return ""
    if bias.change_point is None:
        return "No change point found."
    change = bias.change_point
    return (
        f"Change point at {change.position.format('.0%')} of the response: mean |A| is {change.before:.3g} nats per "
        f"token before it and {change.after:.3g} after it."
    )


# ── Answers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class ReportAnswer:
    """A question that a report must answer first. headline: the answer in short. details: its numbers, in sentences."""

    question: str
    headline: str
    details: str


def answers(analysis: Analysis) -> list[ReportAnswer]:
    """Return the questions that a report must answer first, with their answers."""
    return [
        ReportAnswer("Where does the teacher’s signal lie?", *_locate_signal(analysis)),
        ReportAnswer("Did training change it?", *_compare_phases(analysis)),
        ReportAnswer("Which token weight fits?", *_advise_weight(analysis)),
    ]


def _locate_signal(analysis: Analysis) -> tuple[str, str]:
    """Return what all steps and each of the compared phases agree on, and the numbers of all steps."""
    bias, short = analysis.bias, _state_direction(analysis.bias)
    tested = [phase for phase in analysis.phases if phase.bias.direction != "unknown"]
    details = [_describe_test(bias), change_point_sentence(bias)]
    if bias.direction not in ("mixed", "unknown") and len(analysis.phases) > 1 and tested:
        if analysis.direction() == "mixed":
            short = "The position bias is not the same throughout the run."
            parts = [f"{phase.name} {_name_direction(phase.bias)}" for phase in (analysis.all_steps, *tested)]
            details.insert(0, f"Found: {'; '.join(parts)}.")
        else:
            details.append(f"The result is the same for {' and '.join(phase.name for phase in tested)} alone.")
    return short, " ".join(filter(None, details))


def _name_direction(bias: PositionBias) -> str:
    fraction = f" ({bias.prefix_fraction.format()} in the first {PREFIX_PERCENT}%)" if bias.prefix_fraction else ""
    names = {"mixed": "estimates that disagree", "none found": "no bias"}
    return names.get(bias.direction, bias.direction) + fraction


def _compare_phases(analysis: Analysis) -> tuple[str, str]:
    """Return whether mean |A| and its fraction in the prefix changed from the first phase to the last one."""
    if len(analysis.phases) < 2:
        return "There is one phase, and nothing to compare it with.", ""
    first, last = analysis.phases[0], analysis.phases[-1]
    levels = [overall_means(phase.numbers.overall)["abs_advantage"] for phase in (first, last)]
    fractions = [phase.prefix_fraction() for phase in (first, last)]
    if any(math.isnan(each.value) for each in levels):
        return "A phase has no tokens, so there is nothing to compare.", ""
    short, details = (
        f"Mean |A| {_describe_change(*levels)}",
        f"Mean |A| is {levels[0].format('.3g')} nats per token in {first.name} and {levels[1].format('.3g')} in "
        f"{last.name}.",
    )
    if any(math.isnan(each.value) for each in fractions):
        return f"{short}.", details
    return (
        f"{short}; its fraction in the first {PREFIX_PERCENT}% {_describe_change(*fractions)}.",
        f"{details} The first {PREFIX_PERCENT}% of the responses have {fractions[0].format()} and "
        f"{fractions[1].format()} of it.",
    )


def _describe_change(first: Estimate, last: Estimate) -> str:
    """Return whether an estimate fell or rose: whether its intervals do not overlap."""
    if math.isnan(first.low) or math.isnan(last.low):
        return f"has no interval, since there are fewer than {MIN_INTERVAL_PROMPTS} prompts"
    if last.high < first.low:
        return "fell"
    return "rose" if last.low > first.high else "did not change beyond its intervals"


def _advise_weight(analysis: Analysis) -> tuple[str, str]:
    """Return the token weight that the position of the signal suggests, with the effective sample size of the run's
    own one."""
    direction, change = analysis.direction(), analysis.bias.change_point
    prefix, advice = analysis.bias.prefix_fraction, ""
    if direction == "early" and change and change.before > change.after:
        fraction = f"{change.position.value:.2f}"
        short = f"A weight of the prefix, such as prefix_only with fraction {fraction}."
        kept = analysis.all_steps.cumulative_signal()[round(100 * change.position.value)]
        advice = f"prefix_only with fraction {fraction} would keep {kept.format()} of the signal."
    elif direction == "early":
        short = "A weight that decreases along the response, such as iw_opd."
    elif direction == "late" and prefix:
        short = "No weight of the prefix is suggested: uniform."
        left_out = Estimate(1 - prefix.value, 1 - prefix.high, 1 - prefix.low)
        advice = (
            f"prefix_only with fraction {PREFIX_PERCENT / 100:g} would leave out {left_out.format()} of the signal."
        )
    else:
        short = "No weight by position is suggested: uniform."
        advice = {
            "mixed": "The tests disagree on where the signal is.",
            "none found": "No position bias was found.",
        }.get(direction, "The position bias was not tested.")
    return short, " ".join(filter(None, [advice, _describe_own_weight(analysis), objective_note(analysis)]))


def _describe_own_weight(analysis: Analysis) -> str:
    if not analysis.all_steps.numbers.tokens:
        return ""
    table = analysis.weight_table()
    size = Estimate(*(table[f"effective_sample_size{end}"][0] for end in ("", "_low", "_high")))
    return (
        f"With {analysis.weights[0]} the run’s tokens are worth {size.format('.0%')} of as many equally weighted ones."
    )

"""What the numbers of an analysis say, in sentences made from them."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from opdctl.analysis.position_bias import BIAS_CONFIDENCE_LEVEL, MIN_RESPONSES, PREFIX_PERCENT, PositionBias
from opdctl.analysis.position_sums import GROUPS
from opdctl.analysis.results import Analysis, Phase, means, rows
from opdctl.analysis.samples import Sample
from opdctl.evaluation.stats import Estimate


def interval(found: Estimate, form: str = ".1%") -> str:
    """Return an estimate with its interval for a person."""
    if not math.isfinite(found.value):
        return "–" if math.isnan(found.value) else "none is enough"
    value, low = f"{found.value:{form}}", f"{found.low:{form}}"
    high = f"{found.high:{form}}" if math.isfinite(found.high) else "∞"
    return value if math.isnan(found.low) else f"{value} [{low}, {high}]"


def about(analysis: Analysis) -> str:
    numbers = analysis.whole.numbers
    left = f"; {len(analysis.left_out)} steps left out, since not wholly scored" if analysis.left_out else ""
    steps = "1 step" if len(analysis.steps) == 1 else f"{len(analysis.steps)} steps"
    return (
        f"{steps}, {numbers.responses:,} responses, {numbers.tokens:,} tokens; "
        f"token weight {analysis.weights[0]}{left}. Intervals are of 95 %, responses being the unit."
    )


def headline(verdict: PositionBias) -> str:
    """Return the verdict in a sentence."""
    if verdict.bias == "unknown" or verdict.share is None:
        return f"No verdict on a position bias: {verdict.reason}."
    holds = f"the first {PREFIX_PERCENT} % of a response hold {interval(verdict.share)} of"
    if verdict.bias == "none found":
        return f"No position bias found: {holds} the signal; without one they hold {PREFIX_PERCENT} %."
    p_value = _p(verdict.p_value or 0.0)
    return (
        f"The signal is biased {verdict.bias}: {holds} it; without a bias they hold {PREFIX_PERCENT} % (p {p_value})."
    )


def suggestions(verdict: PositionBias) -> list[str]:
    """Return where the signal changes and what that suggests, in sentences."""
    if verdict.bias == "unknown":
        return []
    said = []
    if drift := verdict.drift:
        said.append(
            f"It changes at {interval(drift.at, '.0%')} of the response: |A| is {drift.before:.3g} nats before and "
            f"{drift.after:.3g} after. A prefix weight would have this as its fraction."
        )
    else:
        said.append("No place is found where it changes.")
    if verdict.gamma and verdict.multiplier:
        said.append(_evening(verdict.gamma, verdict.multiplier))
    return said


def _evening(gamma: Estimate, multiplier: Estimate) -> str:
    if gamma.value == 0:
        return f"The first {PREFIX_PERCENT} % have more than their share as it is: nothing suggests to weigh them more (gamma 0)."
    boost = f"prefix_boost at fraction {PREFIX_PERCENT / 100:g} with multiplier {interval(multiplier, '.2f')}"
    if math.isinf(gamma.value):
        return f"No gamma of iw_opd would bring the first {PREFIX_PERCENT} % of the weighted signal to {PREFIX_PERCENT} %; {boost} would."
    wanted = f"iw_opd with gamma {interval(gamma, '.2f')}"
    return f"The first {PREFIX_PERCENT} % of the weighted signal come to {PREFIX_PERCENT} % under {wanted}, or {boost}."


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


RULES = (
    f"Share: Σ|A| over the first {PREFIX_PERCENT} % of each response's tokens, by Σ|A| over all of them. Flat, it is {PREFIX_PERCENT} % in "
    "expectation, whatever the lengths and levels of the responses. The interval is Fieller's, with the response as "
    f"its unit, or beyond {GROUPS} responses, groups of them.",
    f"Bias: claimed where the test of {PREFIX_PERCENT} % gives p < {1 - BIAS_CONFIDENCE_LEVEL:.2g}, from {MIN_RESPONSES} responses on; early where the "
    "share is greater, late where it is less. All steps are taken together.",
    "Change: the cut that best divides the response into two parts of different mean |A| (least squares), with the "
    "percentiles over resampled responses; shown where the gap is beyond 99 % of those under random signs. "
    "It is the fraction that the data suggest for prefix_only and prefix_boost.",
    f"Gamma of iw_opd, multiplier of prefix_boost: at which the first {PREFIX_PERCENT} % hold {PREFIX_PERCENT} % of the weighted signal "
    "Σ w|A|. This evens the signal; whether a student learns more from it, only training tells. The paper takes gamma "
    "0.5 throughout.",
)


def sentence(phase: Phase) -> str:
    """Return one sentence made from a phase's numbers."""
    numbers, found = phase.numbers, means(phase.numbers.whole)
    if not numbers.tokens:
        return f"{phase.name}: {numbers.responses} responses without a token."
    return (
        f"{phase.name}: {numbers.responses} responses, {numbers.tokens} tokens; a token differs by "
        f"{found['abs_advantage'].value:.4f} nats in the mean, reverse KL {found['k1'].value:.4f}; "
        f"{_holds(phase.share())}."
    )


def _holds(share: Estimate) -> str:
    if math.isnan(share.value):
        return "there is no discrepancy"
    return f"the first {PREFIX_PERCENT} % of the tokens hold {share.value:.0%} of the discrepancy"


def figure_captions(analysis: Analysis) -> dict[str, str]:
    """Return what each figure says, from its numbers."""
    said = {
        "position": " ".join(sentence(phase) for phase in analysis.phases),
        "spent": f"{headline(analysis.verdict)} {_half(analysis.whole)}",
        "prefix_logp": " ".join(_prefixes(phase) for phase in analysis.phases),
        "weights": "Effective sample: " + _left(analysis, ratios=False),
        "prefix_ratio": "Effective sample: " + _left(analysis, ratios=True),
        "entropy": "; ".join(_entropies(phase) for phase in analysis.phases) + ".",
    }
    if analysis.samples:
        said["one_response"] = _greatest(analysis.samples[0])
    if len(analysis.steps) > 1:
        first, last = analysis.steps[0], analysis.steps[-1]
        k1 = [interval(step.means["k1"], ".4f") for step in (first, last)]
        said["steps"] = (
            f"Reverse KL (k1) goes from {k1[0]} nats a token at step {first.step} to {k1[1]} at step {last.step}; the "
            f"first {PREFIX_PERCENT} % hold {interval(first.share)} of the signal, then {interval(last.share)}."
        )
        said["heat"] = (
            f"A token differs most {_most(first.signal_P)} at step {first.step}, "
            f"{_most(last.signal_P)} at step {last.step}."
        )
    if analysis.continuations:
        said["continuations"] = " ".join(map(continuations_sentence, analysis.continuations))
    if analysis.accuracy:
        said["accuracy"] = _accuracy_caption(analysis.accuracy)
    return said


def _half(phase: Phase) -> str:
    spent = [each.value for each in phase.spent()]
    place = next((percent for percent, value in enumerate(spent) if value >= 0.5), None)
    return "" if place is None else f"Half of it is spent after {place} % of the response."


def _prefixes(phase: Phase) -> str:
    sums = phase.numbers.position
    shown = np.flatnonzero(sums.responses_P >= max(2, phase.numbers.responses // 10))
    if not len(shown):
        return f"{phase.name}: too few responses."
    last = shown[-1]
    student, teacher = (sums.mean(f"{who}_prefix_logp")[last] for who in ("student", "teacher"))
    return (
        f"{phase.name}: a prefix of {last + 1} tokens has log-prob {student:.1f} under the student and {teacher:.1f} "
        "under the teacher."
    )


def _left(analysis: Analysis, *, ratios: bool) -> str:
    found = [row for row in rows(analysis.weight_table()) if row["weight"].startswith("prefix_ratio") == ratios]
    parts = [f"{row['weight']} {row['effective_sample']:.1%}" for row in found]
    return f"{', '.join(parts)} of the tokens."


def _entropies(phase: Phase) -> str:
    found, names = means(phase.numbers.whole), ("student_entropy", "teacher_entropy", "top_k_overlap")
    parts = [f"{name.replace('_', ' ')} {interval(found[name], '.3f')}" for name in names if name in found]
    return f"{phase.name}: {', '.join(parts)}"


def _greatest(sample: Sample) -> str:
    signal_T = np.abs(sample.tokens.advantage_T)
    most = int(signal_T.argmax())
    return (
        f"{sample.sample_id}, the response of median |A| at step {sample.step}: its greatest |A|, {signal_T[most]:.2f} "
        f"nats, is at token {most + 1} of {len(signal_T)}."
    )


def _most(signal_P: np.ndarray) -> str:
    if not np.isfinite(signal_P).any():
        return "nowhere"
    width = 100 // len(signal_P)
    most = int(np.nanargmax(signal_P)) * width
    return f"between {most} and {most + width} % of the response"


def continuations_sentence(found: Mapping[str, Any]) -> str:
    """Return what the continuations came to, in a sentence."""
    parts = []
    for name in dict.fromkeys(row["model"] for row in found["accuracy"]):
        own = [row for row in found["accuracy"] if row["model"] == name]
        ends = [
            f"{row['accuracy']:.1%} [{row['low']:.1%}, {row['high']:.1%}] from {row['percent']} %"
            for row in (own[0], own[-1])
        ]
        parts.append(f"{name} reaches {', '.join(ends)}")
    return f"Of {found['problems']} problems, going on from {found['student']}'s own responses: {'; '.join(parts)}."


def _accuracy_caption(found: Mapping[str, Any]) -> str:
    first, last = found["curve"][0], found["curve"][-1]
    teachers = ", ".join(f"{name} {value:.1%}" for name, value in found["teachers"].items())
    return (
        f"{found['bench']}: {first['accuracy']:.1%} at step {first['step']}, {last['accuracy']:.1%} at step "
        f"{last['step']}{f' ({teachers})' if teachers else ''}."
    )

"""The test of position bias: whether the signal depends on the position in the response, and where it changes.

The signal of a token is |A|. Without a bias, the first 30% of each response contain 30% of its signal in expectation,
whatever its length, its total signal and the correlation of its tokens. That is the null hypothesis. The unit of the
test is the prompt: responses to one prompt may all have their signal in the same place.

Two quantities are estimated: the fraction of the signal of all responses, which those with most of the signal decide,
and the mean of the responses' own fractions. Both with and without the responses that were truncated: these end before
their last part. The former is tested. A bias is one if the latter ones have it, too: their own error rate is not that
of a test, since the mean of fractions is 30% only without bursts of a signal that end at the end of a response.

Shape suffixes: see Notation in CONTRIBUTING.md.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from opdctl.analysis.bootstrap import GROUP_RESAMPLES, MIN_INTERVAL_PROMPTS, resample_groups
from opdctl.analysis.position_sums import PERCENT, PREFIX_PERCENT, SignalProfile
from opdctl.artifacts.manifests import BiasDirection
from opdctl.evaluation.statistics import CONFIDENCE_LEVEL, Estimate
from opdctl.losses.token_weights import Floats

BIAS_CONFIDENCE_LEVEL = 0.99
"""The confidence level of the tests of a bias and of a change point, and of the intervals beside them."""
MIN_PROMPTS = 20
"""The least number of prompts whose responses are tested."""
ROUNDING_ERROR = 1e-9  # relative to the signal: smaller differences are rounding errors of a uniform signal
MIN_SEGMENT_PERCENT = 5  # percent of the response before and after a change point, at least


@dataclass(frozen=True)
class ChangePoint:
    """The position at which the mean signal changes, as a fraction of the response.

    before, after: the mean signal in nats per token.
    """

    position: Estimate
    before: float
    after: float
    p_value: float


@dataclass(frozen=True)
class PrefixEstimate:
    """An estimate of the signal in the first 30% of a response, with its 99% interval.

    of: "signal", the fraction of the signal of all responses, or "response", the mean of the responses' own fractions.
    responses: "all", or the "complete" ones, which were not truncated. p_value: of the hypothesis that it is 30%; None
    with too few prompts.
    """

    of: Literal["signal", "response"]
    responses: Literal["all", "complete"]
    fraction: Estimate
    p_value: float | None

    @property
    def direction(self) -> BiasDirection:
        if self.p_value is None:
            return "unknown"
        if self.p_value > 1 - BIAS_CONFIDENCE_LEVEL:
            return "none found"
        return "late" if self.fraction.value < PREFIX_PERCENT / 100 else "early"


@dataclass(frozen=True)
class PositionBias:
    """The result of the test of position bias.

    prefix_fraction, p_value: of the signal of all responses. direction: that of its test; "mixed" if the other
    estimates do not have it, "unknown" with the `reason`. estimates: all. change_point: None if the signal has none.
    """

    direction: BiasDirection
    reason: str
    prefix_fraction: Estimate | None = None
    p_value: float | None = None
    change_point: ChangePoint | None = None
    estimates: tuple[PrefixEstimate, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON values, with None for a number that does not exist."""
        result: dict[str, Any] = finite_or_none(asdict(self))
        return result


def finite_or_none(value: Any) -> Any:
    """Return JSON values with None in place of NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite_or_none(each) for key, each in value.items()}
    return [finite_or_none(each) for each in value] if isinstance(value, (list, tuple)) else value


def common_direction(biases: Iterable[PositionBias]) -> BiasDirection:
    """Return the direction that all tests have that were made; "mixed" if they differ, "unknown" if there is none."""
    directions = {bias.direction for bias in biases} - {"unknown"}
    if len(directions) > 1:
        return "mixed"
    return next(iter(directions), "unknown")


def assess_bias(profile: SignalProfile) -> PositionBias:
    """Test whether a signal depends on the position in the response."""
    nonempty_G = profile.responses_G > 0
    signal_GQ, tokens_G = profile.signals["signal"][nonempty_G], profile.tokens_G[nonempty_G]
    if not signal_GQ.sum() > 0:
        return PositionBias("unknown", "teacher and student agree on every token, so there is no signal")
    estimates = tuple(_prefix_estimates(profile))
    first = estimates[0]
    if len(signal_GQ) < MIN_PROMPTS:
        why = f"responses to {len(signal_GQ)} prompts are too few, {MIN_PROMPTS} prompts are required"
        return PositionBias("unknown", why, first.fraction, estimates=estimates)
    if tokens_G.sum() <= profile.responses_G.sum():
        return PositionBias("unknown", "every response has a single token")
    others = {each.direction for each in estimates[1:]} - {"unknown"}
    is_agreed = first.direction == "none found" or others == {first.direction}
    direction: BiasDirection = first.direction if is_agreed else "mixed"
    change_point = find_change_point(signal_GQ, tokens_G)
    return PositionBias(direction, "", first.fraction, first.p_value, change_point, estimates)


def _prefix_estimates(profile: SignalProfile) -> Iterator[PrefixEstimate]:
    """Yield the estimates, that of the signal of all responses first; those of the complete ones if some but not all of
    the responses with a signal are complete."""
    complete_G4 = profile.prefixes["complete"]
    has_both = complete_G4.any() and not np.array_equal(profile.prefixes["all"], complete_G4)
    subsets: tuple[Literal["all", "complete"], ...] = ("all", "complete") if has_both else ("all",)
    for responses in subsets:
        sums_G4 = profile.prefixes[responses]
        is_used_G = (profile.responses_G if responses == "all" else sums_G4[:, 3]) > 0
        prefix_G, total_G, share_G, count_G = sums_G4[is_used_G].T
        has_enough = np.count_nonzero(is_used_G) >= MIN_PROMPTS
        pairs: dict[Literal["signal", "response"], tuple[Floats, Floats]] = {
            "signal": (prefix_G, total_G),
            "response": (share_G, count_G),
        }
        for of, (part_G, whole_G) in pairs.items():
            p_value = _p_value(part_G, whole_G) if has_enough else None
            yield PrefixEstimate(of, responses, _fraction(part_G, whole_G, BIAS_CONFIDENCE_LEVEL), p_value)


# ── Signal in the prefix ─────────────────────────────────────────────────────────────────────────────────────────────


def prefix_fraction(signal_GQ: Floats, percent: int = PREFIX_PERCENT, level: float = CONFIDENCE_LEVEL) -> Estimate:
    """Return the fraction of the signal in the first `percent` percent of the responses, with its interval."""
    return _fraction(signal_GQ[:, :percent].sum(1), signal_GQ.sum(1), level)


def mean_own_fraction(profile: SignalProfile) -> Estimate:
    """Return the mean of the responses' own fractions of their signal in the first 30%, with its 95% interval."""
    share_G, count_G = profile.prefixes["all"][profile.responses_G > 0, 2:].T
    return _fraction(share_G, count_G, CONFIDENCE_LEVEL)


def _fraction(prefix_G: Floats, total_G: Floats, level: float) -> Estimate:
    """Return the ratio of two sums over groups, with its interval at a confidence level.

    The interval inverts the test of each fraction f (Fieller 1954). With h the signal of a group's prefix and S all its
    signal, f is in the interval if the sum of h - f S over the groups is less than t times its root mean square from 0.
    The interval is [0, 1] if one group has most of the signal. There is none for fewer than MIN_INTERVAL_PROMPTS
    groups.
    """
    prefix, total = prefix_G.sum(), total_G.sum()
    if not total:
        return Estimate(math.nan, math.nan, math.nan)
    if len(total_G) < MIN_INTERVAL_PROMPTS:
        return Estimate(float(prefix / total), math.nan, math.nan)
    t2 = float(stats.t.ppf((1 + level) / 2, max(len(total_G) - 1, 1))) ** 2
    a = total**2 - t2 * (total_G @ total_G)
    b = prefix * total - t2 * (prefix_G @ total_G)
    c = prefix**2 - t2 * (prefix_G @ prefix_G)
    if a <= 0:
        return Estimate(float(prefix / total), 0.0, 1.0)
    root = math.sqrt(max(b**2 - a * c, 0.0))
    return Estimate(float(prefix / total), max(float((b - root) / a), 0.0), min(float((b + root) / a), 1.0))


def _p_value(part_G: Floats, whole_G: Floats) -> float:
    """Return the two-sided p-value of the null hypothesis that the ratio of two sums over groups is 30%."""
    excess_G = part_G - PREFIX_PERCENT / 100 * whole_G
    if np.abs(excess_G).max() <= ROUNDING_ERROR * whole_G.max():
        return 1.0
    return float(2 * stats.t.sf(abs(excess_G.sum()) / math.sqrt(excess_G @ excess_G), len(excess_G) - 1))


# ── Change point ─────────────────────────────────────────────────────────────────────────────────────────────────────


def find_change_point(signal_GQ: Floats, tokens_G: Floats) -> ChangePoint | None:
    """Return the position at which the signal changes from one mean to another, or None without a significant change.

    The position is the least-squares estimate for two means (Bai 1994): the cut u with the greatest
    |cumulative signal - u| / sqrt(u (1 - u)). Its interval is that of the percentiles over resampled groups, wider by
    one cut at each end: a change between two cuts is found at one of them. It extends to the end of the response if it
    includes the outermost cut, at which a change beyond it is found. The change is significant if this maximum exceeds
    its 99% quantile under random signs of the groups (wild bootstrap, Wu 1986).
    """
    cut_U = np.arange(MIN_SEGMENT_PERCENT, PERCENT - MIN_SEGMENT_PERCENT + 1)
    u_U, total_G = cut_U / PERCENT, signal_GQ.sum(1)
    gap_GU = np.cumsum(signal_GQ, 1)[:, cut_U - 1] - u_U * total_G[:, None]
    gap_GU /= np.sqrt(u_U * (1 - u_U))
    p_value = _max_gap_p_value(gap_GU, float(total_G.max()))
    if p_value > 1 - BIAS_CONFIDENCE_LEVEL:
        return None
    position_J = u_U[np.abs(resample_groups(gap_GU)).argmax(1)]
    low, high = np.quantile(position_J, [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2])
    low = 0.0 if low <= u_U[0] else low - 1 / PERCENT
    high = 1.0 if high >= u_U[-1] else high + 1 / PERCENT
    cut = int(cut_U[np.abs(gap_GU.sum(0)).argmax()])
    position, tokens, signal_before = cut / PERCENT, float(tokens_G.sum()), float(signal_GQ[:, :cut].sum())
    before = signal_before / (position * tokens)
    after = (float(total_G.sum()) - signal_before) / ((1 - position) * tokens)
    return ChangePoint(Estimate(position, float(low), float(high)), before, after, p_value)


def _max_gap_p_value(gap_GU: Floats, scale: float) -> float:
    if np.abs(gap_GU).max() <= ROUNDING_ERROR * scale:
        return 1.0
    sign_JG = np.random.default_rng(0).choice([-1.0, 1.0], (GROUP_RESAMPLES, len(gap_GU)))
    null_J = np.abs(sign_JG @ gap_GU).max(1)
    return float((1 + (null_J >= np.abs(gap_GU.sum(0)).max()).sum()) / (1 + GROUP_RESAMPLES))


# ── Weights ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def effective_sample_size(tokens_G: Floats, moments_G2: Floats) -> Estimate:
    """Return the effective sample size of a weight (Kish 1965) as a fraction of the N tokens: (Σ w)² / (N Σ w²).

    Its interval is that of the percentiles over resampled groups.
    """
    sums_GX = np.column_stack([tokens_G, moments_G2])

    def ratio(sums_JX: Floats) -> Floats:
        denominator_J = sums_JX[:, 0] * sums_JX[:, 2]
        return np.divide(sums_JX[:, 1] ** 2, denominator_J, out=np.zeros(len(sums_JX)), where=denominator_J > 0)

    value = float(ratio(sums_GX.sum(0)[None])[0])
    if len(sums_GX) < MIN_INTERVAL_PROMPTS:
        return Estimate(value, math.nan, math.nan)
    quantiles = [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2]
    low, high = np.quantile(ratio(resample_groups(sums_GX)), quantiles, method="nearest")
    return Estimate(value, float(low), float(high))

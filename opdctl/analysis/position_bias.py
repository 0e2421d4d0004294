"""The verdict of analyze-position: is the signal biased by position, how much, where it changes, what that suggests.

The signal of a token is |A|. Without a bias the first 30 % of each response hold 30 % of it in expectation, however
much signal one response has beside another, however long it is, and however its tokens are correlated: so it is the
null that is tested, response by response.

Shapes: G groups of responses, each a single response in a run of few; Q = 100 hundredths of the response, B resamples.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from opdctl.analysis.position_sums import PERCENT, SignalShares
from opdctl.evaluation.stats import CONFIDENCE_LEVEL, Estimate
from opdctl.losses.token_weights import Floats

PREFIX_PERCENT = 30
"""The hundredths of the response that are its beginning."""
BIAS_CONFIDENCE_LEVEL = 0.99
"""A bias or a drift is claimed where an interval of this level excludes that there is none."""
MIN_RESPONSES = 20  # responses with a signal: fewer bear no verdict
RESAMPLES = 2000
ROUNDING = 1e-9  # of the signal: a uniform one leaves errors of rounding, which no test must take for a bias
MIN_SEGMENT_PERCENT = 5  # hundredths at either end where no change is looked for


@dataclass(frozen=True)
class ChangePoint:
    """Where the signal changes, as a share of the response, and its mean in nats a token before and after."""

    at: Estimate
    before: float
    after: float
    p_value: float


@dataclass(frozen=True)
class PositionBias:
    """bias: "early", "late", "none found", or "unknown" with the `reason`. share: of the signal in the first 30 %.

    drift: where the signal changes, None where it is as good as flat; the fraction that the data suggest for a prefix
    weight is its place. gamma and multiplier: of the weights `iw_opd` and `prefix_boost` that bring the first 30 % of
    the weighted signal to 30 %; an infinite gamma says that none does.
    """

    bias: str
    reason: str
    share: Estimate | None = None
    p_value: float | None = None
    drift: ChangePoint | None = None
    gamma: Estimate | None = None
    multiplier: Estimate | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the verdict as JSON values, with the `fraction` that it suggests; an infinite number is None."""
        return _finite(asdict(self) | {"fraction": asdict(self.drift.at) if self.drift else None})


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def assess_bias(shares: SignalShares) -> PositionBias:
    """Return the verdict on the responses behind `shares`."""
    used_G = shares.responses_G > 0
    signal_GQ, unspent_GQ = shares.signals["signal"][used_G], shares.signals["unspent"][used_G]
    responses, tokens_G = int(shares.responses_G.sum()), shares.tokens_G[used_G]
    if not signal_GQ.sum() > 0:
        return PositionBias("unknown", "teacher and student agree on every token: there is no signal")
    if responses < MIN_RESPONSES:
        return PositionBias(
            "unknown", f"{responses} responses are too few: {MIN_RESPONSES} are needed", share(signal_GQ)
        )
    if tokens_G.sum() <= responses:
        return PositionBias("unknown", "the responses have one token each: they have no positions")
    found, p_value = share(signal_GQ), _p_of_share(signal_GQ)
    bias = (
        "none found"
        if p_value > 1 - BIAS_CONFIDENCE_LEVEL
        else "late"
        if found.value < PREFIX_PERCENT / 100
        else "early"
    )
    drift = find_change_point(signal_GQ, tokens_G)
    gamma, multiplier = (None, None) if bias == "none found" else balancing_hyperparameters(signal_GQ, unspent_GQ)
    return PositionBias(bias, "", found, p_value, drift, gamma, multiplier)


# ── The share of the beginning ───────────────────────────────────────────────────────────────────────────────────────


def share(signal_GQ: Floats, percent: int = PREFIX_PERCENT, level: float = CONFIDENCE_LEVEL) -> Estimate:
    """Return the share of the signal in the first hundredths, with the interval that the test of each share gives.

    s is in it where the sum of h - s S over the groups, h being the signal of their beginning and S all of it, is less
    than t of its own root mean square from 0 (Fieller 1954). Where one group holds most of the signal, that is [0, 1].
    """
    head_G, all_G = signal_GQ[:, :percent].sum(1), signal_GQ.sum(1)
    head, whole = head_G.sum(), all_G.sum()
    if not whole:
        return Estimate(math.nan, math.nan, math.nan)
    t2 = float(stats.t.ppf((1 + level) / 2, max(len(all_G) - 1, 1))) ** 2
    a = whole**2 - t2 * (all_G @ all_G)
    b = head * whole - t2 * (head_G @ all_G)
    c = head**2 - t2 * (head_G @ head_G)
    if a <= 0:
        return Estimate(head / whole, 0.0, 1.0)
    root = math.sqrt(max(b**2 - a * c, 0.0))
    return Estimate(head / whole, max((b - root) / a, 0.0), min((b + root) / a, 1.0))


def _p_of_share(signal_GQ: Floats) -> float:
    """Return the two-sided p-value of the null that the first 30 % hold 30 % of the signal."""
    excess_G = signal_GQ[:, :PREFIX_PERCENT].sum(1) - PREFIX_PERCENT / 100 * signal_GQ.sum(1)
    if np.abs(excess_G).max() <= ROUNDING * signal_GQ.sum(1).max():
        return 1.0
    return float(2 * stats.t.sf(abs(excess_G.sum()) / math.sqrt(excess_G @ excess_G), len(excess_G) - 1))


# ── Where the signal changes ─────────────────────────────────────────────────────────────────────────────────────────


def find_change_point(signal_GQ: Floats, tokens_G: Floats) -> ChangePoint | None:
    """Return where the signal changes from one mean to another, or None where it is as good as flat.

    The place is that of least squares for two means (Bai 1994): the greatest |spent - expected| / sqrt(u (1 - u)) over
    the cuts u, with the interval of the percentiles over resampled groups. It is a change where this is beyond the 99 %
    quantile of what it comes to when the groups' signs are drawn by lot (Wu 1986).
    """
    cuts_Q = np.arange(MIN_SEGMENT_PERCENT, PERCENT - MIN_SEGMENT_PERCENT + 1)
    u_Q, all_G = cuts_Q / PERCENT, signal_GQ.sum(1)
    gap_GQ = np.cumsum(signal_GQ, 1)[:, cuts_Q - 1] - u_Q * all_G[:, None]
    gap_GQ /= np.sqrt(u_Q * (1 - u_Q))
    p_value = _p_of_gaps(gap_GQ, float(all_G.max()))
    if p_value > 1 - BIAS_CONFIDENCE_LEVEL:
        return None
    place_B = u_Q[np.abs(resampled(gap_GQ)).argmax(1)]
    low, high = np.quantile(place_B, [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2])
    cut = int(cuts_Q[np.abs(gap_GQ.sum(0)).argmax()])
    at, tokens, spent = cut / PERCENT, float(tokens_G.sum()), float(signal_GQ[:, :cut].sum())
    before, after = spent / (at * tokens), (float(all_G.sum()) - spent) / ((1 - at) * tokens)
    return ChangePoint(Estimate(at, float(low), float(high)), before, after, p_value)


def _p_of_gaps(gap_GQ: Floats, scale: float) -> float:
    if np.abs(gap_GQ).max() <= ROUNDING * scale:
        return 1.0
    sign_BG = np.random.default_rng(0).choice([-1.0, 1.0], (RESAMPLES, len(gap_GQ)))
    null_B = np.abs(sign_BG @ gap_GQ).max(1)
    return float((1 + (null_B >= np.abs(gap_GQ.sum(0)).max()).sum()) / (1 + RESAMPLES))


def resampled(sums_GX: Floats) -> Floats:
    """Return the sums over RESAMPLES bootstrap samples of the groups, [B, X]."""
    groups = len(sums_GX)
    count_BG = np.random.default_rng(0).multinomial(groups, np.full(groups, 1 / groups), RESAMPLES)
    return count_BG.astype(np.float64) @ sums_GX


# ── What it suggests ─────────────────────────────────────────────────────────────────────────────────────────────────


def balancing_hyperparameters(signal_GQ: Floats, unspent_GQ: Floats) -> tuple[Estimate, Estimate]:
    """Return the gamma of `iw_opd`, and the multiplier of `prefix_boost` at fraction 0.3, that bring the share of the
    weighted signal in the first 30 % to 30 %.

    iw_opd makes |A| into |A| + gamma (1 - F) |A|, so with the sums h, S of the first and h', S' of the second
    gamma = (0.3 S - h) / (h' - 0.3 S'). The beginning that has its share already needs none: 0 and 1. Intervals are
    percentiles over resampled groups; infinity where no gamma is enough.
    """
    sums_GX = np.stack(
        [
            signal_GQ[:, :PREFIX_PERCENT].sum(1),
            signal_GQ.sum(1),
            unspent_GQ[:, :PREFIX_PERCENT].sum(1),
            unspent_GQ.sum(1),
        ],
        axis=1,
    )
    whole_X, drawn_BX = sums_GX.sum(0)[None], resampled(sums_GX)
    return _estimate(_gamma(whole_X)[0], _gamma(drawn_BX)), _estimate(_multiplier(whole_X)[0], _multiplier(drawn_BX))


def _gamma(sums_BX: Floats) -> Floats:
    head_B, whole_B, unspent_head_B, unspent_B = sums_BX.T
    lacks_B, gains_B = PREFIX_PERCENT / 100 * whole_B - head_B, unspent_head_B - PREFIX_PERCENT / 100 * unspent_B
    found_B = np.divide(lacks_B, gains_B, out=np.full_like(lacks_B, np.inf), where=gains_B > 0)
    return np.where(lacks_B <= 0, 0.0, found_B)


def _multiplier(sums_BX: Floats) -> Floats:
    head_B, whole_B = sums_BX[:, 0], sums_BX[:, 1]
    wanted_B, has_B = PREFIX_PERCENT * (whole_B - head_B), (100 - PREFIX_PERCENT) * head_B
    found_B = np.divide(wanted_B, has_B, out=np.full_like(head_B, np.inf), where=has_B > 0)
    return np.maximum(found_B, 1.0)


def _estimate(value: float, drawn_B: Floats) -> Estimate:
    low, high = np.quantile(
        drawn_B, [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2], method="nearest"
    )  # some may be infinite
    return Estimate(float(value), float(low), float(high))


# ── Weights ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def effective_sample(tokens_G: Floats, moments_G2: Floats) -> Estimate:
    """Return the effective sample size (Kish 1965) of a weight as a share of the tokens: (Σ w)² / (N Σ w²).

    The interval is that of the percentiles over resampled groups.
    """
    sums_GX = np.column_stack([tokens_G, moments_G2])

    def ratio(sums_BX: Floats) -> Floats:
        below_B = sums_BX[:, 0] * sums_BX[:, 2]
        return np.divide(sums_BX[:, 1] ** 2, below_B, out=np.zeros(len(sums_BX)), where=below_B > 0)

    return _estimate(ratio(sums_GX.sum(0)[None])[0], ratio(resampled(sums_GX)))

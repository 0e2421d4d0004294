"""An independent recount of an analysis from the files of a run: loops in float64, with formulas written here.

It uses no reader, token weight or statistic of opdctl. docs/analysis.md and docs/methods.md have the definitions.
"""

import json
import math
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from safetensors import safe_open
from scipy import optimize, stats

GROUPS = 200
MIN_INTERVAL_GROUPS = 10
BINS = 20
RESAMPLES = 1000
SEED = 12345  # not that of opdctl
MIN_SEGMENT = 5  # percent


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Recorded:
    """A scored response: the student's own tokens only. values: of each token, by quantity, weights included."""

    step: int
    sample_id: str
    prompt_id: str
    is_truncated: bool
    ids: list[int]
    values: dict[str, list[float]]
    group: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def signal(self) -> list[float]:
        return self.values["abs_advantage"]


@dataclass
class RecordedRun:
    """The scored responses of a run in order, and its other records."""

    path: Path
    responses: list[Recorded]
    skipped: list[int]
    recipe: dict[str, Any]
    updates: dict[int, dict[str, Any]] = field(default_factory=dict)

    @property
    def steps(self) -> list[int]:
        return sorted({response.step for response in self.responses})

    def of_steps(self, steps: Sequence[int]) -> list[Recorded]:
        return [response for response in self.responses if response.step in steps]


def read_run(path: Path) -> RecordedRun:
    """Read the responses of each step whose rollout and scores have a manifest."""
    run = RecordedRun(path, [], [], tomllib.loads((path / "recipe.toml").read_text()))
    for folder in sorted(path.glob("step-*")):
        step = int(folder.name.removeprefix("step-"))
        if (folder / "update.json").exists():
            run.updates[step] = json.loads((folder / "update.json").read_text())
        stages = [folder / "rollout", *folder.glob("teacher*")]
        if len(stages) > 1 and all((stage / "manifest.json").exists() for stage in stages):
            run.responses += _read_step(folder, step)
        elif (folder / "rollout").exists():
            run.skipped.append(step)
    numbers: dict[str, int] = {}
    for response in run.responses:
        response.group = numbers.setdefault(response.prompt_id, len(numbers)) % GROUPS
    return run


def _read_step(folder: Path, step: int) -> Iterator[Recorded]:
    scores: dict[str, dict[str, list[Any]]] = {}
    for part in sorted(folder.glob("teacher*/part-*.safetensors")):
        with safe_open(part, "np") as file:
            sample_ids = json.loads(file.metadata()["opdctl"])["sample_ids"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dictionary
        offsets = tensors.pop("offsets")
        for index, sample_id in enumerate(sample_ids):
            span = slice(offsets[index], offsets[index + 1])
            scores[sample_id] = {name: tensor[span].tolist() for name, tensor in tensors.items()}
    for part in sorted(folder.glob("rollout/part-*.parquet")):
        for row in pq.read_table(part).to_pylist():
            yield _read_response(step, row, scores[row["sample_id"]])


def _read_response(step: int, row: Mapping[str, Any], scores: Mapping[str, list[Any]]) -> Recorded:
    length = len(row["response_ids"])
    mask = row.get("loss_mask") or [True] * length
    own = [t for t in range(length) if mask[t]]
    student, teacher = ([column[t] for t in own] for column in (row["logprobs"], scores["logprobs"]))
    advantage = [b - a for a, b in zip(student, teacher, strict=True)]
    values = {
        "abs_advantage": [abs(a) for a in advantage],
        "k1": [-a for a in advantage],
        "k3": [math.exp(a) - 1 - a for a in advantage],
        "student_logp": student,
        "teacher_logp": teacher,
    }
    if row["entropies"] is not None:
        values["student_entropy"] = [row["entropies"][t] for t in own]
    if "entropies" in scores:
        values["teacher_entropy"] = [scores["entropies"][t] for t in own]
    if row["top_ids"] is not None and "top_ids" in scores:
        width = len(row["top_ids"]) // max(length, 1)
        overlaps = [len({*row["top_ids"][t * width : (t + 1) * width]} & {*scores["top_ids"][t]}) for t in own]
        values["top_k_overlap"] = [overlap / width for overlap in overlaps]
    ids = [row["response_ids"][t] for t in own]
    return Recorded(step, row["sample_id"], row["prompt_id"], row["finish_reason"] == "length", ids, values)


# ── Token weights ────────────────────────────────────────────────────────────────────────────────────────────────────


def add_weight(run: RecordedRun, label: str, component: Callable[[int], Mapping[str, Any]] | None = None) -> None:
    """Add the weights of all tokens by a label such as `iw_opd gamma=1`, or by the weight of each step."""
    for step in run.steps:
        responses = run.of_steps([step])
        settings = component(step) if component else parse_label(label)
        for response, weights in zip(responses, _weigh(settings, responses), strict=True):
            response.values[label] = weights


def trained_weight(run: RecordedRun, step: int) -> dict[str, Any]:
    """Return the weight that a step was trained with; that of the recipe without an update."""
    settings = run.updates.get(step, {}).get("settings") or {}
    recorded = {key.removeprefix("weight."): value for key, value in settings.items() if key.startswith("weight.")}
    return recorded or dict(run.recipe["weight"])


def parse_label(label: str) -> dict[str, Any]:
    name, *settings = label.split()
    pairs = (setting.split("=") for setting in settings)
    return {"name": name} | {
        key: value == "true" if value in ("true", "false") else float(value) for key, value in pairs
    }


def _weigh(settings: Mapping[str, Any], responses: Sequence[Recorded]) -> list[list[float]]:
    if settings["name"] == "prefix_ratio":
        return _prefix_ratios(settings.get("alpha", 0.001), responses)
    formula = {"uniform": _uniform, "iw_opd": _iw_opd, "linear_decay": _linear_decay}[settings["name"]]
    return [formula(settings, response) for response in responses]


def _uniform(settings: Mapping[str, Any], response: Recorded) -> list[float]:
    return [1.0] * len(response)


def _linear_decay(settings: Mapping[str, Any], response: Recorded) -> list[float]:
    n = len(response)
    return [1 + settings.get("gamma", 0.5) * (1 - (t / (n - 1) if n > 1 else 0)) for t in range(n)]


def _iw_opd(settings: Mapping[str, Any], response: Recorded) -> list[float]:
    is_signed = settings.get("signed", False)
    terms = [-k1 for k1 in response.values["k1"]] if is_signed else response.signal
    total, gamma, floor = math.fsum(terms), settings.get("gamma", 0.5), settings.get("floor", 1.0)
    if not total:
        return [floor + gamma] * len(response)
    fractions = (math.fsum(terms[:t]) / total for t in range(len(response)))
    return [floor + gamma * (1 - min(max(fraction, 0.0), 1.0)) for fraction in fractions]


def _prefix_ratios(alpha: float, responses: Sequence[Recorded]) -> list[list[float]]:
    """Return exp(alpha Σ of A before), divided by the mean over the responses that reach the position."""
    ratios = [
        [math.exp(alpha * math.fsum(-k1 for k1 in response.values["k1"][:t])) for t in range(len(response))]
        for response in responses
    ]
    longest = max(map(len, ratios), default=0)
    reached = [[ratio[t] for ratio in ratios if t < len(ratio)] for t in range(longest)]
    return [[r * len(reached[t]) / math.fsum(reached[t]) for t, r in enumerate(ratio)] for ratio in ratios]


# ── Bins ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

Share = tuple[int, int, float]
"""A token, a bin, and the share of the token that is in it."""


def overall_share(length: int) -> Iterator[Share]:
    return ((t, 0, 1.0) for t in range(length))


def relative_shares(length: int, bins: int = BINS) -> Iterator[Share]:
    """Token t of n, from 0, covers the part of the response from t/n to (t + 1)/n."""
    for t in range(length):
        for b in range(t * bins // length, ((t + 1) * bins - 1) // length + 1):
            overlap = min((t + 1) * bins, (b + 1) * length) - max(t * bins, b * length)
            yield t, b, overlap / bins


def position_bins(longest: int) -> list[tuple[int, int]]:
    """Return the first and the last position of each bin, from 1: single positions below 32, then 16 an octave. None
    ends after the longest response."""
    bins = [(position, position) for position in range(1, min(longest, 31) + 1)]
    start = 32
    while start <= longest:
        width = start // 16
        bins += [(p, min(p + width - 1, longest)) for p in range(start, 2 * start, width) if p <= longest]
        start *= 2
    return bins


def position_shares(length: int) -> Iterator[Share]:
    for number, (first, last) in enumerate(position_bins(length)):
        yield from ((position - 1, number, 1.0) for position in range(first, min(last, length) + 1))


# ── Means ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Means:
    """The means of quantities by bin, with their intervals, and what they rest on.

    Arrays are [bins] or [bins, quantities]; for `bounds` see `percentile_ranges`. least, greatest: of the values of the
    tokens in the bin.
    """

    names: list[str]
    tokens: np.ndarray
    responses: np.ndarray
    prompts: np.ndarray
    value: np.ndarray
    bounds: np.ndarray
    least: np.ndarray
    greatest: np.ndarray


def count_means(responses: Sequence[Recorded], shares: Callable[[int], Iterator[Share]], names: Sequence[str]) -> Means:
    """Return the mean of each quantity in each bin: Σ value / Σ tokens, with the groups of prompts as the unit."""
    size = max((b for response in responses for _, b, _ in shares(len(response))), default=-1) + 1
    tokens, sums = np.zeros((GROUPS, size)), np.zeros((GROUPS, size, len(names)))
    least, greatest = np.full((size, len(names)), np.inf), np.full((size, len(names)), -np.inf)
    reached: list[set[int]] = [set() for _ in range(size)]
    prompts: list[set[str]] = [set() for _ in range(size)]
    for number, response in enumerate(responses):
        rows = np.array([response.values[name] for name in names]).T
        for t, b, share in shares(len(response)):
            tokens[response.group, b] += share
            sums[response.group, b] += share * rows[t]
            least[b], greatest[b] = np.minimum(least[b], rows[t]), np.maximum(greatest[b], rows[t])
            reached[b].add(number)
            prompts[b].add(response.prompt_id)
    groups = sorted({response.group for response in responses if len(response)})
    return Means(
        list(names),
        tokens.sum(0),
        np.array([len(each) for each in reached]),
        np.array([len(each) for each in prompts]),
        sums.sum(0) / tokens.sum(0)[:, None],
        _bootstrap_means(tokens, sums, groups),
        least,
        greatest,
    )


def _bootstrap_means(
    tokens: np.ndarray, sums: np.ndarray, groups: list[int], widths: np.ndarray | None = None
) -> np.ndarray:
    """Return the ranges of the bounds of means over bootstrap samples of the groups, NaN with fewer than ten groups.

    The percentiles are those of Student's t for the number of groups (Hesterberg 2015). widths: the bounds are those of
    the cumulated means times widths.
    """
    size, names = sums.shape[1:]
    bounds = np.full((4, size, names), np.nan)
    if not groups:
        return bounds
    counts = resample(len(groups))
    sampled = (counts @ sums[groups].reshape(len(groups), -1)).reshape(RESAMPLES, size, names)
    sampled_tokens = (counts @ tokens[groups])[:, :, None]
    overall = sums.sum(0) / tokens.sum(0)[:, None]
    means = np.where(sampled_tokens > 0, sampled / np.maximum(sampled_tokens, 1e-300), overall)
    if widths is not None:
        means = np.cumsum(means * widths[:, None], axis=1)
    for b, count in enumerate((tokens > 0).sum(0)):
        if count >= MIN_INTERVAL_GROUPS:
            tail = stats.norm.cdf(stats.t.ppf(0.025, count - 1) * math.sqrt(count / (count - 1)))
            bounds[:, b] = percentile_ranges(means[:, b], float(tail))
    return bounds


def percentile_ranges(sampled: np.ndarray, tail: float = 0.025) -> np.ndarray:
    """Return the least and the greatest value that the low bound of another bootstrap has but for chance, and those of
    the high bound, [4, …].

    sampled: [samples, …]. The share of the samples below a bound differs by its standard error. Near no sample a bound
    has no limit.
    """
    error = 7 * math.sqrt(tail * (1 - tail) * (1 / RESAMPLES + 1 / 1000)) + 0.002
    levels = (tail - error, tail + error, 1 - tail - error, 1 - tail + error)
    ordered, last = np.sort(sampled, axis=0), len(sampled) - 1
    ranges = [ordered[round(min(max(level, 0.0), 1.0) * last)] for level in levels]
    if levels[0] <= 0:
        ranges[0], ranges[3] = np.full_like(ranges[0], -np.inf), np.full_like(ranges[3], np.inf)
    return np.stack(ranges)


def resample(groups: int) -> np.ndarray:
    """Return how often each group is in each bootstrap sample, [samples, groups]."""
    rng = np.random.default_rng(SEED)
    drawn = rng.integers(0, groups, (RESAMPLES, groups))
    return np.stack([(drawn == number).sum(1) for number in range(groups)], axis=1).astype(float)


def cumulative_logp(responses: Sequence[Recorded], model: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the cumulated mean log-probs up to the end of each position bin, with the ranges of their bounds."""
    bins = position_bins(max(map(len, responses)))
    widths = np.array([last - first + 1.0 for first, last in bins])
    tokens, sums = np.zeros((GROUPS, len(bins))), np.zeros((GROUPS, len(bins), 1))
    for response in responses:
        for t, b, _ in position_shares(len(response)):
            tokens[response.group, b] += 1
            sums[response.group, b, 0] += response.values[f"{model}_logp"][t]
    groups = sorted({response.group for response in responses if len(response)})
    bounds = _bootstrap_means(tokens, sums, groups, widths)
    return np.cumsum(sums.sum(0)[:, 0] / tokens.sum(0) * widths), bounds[:, :, 0]


def long_responses(responses: Sequence[Recorded]) -> tuple[int, list[Recorded]]:
    """Return the greatest power of two of tokens that at least half of the responses with a token have, and the
    responses with at least so many."""
    nonempty = [response for response in responses if len(response)]
    size = 1
    while sum(len(response) >= 2 * size for response in nonempty) >= len(nonempty) / 2:
        size *= 2
    return size, [response for response in nonempty if len(response) >= size]


def shown_bins(responses: Sequence[Recorded]) -> int:
    """Return the number of position bins that a tenth of the responses and two of them reach."""
    bins = position_bins(max(map(len, responses), default=0))
    least = max(2.0, len(responses) / 10)
    return sum(sum(len(response) >= first for response in responses) >= least for first, _ in bins)


def omitted_fractions(responses: Sequence[Recorded]) -> tuple[float, float]:
    """Return the fractions of the tokens and of the signal in the other bins."""
    shown = [last for _, last in position_bins(max(map(len, responses), default=0))[: shown_bins(responses)]]
    end = shown[-1] if shown else 0
    tokens = sum(len(response) for response in responses)
    signal = math.fsum(value for response in responses for value in response.signal)
    left_out = math.fsum(value for response in responses for value in response.signal[end:])
    return sum(max(len(response) - end, 0) for response in responses) / tokens, left_out / signal if signal else 0.0


def position_quantiles(
    responses: Sequence[Recorded], weight: str, first: int, last: int, fraction: float
) -> tuple[float, float]:
    """Return the weights next to a quantile over the tokens at some positions: the quantile is between them."""
    values = sorted(w for response in responses for w in response.values[weight][first - 1 : last])
    place = fraction * len(values)
    return values[max(math.ceil(place) - 1, 0)], values[min(math.floor(place), len(values) - 1)]


def sample_size_at(responses: Sequence[Recorded], weight: str, first: int, last: int) -> float:
    """Return the effective sample size of a weight at some positions, (Σ w)² / (n Σ w²)."""
    values = [w for response in responses for w in response.values[weight][first - 1 : last]]
    squares = math.fsum(w * w for w in values)
    return math.fsum(values) ** 2 / (len(values) * squares) if squares else 0.0


def cohorts(responses: Sequence[Recorded]) -> dict[str, list[Recorded]]:
    """Return the length cohorts with at least 5% of the responses and two of them, by label."""
    members: dict[str, list[Recorded]] = {}
    for response in responses:
        start = 2 ** (len(response).bit_length() - 1) if len(response) else 0
        label = f"{start}–{2 * start - 1} tokens" if start > 1 else "1 token"
        if start:
            members.setdefault("truncated" if response.is_truncated else label, []).append(response)
    return {label: each for label, each in members.items() if len(each) >= max(2, 0.05 * len(responses))}


# ── Fractions of the signal ──────────────────────────────────────────────────────────────────────────────────────────


def signal_before(values: Sequence[float], percent: int) -> float:
    """Return the sum of the values in the first percent of a response; a token at the cut counts in proportion."""
    end = len(values) * percent / 100
    whole = len(values) * percent // 100
    return math.fsum(values[:whole]) + (end - whole) * (values[whole] if whole < len(values) else 0.0)


def by_group(responses: Sequence[Recorded], number: Callable[[Recorded], float]) -> np.ndarray:
    """Return the sums of a number of the responses, of each group that has a response."""
    sums: dict[int, float] = {}
    for response in responses:
        sums[response.group] = sums.get(response.group, 0.0) + number(response)
    return np.array([sums[group] for group in sorted(sums)])


def fieller(part: np.ndarray, whole: np.ndarray, level: float) -> tuple[float, float, float]:
    """Return Σ part / Σ whole, and the fractions f in [0, 1] at which a t-test of Σ (part - f whole) = 0 passes."""
    if not whole.sum():
        return math.nan, math.nan, math.nan
    value = part.sum() / whole.sum()
    limit = stats.t.ppf((1 + level) / 2, max(len(whole) - 1, 1))

    def excess(f: float) -> float:
        difference = part - f * whole
        return float(abs(difference.sum()) - limit * math.sqrt((difference**2).sum()))

    if len(whole) < MIN_INTERVAL_GROUPS:
        return value, math.nan, math.nan
    if whole.sum() ** 2 <= limit**2 * (whole**2).sum():
        return value, 0.0, 1.0
    low, high = value, value
    if excess(value) < 0:
        low = optimize.brentq(excess, 0, value, xtol=1e-14) if excess(0.0) > 0 else 0.0
        high = optimize.brentq(excess, value, 1, xtol=1e-14) if excess(1.0) > 0 else 1.0
    return value, low, high


def prefix_fraction(
    responses: Sequence[Recorded], percent: int = 30, level: float = 0.95, weight: str | None = None
) -> tuple[float, float, float]:
    """Return the fraction of the signal in the first percent of the responses, with Fieller's interval."""

    def signal(response: Recorded) -> list[float]:
        if not weight:
            return response.signal
        return [factor * value for factor, value in zip(response.values[weight], response.signal, strict=True)]

    part = by_group(responses, lambda each: signal_before(signal(each), percent))
    return fieller(part, by_group(responses, lambda each: math.fsum(signal(each))), level)


def own_fraction(responses: Sequence[Recorded], level: float = 0.95) -> tuple[float, float, float]:
    """Return the mean of the responses' own fractions of the signal in the first 30%, with Fieller's interval."""
    part = by_group(responses, lambda e: signal_before(e.signal, 30) / math.fsum(e.signal) if sum(e.signal) else 0.0)
    return fieller(part, by_group(responses, lambda each: float(sum(each.signal) > 0)), level)


def prefix_p_value(part: np.ndarray, whole: np.ndarray) -> float:
    """Return the two-sided p-value of Σ part / Σ whole = 30%, by the ratio of a sum to its root mean square. NaN
    with fewer than 20 groups."""
    if len(whole) < 20:
        return math.nan
    excess = part - 0.3 * whole
    t = abs(excess.sum()) / math.sqrt((excess**2).sum())
    return float(2 * stats.t.sf(t, len(excess) - 1))


def prefix_estimates(responses: Sequence[Recorded]) -> list[dict[str, Any]]:
    """Return the estimates of the test of position bias, in the form of summary.json."""
    complete = [response for response in responses if not response.is_truncated]
    subsets = {"all": responses}
    if len({response.is_truncated for response in responses if sum(response.signal)}) == 2:
        subsets["complete"] = complete
    estimates = []
    for name, subset in subsets.items():
        with_signal = [response for response in subset if sum(response.signal)]
        # A group without a signal counts for the fraction of the signal of all responses, as a difference of 0.
        used = subset if name == "all" else [each for each in subset if each.group in {r.group for r in with_signal}]
        pairs = {
            "signal": (
                by_group(used, lambda each: signal_before(each.signal, 30)),
                by_group(used, lambda each: math.fsum(each.signal)),
            ),
            "response": (
                by_group(used, lambda e: signal_before(e.signal, 30) / math.fsum(e.signal) if sum(e.signal) else 0.0),
                by_group(used, lambda each: float(sum(each.signal) > 0)),
            ),
        }
        for of, (part, whole) in pairs.items():
            fraction = fieller(part, whole, 0.99)
            estimates.append(
                {"of": of, "responses": name, "fraction": fraction, "p_value": prefix_p_value(part, whole)}
            )
    return estimates


def direction(responses: Sequence[Recorded]) -> str:
    """Return the direction that all estimates have: "mixed" if they disagree, "unknown" where none is tested."""
    first, *others = (_estimate_direction(each) for each in prefix_estimates(responses))
    if first == "none found" or {*others} - {"unknown"} <= {first}:
        return first
    return "mixed"


def _estimate_direction(estimate: Mapping[str, Any]) -> str:
    if math.isnan(estimate["p_value"]):
        return "unknown"
    if estimate["p_value"] > 0.01:
        return "none found"
    return "late" if estimate["fraction"][0] < 0.3 else "early"


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> tuple[float, float, float]:
    """Return the ratio of two independent means with Fieller's interval, from their values and intervals."""
    (b, *ends_b), (a, *ends_a) = numerator, denominator
    half_b, half_a = (ends_b[1] - ends_b[0]) / 2, (ends_a[1] - ends_a[0]) / 2
    if not half_a < abs(a):
        return b / a, math.nan, math.nan
    # (b - f a)² = half_b² + f² half_a²
    low, high = sorted(np.roots([a * a - half_a**2, -2 * a * b, b * b - half_b**2]).real)
    return b / a, low, high


# ── Change point ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class ChangePoint:
    """The cut that best divides the responses, the means before and after it, and the p-value of the wild bootstrap.

    lows, highs: ranges of the bounds of the interval.
    """

    position: float
    lows: list[float]
    highs: list[float]
    before: float
    after: float
    p_value: float


def change_point(responses: Sequence[Recorded]) -> ChangePoint:
    cuts = range(MIN_SEGMENT, 100 - MIN_SEGMENT + 1)
    total = by_group(responses, lambda each: math.fsum(each.signal))
    before = {cut: by_group(responses, lambda each, cut=cut: signal_before(each.signal, cut)) for cut in cuts}
    gaps = np.stack([(before[c] - c / 100 * total) / math.sqrt(c / 100 * (1 - c / 100)) for c in cuts], axis=1)
    best = cuts[int(np.abs(gaps.sum(0)).argmax())]
    tokens = sum(map(len, responses))
    signs = np.random.default_rng(SEED).integers(0, 2, (RESAMPLES, len(gaps))) * 2 - 1
    exceeded = (np.abs(signs @ gaps).max(1) >= np.abs(gaps.sum(0)).max()).sum()
    positions = np.array(cuts)[np.abs(resample(len(gaps)) @ gaps).argmax(1)] / 100
    ranges = percentile_ranges(positions)
    return ChangePoint(
        best / 100,
        [low - 0.01 if low > 0.05 else 0.0 for low in ranges[:2]],
        [high + 0.01 if high < 0.95 else 1.0 for high in ranges[2:]],
        before[best].sum() / (best / 100 * tokens),
        (total.sum() - before[best].sum()) / ((1 - best / 100) * tokens),
        float((1 + exceeded) / (1 + RESAMPLES)),
    )


# ── Weights and correlations ─────────────────────────────────────────────────────────────────────────────────────────


def effective_sample_size(responses: Sequence[Recorded], weight: str) -> tuple[float, np.ndarray]:
    """Return (Σ w)² / (N Σ w²) with the ranges of its bounds."""
    sums = np.stack(
        [
            by_group(responses, len),
            by_group(responses, lambda each: math.fsum(each.values[weight])),
            by_group(responses, lambda each: math.fsum(w * w for w in each.values[weight])),
        ],
        axis=1,
    )
    tokens, first, second = sums.sum(0)
    if not second or len(sums) < MIN_INTERVAL_GROUPS:
        return first**2 / (tokens * second) if second else 0.0, np.full(4, math.nan)
    sampled = resample(len(sums)) @ sums
    sizes = sampled[:, 1] ** 2 / (sampled[:, 0] * sampled[:, 2])
    return first**2 / (tokens * second), percentile_ranges(sizes)


def token_columns(responses: Sequence[Recorded]) -> dict[str, np.ndarray]:
    """Return |A| and the properties of all tokens."""
    counts: dict[int, int] = {}
    for response in responses:
        for token in response.ids:
            counts[token] = counts.get(token, 0) + 1
    names = ["abs_advantage", "teacher_logp", "student_logp"]
    names += [name for name in ("teacher_entropy", "student_entropy") if name in responses[0].values]
    columns = {name: [value for response in responses for value in response.values[name]] for name in names}
    columns["position"] = [t for response in responses for t in range(len(response))]
    columns["relative_position"] = [t / len(response) for response in responses for t in range(len(response))]
    columns["token_frequency"] = [counts[token] for response in responses for token in response.ids]
    return {name: np.array(values, float) for name, values in columns.items()}


def rank_correlations(responses: Sequence[Recorded]) -> dict[str, tuple[float, float]]:
    """Return the rank correlation of |A| with each property: Spearman's, and that of the rests of regressions of the
    ranks on those of all other properties. NaN where a rest is 0."""
    columns = token_columns(responses)
    ranks = {name: stats.rankdata(values) for name, values in columns.items()}
    result = {}
    for name in list(columns)[1:]:
        is_constant = min(np.ptp(columns[name]), np.ptp(columns["abs_advantage"])) == 0
        raw = math.nan if is_constant else stats.spearmanr(columns["abs_advantage"], columns[name]).statistic
        others = [ranks[other] for other in columns if other not in ("abs_advantage", name)]
        result[name] = float(raw), _partial_correlation(ranks["abs_advantage"], ranks[name], others)
    return result


def _partial_correlation(first: np.ndarray, second: np.ndarray, others: Sequence[np.ndarray]) -> float:
    scaled = [(other - other.mean()) / (other.std() or 1.0) for other in others]
    design = np.stack([np.ones(len(first)), *scaled], axis=1)
    rests = []
    for values in (first, second):
        rest = values - design @ np.linalg.lstsq(design, values, rcond=1e-9)[0]
        if (rest**2).mean() <= 1e-6 * values.var() or not values.var():
            return math.nan
        rests.append(rest)
    return float(np.corrcoef(rests)[0, 1])


# ── Metrics ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def overall_means(responses: Sequence[Recorded], names: Sequence[str]) -> dict[str, float]:
    """Return the means of quantities over all tokens."""
    tokens = sum(map(len, responses))
    return {name: math.fsum(v for response in responses for v in response.values[name]) / tokens for name in names}


def step_metrics(responses: Sequence[Recorded]) -> dict[str, float]:
    """Return the statistics of a step's responses in metrics.jsonl."""
    tokens = sum(map(len, responses))
    signal = sorted(value for response in responses for value in response.signal)
    metrics = {
        "responses": len(responses),
        "tokens": tokens,
        "response_length": tokens / len(responses),
        "truncated_fraction": sum(response.is_truncated for response in responses) / len(responses),
    }
    for percent in (50, 90, 99):
        place = (tokens - 1) * percent / 100
        low, high = signal[math.floor(place)], signal[math.ceil(place)]
        metrics[f"abs_advantage_p{percent}"] = low + (place - math.floor(place)) * (high - low)
    if "top_k_overlap" in responses[0].values:
        metrics |= overall_means(responses, ["top_k_overlap"])
    return metrics


# ── Continuations ────────────────────────────────────────────────────────────────────────────────────────────────────


def continuation_rows(folder: Path, is_on_track: Callable[[str], bool]) -> list[dict[str, Any]]:
    """Return the rows of the table of a step's continuations, one sample of each prefix by each model."""
    rows: list[dict[str, Any]] = []
    graded = [
        (part.parent.name, row)
        for part in sorted(folder.glob("*/part-*.parquet"))
        for row in pq.read_table(part).to_pylist()
    ]
    kinds = {"any": None, "right so far": True, "gone wrong": False}
    for prefix, on_track in kinds.items():
        for model, label in sorted({(model, row["sample_id"].split("/")[-2]) for model, row in graded}):
            chosen = [
                row
                for name, row in graded
                if (name, row["sample_id"].split("/")[-2]) == (model, label)
                and on_track in (None, is_on_track(row["sample_id"]))
            ]
            if chosen:
                is_percent = label.isdecimal()
                length = int(label.removesuffix("-tokens"))
                place = {"percent": length if is_percent else None, "tokens": None if is_percent else length}
                rows.append({"prefix": prefix, "model": model, **place, **_accuracy(chosen)})
    return rows


def _accuracy(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the accuracy of single samples of problems, with the interval of Agresti and Coull (1998)."""
    n, z = len(rows), stats.norm.ppf(0.975)
    correct = sum(row["correct"] for row in rows)
    truncated = sum(row["finish_reason"] == "length" for row in rows)
    center = (correct + z**2 / 2) / (n + z**2)
    half = z * math.sqrt(center * (1 - center) / (n + z**2))
    bounds = {"low": max(center - half, 0.0), "high": min(center + half, 1.0)}
    return {"problems": n, "responses": n, "accuracy": correct / n, **bounds, "truncated_fraction": truncated / n}


def accuracy(folder: Path) -> float:
    """Return the mean over problems of the accuracy of an evaluation."""
    by_problem: dict[str, list[bool]] = {}
    for part in folder.glob("part-*.parquet"):
        for row in pq.read_table(part).to_pylist():
            by_problem.setdefault(row["problem_id"], []).append(row["correct"])
    return sum(sum(correct) / len(correct) for correct in by_problem.values()) / len(by_problem)

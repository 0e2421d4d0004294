"""Rank correlations of the discrepancy |A| with properties of the tokens, raw and partial. No files, no torch.

Shape suffixes: see Notation in CONTRIBUTING.md. The X quantities of a token are 1, |A|, and its properties.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from opdctl.analysis.bootstrap import resample_groups
from opdctl.analysis.position_bias import MIN_PROMPTS
from opdctl.analysis.position_sums import GROUPS, Batch, concatenate
from opdctl.evaluation.statistics import CONFIDENCE_LEVEL, Estimate
from opdctl.losses.token_weights import Floats

MAX_SAMPLED_TOKENS = 1_000_000
"""The tokens of a sample, at most, in expectation. They take a few seconds and 0.2 GiB."""
MIN_VARIANCE = 1e-6
"""The least fraction of a quantity's variance that the other properties leave for a partial correlation."""


@dataclass(frozen=True)
class Correlation:
    """The rank correlation of |A| with a property of the tokens. partial: controlling for all other properties.

    A value is NaN if |A| or the property is constant, or for `partial` determined by the other properties.
    """

    name: str
    raw: Estimate
    partial: Estimate


class TokenSample:
    """A random sample of tokens, with |A|, their properties, and the groups of their prompts.

    How the tokens are divided into batches does not change the sample.
    """

    def __init__(self, tokens: int):
        """tokens: that will be added."""
        self._fraction = min(1.0, MAX_SAMPLED_TOKENS / max(tokens, 1))
        self._rng = np.random.default_rng(0)
        self._count_V = np.zeros(0, np.int64)
        self._batches: list[dict[str, npt.NDArray[np.generic]]] = []

    def add(self, batch: Batch, token_ids: Sequence[npt.NDArray[np.int32]]) -> None:
        """Sample from the next responses of the run. token_ids: of each response, [T]."""
        id_N = np.concatenate([np.zeros(0, np.int32), *token_ids])
        size = max(len(self._count_V), int(id_N.max(initial=-1)) + 1)
        self._count_V = np.pad(self._count_V, (0, size - len(self._count_V))) + np.bincount(id_N, minlength=size)
        kept = np.flatnonzero(self._rng.random(len(id_N)) < self._fraction)
        columns = _properties(batch) | {"id": id_N, "group": batch.group_R[batch.response_N]}
        self._batches.append({name: value_N[kept] for name, value_N in columns.items()})

    @property
    def tokens(self) -> int:
        """The tokens that were added."""
        return int(self._count_V.sum())

    @property
    def sampled(self) -> int:
        """The tokens of the sample."""
        return sum(len(batch["id"]) for batch in self._batches)

    def correlations(self) -> list[Correlation]:
        """Return the correlation of |A| with each property: Spearman's, and the partial one of the ranks.

        The intervals are those of the percentiles over resampled groups of prompts. There are none for fewer than
        MIN_PROMPTS prompts.
        """
        if not self.sampled:
            return []
        columns = {name: np.concatenate([batch[name] for batch in self._batches]) for name in self._batches[0]}
        group_N = columns.pop("group")
        columns["token_frequency"] = self._count_V[columns.pop("id")]
        rank_XN = np.stack([np.ones(len(group_N)), *map(_standardized_ranks, columns.values())])
        # With the ones, the products of all pairs contain the counts and the sums too.
        products = [np.bincount(group_N, a_N * b_N, minlength=GROUPS) for a_N in rank_XN for b_N in rank_XN]
        moments_GX = np.stack(products, axis=1, dtype=np.float64)[np.bincount(group_N, minlength=GROUPS) > 0]
        total = _raw_and_partial(moments_GX.sum(0, keepdims=True))
        has_interval = len(moments_GX) >= MIN_PROMPTS
        resampled = _raw_and_partial(resample_groups(moments_GX)) if has_interval else np.full_like(total, np.nan)
        return [
            Correlation(name, *(_estimate(total[kind, 0, x], resampled[kind, :, x]) for kind in range(2)))
            for x, name in enumerate(list(columns)[1:])
        ]


def _properties(batch: Batch) -> dict[str, Floats]:
    """Return |A| and the properties of the tokens, [N] each; entropies only if they are stored."""
    columns = {
        "abs_advantage": np.abs(batch.advantage_N),
        "teacher_logp": concatenate([tokens.teacher_logp_T for tokens in batch.responses]),
        "student_logp": concatenate([tokens.student_logp_T for tokens in batch.responses]),
    }
    for name, column in (("teacher_entropy", "teacher_entropies"), ("student_entropy", "student_entropies")):
        if all(column in tokens.columns for tokens in batch.responses):
            columns[name] = concatenate([tokens.column(column) for tokens in batch.responses])
    columns["position"] = batch.position_N.astype(np.float64)
    columns["relative_position"] = batch.position_N / batch.length_R[batch.response_N]
    return columns


def _standardized_ranks(value_N: npt.NDArray[np.generic]) -> Floats:
    """Return the ranks with mean 0 and variance 1, equal values with the mean of their ranks; 0 if all are equal."""
    rank_N = stats.rankdata(value_N)
    rank_N -= rank_N.mean()
    return rank_N / (rank_N.std() or 1.0)


def _raw_and_partial(moments_JX: Floats) -> Floats:
    """Return the raw and the partial correlations of |A| with the properties, [2, J, X - 2].

    moments_JX: the matrices of the sums of products of all pairs of quantities, each as a row.
    """
    size = round(moments_JX.shape[1] ** 0.5)
    moments_JXX = moments_JX.reshape(-1, size, size)
    mean_JXX = moments_JXX / moments_JXX[:, :1, :1]
    covariance_JXX = mean_JXX[:, 1:, 1:] - mean_JXX[:, 1:, :1] * mean_JXX[:, :1, 1:]
    variance_JX = np.diagonal(covariance_JXX, axis1=1, axis2=2)
    scale_JX = np.where(variance_JX > MIN_VARIANCE, 1 / np.sqrt(np.maximum(variance_JX, MIN_VARIANCE)), 0.0)
    correlation_JXX = covariance_JXX * scale_JX[:, :, None] * scale_JX[:, None, :]
    is_constant_JX = (scale_JX == 0) | (scale_JX[:, :1] == 0)
    raw_JX = np.where(is_constant_JX, np.nan, correlation_JXX[:, 0])
    partial_JX = np.stack([_partial_correlation(correlation_JXX, x) for x in range(1, size - 1)], axis=1)
    return np.stack([raw_JX[:, 1:], partial_JX])


def _partial_correlation(correlation_JXX: Floats, x: int) -> Floats:
    """Return the correlation of quantities 0 and x after regression of both on all others, [J].

    NaN if the others leave less than MIN_VARIANCE of one of them. The pseudo-inverse makes do with others that
    determine each other, such as the positions of responses of equal length.
    """
    others = np.delete(np.arange(correlation_JXX.shape[1]), [0, x])
    inverse_JXX = np.linalg.pinv(correlation_JXX[:, others[:, None], others], rcond=MIN_VARIANCE, hermitian=True)
    pair = [0, x]
    with_others_JXX = correlation_JXX[:, others][:, :, pair]
    explained_JXX = with_others_JXX.swapaxes(1, 2) @ inverse_JXX @ with_others_JXX
    rest_JXX = correlation_JXX[:, pair][:, :, pair] - explained_JXX
    variances_J = np.where(
        (rest_JXX[:, [0, 1], [0, 1]] > MIN_VARIANCE).all(1), rest_JXX[:, 0, 0] * rest_JXX[:, 1, 1], np.nan
    )
    return np.clip(rest_JXX[:, 0, 1] / np.sqrt(variances_J), -1.0, 1.0)


def _estimate(value: float, resampled_J: Floats) -> Estimate:
    resampled_J = resampled_J[np.isfinite(resampled_J)]
    if np.isnan(value) or not len(resampled_J):
        return Estimate(float(value), np.nan, np.nan)
    low, high = np.quantile(resampled_J, [(1 - CONFIDENCE_LEVEL) / 2, (1 + CONFIDENCE_LEVEL) / 2])
    return Estimate(float(value), float(low), float(high))

"""Correlations of |A| with properties of the tokens: equal to regressions on ranks, and intervals that cover."""

import numpy as np
import pytest
from scipy import stats

from opdctl.analysis import correlations
from opdctl.analysis.correlations import Correlation, TokenSample
from opdctl.analysis.position_sums import Batch
from opdctl.losses.token_weights import ResponseTokens

Responses = list[ResponseTokens]
Ids = list[np.ndarray]


def random_responses(lengths, seed: int = 0) -> tuple[Responses, Ids]:
    """Return responses whose properties all depend on each other, with levels of their own."""
    rng, responses, ids = np.random.default_rng(seed), [], []
    for n in lengths:
        student = -rng.exponential(1 + np.arange(n) / 20) - rng.exponential()
        entropy = np.abs(student) + rng.normal(size=n)
        advantage = 0.5 * student + rng.normal(size=n) * entropy
        responses.append(ResponseTokens(student, student + advantage, advantage, 0, {"student_entropies": entropy}))
        ids.append((rng.geometric(0.2, n) + (student < -1)).astype(np.int32))
    return responses, ids


def correlate(responses: Responses, ids: Ids, cuts: tuple[int, ...] = ()) -> dict[str, Correlation]:
    """Return the correlations by property; cuts: where the responses are divided into batches."""
    sample = TokenSample(sum(map(len, responses)))
    for a, b in zip((0, *cuts), (*cuts, len(responses)), strict=True):
        sample.add(Batch(responses[a:b], np.arange(a, b)), ids[a:b])
    return {each.name: each for each in sample.correlations()}


def plain_ranks(responses: Responses, ids: Ids) -> dict[str, np.ndarray]:
    """Return the ranks of |A| and of every property over all tokens, by plain loops."""
    all_ids = np.concatenate(ids)
    columns = {
        "abs_advantage": [abs(a) for tokens in responses for a in tokens.advantage_T],
        "teacher_logp": [a for tokens in responses for a in tokens.teacher_logp_T],
        "student_logp": [a for tokens in responses for a in tokens.student_logp_T],
        "student_entropy": [a for tokens in responses for a in tokens.columns["student_entropies"]],
        "position": [t for tokens in responses for t in range(len(tokens))],
        "relative_position": [t / len(tokens) for tokens in responses for t in range(len(tokens))],
        "token_frequency": [np.log(np.sum(all_ids == token)) for token in all_ids],
    }
    return {name: stats.rankdata(values) for name, values in columns.items()}


def residuals(y: np.ndarray, controls: list[np.ndarray]) -> np.ndarray:
    design = np.column_stack([np.ones(len(y)), *controls])
    return y - design @ np.linalg.lstsq(design, y, rcond=None)[0]


def test_correlations_equal_those_of_the_residuals_of_regressions():
    responses, ids = random_responses(np.random.default_rng(1).integers(0, 40, 60))
    found, ranks = correlate(responses, ids), plain_ranks(responses, ids)
    signal = ranks.pop("abs_advantage")
    assert list(found) == list(ranks)
    for name, rank in ranks.items():
        controls = [other for key, other in ranks.items() if key != name]
        partial = np.corrcoef(residuals(signal, controls), residuals(rank, controls))[0, 1]
        assert found[name].raw.value == pytest.approx(np.corrcoef(signal, rank)[0, 1], rel=1e-9)
        assert found[name].partial.value == pytest.approx(partial, rel=1e-6)
        for estimate in (found[name].raw, found[name].partial):
            assert estimate.low < estimate.value < estimate.high


def test_partial_correlation_removes_what_another_property_explains():
    # |A| depends on the student's log-prob alone, which falls along the response
    rng, responses = np.random.default_rng(2), []
    for _ in range(100):
        student = -np.arange(50) / 10 - rng.exponential(size=50)
        responses.append(ResponseTokens(student, rng.normal(size=50), rng.exponential(-student)))
    ids = [rng.integers(0, 30, 50).astype(np.int32)[:n] for n in rng.integers(30, 51, 100)]
    responses = [
        ResponseTokens(tokens.student_logp_T[: len(i)], tokens.teacher_logp_T[: len(i)], tokens.advantage_T[: len(i)])
        for tokens, i in zip(responses, ids, strict=True)
    ]
    found = correlate(responses, ids)
    assert found["position"].raw.low > 0.3
    assert abs(found["position"].partial.value) < 0.05
    assert found["student_logp"].partial.high < -0.15
    assert found["teacher_logp"].raw.low < 0 < found["teacher_logp"].raw.high


def test_batches_do_not_change_the_result(monkeypatch):
    responses, ids = random_responses([7, 0, 31, 12] * 20)
    for fraction in (1.0, 0.5):
        monkeypatch.setattr(correlations, "MAX_SAMPLED_TOKENS", fraction * sum(map(len, responses)))
        assert correlate(responses, ids) == correlate(responses, ids, cuts=(1, 2, 40))


def test_large_runs_are_sampled(monkeypatch):
    responses, ids = random_responses([50] * 200)
    complete = correlate(responses, ids)
    monkeypatch.setattr(correlations, "MAX_SAMPLED_TOKENS", 4000)
    sample = TokenSample(10_000)
    sample.add(Batch(responses, np.arange(200)), ids)
    assert (sample.tokens, sample.sampled) == (10_000, pytest.approx(4000, abs=200))
    for each in sample.correlations():
        assert each.raw.value == pytest.approx(complete[each.name].raw.value, abs=0.05)


def test_frequencies_are_those_of_all_tokens(monkeypatch):
    # token k occurs k times, and has |A| = k
    token_N = np.random.default_rng(4).permutation(np.repeat(np.arange(1, 100), np.arange(1, 100)))
    ids = [part.astype(np.int32) for part in np.array_split(token_N, 30)]
    responses = [ResponseTokens(np.zeros(len(part)), np.zeros(len(part)), part.astype(float)) for part in ids]
    monkeypatch.setattr(correlations, "MAX_SAMPLED_TOKENS", 500)
    assert correlate(responses, ids)["token_frequency"].raw.value == pytest.approx(1.0)


def test_properties_that_determine_each_other_have_no_partial_correlation():
    responses, ids = random_responses([30] * 40)  # of equal length: the positions have equal ranks
    found, ranks = correlate(responses, ids), plain_ranks(responses, ids)
    assert np.isnan(found["position"].partial.value)
    assert np.isnan(found["relative_position"].partial.value)
    assert found["position"].raw.value == pytest.approx(found["relative_position"].raw.value)
    controls = [ranks[name] for name in ("teacher_logp", "student_logp", "position", "token_frequency")]
    signal, entropy = (residuals(ranks[name], controls) for name in ("abs_advantage", "student_entropy"))
    assert found["student_entropy"].partial.value == pytest.approx(np.corrcoef(signal, entropy)[0, 1], rel=1e-6)


def test_constant_quantities_have_no_correlation():
    responses, ids = random_responses([20] * 30)
    found = correlate(responses, [np.zeros(20, np.int32)] * 30)  # one token: its frequency is constant
    assert np.isnan(found["token_frequency"].raw.value)
    assert np.isnan(found["token_frequency"].partial.value)
    assert np.isfinite(found["student_entropy"].partial.low)
    silent = [ResponseTokens(tokens.student_logp_T, tokens.student_logp_T, np.zeros(20)) for tokens in responses]
    for each in correlate(silent, ids).values():
        assert np.isnan([each.raw.value, each.partial.value]).all()
    assert correlate([], []) == {}
    assert correlate([ResponseTokens(*[np.zeros(0)] * 3)], [np.zeros(0, np.int32)]) == {}


def test_few_responses_have_no_interval():
    responses, ids = random_responses([30] * 20)
    assert np.isfinite(correlate(responses, ids)["student_logp"].raw.low)
    assert np.isnan(correlate(responses[1:], ids[1:])["student_logp"].raw.low)


def test_interval_covers_although_the_tokens_of_a_response_are_correlated():
    rng, covered, covered_by_token = np.random.default_rng(3), np.zeros(2), 0
    for _ in range(100):
        # |A| and the student's log-prob have independent levels in each response
        level_R2 = rng.normal(size=(60, 2))
        responses = [
            ResponseTokens(
                -np.exp(b) + 0.1 * rng.normal(size=n), rng.normal(size=n), np.exp(a) * rng.exponential(size=n)
            )
            for (a, b), n in zip(level_R2, rng.integers(10, 30, 60), strict=True)
        ]
        each = correlate(responses, [rng.integers(0, 9, len(tokens)).astype(np.int32) for tokens in responses])
        estimates = each["student_logp"].raw, each["student_logp"].partial
        covered += [estimate.low < 0 < estimate.high for estimate in estimates]
        covered_by_token += abs(estimates[0].value) < 1.96 / np.sqrt(sum(map(len, responses)))
    assert (covered / 100 > 0.88).all(), covered
    assert covered_by_token / 100 < 0.65  # an interval with tokens as its unit

"""Responses join their scores strictly."""

from dataclasses import replace

import numpy as np
import pytest

from opdctl.artifacts.records import TokenScores
from opdctl.errors import ExitCode, OpdctlError
from opdctl.runs.run import Run
from opdctl.runs.scored_responses import join, read_scored


@pytest.fixture(scope="module")
def samples(finished_run):
    return list(read_scored(Run.load(finished_run), 0))


@pytest.fixture(scope="module")
def responses(samples):
    return [sample.response for sample in samples]


@pytest.fixture(scope="module")
def scores(samples):
    return {sample.response.sample_id: sample.teacher for sample in samples}


def join_error(*arguments) -> OpdctlError:
    with pytest.raises(OpdctlError) as error:
        join(*arguments)
    assert error.value.code == ExitCode.BAD_DATA
    return error.value


def test_scores_join_by_id_in_the_order_of_the_responses(responses, scores):
    joined = join(responses, {"teacher": dict(reversed(scores.items()))})
    assert [sample.response.sample_id for sample in joined] == [response.sample_id for response in responses]
    assert [sample.teacher for sample in joined] == [scores[response.sample_id] for response in responses]


def test_response_and_score_must_match(responses, scores):
    first = responses[0].sample_id
    others = {name: score for name, score in scores.items() if name != first}
    for broken, named in ((others, first), (scores | {"stranger": scores[first]}, "stranger")):
        error = join_error(responses, {"teacher": broken})
        assert error.kind == "corrupt_artifact"
        assert named in error.message


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("position", [0, -1])
@pytest.mark.parametrize("column", ["logprobs", "entropies"])
def test_columns_must_be_finite(responses, scores, column, position, value):
    first = responses[0].sample_id
    values = scores[first].logprobs.copy()
    values[position] = value
    broken = TokenScores(**{"logprobs": scores[first].logprobs, column: values})
    error = join_error(responses, {"teacher": scores | {first: broken}})
    assert error.kind == "nonfinite_value"
    assert f"{first}: {column} of the teacher at position {position % len(values)}: {value}" in error.message


def test_columns_must_have_one_row_per_token(responses, scores):
    first = responses[0].sample_id
    logprobs = scores[first].logprobs
    error = join_error(responses, {"teacher": scores | {first: TokenScores(logprobs[:-1])}})
    assert error.kind == "corrupt_artifact"
    assert f"{first}: {len(logprobs)} tokens, {len(logprobs) - 1} logprobs of the teacher" in error.message


def test_repeated_ids_and_unknown_teachers_do_not_join(responses, scores):
    assert join_error([*responses, responses[0]], {"teacher": scores}).kind == "corrupt_artifact"
    for models, named in (
        ({"teacher-math": scores}, "`teacher`"),
        ({"teacher": scores, "teacher-math": {responses[0].sample_id: scores[responses[0].sample_id]}}, "teacher-math"),
    ):
        error = join_error(responses, models)
        assert error.kind == "corrupt_artifact"
        assert named in error.message


def test_a_few_invalid_responses_are_skipped(responses, scores, capsys):
    first = responses[0].sample_id
    broken = scores | {first: TokenScores(np.full_like(scores[first].logprobs, np.nan))}
    joined = join(responses, {"teacher": broken}, 1)
    assert [sample.response.sample_id for sample in joined] == [response.sample_id for response in responses[1:]]
    assert first in capsys.readouterr().err


# ── Masks ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_mask_leaves_own_tokens_in_every_column(responses, scores):
    first, *others = responses
    length = len(first.response_ids)
    own_T = np.arange(length) % 3 > 0
    top_TK = np.arange(2 * length).reshape(length, 2)
    states_TD = np.arange(3.0 * length, dtype=np.float32).reshape(length, 3)
    response = replace(first, loss_mask=own_T, entropies=first.logprobs, top_ids=top_TK)
    score = replace(scores[first.sample_id], top_logprobs=states_TD, hidden_states=lambda: states_TD)
    sample, *rest = join([response, *others], {"teacher": scores | {first.sample_id: score}})
    np.testing.assert_array_equal(sample.response.logprobs, first.logprobs[own_T])
    np.testing.assert_array_equal(sample.response.entropies, first.logprobs[own_T])
    np.testing.assert_array_equal(sample.response.top_ids, top_TK[own_T])
    np.testing.assert_array_equal(sample.response.own_ids, first.response_ids[own_T])
    np.testing.assert_array_equal(sample.response.response_ids, first.response_ids)
    np.testing.assert_array_equal(sample.teacher.logprobs, score.logprobs[own_T])
    np.testing.assert_array_equal(sample.teacher.top_logprobs, states_TD[own_T])
    np.testing.assert_array_equal(sample.teacher.hidden_states(), states_TD[own_T])
    assert [other.response for other in rest] == others


def test_a_mask_of_another_length_is_corrupt(responses, scores):
    first = responses[0].sample_id
    error = join_error([replace(responses[0], loss_mask=np.ones(1, bool)), *responses[1:]], {"teacher": scores})
    assert error.kind == "corrupt_artifact"
    assert f"{first}: {len(responses[0].response_ids)} tokens, 1 loss_mask" in error.message

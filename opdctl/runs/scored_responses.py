"""Responses joined with their scores, by id, part by part. Imports no torch, so the analysis needs no model."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from opdctl import console
from opdctl.artifacts.records import HiddenStates, Logprobs, LossMask, Response, ScoredResponse, TokenScores
from opdctl.artifacts.tables import read_scores
from opdctl.errors import OpdctlError
from opdctl.losses.token_weights import COLUMN_SETTINGS, Floats, ResponseTokens
from opdctl.models.directory import ModelDir
from opdctl.runs.run import REFERENCE, Run

_Record = TypeVar("_Record", Response, TokenScores)
TOKEN_COLUMNS = (
    "logprobs",
    "sampling_logprobs",
    "entropies",
    "top_ids",
    "top_logprobs",
    "student_top_logprobs",
)
"""The columns of responses and scores with one row for each token."""


def read_scored(run: Run, step: int) -> Iterator[ScoredResponse]:
    """Yield a step's responses with their scores, with one verified part in memory at a time.

    Up to train.max_invalid_responses are skipped with a warning: those with a missing or non-finite log-prob. Episodes
    of an environment that failed count as such.

    Raises:
        OpdctlError: more are invalid or failed; a part is missing or corrupt; responses and scores do not join.
    """
    rollout, stages, invalid_left = (
        run.rollout_stage(step),
        run.score_stages(step),
        run.recipe.train.max_invalid_responses,
    )
    if len(failed := rollout.failed()) > invalid_left:
        raise OpdctlError(
            "failed_environment",
            f"{rollout.path}: {len(failed)} episodes failed, train.max_invalid_responses = {invalid_left}; the first "
            f"is {failed[0]}",
            hint=f"remove {rollout.path} and run `{rollout.rerun_command}`, which plays them again",
        )
    invalid_left -= len(failed)
    for index in range(len(rollout.names)):
        responses = rollout.read_part(index, Response)
        digest = rollout.sha256(index)
        scores = {name: read_scores(stage.verify(index), digest) for name, stage in stages.items()}
        joined = join(responses, scores, invalid_left)
        invalid_left -= len(responses) - len(joined)
        yield from joined


def check_ids(responses: Iterable[Response], model: ModelDir) -> None:
    """Check that the model's tokenizer has every token id. Raises OpdctlError if not."""
    for response in responses:
        for kind, ids in (("prompt", response.prompt_ids), ("response", response.response_ids)):
            if len(ids) and not 0 <= ids.min() <= ids.max() < model.vocab_size:
                why = f"{response.sample_id}: {kind} id {ids.max()}, the tokenizer has {model.vocab_size} tokens"
                raise OpdctlError("invalid_data", why)


def join(
    responses: Sequence[Response], scores: Mapping[str, Mapping[str, TokenScores]], max_invalid: int = 0
) -> list[ScoredResponse]:
    """Join responses with the scores of each model, by the model's name and the sample's id.

    A teacher scores the responses that name it, the reference all, and neither any other. Only the student's own tokens
    are left. Up to `max_invalid` responses with short columns, or non-finite ones at these tokens, are skipped.

    Raises:
        OpdctlError: one more response is invalid; a score is missing or has no response.
    """
    if len({response.sample_id for response in responses}) != len(responses):
        raise _join_error("responses", ["a sample id occurs twice"])
    if unknown := sorted({response.teacher for response in responses} - scores.keys()):
        raise _join_error("responses", [f"unknown teacher `{name}`" for name in unknown])
    for name, scored in scores.items():
        expected = {r.sample_id for r in responses if name in (r.teacher, REFERENCE)}
        if expected != scored.keys():
            raise _join_error(name, sorted(expected.symmetric_difference(scored))[:3])
    joined = []
    for response in responses:
        teacher = scores[response.teacher][response.sample_id]
        reference = scores[REFERENCE][response.sample_id] if REFERENCE in scores else None
        try:
            own = ScoredResponse(
                _own_tokens(response, "student", response),
                _own_tokens(response, response.teacher, teacher),
                _own_tokens(response, REFERENCE, reference) if reference else None,
            )
        except OpdctlError as error:
            max_invalid -= 1
            if max_invalid < 0:
                raise
            console.warn(f"{error.message}; this response is skipped")
        else:
            joined.append(own)
    return joined


def _join_error(name: str, examples: Iterable[str]) -> OpdctlError:
    return OpdctlError("corrupt_artifact", f"responses and scores do not join: {name}: {', '.join(examples)}")


def _own_tokens(response: Response, name: str, record: _Record) -> _Record:
    """Return the response, or its scores by the model `name`, with the columns of the student's own tokens only.

    Raises:
        OpdctlError: a column does not have one row for each token of the response, or a row is not finite.
    """
    mask_T, length = response.loss_mask, len(response.response_ids)
    columns = _token_columns(record)
    lengths = {each: len(values) for each, values in columns.items()}
    lengths |= {} if mask_T is None else {"loss_mask": len(mask_T)}
    if wrong := [each for each in lengths if lengths[each] != length]:
        why = f"{response.sample_id}: {length} tokens, {lengths[wrong[0]]} {wrong[0]} of the {name}"
        raise OpdctlError("corrupt_artifact", why)
    if mask_T is not None:
        record = _select_rows(record, mask_T)
    for column, values in _token_columns(record).items():
        if not np.isfinite(values).all():
            position = int(np.argmin(np.isfinite(values).reshape(len(values), -1).all(-1)))
            raise OpdctlError(
                "nonfinite_value",
                f"{response.sample_id}: {column} of the {name} at position {position}: {values[position]}",
                hint="the model gives a token probability 0, or computes NaN in its dtype; train.max_invalid_responses "
                "allows a few",
            )
    return record


def select_tokens(sample: ScoredResponse, is_selected_T: LossMask) -> ScoredResponse:
    """Return a response with some of the student's own tokens only. What follows the last of them is left out.

    Where experts are stored, which are of all tokens, the later tokens remain and are masked.
    """
    if is_selected_T.all():
        return sample
    response = sample.response
    mask_T = np.ones(len(response.response_ids), bool) if response.loss_mask is None else response.loss_mask.copy()
    mask_T[mask_T] = is_selected_T
    end = int(np.flatnonzero(mask_T).max(initial=-1)) + 1 if response.routed_experts is None else len(mask_T)
    cut = replace(response, response_ids=response.response_ids[:end], loss_mask=mask_T[:end])
    reference = sample.reference and _select_rows(sample.reference, is_selected_T)
    return ScoredResponse(_select_rows(cut, is_selected_T), _select_rows(sample.teacher, is_selected_T), reference)


def _token_columns(record: Response | TokenScores) -> dict[str, npt.NDArray[Any]]:
    """Return the columns of TOKEN_COLUMNS that are stored, by name."""
    return {each: values for each in TOKEN_COLUMNS if (values := getattr(record, each, None)) is not None}


def _select_rows(record: _Record, is_selected_T: LossMask) -> _Record:
    """Return a response, or its scores, with some rows of each column of TOKEN_COLUMNS and of the hidden states."""
    selected: dict[str, Any] = {each: values[is_selected_T] for each, values in _token_columns(record).items()}
    if isinstance(record, TokenScores) and record.hidden_states is not None:
        selected["hidden_states"] = _select_hidden_states(record.hidden_states, is_selected_T)
    return replace(record, **selected)


def _select_hidden_states(read: HiddenStates, is_selected_T: LossMask) -> HiddenStates:
    return lambda: read()[is_selected_T]


def target_logprobs(scored: ScoredResponse, extrapolation: float, weight_T: Floats | None = None) -> Logprobs:
    """Return the target log-probs, [T], in nats: the teacher's, or λ log T + (1 - λ) log R with λ = `extrapolation`.

    The latter minus log S is λ (log T - log R) - (log S - log R), the advantage of reward extrapolation
    (arXiv 2602.12125). weight_T: factors of λ for each token; the target is then λ w (log T - log R) + log R.
    """
    teacher = scored.teacher.logprobs
    if extrapolation == 1:
        return teacher
    assert scored.reference is not None  # recipe validation requires it
    factor = extrapolation if weight_T is None else extrapolation * weight_T
    return np.asarray(factor * teacher + (1 - factor) * scored.reference.logprobs, np.float32)


def to_weight_inputs(scored: ScoredResponse, step: int, student_logprobs: Logprobs | None = None) -> ResponseTokens:
    """Return a response's tokens as the input of token weights, log-probs in float64.

    student_logprobs: the student's log-probs of the tokens, [T], in nats; by default those that the rollout stored.
    """
    student_logprobs = scored.response.logprobs if student_logprobs is None else student_logprobs
    columns = {name: value for name in COLUMN_SETTINGS if (value := _stored_column(scored, name)) is not None}
    student_logp_T = student_logprobs.astype(np.float64)
    teacher_logp_T = scored.teacher.logprobs.astype(np.float64)
    return ResponseTokens(student_logp_T, teacher_logp_T, teacher_logp_T - student_logp_T, step, columns)


def _stored_column(scored: ScoredResponse, name: str) -> npt.NDArray[Any] | None:
    """Return an optional column by its name for token weights: "student_" or "teacher_" and the field of the record."""
    owner, _, field = name.partition("_")
    column: npt.NDArray[Any] | None = getattr({"student": scored.response, "teacher": scored.teacher}[owner], field)
    return column

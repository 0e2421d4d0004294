"""Responses joined with their scores, by id, part by part. Imports no torch, so the analysis needs no model."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from opdctl import console
from opdctl.artifacts.records import Logprobs, Response, ScoredResponse, TokenScores
from opdctl.artifacts.tables import read_scores
from opdctl.errors import OpdctlError
from opdctl.losses.token_weights import COLUMN_SETTINGS, Floats, ResponseTokens
from opdctl.models.directory import ModelDir
from opdctl.runs.run import REFERENCE, Run


def read_scored(run: Run, step: int) -> Iterator[ScoredResponse]:
    """Yield a step's responses with their scores, with one verified part in memory at a time.

    Up to train.max_invalid_responses are skipped with a warning: those with a missing or non-finite log-prob.

    Raises:
        OpdctlError: more are invalid; a part is missing or corrupt; responses and scores do not join.
    """
    rollout, stages, invalid_left = (
        run.rollout_stage(step),
        run.score_stages(step),
        run.recipe.train.max_invalid_responses,
    )
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

    A teacher scores the responses that name it, the reference all, and neither any other. Up to `max_invalid` responses
    with short or non-finite columns are skipped.

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
        records: dict[str, Response | TokenScores] = {"student": response, response.teacher: teacher}
        records |= {REFERENCE: reference} if reference else {}
        try:
            for name, record in records.items():
                _check_columns(response, name, record)
        except OpdctlError as error:
            max_invalid -= 1
            if max_invalid < 0:
                raise
            console.warn(f"{error.message}; this response is skipped")
        else:
            joined.append(ScoredResponse(response, teacher, reference))
    return joined


def _join_error(name: str, examples: Iterable[str]) -> OpdctlError:
    return OpdctlError("corrupt_artifact", f"responses and scores do not join: {name}: {', '.join(examples)}")


def _check_columns(response: Response, name: str, record: Response | TokenScores) -> None:
    """Check that each stored column of the model `name` has one row per token, all finite."""
    for column in ("logprobs", "sampling_logprobs", "entropies", "top_logprobs", "student_top_logprobs"):
        values = getattr(record, column, None)
        if values is None:
            continue
        if len(values) != len(response.response_ids):
            why = f"{response.sample_id}: {len(response.response_ids)} tokens, {len(values)} {column} of the {name}"
            raise OpdctlError("corrupt_artifact", why)
        if not np.isfinite(values).all():
            position = int(np.argmin(np.isfinite(values).reshape(len(values), -1).all(-1)))
            raise OpdctlError(
                "nonfinite_value",
                f"{response.sample_id}: {column} of the {name} at position {position}: {values[position]}",
                hint="the model gives a token probability 0, or computes NaN in its dtype; train.max_invalid_responses "
                "allows a few",
            )


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
    """Return a response's tokens as the input of token weights, float64.

    student_logprobs: the student's log-probs of the tokens, [T], in nats; by default those that the rollout stored.
    """
    student_logprobs = scored.response.logprobs if student_logprobs is None else student_logprobs
    columns = {name: value for name in COLUMN_SETTINGS if (value := _stored_column(scored, name)) is not None}
    student_logp_T = student_logprobs.astype(np.float64)
    teacher_logp_T = scored.teacher.logprobs.astype(np.float64)
    return ResponseTokens(
        student_logp_T,
        teacher_logp_T,
        teacher_logp_T - student_logp_T,
        step,
        {name: value.astype(np.float64) if value.dtype == np.float32 else value for name, value in columns.items()},
    )


def _stored_column(scored: ScoredResponse, name: str) -> npt.NDArray[Any] | None:
    """Return an optional column by its name for token weights: "student_" or "teacher_" and the field of the record."""
    owner, _, field = name.partition("_")
    column: npt.NDArray[Any] | None = getattr({"student": scored.response, "teacher": scored.teacher}[owner], field)
    return column

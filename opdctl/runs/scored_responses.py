"""Responses joined with their scores, by id, part by part. Imports no torch, so the analysis needs no model."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from opdctl import console
from opdctl.artifacts.records import Logprobs, Response, ScoredResponse, TokenScores
from opdctl.artifacts.tables import read_rows, read_scores
from opdctl.errors import ExitCode, OpdctlError
from opdctl.losses.token_weights import ResponseTokens
from opdctl.models.directory import ModelDir
from opdctl.runs.run import REFERENCE, Run


def read_scored(run: Run, step: int) -> Iterator[ScoredResponse]:
    """Yield a step's responses with their scores, one verified part in memory at a time.

    Up to train.max_invalid_responses are left out, and said, that have too few log-probs or one that is no number.
    Raises OpdctlError (code 3) for more, when a part is missing or damaged, or when responses and scores do not join.
    """
    rollout, stages, left = run.rollout_stage(step), run.score_stages(step), run.recipe.train.max_invalid_responses
    for index in range(len(rollout.names)):
        responses = read_rows(rollout.verify(index), Response)
        digest = rollout.sha256(index)
        scores = {name: read_scores(s.verify(index), digest) for name, s in stages.items()}
        joined = join(responses, scores, left)
        left -= len(responses) - len(joined)
        yield from joined


def check_ids(responses: Iterable[Response], model: ModelDir) -> None:
    """Raise OpdctlError (code 3) for a token id that the model's tokenizer does not know."""
    for response in responses:
        for what, ids in (("prompt", response.prompt_ids), ("response", response.response_ids)):
            if len(ids) and not 0 <= ids.min() <= ids.max() < model.vocab_size:
                raise OpdctlError(
                    f"{response.sample_id}: a {what} id beyond the {model.vocab_size} of the tokenizer: {ids.max()}",
                    code=ExitCode.BAD_DATA,
                )


def join(
    responses: Sequence[Response], scores: Mapping[str, Mapping[str, TokenScores]], may_be_spoilt: int = 0
) -> list[ScoredResponse]:
    """Join responses with the scores of each model, by the model's name and the sample's id.

    A teacher scores the responses that name it, the reference all, and neither any other. Responses with short or
    non-finite columns are left out, as many as may be spoilt. Raises OpdctlError (code 3) for the next one, and for a
    missing or spare score.
    """
    if len({response.sample_id for response in responses}) != len(responses):
        raise _join_error("responses", ["a sample id that occurs twice"])
    if strange := sorted({response.teacher for response in responses} - scores.keys()):
        raise _join_error("responses", [f"a teacher `{name}` that there is not" for name in strange])
    for name, found in scores.items():
        wanted = {r.sample_id for r in responses if name in (r.teacher, REFERENCE)}
        if wanted != found.keys():
            raise _join_error(name, sorted(wanted.symmetric_difference(found))[:3])
    joined = []
    for response in responses:
        teacher = scores[response.teacher][response.sample_id]
        reference = scores[REFERENCE][response.sample_id] if REFERENCE in scores else None
        said_by: dict[str, Response | TokenScores] = {"student": response, response.teacher: teacher}
        said_by |= {REFERENCE: reference} if reference else {}
        try:
            for who, said in said_by.items():
                _check(response, who, said)
        except OpdctlError as error:
            may_be_spoilt -= 1
            if may_be_spoilt < 0:
                raise
            console.warn(f"{error.message}; this response is left out")
        else:
            joined.append(ScoredResponse(response, teacher, reference))
    return joined


def _join_error(name: str, odd: Iterable[str]) -> OpdctlError:
    return OpdctlError(f"responses and scores do not join: {name}: {', '.join(odd)}", code=ExitCode.BAD_DATA)


def _check(response: Response, who: str, said: Response | TokenScores) -> None:
    """Raise OpdctlError unless each column that is stored has one row a token, and is finite."""
    for column in ("logprobs", "entropies", "top_logprobs", "student_top_logprobs"):
        values = getattr(said, column, None)
        if values is None:
            continue
        if len(values) != len(response.response_ids):
            raise OpdctlError(
                f"{response.sample_id}: {len(response.response_ids)} tokens, {len(values)} {column} of the {who}",
                code=ExitCode.BAD_DATA,
            )
        if not np.isfinite(values).all():
            position = int(np.argmin(np.isfinite(values).reshape(len(values), -1).all(-1)))
            raise OpdctlError(
                f"{response.sample_id}: the {who}'s {column} at position {position} is {values[position]}",
                hint="a token the model gives no probability, or a model that computes NaN in its dtype; a few such "
                "responses can be left out: train.max_invalid_responses",
                code=ExitCode.BAD_DATA,
            )


def target_logprobs(scored: ScoredResponse, extrapolation: float) -> Logprobs:
    """Return the log-probs of what the student is drawn to, [T], in nats: the teacher, or λ log T + (1 - λ) log R.

    The latter less log S is λ (log T - log R) - (log S - log R), the advantage of reward extrapolation
    (arXiv 2602.12125), λ being `extrapolation`.
    """
    teacher = scored.teacher.logprobs
    if extrapolation == 1:
        return teacher
    assert scored.reference is not None  # the recipe is refused without one
    return extrapolation * teacher + (1 - extrapolation) * scored.reference.logprobs


def to_weight_inputs(scored: ScoredResponse, step: int, extrapolation: float) -> ResponseTokens:
    """Return a response's tokens as weights see them, float64."""
    response, teacher = scored.response, scored.teacher
    columns = {
        "student_entropy": response.entropies,
        "student_top_ids": response.top_ids,
        "student_top_logp": response.top_logprobs,
        "teacher_entropy": teacher.entropies,
        "teacher_top_ids": teacher.top_ids,
        "teacher_logp_of_student_top": teacher.student_top_logprobs,
    }
    student_logp_T = response.logprobs.astype(np.float64)
    return ResponseTokens(
        student_logp_T,
        teacher.logprobs.astype(np.float64),
        target_logprobs(scored, extrapolation).astype(np.float64) - student_logp_T,
        step,
        {
            name: value.astype(np.float64) if value.dtype == np.float32 else value
            for name, value in columns.items()
            if value is not None
        },
    )

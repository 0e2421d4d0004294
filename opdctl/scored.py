"""Responses joined with their teacher scores, by id, part by part. Imports no torch, so the analysis needs no model."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from opdctl.errors import ExitCode, OpdctlError
from opdctl.records import Logprobs, Response, Scored
from opdctl.run import Run
from opdctl.store import read_rows, read_scores


def read_scored(run: Run, step: int) -> Iterator[Scored]:
    """Yield a step's responses with their teacher scores, one verified part in memory at a time.

    Raises OpdctlError (code 3) when a part is missing or damaged, or when responses and scores do not join.
    """
    rollout, scores = run.rollout(step), run.scores(step)
    for index in range(len(rollout.names)):
        responses = rollout.verify(index)
        yield from join(read_rows(responses, Response), read_scores(scores.verify(index), rollout.sha256(index)))


def join(responses: Sequence[Response], scores: Mapping[str, Logprobs]) -> list[Scored]:
    """Join strictly by sample id. Raises OpdctlError (code 3) for a missing, spare, short or non-finite score."""
    wanted = {response.sample_id for response in responses}
    if len(wanted) != len(responses) or wanted != scores.keys():
        odd = sorted(wanted.symmetric_difference(scores))[:3] or ["a sample id that occurs twice"]
        raise OpdctlError(f"responses and teacher scores do not join: {', '.join(odd)}", code=ExitCode.DATA)
    joined = []
    for response in responses:
        teacher = scores[response.sample_id]
        if len(teacher) != len(response.response_ids) or len(response.logprobs) != len(response.response_ids):
            raise OpdctlError(
                f"{response.sample_id}: {len(response.response_ids)} tokens, {len(response.logprobs)} student and "
                f"{len(teacher)} teacher log-probs",
                code=ExitCode.DATA,
            )
        for who, values in (("student", response.logprobs), ("teacher", teacher)):
            if not np.isfinite(values).all():
                position = int(np.argmin(np.isfinite(values)))
                raise OpdctlError(
                    f"{response.sample_id}: the {who}'s log-prob at position {position} is {values[position]}",
                    hint="a token the model gives no probability, or a model that computes NaN in its dtype",
                    code=ExitCode.DATA,
                )
        joined.append(Scored(response, teacher))
    return joined

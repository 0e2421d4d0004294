"""The artifacts' records: their columns, types, ids and logprob_metadata. Imports no torch.

    prompts.parquet              one row a prompt, in the order drawn
    rollout/part-*.parquet       one row a response
    teacher/part-*.safetensors   one entry a response, for the responses of the rollout part of the same number; so
    reference/part-*.safetensors too where the recipe names a reference model
    eval/**/part-*.parquet       one row a graded response

Everything is joined by id, strictly, never by position. Token ids are stored and passed on; text is never tokenised
again. Log-probs are natural logarithms of the token that was sampled, in nats, float32.

Shapes: T tokens of one response, K most probable tokens at each, D hidden size.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Ids = npt.NDArray[np.int32]
Logprobs = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, templated to token ids. `answer` is the gold answer, or None where there is none; `teacher` names
    the scorer of its responses, such as `teacher` or `teacher-math`; `teacher_prompt_ids` is what it reads, if that is
    another prompt."""

    prompt_id: str
    prompt_ids: Ids
    answer: str | None
    teacher: str
    teacher_prompt_ids: Ids | None = None


@dataclass(frozen=True, slots=True)
class Response:
    """One response that the student drew.

    logprobs: of each response id, under the policy that drew it. finish_reason: "stop" (the last id is an end of
    sequence, which belongs to the response) or "length". policy_version: updates that policy had seen. Only where
    the recipe asks for them: entropies [T] of the whole distribution at each token, in nats, and its most probable
    tokens, falling, as top_ids and top_logprobs [T, K]. For example, the first sample of prompt `sort12-abc` at step 3
    is `sort12-abc/00003/0`.
    """

    sample_id: str
    prompt_id: str
    prompt_ids: Ids
    response_ids: Ids
    logprobs: Logprobs
    finish_reason: str
    policy_version: int
    source: str
    teacher: str
    answer: str | None
    entropies: Logprobs | None = None
    top_ids: Ids | None = None
    top_logprobs: Logprobs | None = None


@dataclass(frozen=True, slots=True)
class TokenScores:
    """What a model says of one response's T tokens. All but the log-probs are there only if the recipe asks for them.

    entropies [T] are of its whole distribution. top_ids and top_logprobs [T, K] are its own most probable tokens,
    falling; student_top_logprobs [T, K] are its log-probs of the student's. hidden_states reads the last hidden states
    [T, D] from disk: with the output matrix they give the whole distribution, and are too large to be kept.
    """

    logprobs: Logprobs
    entropies: Logprobs | None = None
    top_ids: Ids | None = None
    top_logprobs: Logprobs | None = None
    student_top_logprobs: Logprobs | None = None
    hidden_states: Callable[[], npt.NDArray[np.float32]] | None = None


@dataclass(frozen=True, slots=True)
class GradedResponse:
    """One response of an evaluation.

    extracted: the answer read from it. verdict: ok, or why it could not be judged. vote: what it counts as in a
    majority vote: the gold answer where it is right, else one spelling for all equal wrong answers; None where it has
    no answer.
    """

    sample_id: str
    problem_id: str
    response_ids: Ids
    text: str
    finish_reason: str
    gold: str
    extracted: str | None
    correct: bool
    verdict: str
    vote: str | None


@dataclass(frozen=True, slots=True)
class ScoredResponse:
    """A response joined with what its teacher, and the reference model if there is one, say of its tokens."""

    response: Response
    teacher: TokenScores
    reference: TokenScores | None = None


_IDS = pa.list_(pa.int32())
_LOGPROBS = pa.list_(pa.float32())
PROMPTS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("prompt_ids", _IDS),
        ("answer", pa.string()),
        ("teacher", pa.string()),
        ("teacher_prompt_ids", _IDS),
    ]
)
RESPONSES = pa.schema(
    [
        ("sample_id", pa.string()),
        ("prompt_id", pa.string()),
        ("prompt_ids", _IDS),
        ("response_ids", _IDS),
        ("logprobs", _LOGPROBS),
        ("finish_reason", pa.string()),
        ("policy_version", pa.int32()),
        ("source", pa.string()),
        ("teacher", pa.string()),
        ("answer", pa.string()),
        ("entropies", _LOGPROBS),
        ("top_ids", _IDS),
        ("top_logprobs", _LOGPROBS),
    ]
)
GRADED = pa.schema(
    [
        ("sample_id", pa.string()),
        ("problem_id", pa.string()),
        ("response_ids", _IDS),
        ("text", pa.string()),
        ("finish_reason", pa.string()),
        ("gold", pa.string()),
        ("extracted", pa.string()),
        ("correct", pa.bool_()),
        ("verdict", pa.string()),
        ("vote", pa.string()),
    ]
)


def sample_id(prompt_id: str, step: int, sample: int) -> str:
    """Return the id of the `sample`-th response to a prompt at a step."""
    return f"{prompt_id}/{step:05d}/{sample}"


def sample_seed(run_seed: int, sample_id: str) -> int:
    """Return the seed of one response, in [0, 2^63): the same whichever worker draws it, in whatever order."""
    digest = hashlib.blake2b(f"{run_seed}/{sample_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def cumulative_offsets(lengths: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return where each of the concatenated sequences begins, and where the last one ends: [len + 1]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.asarray(lengths, np.int64), dtype=np.int64)])


SCHEMA_VERSION = 4
"""Of the artifacts and of what `--json` prints."""

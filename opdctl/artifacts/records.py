"""The artifacts' records: their columns, types, ids and meaning. Imports no torch.

    prompts.parquet              one row a prompt, in the order of the source
    rollout/part-*.parquet       one row a response
    teacher/part-*.safetensors   one entry a response, for the responses of the rollout part of the same number;
    reference/part-*.safetensors the same by the reference model, if the recipe names one
    eval/*/*/part-*.parquet      one row a graded response
    eval/*/*/prompts/*.parquet   one row a problem

Records are joined by id, strictly, never by position. Token ids are stored and passed on; text is never tokenized
again. Log-probs are natural logarithms of the sampled token's probability, in nats, float32.

A column is one field here. Its annotation decides its type on disk and whether it may be null; a column that a file
lacks has its default, so that files of earlier versions can be read.

Shape suffixes: see Notation in CONTRIBUTING.md.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
"""Token ids, [T]."""
Logprobs = npt.NDArray[np.float32]
"""Log-probs or entropies in nats, [T]."""
PER_TOKEN = "per token"
STORED_IF_PRESENT = "stored if present"
TopKIds = Annotated[Ids, PER_TOKEN]
"""Token ids, [T, K], most probable first."""
TopKLogprobs = Annotated[Logprobs, PER_TOKEN]
"""Their log-probs in nats, [T, K]."""
SamplingLogprobs = Annotated[Logprobs, STORED_IF_PRESENT]
"""Log-probs in nats, [T], in a column that a file lacks if no row has them."""
TokenSpan = Annotated[Ids, STORED_IF_PRESENT]
"""The span [start, end) of some tokens of a response, in a column that a file lacks if no row has it."""
StoredInt = Annotated[int, STORED_IF_PRESENT]
StoredFloat = Annotated[float, STORED_IF_PRESENT]
StoredText = Annotated[str, STORED_IF_PRESENT]
LossMask = npt.NDArray[np.bool_]
"""Whether each token of a response is the student's own, [T]. The others, such as the outputs of tools, were read by
it: they are not learned and not analysed."""
StoredMask = Annotated[LossMask, STORED_IF_PRESENT]
RoutedExperts = npt.NDArray[np.uint8]
"""The ids of the experts of each token that the engine read, flat: [prompt and response tokens but the last, decoder
layers, experts of a token], one byte each, or two (little-endian) of more than 256 experts. 0 in dense layers."""
ONE_BYTE_EXPERTS = 256
"""Up to this number of experts an id takes one byte, as in vLLM."""
HiddenStates = Callable[[], npt.NDArray[np.float32]]
"""Reads the last hidden states, [T, D], from disk: they are too large to be kept in memory."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt, templated to token ids.

    answer: the gold answer, if there is one. teacher: the scorer of its responses, such as `teacher` or `teacher-math`.
    teacher_prompt_ids: the prompt that this teacher reads, if it differs. row: that of the source in JSON, for the
    environment of the rollout.
    """

    prompt_id: str
    prompt_ids: Ids
    answer: str | None
    teacher: str
    teacher_prompt_ids: Ids | None = None
    row: StoredText | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine samples: response ids, their log-probs under the sampled distribution, and why it ended.

    finish_reason: "stop" (with the last id, which belongs to the response: an end of sequence, another id that ends it,
    or the end of a stop string) or "length". On request: entropies [T] of the policy's own distribution at each token,
    its most probable tokens with their log-probs, and the experts that its routers chose.

    sampling_logprobs: on request, if the settings change the distribution that is sampled: the log-probs under it. Then
    `logprobs` are those of the policy's own, at temperature 1.
    """

    response_ids: Ids
    logprobs: Logprobs
    finish_reason: str
    entropies: Logprobs | None = None
    top_ids: TopKIds | None = None
    top_logprobs: TopKLogprobs | None = None
    routed_experts: RoutedExperts | None = None
    sampling_logprobs: SamplingLogprobs | None = None

    @property
    def sampled_logprobs(self) -> Logprobs:
        """The log-probs under the distribution that was sampled, [T]."""
        return self.logprobs if self.sampling_logprobs is None else self.sampling_logprobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Response(Completion):
    """One response of the student.

    policy_version: the number of updates of the policy that sampled it. For example, the first sample of prompt
    `sort12-abc` at step 3 is `sort12-abc/00003/0`.

    loss_mask: None if all tokens are the student's own. Of a trajectory: `response_ids` are all tokens after the first
    prompt, the other columns have arbitrary finite values at tokens that are not the student's own, and the remaining
    fields are the number of calls of the student, the seconds between them, and the environment's reward.
    """

    sample_id: str
    prompt_id: str
    prompt_ids: Ids
    policy_version: int
    source: str
    teacher: str
    answer: str | None
    loss_mask: StoredMask | None = None
    turns: StoredInt | None = None
    tool_seconds: StoredFloat | None = None
    reward: StoredFloat | None = None

    @property
    def own_ids(self) -> Ids:
        """The ids of the student's own tokens."""
        return self.response_ids if self.loss_mask is None else self.response_ids[self.loss_mask]


@dataclass(frozen=True, slots=True)
class TokenScores:
    """The scores of one response's T tokens by one scorer. All but the log-probs are stored on request.

    entropies are those of the scorer's whole distribution. top_ids and top_logprobs are the scorer's own most probable
    tokens; student_top_logprobs are its log-probs of the student's. The hidden states and the output matrix together
    give the complete distribution.
    """

    logprobs: Logprobs
    entropies: Logprobs | None = None
    top_ids: TopKIds | None = None
    top_logprobs: TopKLogprobs | None = None
    student_top_logprobs: TopKLogprobs | None = None
    hidden_states: HiddenStates | None = None


@dataclass(frozen=True, slots=True)
class EvalPrompt:
    """The prompt of a problem, templated to token ids at the start of the evaluation.

    text: the ids, decoded with special tokens; None in older files.
    """

    problem_id: str
    prompt_ids: Ids
    text: str | None = None


@dataclass(frozen=True, slots=True)
class GradedResponse:
    """One response of an evaluation.

    extracted: the answer found in it. verdict: "ok", or why the answer could not be graded. vote: what it counts as in
    a majority vote: the gold answer if it is correct, else one spelling for all equal incorrect answers; None without
    an answer. math_verify: whether math-verify alone calls it correct; None where it was not asked, as in older rows.
    ended_thinking: the tokens that ended its thinking at the end of the budget, which were not sampled.
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
    math_verify: bool | None = None
    ended_thinking: TokenSpan | None = None


@dataclass(frozen=True, slots=True)
class ScoredResponse:
    """A response joined with the scores of its teacher and, if there is one, of the reference model.

    The columns of tokens have the T tokens of the student only. `response.response_ids` and `response.loss_mask` have
    all.
    """

    response: Response
    teacher: TokenScores
    reference: TokenScores | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """A response that another program sampled, as read from its files. What is unknown is None.

    response_ids: all tokens after the first prompt, those of tools and other speakers too; loss_mask, as in Response,
    marks those of the student. The columns of tokens are as long as `response_ids`, with arbitrary finite values
    at tokens that are not the student's own. logprobs: under the policy that sampled it, at temperature 1.
    sampling_logprobs: under the distribution that was sampled, if it differs. teacher_logprobs: of a file that was
    scored. teacher_prompt_ids: the prompt that the teacher reads, if it differs. location: the file and the row, for
    errors.
    """

    sample_id: str
    prompt_id: str
    prompt_ids: Ids
    response_ids: Ids
    loss_mask: LossMask | None = None
    finish_reason: str | None = None
    logprobs: Logprobs | None = None
    sampling_logprobs: Logprobs | None = None
    teacher_logprobs: Logprobs | None = None
    entropies: Logprobs | None = None
    top_ids: Ids | None = None
    top_logprobs: Logprobs | None = None
    answer: str | None = None
    reward: float | None = None
    turns: int | None = None
    tool_seconds: float | None = None
    step: int | None = None
    policy_version: int | None = None
    teacher_prompt_ids: Ids | None = None
    location: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedResponse:
    """A response with its scores, for other programs: one row of the files that `opdctl run export` and `opdctl
    score-teacher --input` write. docs/artifacts.md defines the columns.

    prompt, response: the decoded ids, special tokens included. teacher_prompt_ids: the prompt that the teacher reads,
    if it differs. sampling_logprobs: under the distribution that was sampled, if it is not the student's own. weights:
    of each token, by the stored log-probs. extracted, correct: the answer in the student's own tokens, and whether it
    is the gold answer. What is unknown is None.
    """

    step: int | None = None
    sample_id: str
    prompt_id: str
    policy_version: int | None = None
    prompt: str
    response: str
    answer: str | None = None
    extracted: str | None = None
    correct: bool | None = None
    prompt_ids: Ids
    response_ids: Ids
    loss_mask: LossMask | None = None
    finish_reason: str | None = None
    turns: int | None = None
    tool_seconds: float | None = None
    reward: float | None = None
    teacher: str
    teacher_prompt_ids: Ids | None = None
    student_logprobs: Logprobs | None = None
    sampling_logprobs: Logprobs | None = None
    teacher_logprobs: Logprobs
    reference_logprobs: Logprobs | None = None
    student_entropies: Logprobs | None = None
    teacher_entropies: Logprobs | None = None
    student_top_ids: TopKIds | None = None
    student_top_logprobs: TopKLogprobs | None = None
    teacher_top_ids: TopKIds | None = None
    teacher_top_logprobs: TopKLogprobs | None = None
    teacher_student_top_logprobs: TopKLogprobs | None = None
    weights: Logprobs | None = None


def sample_id(prompt_id: str, step: int, sample: int) -> str:
    """Return the id of the `sample`-th response to a prompt at a step."""
    return f"{prompt_id}/{step:05d}/{sample}"


def sample_seed(run_seed: int, sample_id: str) -> int:
    """Return the seed of one response, in [0, 2^63). It does not depend on the worker or the order of work."""
    digest = hashlib.blake2b(f"{run_seed}/{sample_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def cumulative_offsets(lengths: Sequence[int]) -> npt.NDArray[np.int64]:
    """Return the start of each of the concatenated sequences and the end of the last: [len + 1]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.asarray(lengths, np.int64), dtype=np.int64)])

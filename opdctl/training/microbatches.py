"""Micro-batches: a step's scored responses with token weights and loss scales.

Shape suffixes: see Notation in CONTRIBUTING.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from opdctl.artifacts.records import Logprobs, LossMask, ScoredResponse
from opdctl.losses.objectives import Objective
from opdctl.losses.token_weights import Floats, Weight, weigh
from opdctl.models.batching import SequenceBatch, pack_batch, pad_batch
from opdctl.recipe.schema import Recipe, Train
from opdctl.runs.scored_responses import select_tokens, target_logprobs, to_weight_inputs
from opdctl.training.division import Division, divide


@dataclass(frozen=True)
class MicroBatch:
    """Complete responses to prompts of one teacher, padded or packed, with the stored values of their tokens.

    Log-probs are in nats. rollout_logp_N: under the student's own distribution, by the rollout's engine.
    sampling_logp_N: under the distribution that was sampled, by default the same. weight_N: the token weights.
    loss_scale_N: the factor of a token's loss in the step's loss: weight / denominator, or 1 / denominator if the
    weight modulates the extrapolation, which is in target_logp_N. Tokens whose factor is 0 are left out of everything
    but `left_out`, and so are the tokens after the last one that counts: the model need not read them.
    """

    samples: list[ScoredResponse]
    sequences: SequenceBatch
    rollout_logp_N: Tensor
    sampling_logp_N: Tensor
    teacher_logp_N: Tensor
    target_logp_N: Tensor
    weight_N: Tensor
    loss_scale_N: Tensor
    left_out: Sequence["LeftOut"] = ()
    """Of each response."""
    old_logp_N: Tensor | None = None
    """The student's log-probs before the step's first update; None until they are computed."""
    is_filler: bool = False
    """Whether it only keeps the collective calls of the ranks aligned. Its loss scales are 0."""


class TokenSupport(NamedTuple):
    """The ids of a top-k objective for each token, and the teacher's log-probs of them in nats, [N, K] each."""

    ids_NK: Tensor
    teacher_logp_NK: Tensor


class LeftOut(NamedTuple):
    """The tokens of a response that do not count in the loss: their number, and sums of their stored A in nats."""

    tokens: int
    advantage: float
    abs_advantage: float


def split_in_half(batch: MicroBatch) -> list[MicroBatch]:
    """Return two micro-batches with half of the responses each. A single response is returned unsplit."""
    half = len(batch.samples) // 2
    num_tokens = sum(batch.sequences.lengths[:half])

    def select(responses: slice, tokens: slice) -> MicroBatch:
        columns: dict[str, Any] = {k: value[tokens] for k, value in vars(batch).items() if isinstance(value, Tensor)}
        samples, left_out = batch.samples[responses], batch.left_out[responses]
        sequences = _join(samples, batch.sequences.packed is not None, batch.loss_scale_N.device)
        return replace(batch, samples=samples, sequences=sequences, left_out=left_out, **columns)

    if not half:
        return [batch]
    return [select(slice(half), slice(num_tokens)), select(slice(half, None), slice(num_tokens, None))]


def _join(samples: list[ScoredResponse], packs: bool, device: torch.device | str) -> SequenceBatch:
    join, responses = pack_batch if packs else pad_batch, [sample.response for sample in samples]
    pairs = [(response.prompt_ids, response.response_ids) for response in responses]
    return join(pairs, device, [response.loss_mask for response in responses])


def make_micro_batches(
    recipe: Recipe,
    step: int,
    scored: Sequence[ScoredResponse],
    weight: Weight,
    device: str,
    old_logprobs: Mapping[str, Logprobs] | None = None,
    division: Division = Division(),  # noqa: B008 - immutable
    rank: int = 0,
) -> list[MicroBatch]:
    """Weight a step's tokens, and return a rank's micro-batches, each of one teacher and within the token budget.

    old_logprobs: the trainer's log-probs of each response by its id, [T], in nats. The weights then read these instead
    of the stored ones, and the micro-batches contain them.
    """
    own = [old_logprobs[sample.response.sample_id] if old_logprobs else None for sample in scored]
    # Some weights depend on all responses of the step, so they are computed before the split.
    weights = weigh(weight, [to_weight_inputs(sample, step, logp) for sample, logp in zip(scored, own, strict=True)])
    factors = [np.ones(len(w)) for w in weights] if recipe.weight.modulates == "extrapolation" else weights
    denominators = _loss_denominators(factors, recipe.train)
    counts = [factor_T > 0 for factor_T in factors]
    selected = [select_tokens(sample, counts_T) for sample, counts_T in zip(scored, counts, strict=True)]
    sizes = [len(sample.response.prompt_ids) + len(sample.response.response_ids) for sample in selected]
    teachers = [sample.response.teacher for sample in scored]
    groups = [[i for i, of in enumerate(teachers) if of == teacher] for teacher in recipe.teacher_models()]
    batches = []
    for share in divide(groups, sizes, recipe.train.tokens_per_micro_batch, division)[rank]:
        rows, scale = share.indices, 0.0 if share.is_filler else 1.0
        loss_scales = [scale * factors[i][counts[i]] / denominators[i] for i in rows]
        samples, batch_weights = [selected[i] for i in rows], [weights[i][counts[i]] for i in rows]
        batch = _micro_batch(recipe, samples, batch_weights, loss_scales, device, division.packs)
        old = [logp_T[counts[i]] for i in rows if (logp_T := own[i]) is not None]
        old_logp_N = _column(old, device) if old_logprobs else None
        left_out = [_left_out(scored[i], ~counts[i]) for i in rows]
        batches.append(replace(batch, old_logp_N=old_logp_N, left_out=left_out, is_filler=share.is_filler))
    return batches


def _left_out(sample: ScoredResponse, is_left_out_T: LossMask) -> LeftOut:
    advantage_T = (sample.teacher.logprobs - sample.response.logprobs)[is_left_out_T].astype(np.float64)
    return LeftOut(len(advantage_T), float(advantage_T.sum()), float(np.abs(advantage_T).sum()))


def _loss_denominators(factors: Sequence[Floats], settings: Train) -> list[int]:
    """Return for each response the denominator of its tokens' losses. factors: those of the losses, [T] each.

    With the aggregate `token`, it is the number of tokens of the step, so the gradient does not depend on the
    micro-batches; a mean of their means would. With `response`, it is the number of tokens of the response times the
    number of responses. The denominator `selected` counts tokens of factor > 0, and responses that have such a token
    (TIP, arXiv 2604.14084, Eq. 7).
    """
    selected = settings.denominator == "selected"
    counts = [int(np.count_nonzero(factor_T)) if selected else len(factor_T) for factor_T in factors]
    if settings.aggregate == "token":
        return [max(sum(counts), 1)] * len(counts)
    num_responses = sum(count > 0 for count in counts)
    return [max(count, 1) * max(num_responses, 1) for count in counts]


def _micro_batch(
    recipe: Recipe,
    samples: list[ScoredResponse],
    weights: list[Floats],
    loss_scales: list[Floats],
    device: str,
    packs: bool,
) -> MicroBatch:
    column = partial(_column, device=device)
    responses, teachers = [sample.response for sample in samples], [sample.teacher for sample in samples]
    factors = weights if recipe.weight.modulates == "extrapolation" else [None] * len(samples)
    targets = [target_logprobs(s, recipe.train.extrapolation, w) for s, w in zip(samples, factors, strict=True)]
    return MicroBatch(
        samples=samples,
        sequences=_join(samples, packs, device),
        rollout_logp_N=column([response.logprobs for response in responses]),
        sampling_logp_N=column([response.sampled_logprobs for response in responses]),
        teacher_logp_N=column([teacher.logprobs for teacher in teachers]),
        target_logp_N=column(targets),
        weight_N=column(weights),
        loss_scale_N=column(loss_scales),
    )


def read_support(samples: Sequence[ScoredResponse], objective: Objective, device: str) -> TokenSupport | None:
    """Return the support of a top-k objective for the tokens of a micro-batch, None if the objective has none.

    The widest columns: they are copied for one micro-batch at a time.
    """
    responses, teachers = [sample.response for sample in samples], [sample.teacher for sample in samples]
    if objective.support == "teacher":
        ids, logprobs = [teacher.top_ids for teacher in teachers], [teacher.top_logprobs for teacher in teachers]
    elif objective.support == "student":
        ids = [response.top_ids for response in responses]
        logprobs = [teacher.student_top_logprobs for teacher in teachers]
    else:
        return None
    top_k = getattr(objective, "top_k", None)  # the stored columns may be wider
    return TokenSupport(_column(ids, device, np.int64)[:, :top_k], _column(logprobs, device)[:, :top_k])


def _column(values: Sequence[npt.NDArray[np.generic] | None], device: str, dtype: type = np.float32) -> Tensor:
    stored = [value for value in values if value is not None]  # recipe validation ensures that all are stored
    return torch.from_numpy(np.concatenate(stored).astype(dtype)).to(device)

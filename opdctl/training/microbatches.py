"""A step's scored responses as micro-batches: what each token weighs, and how much its loss counts in the step's.

Knows no model. Shapes: N response tokens of a micro-batch, K ids of a top-k support.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from opdctl.artifacts.records import ScoredResponse
from opdctl.losses.objectives import Objective
from opdctl.losses.token_weights import Floats, Weight, weigh
from opdctl.models.batching import PaddedBatch, by_token_budget, pad_batch
from opdctl.recipe.schema import Recipe
from opdctl.runs.scored_responses import target_logprobs, to_weight_inputs


@dataclass(frozen=True)
class MicroBatch:
    """Whole responses of one teacher, padded, with what is stored of each of their N tokens.

    loss_scale_N: what a token's loss is multiplied by, its weight included. support_ids_NK, teacher_logp_NK: the ids of
    a top-k objective and the teacher's log-probs of them.
    """

    samples: list[ScoredResponse]
    padded: PaddedBatch
    rollout_logp_N: Tensor
    teacher_logp_N: Tensor
    target_logp_N: Tensor
    weight_N: Tensor
    loss_scale_N: Tensor
    support_ids_NK: Tensor | None
    teacher_logp_NK: Tensor | None
    old_logp_N: Tensor | None = None
    """The student's log-probs before the step's first update, once they are known."""
    counts: bool = True
    """False where it only keeps a rank in step with the others."""


def split_in_half(batch: MicroBatch) -> list[MicroBatch]:
    """Return a micro-batch as two, of half the responses each; one of a single response as it is."""
    half = len(batch.samples) // 2
    tokens = sum(batch.padded.lengths[:half])

    def part(samples: list[ScoredResponse], rows: slice) -> MicroBatch:
        columns: dict[str, Any] = {k: value[rows] for k, value in vars(batch).items() if isinstance(value, Tensor)}
        return replace(batch, samples=samples, padded=_padded(samples, batch.loss_scale_N.device), **columns)

    cuts = ((batch.samples[:half], slice(tokens)), (batch.samples[half:], slice(tokens, None)))
    return [part(*cut) for cut in cuts] if half else [batch]


def _padded(samples: list[ScoredResponse], device: torch.device | str) -> PaddedBatch:
    return pad_batch([(sample.response.prompt_ids, sample.response.response_ids) for sample in samples], device)


def micro_batches_of_rank(batches: Sequence[MicroBatch], rank: int, world: int) -> list[MicroBatch]:
    """Return the micro-batches of one of `world` ranks, the same number for each.

    Sharded layers are gathered by all ranks together, so one that has none left goes through the smallest again, with
    losses of zero.
    """
    smallest = min(batches, key=lambda batch: batch.padded.input_ids_BT.numel())
    idle = replace(smallest, loss_scale_N=torch.zeros_like(smallest.loss_scale_N), counts=False)
    return [batches[i] if i < len(batches) else idle for i in range(rank, -(-len(batches) // world) * world, world)]


def micro_batches(
    recipe: Recipe, step: int, scored: Sequence[ScoredResponse], weight: Weight, objective: Objective, device: str
) -> list[MicroBatch]:
    """Weigh a step's tokens and cut its responses into micro-batches, each of one teacher, by the token budget."""
    # Weights need whole responses and, some of them, the whole step: they are taken before anything is batched.
    weights = weigh(weight, [to_weight_inputs(sample, step, recipe.train.extrapolation) for sample in scored])
    lengths = [len(sample.response.response_ids) for sample in scored]
    divisors = _loss_denominators(lengths, recipe.train.aggregate)
    batches = []
    for teacher in recipe.teacher_models():
        own = [i for i, sample in enumerate(scored) if sample.response.teacher == teacher]
        sizes = [len(scored[i].response.prompt_ids) + lengths[i] for i in own]
        for cut in by_token_budget(sizes, recipe.train.tokens_per_micro_batch):
            rows = [own[i] for i in cut]
            shares = [weights[i] / divisors[i] for i in rows]
            samples = [scored[i] for i in rows]
            batches.append(_micro_batch(recipe, samples, [weights[i] for i in rows], shares, objective, device))
    return batches


def _loss_denominators(lengths: list[int], aggregate: str) -> list[int]:
    """Return what each response's losses are divided by.

    The step's loss is (sum over all tokens) / (their number). Dividing each token's by that one number gives its
    gradient whatever the micro-batches; a mean of their means would not. By responses, it is each response's mean, so
    its own length, over the number of responses.
    """
    if aggregate == "token":
        return [max(sum(lengths), 1)] * len(lengths)
    responses = sum(length > 0 for length in lengths)
    return [max(length, 1) * max(responses, 1) for length in lengths]


def _micro_batch(
    recipe: Recipe,
    samples: list[ScoredResponse],
    weights: list[Floats],
    shares: list[Floats],
    objective: Objective,
    device: str,
) -> MicroBatch:
    def column(values: Sequence[npt.NDArray[np.generic] | None], dtype: type = np.float32) -> Tensor:
        stored = [value for value in values if value is not None]  # `needs` has seen to it that none is missing
        return torch.from_numpy(np.concatenate(stored).astype(dtype)).to(device)

    responses, teachers = [sample.response for sample in samples], [sample.teacher for sample in samples]
    ids_NK, logp_NK = None, None
    if objective.support == "teacher":
        ids_NK = column([teacher.top_ids for teacher in teachers], np.int64)
        logp_NK = column([teacher.top_logprobs for teacher in teachers])
    elif objective.support == "student":
        ids_NK = column([response.top_ids for response in responses], np.int64)
        logp_NK = column([teacher.student_top_logprobs for teacher in teachers])
    top_k = getattr(objective, "top_k", None)  # more may be stored than this objective asks for
    return MicroBatch(
        samples=samples,
        padded=_padded(samples, device),
        rollout_logp_N=column([response.logprobs for response in responses]),
        teacher_logp_N=column([teacher.logprobs for teacher in teachers]),
        target_logp_N=column([target_logprobs(sample, recipe.train.extrapolation) for sample in samples]),
        weight_N=column(weights),
        loss_scale_N=column(shares),
        support_ids_NK=None if ids_NK is None else ids_NK[:, :top_k],
        teacher_logp_NK=None if logp_NK is None else logp_NK[:, :top_k],
    )

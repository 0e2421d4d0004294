"""Responses with their scores and weights as one Parquet file: `opdctl run export`. docs/artifacts.md defines it."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from opdctl import signals
from opdctl.analysis.samples import response_groups
from opdctl.analysis.shown_weights import ShownWeights
from opdctl.artifacts import tables
from opdctl.artifacts.exchange import describe_file
from opdctl.artifacts.records import ExportedResponse, Response, ScoredResponse
from opdctl.evaluation.benchmarks import find_benchmark
from opdctl.evaluation.graders import Grade
from opdctl.losses.token_weights import Floats, Weight, weigh
from opdctl.runs.run import Run
from opdctl.runs.scored_responses import to_weight_inputs


def export_responses(run: Run, steps: Sequence[int], weights: ShownWeights, path: Path) -> int:
    """Write the scored responses of these steps, and return their number.

    The weight is the one that the run was trained with, or another one that the command sets in the recipe.

    Responses are read and written in groups, so that a step need not fit into memory.

    Raises:
        OpdctlError: a part is missing or corrupt, or the file cannot be written.
    """
    label, count = weights.what_if or weights.own, 0
    with tables.open_row_writer(path, ExportedResponse, _describe(run, steps, label)) as write:
        for step in steps:
            token_weight = weights.at(step)[label]
            for group in response_groups(run, step, {label: token_weight}):
                signals.check()
                rows = list(_rows(run, step, group, token_weight))
                write(rows)
                count += len(rows)
    return count


def _describe(run: Run, steps: Sequence[int], label: str) -> Mapping[str, str]:
    """Return the metadata of the file. How a scorer computed its log-probs is that of the last of the steps."""
    manifests = {name: stage.manifest() for step in steps for name, stage in run.score_stages(step).items()}
    models = run.recipe.models()
    scorers = {
        name: {"name": models[name].model, **manifest["logprob_metadata"]}
        for name, manifest in manifests.items()
        if manifest
    }
    return {**describe_file(scorers), "opdctl.weight": label, "opdctl.recipe": run.recipe.to_toml()}


def _rows(run: Run, step: int, group: Sequence[ScoredResponse], weight: Weight) -> Iterator[ExportedResponse]:
    decode, grades = run.student.tokenizer.decode, _grade(run, [scored.response for scored in group])
    weights: list[Floats] = weigh(weight, [to_weight_inputs(scored, step) for scored in group])
    for scored, weight_T, grade in zip(group, weights, grades, strict=True):
        response, teacher, reference = scored.response, scored.teacher, scored.reference
        teacher_prompt_ids = run.prompt_ids(response.teacher, response)
        spread = partial(_spread, response)
        has_own_prompt = teacher_prompt_ids is not response.prompt_ids
        yield ExportedResponse(
            step=step,
            sample_id=response.sample_id,
            prompt_id=response.prompt_id,
            policy_version=response.policy_version,
            prompt=decode(response.prompt_ids),
            response=decode(response.response_ids),
            answer=response.answer,
            extracted=grade.extracted if grade else None,
            correct=grade.correct if grade else None,
            prompt_ids=response.prompt_ids,
            response_ids=response.response_ids,
            loss_mask=response.loss_mask,
            turns=response.turns,
            tool_seconds=response.tool_seconds,
            reward=response.reward,
            finish_reason=response.finish_reason,
            teacher=response.teacher,
            teacher_prompt_ids=teacher_prompt_ids if has_own_prompt else None,
            student_logprobs=spread(response.logprobs),
            sampling_logprobs=spread(response.sampling_logprobs),
            teacher_logprobs=spread(teacher.logprobs),
            reference_logprobs=spread(reference.logprobs) if reference else None,
            student_entropies=spread(response.entropies),
            teacher_entropies=spread(teacher.entropies),
            student_top_ids=spread(response.top_ids),
            student_top_logprobs=spread(response.top_logprobs),
            teacher_top_ids=spread(teacher.top_ids),
            teacher_top_logprobs=spread(teacher.top_logprobs),
            teacher_student_top_logprobs=spread(teacher.student_top_logprobs),
            weights=spread(weight_T.astype(np.float32)),
        )


def _grade(run: Run, responses: Sequence[Response]) -> list[Grade | None]:
    """Grade the answers as the first benchmark of the recipe does; not those that only a sandbox can."""
    grader = find_benchmark(run.recipe.eval.bench[0], run.recipe.eval).grader
    graded = [each for each in responses if each.answer is not None and not grader.runs_code]
    texts = run.student.tokenizer.batch_decode([each.own_ids for each in graded], skip_special_tokens=True)
    grades = grader.grade([(str(each.answer), text) for each, text in zip(graded, texts, strict=True)])
    by_id = {each.sample_id: grade for each, grade in zip(graded, grades, strict=True)}
    return [by_id.get(each.sample_id) for each in responses]


def _spread(response: Response, values: Any) -> Any:
    """Return values of the student's own tokens with 0 at all other tokens of the response."""
    if values is None or response.loss_mask is None:
        return values
    spread = np.zeros((len(response.response_ids), *values.shape[1:]), values.dtype)
    spread[response.loss_mask] = values
    return spread

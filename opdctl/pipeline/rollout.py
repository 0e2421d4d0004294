"""rollout: the current student answers the step's prompts. Prompts in, Parquet parts of responses out."""

from collections.abc import Iterator
from functools import partial

from opdctl import console
from opdctl.artifacts.records import Prompt, Response, sample_seed
from opdctl.artifacts.stage_dir import ALL_PARTS, StageDir, WorkerShard
from opdctl.artifacts.tables import write_rows
from opdctl.engines import parity
from opdctl.engines.base import Completion, Request, ScoreRequest
from opdctl.engines.pool import EnginePool
from opdctl.runs.run import Run


def run_rollout(
    run: Run,
    step: int,
    engines: EnginePool,
    *,
    repair: bool = False,
    shard: WorkerShard = ALL_PARTS,
    wait: bool = False,
) -> int:
    """Draw the responses that a step still lacks and return how many parts that were; with `repair` damaged ones too.

    shard: the parts that are this worker's. wait: come back when all of them are there, also those that others have
    claimed. Raises OpdctlError when the step's student is not there (code 2), or when it was begun under other settings
    (code 4).
    """
    run.pin_policy_version(step)
    run = run.at(step)
    stage = run.rollout_stage(step)
    with stage.claim_parts(repair=repair, shard=shard, wait=wait) as parts:
        return _generate(run, step, engines, stage, parts) if parts else 0


def _generate(run: Run, step: int, engines: EnginePool, stage: StageDir, parts: Iterator[int]) -> int:
    settings, made = run.recipe.rollout, 0
    draws, policy = run.samples(step), run.policy_version(step)
    student = run.student_at(policy)
    for path in stage.finished_but_missing():
        console.warn(f"{path}: was finished, and is gone: it is made again")
    engine = engines.get("student", settings.engine, student)
    stage.start(
        engine.logprob_metadata
        | {"temperature": settings.temperature, "top_p": settings.top_p, "policy_version": policy}
    )
    with console.progress(f"rollout, step {step}", len(draws)) as advance:
        for index in parts:
            part = stage.items_of_part(draws, index)
            requests = [Request(prompt.prompt_ids, sample_seed(run.recipe.seed, name)) for name, prompt in part]
            completions = engine.generate(
                requests, settings, settings.batch_size, advance, entropy=settings.entropy, top_k=settings.top_k
            )
            if index == 0:
                answered = [
                    ScoreRequest(r.prompt_ids, c.response_ids) for r, c in zip(requests, completions, strict=True)
                ]
                parity.check_parity(run.recipe, settings.engine, student, answered, [c.logprobs for c in completions])
            rows = [_row(run, policy, *draw, completion) for draw, completion in zip(part, completions, strict=True)]
            tokens = sum(len(row.response_ids) for row in rows)
            made += stage.write(index, partial(write_rows, rows=rows, kind=Response), rows=len(rows), tokens=tokens)
    return made


def _row(run: Run, policy: int, sample_id: str, prompt: Prompt, completion: Completion) -> Response:
    return Response(
        sample_id=sample_id,
        prompt_id=prompt.prompt_id,
        prompt_ids=prompt.prompt_ids,
        response_ids=completion.response_ids,
        logprobs=completion.logprobs,
        finish_reason=completion.finish_reason,
        policy_version=policy,
        source=run.recipe.prompts.source,
        teacher=prompt.teacher,
        answer=prompt.answer,
        entropies=completion.entropies,
        top_ids=completion.top_ids,
        top_logprobs=completion.top_logprobs,
    )

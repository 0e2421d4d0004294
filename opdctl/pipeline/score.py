"""score-teacher: teachers, and a reference model, score each token of a step's responses. Rollout parts in,
safetensors parts out, in one folder a model."""

from collections.abc import Collection, Iterator
from functools import partial

from opdctl import console
from opdctl.artifacts.records import Response
from opdctl.artifacts.stage_dir import ALL_PARTS, StageDir, WorkerShard
from opdctl.artifacts.tables import read_rows, write_scores
from opdctl.engines import parity
from opdctl.engines.base import ScoreRequest
from opdctl.engines.pool import EnginePool
from opdctl.recipe.schema import Score
from opdctl.runs.run import REFERENCE, Run
from opdctl.runs.scored_responses import check_ids


def run_scoring(
    run: Run,
    step: int,
    engines: EnginePool,
    *,
    only: Collection[str] | None = None,
    repair: bool = False,
    shard: WorkerShard = ALL_PARTS,
    wait: bool = False,
) -> int:
    """Score the parts of a step that still lack it and return how many they were; with `repair` damaged ones too.

    only: the models to score with; all of the recipe's if None. shard: the parts that are this worker's. wait: come
    back when all of them are there, also those that others have claimed. Raises OpdctlError when the step's rollout is
    unfinished (code 1) or damaged (code 3), or when it was scored under other settings (code 4).
    """
    run, made = run.at(step), 0
    for name in run.scorers() if only is None else only:
        stage = run.score_stage(step, name)
        with stage.claim_parts(repair=repair, shard=shard, wait=wait) as parts:
            made += _score(run, step, name, engines, stage, parts) if parts else 0
    return made


def _score(run: Run, step: int, name: str, engines: EnginePool, stage: StageDir, parts: Iterator[int]) -> int:
    rollout, settings, model, made = run.rollout_stage(step), _settings(run.recipe.score, name), run.models[name], 0
    for path in stage.finished_but_missing():
        console.warn(f"{path}: was finished, and is gone: it is made again")
    engine = engines.get(name, settings.engine, model)
    # Temperature 1 and no top-p: the teacher is a reference, not a sampler.
    logprob_metadata = engine.logprob_metadata | {
        "temperature": "1",
        "logprobs": "raw, float32, nats",
        "model": run.digests[name],
        "tokenizer": model.tokenizer_digest,
    }
    stage.start(logprob_metadata)
    with console.progress(f"score-teacher {name}, step {step}", run.recipe.responses_per_step()) as advance:
        for index in parts:
            rows = read_rows(rollout.verify(index), Response)
            check_ids(rows, model)
            own = [row for row in rows if name in (row.teacher, REFERENCE)]
            answered = [ScoreRequest(run.prompt_ids(name, row), row.response_ids, row.top_ids) for row in own]
            scores = engine.score(answered, settings, advance)
            if index == 0 and own:
                parity.check_parity(run.recipe, settings.engine, model, answered, [each.logprobs for each in scores])
            part = logprob_metadata | {"rollout": rollout.sha256(index)}
            save = partial(write_scores, ids=[row.sample_id for row in own], scores=scores, logprob_metadata=part)
            made += stage.write(index, save, rows=len(own), tokens=sum(len(score.logprobs) for score in scores))
            advance(len(rows) - len(own))
    return made


def _settings(settings: Score, name: str) -> Score:
    """Of a reference nothing but the log-probs is ever asked for."""
    if name != REFERENCE:
        return settings
    nothing_else = {"entropy": False, "top_k": 0, "student_top_k": False, "hidden_states": False}
    return settings.model_copy(update=nothing_else)

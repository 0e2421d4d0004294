"""score-teacher: teachers, and a reference model, score each token of a step's responses.

Reads rollout parts, writes safetensors parts in one directory for each scorer.
"""

from collections.abc import Collection
from functools import partial

from opdctl.artifacts.records import Response, TokenScores
from opdctl.artifacts.tables import read_rows, write_scores
from opdctl.engines.base import ScoreRequest
from opdctl.engines.parity import check_parity
from opdctl.engines.pool import EnginePool
from opdctl.recipe.schema import Score
from opdctl.runs.run import REFERENCE, Run
from opdctl.runs.scored_responses import check_ids
from opdctl.runs.stage_loop import BuildPart, Part, StageWork, make_missing_parts


def run_scoring(
    run: Run, step: int, engines: EnginePool, *, only: Collection[str] | None = None, wait: bool = False
) -> int:
    """Score the parts of a step that lack scores and return the number made here.

    only: the scorers, all of the recipe if None. wait: until all parts exist, also those that other workers have
    leased.

    Raises:
        OpdctlError: the step's rollout is unfinished or corrupt; the stage was made with different settings.
    """
    return sum(_score(run, step, name, engines, wait=wait) for name in (run.scorers() if only is None else only))


def _score(run: Run, step: int, name: str, engines: EnginePool, *, wait: bool) -> int:
    rollout, stage = run.rollout_stage(step), run.score_stage(step, name)

    def prepare() -> StageWork[ScoreRequest, TokenScores]:
        settings, model = _settings(run.recipe.score, name), run.models[name]
        engine = engines.get(name, settings.engine, model)
        # Temperature 1 and no top-p: the scorer is a reference, not a sampler.
        metadata = engine.logprob_metadata | {
            "temperature": "1",
            "logprobs": "raw, float32, nats",
            "model": run.digests[name],
            "tokenizer": model.tokenizer_digest,
        }

        def open_part(index: int) -> tuple[list[ScoreRequest], BuildPart[TokenScores]]:
            responses = read_rows(rollout.verify(index), Response)
            check_ids(responses, model)
            scored = [row for row in responses if name in (row.teacher, REFERENCE)]
            requests = [ScoreRequest(run.prompt_ids(name, row), row.response_ids, row.top_ids) for row in scored]

            def build(scores: list[TokenScores]) -> Part:
                if index == 0 and scored:
                    logprobs = [each.logprobs for each in scores]
                    check_parity(run.recipe, settings.engine, model, requests, logprobs, engines.device)
                metadata_of_part = metadata | {"rollout": rollout.sha256(index)}
                ids = [row.sample_id for row in scored]
                save = partial(write_scores, ids=ids, scores=scores, logprob_metadata=metadata_of_part)
                return Part(save, rows=len(scored), tokens=sum(len(each.logprobs) for each in scores))

            return requests, build

        process = partial(engine.stream_scores, settings=settings)
        return StageWork(metadata, open_part, process, engine.batches_across_parts)

    count = sum(name in (prompt.teacher, REFERENCE) for _, prompt in run.samples(step))
    title = f"score-teacher {name}, step {step}"
    has_engine = engines.owns(run.recipe.score.engine)
    return make_missing_parts(stage, title, count, prepare, wait=wait, has_engine=has_engine)


def _settings(settings: Score, name: str) -> Score:
    """Return the settings of a scorer. The reference only ever gives log-probs."""
    if name != REFERENCE:
        return settings
    only_logprobs = {"entropy": False, "top_k": 0, "student_top_k": False, "hidden_states": False}
    return settings.model_copy(update=only_logprobs)

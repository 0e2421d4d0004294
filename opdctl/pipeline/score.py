"""score-teacher: teachers, and a reference model, score each token of a step's responses.

Reads rollout parts, writes safetensors parts in one directory for each scorer.
"""

from collections.abc import Callable, Collection, Generator, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from opdctl import distributed
from opdctl.artifacts.records import Response, TokenScores
from opdctl.artifacts.tables import write_scores
from opdctl.engines.base import ScoreRequest
from opdctl.engines.parity import check_parity
from opdctl.engines.pool import EnginePool
from opdctl.recipe.schema import Score
from opdctl.runs.run import REFERENCE, Run
from opdctl.runs.scored_responses import check_ids
from opdctl.runs.stage_loop import BuildPart, Part, StageWork, make_missing_parts
from opdctl.training.base_scorer import BaseScorer


class Scorer(Protocol):
    """What this stage needs of an engine."""

    batches_across_parts: bool

    @property
    def logprob_metadata(self) -> dict[str, str]: ...

    def stream_scores(
        self, requests: Iterable[ScoreRequest], settings: Score
    ) -> Generator[tuple[int, TokenScores]]: ...


def run_scoring(
    run: Run, step: int, engines: EnginePool, *, only: Collection[str] | None = None, wait: bool = False
) -> int:
    """Score the parts of a step that lack scores and return the number made here.

    only: the scorers, all of the recipe if None. wait: until all parts exist, also those that other workers have
    leased.

    Raises:
        OpdctlError: the step's rollout is unfinished or corrupt; the stage was made with different settings.
    """
    engine, made = run.recipe.score.engine, 0
    for name in run.scorers() if only is None else only:
        get_scorer = partial(engines.get, name, engine, run.models[name])
        source = _ScorerSource(engine, engines.device, get_scorer, engines.owns(engine))
        made += _score(run, step, name, source, wait=wait)
    return made


def score_by_base(run: Run, step: int, scorer: BaseScorer) -> int:
    """Let the trainer score the parts of a step that the reference lacks, and return their number. Called by all ranks.

    Raises:
        OpdctlError: as by `run_scoring`.
    """
    if not distributed.is_main():
        scorer.follow()
        return 0
    made = _score(run, step, REFERENCE, _ScorerSource("trainer", scorer.device, lambda: scorer), wait=True)
    scorer.close()
    return made


@dataclass(frozen=True)
class _ScorerSource:
    """Where a stage gets its scorer. get: called once, if there is a part to make. is_here: otherwise never."""

    backend: str
    device: str
    get: Callable[[], Scorer]
    is_here: bool = True


def _score(run: Run, step: int, name: str, source: _ScorerSource, *, wait: bool) -> int:
    rollout, stage = run.rollout_stage(step), run.score_stage(step, name)

    def prepare() -> StageWork[ScoreRequest, TokenScores]:
        settings, model, engine = _settings(run.recipe.score, name), run.models[name], source.get()
        # Temperature 1 and no top-p: the scorer is a reference, not a sampler.
        metadata = engine.logprob_metadata | {
            "temperature": "1",
            "logprobs": "raw, float32, nats",
            "model": run.digests[name],
            "tokenizer": model.tokenizer_digest,
        }

        def open_part(index: int) -> tuple[list[ScoreRequest], BuildPart[TokenScores]]:
            responses = rollout.read_part(index, Response)
            check_ids(responses, model)
            scored = [row for row in responses if name in (row.teacher, REFERENCE)]
            requests = [ScoreRequest(run.prompt_ids(name, row), row.response_ids, row.top_ids) for row in scored]

            def build(scores: list[TokenScores]) -> Part:
                if index == 0 and scored:
                    logprobs = [each.logprobs for each in scores]
                    check_parity(run.recipe, source.backend, model, requests, logprobs, source.device)
                metadata_of_part = metadata | {"rollout": rollout.sha256(index)}
                ids = [row.sample_id for row in scored]
                save = partial(write_scores, ids=ids, scores=scores, logprob_metadata=metadata_of_part)
                return Part(save, rows=len(scored), tokens=sum(len(each.logprobs) for each in scores))

            return requests, build

        process = partial(engine.stream_scores, settings=settings)
        return StageWork(metadata, open_part, process, engine.batches_across_parts)

    count = sum(name in (prompt.teacher, REFERENCE) for _, prompt in run.samples(step))
    title = f"score-teacher {name}, step {step}"
    return make_missing_parts(stage, title, count, prepare, wait=wait, has_engine=source.is_here)


def _settings(settings: Score, name: str) -> Score:
    """Return the settings of a scorer. The reference only ever gives log-probs."""
    if name != REFERENCE:
        return settings
    only_logprobs = {"entropy": False, "top_k": 0, "student_top_k": False, "hidden_states": False}
    return settings.model_copy(update=only_logprobs)

"""score-teacher: teachers, and a reference model, score each token of a step's responses.

Reads rollout parts, writes safetensors parts in one directory for each scorer.
"""

from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from opdctl import distributed
from opdctl.artifacts.records import Response, TokenScores
from opdctl.artifacts.stage_dir import PartMakers
from opdctl.artifacts.tables import write_scores
from opdctl.engines.base import ScoreRequest
from opdctl.engines.parity import check_parity
from opdctl.engines.pool import EnginePool
from opdctl.models.directory import ModelDir
from opdctl.recipe.schema import Recipe, Score
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


class SaveScores(Protocol):
    """Writes the scores of a part, in the order of its requests. metadata: how they were computed."""

    def __call__(self, path: Path, scores: list[TokenScores], metadata: Mapping[str, str]) -> None: ...


@dataclass(frozen=True)
class ScorerSource:
    """Where a stage gets its scorer. get: called once, if there is a part to make here."""

    backend: str
    device: str
    get: Callable[[], Scorer]
    makers: PartMakers = field(default_factory=PartMakers)


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
        makers = engines.part_makers("score", name, partial(run_scoring, step=step, only=[name]))
        get = partial(engines.get, name, engine, run.models[name])
        made += _score(run, step, name, ScorerSource(engine, engines.device, get, makers), wait=wait)
    return made


def score_by_base(run: Run, step: int, scorer: BaseScorer) -> int:
    """Let the trainer score the parts of a step that the reference lacks, and return their number. Called by all ranks.

    Raises:
        OpdctlError: as by `run_scoring`.
    """
    if not distributed.is_main():
        scorer.follow()
        return 0
    made = _score(run, step, REFERENCE, ScorerSource("trainer", scorer.device, lambda: scorer), wait=True)
    scorer.close()
    return made


def _score(run: Run, step: int, name: str, source: ScorerSource, *, wait: bool) -> int:
    rollout, stage = run.rollout_stage(step), run.score_stage(step, name)

    def open_part(index: int) -> tuple[list[ScoreRequest], SaveScores]:
        responses = rollout.read_part(index, Response)
        check_ids(responses, run.models[name])
        scored = [row for row in responses if name in (row.teacher, REFERENCE)]
        requests = [ScoreRequest(run.prompt_ids(name, row), row.response_ids, row.top_ids) for row in scored]
        ids, digest = [row.sample_id for row in scored], rollout.sha256(index)

        def save(path: Path, scores: list[TokenScores], metadata: Mapping[str, str]) -> None:
            write_scores(path, ids, scores, {**metadata, "rollout": digest})

        return requests, save

    scorer = _settings(run.recipe, name), run.models[name], run.digests[name]
    title = f"score-teacher {name}, step {step}"
    prepare = partial(scoring_work, source, *scorer, open_part)
    count = _count_responses(run, step, name)
    return make_missing_parts(stage, title, count, prepare, wait=wait, makers=source.makers)


def _count_responses(run: Run, step: int, name: str) -> int:
    """Return the number of responses that the model `name` scores; with several teachers, that of sampled responses."""
    manifest = run.rollout_stage(step).manifest()
    if manifest and (name == REFERENCE or len(run.recipe.teacher_models()) == 1):
        return sum(part["rows"] for part in manifest["parts"])
    return sum(prompt.teacher == name for _, prompt in run.samples(step))


def scoring_work(
    source: ScorerSource,
    recipe: Recipe,
    model: ModelDir,
    digest: str,
    open_part: Callable[[int], tuple[list[ScoreRequest], SaveScores]],
) -> StageWork[ScoreRequest, TokenScores]:
    """Return how the parts of scores are made, after getting the scorer: `model`, by [score] of the recipe.

    digest: of the model. open_part: part index → the requests of the part, and the function that writes their scores.
    """
    scorer = source.get()
    # Temperature 1 and no top-p: the scorer is a reference, not a sampler.
    metadata = scorer.logprob_metadata | {
        "temperature": "1",
        "logprobs": "raw, float32, nats",
        "model": digest,
        "tokenizer": model.tokenizer_digest,
    }

    def open_requests(index: int) -> tuple[list[ScoreRequest], BuildPart[TokenScores]]:
        requests, save = open_part(index)

        def build(scores: list[TokenScores]) -> Part:
            if index == 0 and requests:
                logprobs = [each.logprobs for each in scores]
                check_parity(recipe, source.backend, model, requests, logprobs, source.device)
            save_part = partial(save, scores=scores, metadata=metadata)
            return Part(save_part, rows=len(requests), tokens=sum(len(each.logprobs) for each in scores))

        return requests, build

    process = partial(scorer.stream_scores, settings=recipe.score)
    return StageWork(metadata, open_requests, process, scorer.batches_across_parts)


def _settings(recipe: Recipe, name: str) -> Recipe:
    """Return the recipe with the settings of a scorer. The reference only ever gives log-probs."""
    if name != REFERENCE:
        return recipe
    only_logprobs = {"entropy": False, "top_k": 0, "student_top_k": False, "hidden_states": False}
    return recipe.model_copy(update={"score": recipe.score.model_copy(update=only_logprobs)})

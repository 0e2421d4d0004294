"""Rollouts of agents: a part of a rollout whose responses are the trajectories of an environment's episodes."""

import dataclasses
import json
from collections.abc import Callable, Generator, Iterable, Sequence
from functools import partial

from opdctl import console
from opdctl.agents.episodes import EpisodeRequest, EpisodeResult, EpisodeRunner, EpisodeSettings
from opdctl.agents.gateway import open_gateway
from opdctl.agents.student import Student
from opdctl.artifacts.records import Prompt, Response
from opdctl.artifacts.stage_dir import StageDir
from opdctl.data.formats import training_format
from opdctl.data.rendering import PromptRenderer
from opdctl.engines.base import Engine
from opdctl.errors import OpdctlError
from opdctl.registry import load_function
from opdctl.runs.run import Run

ENVIRONMENT = "rollout.environment"
PlayEpisodes = Callable[[Iterable[EpisodeRequest]], Generator[tuple[int, EpisodeResult]]]


def prepare_episodes(run: Run, engine: Engine) -> PlayEpisodes:
    """Return the function that plays episodes of the recipe's environment against the student of an engine.

    Raises:
        OpdctlError: the environment changed since the start of the run, or cannot be imported.
    """
    run.check_environment()
    settings, model = run.recipe.rollout, run.student
    environment = load_function(settings.environment, ENVIRONMENT)
    renderer = PromptRenderer(model.tokenizer, model.vocab_size, training_format(run.recipe, run.chat_templates))
    max_total = run.recipe.prompts.max_tokens + settings.max_tokens
    student = Student(model.tokenizer, renderer, model.vocab_size, settings.sampling(), max_total)
    sample = partial(
        engine.stream_completions, sampling=settings.sampling(), batch_size=settings.batch_size, columns=settings
    )
    episode_settings = EpisodeSettings(
        run.recipe.seed,
        settings.environment_timeout_seconds,
        settings.max_environments,
        engine.batches_across_parts,
    )

    def play(requests: Iterable[EpisodeRequest]) -> Generator[tuple[int, EpisodeResult]]:
        with open_gateway() as gateway:
            yield from EpisodeRunner(environment, gateway, student, sample, episode_settings).run(requests)

    return play


def make_request(run: Run, sample_id: str, prompt: Prompt) -> EpisodeRequest:
    """Return the episode of a sample.

    Raises:
        OpdctlError: the run was started without an environment, and has no rows of the prompts.
    """
    if prompt.row is None:
        raise OpdctlError(
            "missing_input",
            f"{ENVIRONMENT}: the run {run.path} was started without one, so it has no rows of its prompts",
            hint="start a new run with another --output",
        )
    return EpisodeRequest(sample_id, json.loads(prompt.row))


def trajectory_rows(sample: tuple[str, Prompt], result: EpisodeResult, row: Callable[..., Response]) -> list[Response]:
    """Return the rows of an episode. The first has the id of the sample, others have `.1`, `.2` … appended.

    row: sample id, prompt, completion → the row of a response.
    """
    name, prompt = sample
    return [
        dataclasses.replace(
            row(f"{name}.{number}" if number else name, prompt, trajectory.completion),
            prompt_ids=trajectory.prompt_ids,
            loss_mask=None if trajectory.loss_mask.all() else trajectory.loss_mask,
            turns=trajectory.turns,
            tool_seconds=trajectory.tool_seconds,
            reward=reward,
        )
        for number, (trajectory, reward) in enumerate(result.trajectories)
    ]


def check_failures(
    run: Run, stage: StageDir, index: int, names: Sequence[str], results: Sequence[EpisodeResult]
) -> list[str]:
    """Warn of the failed episodes of a part, and return their sample ids.

    Raises:
        OpdctlError: all episodes of the part failed, or more of the step than train.max_invalid_responses.
    """
    failures = {name: each.failure for name, each in zip(names, results, strict=True) if each.failure}
    for name, failure in failures.items():
        console.warn(f"{name}: the episode failed: {failure}")
    allowed = run.recipe.train.max_invalid_responses
    count = len(failures) + len(stage.failed())
    if failures and (count > allowed or len(failures) == len(names)):
        name, failure = next(iter(failures.items()))
        everything = "all " if len(failures) == len(names) else ""
        raise OpdctlError(
            "failed_environment",
            f"{stage.path / stage.names[index]}: {everything}{len(failures)} of {len(names)} episodes failed; {count} "
            f"of the step, train.max_invalid_responses = {allowed}; the first is {name}: {failure}",
            hint="correct the environment, or run the same command again, which plays the episodes of this part again",
        )
    return [*failures]

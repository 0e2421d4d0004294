"""rollout: the current student answers the step's prompts. Reads prompts, writes Parquet parts of responses."""

from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any

from opdctl import console
from opdctl.agents.episodes import EpisodeRequest, EpisodeResult
from opdctl.artifacts.records import Completion, Prompt, Response, sample_seed
from opdctl.engines.base import Engine, Request, ScoreRequest
from opdctl.engines.parity import check_parity
from opdctl.engines.pool import EnginePool
from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir
from opdctl.models.end_of_sequence import describe_tokens
from opdctl.pipeline.agent_rollout import check_failures, make_request, prepare_episodes, trajectory_rows
from opdctl.recipe.schema import Rollout
from opdctl.runs.run import Run
from opdctl.runs.stage_loop import BuildPart, Part, StageWork, make_missing_parts, rows_part

CUT_OFFS = frozenset({"top_p", "min_p", "sampling_top_k"})
"""Settings by which some tokens are never sampled."""


def warn_of_modified_sampling(settings: Rollout) -> None:
    """Warn if rollouts do not sample from the student's own distribution."""
    if names := ", ".join(settings.modifications):
        cut_off = "; tokens that are cut off have no correction" * bool(CUT_OFFS & settings.modifications.keys())
        console.warn_once(
            f"rollout: {names}: the responses are not sampled from the student's own distribution; the objective's "
            f"importance weights correct for it{cut_off}"
        )


def run_rollout(run: Run, step: int, engines: EnginePool, *, wait: bool = False) -> int:
    """Sample the responses that a step lacks and return the number of parts made here.

    wait: until all parts exist, also those that other workers have leased.

    Raises:
        OpdctlError: the step's student does not exist; the stage was made with different settings.
    """
    run.pin_policy_version(step)
    if run.imported_files(step):
        return _check_imported(run, step)
    stage, samples, version = run.rollout_stage(step), run.samples(step), run.policy_version(step)

    def prepare() -> StageWork[Any, Any]:
        warn_of_modified_sampling(run.recipe.rollout)
        settings, student = run.recipe.rollout, run.student_at(version)
        engine = engines.get("student", settings.engine, student)
        make_row = partial(_row, run, version)

        def check_rows(index: int, rows: Sequence[Response]) -> None:
            if index == 0:
                _check_parity(run, student, rows, engines.device)
                if step == run.start_step:
                    _warn_of_endless_responses(run, rows)

        def open_part(index: int) -> tuple[list[Request], BuildPart[Completion]]:
            part = stage.items_of_part(samples, index)
            requests = [Request(prompt.prompt_ids, sample_seed(run.recipe.seed, name)) for name, prompt in part]

            def build(completions: list[Completion]) -> Part:
                rows = [make_row(*sample, done) for sample, done in zip(part, completions, strict=True)]
                check_rows(index, rows)
                return rows_part(rows, Response)

            return requests, build

        def open_part_of_episodes(index: int) -> tuple[list[EpisodeRequest], BuildPart[EpisodeResult]]:
            part = stage.items_of_part(samples, index)

            def build(results: list[EpisodeResult]) -> Part:
                failed = check_failures(run, stage, index, [name for name, _ in part], results)
                pairs = zip(part, results, strict=True)
                rows = [row for sample, result in pairs for row in trajectory_rows(sample, result, make_row)]
                check_rows(index, rows)
                return rows_part(rows, Response, failed)

            return [make_request(run, *sample) for sample in part], build

        metadata = _metadata(run, version, engine, engines.probe_rms("student", settings.engine))
        if settings.environment:
            play = prepare_episodes(run, engine)
            return StageWork(metadata, open_part_of_episodes, play, engine.batches_across_parts)
        stream = partial(engine.stream_completions, sampling=settings.sampling(), batch_size=settings.batch_size)
        return StageWork(metadata, open_part, partial(stream, columns=settings), engine.batches_across_parts)

    makers = engines.part_makers("rollout", "student", partial(run_rollout, step=step))
    return make_missing_parts(stage, f"rollout, step {step}", len(samples), prepare, wait=wait, makers=makers)


def _check_imported(run: Run, step: int) -> int:
    """Check that a step's import is finished, and return the number of parts that were sampled for it.

    Raises:
        OpdctlError: it is not.
    """
    stage = run.rollout_stage(step)
    if not stage.is_finished():
        why = "its responses are imported, and some are missing"
        raise OpdctlError("missing_input", f"{stage.path}: {why}", hint=f"run `{stage.rerun_command}`")
    return 0


def _metadata(run: Run, version: int, engine: Engine, probe_rms: float | None) -> dict[str, Any]:
    """Return what the log-probs of a step's responses mean."""
    settings = run.recipe.rollout
    metadata: dict[str, Any] = engine.logprob_metadata | {
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        **settings.modifications,
        "policy_version": version,
    }
    if settings.sampling_logprobs:
        processed = metadata["logprobs"]
        metadata |= {"logprobs": "raw, float32, nats, at temperature 1", "sampling_logprobs": processed}
    return metadata if probe_rms is None else metadata | {"probe_rms": probe_rms}


def _check_parity(run: Run, student: ModelDir, rows: Sequence[Response], device: str) -> None:
    scored = [ScoreRequest(row.prompt_ids, row.response_ids) for row in rows]
    logprobs, masks = [row.logprobs for row in rows], [row.loss_mask for row in rows]
    if rows:
        check_parity(run.recipe, run.recipe.rollout.engine, student, scored, logprobs, device, masks)


def _warn_of_endless_responses(run: Run, rows: Sequence[Response]) -> None:
    """Warn at the start of a run if no response ends by itself."""
    if all(row.finish_reason == "length" for row in rows):
        ends = describe_tokens(run.student.eos_ids, run.student.tokenizer)
        console.warn(
            f"none of the first {len(rows)} responses ended within rollout.max_tokens = "
            f"{run.recipe.rollout.max_tokens}: a response ends at {ends}; rollout.eos_token_ids adds tokens, "
            "and the chat template decides what the student continues"
        )


def _row(run: Run, version: int, sample_id: str, prompt: Prompt, completion: Completion) -> Response:
    return Response(
        **{field.name: getattr(completion, field.name) for field in fields(completion)},
        sample_id=sample_id,
        prompt_id=prompt.prompt_id,
        prompt_ids=prompt.prompt_ids,
        policy_version=version,
        source=run.recipe.prompts.names,
        teacher=prompt.teacher,
        answer=prompt.answer,
    )

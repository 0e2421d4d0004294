"""run import: trajectories of other programs become a step's rollout, and their scores the step's scores."""

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from opdctl import console
from opdctl.artifacts import files
from opdctl.artifacts.exchange import read_scorers
from opdctl.artifacts.records import Prompt, Response, TokenScores, Trajectory, sample_id
from opdctl.artifacts.tables import write_scores
from opdctl.data.formats import read_chat_templates, training_format
from opdctl.data.rendering import PromptFormat, PromptRenderer
from opdctl.data.sources import find_inputs, list_data_files
from opdctl.data.trajectories.reading import read_trajectories
from opdctl.engines.base import ScoreRequest
from opdctl.engines.pool import EnginePool, open_engine_pool
from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir
from opdctl.recipe.schema import Recipe, Score
from opdctl.runs.models import prepare_models
from opdctl.runs.prompts import PromptSet
from opdctl.runs.run import Run
from opdctl.runs.stage_loop import BuildPart, Part, StageWork, make_missing_parts, rows_part


@dataclass(frozen=True)
class ImportedFiles:
    """Files of trajectories."""

    names: Sequence[str]

    @cached_property
    def paths(self) -> list[Path]:
        return find_inputs(self.names, "FILES")

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of each file by its path."""
        data_files = [file for path in self.paths for file in list_data_files(path)]
        return {str(path): digest for path, digest in files.sha256_files(data_files).items()}

    def read(self, recipe: Recipe, student: ModelDir) -> list[Trajectory]:
        """Return the trajectories. Messages are rendered as the prompts of the recipe are.

        Raises:
            OpdctlError: a row is invalid, or longer than the recipe allows.
        """
        form = training_format(recipe, read_chat_templates(recipe))
        renderer = None if form == PromptFormat() else PromptRenderer(student.tokenizer, student.vocab_size, form)
        trajectories = list(read_trajectories(self.paths, student.tokenizer, student.vocab_size, renderer))
        for each in trajectories:
            _check_length(each, "prompts.max_tokens", len(each.prompt_ids), recipe.prompts.max_tokens)
            _check_length(each, "rollout.max_tokens", len(each.response_ids), recipe.rollout.max_tokens)
        return trajectories

    def describe(self, recipe: Recipe) -> Iterator[str]:
        """Yield lines that describe the trajectories. Raises OpdctlError as `read` does."""
        models, _ = prepare_models(recipe, "settings")
        trajectories = self.read(recipe, models["student"])
        tokens = sum(len(each.response_ids) for each in trajectories)
        masks = [each.loss_mask for each in trajectories if each.loss_mask is not None]
        read = sum(int((~mask_T).sum()) for mask_T in masks)
        prompts = len({each.prompt_id for each in trajectories})
        others = f", {read} of them not the student's own" if read else ""
        yield f"{len(trajectories)} responses to {prompts} prompts, {tokens} tokens{others}"
        if missing := sum(each.logprobs is None for each in trajectories):
            yield f"{missing} responses have no log-probs of the student: rollout.engine computes them"
        if scored := sum(each.teacher_logprobs is not None for each in trajectories):
            yield f"{scored} responses have log-probs of a teacher"

    def scorer(self) -> dict[str, str]:
        """Return how the scorer of all files computed its log-probs; nothing if they do not have one and the same."""
        found = [scorer for path in self.paths for scorer in (list(read_scorers(path).values()) or [{}])]
        return found[0] if all(scorer == found[0] for scorer in found) else {}

    def read_prompts(self, recipe: Recipe, student: ModelDir) -> PromptSet:
        """Return the prompts of the trajectories, for a run whose prompts these are.

        Raises:
            OpdctlError: as `read` does; there are fewer than one step needs.
        """
        teacher = next(iter(recipe.teacher_models()))
        prompts: dict[str, Prompt] = {}
        for each in self.read(recipe, student):
            prompts.setdefault(each.prompt_id, Prompt(each.prompt_id, each.prompt_ids, each.answer, teacher))
        if len(prompts) < recipe.rollout.prompts_per_step:
            raise OpdctlError(
                "invalid_data",
                f"{', '.join(self.names)}: {len(prompts)} prompts, rollout.prompts_per_step = "
                f"{recipe.rollout.prompts_per_step}",
                hint=f"set rollout.prompts_per_step={len(prompts)} or less: later steps are sampled from these prompts",
            )
        return PromptSet(list(prompts.values()))


def _check_length(trajectory: Trajectory, key: str, length: int, limit: int) -> None:
    if length > limit:
        why = f"{trajectory.location}: {length} tokens, {key} = {limit}"
        raise OpdctlError("invalid_data", why, hint=f"raise {key}, or remove the row")


@dataclass(frozen=True)
class _Row:
    """A trajectory with its sample id and the name of its teacher."""

    sample_id: str
    teacher: str
    trajectory: Trajectory


def import_step(run: Run, step: int, source: ImportedFiles, device: str) -> dict[str, Any]:
    """Make a step's rollout from trajectories, and its scores if the files have those of the run's teacher.

    Log-probs of the student that the files lack are computed by the step's student, and so are the columns that the
    recipe asks for. Return what was imported as JSON values.

    Raises:
        OpdctlError: the step has other responses; a row is invalid.
    """
    if run.recipe.train.router_replay:
        why = "train.router_replay: imported responses have no experts"
        raise OpdctlError("unsupported_setting", why, hint="set train.router_replay = false")
    rows = _make_rows(run, step, source.read(run.recipe, run.student))
    run.record_import(step, source.digests())
    with open_engine_pool(run.recipe, device) as engines:
        made = _import_responses(run, step, rows, engines)
    tokens = sum(len(row.trajectory.response_ids) for row in rows)
    console.info(f"step {step}: {len(rows)} responses, {tokens} tokens, in {run.rollout_stage(step).path}")
    scorer = source.scorer()
    scored = _find_scorer(run, rows, scorer, source.names)
    if scored:
        _import_scores(run, step, scored, rows, scorer)
    return {"responses": len(rows), "tokens": tokens, "parts_made": made, "scores_of": scored}


def _import_responses(run: Run, step: int, rows: list[_Row], engines: EnginePool) -> int:
    """Make the missing parts of the step's rollout, and return their number."""
    stage = run.rollout_stage(step)

    def prepare() -> StageWork[ScoreRequest, TokenScores | None]:
        def open_part(index: int) -> tuple[list[ScoreRequest], BuildPart[TokenScores | None]]:
            part = stage.items_of_part(rows, index)

            def build(scores: list[TokenScores | None]) -> Part:
                responses = [_response(run, step, row, score) for row, score in zip(part, scores, strict=True)]
                return rows_part(responses, Response)

            trajectories = [row.trajectory for row in part]
            return [ScoreRequest(each.prompt_ids, each.response_ids) for each in trajectories], build

        metadata, process, across_parts = _scorer(run, step, engines) if _lacks_columns(run.recipe, rows) else _STORED
        return StageWork(metadata | {"policy_version": run.policy_version(step)}, open_part, process, across_parts)

    return make_missing_parts(stage, f"import, step {step}", len(rows), prepare)


def _find_scorer(run: Run, rows: Sequence[_Row], scorer: dict[str, str], names: Sequence[str]) -> str | None:
    """Return the run's teacher whose scores the files have, None if they have none that the run can use."""
    if any(row.trajectory.teacher_logprobs is None for row in rows):
        return None
    score = run.recipe.score
    name = next(iter(run.recipe.teacher_models()))
    is_same = (scorer.get("model"), scorer.get("dtype")) == (run.digests[name], run.models[name].dtype)
    if len(run.scorers()) > 1 or not is_same:
        wanted = f"the run's {name}, {run.recipe.models()[name].model} in {run.models[name].dtype}"
        console.warn(f"{', '.join(names)}: the scores are not those of {wanted}: they are not used")
        return None
    if score.entropy or score.top_k or score.student_top_k or score.hidden_states:
        console.info("the recipe stores more than log-probs of the teacher: score-teacher computes all")
        return None
    return name


def _import_scores(run: Run, step: int, name: str, rows: list[_Row], scorer: dict[str, str]) -> None:
    """Make the missing parts of a step's scores from those of the files. scorer: how these were computed."""
    rollout, stage = run.rollout_stage(step), run.score_stage(step, name)
    metadata = scorer | {"tokenizer": run.models[name].tokenizer_digest}

    def open_part(index: int) -> tuple[list[_Row], BuildPart[None]]:
        part = stage.items_of_part(rows, index)
        scores = [TokenScores(logprobs) for row in part if (logprobs := row.trajectory.teacher_logprobs) is not None]
        of_part = metadata | {"rollout": rollout.sha256(index)}
        ids = [row.sample_id for row in part]
        save = partial(write_scores, ids=ids, scores=scores, logprob_metadata=of_part)
        return part, lambda _: Part(save, len(part), sum(len(each.logprobs) for each in scores))

    work = StageWork[_Row, None](metadata, open_part, _skip, across_parts=False)
    make_missing_parts(stage, f"scores of {name}, step {step}", len(rows), lambda: work)
    console.info(f"step {step}: the scores of the files are those of {name}, in {stage.path}")


_Process = Callable[[Iterable[ScoreRequest]], Generator[tuple[int, TokenScores | None]]]


def _scorer(run: Run, step: int, engines: EnginePool) -> tuple[dict[str, Any], _Process, bool]:
    settings = run.recipe.rollout
    engine = engines.get("student", settings.engine, run.student_at(run.policy_version(step)))
    metadata = {**engine.logprob_metadata, "logprobs": "as imported; where they were missing raw, float32, nats"}
    score = Score(entropy=settings.entropy, top_k=settings.top_k)
    return metadata, partial(engine.stream_scores, settings=score), engine.batches_across_parts


def _skip(items: Iterable[Any]) -> Generator[tuple[int, None]]:
    for number, _ in enumerate(items):
        yield number, None


_STORED: tuple[dict[str, Any], _Process, bool] = ({"logprobs": "as imported"}, _skip, False)


def _lacks_columns(recipe: Recipe, rows: Sequence[_Row]) -> bool:
    settings, trajectories = recipe.rollout, [row.trajectory for row in rows]
    return settings.entropy or any(each.logprobs is None or _width(each) < settings.top_k for each in trajectories)


def _width(trajectory: Trajectory) -> int:
    """Return the number of most probable tokens that are stored at each token."""
    return 0 if trajectory.top_ids is None else trajectory.top_ids.shape[1]


def _make_rows(run: Run, step: int, trajectories: Sequence[Trajectory]) -> list[_Row]:
    """Return the trajectories with sample ids, and teachers: the only one, or that of the prompt of their id.

    Raises:
        OpdctlError: the run has several teachers, and no prompt of that id.
    """
    names, counts = list(run.recipe.teacher_models()), Counter[str]()
    teachers = {prompt.prompt_id: prompt.teacher for prompt in run.prompts} if len(names) > 1 else {}
    rows = []
    for each in trajectories:
        if teachers and each.prompt_id not in teachers:
            why = f"{each.location}: the run has several teachers and no prompt `{each.prompt_id}`"
            raise OpdctlError("invalid_data", why, hint="give the rows the ids of the run's prompts in `prompt_id`")
        name = sample_id(each.prompt_id, step, counts[each.prompt_id])
        rows.append(_Row(name, teachers.get(each.prompt_id, names[0]), each))
        counts[each.prompt_id] += 1
    return rows


def _response(run: Run, step: int, row: _Row, scores: TokenScores | None) -> Response:
    trajectory = row.trajectory
    top_k = run.recipe.rollout.top_k
    top: dict[str, Any] = {}
    if scores is not None:
        top = {"top_ids": scores.top_ids, "top_logprobs": scores.top_logprobs}
    elif trajectory.top_ids is not None and trajectory.top_logprobs is not None and top_k:
        top = {"top_ids": trajectory.top_ids[:, :top_k], "top_logprobs": trajectory.top_logprobs[:, :top_k]}
    logprobs = trajectory.logprobs if scores is None or trajectory.logprobs is not None else scores.logprobs
    assert logprobs is not None  # otherwise there are scores
    return Response(
        sample_id=row.sample_id,
        prompt_id=trajectory.prompt_id,
        prompt_ids=trajectory.prompt_ids,
        response_ids=trajectory.response_ids,
        logprobs=logprobs,
        finish_reason=_finish_reason(run.student, trajectory),
        entropies=scores.entropies if scores else None,
        **top,
        sampling_logprobs=trajectory.sampling_logprobs,
        policy_version=run.policy_version(step),
        source="import",
        teacher=row.teacher,
        answer=trajectory.answer,
        loss_mask=trajectory.loss_mask,
        turns=trajectory.turns,
        tool_seconds=trajectory.tool_seconds,
        reward=trajectory.reward,
    )


def _finish_reason(student: ModelDir, trajectory: Trajectory) -> str:
    """Return "length" or "stop"; if the file has neither, the last token decides."""
    if trajectory.finish_reason is not None:
        return trajectory.finish_reason
    return "stop" if int(trajectory.response_ids[-1]) in student.end_ids(()) else "length"

"""`--dry-run`: what a run will take, before anything is loaded, fetched or written.

Tokens, bytes and hours are upper bounds: every prompt and response at its limit. Memory and hours are counted by
opdctl/sizes.py, for the hardware that the recipe names.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from opdctl import console
from opdctl.artifacts import files
from opdctl.data.prompts import load_local_problems
from opdctl.environment import resolve_device
from opdctl.evaluation.benchmarks import find
from opdctl.models.directory import ModelDir, check_same_tokenizer, find_local
from opdctl.pipeline import costs
from opdctl.pipeline.costs import BYTES, STATE_BYTES, StageCost
from opdctl.recipe.schema import Hardware, ModelShape, Recipe, Rollout, Score, is_kept, model_key
from opdctl.runs.compatibility import check_same_recipe
from opdctl.runs.layout import run_path
from opdctl.runs.open import check_output_dir, check_top_k, prepare_prompts, resolve_auto_engines
from opdctl.runs.run import REFERENCE, Run

ID_BYTES = LOGPROB_BYTES = HIDDEN_BYTES = 4


@dataclass(frozen=True)
class Plan:
    """The size of a run. Bytes are bytes; None means unknown here, since the model or data set is not at hand."""

    run_dir: str
    device: str
    steps: int
    prompts: int | None
    prompts_per_step: int
    responses_per_step: int
    epochs: float | None
    parts_per_step: int
    prompt_tokens_per_step: int
    response_tokens_per_step: int
    rollout_bytes_per_step: int
    score_bytes_per_step: int | None
    artifact_bytes: int | None
    parameters: dict[str, int | None]
    """Of the student and of each model that scores."""
    model_bytes: dict[str, int | None]
    """Of each model's weights, in its own type."""
    students_kept: int
    disk_bytes: int | None
    hardware: Hardware
    stages: dict[str, StageCost | None]
    """What each stage takes, on the GPUs that the recipe gives it."""
    times: dict[str, int]
    """How often each stage is gone through in the whole run."""

    def gpu_hours(self) -> float | None:
        """Return the GPU-hours of the whole run."""
        return _sum(stage.gpu_hours(self.times[name]) if stage else None for name, stage in self.stages.items())

    def seconds(self) -> float | None:
        """Return the time of the whole run where each stage waits for the one before."""
        return _sum(stage.total(self.times[name]) if stage else None for name, stage in self.stages.items())

    def as_dict(self) -> dict[str, Any]:
        found = {**asdict(self), "hardware": self.hardware.model_dump()}
        for name, stage in self.stages.items():
            if stage:
                found["stages"][name] |= {"bytes": stage.bytes, "gpu_hours": stage.gpu_hours(self.times[name])}
        return found | {"gpu_hours": self.gpu_hours(), "seconds": self.seconds()}


def make_plan(recipe: Recipe, output: Path | None) -> Plan:
    """Size up a recipe. Embedded and local models and prompts are checked; nothing is fetched.

    Raises OpdctlError as a run would for a missing local model, tokenizers that differ, or bad local prompts.
    """
    path = run_path(recipe, output)
    recipe = resolve_auto_engines(recipe, path)
    if (path / "run.json").exists():
        check_same_recipe(recipe, path)
    else:
        check_output_dir(recipe, path)
    models = recipe.models()
    dirs = _models_here(recipe)
    shapes = {name: _shape(dirs.get(name), model.shape) for name, model in models.items()}
    parameters = {name: _parameters(dirs.get(name), shapes[name]) for name in models}
    prompts = _count_prompts(recipe, dirs.get("student"))
    responses, steps = recipe.responses_per_step(), recipe.train.steps
    prompt_tokens = responses * recipe.prompts.max_tokens
    response_tokens = responses * recipe.rollout.max_tokens
    rollout, scores = _step_bytes(recipe, shapes)
    artifacts = _times(_plus(rollout, scores), steps)
    newest = min(recipe.train.keep_latest, steps)
    kept = newest + sum(is_kept(recipe, step) for step in range(1, steps - newest + 1))
    # Of adapters there is a state too; it is small.
    state = 0 if recipe.lora.rank else newest * STATE_BYTES
    disk = _times(parameters["student"], kept * BYTES[recipe.student.dtype] + state)
    stages, times = _stages(recipe, shapes)
    return Plan(
        run_dir=str(path),
        device=resolve_device(recipe.pipeline.device),
        steps=steps,
        prompts=prompts,
        prompts_per_step=recipe.rollout.prompts_per_step,
        responses_per_step=responses,
        epochs=steps * recipe.rollout.prompts_per_step / prompts if prompts else None,
        parts_per_step=recipe.rollout.num_parts,
        prompt_tokens_per_step=prompt_tokens,
        response_tokens_per_step=response_tokens,
        rollout_bytes_per_step=rollout,
        score_bytes_per_step=scores,
        artifact_bytes=artifacts,
        parameters=parameters,
        model_bytes={name: _times(parameters[name], BYTES[model.dtype]) for name, model in models.items()},
        students_kept=kept,
        disk_bytes=_plus(artifacts, disk),
        hardware=recipe.hardware,
        stages=stages,
        times=times,
    )


def check_space(run: Run, stages: Collection[str]) -> None:
    """Raise OpdctlError (code 5) unless there is room for what a step's `stages` surely write: `rollout`, `score`,
    `update`. Warns where they may write more than there is room for."""
    surely, rollout = update_bytes(run) if "update" in stages else 0, "rollout" in stages
    files.require_space(run.path, surely, "the next student, with the state to go on from,")
    responses, scores = _step_bytes(run.recipe, {name: costs.shape_of(model) for name, model in run.models.items()})
    most = surely + responses * rollout + (scores or 0) * ("score" in stages)
    if most > (free := files.free_space(run.path)):
        console.warn(f"{run.path}: the step may take {files.format_bytes(most)}, {files.format_bytes(free)} are free")


def update_bytes(run: Run) -> int:
    """Return the bytes of a student, and of the trainer state with it; an adapter's, which is small, left out."""
    state = 0 if run.recipe.lora.rank or run.recipe.train.save_every_steps > 1 else STATE_BYTES
    return run.student.parameters() * (BYTES[run.recipe.student.dtype] + state)


def _step_bytes(recipe: Recipe, shapes: Mapping[str, ModelShape | None]) -> tuple[int, int | None]:
    """Return the most bytes that a step's rollout and scores can take; None if a hidden size is not known here."""
    responses = recipe.responses_per_step()
    tokens = responses * recipe.rollout.max_tokens
    rollout = ID_BYTES * (responses * recipe.prompts.max_tokens + tokens) + _stored_bytes(recipe.rollout) * tokens
    return rollout, _times(_score_bytes(recipe, shapes), tokens)


def _models_here(recipe: Recipe) -> dict[str, ModelDir]:
    """Return the models that need no hub, checked against one another."""
    folders = {name: find_local(model, f"{model_key(name)}.model") for name, model in recipe.models().items()}
    dirs = {name: ModelDir(folder, "float32") for name, folder in folders.items() if folder}
    for name in dirs.keys() & recipe.scorers() if "student" in dirs else ():
        check_same_tokenizer(dirs["student"], dirs[name], name)
    if "student" in dirs:
        check_top_k(recipe, dirs["student"])
    return dirs


def _shape(here: ModelDir | None, told: ModelShape | None) -> ModelShape | None:
    return (costs.shape_of(here) if here else None) or told


def _parameters(here: ModelDir | None, shape: ModelShape | None) -> int | None:
    """Return how many a model has: those stored where it is here, else those that its shape makes."""
    if here:
        return here.parameters()
    return costs.parameters(shape) if shape else None


def _count_prompts(recipe: Recipe, student: ModelDir | None) -> int | None:
    problems = load_local_problems(recipe.prompts)
    if problems is not None and student:
        prepare_prompts(recipe, problems, student)
    return recipe.prompts.limit if problems is None else len(problems)


def _stages(
    recipe: Recipe, shapes: Mapping[str, ModelShape | None]
) -> tuple[dict[str, StageCost | None], dict[str, int]]:
    """Return what each stage takes, None where a model's shape is not known, and how often it is gone through."""
    steps, every, models = recipe.train.steps, recipe.eval.every_steps, recipe.models()
    teachers = list(recipe.teacher_models())
    work: dict[str, tuple[str, Callable[[ModelShape], StageCost | None]]] = {
        "rollout": ("student", partial(costs.rollout_cost, recipe)),
        **{f"score {name}": (name, partial(_score_stage, recipe, name)) for name in recipe.scorers()},
        "update": ("student", lambda shape: costs.update_cost(recipe, shape, shapes[teachers[0]])),
    }
    times = dict.fromkeys(work, steps)
    if every:
        evaluated = ["student", *teachers]
        work |= {f"eval {name}": (name, partial(_evaluation_stage, recipe, models[name].dtype)) for name in evaluated}
        times |= {f"eval {name}": 1 for name in teachers}
        times["eval student"] = 1 + len(range(every, steps, every)) + 1  # before, in between, and after
    stages = {name: count(shape) if (shape := shapes[model]) else None for name, (model, count) in work.items()}
    return stages, times


def _score_stage(recipe: Recipe, name: str, shape: ModelShape) -> StageCost:
    """Return what one scorer takes. Teachers are taken to have the same number of prompts each."""
    share = 1 if name == REFERENCE else 1 / len(recipe.teacher_models())
    return costs.score_cost(recipe, shape, recipe.models()[name].dtype, share)


def _evaluation_stage(recipe: Recipe, dtype: str, shape: ModelShape) -> StageCost | None:
    """Return what one evaluation on all benchmarks takes: memory of the largest, seconds of all."""
    found = []
    for bench in _benches(recipe, None):
        if bench["problems"] is None:
            return None
        parts = min(recipe.eval.num_parts, bench["problems"])
        settings = (recipe.eval, bench["responses"], parts, recipe.eval.batch_size)
        found.append(costs.generation_cost(recipe, shape, dtype, *settings))
    largest = max(found, key=lambda stage: stage.bytes)
    return StageCost(largest.gpus, largest.memory, _sum(stage.seconds for stage in found), largest.at_once)


def _stored_bytes(settings: Rollout | Score) -> int:
    """Return the bytes stored of a token: its log-prob, and where asked for the entropy and the most probable ids."""
    return LOGPROB_BYTES * (1 + settings.entropy) + (ID_BYTES + LOGPROB_BYTES) * settings.top_k


def _score_bytes(recipe: Recipe, shapes: Mapping[str, ModelShape | None]) -> int | None:
    """Return the bytes that all scores of one token take; None if a hidden size is not known here."""
    settings, teachers = recipe.score, recipe.teacher_models()
    stored = _stored_bytes(settings) + LOGPROB_BYTES * recipe.rollout.top_k * settings.student_top_k
    reference = LOGPROB_BYTES * (recipe.reference is not None)
    if not settings.hidden_states:
        return stored + reference
    known = [shape.hidden_size for name in teachers if (shape := shapes[name])]
    return stored + reference + HIDDEN_BYTES * max(known) if len(known) == len(teachers) else None


def plan_evaluation(recipe: Recipe, output: Path | None, data: Path | None) -> dict[str, Any]:
    """Size up an evaluation, benchmark by benchmark; None where the number of problems is only known to the hub."""
    benches = _benches(recipe, data)
    return {"run_dir": str(run_path(recipe, output)), "benches": benches}


def _benches(recipe: Recipe, data: Path | None) -> list[dict[str, Any]]:
    benches = []
    for name in recipe.eval.bench:
        benchmark = find(name, recipe.eval)
        here = data is not None or benchmark.source.local
        known = [count for count in (recipe.eval.limit, benchmark.size) if count]
        problems = len(benchmark.problems(recipe.eval.limit, data)) if here else min(known, default=None)
        responses = _times(problems, benchmark.samples_under(recipe.eval))
        tokens = _times(responses, recipe.eval.max_tokens)
        benches.append({"bench": name, "problems": problems, "responses": responses, "max_response_tokens": tokens})
    return benches


def _times(count: int | None, size: int) -> int | None:
    return None if count is None else count * size


def _plus(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other


def _sum(values: Iterable[float | None]) -> float | None:
    known, all_of_them = 0.0, True
    for value in values:
        known, all_of_them = known + (value or 0), all_of_them and value is not None
    return known if all_of_them else None

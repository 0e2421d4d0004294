"""The plan of a run or an evaluation (`--dry-run`): its size, before anything is loaded, downloaded or written.

All sizes are upper bounds: every prompt and response has its maximum length. Memory and GPU-hours come from the cost
model in pipeline/costs.py, for the hardware that the recipe names: they are estimates, not measured on GPUs.
"""

import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from opdctl import console
from opdctl.artifacts import files
from opdctl.data.prompts import load_local_problems
from opdctl.environment import resolve_device
from opdctl.evaluation.benchmarks import find_benchmark
from opdctl.models.directory import ModelDir
from opdctl.models.shapes import count_parameters, read_shape
from opdctl.pipeline import costs
from opdctl.pipeline.costs import DTYPE_BYTES, STATE_BYTES, StageCost, if_known, sum_known
from opdctl.pipeline.pruning import is_kept
from opdctl.recipe.schema import Hardware, ModelShape, Recipe, Rollout, Score
from opdctl.runs.compatibility import check_same_recipe
from opdctl.runs.layout import run_path
from opdctl.runs.models import check_lengths, prepare_models, print_lines
from opdctl.runs.open import check_output_dir, prepare_prompts, resolve_auto_engines
from opdctl.runs.run import REFERENCE, Run

ID_BYTES = LOGPROB_BYTES = HIDDEN_BYTES = 4

ModelShapes = Mapping[str, ModelShape | None]
"""The shape of each model by name; None if it is unknown."""


@dataclass(frozen=True)
class PromptPlan:
    """Prompts, responses and tokens. None is unknown: the data set is not on this machine."""

    prompts: int | None
    prompts_per_step: int
    responses_per_step: int
    epochs: float | None
    parts_per_step: int
    prompt_tokens_per_step: int
    response_tokens_per_step: int


@dataclass(frozen=True)
class ArtifactPlan:
    """Bytes on disk, and the models. None is unknown: neither the model nor its shape is available.

    parameters, model_bytes: of the student and of each scorer; bytes are in the model's dtype.
    """

    rollout_bytes_per_step: int
    score_bytes_per_step: int | None
    artifact_bytes: int | None
    parameters: dict[str, int | None]
    model_bytes: dict[str, int | None]
    students_kept: int
    disk_bytes: int | None


@dataclass(frozen=True)
class StagePlan:
    """The estimated cost of each stage on the recipe's hardware, and how often the stage runs. None is unknown."""

    hardware: Hardware
    stages: dict[str, StageCost | None]
    repetitions: dict[str, int]

    def gpu_hours(self) -> float | None:
        """Return the GPU-hours of the run."""
        return sum_known(self.of_stage(name, StageCost.gpu_hours) for name in self.stages)

    def seconds(self) -> float | None:
        """Return the duration of the run if its stages run one after another."""
        return sum_known(self.of_stage(name, StageCost.total_seconds) for name in self.stages)

    def of_stage(self, name: str, total: Callable[[StageCost, int], float | None]) -> float | None:
        """Return a total over all repetitions of a stage."""
        return if_known(lambda cost: total(cost, self.repetitions[name]), self.stages[name])

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        stages = {
            name: cost and {**asdict(cost), "bytes": cost.bytes, "gpu_hours": cost.gpu_hours(self.repetitions[name])}
            for name, cost in self.stages.items()
        }
        totals = {"gpu_hours": self.gpu_hours(), "seconds": self.seconds()}
        return {
            "hardware": self.hardware.model_dump(),
            "stages": stages,
            "repetitions": self.repetitions,
            **totals,
            "estimated": True,
        }


@dataclass(frozen=True)
class Plan:
    """The plan of a run."""

    run_dir: str
    device: str
    steps: int
    prompts: PromptPlan
    artifacts: ArtifactPlan
    stages: StagePlan

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values, in one flat object."""
        place = {"run_dir": self.run_dir, "device": self.device, "steps": self.steps}
        return place | asdict(self.prompts) | asdict(self.artifacts) | self.stages.as_dict()


def make_plan(recipe: Recipe, output: Path | None) -> Plan:
    """Plan a run. Local models and prompts are read and checked; nothing is downloaded or written.

    Raises:
        OpdctlError: as in a run: a local model or file is missing, tokenizers differ, prompts are invalid, or the run
            directory was made with a different recipe.
    """
    path = run_path(recipe, output)
    recipe = resolve_auto_engines(recipe, path)
    if (path / "run.json").exists():
        check_same_recipe(recipe, path)
    else:
        check_output_dir(recipe, path)
    models, lines = prepare_models(recipe, download=False)
    if "student" in models:
        from opdctl.training.policy import check_trainable

        check_trainable(models["student"], recipe)
    shapes = {name: if_known(read_shape, models.get(name)) or model.shape for name, model in recipe.models().items()}
    prompts = _plan_prompts(recipe, models)
    print_lines(lines)
    return Plan(
        run_dir=str(path),
        device=resolve_device(recipe.pipeline.device),
        steps=recipe.train.steps,
        prompts=prompts,
        artifacts=_plan_artifacts(recipe, models, shapes),
        stages=_plan_stages(recipe, shapes),
    )


def _plan_prompts(recipe: Recipe, models: Mapping[str, ModelDir]) -> PromptPlan:
    prompts, responses = _count_prompts(recipe, models), recipe.responses_per_step()
    sampled = recipe.train.steps * recipe.rollout.prompts_per_step
    return PromptPlan(
        prompts=prompts,
        prompts_per_step=recipe.rollout.prompts_per_step,
        responses_per_step=responses,
        epochs=sampled / prompts if prompts else None,
        parts_per_step=recipe.rollout.num_parts,
        prompt_tokens_per_step=responses * recipe.prompts.max_tokens,
        response_tokens_per_step=responses * recipe.rollout.max_tokens,
    )


def _count_prompts(recipe: Recipe, models: Mapping[str, ModelDir]) -> int | None:
    problems = load_local_problems(recipe.prompts)
    if problems is not None and "student" in models:
        prompts, _ = prepare_prompts(recipe, problems, models["student"])
        check_lengths(recipe, models, prompts)
    return recipe.prompts.limit if problems is None else len(problems)


def _plan_artifacts(recipe: Recipe, models: Mapping[str, ModelDir], shapes: ModelShapes) -> ArtifactPlan:
    parameters = {
        # Those stored in a local model; otherwise those of its shape.
        name: models[name].weights.num_parameters if name in models else if_known(count_parameters, shape)
        for name, shape in shapes.items()
    }
    rollout, scores = _step_bytes(recipe, shapes)
    artifacts = if_known(lambda count: (rollout + count) * recipe.train.steps, scores)
    latest = min(recipe.train.keep_latest, recipe.train.steps)
    kept = latest + sum(is_kept(recipe, step) for step in range(1, recipe.train.steps - latest + 1))
    # Checkpoints of adapters are small and are not counted.
    checkpoint_bytes = 0 if recipe.lora.rank else latest * STATE_BYTES
    student_bytes = kept * DTYPE_BYTES[recipe.student.dtype] + checkpoint_bytes
    states = if_known(operator.mul, parameters["student"], student_bytes)
    return ArtifactPlan(
        rollout_bytes_per_step=rollout,
        score_bytes_per_step=scores,
        artifact_bytes=artifacts,
        parameters=parameters,
        model_bytes={
            name: if_known(operator.mul, parameters[name], DTYPE_BYTES[model.dtype])
            for name, model in recipe.models().items()
        },
        students_kept=kept,
        disk_bytes=if_known(operator.add, artifacts, states),
    )


def check_space(run: Run, stages: Collection[str]) -> None:
    """Check that a step's `stages` (`rollout`, `score`, `update`) have the disk space that they need for certain.

    Warn if they may need more than is free.

    Raises:
        OpdctlError: the disk is full.
    """
    required_bytes = update_bytes(run) if "update" in stages else 0
    files.require_space(run.path, required_bytes, "the next student with its checkpoint")
    rollout, scores = _step_bytes(run.recipe, {name: read_shape(model) for name, model in run.models.items()})
    worst_case_bytes = required_bytes + rollout * ("rollout" in stages) + (scores or 0) * ("score" in stages)
    if worst_case_bytes > (free := files.free_space(run.path)):
        needed = files.format_bytes(worst_case_bytes)
        console.warn(f"{run.path}: the step may need {needed}; {files.format_bytes(free)} are free")


def update_bytes(run: Run) -> int:
    """Return the bytes of a student and of the checkpoint with it. A checkpoint of adapters is small: not counted."""
    has_checkpoint = not run.recipe.lora.rank and run.recipe.train.save_every_steps == 1
    return run.student.weights.num_parameters * (DTYPE_BYTES[run.recipe.student.dtype] + STATE_BYTES * has_checkpoint)


def _step_bytes(recipe: Recipe, shapes: ModelShapes) -> tuple[int, int | None]:
    """Return the maximum bytes of a step's rollout and of its scores; None if a hidden size is unknown."""
    responses = recipe.responses_per_step()
    tokens = responses * recipe.rollout.max_tokens
    ids = ID_BYTES * (responses * recipe.prompts.max_tokens + tokens)
    rollout = ids + _bytes_per_token(recipe.rollout) * tokens
    return rollout, if_known(operator.mul, _score_bytes_per_token(recipe, shapes), tokens)


def _bytes_per_token(settings: Rollout | Score) -> int:
    """Return the bytes of a token's log-prob, and of its entropy and its top-k if they are stored."""
    return LOGPROB_BYTES * (1 + settings.entropy) + (ID_BYTES + LOGPROB_BYTES) * settings.top_k


def _score_bytes_per_token(recipe: Recipe, shapes: ModelShapes) -> int | None:
    settings = recipe.score
    student_top_k = recipe.rollout.top_k * settings.student_top_k
    reference = recipe.reference is not None
    scores = _bytes_per_token(settings) + LOGPROB_BYTES * (student_top_k + reference)
    if not settings.hidden_states:
        return scores
    hidden_sizes = [if_known(lambda shape: shape.hidden_size, shapes[name]) for name in recipe.teacher_models()]
    return if_known(lambda *sizes: scores + HIDDEN_BYTES * max(sizes), *hidden_sizes)


def _plan_stages(recipe: Recipe, shapes: ModelShapes) -> StagePlan:
    steps, every, teachers = recipe.train.steps, recipe.eval.every_steps, list(recipe.teacher_models())
    stages: dict[str, StageCost | None] = {"rollout": if_known(partial(costs.rollout_cost, recipe), shapes["student"])}
    for name in recipe.scorers():
        stages[f"score {name}"] = if_known(partial(_score_cost, recipe, name), shapes[name])
    stages["update"] = if_known(lambda shape: costs.update_cost(recipe, shape, shapes[teachers[0]]), shapes["student"])
    repetitions = dict.fromkeys(stages, steps)
    if every:
        for name in ("student", *teachers):
            stages[f"eval {name}"] = if_known(partial(_evaluation_cost, recipe, name), shapes[name])
            repetitions[f"eval {name}"] = 1
        repetitions["eval student"] = 1 + len(range(every, steps, every)) + 1  # before, during and after training
    return StagePlan(recipe.hardware, stages, repetitions)


def _score_cost(recipe: Recipe, name: str, shape: ModelShape) -> StageCost:
    """Return the cost of one scorer. Several teachers are assumed to score the same number of responses."""
    fraction = 1 if name == REFERENCE else 1 / len(recipe.teacher_models())
    return costs.score_cost(recipe, shape, recipe.models()[name].dtype, fraction)


def _evaluation_cost(recipe: Recipe, name: str, shape: ModelShape) -> StageCost | None:
    """Return the cost of one evaluation on all benchmarks: the largest memory, the sum of the seconds."""
    settings, dtype, stages = recipe.eval, recipe.models()[name].dtype, []
    for benchmark in _plan_benchmarks(recipe, None):
        if benchmark.problems is None or benchmark.responses is None:
            return None
        parts = min(settings.num_parts, benchmark.problems)
        stages.append(
            costs.generation_cost(recipe, shape, dtype, settings, benchmark.responses, parts, settings.batch_size)
        )
    largest = max(stages, key=lambda stage: stage.bytes)
    return replace(largest, seconds=sum_known(stage.seconds for stage in stages))


@dataclass(frozen=True)
class BenchmarkPlan:
    """The size of an evaluation on a benchmark. None is unknown: the benchmark is on the hub, without a fixed size."""

    bench: str
    problems: int | None
    responses: int | None
    max_response_tokens: int | None


@dataclass(frozen=True)
class EvaluationPlan:
    """The plan of an evaluation."""

    run_dir: str
    benches: list[BenchmarkPlan]


def plan_evaluation(recipe: Recipe, output: Path | None, data: Path | None) -> EvaluationPlan:
    """Plan an evaluation on the recipe's benchmarks. data: local copies of them; nothing is downloaded.

    Raises:
        OpdctlError: a local benchmark is missing or invalid.
    """
    return EvaluationPlan(str(run_path(recipe, output)), _plan_benchmarks(recipe, data))


def _plan_benchmarks(recipe: Recipe, data: Path | None) -> list[BenchmarkPlan]:
    settings, plans = recipe.eval, []
    for name in settings.bench:
        benchmark = find_benchmark(name, settings)
        if data is not None or benchmark.source.is_local:
            problems: int | None = len(benchmark.problems(settings.limit, data))
        else:
            problems = min((count for count in (settings.limit, benchmark.size) if count), default=None)
        responses = if_known(operator.mul, problems, benchmark.samples_per_problem(settings))
        plans.append(BenchmarkPlan(name, problems, responses, if_known(operator.mul, responses, settings.max_tokens)))
    return plans

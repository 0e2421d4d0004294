"""The plan of a run (`--dry-run`): its size, and every check that needs no GPU and no response, before anything is
written.

Weights are read, not loaded, and not downloaded. All sizes are upper bounds: every prompt and response has its maximum
length. Memory and GPU-hours are estimates of pipeline/stage_plan.py for the hardware that the recipe names, not
measured on GPUs.
"""

import contextlib
import operator
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypedDict

from opdctl import console
from opdctl.artifacts import files
from opdctl.artifacts.records import ONE_BYTE_EXPERTS, Prompt
from opdctl.data.prompts import load_local_problems, load_problems
from opdctl.environment import resolve_device
from opdctl.errors import ExitCode, OpdctlError
from opdctl.evaluation.benchmarks import find_benchmark, is_of_unknown_plugin
from opdctl.models.directory import ModelDir
from opdctl.models.shapes import count_parameters, read_shape
from opdctl.pipeline.costs import DTYPE_BYTES, if_known, state_bytes
from opdctl.pipeline.pruning import is_kept
from opdctl.pipeline.rollout import warn_of_modified_sampling
from opdctl.pipeline.stage_plan import ModelShapes, StagePlan, plan_stages
from opdctl.recipe.schema import ModelShape, Recipe, Rollout, Score, Train
from opdctl.runs.models import check_lengths, prepare_models, print_lines
from opdctl.runs.open import check_output_dir, check_run, resolve_open_settings
from opdctl.runs.prompts import prepare_prompts
from opdctl.runs.run import Run, read_recorded_chat_templates
from opdctl.training.tracking import warn_of_missing_trackers

ID_BYTES = LOGPROB_BYTES = HIDDEN_BYTES = 4


class ShownPrompt(TypedDict):
    """A prompt after the chat template. pieces: the text of each token."""

    id: str
    text: str
    token_ids: list[int]
    pieces: list[str]


@dataclass(frozen=True)
class Plan:
    """The plan of a run. None is unknown: data, or a model and its shape, are not on this machine.

    unavailable: the first error of the hub, a server or a missing package, which ends a run.
    """

    run_dir: str
    device: str
    steps: int
    gpus_per_engine: dict[str, int]
    """Of an engine of `rollout` and of `score`; 0 if it is behind a server."""
    prompts: int | None
    first_prompt: dict[str, ShownPrompt]
    """As the student reads it and as each teacher does that reads another one, by name. Empty if it is not known."""
    prompts_per_step: int
    responses_per_step: int
    epochs: float | None
    parts_per_step: int
    prompt_tokens_per_step: int
    response_tokens_per_step: int
    sampling: dict[str, Any]
    """The settings by which responses are not sampled from the student's own distribution, or end early."""
    environment: str
    """The function whose episodes are the responses, "" if there is none."""
    rollout_bytes_per_step: int
    score_bytes_per_step: int | None
    artifact_bytes: int | None
    parameters: dict[str, int | None]
    """Of the student and of each scorer."""
    model_bytes: dict[str, int | None]
    """In the model's dtype."""
    students_kept: int
    disk_bytes: int | None
    stages: StagePlan
    unavailable: OpdctlError | None

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values, in one flat object."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "unavailable"}
        return values | values.pop("stages").as_dict()


def make_plan(recipe: Recipe, path: Path, needs: Collection[str] | None = None, *, colocated: bool = True) -> Plan:
    """Plan a run, with colocated stages or with separate allocations, and check what the run would. Nothing is written.

    Of hub models, config and tokenizer are downloaded; prompts and benchmarks are downloaded. needs: the models whose
    files the command reads, all if None.

    Raises:
        OpdctlError: as in a run: a model or file is missing or corrupt, tokenizers differ, prompts are invalid, or the
            run directory was made with a different recipe or model. Not if a resource is unavailable: then the plan
            contains the error.
    """
    recipe = resolve_open_settings(recipe, path)
    unavailable: list[OpdctlError] = []
    models, prompts, first_prompt = _check(recipe, path, needs, unavailable)
    shapes = {name: if_known(read_shape, models.get(name)) or model.shape for name, model in recipe.models().items()}
    parameters = {  # those stored in a local model; otherwise those of its shape
        name: _count_stored(models.get(name)) or if_known(count_parameters, shape) for name, shape in shapes.items()
    }
    steps, responses = recipe.train.steps, recipe.responses_per_step()
    rollout, scores = _step_bytes(recipe, shapes)
    artifacts = if_known(lambda count: (rollout + count) * steps, scores)
    students = if_known(operator.mul, parameters["student"], _bytes_per_student_parameter(recipe))
    return Plan(
        run_dir=str(path),
        device=resolve_device(recipe.pipeline.device),
        steps=steps,
        gpus_per_engine={
            name: 0 if engine == "server" else recipe.gpus_per_engine(engine)
            for name, engine in (("rollout", recipe.rollout.engine), ("score", recipe.score.engine))
        },
        prompts=prompts,
        first_prompt=first_prompt,
        prompts_per_step=recipe.rollout.prompts_per_step,
        responses_per_step=responses,
        epochs=steps * recipe.rollout.prompts_per_step / prompts if prompts else None,
        parts_per_step=recipe.rollout.num_parts,
        prompt_tokens_per_step=responses * recipe.prompts.max_tokens,
        response_tokens_per_step=responses * recipe.rollout.max_tokens,
        sampling=recipe.rollout.changes,
        environment=recipe.rollout.environment,
        rollout_bytes_per_step=rollout,
        score_bytes_per_step=scores,
        artifact_bytes=artifacts,
        parameters=parameters,
        model_bytes={
            name: if_known(operator.mul, parameters[name], DTYPE_BYTES[model.dtype])
            for name, model in recipe.models().items()
        },
        students_kept=_count_kept_students(recipe),
        disk_bytes=if_known(operator.add, artifacts, students),
        stages=plan_stages(recipe, shapes, colocated=colocated),
        unavailable=unavailable[0] if unavailable else None,
    )


def _check(
    recipe: Recipe, path: Path, needs: Collection[str] | None, unavailable: list[OpdctlError]
) -> tuple[dict[str, ModelDir], int | None, dict[str, ShownPrompt]]:
    """Check what the run would. Return the models that are on this machine, and of the prompts their number and the
    first one if they are known.

    unavailable: receives the errors of resources that are out of reach.
    """
    lines: list[str] = []
    if (path / "run.json").exists():
        models = _check_existing(recipe, path, needs)
    else:
        check_output_dir(recipe, path)
        models = {}
        with defer_unavailable(unavailable):
            models, lines = prepare_models(recipe, "settings")
        if unavailable:
            models, lines = prepare_models(recipe, "none")
    warn_of_zero_rate(recipe.train)
    warn_of_modified_sampling(recipe.rollout)
    student = models.get("student")
    if student and student.weights.files:
        from opdctl.training.policy import check_trainable

        check_trainable(student, recipe)
    prompts, first = recipe.prompts.num_rows, None
    with defer_unavailable(unavailable):
        prompts, first = _read_prompts(recipe, path, models, asks_hub=not unavailable)
    with defer_unavailable(unavailable):
        _check_benchmarks(recipe, path, student, asks_hub=not unavailable)
    with defer_unavailable(unavailable):
        _connect_to_servers(recipe, models)
    warn_of_missing_trackers(recipe)
    print_lines(lines)
    return models, prompts, _show_prompt(first, student) if first and student else {}


@contextlib.contextmanager
def defer_unavailable(unavailable: list[OpdctlError]) -> Iterator[None]:
    """Collect the error of a resource that is out of reach: the plan has a use without it."""
    try:
        yield
    except OpdctlError as error:
        if error.code != ExitCode.UNAVAILABLE:
            raise
        unavailable.append(error)


def _check_existing(recipe: Recipe, path: Path, needs: Collection[str] | None) -> dict[str, ModelDir]:
    """Check an existing run as a command that continues it does. Return its models that are on this machine."""
    run = check_run(recipe, path, needs)
    if needs is None or "student" in needs:
        run.student_at(run.current_step())
    return {name: model.without_code() for name, model in run.models.items() if model.path.is_dir()}


def _count_stored(model: ModelDir | None) -> int | None:
    """Return the number of parameters of a model that has weights on this machine."""
    return model.weights.num_parameters if model and model.weights.files else None


def _read_prompts(
    recipe: Recipe, path: Path, models: Mapping[str, ModelDir], *, asks_hub: bool
) -> tuple[int | None, Prompt | None]:
    """Check the prompts. Return their number, without the hub that of the recipe, and the first one. asks_hub: it
    answered before."""
    templates = read_recorded_chat_templates(recipe, path)
    problems = load_problems(recipe.prompts) if asks_hub else load_local_problems(recipe.prompts)
    if problems and "student" in models:
        prompts = prepare_prompts(recipe, problems, models["student"], templates)
        check_lengths(recipe, models, prompts.training)
        return len(prompts.training), prompts.training[0]
    return len(problems) if problems else recipe.prompts.num_rows, None


def _show_prompt(prompt: Prompt, student: ModelDir) -> dict[str, ShownPrompt]:
    """Return a prompt for the student, and for its teacher if that reads another one."""
    versions = {"student": prompt.prompt_ids}
    if prompt.teacher_prompt_ids is not None:
        versions[prompt.teacher] = prompt.teacher_prompt_ids
    shown: dict[str, ShownPrompt] = {}
    for name, ids in versions.items():
        token_ids = ids.tolist()
        pieces = [student.tokenizer.decode([id_]) for id_ in token_ids]
        text = student.tokenizer.decode(token_ids)
        shown[name] = {"id": prompt.prompt_id, "text": text, "token_ids": token_ids, "pieces": pieces}
    return shown


def _check_benchmarks(recipe: Recipe, path: Path, student: ModelDir | None, *, asks_hub: bool) -> None:
    """Check the benchmarks that training evaluates. asks_hub: it answered before."""
    from opdctl.evaluation.evaluate import check_benchmark

    names = [name for name in recipe.eval.bench if not is_of_unknown_plugin(recipe, name)]
    for name in names if recipe.eval.every_steps else ():
        if asks_hub or find_benchmark(name, recipe.eval).source.is_local:
            check_benchmark(recipe, name, student, templates=read_recorded_chat_templates(recipe, path))


def _connect_to_servers(recipe: Recipe, models: Mapping[str, ModelDir]) -> None:
    """Connect to the servers of the scorers, and check what they serve."""
    from opdctl.engines.pool import open_engine_pool

    if recipe.score.engine == "server":
        with open_engine_pool(recipe, "cpu") as engines:
            engines.start({name: ("server", models[name]) for name in recipe.scorers() if name in models})


def _count_kept_students(recipe: Recipe) -> int:
    latest = min(recipe.train.keep_latest, recipe.train.steps)
    return latest + sum(is_kept(recipe, step) for step in range(1, recipe.train.steps - latest + 1))


def _bytes_per_student_parameter(recipe: Recipe) -> int:
    """Return the bytes of all kept students and checkpoints. Checkpoints of adapters are small: not counted."""
    checkpoints = 0 if recipe.lora.rank else min(recipe.train.keep_latest, recipe.train.steps)
    return _count_kept_students(recipe) * DTYPE_BYTES[recipe.student.dtype] + checkpoints * state_bytes(recipe)


def warn_of_zero_rate(settings: Train, first: int = 0) -> None:
    """Warn if the learning rate of steps from `first` on is 0, because the schedule has ended."""
    if settings.lr_scheduler_type == "constant" or settings.decay_steps is None:
        return
    if (start := max(first, settings.decay_steps)) < settings.steps:
        steps = f"steps {start} to {settings.steps - 1}"
        console.warn(f"train.decay_steps = {settings.decay_steps}: the learning rate of {steps} is 0")


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
    return run.student.weights.num_parameters * (
        DTYPE_BYTES[run.recipe.student.dtype] + state_bytes(run.recipe) * has_checkpoint
    )


def _step_bytes(recipe: Recipe, shapes: ModelShapes) -> tuple[int, int | None]:
    """Return the maximum bytes of a step's rollout and of its scores; None if a hidden size is unknown."""
    responses = recipe.responses_per_step()
    tokens = responses * recipe.rollout.max_tokens
    read = responses * recipe.prompts.max_tokens + tokens
    logprobs = LOGPROB_BYTES * recipe.rollout.sampling_logprobs
    rollout = ID_BYTES * read + (_bytes_per_token(recipe.rollout) + logprobs) * tokens
    if recipe.rollout.routed_experts and (shape := shapes["student"]):
        rollout += expert_bytes_per_token(shape) * read
    return rollout, if_known(operator.mul, _score_bytes_per_token(recipe, shapes), tokens)


def _bytes_per_token(settings: Rollout | Score) -> int:
    """Return the bytes of a token's log-prob, and of its entropy and its top-k if they are stored."""
    return LOGPROB_BYTES * (1 + settings.entropy) + (ID_BYTES + LOGPROB_BYTES) * settings.top_k


def expert_bytes_per_token(shape: ModelShape) -> int:
    """Return the bytes of the stored experts of one token, in all layers."""
    id_bytes = 1 if shape.num_experts <= ONE_BYTE_EXPERTS else 2
    return shape.num_hidden_layers * shape.num_experts_per_tok * id_bytes


def _score_bytes_per_token(recipe: Recipe, shapes: ModelShapes) -> int | None:
    settings = recipe.score
    student_top_k = recipe.rollout.top_k * settings.student_top_k
    reference = recipe.reference is not None
    scores = _bytes_per_token(settings) + LOGPROB_BYTES * (student_top_k + reference)
    if not settings.hidden_states:
        return scores
    hidden_sizes = [if_known(lambda shape: shape.hidden_size, shapes[name]) for name in recipe.teacher_models()]
    return if_known(lambda *sizes: scores + HIDDEN_BYTES * max(sizes), *hidden_sizes)

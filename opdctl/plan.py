"""`--dry-run`: what a run will take, before anything is loaded, fetched or written.

Tokens and bytes are upper bounds: every prompt and response at its limit. Memory is that of the weights and the
optimizer; activations and key-value caches come on top.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from opdctl import SCHEMA_VERSION, log, store
from opdctl.benchmarks import find
from opdctl.config import Recipe, Rollout, Score, is_kept, model_key
from opdctl.engines import resolve_device
from opdctl.model import ModelDir, check_same_tokenizer, locate_here
from opdctl.prompts import local_problems
from opdctl.run import (
    Run,
    check_top_k,
    prepare_prompts,
    refuse_another_recipe,
    refuse_foreign_folder,
    run_path,
    with_engines,
)

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
TRAINER_BYTES = 4 + 4 + 8  # float32 master weight, gradient, and AdamW's two moments, a parameter
STATE_BYTES = 4 + 8  # the float32 weight and the two moments, as they are saved
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
    optimizer_bytes: int | None
    students_kept: int
    disk_bytes: int | None
    lora: bool

    def as_dict(self) -> dict[str, Any]:
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}


def plan(recipe: Recipe, output: Path | None) -> Plan:
    """Size up a recipe. Embedded and local models and prompts are checked; nothing is fetched.

    Raises OpdctlError as a run would for a missing local model, tokenizers that differ, or bad local prompts.
    """
    path = run_path(recipe, output)
    recipe = with_engines(recipe, path)
    if (path / "run.json").exists():
        refuse_another_recipe(recipe, path)
    else:
        refuse_foreign_folder(recipe, path)
    models = recipe.models()
    folders = {name: locate_here(model, f"{model_key(name)}.model") for name, model in models.items()}
    dirs = {name: ModelDir(folder, "float32") for name, folder in folders.items() if folder}
    for name in dirs.keys() & recipe.scorers() if "student" in dirs else ():
        check_same_tokenizer(dirs["student"], dirs[name], name)
    if "student" in dirs:
        check_top_k(recipe, dirs["student"])
    parameters = {name: dirs[name].parameters() if name in dirs else model.parameters for name, model in models.items()}
    problems = local_problems(recipe.prompts)
    if problems is not None and "student" in dirs:
        prepare_prompts(recipe, problems, dirs["student"])
    prompts = recipe.prompts.count if problems is None else len(problems)
    responses, steps = recipe.responses_per_step(), recipe.train.steps
    prompt_tokens = responses * recipe.prompts.max_tokens
    response_tokens = responses * recipe.rollout.max_tokens
    rollout, scores = _step_bytes(recipe, dirs)
    artifacts = _times(_plus(rollout, scores), steps)
    newest = min(recipe.train.keep_last, steps)
    kept = newest + sum(is_kept(recipe, step) for step in range(1, steps - newest + 1))
    frozen, own = (
        recipe.lora.rank > 0,
        BYTES[recipe.student.dtype],
    )  # of adapters the size is not known here; it is small
    disk = _times(parameters["student"], kept * own + (0 if frozen else newest * STATE_BYTES))
    return Plan(
        run_dir=str(path),
        device=resolve_device(recipe.pipeline.device),
        steps=steps,
        prompts=prompts,
        prompts_per_step=recipe.rollout.prompts_per_step,
        responses_per_step=responses,
        epochs=steps * recipe.rollout.prompts_per_step / prompts if prompts else None,
        parts_per_step=recipe.rollout.parts,
        prompt_tokens_per_step=prompt_tokens,
        response_tokens_per_step=response_tokens,
        rollout_bytes_per_step=rollout,
        score_bytes_per_step=scores,
        artifact_bytes=artifacts,
        parameters=parameters,
        model_bytes={name: _times(parameters[name], BYTES[model.dtype]) for name, model in models.items()},
        optimizer_bytes=_times(parameters["student"], own if frozen else TRAINER_BYTES),
        lora=frozen,
        students_kept=kept,
        disk_bytes=_plus(artifacts, disk),
    )


def check_space(run: Run, stages: Collection[str]) -> None:
    """Raise OpdctlError (code 5) unless there is room for what a step's `stages` surely write: `rollout`, `score`,
    `update`. Warns where they may write more than there is room for."""
    surely, rollout = update_bytes(run) if "update" in stages else 0, "rollout" in stages
    store.require_space(run.path, surely, "the next student, with the state to go on from,")
    sizes = _step_bytes(run.recipe, run.models)
    most = surely + sizes[0] * rollout + (sizes[1] or 0) * ("score" in stages)
    if most > (free := store.free_space(run.path)):
        log.warn(f"{run.path}: the step may take {store.readable(most)}, {store.readable(free)} are free")


def update_bytes(run: Run) -> int:
    """Return the bytes of a student, and of the trainer state with it; an adapter's, which is small, left out."""
    state = 0 if run.recipe.lora.rank or run.recipe.train.save_every > 1 else STATE_BYTES
    return run.student.parameters() * (BYTES[run.recipe.student.dtype] + state)


def _step_bytes(recipe: Recipe, dirs: Mapping[str, ModelDir]) -> tuple[int, int | None]:
    """Return the most bytes that a step's rollout and scores can take; None if a hidden size is not known here."""
    responses = recipe.responses_per_step()
    tokens = responses * recipe.rollout.max_tokens
    rollout = ID_BYTES * (responses * recipe.prompts.max_tokens + tokens) + _stored_bytes(recipe.rollout) * tokens
    return rollout, _times(_score_bytes(recipe, dirs), tokens)


def _stored_bytes(settings: Rollout | Score) -> int:
    """Return the bytes stored of a token: its log-prob, and where asked for the entropy and the most probable ids."""
    return LOGPROB_BYTES * (1 + settings.entropy) + (ID_BYTES + LOGPROB_BYTES) * settings.top_k


def _score_bytes(recipe: Recipe, dirs: Mapping[str, ModelDir]) -> int | None:
    """Return the bytes that all scores of one token take; None if a hidden size is not known here."""
    settings, teachers = recipe.score, recipe.teacher_models()
    stored = _stored_bytes(settings) + LOGPROB_BYTES * recipe.rollout.top_k * settings.student_top_k
    reference = LOGPROB_BYTES * (recipe.reference is not None)
    if not settings.hidden_states:
        return stored + reference
    sizes = [dirs[name].hidden_size() if name in dirs else None for name in teachers]
    known = [size for size in sizes if size is not None]
    return stored + reference + HIDDEN_BYTES * max(known) if len(known) == len(sizes) else None


def evaluation(recipe: Recipe, output: Path | None, data: Path | None) -> dict[str, Any]:
    """Size up an evaluation, benchmark by benchmark; None where the number of problems is only known to the hub."""
    benches = []
    for name in recipe.eval.bench:
        benchmark = find(name, recipe.eval)
        here = data is not None or benchmark.source.local
        problems = len(benchmark.problems(recipe.eval.problems, data)) if here else recipe.eval.problems
        responses = _times(problems, benchmark.samples_under(recipe.eval))
        tokens = _times(responses, recipe.eval.max_tokens)
        benches.append({"bench": name, "problems": problems, "responses": responses, "max_response_tokens": tokens})
    return {"schema_version": SCHEMA_VERSION, "run_dir": str(run_path(recipe, output)), "benches": benches}


def evaluation_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the plan of an evaluation as (benchmark, how much) lines for a person."""
    return [
        (
            bench["bench"],
            f"{_count(bench['problems'])} problems, {_count(bench['responses'])} responses, "
            f"≤ {_count(bench['max_response_tokens'])} tokens",
        )
        for bench in found["benches"]
    ]


def _times(count: int | None, size: int) -> int | None:
    return None if count is None else count * size


def _plus(one: int | None, other: int | None) -> int | None:
    return None if one is None or other is None else one + other


def rows(plan: Plan) -> list[tuple[str, str]]:
    """Return the plan as (what, how much) lines for a person."""
    epochs = "" if plan.epochs is None else f" = {plan.epochs:.2f} epochs"
    trained = "frozen weights; adapters come on top" if plan.lora else "float32 weights, gradients and two moments"
    return [
        ("run directory", plan.run_dir),
        ("device", plan.device),
        ("prompts", f"{_count(plan.prompts)}; {plan.steps} steps of {plan.prompts_per_step}{epochs}"),
        ("responses", f"{plan.responses_per_step:,} a step in {plan.parts_per_step} parts"),
        ("tokens", f"≤ {plan.prompt_tokens_per_step:,} prompt + {plan.response_tokens_per_step:,} response a step"),
        (
            "artifacts",
            f"≤ {size(plan.artifact_bytes)} in all; a step ≤ {size(plan.rollout_bytes_per_step)} rollout + "
            f"{size(plan.score_bytes_per_step)} scores",
        ),
        *(
            (name, f"{_count(plan.parameters[name])} parameters, {size(plan.model_bytes[name])} in the engine")
            for name in plan.parameters
        ),
        ("training", f"{size(plan.optimizer_bytes)}: {trained}"),
        ("disk", f"≤ {size(plan.disk_bytes)}: artifacts, {plan.students_kept} students, newest trainer states"),
    ]


def _count(number: int | None) -> str:
    return "an unknown number of" if number is None else f"{number:,}"


def size(count: int | None) -> str:
    """Return a number of bytes for a person, or that it is not known."""
    return "unknown size" if count is None else store.readable(count)

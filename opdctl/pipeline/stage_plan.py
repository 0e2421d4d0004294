"""The stages of a run on the recipe's hardware: their commands, what shares the memory of a GPU, and the time.

Colocated stages, those of `opdctl train`, take turns on the same GPUs. With `train --follow` and `train --no-fill` the
stages have separate allocations.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from opdctl.models.shapes import count_parameters
from opdctl.pipeline import costs
from opdctl.pipeline.costs import FIT_FRACTION, StageCost, if_known, sum_known
from opdctl.pipeline.evaluation_plan import plan_benchmarks
from opdctl.recipe.schema import Hardware, ModelShape, Recipe
from opdctl.runs.run import REFERENCE

ASLEEP_BYTES = 3 * 2**29  # of a sleeping vLLM: the CUDA context, graphs and buffers of its process, 1.1 GiB reported
HAND_OVER = "save and load"

ModelShapes = Mapping[str, ModelShape | None]
"""The shape of each model by name; None if it is unknown."""


@dataclass(frozen=True)
class StagePlan:
    """The estimated cost of each stage on the recipe's hardware. None is unknown.

    recipe: its hardware has the GPUs of each stage. node_bytes: of the CPU memory of a node that trains. remedies: for
    a stage that does not fit, a setting with which it does, or "".
    """

    recipe: Recipe
    colocated: bool
    stages: dict[str, StageCost | None]
    node_bytes: float | None
    remedies: dict[str, str] = field(default_factory=dict)

    @property
    def hardware(self) -> Hardware:
        return self.recipe.hardware

    @property
    def limit_bytes(self) -> int:
        return int(FIT_FRACTION * self.hardware.memory_gib * 2**30)

    @property
    def commands(self) -> dict[str, str]:
        """The command of each allocation, by its GPUs, without the options that name recipe and run."""
        gpus, recipe = self.hardware.train_gpus, self.recipe
        if recipe.pipeline.launcher == "ray":
            gpus += 0 if self.colocated else self.hardware.rollout_gpus + self.hardware.score_gpus
            return {_gpus(gpus): "opdctl train --launcher ray"}
        if self.colocated:
            return {_gpus(gpus): _launch("train", gpus, self.hardware.gpus_per_node)}
        rollout = _workers(recipe, recipe.rollout.engine, self.hardware.rollout_gpus)
        score = _workers(recipe, recipe.score.engine, self.hardware.score_gpus)
        return {
            f"rollout, {rollout}": "opdctl rollout --follow",
            f"score-teacher, {score}": "opdctl score-teacher --follow",
            f"train, {_gpus(gpus)}": _launch("train --follow", gpus, self.hardware.gpus_per_node),
            **({f"eval, {rollout}": "opdctl eval --step N"} if recipe.eval.every_steps else {}),
        }

    def memory(self, name: str) -> dict[str, int]:
        """Return the bytes on each GPU while a stage runs, by holder; of an unknown stage nothing."""
        cost = self.stages[name]
        if cost is None or not cost.memory:
            return {}
        holder = ", ".join(engine_of(self.recipe, name, self.colocated) or ("trainer",))
        return {holder: sum(cost.memory.values()), **cost.resident}

    def excess_bytes(self, name: str) -> int:
        """Return by how much the memory of a stage exceeds what may be planned; at most 0 if it fits."""
        return sum(self.memory(name).values()) - self.limit_bytes

    def fits(self, name: str) -> bool:
        cost = self.stages[name]
        return cost is None or (not cost.obstacle and self.excess_bytes(name) <= 0)

    def repetitions(self, name: str) -> int:
        """Return how often a stage runs. The student is evaluated before, during and after training."""
        steps, every = self.recipe.train.steps, self.recipe.eval.every_steps
        if not name.startswith("eval "):
            return steps
        return 2 + len(range(every, steps, every)) if name == "eval student" else 1

    def seconds_of(self, name: str) -> float | None:
        """Return the seconds of all repetitions of a stage."""
        cost = self.stages[name]
        return None if cost is None or cost.seconds is None else cost.seconds * self.repetitions(name)

    def gpu_hours_of(self, name: str) -> float | None:
        cost = self.stages[name]
        return if_known(lambda cost, seconds: seconds * cost.gpus / 3600, cost, self.seconds_of(name))

    def seconds(self) -> float | None:
        """Return the duration of the run. Separate allocations do not wait for evaluations.

        With a staleness of k, k + 1 steps are in progress, unless one stage alone takes longer.
        """
        if self.colocated:
            return sum_known(map(self.seconds_of, self.stages))
        steps = [self.seconds_of(name) for name in self.stages if not name.startswith("eval ")]
        in_progress = 1 + self.recipe.pipeline.max_staleness
        return if_known(lambda *known: max(*known, sum(known) / in_progress), *steps)

    def gpu_hours(self) -> float | None:
        """Return the GPU-hours of the run: separate allocations are held until its end, evaluations come on top."""
        gpus = self.hardware.train_gpus
        if not self.colocated:
            gpus += self.hardware.rollout_gpus + self.hardware.score_gpus
        held = if_known(lambda seconds: seconds * gpus / 3600, self.seconds())
        evaluations = [self.gpu_hours_of(name) for name in self.stages if name.startswith("eval ")]
        return held if self.colocated else sum_known([held, *evaluations])

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        return {
            "hardware": self.hardware.model_dump(),
            "colocated": self.colocated,
            "commands": list(self.commands.values()),
            "stages": {name: cost and self._stage_dict(name, cost) for name, cost in self.stages.items()},
            "repetitions": {name: self.repetitions(name) for name in self.stages},
            "node_bytes": self.node_bytes,
            "gpu_hours": self.gpu_hours(),
            "seconds": self.seconds(),
            "estimated": True,
        }

    def _stage_dict(self, name: str, cost: StageCost) -> dict[str, Any]:
        return asdict(cost) | {
            "bytes": cost.bytes,
            "fits": self.fits(name),
            "excess_bytes": max(0, self.excess_bytes(name)),
            "remedy": self.remedies.get(name),
            "gpu_hours": self.gpu_hours_of(name),
        }


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' * (count > 1)}"


def _workers(recipe: Recipe, engine: str, gpus: int) -> str:
    """Return how many workers a stage has, and their GPUs. Those that use a server need none."""
    if engine == "server":
        return "no GPU"
    size = recipe.gpus_per_engine(engine)
    return f"{max(1, gpus // size)} × {_gpus(size)}"


def _launch(words: str, gpus: int, gpus_per_node: int) -> str:
    """Return the command that starts one process for each GPU; of several nodes, the same command on each."""
    if gpus == 1:
        return f"opdctl {words}"
    if gpus <= gpus_per_node:
        return f"torchrun --nproc-per-node {gpus} -m opdctl {words}"
    nodes = f"--nnodes {-(-gpus // gpus_per_node)} --nproc-per-node {gpus_per_node}"
    return f"torchrun {nodes} --rdzv-backend c10d --rdzv-endpoint $HEAD:29500 -m opdctl {words}"


def plan_stages(recipe: Recipe, shapes: ModelShapes, *, colocated: bool) -> StagePlan:
    """Plan the stages, and look for a single setting that makes room for each stage that does not fit."""
    plan = _plan_without_remedies(recipe, shapes, colocated)
    remedies = {name: "" for name in plan.stages if not plan.fits(name)}
    for key, value in _settings_to_try(recipe) if remedies else ():
        section, name = key.split(".")
        settings = getattr(recipe, section).model_copy(update={name: value})
        other = _plan_without_remedies(recipe.model_copy(update={section: settings}), shapes, colocated)
        for stage in remedies:
            if not remedies[stage] and other.fits(stage):
                remedies[stage] = f"{key} = {str(value).lower()}"
    return replace(plan, remedies=remedies)


def _settings_to_try(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Yield single settings that may make room, those that cost least first."""
    longest = recipe.prompts.max_tokens + recipe.rollout.max_tokens
    yield "vllm.enable_sleep_mode", True
    yield from (("vllm.gpu_memory_utilization", percent / 100) for percent in range(90, 15, -5))
    yield "train.gradient_checkpointing", True
    yield from (("train.tokens_per_micro_batch", longest << doublings) for doublings in (2, 1, 0))
    yield from (("score.tokens_per_batch", longest << doublings) for doublings in (2, 1, 0))
    yield from (("rollout.batch_size", size) for size in (64, 32, 16, 8, 4, 2, 1))
    yield from (("vllm.tensor_parallel_size", size) for size in (1, 2, 4, 8))
    nodes = (recipe.hardware.gpus_per_node << doublings for doublings in range(7))
    more = [gpus for gpus in (2, 4, *nodes) if gpus > recipe.hardware.train_gpus]
    yield from (("hardware.train_gpus", gpus) for gpus in more)
    yield "lora.rank", 32


def _plan_without_remedies(recipe: Recipe, shapes: ModelShapes, colocated: bool) -> StagePlan:
    if colocated:  # but for models on servers, which have their own GPUs
        sections = [name for name in ("rollout", "score") if getattr(recipe, name).engine != "server"]
        gpus = {f"{name}_gpus": recipe.hardware.train_gpus for name in sections}
        recipe = recipe.model_copy(update={"hardware": recipe.hardware.model_copy(update=gpus)})
    stages = _stage_costs(recipe, shapes, colocated)
    for name, cost in stages.items():
        if cost and cost.memory:
            stages[name] = replace(cost, resident=_resident_bytes(recipe, stages, name, colocated))
    return StagePlan(recipe, colocated, stages, _node_bytes(recipe, shapes, colocated))


# ── Stages ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _stage_costs(recipe: Recipe, shapes: ModelShapes, colocated: bool) -> dict[str, StageCost | None]:
    student, teachers = shapes["student"], list(recipe.teacher_models())
    stages: dict[str, StageCost | None] = {"rollout": if_known(partial(costs.rollout_cost, recipe), student)}
    for name in recipe.scorers():
        stages[f"score {name}"] = if_known(partial(_score_cost, recipe, name, colocated), shapes[name])
    stages["update"] = if_known(lambda shape: costs.update_cost(recipe, shape, shapes[teachers[0]]), student)
    sampling = sum(cost.seconds or 0.0 for name, cost in stages.items() if cost and name != "update")
    hand_over = partial(costs.hand_over_cost, recipe, sampling_seconds=sampling, colocated=colocated)
    stages[HAND_OVER] = if_known(hand_over, student, *_restarts(recipe, shapes, colocated))
    for name in ("student", *teachers) if recipe.eval.every_steps else ():
        stages[f"eval {name}"] = if_known(partial(_evaluation_cost, recipe, name), shapes[name])
    return stages


def _score_cost(recipe: Recipe, name: str, colocated: bool, shape: ModelShape) -> StageCost:
    """Return the cost of one scorer. Several teachers are assumed to score the same number of responses."""
    if _is_scored_by_trainer(recipe, name, colocated):
        return costs.base_scoring_cost(recipe, shape)
    fraction = 1 if name == REFERENCE else 1 / len(recipe.teacher_models())
    return costs.score_cost(recipe, shape, recipe.models()[name].dtype, fraction)


def _is_scored_by_trainer(recipe: Recipe, name: str, colocated: bool) -> bool:
    return colocated and name == REFERENCE and recipe.has_base_as_reference()


def _evaluation_cost(recipe: Recipe, name: str, shape: ModelShape) -> StageCost | None:
    """Return the cost of one evaluation on all benchmarks: the largest memory, the sum of the seconds."""
    settings, dtype, stages = recipe.eval, recipe.models()[name].dtype, []
    for benchmark in plan_benchmarks(recipe):
        if benchmark.problems is None or benchmark.responses is None:
            return None
        parts = min(settings.num_parts, benchmark.problems)
        stages.append(costs.generation_cost(recipe, shape, dtype, settings, benchmark.responses, parts))
    largest = max(stages, key=lambda stage: stage.bytes)
    return replace(largest, seconds=sum_known(stage.seconds for stage in stages))


def _restarts(recipe: Recipe, shapes: ModelShapes, colocated: bool) -> tuple[int, float | None]:
    """Return how often vLLM starts in each step, and the bytes that scorers read which start again."""
    scores = [f"score {name}" for name in recipe.scorers()]
    engines = _engines_beside(recipe, ["rollout", *scores], scores[0], colocated)
    if not colocated and recipe.vllm.fit_together(len(engines)):
        return 0, 0
    ended = {role: backend for role, backend in engines if not sleeps(recipe, backend)}
    starts = sum(backend == "vllm" for backend in ended.values())  # transformers starts in seconds
    return starts, sum_known(_weight_bytes(recipe, shapes, role) for role in ended if role != "student")


# ── Memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def engine_of(recipe: Recipe, stage: str, colocated: bool) -> tuple[str, str] | None:
    """Return the engine of a stage as the engine pool identifies it: role and backend. None if it is the trainer's."""
    kind, _, name = stage.partition(" ")
    if _is_scored_by_trainer(recipe, name, colocated):
        return None
    if kind == "rollout":
        return "student", recipe.rollout.engine
    if kind in ("score", "eval"):
        return name, (recipe.score if kind == "score" else recipe.rollout).engine
    return None


def sleeps(recipe: Recipe, backend: str) -> bool:
    """Whether an engine that gives its memory back sleeps. Otherwise its process ends, and starts again."""
    return backend == "vllm" and recipe.vllm.enable_sleep_mode


def _engines_beside(recipe: Recipe, stages: Iterable[str], stage: str, colocated: bool) -> set[tuple[str, str]]:
    """Return the engines on the GPUs of a stage, its own included. Models on servers are elsewhere.

    Those of all stages are in one pool if they are colocated; otherwise one command has all scorers.
    """
    scores = [other for other in stages if other.startswith("score ")]
    beside = stages if colocated else scores if stage in scores else [stage]
    engines = {engine_of(recipe, other, colocated) for other in beside}
    return {engine for engine in engines if engine and engine[1] != "server"}


def _resident_bytes(
    recipe: Recipe, stages: Mapping[str, StageCost | None], stage: str, colocated: bool
) -> dict[str, int]:
    """Return what the trainer and other engines keep on the GPUs of a stage meanwhile, by holder.

    Engines give their memory back before an update, and before another engine works if the recipe's shares of the
    memory are too large for both.
    """
    own, engines = engine_of(recipe, stage, colocated), _engines_beside(recipe, stages, stage, colocated)
    held = {}
    for engine in sorted(engines - {own}):
        if own and recipe.vllm.fit_together(len(engines)):
            held[", ".join(engine)] = int(recipe.vllm.gpu_memory_utilization * recipe.hardware.memory_gib * 2**30)
        elif sleeps(recipe, engine[1]):
            held[", ".join(engine)] = ASLEEP_BYTES
    if own and colocated and (update := stages["update"]):
        held["trainer"] = costs.idle_trainer_bytes(update)
    return held


def _node_bytes(recipe: Recipe, shapes: ModelShapes, colocated: bool) -> float | None:
    """Return the CPU memory of a node: that of its trainer processes, and what sleeping scorers keep there."""
    hardware, student = recipe.hardware, shapes["student"]
    ranks = min(hardware.train_gpus, hardware.gpus_per_node)
    is_sharded = recipe.shards_student(hardware.train_gpus)
    trainers = if_known(lambda shape: ranks * is_sharded * costs.trainer_cpu_bytes(recipe, shape), student)
    scorers = list(recipe.scorers()) if colocated and sleeps(recipe, recipe.score.engine) else []
    engines = max(1, ranks // recipe.gpus_per_engine(recipe.score.engine))
    scorers = [name for name in scorers if not _is_scored_by_trainer(recipe, name, colocated)]
    asleep = sum_known(_weight_bytes(recipe, shapes, name) for name in scorers)
    return if_known(lambda trainers, asleep: trainers + engines * asleep, trainers, asleep)


def _weight_bytes(recipe: Recipe, shapes: ModelShapes, name: str) -> int | None:
    return if_known(
        lambda shape: costs.DTYPE_BYTES[recipe.models()[name].dtype] * count_parameters(shape), shapes[name]
    )

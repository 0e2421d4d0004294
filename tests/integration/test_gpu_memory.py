"""The memory table of `--dry-run` agrees with what the engines of a training do on a GPU."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import small_recipe

from opdctl.engines.base import EngineContext
from opdctl.engines.host import HostedEngine
from opdctl.engines.transformers import TransformersEngine
from opdctl.models.directory import ModelDir
from opdctl.models.shapes import read_shape
from opdctl.pipeline import loop
from opdctl.pipeline.stage_plan import ASLEEP_BYTES, plan_stages
from opdctl.recipe.schema import Recipe
from opdctl.registry import ENGINES
from opdctl.runs.open import open_run
from opdctl.runs.run import Run
from opdctl.training.trainer import Trainer

Recorder = Callable[[], None]


class GpuEngine(HostedEngine):
    """An engine as on a GPU, without a process: `state` is "awake", "asleep" or "ended"."""

    logprob_metadata = {"engine": "vllm"}  # type: ignore[assignment]  # noqa: RUF012
    batches_across_parts = True

    def __init__(self, model: ModelDir, context: EngineContext, on_call: Recorder):
        self._engine, self._asleep = TransformersEngine(model, "cpu"), context.recipe.vllm.enable_sleep_mode
        self.state, self._on_call = "awake", on_call

    def _wake(self) -> TransformersEngine:
        self.state = "awake"
        self._on_call()
        return self._engine

    def load_weights(self, model: ModelDir) -> None:
        self._engine.load_weights(model)

    def release(self, *, keep_weights: bool) -> None:
        self.state = "asleep" if self._asleep else "ended"

    def close(self) -> None:
        self.state = "ended"


def _wakes(name: str) -> Callable[..., Any]:
    return lambda self, *arguments, **options: getattr(self._wake(), name)(*arguments, **options)


for _name in ("generate", "score", "stream_completions", "stream_scores"):
    setattr(GpuEngine, _name, _wakes(_name))


def record_training(run: Run, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, str]]:
    """Train, and return the engines that held memory during each stage, with the largest state in any step.

    Before an update, the ranks meet when all engines have given their memory back.
    """
    engines: dict[str, GpuEngine] = {}
    states: dict[str, dict[str, str]] = {}
    stage, at_barrier = "", list[str]()

    def wait() -> None:
        at_barrier[:] = [engine.state for engine in engines.values()]

    def record() -> None:
        at_barrier.clear()
        held = {holder: engine.state for holder, engine in engines.items() if engine.state != "ended"}
        seen = states.setdefault(stage, {})
        seen |= {holder: max(state, seen.get(holder, state)) for holder, state in held.items()}  # "awake" > "asleep"

    def start(model: ModelDir, context: EngineContext) -> GpuEngine:
        role = "student" if context.settings == context.recipe.student else "teacher"
        return engines.setdefault(f"{role}, vllm", GpuEngine(model, context, record))

    def in_stage(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run_stage(*arguments: Any, **options: Any) -> Any:
            nonlocal stage
            stage = f"eval {arguments[2].role}" if name == "eval" else name
            if name == "update":
                assert at_barrier
                assert "awake" not in at_barrier
                record()
            return function(*arguments, **options)

        return run_stage

    assert "vllm" in ENGINES.names()
    monkeypatch.setitem(ENGINES._factories, "vllm", start)
    monkeypatch.setattr(loop, "run_rollout", in_stage("rollout", loop.run_rollout))
    monkeypatch.setattr(loop, "run_scoring", in_stage("score teacher", loop.run_scoring))
    monkeypatch.setattr(loop.evaluate, "run_eval", in_stage("eval", loop.evaluate.run_eval))
    monkeypatch.setattr(Trainer, "train_step", in_stage("update", Trainer.train_step))
    monkeypatch.setattr(loop, "Trainer", lambda run, device, **options: Trainer(run, "cpu", **options))
    monkeypatch.setattr(loop.distributed, "barrier", wait)
    loop.run_training(run, "cuda")
    return states


def planned_states(recipe: Recipe, run: Run, stage: str) -> dict[str, str]:
    """Return the state of each engine during a stage, by the plan; without those that hold no memory."""
    shapes = {name: read_shape(model) for name, model in run.models.items()}
    held = plan_stages(recipe, shapes, colocated=True).memory(stage)
    held.pop("trainer")
    return {holder: "asleep" if size == ASLEEP_BYTES else "awake" for holder, size in held.items()}


@pytest.mark.parametrize(
    "settings",
    [("vllm.enable_sleep_mode=true",), (), ("vllm.gpu_memory_utilization=0.3",)],
    ids=["asleep", "ended", "awake"],
)
def test_engines_hold_what_the_plan_shows(
    settings: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm = ("rollout.engine=vllm", "score.engine=vllm", "eval.every_steps=1", "eval.max_tokens=8")
    recipe = small_recipe(*vllm, "rollout.max_tokens=8", *settings)
    run = open_run(recipe, tmp_path / "run")
    states = record_training(run, monkeypatch)
    assert states.keys() == {"rollout", "score teacher", "update", "eval student", "eval teacher"}
    for stage, recorded in states.items():
        assert recorded == planned_states(recipe, run, stage), stage

"""Which students, trainer states and responses a run keeps, and the removal of the others.

Training removes a student only when it leaves the window of the latest ones, so it never removes what earlier settings
kept. `opdctl run prune` removes whatever the run can continue without.
"""

import re
import time
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from opdctl.artifacts import files, leases
from opdctl.artifacts.stage_dir import STAGE_MARKERS
from opdctl.pipeline.progress import best_accuracy
from opdctl.recipe.schema import Recipe
from opdctl.runs.heartbeats import read_heartbeats
from opdctl.runs.layout import list_steps, parse_step
from opdctl.runs.run import Run, read_recipe


def is_kept(recipe: Recipe, step: int) -> bool:
    """Whether the recipe keeps the student of `step` after newer ones are written."""
    return any(every and step % every == 0 for every in (recipe.train.keep_every_steps, recipe.eval.every_steps))


def evaluated_steps(run: Run) -> set[int]:
    """Return the steps whose student was evaluated, or is being evaluated, on any benchmark."""
    return {step for path in run.path.glob("eval/*/*") if (step := parse_step(path.name)) is not None}


def steps_in_use(run: Run) -> set[int]:
    """Return the steps whose student an unfinished rollout or unfinished continuations need."""
    current = run.current_step()
    unfinished = [
        step
        for step, path in list_steps(run.path).items()
        if (path / "rollout").is_dir() and (step >= current or (path / "rollout" / STAGE_MARKERS[0]).exists())
    ]
    continued = list_steps(run.path / "continuations").items()
    unfinished += [step for step, path in continued if not (path / "summary.json").exists()]
    return {run.policy_version(step) for step in unfinished}


# ── In training ──────────────────────────────────────────────────────────────────────────────────────────────────────


def saved_steps(run: Run) -> list[int]:
    """Return the steps that have a trainer state."""
    return [step for step in list_steps(run.path / "trainer") if 1 <= step <= run.current_step()]


@dataclass(frozen=True)
class EarlierStates:
    """The steps of students and trainer states that earlier settings kept."""

    students: frozenset[int]
    trainer_states: frozenset[int]


def kept_by_earlier_settings(run: Run) -> EarlierStates:
    """Return what the run kept before this training, and stays: with other settings in recipe.toml, all there is.

    A training that was killed before it removed a state leaves one more than train.keep_latest.
    """
    saved, latest = saved_steps(run), run.recipe.train.keep_latest
    earlier, current = read_recipe(run.path), run.current_step()
    if _retention(earlier) == _retention(run.recipe):
        return EarlierStates(frozenset(), frozenset(saved[: -latest - 1]))
    students = {step for step in list_steps(run.path / "student") if step != current or is_kept(earlier, current)}
    return EarlierStates(frozenset(students), frozenset(saved[:-latest]))


def _retention(recipe: Recipe) -> tuple[int, ...]:
    settings = recipe.train
    return settings.keep_latest, settings.keep_every_steps, recipe.eval.every_steps, recipe.pipeline.max_staleness


def prune_students(run: Run, earlier: EarlierStates) -> None:
    """Remove the student that has just left the window of the latest ones, and trainer states beyond the latest.

    Kept are students of keep_every_steps and eval.every_steps, evaluated ones, those in use, and `earlier` ones.
    """
    settings, current = run.recipe.train, run.current_step()
    for step in {*saved_steps(run)[: -settings.keep_latest]} - earlier.trainer_states:
        files.remove_directory(run.trainer_path(step))
    sampling = run.recipe.pipeline.max_staleness + 1  # the newest students, which may still sample
    step = current - max(settings.keep_latest, sampling)
    is_needed = is_kept(run.recipe, step) or step in earlier.students | evaluated_steps(run) | steps_in_use(run)
    if step > 0 and not is_needed:
        files.remove_directory(run.student_path(step))


# ── On request ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class PrunePlan:
    """What a run can continue without: paths by kind, and the number of bytes that each kind takes.

    Hard links to another run's files free none. kept: the steps whose student stays. in_use: the steps that other
    processes work on, with the process of each.
    """

    removed: dict[str, list[Path]]
    sizes: dict[str, int]
    kept: list[int]
    in_use: dict[int, str]


def _size(path: Path) -> int:
    stats = [file.lstat() for file in [path, *path.rglob("*")] if not file.is_dir()]
    return sum(stat.st_size for stat in stats if stat.st_nlink == 1)


def users_of_steps(run: Run, now: float) -> dict[int, str]:
    """Return the steps that live workers and followers read or write, with the process of each.

    now: the time of the file system, in seconds. A follower uses the step that it is at, and all later ones.
    """
    users: dict[int, str] = {}
    for beat in read_heartbeats(run, now):
        if beat.is_alive:
            steps = range(beat.step, run.current_step())
            users |= dict.fromkeys(steps, f"`{beat.stage} --follow`, process {beat.pid} on {beat.host}")
    for path, owner in leases.live_leases(run.path, now):
        if found := re.search(r"step-(\d{5})", str(path.relative_to(run.path))):
            users[int(found[1])] = owner
    return users


def prune_run(run: Run, keep_last: int, *, keep_best: bool, dry_run: bool) -> PrunePlan:
    """Remove what the run can continue without, unless `dry_run`; return what it is. Training must not run meanwhile.

    Raises:
        OpdctlError: a training process holds the run's lease; see `plan_prune`.
    """
    if dry_run:
        return plan_prune(run, keep_last, time.time(), keep_best=keep_best)
    with leases.hold_lease(run.path, "train"):
        now = (run.path / ".train.lock").stat().st_mtime  # by the clock of the file system
        plan = plan_prune(run, keep_last, now, keep_best=keep_best)
        for path in [path for paths in plan.removed.values() for path in paths]:
            files.remove_directory(path)
    return plan


def plan_prune(run: Run, keep_last: int, now: float, *, keep_best: bool) -> PrunePlan:
    """Return what can be removed: responses, scores, students and trainer states, and the files set aside by repair.

    keep_last: the number of latest steps that keep their responses, scores and student. keep_best: keep the student of
    the highest accuracy on each benchmark. now: the time of the file system, in seconds.

    Raises:
        OpdctlError: the newest student or trainer state is missing or corrupt: older files are needed to replace it.
    """
    current, saved = run.current_step(), saved_steps(run)
    newest = saved[-1] if saved else run.start_step
    if current > run.start_step or saved:
        run.student_at(current)
    if saved:
        run.check_trainer_state(newest)
    first_needed = min(current - keep_last, newest)  # updates since the trainer state are replayed on resume
    users = users_of_steps(run, now)
    in_use = steps_in_use(run) | {*users} | {run.policy_version(step) for step in users}
    old = [path for step, path in list_steps(run.path).items() if step < first_needed and step not in users]
    responses = [
        path for path in old if (path / "rollout").is_dir() and not (path / "rollout" / STAGE_MARKERS[0]).exists()
    ]
    kept = {*range(current - keep_last + 1, current + 1), *in_use, *(best_steps(run) if keep_best else ())}
    removed = {
        "responses and scores": [stage for path in responses for stage in _stages(run, path)],
        "students": [path for step, path in list_steps(run.path / "student").items() if _is_old(step, current, kept)],
        "trainer states": [run.trainer_path(step) for step in saved[:-1]],
        "files set aside by repair": [path for path in (run.path / "corrupt",) if path.is_dir()],
    }
    sizes = {kind: sum(map(_size, paths)) for kind, paths in removed.items()}
    return PrunePlan(removed, sizes, [step for step in run.kept_steps() if step in kept], users)


def _is_old(step: int, current: int, kept: Collection[int]) -> bool:
    return step < current and step not in kept


def _stages(run: Run, path: Path) -> Iterable[Path]:
    return [stage for name in ("rollout", *run.scorers()) if (stage := path / name).is_dir()]


def best_steps(run: Run) -> set[int]:
    """Return the step of the highest accuracy on each benchmark; of equal ones the earliest."""
    benches, current = {path.parent.name for path in run.path.glob("eval/*/*")}, run.current_step()
    return {best[0] for bench in benches if (best := best_accuracy(run, current, bench))}

"""Which students and trainer states a run keeps, and the removal of the others."""

from opdctl.artifacts import files
from opdctl.recipe.schema import Recipe
from opdctl.runs.run import Run


def is_kept(recipe: Recipe, step: int) -> bool:
    """Whether the student of `step` is kept after newer ones are written."""
    return any(every and step % every == 0 for every in (recipe.train.keep_every_steps, recipe.eval.every_steps))


def prune_students(run: Run) -> None:
    """Remove students and trainer states that the recipe does not keep."""
    settings, current = run.recipe.train, run.current_step()
    saved = [step for step in range(1, current + 1) if run.trainer_path(step).is_dir()]
    for step in saved[: -settings.keep_latest]:
        files.remove_directory(run.trainer_path(step))
    sampling = run.recipe.pipeline.max_staleness + 1  # the newest students, which may still sample
    for step in range(1, current - max(settings.keep_latest, sampling) + 1):
        if not is_kept(run.recipe, step):
            files.remove_directory(run.student_path(step))

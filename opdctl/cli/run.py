"""`opdctl run …`: fork, repair, prune, show, export and sync a run, import responses, and continue its prefixes."""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from opdctl import console
from opdctl.cli.analyze_position import load_run_for_analysis
from opdctl.cli.options import DryRun, Json, Overrides, Recipes, RunDir, RunDirOrWord, RunOption, Verbose, Weights
from opdctl.cli.session import (
    command_session,
    named_or_newest_run,
    named_run,
    print_json,
    read_recipe_options,
    set_up_device,
)
from opdctl.cli.sync import sync
from opdctl.errors import ExitCode, OpdctlError

if TYPE_CHECKING:
    from opdctl.runs.repair import CorruptArtifact

run_app = typer.Typer(
    help="Manage a run: fork, repair, prune, show, export, sync, import, continuations.", no_args_is_help=True
)
run_app.command()(sync)


@run_app.command()
def fork(
    run_dir: RunDirOrWord = None,
    new_run_dir: Annotated[
        str | None, typer.Argument(metavar="NEW_RUN_DIR", help="The directory of the fork.", show_default=False)
    ] = None,
    recipe: Recipes = None,
    set_: Overrides = None,
    run: RunOption = None,
    dry_run: DryRun = False,
    json_: Json = False,
    verbose: Verbose = None,
) -> None:
    """Start a new run from the current step of a run, with another recipe. The run stays as it is.

    \b
    opdctl run fork runs/quickstart runs/gamma --set weight.gamma=0.7 --dry-run
    opdctl run fork runs/quickstart runs/gamma --set weight.gamma=0.7
    then: opdctl train runs/gamma
    """
    with command_session(verbose, as_json=json_):
        from opdctl.runs.fork import create_fork, plan_fork
        from opdctl.runs.open import resolve_open_settings
        from opdctl.runs.run import Run

        named, word = _split_words(run_dir, new_run_dir, "NEW_RUN_DIR")
        path, fork_dir = named_or_newest_run(named, run), Path(word)
        resolved, _ = read_recipe_options(recipe, set_, path, "read")
        plan = plan_fork(Run.load(path), fork_dir, resolve_open_settings(resolved, path))
        for line in plan.lines():
            console.answer(line)
        if dry_run:
            console.info("nothing was written")
        else:
            console.info(f"wrote {fork_dir}: {create_fork(plan)} files reused from {path}")
            console.info(f"next: {Run.load(fork_dir).next_command()}")
        if json_:
            changes = [{"key": key, "old": old, "new": new} for key, old, new in plan.changes]
            reused = [str(file.relative_to(path)) for file in plan.reused]
            print_json({"run_dir": str(fork_dir), "step": plan.step, "changes": changes, "reused": reused})


def _split_words(first: str | None, second: str | None, name: str) -> tuple[Path | None, str]:
    """Return the run, None if it is not named, and the argument `name`, which follows it or is alone."""
    if first is None or (second is None and (Path(first) / "recipe.toml").exists()):
        raise OpdctlError(
            "invalid_usage", f"{name} is missing", hint="give it after RUN_DIR, or alone for the newest run"
        )
    return (None, first) if second is None else (Path(first), second)


@run_app.command()
def repair(
    run_dir: RunDir = None,
    run: RunOption = None,
    dry_run: DryRun = False,
    json_: Json = False,
    verbose: Verbose = None,
) -> None:
    """Move corrupt files to RUN_DIR/corrupt, so that the ordinary commands regenerate them. Every file is read.

    \b
    opdctl run repair runs/quickstart
    then: opdctl train runs/quickstart
    """
    with command_session(verbose, as_json=json_):
        from opdctl.runs.repair import find_corrupt_artifacts, repair_records, set_aside
        from opdctl.runs.run import Run

        path = named_or_newest_run(run_dir, run)
        changes = repair_records(path, dry_run=dry_run)
        for change in changes:
            console.warn(change)
        if changes and (dry_run or not (path / "run.json").exists()):
            console.info("nothing was written" if dry_run else f"next: opdctl train {shlex.quote(str(path))}")
            return
        loaded = Run.load(path, "repair")
        artifacts = find_corrupt_artifacts(loaded)
        for each in artifacts:
            console.warn(f"{each.why}{_repair_note(each)}")
        moved = [] if dry_run else set_aside(loaded, artifacts)
        if not artifacts:
            console.answer("no corrupt files")
        elif not dry_run:
            console.info(f"{len(moved)} of {len(artifacts)} moved to {path / 'corrupt'}")
        if dry_run:
            console.info("nothing was written")
        commands = list(dict.fromkeys(each.command for each in artifacts if each.command))
        if dry_run and artifacts:
            commands = [loaded.command_line("run repair")]
        for command in commands or [loaded.next_command()]:
            console.info(f"next: {command}")
        if json_:
            corrupt = [{"path": str(each.path), "why": each.why, "command": each.command} for each in artifacts]
            print_json({"run_dir": str(path), "corrupt": corrupt, "moved": [str(file) for file in moved]})
        if any(each.is_required for each in artifacts):
            raise typer.Exit(ExitCode.BAD_DATA)


def _repair_note(artifact: "CorruptArtifact") -> str:
    if artifact.command:
        return ""
    return "; it cannot be regenerated" + (" and is left in place" if artifact.is_required else "")


@run_app.command()
def prune(
    run_dir: RunDir = None,
    run: RunOption = None,
    keep_last: Annotated[
        int, typer.Option("--keep-last", min=1, help="How many of the latest steps keep responses, scores and student.")
    ] = 1,
    keep_best: Annotated[
        bool, typer.Option("--keep-best/--no-keep-best", help="Keep the best evaluated student of each benchmark.")
    ] = True,
    dry_run: DryRun = False,
    json_: Json = False,
    verbose: Verbose = None,
) -> None:
    """Remove old responses, scores, students and trainer states. The run can be read and continued as before.

    Metrics and evaluations stay. What was removed cannot be regenerated, so RUN_DIR must be given.

    \b
    opdctl run prune runs/quickstart --dry-run
    opdctl run prune runs/quickstart --keep-last 10
    """
    with command_session(verbose, as_json=json_):
        from opdctl.artifacts.files import format_bytes
        from opdctl.pipeline.pruning import prune_run
        from opdctl.runs.run import Run

        path = named_or_newest_run(run_dir, run) if dry_run else _named_run(run_dir, run)
        loaded = Run.load(path)
        plan = prune_run(loaded, keep_last, keep_best=keep_best, dry_run=dry_run)
        sizes = plan.sizes
        rows = [(kind, f"{len(plan.removed[kind])} directories, {format_bytes(sizes[kind])}") for kind in sizes]
        kept = ", ".join(map(str, plan.kept)) or "none"
        for step, user in plan.in_use.items():
            console.warn(f"step {step} is in use by {user}: its responses and its student are kept")
        freed = f"{format_bytes(sum(sizes.values()))} {'can be freed' if dry_run else 'freed'}"
        console.print_fields(f"{path}: {freed}", [*rows, ("students kept", f"steps {kept}")])
        if dry_run:
            options = f" --keep-last {keep_last}" * (keep_last > 1) + " --no-keep-best" * (not keep_best)
            console.info(f"nothing was written; next: {loaded.command_line('run prune')}{options}")
        else:
            console.info(f"next: {loaded.next_command()}")
        if json_:
            removed = [str(each.relative_to(path)) for paths in plan.removed.values() for each in paths]
            kept_steps = {"kept_students": plan.kept, "in_use": [*plan.in_use]}
            print_json({"run_dir": str(path), "bytes": sizes, "removed": removed, **kept_steps})


def _named_run(run_dir: Path | None, option: Path | None) -> Path:
    """Return the run that is named. Raises OpdctlError if none is: the newest run is not removed by default."""
    from opdctl.runs.layout import newest_run

    named = named_run(run_dir, option)
    if named is None:
        hint = f"give it, such as the newest run: `opdctl run prune {shlex.quote(str(newest_run()))}`"
        raise OpdctlError("invalid_usage", "run prune removes artifacts: RUN_DIR is missing", hint=hint)
    return named


@run_app.command()
def show(
    run_dir: RunDirOrWord = None,
    sample_id: Annotated[
        str | None, typer.Argument(metavar="SAMPLE_ID", help="Such as sort12-abc/00003/0.", show_default=False)
    ] = None,
    set_: Overrides = None,
    run: RunOption = None,
    weights: Weights = None,
    shade: Annotated[
        Literal["signal", "weight", "entropy", "log_ratio"],
        typer.Option("--shade", help="What a token is shaded by. log_ratio: that of the prefix, student to teacher."),
    ] = "signal",
    json_: Json = False,
    verbose: Verbose = None,
) -> None:
    """Show one response, token by token, with its log-probs, advantages and weights.

    \b
    opdctl run show runs/quickstart sort12-abc/00003/0
    """
    with command_session(verbose, as_json=json_):
        from opdctl.analysis.analyze import scored_steps
        from opdctl.analysis.samples import load_sample
        from opdctl.analysis.shown_weights import chosen_weights
        from opdctl.cli.sample_view import print_sample

        named, word = _split_words(run_dir, sample_id, "SAMPLE_ID")
        loaded = load_run_for_analysis(named_run(named, run), None, set_)
        sample = load_sample(loaded, word, scored_steps(loaded)[0], chosen_weights(loaded, weights))
        print_sample(sample, shade)
        if json_:
            print_json(sample.as_dict())


@run_app.command()
def export(
    run_dir: RunDirOrWord = None,
    file: Annotated[str | None, typer.Argument(metavar="FILE", help="A new .parquet file.", show_default=False)] = None,
    set_: Overrides = None,
    run: RunOption = None,
    step: Annotated[
        list[int] | None, typer.Option("--step", min=0, help="A step; may be repeated. Default: all scored ones.")
    ] = None,
    dry_run: DryRun = False,
    json_: Json = False,
    verbose: Verbose = None,
) -> None:
    """Write responses with their scores and token weights as one Parquet file, for other programs.

    \b
    opdctl run export runs/quickstart responses.parquet --step 0 --step 1
    """
    with command_session(verbose, as_json=json_):
        from opdctl.analysis.analyze import scored_steps
        from opdctl.analysis.export import export_responses
        from opdctl.analysis.shown_weights import chosen_weights

        named, word = _split_words(run_dir, file, "FILE")
        loaded, path = load_run_for_analysis(named_run(named, run), None, set_), Path(word)
        if path.suffix != ".parquet" or path.exists():
            reason = "exists" if path.exists() else "the name must end in .parquet"
            raise OpdctlError("unusable_output", f"{path}: {reason}", hint="give the name of a new .parquet file")
        scored, _ = scored_steps(loaded)
        steps = sorted({*step}) if step else scored
        if missing := sorted({*steps} - {*scored}):
            raise OpdctlError(
                "missing_input",
                f"{loaded.path}: step {missing[0]} is not sampled and scored",
                hint=f"use one of the steps {', '.join(map(str, scored)) or '(none)'}",
            )
        if dry_run:
            console.answer(f"{path}: the responses of steps {', '.join(map(str, steps))}")
            console.info("nothing was written")
            return
        count = export_responses(loaded, steps, chosen_weights(loaded), path)
        console.answer(f"wrote {path}: {count:,} responses")
        if json_:
            print_json({"file": str(path), "responses": count, "steps": steps})


@run_app.command("import")
def import_responses(
    run_dir: RunDirOrWord = None,
    input_files: Annotated[
        list[str] | None,
        typer.Argument(metavar="FILES", help="Parquet or JSONL files, folders or patterns.", show_default=False),
    ] = None,
    recipe: Recipes = None,
    set_: Overrides = None,
    run: RunOption = None,
    step: Annotated[int | None, typer.Option("--step", min=0, help="The step. Default: the current one.")] = None,
    dry_run: DryRun = False,
    json_: Json = False,
    verbose: Verbose = None,
) -> None:
    """Make a step's rollout from responses that another program sampled, and its scores if the files have them.

    With --recipe it starts a run; its prompts are those of the files if prompts.source is `imported`.

    \b
    opdctl run import runs/mine rollouts.jsonl --recipe mine.toml
    then: opdctl score-teacher runs/mine
    """
    with command_session(verbose, as_json=json_):
        from opdctl.pipeline.import_step import ImportedFiles, import_step
        from opdctl.pipeline.stages import resolve_step
        from opdctl.runs.open import open_run

        named, names = _split_files(run_dir, input_files, run)
        resolved, path = read_recipe_options(recipe, set_, named_run(named, run), "plan" if dry_run else "run")
        source = ImportedFiles(names)
        if dry_run:
            for line in source.describe(resolved):
                console.answer(line)
            console.info("nothing was written")
            return
        opened = open_run(resolved, path, needs=("student",), imported_prompts=source.read_prompts)
        step = resolve_step(opened, step)
        result = import_step(opened, step, source, set_up_device(opened.recipe))
        console.info(f"next: {opened.next_command()}")
        if json_:
            print_json({"run_dir": str(path), "step": step, **result})


def _split_files(first: str | None, rest: list[str] | None, option: Path | None) -> tuple[Path | None, list[str]]:
    """Return the run, None if it is not among the words, and the files."""
    words = [*([first] if first else []), *(rest or [])]
    has_run = bool(words) and ((Path(words[0]) / "recipe.toml").exists() or (len(words) > 1 and option is None))
    named, names = (Path(words[0]), words[1:]) if has_run else (None, words)
    if not names:
        raise OpdctlError(
            "invalid_usage", "FILES is missing", hint="give them after RUN_DIR, or alone for the newest run"
        )
    return named, names


@run_app.command()
def continuations(
    run_dir: RunDir = None,
    set_: Overrides = None,
    run: RunOption = None,
    step: Annotated[int, typer.Option("--step", min=0, help="The step whose prefixes are continued.")] = 0,
    dry_run: DryRun = False,
    json_: Json = False,
    verbose: Verbose = None,
) -> None:
    """Continue prefixes of the student's responses with the teacher and the student, and grade the answers.

    \b
    opdctl run continuations runs/quickstart
    then: opdctl analyze-position runs/quickstart
    """
    with command_session(verbose, as_json=json_):
        from opdctl.analysis.captions import continuations_sentence
        from opdctl.analysis.continuations import describe_plan, make_continuations
        from opdctl.pipeline.stages import resolve_step
        from opdctl.runs.open import open_run
        from opdctl.runs.run import read_recipe

        loaded = load_run_for_analysis(named_run(run_dir, run), None, set_, "plan" if dry_run else "run")
        step, path = resolve_step(loaded, step), loaded.path
        if dry_run:
            console.answer(describe_plan(loaded, step))
            console.info("nothing was written")
            return
        models = ("student", *loaded.recipe.teacher_models())
        opened = open_run(read_recipe(path), path, needs=models, check_source=False)  # checks the models' digests
        loaded = replace(loaded, models=opened.models)
        result = make_continuations(loaded, set_up_device(loaded.recipe), step)
        if result.summary is None:
            console.info(f"wrote {result.parts_made} parts of {result.path}; other workers are producing the rest")
        else:
            console.answer(continuations_sentence(result.summary))
            console.info(f"wrote {result.path}; next: opdctl analyze-position {shlex.quote(str(path))}")
        if json_:
            made = {"parts_made": result.parts_made, "summary": result.summary}
            print_json({"run_dir": str(path), "step": step, **made})

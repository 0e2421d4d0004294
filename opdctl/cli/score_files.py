"""`opdctl score-teacher --input`: scores of files, without a run."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opdctl import console
from opdctl.cli.session import join_process_group, print_json, set_up_device
from opdctl.errors import OpdctlError

if TYPE_CHECKING:
    from opdctl.pipeline.score_files import FileScores, FileScoring
    from opdctl.runs.models import HubFiles


@dataclass(frozen=True)
class FileOptions:
    """What the command line asks for."""

    inputs: Sequence[str]
    teacher: str
    output: Path
    overrides: Sequence[str]

    @property
    def command(self) -> str:
        """The command line."""
        inputs = [word for name in self.inputs for word in ("--input", name)]
        sets = [word for override in self.overrides for word in ("--set", override)]
        words = [*inputs, "--teacher", self.teacher, "--output", str(self.output), *sets]
        return f"opdctl score-teacher {shlex.join(words)}"


def read_file_options(
    inputs: Sequence[str] | None,
    teacher: str | None,
    output: Path | None,
    overrides: Sequence[str],
    of_run: Mapping[str, Any],
) -> FileOptions:
    """Return the options of --input. of_run: the arguments that concern a run, None where one was not given.

    Raises:
        OpdctlError: one of --input, --teacher and --output is missing, or one that concerns a run was given.
    """
    given = [name for name, value in of_run.items() if value is not None]
    if given:
        hint = "quote a pattern of files, and give --output DIR" if given == ["RUN_DIR"] else f"remove {given[0]}"
        raise OpdctlError("invalid_usage", f"--input needs no run, and excludes {', '.join(given)}", hint=hint)
    values = {"--input": inputs, "--teacher": teacher, "--output": output}
    missing = [name for name, value in values.items() if not value]
    if missing or not (inputs and teacher and output):
        hint = "give all of --input FILES, --teacher MODEL and --output DIR"
        raise OpdctlError("invalid_usage", f"{', '.join(missing)} is missing", hint=hint)
    return FileOptions(inputs, teacher, output, overrides)


def score_input_files(options: FileOptions, *, dry_run: bool, as_json: bool) -> None:
    """Score the files, or with `dry_run` check everything and print the plan."""
    from opdctl.pipeline.score_files import open_file_scoring, score_files
    from opdctl.recipe.load import default_score_recipe

    recipe = default_score_recipe(options.teacher, options.overrides)
    if not dry_run:
        join_process_group(recipe, options.output)
    hub_files: HubFiles = "settings" if dry_run else "all"
    scoring = open_file_scoring(recipe, options.inputs, options.output, options.command, hub_files)
    if dry_run:
        _print_plan(scoring, as_json)
        return
    _report(score_files(scoring, set_up_device(scoring.recipe)), as_json)


def _print_plan(scoring: "FileScoring", as_json: bool) -> None:
    counts = scoring.counts
    finished = None  # unknown without the digest of the teacher, whose weights a plan does not download
    if scoring.model.weights.files or scoring.recipe.score.engine == "server":
        stage = scoring.open_stage()
        finished = stage.count_made()
    done = "" if finished is None else f", {finished} of them finished"
    rows = [
        ("input", f"{counts.rows:,} responses, {counts.tokens:,} tokens, {counts.own_tokens:,} of the student"),
        ("teacher", f"{scoring.recipe.teacher_models()['teacher'].model}, engine {scoring.recipe.score.engine}"),
        ("output", f"{scoring.output}: {scoring.num_parts} parts{done}"),
    ]
    console.print_fields("plan", rows)
    console.info("nothing was written")
    if as_json:
        print_json(
            {
                "output": str(scoring.output),
                "rows": counts.rows,
                "prompt_tokens": counts.prompt_tokens,
                "tokens": counts.tokens,
                "own_tokens": counts.own_tokens,
                "parts": scoring.num_parts,
                "finished_parts": finished,
            }
        )


def _report(result: "FileScores", as_json: bool) -> None:
    report, path = result.as_dict(), result.stage.path
    if not result.is_finished:
        done, total = result.count_finished_parts(), len(result.stage.names)
        next_command = result.stage.rerun_command
        console.info(f"{path}: {done} of {total} parts finished; other workers are producing the rest")
    else:
        files = shlex.quote(f"{path}/part-*.parquet")
        next_command = f"opdctl run import RUN_DIR {files} --recipe FILE_OR_NAME"
        counts = f"{report['rows']:,} responses, {report['tokens']:,} tokens"
        if result.parts_made:
            speed = f"{result.tokens_made / result.seconds:,.0f} tokens/s"
            seconds = f"{result.seconds:.1f} s after a start-up of {result.startup_seconds:.1f} s"
            console.answer(f"wrote {path}: {counts}, {seconds}, {speed}")
        else:
            console.answer(f"nothing to do: {path} is finished: {counts}")
        if result.advantage is not None:
            console.answer(f"mean of log p_teacher - log p_student: {result.advantage:.4g} nats a token")
        console.info(f'read: datasets.load_dataset("parquet", data_files="{path}/part-*.parquet")')
    console.info(f"next: {next_command}")
    if as_json:
        print_json({**report, "next": next_command})

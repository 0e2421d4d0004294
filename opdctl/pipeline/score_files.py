"""score-teacher --input: a teacher scores responses that other programs sampled, without a run.

Reads their files, writes Parquet parts of the exchange format (docs/artifacts.md). The parts are fixed by the input and
`rollout.num_parts`, not by the workers. Each worker reads the input twice: first all rows, to check and count them, and
then those of its parts, with one part in memory at a time.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np

from opdctl import console, signals
from opdctl.artifacts import tables
from opdctl.artifacts.exchange import describe_file
from opdctl.artifacts.files import digest_of, sha256_files
from opdctl.artifacts.records import ExportedResponse, Ids, TokenScores, Trajectory
from opdctl.artifacts.stage_dir import PART_NAME, Fingerprint, PartMakers, StageDir, recorded_header
from opdctl.data.formats import read_chat_templates, teacher_formats
from opdctl.data.rendering import PromptFormat, PromptRenderer
from opdctl.data.sources import find_inputs, list_data_files
from opdctl.data.trajectories.reading import read_trajectories
from opdctl.engines.base import ScoreRequest
from opdctl.engines.pool import open_engine_pool
from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir
from opdctl.models.startup import measure_stage
from opdctl.pipeline.score import SaveScores, ScorerSource, scoring_work
from opdctl.recipe.dependencies import fingerprint_settings, scorer_settings
from opdctl.recipe.schema import AUTO, MAX_PARTS, RESPONSES_PER_PART, Recipe
from opdctl.runs.models import HubFiles, check_top_k, find_model
from opdctl.runs.open import resolve_open_settings
from opdctl.runs.stage_loop import make_missing_parts

STAGE = "file_scores"
SCORER = "teacher"
"""The role of the model, and its name in the column `teacher`."""
NUM_PARTS, ENGINE = "rollout.num_parts", "score.engine"
_FileState = tuple[int, int, int]
"""Inode, size in bytes and modification time in nanoseconds."""


# ── Input ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class TrajectoryFiles:
    """The input: files, and folders saved by `datasets`. form: of messages, None for that of the model's tokenizer."""

    def __init__(self, paths: Sequence[Path], model: ModelDir, form: PromptFormat | None = None):
        self._paths, self._model, self._form = paths, model, form
        self._states = self._stat()
        self._rows: Iterator[Trajectory] = iter(())
        self._position: int | None = None  # of the next row

    def files(self) -> list[Path]:
        return [file for path in self._paths for file in list_data_files(path)]

    def _stat(self) -> dict[Path, _FileState]:
        stats = {file: file.stat() for file in self.files() if file.is_file()}  # `read` names a missing one
        return {file: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for file, stat in stats.items()}

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of each file. Its number is a part of its name: another order gives other parts."""
        digests = sha256_files(self.files())
        named = {f"input {number}, {file.name}": sha256 for number, (file, sha256) in enumerate(digests.items(), 1)}
        template = self._form.chat_template if self._form else None
        return named | ({"teacher.chat_template": digest_of(template)} if template else {})

    def check_unchanged(self) -> None:
        """Raise OpdctlError if a file was changed or replaced since this object was made."""
        for file, state in self._states.items():
            stat = file.stat() if file.exists() else None
            if stat is None or (stat.st_ino, stat.st_size, stat.st_mtime_ns) != state:
                hint = "do not change input files while they are scored; start again in another --output"
                raise OpdctlError("source_mismatch", f"{file}: changed while it was scored", hint=hint)

    def read(self) -> Iterator[Trajectory]:
        """Yield all trajectories. Raises OpdctlError if one is invalid."""
        vocabulary = self._model.tokenizer, self._model.vocab_size
        renderer = PromptRenderer(*vocabulary, self._form, "teacher") if self._form else None
        for row in read_trajectories(self._paths, *vocabulary, renderer):
            signals.check()
            yield row

    def read_span(self, span: range) -> list[Trajectory]:
        """Return the trajectories of these numbers. Spans in ascending order read each row once."""
        if self._position is None or span.start < self._position:
            self._rows, self._position = self.read(), 0
        rows = list(itertools.islice(self._rows, span.start - self._position, span.stop - self._position))
        self._position = span.stop
        return rows


@dataclass(frozen=True)
class InputCounts:
    """What the input holds. longest: the tokens of the longest prompt with its response, and where it is."""

    rows: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    own_tokens: int = 0
    longest: tuple[int, str] = (0, "")


def count_rows(rows: Iterator[Trajectory], *, needs_top_ids: bool) -> InputCounts:
    """Return what the input holds.

    needs_top_ids: the student's most probable tokens are scored.

    Raises:
        OpdctlError: a row lacks them, or has another number of them.
    """
    count = prompt_tokens = tokens = own_tokens = top_k = 0
    longest = (0, "")
    for row in rows:
        count += 1
        prompt_tokens += len(row.prompt_ids)
        tokens += len(row.response_ids)
        own_tokens += len(row.response_ids) if row.loss_mask is None else int(row.loss_mask.sum())
        longest = max(longest, (len(row.prompt_ids) + len(row.response_ids), row.location), key=lambda pair: pair[0])
        if needs_top_ids:
            top_k = _check_top_ids(row, top_k)
    return InputCounts(count, prompt_tokens, tokens, own_tokens, longest)


def _check_top_ids(row: Trajectory, expected: int) -> int:
    """Return the number of the student's top tokens of a row. expected: that of the rows before, 0 for the first."""
    if row.top_ids is None:
        hint = "remove --set score.student_top_k=true, or store the student's tokens"
        raise OpdctlError("invalid_data", f"{row.location}: no `student_top_ids`, which are to be scored", hint=hint)
    top_k = row.top_ids.shape[1]
    if expected not in (0, top_k):
        reason = f"{top_k} tokens at each position, in the rows before {expected}"
        raise OpdctlError("invalid_data", f"{row.location}: `student_top_ids`: {reason}")
    return top_k


# ── The stage ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class FileScoring:
    """A teacher, the files that it scores, and the directory of their scores. command: the command line."""

    recipe: Recipe
    model: ModelDir
    source: TrajectoryFiles
    counts: InputCounts
    output: Path
    command: str

    @property
    def num_parts(self) -> int:
        """The number of parts: that of the recipe, otherwise as many as in a run of these responses."""
        rollout = self.recipe.rollout
        if "num_parts" in rollout.model_fields_set:
            return rollout.num_parts
        return min(ceil(self.counts.rows / RESPONSES_PER_PART), MAX_PARTS - 1)

    def open_stage(self) -> StageDir:
        """Return the output as a stage.

        Raises:
            OpdctlError: it was made with other settings, by another model, or of other files.
        """
        settings = scorer_settings(fingerprint_settings(self.recipe, "score"), SCORER) | {NUM_PARTS: self.num_parts}
        return StageDir(
            self.output,
            stage=STAGE,
            num_parts=self.num_parts,
            suffix=".parquet",
            fingerprint=Fingerprint(settings, {**self.source.digests(), SCORER: self.model.digest()}),
            rerun_command=self.command,
            lease_directory=self.output,  # workers in containers may share nothing but this directory
        )


def open_file_scoring(
    recipe: Recipe, inputs: Sequence[str], output: Path, command: str, hub_files: HubFiles = "all"
) -> FileScoring:
    """Find the teacher, read the input, and check both. Nothing is written.

    inputs: files, patterns and folders. hub_files: what is downloaded of a teacher from the hub.

    Raises:
        OpdctlError: a file or the teacher is missing or invalid, they do not fit together, or `output` is something
            else.
    """
    if recipe.score.hidden_states:
        hint = "remove score.hidden_states; score in a run, `opdctl score-teacher RUN_DIR`, to store them"
        raise OpdctlError("unsupported_setting", "score.hidden_states: files of scores do not hold them", hint=hint)
    paths = find_inputs(inputs, "--input")
    output = _without_links(output)
    recipe = _resolve_settings(recipe, _check_output(output, inputs, paths, command), output)
    teacher = recipe.teacher_models()[SCORER]
    model = find_model(recipe, teacher, "--teacher", recipe.score.engine, hub_files)
    check_top_k(recipe, model)
    source = TrajectoryFiles(paths, model, teacher_formats(recipe, read_chat_templates(recipe)).get(SCORER))
    counts = count_rows(source.read(), needs_top_ids=recipe.score.student_top_k)
    _check_positions(model, *counts.longest)
    scoring = FileScoring(recipe, model, source, counts, output, command)
    if scoring.num_parts > counts.rows:
        reason = f"{scoring.num_parts} exceeds the number of responses, {counts.rows}"
        raise OpdctlError("invalid_usage", f"--set {NUM_PARTS}: {reason}", hint="lower it")
    return scoring


def _without_links(output: Path) -> Path:
    """Return the directory itself, if a link leads to it: below it there are none."""
    return output.resolve() if output.is_symlink() or output.parent.is_symlink() else output


def _check_output(output: Path, inputs: Sequence[str], paths: Sequence[Path], command: str) -> Mapping[str, Any]:
    """Return the settings by which the output was started, if it was.

    Raises:
        OpdctlError: it is something else, or a part of the input.
    """
    folders = [Path(name).expanduser() for name in inputs if Path(name).expanduser().is_dir()]
    own = output.resolve()
    if any(own.is_relative_to(folder.resolve()) for folder in folders) or any(
        path.resolve().is_relative_to(own) for path in paths
    ):
        detail = f"--output {output}: the input and the output contain one another"
        raise OpdctlError("unusable_output", detail, hint="use another --output")
    if output.exists() and not output.is_dir():
        raise OpdctlError("unusable_output", f"--output {output}: is a file", hint="use another --output")
    header = recorded_header(output, command) if output.is_dir() else None
    if header and header["artifact"] != STAGE:
        detail = f"--output {output}: holds the artifact `{header['artifact']}`"
        raise OpdctlError("unusable_output", detail, hint="use another --output")
    names = {entry.name for entry in output.iterdir()} if output.is_dir() and not header else set()
    if other := sorted(name for name in names if not name.startswith(".") and not PART_NAME.fullmatch(name)):
        detail = f"--output {output}: is not empty, and {other[0]} is no part of scores"
        raise OpdctlError("unusable_output", detail, hint="use another --output")
    settings: Mapping[str, Any] = header["settings"] if header else {}
    return settings


def _resolve_settings(recipe: Recipe, recorded: Mapping[str, Any], output: Path) -> Recipe:
    """Return the recipe with what it leaves open and the output was started with: the engine and the parts."""
    if ENGINE in recorded and recipe.score.engine == AUTO:
        recipe = recipe.model_copy(update={"score": recipe.score.model_copy(update={"engine": recorded[ENGINE]})})
    if NUM_PARTS in recorded and "num_parts" not in recipe.rollout.model_fields_set:
        recipe = recipe.model_copy(
            update={"rollout": recipe.rollout.model_copy(update={"num_parts": recorded[NUM_PARTS]})}
        )
    return resolve_open_settings(recipe, output, ("score",))


def _check_positions(model: ModelDir, longest: int, location: str) -> None:
    """Check that the longest prompt with its response fits into the teacher's positions.

    Raises:
        OpdctlError: it does not fit into a table of positions. Rotary positions continue, with a warning.
    """
    from opdctl.models.inspection import size_of_position_table

    limit = getattr(model.text_config, "max_position_embeddings", None)
    if not isinstance(limit, int) or longest <= limit:
        return
    detail = f"{location}: prompt and response of {longest} tokens exceed the {limit} positions of {model.path}"
    if size_of_position_table(model) is not None:
        raise OpdctlError("unsupported_setting", detail, hint="remove such rows, or use another --teacher")
    console.warn(f"{detail}, for which it was trained")


# ── Scoring ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class FileScores:
    """The result of a command. tokens_made: of the parts that it made. seconds: of the work, without the start of the
    engine. advantage: its mean over the student's own tokens in nats, None without the student's log-probs or before
    the end."""

    stage: StageDir
    parts_made: int
    tokens_made: int
    seconds: float
    startup_seconds: float
    advantage: float | None

    @property
    def is_finished(self) -> bool:
        return self.stage.is_finished()

    def count_finished_parts(self) -> int:
        return self.stage.count_made()

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        manifest = self.stage.manifest()
        parts = manifest["parts"] if manifest else []
        return {
            "output": str(self.stage.path),
            "parts": len(parts),
            "parts_made": self.parts_made,
            "rows": sum(part["rows"] for part in parts),
            "tokens": sum(part["tokens"] for part in parts),
            "tokens_made": self.tokens_made,
            "seconds": self.seconds,
            "startup_seconds": self.startup_seconds,
            "mean_advantage": self.advantage,
        }


def score_files(scoring: FileScoring, device: str) -> FileScores:
    """Make the missing parts of the output.

    Raises:
        OpdctlError: the output was made with different settings; a row is invalid; the disk is full.
    """
    stage, made = scoring.open_stage(), list[int]()
    recipe, model = scoring.recipe, scoring.model
    with open_engine_pool(recipe, device) as engines, measure_stage() as times:
        engine, makers = recipe.score.engine, PartMakers(is_here=engines.owns(recipe.score.engine))
        scorer = ScorerSource(engine, device, partial(engines.get, SCORER, engine, model), makers)
        digest = stage.fingerprint.inputs[SCORER]
        prepare = partial(scoring_work, scorer, recipe, model, digest, partial(_open_part, scoring, stage, made))
        title = f"score-teacher {stage.path}"
        parts_made = make_missing_parts(stage, title, scoring.counts.rows, prepare, makers=makers)
    advantage = _mean_advantage(stage) if stage.is_finished() else None
    return FileScores(stage, parts_made, sum(made), times.work, times.startup, advantage)


def _open_part(
    scoring: FileScoring, stage: StageDir, made: list[int], index: int
) -> tuple[list[ScoreRequest], SaveScores]:
    """Return the requests of a part, and the function that writes it. made: gets the tokens of each written part."""
    rows = scoring.source.read_span(stage.span_of_part(scoring.counts.rows, index))
    requests = [ScoreRequest(_read_by_teacher(row), row.response_ids, row.top_ids) for row in rows]
    decode = scoring.model.tokenizer.decode

    def save(path: Path, scores: list[TokenScores], metadata: Mapping[str, str]) -> None:
        scoring.source.check_unchanged()
        exported = [_export(row, each, decode) for row, each in zip(rows, scores, strict=True)]
        scorers = {SCORER: {"name": scoring.recipe.teacher_models()[SCORER].model, **metadata}}
        tables.write_rows(path, exported, ExportedResponse, describe_file(scorers))
        made.append(sum(len(row.response_ids) for row in rows))

    return requests, save


def _read_by_teacher(row: Trajectory) -> Ids:
    """Return the prompt that the teacher reads."""
    return row.prompt_ids if row.teacher_prompt_ids is None else row.teacher_prompt_ids


def _export(row: Trajectory, scores: TokenScores, decode: Callable[[Ids], str]) -> ExportedResponse:
    return ExportedResponse(
        step=row.step,
        sample_id=row.sample_id,
        prompt_id=row.prompt_id,
        policy_version=row.policy_version,
        prompt=decode(row.prompt_ids),
        response=decode(row.response_ids),
        answer=row.answer,
        prompt_ids=row.prompt_ids,
        response_ids=row.response_ids,
        loss_mask=row.loss_mask,
        finish_reason=row.finish_reason,
        turns=row.turns,
        tool_seconds=row.tool_seconds,
        reward=row.reward,
        teacher=SCORER,
        teacher_prompt_ids=row.teacher_prompt_ids,
        student_logprobs=row.logprobs,
        sampling_logprobs=row.sampling_logprobs,
        teacher_logprobs=scores.logprobs,
        student_entropies=row.entropies,
        teacher_entropies=scores.entropies,
        student_top_ids=row.top_ids,
        student_top_logprobs=row.top_logprobs,
        teacher_top_ids=scores.top_ids,
        teacher_top_logprobs=scores.top_logprobs,
        teacher_student_top_logprobs=scores.student_top_logprobs,
    )


def _mean_advantage(stage: StageDir) -> float | None:
    """Return the mean of A over the student's own tokens, in nats; None if no log-prob of the student is known.

    Raises:
        OpdctlError: a part is corrupt.
    """
    total, count = 0.0, 0
    columns = ("teacher_logprobs", "student_logprobs", "loss_mask")
    for index in range(len(stage.names)):
        for row in tables.read_columns(stage.verify(index), ExportedResponse, columns):
            teacher_T, student_T, mask_T = (row[column] for column in columns)
            if student_T is None:
                continue
            advantage_T = np.asarray(teacher_T, np.float64) - student_T
            own_N = advantage_T if mask_T is None else advantage_T[mask_T]
            total, count = total + float(own_N.sum()), count + len(own_N)
    return total / count if count else None

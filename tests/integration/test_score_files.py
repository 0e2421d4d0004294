"""`opdctl score-teacher --input`: a teacher scores files of responses without a run, as it does in a run."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
from helpers.commands import Result, contents, invoke

from opdctl.artifacts import tables
from opdctl.artifacts.records import ExportedResponse, TokenScores, Trajectory
from opdctl.artifacts.tables import read_rows, read_scores
from opdctl.errors import ExitCode
from opdctl.models.directory import ModelDir, find_local
from opdctl.pipeline import score_files
from opdctl.recipe.schema import Model
from opdctl.runs.run import Run

TEACHER = ("--teacher", "toy:teacher")
FLOAT32 = ("--set", "teacher.dtype=float32", "--set", "score.engine=transformers")
COUNTED = ("student_logprobs", "teacher_logprobs", "loss_mask")
COLUMNS = ("entropies", "top_ids", "top_logprobs", "student_top_logprobs")


def score(output: Path, source: Path, *options: object) -> Result:
    """Score files by the embedded teacher as the quickstart does."""
    return invoke("score-teacher", "--input", source, *TEACHER, "--output", output, *FLOAT32, *options)


def export(run: Path, path: Path, step: int) -> Path:
    assert invoke("run", "export", run, path, "--step", step).code == 0
    return path


@pytest.fixture(scope="module")
def exported(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 8 responses of a step, with their log-probs alone. Read only."""
    return export(finished_run, tmp_path_factory.mktemp("exported") / "exported.parquet", 0)


def table(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file, or of all parts in a directory."""
    files = sorted(path.glob("part-*.parquet")) if path.is_dir() else [path]
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def exported_rows(output: Path) -> list[ExportedResponse]:
    return [row for part in sorted(output.glob("part-*.parquet")) for row in read_rows(part, ExportedResponse)]


def scores_of_run(run: Run, step: int) -> dict[str, TokenScores]:
    rollout, stage = run.rollout_stage(step), run.score_stage(step, "teacher")
    parts = (read_scores(stage.verify(index), rollout.sha256(index)) for index in range(len(stage.names)))
    return {name: scores for part in parts for name, scores in part.items()}


@pytest.mark.parametrize("step", [0, 1])
def test_scores_are_those_of_a_run_to_the_bit(finished_run_with_columns: Path, tmp_path: Path, step: int) -> None:
    run = Run.load(finished_run_with_columns)
    exported = export(run.path, tmp_path / "exported.parquet", step)
    settings = ("score.entropy=true", "score.top_k=4", "score.student_top_k=true", "rollout.num_parts=2")
    options = [word for setting in settings for word in ("--set", setting)]
    result = score(tmp_path / "scored", exported, *options)
    assert result.code == 0, result.err
    expected = scores_of_run(run, step)
    rows = exported_rows(tmp_path / "scored")
    assert [row.sample_id for row in rows] == list(expected)
    for row in rows:
        scores = expected[row.sample_id]
        assert row.teacher_logprobs.tobytes() == scores.logprobs.tobytes()
        found = (row.teacher_entropies, row.teacher_top_ids, row.teacher_top_logprobs, row.teacher_student_top_logprobs)
        for name, values in zip(COLUMNS, found, strict=True):
            assert values is not None
            assert values.tobytes() == getattr(scores, name).tobytes(), name


def test_columns_of_the_student_pass_through(finished_run_with_columns: Path, tmp_path: Path) -> None:
    exported = export(finished_run_with_columns, tmp_path / "exported.parquet", 1)
    assert score(tmp_path / "scored", exported).code == 0
    dropped = ("teacher_entropies", "teacher_top_ids", "teacher_top_logprobs", "teacher_student_top_logprobs")
    dropped += ("weights", "extracted", "correct")
    before, after = table(exported), table(tmp_path / "scored")
    assert before == [row | {name: old[name] for name in dropped} for row, old in zip(after, before, strict=True)]
    assert {row[name] for row in after for name in dropped} == {None}


def test_prompts_of_the_teacher_are_read(exported: Path, tmp_path: Path) -> None:
    rows = table(exported)
    other = [row | {"teacher_prompt_ids": row["prompt_ids"][:-1]} for row in rows]
    stripped = [row | {"prompt_ids": row["prompt_ids"][:-1]} for row in rows]
    for name, content in (("other", other), ("stripped", stripped)):
        write_jsonl(tmp_path / f"{name}.jsonl", content)
        assert score(tmp_path / name, tmp_path / f"{name}.jsonl").code == 0
    found, expected, own = table(tmp_path / "other"), table(tmp_path / "stripped"), rows
    logprobs = "teacher_logprobs"
    assert [row[logprobs] for row in found] == [row[logprobs] for row in expected] != [row[logprobs] for row in own]
    assert [row["teacher_prompt_ids"] for row in found] == [row["prompt_ids"] for row in expected]


def test_masked_tokens_are_scored_too(exported: Path, tmp_path: Path) -> None:
    rows = table(exported)
    masked = [row | {"loss_mask": [index % 3 > 0 for index in range(len(row["response_ids"]))]} for row in rows]
    write_jsonl(tmp_path / "masked.jsonl", masked)
    result = score(tmp_path / "scored", tmp_path / "masked.jsonl", "--json")
    after = table(tmp_path / "scored")
    assert [row["teacher_logprobs"] for row in after] == [row["teacher_logprobs"] for row in rows]
    assert [row["loss_mask"] for row in after] == [row["loss_mask"] for row in masked]
    student, teacher, mask = (np.concatenate([row[name] for row in after]) for name in COUNTED)
    assert result.json()["mean_advantage"] == pytest.approx((teacher - student)[mask].mean(), rel=1e-12)


def test_datasets_and_pandas_read_the_directory(exported: Path, tmp_path: Path) -> None:
    assert score(tmp_path / "scored", exported, "--set", "rollout.num_parts=3").code == 0
    files = str(tmp_path / "scored" / "part-*.parquet")
    loaded = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    frame = pandas.concat(pandas.read_parquet(part) for part in sorted((tmp_path / "scored").glob("part-*.parquet")))
    assert [*loaded["sample_id"]] == frame["sample_id"].tolist() == [row["sample_id"] for row in table(exported)]
    assert all(map(np.array_equal, loaded["teacher_logprobs"], frame["teacher_logprobs"]))


def test_metadata_name_format_units_and_scorer(exported: Path, tmp_path: Path) -> None:
    assert score(tmp_path / "scored", exported).code == 0
    metadata = pq.read_schema(next((tmp_path / "scored").glob("part-*.parquet"))).metadata
    assert metadata[b"opdctl.format"] == b"responses 1"
    assert metadata[b"opdctl.logprobs"] == b"natural logarithms, temperature 1"
    scorer = json.loads(metadata[b"opdctl.scorers"])["teacher"]
    assert {"name", "model", "tokenizer", "dtype", "engine", "weights"} <= scorer.keys()
    assert (scorer["name"], scorer["dtype"], scorer["engine"]) == ("toy:teacher", "float32", "transformers")


def test_same_command_resumes_and_then_has_nothing_to_do(exported: Path, tmp_path: Path) -> None:
    output, options = tmp_path / "scored", ("--set", "rollout.num_parts=4")
    assert score(output, exported, *options).code == 0
    whole = contents(output)
    assert set(whole) == {"manifest.json", *(f"part-{i:05d}-of-00004.parquet" for i in range(4))}
    assert not [path for path in output.iterdir() if path.name.startswith(".")]
    lost = output / "part-00002-of-00004.parquet"
    lost.unlink()
    again = score(output, exported, "--json")  # the number of parts is that of the first command
    assert (again.code, again.json()["parts_made"], again.json()["rows"]) == (0, 1, 8)
    assert contents(output) == whole
    third = score(output, exported)
    assert "nothing to do" in third.out
    assert contents(output) == whole


def test_corrupt_part_is_named_with_what_to_do(exported: Path, tmp_path: Path) -> None:
    assert score(tmp_path / "scored", exported).code == 0
    part = next((tmp_path / "scored").glob("part-*"))
    whole = part.read_bytes()
    part.write_bytes(whole[:-1])
    result = score(tmp_path / "scored", exported)
    assert (result.kind, result.code) == ("corrupt_artifact", ExitCode.BAD_DATA)
    assert str(part) in result.err
    assert f"remove {part}" in result.err
    part.unlink()
    assert score(tmp_path / "scored", exported).code == 0
    assert part.read_bytes() == whole


@pytest.mark.parametrize("change", ["input", "order", "teacher", "settings", "parts"])
def test_other_inputs_are_refused(exported: Path, tmp_path: Path, change: str) -> None:
    """The same names with another content: of a file, or of the model."""
    teacher = Path(shutil.copytree(find_local(Model(model="toy:teacher"), "model"), tmp_path / "teacher"))
    rows = table(exported)
    for name, content in (("a", rows[:4]), ("b", rows[4:])):
        write_jsonl(tmp_path / f"{name}.jsonl", content)
    names = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    words = [str(word) for name in names for word in ("--input", name)]
    rest = ["--teacher", teacher, "--output", tmp_path / "scored", *FLOAT32]
    assert invoke("score-teacher", *words, *rest).code == 0
    before = contents(tmp_path / "scored")
    if change == "input":
        write_jsonl(names[1], rows[5:])
    elif change == "order":
        words = words[2:] + words[:2]
    elif change == "teacher":
        (teacher / "generation_config.json").write_text("{}")
    else:
        rest += ["--set", "score.entropy=true" if change == "settings" else "rollout.num_parts=3"]
    result = invoke("score-teacher", *words, *rest)
    assert (result.kind, result.code) == ("settings_mismatch", ExitCode.RECIPE_MISMATCH), result.err
    expected = {
        "input": "changed inputs: input 2, b.jsonl",
        "order": "changed inputs: input 1, a.jsonl, input 1, b.jsonl",
        "teacher": "changed inputs: teacher",
        "settings": "score.entropy False → True",
        "parts": "rollout.num_parts 1 → 3",
    }
    assert expected[change] in result.err
    assert contents(tmp_path / "scored") == before


def test_file_that_changes_while_it_is_scored_is_refused(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, source = table(exported), tmp_path / "rows.jsonl"
    write_jsonl(source, rows)
    read_span = score_files.TrajectoryFiles.read_span

    def change_and_read(self: score_files.TrajectoryFiles, span: range) -> list[Trajectory]:
        found = read_span(self, span)
        write_jsonl(source, rows[1:])
        return found

    monkeypatch.setattr(score_files.TrajectoryFiles, "read_span", change_and_read)
    result = score(tmp_path / "scored", source)
    assert (result.kind, result.code) == ("source_mismatch", ExitCode.RECIPE_MISMATCH)
    assert not list((tmp_path / "scored").glob("part-*"))
    assert not list((tmp_path / "scored").glob(".tmp-*"))


def test_spans_in_any_order_have_their_rows(exported: Path) -> None:
    model = ModelDir(find_local(Model(model="toy:teacher"), "model") or Path(), "float32")
    files = score_files.TrajectoryFiles([exported], model)
    ids = [row["sample_id"] for row in table(exported)]
    for span in (range(3), range(3, 5), range(6, 8), range(5, 6), range(2), range(2, 2), range(2, 8)):
        assert [row.sample_id for row in files.read_span(span)] == ids[span.start : span.stop]


def test_dry_run_writes_nothing(exported: Path, tmp_path: Path) -> None:
    result = score(tmp_path / "scored", exported, "--set", "rollout.num_parts=3", "--dry-run", "--json")
    tokens = sum(len(row["response_ids"]) for row in table(exported))
    expected = {"rows": 8, "tokens": tokens, "own_tokens": tokens, "parts": 3, "finished_parts": 0}
    assert result.json().items() >= expected.items()
    assert not (tmp_path / "scored").exists()


# ── Refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["runs/x", "--input", "a.jsonl"], "excludes RUN_DIR"),
        (["--input", "a.jsonl", "--recipe", "quickstart", "--step", "0"], "excludes --recipe, --step"),
        (["--input", "a.jsonl", "--follow"], "excludes --follow"),
        (["--input", "a.jsonl", "--only", "teacher"], "excludes --only"),
        (["--teacher", "toy:teacher"], "--input, --output is missing"),
        (["--input", "a.jsonl", "--output", "scored"], "--teacher is missing"),
    ],
)
def test_options_of_a_run_and_of_files_are_exclusive(words: list[str], part: str) -> None:
    result = invoke("score-teacher", *words)
    assert (result.kind, result.code) == ("invalid_usage", ExitCode.USAGE)
    assert part in result.err


@pytest.mark.parametrize(
    ("setting", "kind", "words"),
    [
        ("train.steps=3", "invalid_usage", "--set train.steps: has no effect on scores of files"),
        ("rollout.num_parts=9", "invalid_usage", "9 exceeds the number of responses, 8"),
        ("score.hidden_states=true", "unsupported_setting", "score.hidden_states"),
        ("score.top_k=4096", "unsupported_setting", "score.top_k = 4096"),
        ("score.student_top_k=true", "invalid_data", "no `student_top_ids`"),
        ("score.entropies=true", "invalid_recipe", "did you mean `entropy`"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(
    exported: Path, tmp_path: Path, setting: str, kind: str, words: str
) -> None:
    result = score(tmp_path / "scored", exported, "--set", setting)
    assert result.kind == kind
    assert words in result.err
    assert not (tmp_path / "scored").exists()


def make_directory_of_others(path: Path) -> None:
    path.mkdir()
    (path / "notes.txt").write_text("mine")


@pytest.mark.parametrize(
    "kind", ["file", "other files", "a run", "a stage of a run", "around the input", "in the input"]
)
def test_output_that_is_something_else_is_refused(
    finished_run: Path, exported: Path, tmp_path: Path, kind: str
) -> None:
    output, source = tmp_path / "scored", tmp_path / "data" / "rows.parquet"
    source.parent.mkdir()
    shutil.copy(exported, source)
    if kind == "file":
        output.write_text("mine")
    elif kind == "other files":
        make_directory_of_others(output)
    elif kind == "a run":
        output = finished_run
    elif kind == "a stage of a run":
        output = finished_run / "step-00000" / "rollout"
    elif kind == "around the input":
        output = source.parent
    else:
        output = source.parent / "scored"
    before = contents(tmp_path)
    result = score(output, source.parent)
    assert (result.kind, result.code) == ("unusable_output", ExitCode.USAGE), result.err
    assert contents(tmp_path) == before


def test_missing_and_unreadable_inputs_are_named(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.parquet").write_bytes(exported.read_bytes()[:-9])
    (tmp_path / "rows.txt").write_text("")
    cases = (
        ("none.jsonl", "missing_file", "none.jsonl"),
        ("*.csv", "missing_file", "no file matches"),
        ("rows.txt", "unsupported_setting", "must end in"),
        ("cut.parquet", "invalid_data", "not readable as Parquet"),
    )
    for name, kind, words in cases:
        result = score(tmp_path / "scored", tmp_path / name)
        assert result.kind == kind, result.err
        assert words in result.err
        assert not (tmp_path / "scored").exists()


def test_id_beyond_the_vocabulary_names_the_row(exported: Path, tmp_path: Path) -> None:
    rows = table(exported)
    rows[5]["response_ids"][2] = 60_000
    rows[5]["response"] = None
    write_jsonl(tmp_path / "rows.jsonl", rows)
    result = score(tmp_path / "scored", tmp_path / "rows.jsonl")
    assert (result.kind, result.code) == ("incompatible_tokenizer", ExitCode.USAGE)
    assert "rows.jsonl: row 6" in result.err
    assert "60000" in result.err


def test_full_disk_keeps_finished_parts(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows, count = tables.write_rows, iter(range(9))

    def fail_second(*arguments: object, **options: object) -> None:
        if next(count) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_rows(*arguments, **options)

    monkeypatch.setattr(tables, "write_rows", fail_second)
    options = ("--set", "rollout.num_parts=4")
    result = score(tmp_path / "scored", exported, *options)
    assert (result.kind, result.code) == ("disk_full", ExitCode.UNAVAILABLE)
    assert len(list((tmp_path / "scored").glob("part-*.parquet"))) == 1
    assert not list((tmp_path / "scored").glob(".tmp-*"))
    assert score(tmp_path / "scored", exported, *options, "--json").json()["parts_made"] == 3


def test_messages_are_rendered_in_the_format_of_the_teacher(tmp_path: Path) -> None:
    template = tmp_path / "marked.jinja"
    text = "{% for message in messages %}{{ message.content }}{{ ']' if message.role == 'user' else ';' }}{% endfor %}"
    template.write_text(text)
    rows = [{"messages": [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "de"}]}]
    write_jsonl(tmp_path / "chats.jsonl", rows)
    words = (tmp_path / "scored", tmp_path / "chats.jsonl", "--set", f"teacher.chat_template={template}")
    assert score(*words).code == 0
    (row,) = exported_rows(tmp_path / "scored")
    assert (row.prompt, row.response) == ("abc]", "de;")
    template.write_text(text.replace(";", ","))
    changed = score(*words)
    assert (changed.code, changed.kind) == (ExitCode.RECIPE_MISMATCH, "settings_mismatch")
    assert "teacher.chat_template" in changed.err

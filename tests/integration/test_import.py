"""`opdctl run import`: responses of other programs become a step's rollout, with masks, scores, missing log-probs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.commands import QUICKSTART, Result, contents, invoke, sets
from helpers.training import SHORT, max_difference, weights

from opdctl.artifacts.records import Response
from opdctl.errors import ExitCode
from opdctl.runs.run import Run
from opdctl.runs.scored_responses import read_scored

ONE_STEP = (
    *("prompts.source=imported", "train.steps=1", "rollout.prompts_per_step=8", "rollout.num_parts=2"),
    *("eval.every_steps=0", "train.learning_rate=1e-3", *SHORT),
)


@pytest.fixture(scope="module")
def exported(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The responses of the first step of a run, as a file."""
    path = tmp_path_factory.mktemp("exported") / "responses.parquet"
    assert invoke("run", "export", finished_run, path, "--step", "0").code == 0
    return path


def write(path: Path, table: pa.Table, **columns) -> Path:
    """Write a table with other columns, without metadata; a column that is None is dropped."""
    for name, values in columns.items():
        table = table.drop([name]) if name in table.column_names else table
        table = table if values is None else table.append_column(name, pa.array(values))
    pq.write_table(table.replace_schema_metadata(None), path)
    return path


def start(run: Path, *files: Path, settings: tuple[str, ...] = ()) -> Result:
    return invoke("run", "import", run, *files, "--recipe", QUICKSTART, *sets(*ONE_STEP, *settings), "--json")


def same_recipe(run: Path) -> Result:
    """Train a run of its own rollouts with the settings of the imported ones."""
    settings = [each for each in ONE_STEP if not each.startswith("prompts.")]
    return invoke("train", "--recipe", QUICKSTART, *sets(*settings), "--output", run, "--json")


def test_a_step_of_imported_responses_is_that_of_the_run_that_sampled_them(tmp_path: Path) -> None:
    sampled, imported, file = tmp_path / "sampled", tmp_path / "imported", tmp_path / "responses.parquet"
    assert same_recipe(sampled).code == 0
    assert invoke("run", "export", sampled, file).code == 0
    result = start(imported, write(tmp_path / "bare.parquet", pq.read_table(file)))
    assert result.json().items() >= {"responses": 8, "step": 0, "parts_made": 2, "scores_of": None}.items()
    assert f"opdctl score-teacher {imported}" in result.err
    assert invoke("score-teacher", imported).code == 0
    assert invoke("train", imported, "--no-fill").code == 0
    assert max_difference(weights(imported, 1), weights(sampled, 1)) == 0
    prompts = [{prompt.prompt_id for prompt in Run.load(run).prompts} for run in (imported, sampled)]
    assert prompts[0] <= prompts[1]


def test_missing_log_probs_are_those_of_the_student(exported: Path, finished_run: Path, tmp_path: Path) -> None:
    table = pq.read_table(exported)
    file = write(tmp_path / "bare.parquet", table, student_logprobs=None, student_entropies=None)
    assert start(tmp_path / "run", file, settings=("rollout.top_k=3",)).code == 0
    rows = Run.load(tmp_path / "run").rollout_stage(0).read_all(Response)
    for row, logprobs in zip(rows, table["student_logprobs"].to_pylist(), strict=True):
        np.testing.assert_allclose(row.logprobs, logprobs, atol=1e-5)
        assert row.top_ids.shape == (len(row.response_ids), 3)


def test_masked_tokens_are_read_and_not_learned(exported: Path, tmp_path: Path) -> None:
    """Another teacher of the masked tokens, or other log-probs at these, would give the same update."""
    table = pq.read_table(exported)
    lengths = [len(ids) for ids in table["response_ids"].to_pylist()]
    masks = [[n % 4 > 0 or n == 0 for n in range(length)] for length in lengths]
    students = []
    for name, value in (("first", -1.0), ("second", -9.0)):
        logprobs = [
            [logp if own else value for logp, own in zip(row, mask, strict=True)]
            for row, mask in zip(table["student_logprobs"].to_pylist(), masks, strict=True)
        ]
        columns = {"student_logprobs": logprobs, "loss_mask": masks}
        assert start(tmp_path / name, write(tmp_path / f"{name}.parquet", table, **columns)).code == 0
        for command in (("score-teacher",), ("train", "--no-fill")):
            assert invoke(command[0], tmp_path / name, *command[1:]).code == 0
        students.append(weights(tmp_path / name, 1))
    assert max_difference(*students) == 0
    run = Run.load(tmp_path / "first")
    own = sum(map(sum, masks))
    assert run.update(0)["metrics"]["tokens"] == own
    for sample in read_scored(run, 0):
        assert len(sample.teacher.logprobs) == sum(sample.response.loss_mask) < len(sample.response.response_ids)
    shown = invoke("run", "show", tmp_path / "first", run.rollout_stage(0).read_all(Response)[0].sample_id, "--json")
    assert shown.json()["loss_mask"] == masks[0]
    assert "that it read" in shown.err
    assert invoke("analyze-position", tmp_path / "first").code == 0


def test_an_import_is_continued_and_other_files_are_refused(exported: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert start(run, exported).code == 0
    stage = Run.load(run).rollout_stage(0)
    (part := stage.path / stage.names[1]).unlink()
    sampling = invoke("rollout", run)
    assert (sampling.code, sampling.kind) == (ExitCode.FAILED, "missing_input")
    assert f"opdctl run import {run} {exported} --step 0" in sampling.err
    assert invoke("run", "import", run, exported).code == 0
    assert part.exists()
    other = write(tmp_path / "other.parquet", pq.read_table(exported).slice(1))
    refused = invoke("run", "import", run, other)
    assert (refused.code, refused.kind) == (ExitCode.RECIPE_MISMATCH, "settings_mismatch")


def test_a_sampled_step_is_not_replaced(exported: Path, finished_run: Path) -> None:
    refused = invoke("run", "import", finished_run, exported, "--step", "0")
    assert (refused.code, refused.kind) == (ExitCode.RECIPE_MISMATCH, "settings_mismatch")
    assert not (finished_run / "step-00000/rollout/import.json").exists()


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        (("rollout.max_tokens=3",), "rollout.max_tokens = 3"),
        (("prompts.max_tokens=3",), "prompts.max_tokens = 3"),
        (("rollout.prompts_per_step=9",), "rollout.prompts_per_step=8"),
        (("train.router_replay=true",), "router_replay"),
    ],
)
def test_what_the_recipe_does_not_allow_writes_no_run(
    settings: tuple[str, ...], word: str, exported: Path, tmp_path: Path
) -> None:
    result = start(tmp_path / "run", exported, settings=settings)
    assert result.code != 0
    assert word in result.err
    assert not list((tmp_path / "run").rglob("part-*"))


def test_a_run_of_imported_prompts_starts_with_an_import(tmp_path: Path) -> None:
    result = invoke("train", "--recipe", QUICKSTART, *sets(*ONE_STEP), "--output", tmp_path / "run")
    assert result.kind == "missing_input"
    assert "opdctl run import" in result.err
    assert not (tmp_path / "run").exists()


def test_a_dry_run_counts_and_writes_nothing(exported: Path, tmp_path: Path) -> None:
    words = ("run", "import", tmp_path / "run", exported, "--recipe", QUICKSTART, *sets(*ONE_STEP), "--dry-run")
    result = invoke(*words)
    assert result.code == 0
    assert "8 responses to 8 prompts" in result.out
    assert not (tmp_path / "run").exists()


def test_a_lost_record_of_the_import_is_an_error_until_the_files_are_imported_again(
    exported: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert start(run, exported).code == 0
    rollout = run / "step-00000/rollout"
    wanted = contents(rollout)
    (rollout / "import.json").unlink()
    result = invoke("score-teacher", run)
    assert (result.code, result.kind) == (ExitCode.RECIPE_MISMATCH, "settings_mismatch")
    assert str(rollout) in result.err
    shutil.rmtree(rollout)
    assert invoke("run", "import", run, exported).code == 0
    assert contents(rollout) == wanted


def test_a_corrupt_record_of_the_import_is_reported(exported: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert start(run, exported).code == 0
    (record := run / "step-00000/rollout/import.json").write_text("{")
    result = invoke("rollout", run)
    assert (result.code, result.kind) == (ExitCode.BAD_DATA, "corrupt_artifact")
    assert str(record) in result.err
    status = invoke("status", run)
    assert status.code == ExitCode.BAD_DATA
    assert str(record) in status.out + status.err
    repaired = invoke("run", "repair", run)
    assert repaired.code == ExitCode.BAD_DATA
    assert "cannot be regenerated" in repaired.err


def test_scores_of_the_runs_teacher_are_imported_too(finished_run: Path, tmp_path: Path) -> None:
    """Files of score-teacher --input train without another pass of the teacher, and give the same student."""
    sampled, bare, scored = tmp_path / "sampled", tmp_path / "bare.parquet", tmp_path / "scored"
    assert same_recipe(sampled).code == 0
    assert invoke("run", "export", sampled, tmp_path / "out.parquet").code == 0
    write(bare, pq.read_table(tmp_path / "out.parquet"), teacher_logprobs=None)
    words = ("--input", bare, "--teacher", "toy:teacher", "--output", scored)
    settings = ("--set", "rollout.num_parts=2", "--set", "score.engine=transformers", "--set", "pipeline.threads=1")
    assert invoke("score-teacher", *words, *settings, "--set", "teacher.dtype=float32").code == 0
    result = start(tmp_path / "run", scored / "*.parquet")
    assert result.json()["scores_of"] == "teacher"
    assert f"next: opdctl train {tmp_path / 'run'}" in result.err
    assert invoke("train", tmp_path / "run", "--no-fill").code == 0
    assert max_difference(weights(tmp_path / "run", 1), weights(sampled, 1)) == 0
    other = start(tmp_path / "other", scored / "*.parquet", settings=("teacher.model=toy:student-spread",))
    assert other.json()["scores_of"] is None
    assert "they are not used" in other.err


def test_messages_are_rendered_in_the_format_of_the_recipe(tmp_path: Path) -> None:
    """The text of the chat template between the turns is read, and the student's turns are learned."""
    template = tmp_path / "marked.jinja"
    template.write_text(
        "{% for message in messages %}{{ '[' if message.role == 'user' else '' }}{{ message.content }}"
        "{{ ']' if message.role == 'user' else ';' }}{% endfor %}"
    )
    messages = [("user", "abc"), ("assistant", "de"), ("user", "f"), ("assistant", "gh")]
    row = {"messages": [{"role": role, "content": content} for role, content in messages]}
    file = tmp_path / "chats.jsonl"
    file.write_text(json.dumps(row) + "\n")
    settings = (f"prompts.chat_template={template}", "rollout.prompts_per_step=1", "rollout.num_parts=1")
    assert start(tmp_path / "run", file, settings=settings).code == 0
    run = Run.load(tmp_path / "run")
    (response,) = run.rollout_stage(0).read_all(Response)
    tokenizer = run.student.tokenizer
    assert tokenizer.decode(response.prompt_ids) == "[abc]"
    assert tokenizer.decode(response.response_ids).startswith("de;[f]gh")
    assert tokenizer.decode(response.own_ids).startswith("de;gh")
    assert np.isfinite(response.logprobs[response.loss_mask]).all()

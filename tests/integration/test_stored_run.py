"""Runs of earlier versions stay readable: a stored run of version 5, and runs that other versions wrote."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.commands import contents, invoke, rewrite_json

from opdctl.artifacts import files
from opdctl.artifacts.records import Response
from opdctl.artifacts.tables import read_rows
from opdctl.errors import ExitCode
from opdctl.evaluation.results import load_evaluation
from opdctl.recipe.dependencies import fingerprint_settings
from opdctl.runs.run import Run
from opdctl.runs.scored_responses import read_scored
from opdctl.runs.status import collect_status

STORED = Path(__file__).parents[1] / "data" / "run-v5"


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """A copy of the stored run."""
    return Path(shutil.copytree(STORED, tmp_path / "run"))


def test_status_of_the_stored_run() -> None:
    result = invoke("status", STORED, "--json")
    assert result.code == 0, result.err
    status = result.json()
    assert (status["steps_done"], status["steps"], status["forked_from"]) == (2, 2, None)
    assert {stage["state"] for stage in (*status["stages"], *status["evaluations"])} == {"done"}
    assert status["next"] == f"opdctl analyze-position {STORED}"


def test_only_the_removed_weights_are_missing_from_the_stored_run() -> None:
    status = collect_status(Run.load(STORED), verify=True)
    corrupt = [stage for stage in status.stages if stage.state == "corrupt"]
    assert [(stage.step, stage.stage) for stage in corrupt] == [(1, "update")]
    assert "student/step-00002/model.safetensors: is missing" in corrupt[0].detail


@pytest.mark.parametrize("step", [0, 1])
def test_scored_responses_of_the_stored_run(step: int) -> None:
    run = Run.load(STORED)
    scored = list(read_scored(run, step))
    assert [each.response.sample_id for each in scored] == [name for name, _ in run.samples(step)]
    assert len(scored) == 4
    for each in scored:
        tokens = len(each.response.response_ids)
        assert each.response.top_logprobs.shape == each.teacher.top_ids.shape == (tokens, 2)
        assert each.teacher.student_top_logprobs.shape == (tokens, 2)
        # The sampled token is among the student's two most probable ones, or less probable than both.
        assert (each.response.logprobs <= each.response.top_logprobs[:, 0] + 1e-5).all()
    advantages = np.concatenate([each.teacher.logprobs - each.response.logprobs for each in scored])
    assert float(np.abs(advantages).mean()) == pytest.approx(run.update(step)["metrics"]["abs_advantage"], rel=1e-3)


def test_stored_run_continues_in_its_order() -> None:
    """0.2.0 wrote the prompts in the order of the first epoch, and drew those of the others by numpy."""
    run = Run.load(STORED)
    order = [prompt.prompt_id for prompt in run.prompts]
    second = [order[i] for i in np.random.default_rng([run.recipe.seed, 1]).permutation(8)]
    assert [prompt.prompt_id for step in range(4) for _, prompt in run.samples(step)] == order + second
    assert second != order


@pytest.mark.parametrize("name", ["step-00000", "step-00002", "teacher"])
def test_evaluations_of_the_stored_run(name: str) -> None:
    evaluation = load_evaluation(STORED / "eval/sort12" / name)
    rows = evaluation.rows()
    assert len(rows) == 4
    assert evaluation.summary["avg"] == sum(row.correct for row in rows) / 4


def test_evaluations_of_the_stored_run_are_compared() -> None:
    one, other = (STORED / "eval/sort12" / name for name in ("step-00002", "teacher"))
    result = invoke("compare", one, other, "--json")
    assert result.code == 0, result.err
    assert result.json()["evaluations"][0]["problems"] == 4


def test_analysis_of_the_stored_run(stored: Path) -> None:
    before = contents(stored)
    result = invoke("analyze-position", stored, "--json")
    assert result.code == 0, result.err
    report = Path(result.json()["report"])
    assert report.stat().st_size > 10_000
    assert {name: data for name, data in contents(stored).items() if not name.startswith("analysis/")} == before


def test_update_of_the_stored_run_keeps_its_fingerprint() -> None:
    """A key that was added since must not appear in it, or the run could not continue from its trainer state."""
    run = Run.load(STORED)
    assert fingerprint_settings(run.recipe, "update") == run.update(0)["settings"]


def test_stored_run_is_not_changed_by_reading() -> None:
    assert {path.parts[len(STORED.parts)] for path in STORED.rglob("*")} == {
        *("eval", "metrics.jsonl", "prompts.parquet", "recipe.toml", "run.json"),
        *("step-00000", "step-00001", "student"),
    }


# ── Other versions ───────────────────────────────────────────────────────────────────────────────────────────────────


def rewrite_part(run: Path, change) -> Path:
    """Change a rollout part and its entry in the manifest, as another opdctl would have written both."""
    stage = run / "step-00001/rollout"
    part = sorted(stage.glob("part-*"))[0]
    pq.write_table(change(pq.read_table(part)), part)
    parts = json.loads((stage / "manifest.json").read_text())["parts"]
    parts[0] |= {"bytes": part.stat().st_size, "sha256": files.sha256_file(part)}
    rewrite_json(stage / "manifest.json", parts=parts)
    return part


def test_column_that_a_file_lacks_has_its_default(stored: Path) -> None:
    before = read_rows(sorted((stored / "step-00001/rollout").glob("part-*"))[0], Response)
    rewrite_part(stored, lambda table: table.drop_columns(["entropies"]))
    run = Run.load(stored)
    rows = read_rows(run.rollout_stage(1).verify(0), Response)
    assert [row.entropies for row in rows] == [None] * len(before)
    for row, wanted in zip(rows, before, strict=True):
        np.testing.assert_array_equal(row.top_logprobs, wanted.top_logprobs, strict=True)


def test_unknown_column_is_one_error(stored: Path) -> None:
    part = rewrite_part(stored, lambda table: table.append_column("rewards", pa.array([1.0] * len(table))))
    shutil.rmtree(stored / "step-00001/teacher")
    (stored / "step-00001/update.json").unlink()
    result = invoke("run", "continuations", stored, "--step", 1, "--dry-run")
    assert (result.code, result.kind, result.out) == (ExitCode.BAD_DATA, "unsupported_version", "")
    assert str(part) in result.err
    assert "rewards" in result.err


COMMANDS = (
    ["status"],
    ["analyze-position"],
    ["run", "repair"],
    *([command, "--output"] for command in ("train", "rollout", "score-teacher", "eval")),
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_newer_version_is_one_error(stored: Path, command: list[str]) -> None:
    rewrite_json(stored / "run.json", version=6, more={})
    check_refused(stored, command, "version 6")


VERSION_4 = """{
 "schema_version": 4,
 "libraries": {"opdctl": "0.1.0"},
 "models": {"student": {"path": "/models/student", "digest": "0", "stamp": {}}},
 "prompts": {"rows": 8, "dropped": 0, "sha256": "0", "source_sha256": null},
 "digest": "0"
}
"""


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_run_of_version_4_is_one_error(tmp_path: Path, command: list[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(VERSION_4)
    (run / "recipe.toml").write_text('name = "old"\nprompts.count = 8\nvllm.memory_share = 0.5\n')
    check_refused(run, command, "version 4")
    assert sorted(path.name for path in run.iterdir()) == ["recipe.toml", "run.json"]


def check_refused(run: Path, command: list[str], version: str) -> None:
    result = invoke(*command, run)
    assert (result.code, result.kind, result.out) == (ExitCode.BAD_DATA, "unsupported_version", ""), result.err
    assert str(run / "run.json") in result.err
    assert version in result.err
    assert result.err.count("error: ") == 1


def test_run_of_version_4_does_not_hide_other_runs(tmp_path: Path, stored: Path, monkeypatch) -> None:
    (tmp_path / "runs/old").mkdir(parents=True)
    (tmp_path / "runs/old/run.json").write_text(VERSION_4)
    (tmp_path / "runs/old/recipe.toml").write_text("prompts.count = 8\n")
    stored.rename(tmp_path / "runs/new")
    monkeypatch.chdir(tmp_path)
    result = invoke("list", "runs", "--json")
    assert result.code == 0, result.err
    assert [row["run"] for row in result.json()["runs"]] == ["runs/new"]
    assert "runs/old/run.json" in result.err

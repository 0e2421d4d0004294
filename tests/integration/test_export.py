"""`opdctl run export`: the file holds what the run has stored, and an update can be computed from it alone."""

import json
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.commands import invoke

from opdctl.artifacts.records import Response
from opdctl.errors import ExitCode
from opdctl.runs.run import Run


@pytest.fixture
def exported(finished_run: Path, tmp_path: Path) -> tuple[Run, Path]:
    path = tmp_path / "responses.parquet"
    result = invoke("run", "export", finished_run, path, "--json")
    run = Run.load(finished_run)
    expected = {"file": str(path), "responses": 16, "steps": [0, 1]}
    assert result.json().items() >= expected.items(), result.err
    return run, path


def test_rows_are_those_of_the_artifacts(exported: tuple[Run, Path]) -> None:
    run, path = exported
    rows = pq.read_table(path).to_pylist()
    stages = [(step, run.rollout_stage(step)) for step in (0, 1)]
    stored = [(step, row) for step, stage in stages for row in stage.read_all(Response)]
    assert len(rows) == len(stored) == 16
    for row, (step, response) in zip(rows, stored, strict=True):
        assert (row["step"], row["sample_id"], row["teacher"]) == (step, response.sample_id, "teacher")
        assert row["response_ids"] == response.response_ids.tolist()
        assert np.array_equal(np.float32(row["student_logprobs"]), response.logprobs)
        assert row["response"] == run.student.tokenizer.decode(response.response_ids)
        assert {len(row[name]) for name in ("student_logprobs", "teacher_logprobs", "weights")} == {
            len(row["response_ids"])
        }
        gold = row["answer"]
        text = run.student.tokenizer.decode(response.response_ids, skip_special_tokens=True)
        assert row["extracted"] == (text.rpartition(">")[2] if ">" in text else None)
        assert row["correct"] == (row["extracted"] == gold)
        assert row["teacher_prompt_ids"] is row["sampling_logprobs"] is row["reference_logprobs"] is None


def test_metrics_of_an_update_follow_from_the_file(exported: tuple[Run, Path]) -> None:
    run, path = exported
    rows = datasets.Dataset.from_parquet(str(path), cache_dir=str(path.parent / "cache"))
    for step in (0, 1):
        own = [row for row in rows if row["step"] == step]
        student, teacher, weights = (
            np.concatenate([row[name] for row in own]).astype(np.float64)
            for name in ("student_logprobs", "teacher_logprobs", "weights")
        )
        metrics = run.update(step)["metrics"]
        assert metrics["weight"] == pytest.approx(weights.mean(), rel=1e-5)
        assert metrics["abs_advantage_p90"] == pytest.approx(np.quantile(abs(teacher - student), 0.9), rel=1e-5)
        assert metrics["k1"] == pytest.approx((student - teacher).mean(), abs=1e-4)


def test_metadata_name_format_scorers_weight_and_recipe(exported: tuple[Run, Path]) -> None:
    run, path = exported
    metadata = pq.read_schema(path).metadata
    assert metadata[b"opdctl.format"] == b"responses 1"
    scorer = json.loads(metadata[b"opdctl.scorers"])["teacher"]
    assert (scorer["name"], scorer["model"], scorer["engine"]) == (
        "toy:teacher",
        run.digests["teacher"],
        "transformers",
    )
    assert metadata[b"opdctl.weight"].startswith(b"iw_opd")
    assert metadata[b"opdctl.recipe"].decode() == run.recipe.to_toml()


@pytest.mark.parametrize(
    ("name", "options", "kind", "code", "words"),
    [
        ("there.parquet", [], "unusable_output", ExitCode.USAGE, "exists"),
        ("new.csv", [], "unusable_output", ExitCode.USAGE, "must end in .parquet"),
        ("new.parquet", ["--step", 9], "missing_input", ExitCode.FAILED, "step 9 is not sampled and scored"),
    ],
)
def test_refusals_write_nothing(
    finished_run: Path, tmp_path: Path, name: str, options: list[object], kind: str, code: ExitCode, words: str
) -> None:
    (tmp_path / "there.parquet").write_text("mine")
    result = invoke("run", "export", finished_run, tmp_path / name, *options)
    assert (result.kind, result.code) == (kind, code)
    assert words in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["there.parquet"]
    assert (tmp_path / "there.parquet").read_text() == "mine"


def test_corrupt_part_leaves_no_file(finished_copy: Path, tmp_path: Path) -> None:
    part = next((finished_copy / "step-00001/teacher").glob("part-*"))
    part.write_bytes(part.read_bytes()[:-1])
    result = invoke("run", "export", finished_copy, tmp_path / "new.parquet")
    assert result.kind in ("checksum_mismatch", "corrupt_artifact")
    assert not list(tmp_path.glob("*.parquet*"))

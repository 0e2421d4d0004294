"""`opdctl eval` from end to end: its target, the protocol, resuming, workers, and the models of a run."""

import importlib.metadata
import json
import re
import shlex
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from helpers.commands import QUICKSTART, ROOT, contents, has_plan, invoke, sets
from helpers.evaluations import SHORT_EVAL, TRANSFORMERS, evaluate_toy, evaluation_path

from opdctl.artifacts import files, leases
from opdctl.artifacts.records import GradedResponse, sample_seed
from opdctl.artifacts.stage_dir import Fingerprint
from opdctl.artifacts.versions import SCHEMA_VERSION
from opdctl.data.toy import sort12
from opdctl.evaluation.results import load_evaluation


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted evaluation. Read only."""
    output = tmp_path_factory.mktemp("complete")
    assert evaluate_toy("--output", output).code == 0
    return output


def rows_of(output: Path) -> list[GradedResponse]:
    return load_evaluation(evaluation_path(output)).rows()


def summary_of(output: Path) -> dict[str, Any]:
    summary: dict[str, Any] = files.read_json(evaluation_path(output) / "summary.json")
    return summary


# ── A model without a run ────────────────────────────────────────────────────────────────────────────────────────────


def test_model_without_a_run() -> None:
    result = evaluate_toy("--json")
    assert result.code == 0, result.err
    assert sorted(p.name for p in Path().iterdir()) == ["eval"]
    assert result.json()["model"].startswith("toy-student-spread-")
    assert result.json() == summary_of(Path()) | {"schema_version": SCHEMA_VERSION}
    again = evaluate_toy()
    assert again.code == 0
    assert "nothing to do" in again.err


def test_evaluation_of_a_published_student_is_planned_without_a_run() -> None:
    text = (ROOT / "docs" / "eval.md").read_text().replace("\\\n", " ")
    (line,) = re.findall(r"^opdctl (eval --model IW-OPD/.*)$", text, flags=re.MULTILINE)
    result = invoke(*shlex.split(line), "--dry-run", "--json")
    assert has_plan(result), result.err
    assert [each["bench"] for each in result.json()["benches"]] == ["aime24", "aime25", "hmmt25_feb", "hmmt25_nov"]
    for each in result.json()["benches"]:
        assert (each["problems"], each["responses"], each["max_response_tokens"]) == (30, 960, 960 * 16384)


def test_responses_depend_on_the_seed_only(complete: Path, tmp_path: Path) -> None:
    assert evaluate_toy("--output", tmp_path / "same").code == 0
    assert evaluate_toy("--output", tmp_path / "other", "--set", "seed=1").code == 0
    texts = [[row.text for row in rows_of(output)] for output in (complete, tmp_path / "same", tmp_path / "other")]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert len({*texts[0]}) > 12  # each sample of a problem has its seed


def test_summary_agrees_with_the_stored_responses(complete: Path) -> None:
    rows, summary = rows_of(complete), summary_of(complete)
    correct = np.array([row.correct for row in rows]).reshape(6, 4)
    assert 0 < correct.sum() < 24  # otherwise the rest would prove little
    assert summary["avg"] == pytest.approx(correct.mean())
    assert summary["pass_at"]["1"]["mean"] == pytest.approx(correct.mean())
    assert summary["pass_at"]["4"]["mean"] == pytest.approx(correct.any(axis=1).mean())
    assert summary["maj_at"]["1"]["mean"] == pytest.approx(correct.mean())
    assert [*summary["pass_at"]] == [*summary["maj_at"]] == ["1", "2", "4"]
    lengths = [len(row.response_ids) for row in rows]
    assert summary["response_length"] == pytest.approx(np.mean(lengths))
    assert summary["response_lengths"]["max"] == max(lengths)
    assert summary["response_lengths"]["p50"] == pytest.approx(np.median(lengths))
    assert summary["truncated_fraction"] == pytest.approx(np.mean([row.finish_reason == "length" for row in rows]))
    assert sum(summary["verdicts"].values()) == 24
    assert summary["grader_failures"] == []


def test_each_grade_is_that_of_the_stored_text(complete: Path) -> None:
    golds = {problem.id: problem.answer for problem, _ in zip(sort12.problems("test", 0), range(6), strict=False)}
    for row in rows_of(complete):
        assert row.gold == golds[row.problem_id]
        assert row.extracted == row.vote == sort12.extract(row.text)
        assert row.correct == (row.extracted == row.gold)


def test_summary_contains_the_complete_protocol(complete: Path) -> None:
    assert summary_of(complete)["protocol"] == {
        "samples": 4,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_tokens": 160,
        "suffix": "",  # the toy task has no answer format
        "template_arguments": {"enable_thinking": False},
        "limit": 6,
        "grader": "text",
        "seed": 0,
        "engine": "transformers",
        "dtype": "float32",
    }


def test_different_protocol_in_one_directory_is_rejected(complete: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(complete, tmp_path / "copy"))
    result = evaluate_toy("--output", output, "--set", "eval.temperature=0.6")
    assert (result.code, result.kind) == (4, "settings_mismatch")
    assert "eval.temperature 1.0 → 0.6" in result.err


def test_temperature_0_is_deterministic_with_one_sample(tmp_path: Path) -> None:
    settings = (*TRANSFORMERS, "eval.limit=4", "eval.temperature=0")
    for seed, name in enumerate(("one", "other")):
        result = evaluate_toy("--output", tmp_path / name, "--set", f"seed={seed}", settings=settings)
        assert result.code == 0, result.err
    assert [row.text for row in rows_of(tmp_path / "one")] == [row.text for row in rows_of(tmp_path / "other")]
    assert summary_of(tmp_path / "one")["samples"] == 1
    rejected = evaluate_toy(settings=(*settings, "eval.samples=4"))
    assert (rejected.code, rejected.kind) == (2, "invalid_recipe")
    assert "eval.samples" in rejected.err


def test_incorrect_responses_are_shown_with_the_extracted_answer(complete: Path) -> None:
    result = evaluate_toy("--output", complete, "--show-failures", "2")
    incorrect = [row for row in rows_of(complete) if not row.correct]
    assert result.code == 0
    assert result.out.count(", gold '") == 2
    assert f"{incorrect[0].sample_id}: " in result.out
    assert incorrect[0].text in result.out


def test_samples_are_logged(complete: Path) -> None:
    result = evaluate_toy("--output", complete, "--log-samples", "logs/samples.jsonl", "--json")
    assert result.code == 0, result.err
    samples = [json.loads(line) for line in Path("logs/samples.jsonl").read_text().splitlines()]
    problems = [*islice(sort12.problems("test", 0), 6)]
    assert [sample["id"] for sample in samples] == [problem.id for problem in problems]
    assert all(problem.prompt in sample["prompt"] for sample, problem in zip(samples, problems, strict=True))
    assert [sample["gold"] for sample in samples] == [problem.answer for problem in problems]
    summary, rows = result.json(), rows_of(complete)
    assert np.mean([sample["accuracy"] for sample in samples]) == pytest.approx(summary["avg"])
    assert samples[0]["bench"] == "sort12"
    assert samples[0]["model"] == summary["model"]
    assert len(summary["model_digest"]) == 64
    assert [response["sample_id"] for sample in samples for response in sample["responses"]] == [
        r.sample_id for r in rows
    ]
    row, response = rows[0], samples[0]["responses"][0]
    assert response == {
        "sample_id": row.sample_id,
        "seed": sample_seed(0, row.sample_id),
        "text": row.text,
        "extracted": row.extracted,
        "correct": row.correct,
        "verdict": row.verdict,
        "math_verify": None,
        "num_tokens": len(row.response_ids),
        "finish_reason": row.finish_reason,
    }
    refused = evaluate_toy("--output", complete, "--log-samples", "logs")
    assert (refused.code, refused.kind) == (2, "unusable_output")


def test_code_runs_only_if_allowed() -> None:
    result = invoke("eval", "--model", "toy:student", "--bench", "humaneval_plus")
    assert (result.code, result.kind) == (2, "code_execution_disabled")
    assert "--allow-code-execution" in result.err
    assert not Path("eval").exists()


def test_local_file_is_evaluated_under_its_name() -> None:
    Path("mine.csv").write_text("nr,frage,antwort\na,ab,7\nb,cd,8\n")
    columns = ("eval.id_column=nr", "eval.problem_column=frage", "eval.answer_column=antwort", "eval.suffix=")
    options = [word for setting in (*SHORT_EVAL, *columns) for word in ("--set", setting)]
    result = invoke("eval", "--model", "toy:student", "--bench", "mine.csv", *options, "--json")
    assert result.code == 0, result.err
    assert (result.json()["bench"], result.json()["problems"]) == ("mine", 2)
    assert result.json()["verdicts"] == {"no_answer": 8}
    assert result.json()["benchmark"]["source"] == str(Path("mine.csv").resolve())


def test_data_set_of_the_hub_is_evaluated_in_a_run(finished_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its name has a slash and a colon; every command finds the evaluation by it."""
    name, directory = "hub:sorters/sort.it:v1@main", "sorters-sort-it-v1"
    rows = [
        {"q": problem.prompt, "gold": {"text": problem.answer}} for problem in islice(sort12.problems("test", 0), 4)
    ]
    monkeypatch.setattr("datasets.load_dataset", lambda *args, **options: datasets.Dataset.from_list(rows))
    options = [
        *("--bench", name, "--set", "eval.problem_column=q", "--set", "eval.answer_column=gold.text"),
        *("--set", "eval.suffix=", "--set", "eval.grader=text", "--json"),
    ]
    before = contents(finished_copy)
    plan = invoke("eval", finished_copy, *options, "--dry-run")
    assert plan.code == 0, plan.err
    assert (plan.code, plan.json()["benches"][0]["bench"]) == (0, name), plan.err
    assert contents(finished_copy) == before
    for step in ("1", "2"):
        result = invoke("eval", finished_copy, "--step", step, *options)
        assert result.code == 0, result.err
        assert (result.json()["bench"], result.json()["problems"]) == (directory, 4)
        assert result.json()["protocol"]["source"] == name
    steps = [finished_copy / "eval" / directory / f"step-{step:05d}" for step in (1, 2)]
    assert invoke("compare", *steps, "--bench", name, "--json").json()["evaluations"][0]["bench"] == directory
    assert invoke("compare", *steps, "--bench", directory).code == 0
    assert f"eval {directory}" in invoke("status", finished_copy).out
    other = invoke("eval", finished_copy, "--step", "2", *options, "--set", "eval.split=train")
    assert (other.code, other.kind) == (4, "settings_mismatch")
    assert "eval.split" in other.err


@pytest.mark.parametrize("grader", ["mathematics", "math-verify"])
def test_summary_has_the_verdicts_of_math_verify(grader: str) -> None:
    Path("mine.csv").write_text("problem,answer\nab,7\n")
    options = [
        word for setting in (*SHORT_EVAL, "eval.suffix=", f"eval.grader={grader}") for word in ("--set", setting)
    ]
    summary = invoke("eval", "--model", "toy:student", "--bench", "mine.csv", *options, "--json").json()
    assert (summary["avg_math_verify"], summary["math_verify_differences"]) == (0.0, 0)
    assert summary["protocol"]["grader"] == grader


def test_evaluation_that_was_graded_by_older_rules_is_not_continued() -> None:
    Path("mine.csv").write_text("problem,answer\nab,7\n")
    options = [word for setting in (*SHORT_EVAL, "eval.suffix=") for word in ("--set", setting)]
    command = ("eval", "--model", "toy:student", "--bench", "mine.csv", *options)
    assert invoke(*command).code == 0
    (path,) = Path("eval/mine").glob("*/manifest.json")
    manifest = files.read_json(path)
    assert manifest["settings"].pop("eval.grader_version") == 3
    assert manifest["logprob_metadata"]["math-verify"] == importlib.metadata.version("math-verify")
    manifest["fingerprint"] = Fingerprint(manifest["settings"], manifest["inputs"]).digest
    files.write_json(path, manifest)
    result = invoke(*command)
    assert (result.code, result.kind) == (4, "settings_mismatch")
    assert "eval.grader_version None → 3" in result.err


def test_workers_share_the_parts(complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", 0.1)
    name, output = evaluation_path(complete).name, tmp_path / "run"
    with leases.hold_lease(output / "eval" / "sort12", f"{name}-part-00001"):
        first = evaluate_toy("--output", output)
        assert first.code == 0, first.err
        assert "wrote 2 parts" in first.err
        assert not (evaluation_path(output) / "summary.json").exists()
    second = evaluate_toy("--output", output)
    assert second.code == 0, second.err
    assert contents(output) == contents(complete)


# ── The models of a run ──────────────────────────────────────────────────────────────────────────────────────────────


def test_student_is_selected_by_run_and_step(finished_copy: Path) -> None:
    shutil.rmtree(finished_copy / "eval")
    for step, options in ((1, ["--step", "1"]), (2, [])):
        result = invoke("eval", "--run", finished_copy, *options, "--json")
        assert result.code == 0, result.err
        assert result.json()["model"] == f"step-{step:05d}"


def test_default_is_the_newest_student_of_the_newest_run(finished_run: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "runs" / "small", ignore=shutil.ignore_patterns("eval"))
    result = invoke("eval", "--json")
    assert result.json()["model"] == "step-00002"
    assert f"using the newest run, {Path('runs/small')}" in result.err
    teacher = invoke("eval", "--model", "teacher", "--json")
    assert teacher.json()["model"] == "teacher"


def test_other_model_is_evaluated_under_the_protocol_of_the_run(finished_copy: Path) -> None:
    result = invoke("eval", "--run", finished_copy, "--model", "toy:student-spread", "--json")
    assert result.code == 0, result.err
    assert result.json()["protocol"]["max_tokens"] == 40
    assert (finished_copy / "eval" / "sort12" / result.json()["model"]).is_dir()


def test_step_of_another_model_is_rejected(finished_run: Path) -> None:
    result = invoke("eval", "--run", finished_run, "--model", "teacher", "--step", "1")
    assert (result.code, result.kind) == (2, "invalid_usage")


@pytest.mark.parametrize("is_chat", [False, True], ids=["text", "chat"])
def test_contamination_of_the_training_prompts_is_reported(tmp_path: Path, is_chat: bool) -> None:
    problems = [problem for problem, _ in zip(sort12.problems("test", 0), range(8), strict=False)]
    prompts = [{"prompt": problem.prompt} for problem in problems[:3]]
    prompts += [{"prompt": problem.prompt} for problem, _ in zip(sort12.problems("train", 0), range(13), strict=False)]
    if is_chat:
        prompts = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in prompts]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    options = sets("prompts.source=prompts.jsonl", "prompts.limit=16", "eval.limit=8", "eval.max_tokens=5")
    assert invoke("rollout", "--recipe", QUICKSTART, *options, "--output", tmp_path / "run").code == 0
    result = invoke("eval", "--run", tmp_path / "run", "--json")
    overlap = result.json()["benchmark"]["contamination"]
    assert (overlap["prompts"], overlap["problems"], overlap["overlapping"], overlap["contaminated"]) == (16, 8, 3, 3)
    assert set(overlap["fractions"]) == {problem.id for problem in problems[:3]}
    assert "the training prompts contain 3 of its 8 problems" in " ".join(result.err.split())


def test_description_of_a_benchmark_is_reused(finished_copy: Path) -> None:
    path = finished_copy / "eval" / "sort12" / "benchmark.json"
    stored = files.read_json(path)
    marked = stored | {"description": stored["description"] | {"source": "marked"}}
    files.write_json(path, marked)
    result = invoke("eval", "--run", finished_copy, "--model", "toy:student-spread", "--json")
    assert result.json()["benchmark"] == marked["description"]

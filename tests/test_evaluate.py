"""eval, the stage: whose model, under which protocol, killed or sharded or not - the same responses and summary."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import QUICKSTART, Result, invoke, sets

from opdctl.artifacts import files, stage_dir
from opdctl.artifacts.records import GradedResponse
from opdctl.data.toy import sort12

ENGINE = ("rollout.engine=transformers", "student.dtype=float32", "eval.max_tokens=160")
SMALL = (*ENGINE, "eval.limit=6", "eval.samples=4", "eval.num_parts=3")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def evaluate(*args: object, model: str = "toy:student-spread", settings: tuple[str, ...] = SMALL) -> Result:
    """Evaluate a model that is of no run on the embedded task."""
    options = [word for setting in settings for word in ("--set", setting)]
    return invoke("eval", "--model", model, "--bench", "sort12", *options, *args)


def folder_of(output: Path, bench: str = "sort12") -> Path:
    (found,) = (path for path in (output / "eval" / bench).iterdir() if path.is_dir())
    return found


def rows_of(output: Path) -> list[GradedResponse]:
    return stage_dir.read_stage_rows(folder_of(output), GradedResponse)


def run_files(output: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(output)): p.read_bytes()
        for p in sorted(output.rglob("*"))
        if p.is_file() and p.suffix != ".lock"
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed evaluation. Tests only read it."""
    output = tmp_path_factory.mktemp("whole")
    assert evaluate("--output", output).code == 0
    return output


def summary_of(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = files.read_json(folder_of(output) / "summary.json")
    return found


# ── A model without a run ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_model_needs_no_run_and_begins_none() -> None:
    result = evaluate("--json")
    assert result.code == 0, result.err
    assert sorted(p.name for p in Path().iterdir()) == ["eval"]
    assert result.json()["model"].startswith("toy-student-spread-")
    assert result.json() == summary_of(Path())
    again = evaluate()
    assert again.code == 0
    assert "nothing to do" in again.err


def test_the_same_seeds_give_the_same_responses_and_others_others(whole: Path, tmp_path: Path) -> None:
    assert evaluate("--output", tmp_path / "same").code == 0
    assert evaluate("--output", tmp_path / "other", "--set", "seed=1").code == 0
    texts = [[row.text for row in rows_of(output)] for output in (whole, tmp_path / "same", tmp_path / "other")]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert len({*texts[0]}) > 12  # samples of a problem have seeds of their own


def test_the_summary_says_what_the_stored_responses_say(whole: Path) -> None:
    rows, summary = rows_of(whole), summary_of(whole)
    right = np.array([row.correct for row in rows]).reshape(6, 4)
    assert 0 < right.sum() < 24  # or the rest would prove little
    assert summary["avg"] == pytest.approx(right.mean())
    assert summary["pass_at"]["1"]["mean"] == pytest.approx(right.mean())
    assert summary["pass_at"]["4"]["mean"] == pytest.approx(right.any(axis=1).mean())
    assert summary["maj_at"]["1"]["mean"] == pytest.approx(right.mean())
    assert [*summary["pass_at"]] == [*summary["maj_at"]] == ["1", "2", "4"]
    lengths = [len(row.response_ids) for row in rows]
    assert summary["response_length"] == pytest.approx(np.mean(lengths))
    assert summary["response_lengths"]["max"] == max(lengths)
    assert summary["response_lengths"]["p50"] == pytest.approx(np.median(lengths))
    assert summary["truncated_fraction"] == pytest.approx(np.mean([row.finish_reason == "length" for row in rows]))
    assert sum(summary["verdicts"].values()) == 24
    assert summary["grader_failures"] == []


def test_each_row_s_grade_is_that_of_its_own_text(whole: Path) -> None:
    golds = {problem.id: problem.answer for problem, _ in zip(sort12.problems("test", 0), range(6), strict=False)}
    for row in rows_of(whole):
        assert row.gold == golds[row.problem_id]
        assert row.extracted == row.vote == sort12.extract(row.text)
        assert row.correct == (row.extracted == row.gold)


def test_every_part_of_the_protocol_is_written_down(whole: Path) -> None:
    assert summary_of(whole)["protocol"] == {
        "samples": 4,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_tokens": 160,
        "suffix": "",  # the embedded task asks for no box
        "template_arguments": {"enable_thinking": False},
        "problems": 6,
        "grader": "text",
        "seed": 0,
        "engine": "transformers",
        "dtype": "float32",
    }


def test_another_protocol_on_the_same_folder_is_refused(whole: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(whole, tmp_path / "copy"))
    result = evaluate("--output", output, "--set", "eval.temperature=0.6")
    assert result.code == 4
    assert "eval.temperature 1.0 → 0.6" in result.err


def test_at_temperature_0_one_sample_is_enough_and_always_the_same(tmp_path: Path) -> None:
    settings = (*ENGINE, "eval.limit=4", "eval.temperature=0")
    for name in ("one", "other"):
        result = evaluate("--output", tmp_path / name, "--set", f"seed={len(name)}", settings=settings)
        assert result.code == 0, result.err
    assert [row.text for row in rows_of(tmp_path / "one")] == [row.text for row in rows_of(tmp_path / "other")]
    assert summary_of(tmp_path / "one")["samples"] == 1
    refused = evaluate(settings=(*settings, "eval.samples=4"))
    assert refused.code == 2
    assert "at temperature 0 all samples are the same" in refused.err


def test_wrong_responses_are_shown_with_what_was_read(whole: Path) -> None:
    result = evaluate("--output", whole, "--show-failures", "2")
    wrong = [row for row in rows_of(whole) if not row.correct]
    assert result.code == 0
    assert result.err.count(", gold '") == 2
    assert f"{wrong[0].sample_id}: " in result.err
    assert wrong[0].text in result.err


def test_code_is_not_run_unless_allowed() -> None:
    result = invoke("eval", "--model", "toy:student", "--bench", "humaneval_plus")
    assert result.code == 2
    assert "--allow-code-execution" in result.err
    assert not Path("eval").exists()


def test_a_file_of_one_s_own_is_evaluated_under_its_own_name() -> None:
    Path("mine.csv").write_text("nr,frage,antwort\na,ab,7\nb,cd,8\n")
    columns = ("eval.id_column=nr", "eval.problem_column=frage", "eval.answer_column=antwort", "eval.suffix=")
    options = [word for setting in (*SMALL, *columns) for word in ("--set", setting)]
    result = invoke("eval", "--model", "toy:student", "--bench", "mine.csv", *options, "--json")
    assert result.code == 0, result.err
    assert (result.json()["bench"], result.json()["problems"]) == ("mine", 2)
    assert result.json()["verdicts"] == {"no_answer": 8}
    assert result.json()["benchmark"]["source"] == str(Path("mine.csv").resolve())


# ── Shards and kills ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_shards_make_what_one_process_makes(whole: Path, tmp_path: Path) -> None:
    first = evaluate("--output", tmp_path / "run", "--shard", "1/2")
    assert first.code == 0, first.err
    assert "the summary comes with the last shard's parts" in first.err
    assert not (folder_of(tmp_path / "run") / "summary.json").exists()
    assert evaluate("--output", tmp_path / "run", "--shard", "0/2").code == 0
    assert run_files(tmp_path / "run") == run_files(whole)


def evaluated_until(output: Path, kill_at: int | None) -> int:
    """Evaluate in a forked process that is killed just before its `kill_at`-th file appears; return its wait status."""
    child = os.fork()
    if child == 0:
        replace, count = os.replace, 0

        def counted(*args: Any) -> None:
            nonlocal count
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            replace(*args)

        os.replace = counted  # type: ignore[assignment]
        os._exit(evaluate("--output", output).code)
    return os.waitpid(child, 0)[1]


def test_killed_at_any_moment_and_started_again_it_ends_with_the_same_files(whole: Path, tmp_path: Path) -> None:
    moments = 0
    while os.WIFSIGNALED(evaluated_until(output := tmp_path / f"killed-{moments}", moments)):
        assert evaluated_until(output, None) == 0, moments
        assert run_files(output) == run_files(whole), moments
        moments += 1
    assert moments >= 9  # three parts with a receipt each, work, manifest, benchmark and summary


# ── A run's models ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run") / "runs" / "small"
    settings = sets("eval.max_tokens=40", "rollout.max_tokens=40")
    result = invoke("train", "--recipe", QUICKSTART, *settings, "--output", path)
    assert result.code == 0, result.err
    return path


def test_a_run_s_student_is_chosen_by_run_and_step(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    for step, options in ((1, ["--step", "1"]), (2, [])):
        result = invoke("eval", "--run", copy, *options, "--json")
        assert result.code == 0, result.err
        assert result.json()["model"] == f"step-{step:05d}"


def test_with_neither_the_newest_run_s_student_is_taken_and_said(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "runs" / "small")
    result = invoke("eval", "--json")
    assert result.json()["model"] == "step-00002"
    assert f"using the newest run, {Path('runs/small')}" in result.err
    teacher = invoke("eval", "--model", "teacher", "--json")
    assert teacher.json()["model"] == "teacher"


def test_another_model_is_evaluated_under_the_run_s_protocol(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    result = invoke("eval", "--run", copy, "--model", "toy:student-spread", "--json")
    assert result.code == 0, result.err
    assert result.json()["protocol"]["max_tokens"] == 40
    assert (copy / "eval" / "sort12" / result.json()["model"]).is_dir()


def test_training_prompts_that_are_a_benchmark_s_problems_are_reported(tmp_path: Path) -> None:
    taken = [problem for problem, _ in zip(sort12.problems("test", 0), range(8), strict=False)]
    prompts = [{"prompt": problem.prompt} for problem in taken[:3]]
    prompts += [{"prompt": problem.prompt} for problem, _ in zip(sort12.problems("train", 0), range(13), strict=False)]
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    options = sets("prompts.source=prompts.jsonl", "prompts.limit=16", "eval.limit=8", "eval.max_tokens=5")
    assert invoke("rollout", "--recipe", QUICKSTART, *options, "--output", tmp_path / "run").code == 0
    result = invoke("eval", "--run", tmp_path / "run", "--json")
    found = result.json()["benchmark"]["contamination"]
    assert (found["prompts"], found["problems"], found["overlapping"], found["seen"]) == (16, 8, 3, 3)
    assert set(found["shares"]) == {problem.id for problem in taken[:3]}
    assert "the training prompts hold 3 of its 8 problems" in " ".join(result.err.split())
    # the student evaluated next does not look again
    (tmp_path / "run" / "eval" / "sort12" / "benchmark.json").touch()
    assert (
        invoke("eval", "--run", tmp_path / "run", "--model", "teacher", "--json").json()["benchmark"]
        == (result.json()["benchmark"])
    )

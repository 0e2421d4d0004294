"""Sampling settings from end to end: rollouts from another distribution, and evaluations as model cards recommend."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.commands import QUICKSTART, contents, invoke, sets
from helpers.engines import directory
from helpers.evaluations import TRANSFORMERS, evaluate_toy, evaluation_path
from helpers.thinking import END_OF_THINK, save_thinking_model
from helpers.training import train

from opdctl import console
from opdctl.artifacts import files
from opdctl.artifacts.records import EvalPrompt, Response
from opdctl.artifacts.tables import read_rows
from opdctl.data.toy import sort12
from opdctl.engines.base import ScoreRequest
from opdctl.engines.transformers import TransformersEngine
from opdctl.evaluation.results import load_evaluation
from opdctl.recipe.schema import Score
from opdctl.runs.run import Run

MODIFIED = (
    "rollout.max_tokens=40",
    "rollout.engine=transformers",
    "rollout.temperature=0.8",
    "rollout.sampling_top_k=20",
    "rollout.repetition_penalty=1.2",
    "rollout.stop=[' 9 9']",
)
CARD = ("eval.temperature=0.7", "eval.top_p=0.8", "eval.top_k=20", "eval.min_p=0.01", "eval.presence_penalty=0.5")


@pytest.fixture(scope="module")
def modified_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("modified") / "run"
    console.warn_once.cache_clear()  # the words of another test in this process
    result = train(path, *MODIFIED, "train.steps=2")
    assert result.code == 0, result.err
    words = " ".join(result.err.split())
    assert words.count("rollout: temperature, repetition_penalty, sampling_top_k: the responses are not sampled") == 1
    assert "tokens that are cut off have no correction" in words
    return path


def test_two_columns_of_logprobs_are_stored(modified_run: Path) -> None:
    responses = Run.load(modified_run).rollout_stage(0).read_all(Response)
    engine = TransformersEngine(directory("toy:student"), "cpu")
    scores = engine.score([ScoreRequest(r.prompt_ids, r.response_ids) for r in responses], Score(), lambda n: None)
    for response, own in zip(responses, scores, strict=True):
        np.testing.assert_allclose(response.logprobs, own.logprobs, rtol=0, atol=1e-4)
        assert response.sampling_logprobs is not None
        assert len(response.sampling_logprobs) == len(response.response_ids)
        assert np.isfinite(response.sampling_logprobs).all()
    manifest = Run.load(modified_run).rollout_stage(0).manifest()
    assert manifest is not None
    assert manifest["logprob_metadata"]["logprobs"].startswith("raw")
    assert manifest["logprob_metadata"]["sampling_logprobs"].startswith("processed")
    difference = np.concatenate([r.logprobs - r.sampled_logprobs for r in responses])
    assert np.abs(difference).mean() > 0.01


def test_correction_is_large_where_the_mismatch_of_engine_and_trainer_is_not(modified_run: Path) -> None:
    metrics = Run.load(modified_run).update(0)["metrics"]
    assert metrics["effective_sample_size"] < 0.999
    assert abs(metrics["rollout_correction"] - 1) > 1e-3
    assert abs(metrics["mismatch_kl"]) < 1e-6


def test_run_from_another_distribution_continues(modified_run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(modified_run, tmp_path / "copy"))
    before = contents(copy / "step-00001")
    assert invoke("train", copy, *sets("train.steps=3")).code == 0
    assert contents(copy / "step-00001") == before
    refused = invoke("train", copy, *sets("train.steps=3", "rollout.temperature=0.9"))
    assert (refused.code, refused.kind) == (4, "recipe_mismatch")


def test_files_of_a_default_run_have_no_second_column(finished_run: Path) -> None:
    names = {name for path in finished_run.glob("step-*/rollout/*.parquet") for name in pq.read_schema(path).names}
    assert "logprobs" in names
    assert "sampling_logprobs" not in names


def test_plan_lists_the_sampling_settings(tmp_path: Path) -> None:
    arguments = ("train", "--recipe", QUICKSTART, "--output", tmp_path / "run", "--dry-run")
    console.warn_once.cache_clear()
    result = invoke(*arguments, *sets(*MODIFIED))
    words = " ".join((result.out + result.err).split())
    assert "temperature = 0.8, repetition_penalty = 1.2, sampling_top_k = 20, stop = [' 9 9']" in words
    assert "not sampled from the student's own distribution" in words
    default, modified = (invoke(*arguments, "--json", *sets(*each)).json() for each in (MODIFIED[:2], MODIFIED))
    assert (default["sampling"], modified["sampling"]["sampling_top_k"]) == ({}, 20)
    assert (
        modified["rollout_bytes_per_step"] - default["rollout_bytes_per_step"] == 4 * 40 * default["responses_per_step"]
    )


def test_evaluation_by_a_model_card(tmp_path: Path) -> None:
    settings = (*TRANSFORMERS, "eval.limit=6", "eval.samples=2", "eval.max_tokens=160", *CARD)
    result = evaluate_toy("--output", tmp_path, settings=settings)
    assert result.code == 0, result.err
    protocol = files.read_json(evaluation_path(tmp_path) / "summary.json")["protocol"]
    chosen = {"top_k": 20, "min_p": 0.01, "presence_penalty": 0.5, "temperature": 0.7}
    assert protocol | chosen == protocol
    assert not {"stop", "stop_token_ids", "repetition_penalty", "frequency_penalty"} & protocol.keys()
    again = evaluate_toy("--output", tmp_path, settings=(*settings, "eval.top_k=0"))
    assert (again.code, again.kind) == (4, "settings_mismatch")
    assert "eval.top_k" in again.err
    plan = evaluate_toy("--output", tmp_path, "--dry-run", settings=settings)
    assert "top_k = 20" in " ".join((plan.out + plan.err).split())


def test_graded_text_ends_before_the_stop_string(tmp_path: Path) -> None:
    settings = (*TRANSFORMERS, "eval.limit=6", "eval.samples=2", "eval.max_tokens=160")
    complete, stopped = tmp_path / "complete", tmp_path / "stopped"
    assert evaluate_toy("--output", complete, settings=settings).code == 0
    rows = load_evaluation(evaluation_path(complete)).rows()
    stop = rows[0].text[20:23]
    assert evaluate_toy("--output", stopped, settings=(*settings, f"eval.stop=['{stop}']")).code == 0
    assert files.read_json(evaluation_path(stopped) / "summary.json")["protocol"]["stop"] == [stop]
    for before, after in zip(rows, load_evaluation(evaluation_path(stopped)).rows(), strict=True):
        assert after.text == before.text.partition(stop)[0]
        assert after.response_ids.tolist() == before.response_ids.tolist()[: len(after.response_ids)]
        if stop in before.text:
            assert after.finish_reason == "stop"
            assert len(after.response_ids) < len(before.response_ids) or before.text.endswith(stop)


def test_thinking_is_ended_after_its_budget(tmp_path: Path) -> None:
    model, output = save_thinking_model(tmp_path / "thinker"), tmp_path / "out"
    settings = (*TRANSFORMERS, "eval.limit=4", "eval.samples=2", "eval.max_tokens=90", "eval.max_thinking_tokens=30")
    arguments = ("eval", "--model", model, "--bench", "sort12", "--output", output)
    result = invoke(*arguments, *sets(*settings, "eval.end_thinking=</think>"))
    assert result.code == 0, result.err
    assert "thinking was ended in " in result.out
    summary = files.read_json(evaluation_path(output) / "summary.json")
    assert summary["protocol"] | {"max_thinking_tokens": 30, "end_thinking": "</think>"} == summary["protocol"]
    rows = load_evaluation(evaluation_path(output)).rows()
    ended = [row for row in rows if row.ended_thinking is not None]
    assert summary["ended_thinking_fraction"] == len(ended) / len(rows) > 0
    for row in ended:
        assert row.ended_thinking is not None
        assert row.ended_thinking.tolist() == [30, 31]
        assert row.response_ids[30] == END_OF_THINK
        assert 31 < len(row.response_ids) <= 90
        assert "</think>" in row.text
    assert summary["response_length"] == np.mean([len(row.response_ids) for row in rows])
    again = invoke(*arguments, *sets(*settings, "eval.end_thinking=</think>"))
    assert "nothing to do" in again.err
    plan = invoke(*arguments, *sets(*settings, "eval.end_thinking=</think>"), "--dry-run")
    assert "max_thinking_tokens = 30" in " ".join((plan.out + plan.err).split())
    plain = evaluate_toy(
        "--output", tmp_path / "plain", "--dry-run", settings=(*settings, "eval.end_thinking=</think>")
    )
    assert (plain.code, plain.kind) == (2, "unsupported_setting")


def test_files_of_a_default_evaluation_have_no_column_of_ended_thinking(tmp_path: Path) -> None:
    assert evaluate_toy("--output", tmp_path, settings=(*TRANSFORMERS, "eval.limit=2", "eval.samples=1")).code == 0
    (*_, part) = evaluation_path(tmp_path).glob("part-*.parquet")
    assert "ended_thinking" not in pq.read_schema(part).names
    assert "ended_thinking_fraction" not in files.read_json(evaluation_path(tmp_path) / "summary.json")


def test_examples_precede_each_problem(tmp_path: Path) -> None:
    examples, output = tmp_path / "examples.jsonl", tmp_path / "out"
    problems = [problem for problem, _ in zip(sort12.problems("test", 0), range(5), strict=False)]
    rows = [{"problem": each.prompt, "answer": each.answer} for each in problems]
    examples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = (*TRANSFORMERS, "eval.limit=3", "eval.samples=1", "eval.max_tokens=30", "eval.few_shot=2")
    settings = (*settings, f"eval.few_shot_file={examples}")
    result = evaluate_toy("--output", output, settings=settings)
    assert result.code == 0, result.err
    protocol = files.read_json(evaluation_path(output) / "summary.json")["protocol"]
    assert protocol | {"few_shot": 2, "few_shot_file": str(examples)} == protocol
    (path,) = (evaluation_path(output) / "prompts").glob("*.parquet")
    stored, tokenizer = read_rows(path, EvalPrompt), directory("toy:student-spread").tokenizer
    for number, row in enumerate(stored):
        shots = [each for each in problems if each != problems[number]][:2]
        expected = "".join(each.prompt + each.answer for each in shots) + problems[number].prompt
        assert tokenizer.decode(row.prompt_ids) == expected
    examples.write_text("".join(json.dumps(row) + "\n" for row in reversed(rows)))
    changed = evaluate_toy("--output", output, settings=settings)
    assert (changed.code, changed.kind) == (4, "settings_mismatch")
    assert "few_shot = 2" in " ".join((evaluate_toy("--dry-run", settings=settings).out).split())
    examples.unlink()
    missing = evaluate_toy("--output", tmp_path / "other", "--dry-run", settings=settings)
    assert missing.kind == "missing_file"

"""Faults that need no killed process: moved runs, clocks that jump, memory that ends, NaN, changed models and data."""

import itertools
import json
import os
import shutil
import stat
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import QUICKSTART, Result, artifacts, invoke, sets
from safetensors.numpy import load_file, save_file

from opdctl.artifacts import tables
from opdctl.artifacts.records import Response, TokenScores
from opdctl.engines.transformers import TransformersEngine
from opdctl.errors import ExitCode
from opdctl.models.directory import find_or_download
from opdctl.recipe.schema import Model
from opdctl.runs.run import Run
from opdctl.training import trainer


def train(output: Path, *overrides: str) -> Result:
    return invoke("train", "--recipe", QUICKSTART, *sets("rollout.max_tokens=40", *overrides), "--output", output)


def test_no_file_is_world_writable_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        assert train(tmp_path / "run", "train.steps=1").code == 0
    finally:
        os.umask(before)
    assert [path for path in (tmp_path / "run").rglob("*") if path.stat().st_mode & stat.S_IWOTH] == []


# ── Places and clocks ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_copied_or_moved_run_ends_bit_identical(tmp_path: Path) -> None:
    assert train(tmp_path / "run", "train.steps=1").code == 0
    shutil.copytree(tmp_path / "run", tmp_path / "other place" / "copy", copy_function=shutil.copyfile)
    (tmp_path / "run").rename(tmp_path / "moved")
    for path in (tmp_path / "other place" / "copy", tmp_path / "moved"):
        assert invoke("status", path, "--verify").code == 0
        assert train(path, "train.steps=2").code == 0
    assert artifacts(tmp_path / "moved") == artifacts(tmp_path / "other place" / "copy")


@pytest.mark.parametrize("jump", [-(10**9), 10**9])
def test_clocks_that_jump_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: int) -> None:
    """The clock jumps by thirty years between two calls, and files have times of another machine."""
    assert train(tmp_path / "run", "train.steps=1").code == 0
    for path in (tmp_path / "run").rglob("*"):
        os.utime(path, (path.stat().st_mtime + jump / 2,) * 2)
    clock, calls = time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: clock() + (jump if next(calls) % 2 else -jump))
    assert train(tmp_path / "run", "train.steps=2").code == 0
    monkeypatch.undo()
    assert [train(tmp_path / "whole", f"train.steps={steps}").code for steps in (1, 2)] == [0, 0]
    assert artifacts(tmp_path / "run") == artifacts(tmp_path / "whole")
    assert invoke("status", tmp_path / "run", "--verify").code == 0


# ── Memory ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def memory_for(tokens: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let forward passes in training fail as in torch beyond `tokens` tokens; return the sizes that were tried."""
    tried, states = [], trainer.response_states

    def limited(model: Any, ids_BT: Any, *others: Any) -> Any:
        tried.append(ids_BT.numel())
        if ids_BT.numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return states(model, ids_BT, *others)

    monkeypatch.setattr(trainer, "response_states", limited)
    return tried


def test_out_of_memory_halves_the_micro_batches_and_leaves_the_update_unchanged(tmp_path: Path, monkeypatch) -> None:
    settings = ("train.updates_per_step=2", "train.tokens_per_micro_batch=4000")
    assert train(tmp_path / "whole", *settings).code == 0
    with monkeypatch.context() as patch:
        tried = memory_for(120, patch)
        result = train(tmp_path / "run", *settings)
    assert result.code == 0, result.err
    assert result.err.count("warning: out of memory") == 2  # 424, 212, 106 tokens
    assert "106 tokens" in result.err
    assert [size for size in tried if size > 120] == [424, 212]  # the second step starts with the size that sufficed
    one, other = (Run.load(tmp_path / name) for name in ("whole", "run"))
    for step in (0, 1):
        found, wanted = other.update(step)["metrics"], one.update(step)["metrics"]
        for name in ("loss", "ratio", "k1", "grad_norm", "tokens"):
            assert found[name] == pytest.approx(wanted[name], rel=1e-4), name
    whole, cut = (load_file(run.student_path(2) / "model.safetensors") for run in (one, other))
    assert max(float(abs(whole[name] - cut[name]).max()) for name in whole) < 1e-5


def test_too_little_memory_for_one_response_is_one_error(tmp_path: Path, monkeypatch) -> None:
    memory_for(10, monkeypatch)
    result = train(tmp_path / "run")
    assert (result.code, result.kind) == (ExitCode.UNAVAILABLE, "out_of_memory")
    assert result.err.count("warning: out of memory") <= 6
    assert "micro-batches of 1 responses" in result.err
    assert "train.gradient_checkpointing" in result.err
    monkeypatch.undo()
    assert train(tmp_path / "run").code == 0


def test_engine_without_memory_names_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(TransformersEngine, "stream_completions", fail)
    result = train(tmp_path / "run")
    assert (result.code, result.kind) == (ExitCode.UNAVAILABLE, "out_of_memory")
    assert "rollout.batch_size" in result.err


# ── Values that are not finite ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def invalid(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the third response of each step have a NaN, and the teacher's scores of the fifth be too short."""
    complete, score = TransformersEngine.stream_completions, TransformersEngine.stream_scores

    def completed(self: Any, *arguments: Any, **options: Any) -> Any:
        for number, completion in complete(self, *arguments, **options):
            if number == 2:
                completion.logprobs[1] = np.nan
            yield number, completion

    def scored(self: Any, *arguments: Any, **options: Any) -> Any:
        for number, scores in score(self, *arguments, **options):
            yield number, TokenScores(scores.logprobs[:-1]) if number == 4 else scores

    monkeypatch.setattr(TransformersEngine, "stream_completions", completed)
    monkeypatch.setattr(TransformersEngine, "stream_scores", scored)
    return ["train.steps=1", "rollout.num_parts=1"]


def test_invalid_response_stops_the_run_with_its_id_and_position(tmp_path: Path, invalid: list[str]) -> None:
    result = train(tmp_path / "run", *invalid)
    assert (result.code, result.kind) == (ExitCode.BAD_DATA, "nonfinite_value")
    name = Run.load(tmp_path / "run").samples(0)[2][0]
    assert f"{name}: logprobs of the student at position 1: nan" in result.err
    assert "train.max_invalid_responses" in result.err


def test_invalid_responses_are_skipped_up_to_the_bound_and_counted(tmp_path: Path, invalid) -> None:
    refused = train(tmp_path / "one", *invalid, "train.max_invalid_responses=1")
    assert refused.code == ExitCode.BAD_DATA
    assert "logprobs of the teacher" in refused.err
    result = train(tmp_path / "two", *invalid, "train.max_invalid_responses=2")
    assert result.code == 0, result.err
    assert result.err.count("this response is skipped") == 2
    metrics = Run.load(tmp_path / "two").update(0)["metrics"]
    assert (metrics["responses"], metrics["invalid_responses"]) == (6, 2)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_non_finite_loss_or_gradient_stops_before_the_optimizer(tmp_path: Path, monkeypatch, where: str) -> None:
    assert train(tmp_path / "run", "train.steps=1").code == 0
    before = artifacts(tmp_path / "run")
    over = trainer.map_vocab_chunks

    def broken(*arguments: Any, **options: Any) -> Any:
        loss = over(*arguments, **options)
        return loss * float("nan") if where == "loss" else loss * torch.tensor(float("inf"))[None].expand(1).sqrt()[0]

    monkeypatch.setattr(trainer, "map_vocab_chunks", broken)
    result = train(tmp_path / "run", "train.steps=2")
    assert (result.code, result.kind) == (ExitCode.BAD_DATA, "nonfinite_value")
    assert "the loss is" in result.err
    assert "sort12-" in result.err
    assert str(tmp_path / "run/student/step-00001") in result.err
    found = artifacts(tmp_path / "run")
    assert {name: data for name, data in found.items() if "step-00001/" not in name or name in before} == before
    monkeypatch.undo()
    assert train(tmp_path / "run", "train.steps=2").code == 0


def model(folder: Path, **config: Any) -> Path:
    """Return a copy of the toy student with other settings in its config."""
    path = Path(shutil.copytree(find_or_download(Model(model="toy:student"), "student.model"), folder))
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**settings, **config}))
    return path


def test_responses_of_one_end_token_are_valid_and_counted(tmp_path: Path) -> None:
    path = model(tmp_path / "model")
    (path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": list(range(29))})
    )  # any token ends a response
    result = train(tmp_path / "run", f"student.model={path}", "train.steps=1")
    assert result.code == 0, result.err
    metrics = Run.load(tmp_path / "run").update(0)["metrics"]
    assert (metrics["response_length"], metrics["truncated_fraction"]) == (1, 0)


def test_rows_of_the_output_matrix_without_a_token_are_masked_and_reported_once(tmp_path: Path) -> None:
    path = model(tmp_path / "model", vocab_size=64)
    weights = load_file(path / "model.safetensors")
    matrix = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = np.concatenate(
        [matrix, np.full((64 - len(matrix), matrix.shape[1]), 9.0, "f4")]
    )
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    first = train(tmp_path / "run", f"student.model={path}", "train.steps=1")
    assert first.code == 0, first.err
    assert first.err.count(f"{len(matrix)} ids for 64 rows (those beyond are masked)") == 1
    assert train(tmp_path / "plain", "train.steps=1").code == 0
    rows = [
        tables.read_rows(run / "step-00000/rollout/part-00000-of-00002.parquet", Response)
        for run in (tmp_path / "run", tmp_path / "plain")
    ]
    assert [row.response_ids.tolist() for row in rows[0]] == [row.response_ids.tolist() for row in rows[1]]
    for one, other in zip(*rows, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
    assert "64 rows" not in train(tmp_path / "run", f"student.model={path}", "train.steps=2").err


# ── Models and data of others ─────────────────────────────────────────────────────────────────────────────────────────


def test_code_of_a_model_runs_only_if_the_recipe_allows_it_and_is_reported_each_time(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    path = model(
        tmp_path / "model", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"}, model_type="own"
    )
    (path / "own.py").write_text(
        "from transformers import Qwen3Config, Qwen3ForCausalLM\n"
        f"open({str(ran)!r}, 'a').close()\n"
        "class Own(Qwen3Config):\n    model_type = 'own'\n"
        "class Model(Qwen3ForCausalLM):\n    config_class = Own\n"
    )
    common = (f"student.model={path}", "train.steps=1")
    refused = train(tmp_path / "run", *common)
    assert refused.code in (ExitCode.USAGE, ExitCode.BAD_DATA)
    assert str(path) in refused.err
    assert "Traceback" not in refused.err
    assert not ran.exists()
    for _ in range(2):
        allowed = train(tmp_path / "trusted", *common, "student.trust_remote_code=true")
        assert f"trust_remote_code is on: code in {path} will run" in allowed.err
    assert ran.exists()


def test_changed_prompts_are_refused_and_removed_ones_are_not_needed(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    rows = [json.dumps({"prompt": f"{letters}?"}) for letters in ("dbca", "cab", "ba", "abc", "bd", "dc", "ca", "ad")]
    path.write_text("\n".join(rows))
    common = (f"prompts.source={path}", "prompts.limit=8")
    assert train(tmp_path / "run", *common, "train.steps=1").code == 0
    path.write_text("\n".join(rows[::-1]))
    result = train(tmp_path / "run", *common, "train.steps=2")
    assert (result.code, result.kind) == (ExitCode.RECIPE_MISMATCH, "source_mismatch")
    assert str(path) in result.err
    path.unlink()
    assert invoke("train", "--output", tmp_path / "run", "--set", "train.steps=2").code == 0


def test_gold_answer_that_cannot_be_parsed_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("id,problem,answer\ngood,ab?,7\nbad,ba?,\\frac{1\n")
    settings = ("eval.max_tokens=4", "eval.samples=1", "eval.suffix=", "rollout.engine=transformers")
    options = [word for setting in settings for word in ("--set", setting)]
    result = invoke("eval", "--model", "toy:student", "--bench", path, *options, "--output", tmp_path)
    assert result.code == 0, result.err
    assert "mine: 1 gold answers could not be parsed; only an exact match counts: bad" in " ".join(result.err.split())

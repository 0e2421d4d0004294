"""Faults: kills, power cuts, errors at any call, full and read-only disks, clocks that jump, memory that ends, NaN."""

import itertools
import json
import os
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import faults
from helpers.commands import QUICKSTART, ROOT, Result, artifacts, invoke, sets
from helpers.faults import power_cut, system_error
from safetensors.numpy import load_file, save_file

from opdctl.artifacts import files, leases, tables
from opdctl.artifacts.records import Response, TokenScores
from opdctl.engines.transformers import TransformersEngine
from opdctl.errors import ExitCode
from opdctl.pipeline import plan
from opdctl.runs.run import load_run
from opdctl.training import trainer


@pytest.fixture(autouse=True)
def claims_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness makes them short-lived."""
    monkeypatch.setattr(leases, "LEASE_SECONDS", leases.LEASE_SECONDS)
    monkeypatch.setattr(leases, "HEARTBEAT_SECONDS", leases.HEARTBEAT_SECONDS)


def test_three_workers_a_stage_under_kills_make_the_student_of_an_undisturbed_chain(tmp_path: Path) -> None:
    told = faults.kill(tmp_path, 6, 0, 2, ("rollout.prompts_per_step=12",))  # which stage each hits is the clock's
    assert told.startswith("6 kills (")


@pytest.mark.parametrize(("fault", "start"), [(power_cut, 0), (power_cut, 4), (system_error, 2), (system_error, 7)])
def test_after_a_fault_at_a_write_rename_or_flush_a_rerun_ends_the_same(fault, start, tmp_path):
    """Every ninth, from two starts; the harness does all of them."""
    assert "each time a rerun ended the same" in faults.fail_at_calls(tmp_path, fault, start, stride=9)


# ── Disks ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", place], check=True)


def fill(place: Path, left: int) -> Path:
    """Fill a disk up, but for `left` bytes."""
    ballast = place / "ballast"
    ballast.write_bytes(bytes(files.free_space(place) - left))
    return ballast


def train(output: Path, *overrides: str) -> Result:
    return invoke("train", "--recipe", QUICKSTART, *sets("rollout.max_tokens=40", *overrides), "--output", output)


def test_a_step_that_surely_does_not_fit_is_refused_before_it_begins(disk: Path) -> None:
    assert train(disk / "run", "train.steps=1").code == 0
    ballast = fill(disk, 2**20)  # a student of 0.4 MiB and a state of 1.3 MiB need more
    result = train(disk / "run", "train.steps=2")
    assert result.code == ExitCode.UNAVAILABLE
    assert "the next student, with the state to go on from, needs 1.7 MiB of disk space, " in result.err
    assert not (disk / "run/step-00001").exists()
    ballast.unlink()
    assert train(disk / "run", "train.steps=2").code == 0


@pytest.mark.parametrize("left", [2**12, 2**14, 2**19, 2**20])
def test_a_disk_that_runs_full_loses_nothing_that_is_finished(
    disk: Path, tmp_path: Path, monkeypatch, left: int
) -> None:
    """Of real calls: in the responses, in the trainer state, or in the student; then there is room, and it goes on."""
    assert train(disk / "run", "train.steps=1").code == 0
    before = artifacts(disk / "run")
    fill(disk, left)
    monkeypatch.setattr(plan, "check_space", lambda run, stages: None)  # as if something else had filled the disk since
    result = train(disk / "run", "train.steps=2", "train.keep_latest=9")
    assert result.code == ExitCode.UNAVAILABLE, result.err
    assert ": the disk is full: " in result.err or "lock: cannot be written: No space left on device" in result.err
    assert "Traceback" not in result.err
    assert not list(disk.rglob(".tmp-*"))
    found = artifacts(disk / "run")
    assert {name: found[name] for name in before} == before
    remount(disk, "size=32m")
    assert train(disk / "run", "train.steps=2", "train.keep_latest=9").code == 0
    assert train(tmp_path / "whole", "train.steps=1").code == 0
    assert train(tmp_path / "whole", "train.steps=2", "train.keep_latest=9").code == 0
    assert artifacts(disk / "run") == artifacts(tmp_path / "whole")


def test_of_a_run_on_a_read_only_disk_the_state_is_told_and_nothing_else_is_tried(disk: Path) -> None:
    assert train(disk / "run", "train.steps=1").code == 0
    remount(disk, "ro")
    assert invoke("status", disk / "run", "--verify").code == 0
    for command in (["train", "--set", "train.steps=2", "--output"], ["rollout", "--output"], ["analyze-position"]):
        result = invoke(*command, disk / "run")
        assert result.code in (0, ExitCode.UNAVAILABLE)
        assert "nothing to do" in result.err or "cannot be written: Read-only file system" in result.err, result.err


def test_nothing_is_writable_to_all_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        assert train(tmp_path / "run", "train.steps=1").code == 0
    finally:
        os.umask(before)
    assert [path for path in (tmp_path / "run").rglob("*") if path.stat().st_mode & stat.S_IWOTH] == []


# ── Places and clocks ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_directory_that_was_copied_elsewhere_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    assert train(tmp_path / "run", "train.steps=1").code == 0
    shutil.copytree(tmp_path / "run", tmp_path / "other place" / "copy", copy_function=shutil.copyfile)
    (tmp_path / "run").rename(tmp_path / "moved")
    for path in (tmp_path / "other place" / "copy", tmp_path / "moved"):
        assert invoke("status", path, "--verify").code == 0
        assert train(path, "train.steps=2").code == 0
    assert artifacts(tmp_path / "moved") == artifacts(tmp_path / "other place" / "copy")


@pytest.mark.parametrize("jump", [-(10**9), 10**9])
def test_clocks_that_jump_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: int) -> None:
    """Thirty years, between two calls and within one; the files' times too, as if another machine had written them."""
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


# ── Memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def memory_for(tokens: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let a forward pass in training fail as torch does beyond so many tokens; return the sizes that were tried."""
    tried, states = [], trainer.response_states

    def limited(model: Any, ids_BT: Any, *others: Any) -> Any:
        tried.append(ids_BT.numel())
        if ids_BT.numel() > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return states(model, ids_BT, *others)

    monkeypatch.setattr(trainer, "response_states", limited)
    return tried


def test_out_of_memory_halves_the_micro_batches_and_the_step_stays_the_same(tmp_path: Path, monkeypatch) -> None:
    settings = ("train.updates_per_step=2", "train.tokens_per_micro_batch=4000")
    assert train(tmp_path / "whole", *settings).code == 0
    with monkeypatch.context() as patch:
        tried = memory_for(120, patch)
        result = train(tmp_path / "run", *settings)
    assert result.code == 0, result.err
    assert result.err.count("out of memory: going on with half as large micro-batches") == 2  # 424, 212, 106 tokens
    assert "of 106 tokens at most" in result.err
    assert [size for size in tried if size > 120] == [424, 212]  # the second step begins with what was enough
    one, other = (load_run(tmp_path / name) for name in ("whole", "run"))
    for step in (0, 1):
        found, wanted = other.update(step)["metrics"], one.update(step)["metrics"]
        for name in ("loss", "ratio", "k1", "grad_norm", "tokens"):
            assert found[name] == pytest.approx(wanted[name], rel=1e-4), name
    whole, cut = (load_file(run.student_path(2) / "model.safetensors") for run in (one, other))
    assert max(float(abs(whole[name] - cut[name]).max()) for name in whole) < 1e-5


def test_memory_for_not_even_one_response_is_one_clear_error(tmp_path: Path, monkeypatch) -> None:
    memory_for(10, monkeypatch)
    result = train(tmp_path / "run")
    assert result.code == ExitCode.UNAVAILABLE
    assert result.err.count("going on with half") <= 6
    assert "out of memory in an update, with micro-batches of 1 responses" in result.err
    assert "train.gradient_checkpointing" in result.err
    monkeypatch.undo()
    assert train(tmp_path / "run").code == 0


def test_an_engine_without_memory_names_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(TransformersEngine, "generate", fail)
    result = train(tmp_path / "run")
    assert result.code == ExitCode.UNAVAILABLE
    assert "error: out of memory" in result.err
    assert "rollout.batch_size" in result.err


# ── Numbers that are none ────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def spoiling(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Have the student's third response of each step hold a NaN, and the teacher say too little of the fifth."""
    generate, score = TransformersEngine.generate, TransformersEngine.score

    def generated(self: Any, *arguments: Any, **options: Any) -> Any:
        found = generate(self, *arguments, **options)
        found[2].logprobs[1] = np.nan
        return found

    def scored(self: Any, answered: Any, *others: Any) -> Any:
        found = score(self, answered, *others)
        found[4] = TokenScores(found[4].logprobs[:-1])
        return found

    monkeypatch.setattr(TransformersEngine, "generate", generated)
    monkeypatch.setattr(TransformersEngine, "score", scored)
    return ["train.steps=1", "rollout.num_parts=1"]


def test_a_spoilt_response_stops_the_run_by_name_and_position(tmp_path: Path, spoiling: list[str]) -> None:
    result = train(tmp_path / "run", *spoiling)
    assert result.code == ExitCode.BAD_DATA
    name = load_run(tmp_path / "run").samples(0)[2][0]
    assert f"{name}: the student's logprobs at position 1 is nan" in result.err
    assert "train.max_invalid_responses" in result.err


def test_as_many_spoilt_responses_as_the_recipe_allows_are_left_out_and_counted(tmp_path: Path, spoiling) -> None:
    refused = train(tmp_path / "one", *spoiling, "train.max_invalid_responses=1")
    assert refused.code == ExitCode.BAD_DATA
    assert "logprobs of the teacher" in refused.err
    result = train(tmp_path / "two", *spoiling, "train.max_invalid_responses=2")
    assert result.code == 0, result.err
    assert result.err.count("this response is left out") == 2
    metrics = load_run(tmp_path / "two").update(0)["metrics"]
    assert (metrics["responses"], metrics["invalid_responses"]) == (6, 2)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_no_number_stops_before_the_optimizer(
    tmp_path: Path, monkeypatch, where: str
) -> None:
    assert train(tmp_path / "run", "train.steps=1").code == 0
    before = artifacts(tmp_path / "run")
    over = trainer.map_vocab_chunks

    def broken(*arguments: Any) -> Any:
        loss = over(*arguments)
        return loss * float("nan") if where == "loss" else loss * torch.tensor(float("inf"))[None].expand(1).sqrt()[0]

    monkeypatch.setattr(trainer, "map_vocab_chunks", broken)
    result = train(tmp_path / "run", "train.steps=2")
    assert result.code == ExitCode.BAD_DATA
    assert f"the {where if where == 'loss' else 'loss'} is" in result.err
    assert "sort12-" in result.err
    assert "nothing of this step was kept" in result.err
    assert f"the last student is whole: {tmp_path / 'run/student/step-00001'}" in result.err
    found = artifacts(tmp_path / "run")
    assert {name: data for name, data in found.items() if "step-00001/" not in name or name in before} == before
    monkeypatch.undo()
    assert train(tmp_path / "run", "train.steps=2").code == 0


def model(folder: Path, name: str = "student", **config: Any) -> Path:
    """Return a copy of an embedded model, with other settings in its config."""
    path = Path(shutil.copytree(ROOT / f"opdctl/tasks/models/{name}", folder))
    settings = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**settings, **config}))
    return path


def test_responses_of_nothing_but_an_end_are_legal_and_counted(tmp_path: Path) -> None:
    path = model(tmp_path / "model")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(29))}))  # whatever is drawn
    result = train(tmp_path / "run", f"student.model={path}", "train.steps=1")
    assert result.code == 0, result.err
    metrics = load_run(tmp_path / "run").update(0)["metrics"]
    assert (metrics["response_length"], metrics["truncated_fraction"]) == (1, 0)


def test_a_matrix_of_more_rows_than_tokens_is_masked_and_said_once(tmp_path: Path) -> None:
    path = model(tmp_path / "model", vocab_size=64)
    weights = load_file(path / "model.safetensors")
    matrix = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = np.concatenate(
        [matrix, np.full((64 - len(matrix), matrix.shape[1]), 9.0, "f4")]
    )
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    first = train(tmp_path / "run", f"student.model={path}", "train.steps=1")
    assert first.code == 0, first.err
    assert first.err.count(f"student: of 64 rows of its output matrix the tokenizer knows {len(matrix)}") == 1
    assert train(tmp_path / "plain", "train.steps=1").code == 0
    rows = [
        tables.read_rows(run / "step-00000/rollout/part-00000-of-00002.parquet", Response)
        for run in (tmp_path / "run", tmp_path / "plain")
    ]
    assert [row.response_ids.tolist() for row in rows[0]] == [row.response_ids.tolist() for row in rows[1]]
    for one, other in zip(*rows, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
    assert "rows of its output matrix" not in train(tmp_path / "run", f"student.model={path}", "train.steps=2").err


# ── What comes with models and data ──────────────────────────────────────────────────────────────────────────────────


def test_code_that_comes_with_a_model_runs_only_when_the_recipe_says_so_and_is_said_each_time(tmp_path: Path) -> None:
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
        told = train(tmp_path / "trusted", *common, "student.trust_remote_code=true")
        assert f"trust_remote_code is on: code that comes with {path} will run" in told.err
    assert ran.exists()


def test_prompts_that_changed_under_the_run_are_refused_and_removed_ones_are_not_missed(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    rows = [json.dumps({"prompt": f"{letters}?"}) for letters in ("dbca", "cab", "ba", "abc", "bd", "dc", "ca", "ad")]
    path.write_text("\n".join(rows))
    common = (f"prompts.source={path}", "prompts.limit=8")
    assert train(tmp_path / "run", *common, "train.steps=1").code == 0
    path.write_text("\n".join(rows[::-1]))
    result = train(tmp_path / "run", *common, "train.steps=2")
    assert result.code == ExitCode.RECIPE_MISMATCH
    assert str(path) in result.err
    path.unlink()
    assert invoke("train", "--output", tmp_path / "run", "--set", "train.steps=2").code == 0


def test_a_gold_answer_that_equals_no_answer_is_named_when_it_is_evaluated(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("id,problem,answer\ngood,ab?,7\nbad,ba?,\\frac{1\n")
    settings = ("eval.max_tokens=4", "eval.samples=1", "eval.suffix=", "rollout.engine=transformers")
    options = [word for setting in settings for word in ("--set", setting)]
    result = invoke("eval", "--model", "toy:student", "--bench", path, *options, "--output", tmp_path)
    assert result.code == 0, result.err
    assert "mine: 1 gold answers can only be met word for word: bad" in " ".join(result.err.split())

"""Engines and trainer on a pretend GPU: every tensor is on its device, and the numbers are those of the CPU."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers.commands import QUICKSTART, sets
from helpers.on_device import (
    TRAINING,
    assert_same_columns,
    call_with_fault,
    compiled_train_step,
    gather_offloaded_head,
    run_command,
    sample_and_score,
    sample_and_score_by_graphs,
    score_by_base,
    score_first_step,
    train_step,
)
from helpers.pretend_gpu import DEVICE, TESTED_TORCH, process_with_pretend_gpu

from opdctl.runs.run import Run
from opdctl.runs.scored_responses import read_scored

pytestmark = pytest.mark.skipif(
    not torch.__version__.startswith(TESTED_TORCH),
    reason=f"the pretend GPU uses private functions of torch {TESTED_TORCH}, and this is {torch.__version__}",
)
ROUNDING = 1e-5
"""Relative, of sums in float32: attention on the pretend GPU is the plain formula, and fused on the CPU."""
ENTROPY_AND_TOP_K = {"entropy": True, "top_k": 3}


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    """Calls functions in a process with the pretend GPU."""
    with process_with_pretend_gpu(tmp_path_factory.mktemp("package")) as call:
        yield call


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    return score_first_step(tmp_path_factory.mktemp("scored") / "run")


@pytest.mark.parametrize(
    ("sampling", "columns", "settings"),
    [
        ({"temperature": 0.7, "top_p": 0.9}, {}, ENTROPY_AND_TOP_K),
        ({"top_k": 9, "min_p": 0.01, "repetition_penalty": 1.1, "presence_penalty": 0.5, "stop": ["0 1"]}, {}, {}),
        ({}, {}, {"hidden_states": True}),
        ({}, ENTROPY_AND_TOP_K, {"student_top_k": True}),
    ],
)
def test_engine_gives_the_numbers_of_the_cpu(gpu, sampling, columns, settings):
    arguments = ("float32", sampling, columns, settings)
    completions, scores = gpu(sample_and_score, DEVICE, *arguments)
    expected_completions, expected_scores = sample_and_score("cpu", *arguments)
    assert_same_columns(completions, expected_completions, ROUNDING)
    assert_same_columns(scores, expected_scores, ROUNDING)


def test_engine_with_emulated_cuda_graphs_gives_the_numbers_of_the_cpu(gpu):
    completions, scores, replays = gpu(sample_and_score_by_graphs, DEVICE)
    expected_completions, expected_scores = sample_and_score("cpu", "float32", {}, {}, {})
    assert_same_columns(completions, expected_completions, ROUNDING)
    assert_same_columns(scores, expected_scores, ROUNDING)
    assert replays > 0


@pytest.mark.parametrize("overrides", TRAINING.values(), ids=TRAINING)
def test_training_step_gives_the_numbers_of_the_cpu(gpu, scored, tmp_path, overrides):
    for device in ("cpu", DEVICE):
        shutil.copytree(scored, tmp_path / device)
    metrics, student = gpu(train_step, DEVICE, tmp_path / DEVICE, *overrides)
    check_step(metrics, student, *train_step("cpu", tmp_path / "cpu", *overrides))


def check_step(metrics, student, expected_metrics, expected_student):
    for name, value in expected_metrics.items():
        if not name.endswith(("seconds", "per_second", "memory_gib")):
            assert metrics[name] == pytest.approx(value, rel=ROUNDING, abs=ROUNDING), name
    for name, tensor in expected_student.items():
        # AdamW's first update has the size of the learning rate, 2e-4, however small and rounded the gradient is.
        torch.testing.assert_close(student[name], tensor, rtol=0, atol=4e-5)


def test_compiled_step_gives_the_numbers_of_the_cpu(gpu, scored, tmp_path):
    overrides = ("train.gradient_checkpointing=true",)
    for device in ("cpu", DEVICE):
        shutil.copytree(scored, tmp_path / device)
    metrics, student, num_graphs = gpu(compiled_train_step, DEVICE, tmp_path / DEVICE, *overrides)
    assert num_graphs > 0
    check_step(metrics, student, *train_step("cpu", tmp_path / "cpu", *overrides))


@pytest.mark.parametrize("overrides", [(), ("train.cpu_offload=true",)])
def test_base_of_a_student_scores_the_numbers_of_the_cpu(gpu, scored, tmp_path, overrides):
    """They are the log-probs that the initial student had when it sampled the responses."""
    scores = gpu(score_by_base, DEVICE, shutil.copytree(scored, tmp_path / "run"), *overrides)
    for score, sample in zip(scores, read_scored(Run.load(scored), 0), strict=True):
        np.testing.assert_allclose(score.logprobs, sample.response.logprobs, atol=1e-4)


def test_offloaded_output_matrix_is_gathered_on_the_gpu(gpu):
    devices, gradient, expected = gpu(gather_offloaded_head, DEVICE)
    assert devices == [DEVICE, DEVICE, "cpu"]
    torch.testing.assert_close(gradient, expected)


def test_all_stages_run_in_bfloat16(gpu, tmp_path):
    overrides = ("student.dtype=bfloat16", "teacher.dtype=bfloat16", "rollout.max_tokens=8", "train.steps=1")
    overrides += ("rollout.prompts_per_step=4", "eval.every_steps=1", "eval.limit=2", "eval.max_tokens=4")
    # So that two engines fit on the GPU: neither has to end for the other, and to start again.
    overrides += ("vllm.gpu_memory_utilization=0.3",)
    result = gpu(run_command, DEVICE, "train", "--recipe", QUICKSTART, *sets(*overrides), "--output", tmp_path / "run")
    assert result.code == 0, result.err
    (metrics,) = (json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    assert 0 < metrics["mismatch_kl"] < 1e-3


@pytest.mark.parametrize(
    ("faulty", "function"),
    [("opdctl.engines.transformers.pad_batch", sample_and_score), ("opdctl.training.microbatches._join", train_step)],
)
def test_a_tensor_left_on_the_cpu_is_detected(gpu, scored, tmp_path, faulty, function):
    run = shutil.copytree(scored, tmp_path / "run")
    arguments = (run,) if function is train_step else ("float32", {}, {}, {})
    with pytest.raises(RuntimeError, match="same device"):
        gpu(call_with_fault, faulty, function, DEVICE, *arguments)

"""Training with torchrun: several processes train the student of one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.commands import QUICKSTART, invoke, sets
from helpers.models import SMALL, save
from helpers.training import SHORT, max_difference, train, weights
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from opdctl.runs.run import Run

# Three micro-batches or more: the ranks get several each, and one of them a filler.
SETTINGS = (*SHORT, "train.steps=3", "train.tokens_per_micro_batch=160")
LORA = ("lora.rank=4", "lora.alpha=8.0")


def torchrun(output: Path, *overrides: str, processes: int = 2, check: bool = True) -> subprocess.CompletedProcess:
    """Train with several processes, as a user would."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    words = ["-m", "opdctl", "train", "--recipe", QUICKSTART, *sets(*overrides), "--output", output, "--json"]
    done = subprocess.run([*launcher, *map(str, words)], capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def one_process(tmp_path_factory) -> Path:
    """Three steps by one process."""
    path = tmp_path_factory.mktemp("one") / "run"
    result = train(path, *SETTINGS)
    assert result.code == 0, result.err
    return path


@pytest.fixture(scope="module")
def fourth_step(one_process, tmp_path_factory) -> Path:
    """The run of one process, with a fourth step."""
    path = Path(shutil.copytree(one_process, tmp_path_factory.mktemp("fourth") / "run"))
    assert train(path, *SETTINGS, "train.steps=4").code == 0
    return path


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """The same three steps by two processes, with their output."""
    path = tmp_path_factory.mktemp("two") / "run"
    return path, torchrun(path, *SETTINGS)


@pytest.fixture(scope="module")
def two_processes(launched) -> Path:
    return launched[0]


def test_two_processes_train_the_student_of_one(one_process, two_processes):
    """After three steps no parameter differs by 1e-5: only the order of float32 sums differs."""
    for step in (1, 2, 3):
        assert max_difference(weights(one_process, step), weights(two_processes, step)) < 1e-5
    assert max_difference(weights(one_process, 1), weights(one_process, 3)) > 1e-4


def test_two_processes_report_the_metrics_of_one(one_process, two_processes):
    expected, metrics = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (one_process, two_processes)
    )
    assert len(expected) == len(metrics) == 3
    for expected_step, step in zip(expected, metrics, strict=True):
        assert expected_step.keys() == step.keys()
        for name in step:
            if not name.endswith(("_seconds", "_per_second", "_gib")):
                assert step[name] == pytest.approx(expected_step[name], rel=1e-3, abs=1e-5), name


def test_weights_of_two_processes_by_their_own_log_probs_are_those_of_one(tmp_path):
    """A weight relative to all responses of the step, whose log-probs each process computes for its own ones."""
    settings = (*SETTINGS, "weight.name=prefix_ratio", "weight.alpha=0.1", "weight.logprobs=trainer")
    settings += ("weight.times={name='prefix_only', fraction=0.5}", "train.denominator=selected")
    assert train(tmp_path / "one", *settings).code == 0
    torchrun(tmp_path / "two", *settings)
    assert max_difference(weights(tmp_path / "one", 3), weights(tmp_path / "two", 3)) < 1e-5
    one, two = ((tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two"))
    assert json.loads(one[0])["weight"] == pytest.approx(json.loads(two[0])["weight"], rel=1e-5)


def test_both_processes_save_shards_and_one_prints(launched):
    path, done = launched
    assert len(done.stdout.splitlines()) == 1
    for step in (1, 2, 3):
        assert done.stderr.count(f"step {step - 1} ({step} of 3)") == 1
    shards = [file.name[:11] for file in (path / "trainer/step-00003").glob("*.safetensors")]
    assert set(shards) == {"shard-00001", "shard-00002"}
    assert invoke("status", path, "--verify").code == 0


def test_one_process_resumes_a_run_of_two(two_processes, fourth_step, tmp_path):
    run = Path(shutil.copytree(two_processes, tmp_path / "run"))
    result = train(run, *SETTINGS, "train.steps=4")
    assert result.code == 0, result.err
    assert max_difference(weights(fourth_step, 4), weights(run, 4)) < 1e-5
    assert [path.name for path in (run / "trainer/step-00004").glob("*.safetensors")] == [
        "shard-00001-of-00001.safetensors"
    ]


def test_two_processes_resume_a_run_of_one(one_process, fourth_step, tmp_path):
    run = Path(shutil.copytree(one_process, tmp_path / "run"))
    torchrun(run, *SETTINGS, "train.steps=4")
    assert max_difference(weights(fourth_step, 4), weights(run, 4)) < 1e-5


def test_failure_of_one_process_ends_both_and_is_reported_once(two_processes, tmp_path):
    run = Path(shutil.copytree(two_processes, tmp_path / "run"))
    student = run / "student/step-00003/model.safetensors"
    student.write_bytes(student.read_bytes()[:-1])
    done = torchrun(run, *SETTINGS, "train.steps=4", check=False)
    assert done.returncode != 0
    assert "student/step-00003" in done.stderr
    assert done.stderr.count("Traceback (most recent call last)") == 1  # torchrun's own
    assert not (run / "step-00003/update.json").exists()


def test_error_before_training_is_reported_once(tmp_path):
    done = torchrun(tmp_path / "run", "student.model=toy:nobody", check=False)
    assert done.returncode != 0
    assert done.stderr.count("toy:nobody") == 1


def test_cpu_offload_trains_the_same_student(one_process, tmp_path):
    """With torchrun, since it creates a process group."""
    torchrun(tmp_path / "run", *SETTINGS, "train.cpu_offload=true", processes=1)
    assert max_difference(weights(one_process, 3), weights(tmp_path / "run", 3)) < 1e-5


def test_two_processes_train_the_adapter_of_one(tmp_path):
    """The reference is their base, so they score it together."""
    settings = (*SETTINGS, *LORA, "train.extrapolation=1.5")
    assert train(tmp_path / "one", *settings).code == 0
    torchrun(tmp_path / "two", *settings)
    assert Run.load(tmp_path / "two").score_stage(2, "reference").manifest()["logprob_metadata"]["engine"] == "trainer"
    assert max_difference(weights(tmp_path / "one", 3), weights(tmp_path / "two", 3)) < 1e-5


def test_two_processes_train_the_adapters_of_experts_of_one(tmp_path):
    torch.manual_seed(0)
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 16}
    config = Qwen3MoeConfig(**SMALL, **experts, tie_word_embeddings=True)
    student = f"student.model={save(Qwen3MoeForCausalLM(config), tmp_path / 'student')}"
    settings = (*SETTINGS, *LORA, student, "train.router_replay=true", "rollout.engine=transformers")
    assert train(tmp_path / "one", *settings).code == 0
    torchrun(tmp_path / "two", *settings)
    first, one, two = (weights(tmp_path / name, step) for name, step in (("one", 1), ("one", 3), ("two", 3)))
    assert max_difference(one, two) < 1e-5
    experts = [name for name in one if ".experts." in name]
    assert len(experts) == 2 * 3 * 3
    assert all((first[name] != one[name]).any() for name in experts)

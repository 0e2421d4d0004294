"""An engine compared with the trainer: on responses (pipeline.max_logprob_rms), in training, by a student's probe."""

from pathlib import Path

import numpy as np
import pytest
from helpers.commands import QUICKSTART, invoke, rewrite_json, sets
from helpers.training import SHORT, train

from opdctl.artifacts.records import TokenScores
from opdctl.engines.transformers import TransformersEngine
from opdctl.errors import ExitCode
from opdctl.models.directory import ModelDir
from opdctl.models.held_weights import digest_held_weights
from opdctl.registry import ENGINES
from opdctl.runs.run import Run


class Biased(TransformersEngine):
    """An engine whose log-probs are 0.1 nat off."""

    def stream_scores(self, *arguments, **options):
        for number, found in super().stream_scores(*arguments, **options):
            yield number, TokenScores(found.logprobs - np.float32(0.1))


@pytest.fixture
def biased():
    ENGINES.register("biased")(lambda model, place: Biased(model, place.device))
    yield
    del ENGINES._factories["biased"]


@pytest.mark.parametrize(("bound", "code"), [(0.05, ExitCode.BAD_DATA), (0.2, 0), (0, 0)])
def test_engine_beyond_the_bound_is_refused_before_it_writes(biased, tmp_path, bound, code):
    overrides = sets("score.engine=biased", f"pipeline.max_logprob_rms={bound}", "train.steps=1")
    result = invoke("train", "--recipe", QUICKSTART, *overrides, "--output", tmp_path / "run")
    assert result.code == code, result.err
    assert ("RMS 0.1, max 0.1 nats" in result.err) == (bound > 0)
    if code:
        assert result.kind == "logprob_mismatch"
        assert "pipeline.max_logprob_rms" in result.err
        assert not list((tmp_path / "run/step-00000/teacher").glob("part-*"))


def test_every_step_reports_the_mismatch_of_engine_and_trainer(finished_run):
    metrics = Run.load(finished_run).update(0)["metrics"]
    assert metrics["mismatch_ratio"] == pytest.approx(1, abs=1e-4)
    assert 0 <= metrics["mismatch_kl"] < 1e-6
    assert metrics["effective_sample_size"] == pytest.approx(1, abs=1e-4)
    assert "rollout_correction_squared" not in metrics


# ── A student's probe, and the digest of the weights that an engine holds ────────────────────────────────────────────


class Faulty(TransformersEngine):
    """An engine that fails to take new weights; `fault` of the class says how."""

    fault = "none"

    def load_weights(self, model: ModelDir) -> None:
        old = self._model
        if old is None or self.fault in ("none", "shifted"):  # a new engine has no old weights
            super().load_weights(model)
        elif self.fault == "one tensor":
            kept = old.get_input_embeddings().weight.detach().clone()
            super().load_weights(model)
            self._model.get_input_embeddings().weight.data.copy_(kept)
            self.logprob_metadata["weights"] = digest_held_weights(self._model.state_dict())

    def stream_scores(self, *arguments, **options):
        for number, found in super().stream_scores(*arguments, **options):
            yield number, TokenScores(found.logprobs - np.float32(0.1 * (self.fault == "shifted")))


@pytest.fixture
def faulty(monkeypatch):
    """A function that trains two steps with a student's engine of a fault."""
    ENGINES.names()
    monkeypatch.setitem(ENGINES._factories, "faulty", lambda model, context: Faulty(model, context.device))

    def run(output, fault, *overrides):
        monkeypatch.setattr(Faulty, "fault", fault)
        return train(output, *SHORT, "rollout.engine=faulty", *overrides)

    return run


def rollout(run: Path, step: int) -> list[bytes]:
    return [path.read_bytes() for path in sorted((run / f"step-{step:05d}/rollout").glob("part-*"))]


@pytest.mark.parametrize(
    ("fault", "dtype", "words"),
    [
        ("all tensors", "bfloat16", "it holds the same weights as before"),  # the probe shows no step of this size
        ("one tensor", "float32", "differ from the trainer's by 0."),
    ],
)
def test_engine_that_keeps_old_weights_is_started_anew(faulty, tmp_path, fault, dtype, words):
    good, bad = tmp_path / "good", tmp_path / "bad"
    for output, each in ((good, "none"), (bad, fault)):
        result = faulty(output, each, f"student.dtype={dtype}")
        assert result.code == 0, result.err
        assert ("starting it anew" in result.err) == (words in result.err) == (each == fault)
    assert rollout(good, 1) == rollout(bad, 1)
    metrics = [Run.load(bad).update(step)["metrics"] for step in (0, 1)]
    assert "probe_rms" not in metrics[0]  # the first student was not written by a trainer
    assert metrics[1]["probe_rms"] <= {"float32": 1e-4, "bfloat16": 0.2}[dtype]


def test_update_that_changes_no_weight_starts_no_engine_anew(faulty, tmp_path):
    result = faulty(tmp_path / "run", "none", "train.steps=3", "train.learning_rate=1e-30")
    assert result.code == 0, result.err
    assert result.err.count("starting it anew") <= 1  # the first student was not written by a trainer: it has no probe
    first, *_, last = (Run.load(tmp_path / "run").rollout_stage(step).manifest() for step in range(3))
    assert first["logprob_metadata"]["weights"] == last["logprob_metadata"]["weights"]


def test_new_engine_that_differs_from_the_trainer_stops_the_run(faulty, finished_run, tmp_path):
    output = tmp_path / "run"
    result = faulty(output, "shifted")
    assert (result.code, result.kind) == (ExitCode.BAD_DATA, "logprob_mismatch")
    assert "student/step-00001: in a new engine `faulty` the log-probs of 31 fixed tokens" in result.err
    assert "0.1 nats RMS, at most 0.1; the bound for float32 is 0.001" in result.err
    assert not (output / "step-00001").exists()
    assert faulty(output, "shifted").kind == "logprob_mismatch"  # again, by an engine that has loaded no other student
    assert faulty(output, "none").code == 0
    assert rollout(output, 1) == rollout(finished_run, 1)


def test_known_mismatch_is_accepted_by_its_bound(faulty, tmp_path):
    result = faulty(tmp_path / "run", "shifted", "pipeline.max_logprob_rms=0.2")
    assert result.code == 0, result.err
    assert Run.load(tmp_path / "run").update(1)["metrics"]["probe_rms"] == pytest.approx(0.1, abs=1e-4)


def test_a_new_process_records_the_same_weights(finished_copy):
    run = Run.load(finished_copy)
    before = [run.rollout_stage(step).manifest() for step in (0, 1)]
    digests = [manifest["logprob_metadata"]["weights"] for manifest in before]
    teacher = [run.score_stage(step, "teacher").manifest()["logprob_metadata"]["weights"] for step in (0, 1)]
    assert len({*digests, *teacher}) == 3  # two students and one teacher
    assert before[1]["logprob_metadata"]["probe_rms"] < 1e-4
    for step in (0, 1):
        next((finished_copy / f"step-{step:05d}/rollout").glob("part-00000*")).unlink()
        assert invoke("rollout", "--output", finished_copy, "--step", step).code == 0
    assert [Run.load(finished_copy).rollout_stage(step).manifest() for step in (0, 1)] == before


def test_run_of_an_older_version_has_no_probe(finished_copy):
    for path in finished_copy.glob("step-*/update.json"):
        rewrite_json(path, probe=...)
    assert Run.load(finished_copy).student_at(1).probe is None
    next((finished_copy / "step-00001/rollout").glob("part-00000*")).unlink()
    assert invoke("rollout", "--output", finished_copy, "--step", "1").code == 0
    assert "probe_rms" not in Run.load(finished_copy).rollout_stage(1).manifest()["logprob_metadata"]

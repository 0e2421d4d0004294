"""The check of an engine against the reference log-probs (pipeline.max_logprob_rms), and the mismatch with training."""

import numpy as np
import pytest
from helpers.commands import QUICKSTART, invoke, sets

from opdctl.artifacts.records import TokenScores
from opdctl.engines.transformers import TransformersEngine
from opdctl.errors import ExitCode
from opdctl.registry import ENGINES
from opdctl.runs.run import Run


class Biased(TransformersEngine):
    """An engine whose log-probs are 0.1 nat off."""

    def score(self, *arguments):
        return [TokenScores(found.logprobs - np.float32(0.1)) for found in super().score(*arguments)]


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

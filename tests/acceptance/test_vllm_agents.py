"""Agents with vLLM: its ids and log-probs are those of the student, and its calls arrive while it works."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.agents import ENVIRONMENTS
from helpers.commands import QUICKSTART, invoke, sets

pytest.importorskip("vllm")

from opdctl.artifacts.records import Response
from opdctl.engines.base import ScoreRequest
from opdctl.engines.transformers import TransformersEngine
from opdctl.recipe.schema import Score
from opdctl.runs.run import Run


def test_trajectories_have_the_student_s_logprobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "agent_environments.py").write_text(ENVIRONMENTS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    sys.modules.pop("agent_environments", None)
    run = tmp_path / "run"
    settings = sets(
        "rollout.engine=vllm",
        "rollout.max_tokens=60",
        "rollout.max_environments=3",
        "rollout.environment=agent_environments:play",
        "pipeline.device=cpu",
        "vllm.enforce_eager=true",
    )
    result = invoke("train", "--recipe", QUICKSTART, *settings, "--output", run)
    assert result.code == 0, result.err
    opened = Run.load(run)
    for step in range(2):
        rows = opened.rollout_stage(step).read_all(Response)
        assert len(rows) == 8
        engine = TransformersEngine(opened.student_at(step), "cpu")
        requests = [ScoreRequest(row.prompt_ids, row.response_ids) for row in rows]
        for row, score in zip(rows, engine.score(requests, Score(), lambda n: None), strict=True):
            assert row.turns == 3
            assert (~row.loss_mask).sum() == 2
            assert np.allclose(row.logprobs[row.loss_mask], score.logprobs[row.loss_mask], atol=2e-4)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["invalid_responses"] for line in lines] == [0, 0]

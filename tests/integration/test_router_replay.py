"""A mixture of experts through the whole pipeline: experts stored by the rollout and replayed by the update."""

import json

import numpy as np
import pytest
from helpers.export import make
from helpers.models import save
from helpers.training import max_difference, train, weights

from opdctl.artifacts.records import Response
from opdctl.artifacts.tables import read_rows

SMALL_STEPS = (
    "rollout.prompts_per_step=8",
    "rollout.max_tokens=12",
    "train.steps=2",
    "train.keep_latest=9",
    "eval.every_steps=0",
    "rollout.engine=transformers",
    "score.engine=transformers",
)


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return save(make("qwen3_moe"), tmp_path_factory.mktemp("students") / "qwen3_moe")


def metrics(run) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_update_with_replay_equals_one_without_where_the_routers_agree(student, tmp_path):
    runs = {}
    for name in ("true", "false"):
        runs[name] = tmp_path / name
        overrides = (*SMALL_STEPS, f"student.model={student}", f"train.router_replay={name}")
        assert train(runs[name], *overrides).code == 0
    replayed, plain = metrics(runs["true"]), metrics(runs["false"])
    assert replayed[0]["router_agreement"] == 1  # float32 on one CPU
    assert "router_agreement" not in plain[0]
    for step in replayed:
        assert 1 <= step["expert_max_load"] <= 4
        assert 0 < step["expert_load_entropy"] <= np.log(4) + 1e-9
        assert 0 <= step["unused_experts"] < 1
    assert replayed[0]["expert_max_load"] == plain[0]["expert_max_load"]
    assert max_difference(weights(runs["true"], 1), weights(runs["false"], 1)) < 1e-6
    for name, is_stored in (("true", True), ("false", False)):
        (part, *_) = sorted((runs[name] / "step-00000/rollout").glob("part-*.parquet"))
        assert all((row.routed_experts is not None) == is_stored for row in read_rows(part, Response))

"""The metrics of a step."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.commands import ROOT
from hypothesis import given
from hypothesis import strategies as st

from opdctl.artifacts.records import ScoredResponse
from opdctl.losses.token_weights import ResponseTokens, top_k_overlap
from opdctl.runs.run import Run
from opdctl.runs.scored_responses import read_scored
from opdctl.training.metrics import mismatch_metrics, response_stats


def recorded_metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_docs_explain_every_metric(finished_run):
    docs = (ROOT / "docs/metrics.md").read_text()
    metrics = recorded_metrics(finished_run)[-1]
    assert len(metrics) > 25
    for name in metrics:
        assert f"`{name}`" in docs, name


def test_advantage_quantiles_are_those_of_the_stored_log_probs(finished_run):
    metrics = recorded_metrics(finished_run)[0]
    samples = list(read_scored(Run.load(finished_run), 0))
    abs_advantages = np.concatenate([np.abs(s.teacher.logprobs - s.response.logprobs) for s in samples])
    for percent in (50, 90, 99):
        expected = np.percentile(abs_advantages, percent)
        assert metrics[f"abs_advantage_p{percent}"] == pytest.approx(expected, rel=1e-6)
    assert metrics["abs_advantage"] == pytest.approx(abs_advantages.mean(), rel=1e-4)


def test_mismatch_by_hand():
    # The trainer is twice, equally and half as sure: ratios 2, 1, 1/2; k3: 2 - 1 - log 2, 0, 1/2 - 1 + log 2.
    metrics = mismatch_metrics(torch.tensor([math.log(2), 0.0, -math.log(2)]))
    assert metrics["mismatch_ratio"].tolist() == pytest.approx([2, 1, 0.5])
    assert metrics["mismatch_kl"].tolist() == pytest.approx([1 - math.log(2), 0, math.log(2) - 0.5], abs=1e-6)


def test_overlap_of_the_most_probable_tokens_by_hand(finished_run):
    sample = next(iter(read_scored(Run.load(finished_run), 0)))
    student = np.array([[1, 2], [3, 4], [5, 6]], np.int32)
    teacher = np.array([[2, 1], [4, 9], [7, 8]], np.int32)  # two shared, one, none

    def cut(response_top: np.ndarray | None, teacher_top: np.ndarray | None) -> ScoredResponse:
        response = replace(
            sample.response, response_ids=sample.response.response_ids[:3], logprobs=sample.response.logprobs[:3]
        )
        scores = replace(sample.teacher, logprobs=sample.teacher.logprobs[:3], top_ids=teacher_top)
        return ScoredResponse(replace(response, top_ids=response_top), scores)

    assert response_stats([cut(student, teacher)])["top_k_overlap"] == pytest.approx(0.5)
    assert response_stats([cut(student, teacher), cut(student, student)])["top_k_overlap"] == pytest.approx(0.75)
    assert "top_k_overlap" not in response_stats([cut(student, None)])
    assert "top_k_overlap" not in response_stats([cut(None, teacher)])


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_overlap_is_that_of_sets(student_k, teacher_k, seed):
    generator = np.random.default_rng(seed)
    student, teacher = (
        np.stack([generator.permutation(12)[:size] for _ in range(5)]).astype(np.int32)
        for size in (student_k, teacher_k)
    )
    zeros = np.zeros(5)
    tokens = ResponseTokens(zeros, zeros, zeros, 0, {"student_top_ids": student, "teacher_top_ids": teacher})
    for top_k in (None, 1, 3):
        chosen = [({*own[:top_k]}, {*others[:top_k]}) for own, others in zip(student, teacher, strict=True)]
        expected = [len(own & others) / len(own) for own, others in chosen]
        assert top_k_overlap(tokens, top_k).tolist() == pytest.approx(expected)

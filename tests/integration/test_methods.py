"""Weights, objectives, teachers and plugins end to end: required columns, gradients, training, and errors."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import QUICKSTART, invoke, sets, small_recipe
from transformers import AutoModelForCausalLM

from opdctl.artifacts.records import Response, ScoredResponse, TokenScores
from opdctl.data.toy import sort12
from opdctl.engines.pool import EnginePool, open_engine_pool
from opdctl.engines.transformers import TransformersEngine
from opdctl.errors import ExitCode
from opdctl.losses.token_weights import COLUMN_SETTINGS, IwOpd, weigh
from opdctl.models import logprobs
from opdctl.models.loading import load_model
from opdctl.pipeline import rollout, score
from opdctl.registry import OBJECTIVES, WEIGHTS
from opdctl.runs.open import open_run
from opdctl.runs.run import Run
from opdctl.runs.scored_responses import read_scored, target_logprobs, to_weight_inputs
from opdctl.training.microbatches import make_micro_batches
from opdctl.training.trainer import Trainer

EVERYTHING = ("rollout.entropy=true", "rollout.top_k=20", "score.entropy=true", "score.top_k=20")
EVERYTHING += ("score.student_top_k=true", "score.hidden_states=true", "reference.model=toy:student-spread")


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Run:
    """A run with rollout and scores of its first step, and all optional columns."""
    run = open_run(small_recipe(*EVERYTHING), tmp_path_factory.mktemp("stored") / "run")
    with open_engine_pool(run.recipe, "cpu") as engines:
        rollout.run_rollout(run, 0, engines)
        score.run_scoring(run, 0, engines)
    return run


def with_recipe(run: Run, *overrides: str) -> Run:
    """Return the run with another recipe for its update."""
    return dataclasses.replace(run, recipe=small_recipe(*EVERYTHING, *overrides))


def gradient(run: Run) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss and the gradient of a step, before clipping."""
    trainer = Trainer(run, "cpu")
    batches = trainer.make_micro_batches(0, list(read_scored(run, 0)))
    loss = sum(trainer._backward(batch)[1]["loss"] for batch in batches)
    return loss, {name: parameter.grad.clone() for name, parameter in trainer._model.named_parameters()}


def assert_close(
    gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5
) -> None:
    for name, value in gradients.items():
        error = (value.double() - expected[name].double()).norm()
        assert error <= tolerance * expected[name].norm() + 1e-9, name


# ── The gradient, against the formula on full logits in float64 ──────────────────────────────────────────────────────


def append_tail(logp: torch.Tensor) -> torch.Tensor:
    """Append the log-prob of all other tokens."""
    return torch.cat([logp, torch.log1p(-logp.exp().sum(-1, keepdim=True))], -1)


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p.exp() * (p - q)).sum(-1)


def reference_loss(
    name: str, student_TV: torch.Tensor, teacher_TV: torch.Tensor, ids: torch.Tensor, student_top: torch.Tensor
) -> torch.Tensor:
    """Return the loss of each token from the log-probs of both models over the vocabulary. `student_top` are the stored
    ids of the student's most probable tokens."""
    logp, target = (values.gather(-1, ids[:, None]).squeeze(-1) for values in (student_TV, teacher_TV))
    old = logp.detach()
    advantage = target - old
    student_TK, teacher_TK = (append_tail(logp_TV.gather(-1, student_top)) for logp_TV in (student_TV, teacher_TV))
    teacher_top = teacher_TV.topk(7, -1).indices
    student_TJ, teacher_TJ = (append_tail(logp_TV.gather(-1, teacher_top)) for logp_TV in (student_TV, teacher_TV))
    mixed = torch.logsumexp(torch.stack([teacher_TV + np.log(0.3), student_TV + np.log(0.7)]), 0)
    match name:
        case "policy_gradient" | "k1":
            return -advantage * (logp - old)
        case "clipped":
            return -advantage.clamp(-0.5, 0.5) * (logp - old)
        case "power":
            return -((2 * target).exp() - (2 * old).exp()) * (logp - old)
        case "top_d":
            return -torch.log(0.25 * advantage.exp() + 0.75) * (logp - old)
        case "constant_penalty":
            return 0.1 * (logp - old)
        case "k2":
            return (target - logp) ** 2 / 2
        case "k3":
            return (target - logp).clamp(max=3).exp() * (1 + (target - logp - 3).clamp(min=0)) - 1 - (target - logp)
        case "forward_full":
            return kl(teacher_TV, student_TV)
        case "reverse_full":
            return kl(student_TV, teacher_TV)
        case "jsd_full":
            return 0.3 * kl(teacher_TV, mixed) + 0.7 * kl(student_TV, mixed)
        case "forward_teacher":
            return kl(teacher_TJ, student_TJ)
        case "reverse_student":
            return kl(student_TK, teacher_TK)
    raise AssertionError(name)


CASES = {
    "policy_gradient": ["objective.name=policy_gradient"],
    "clipped": ["objective.advantage_clip=0.5"],
    "power": ["objective.name=power", "objective.alpha=2.0"],
    "top_d": ["objective.name=top_d", "objective.alpha=0.25"],
    "constant_penalty": ["objective.name=constant_penalty", "objective.penalty=0.1"],
    "k1": ["objective.name=sampled_kl", "objective.estimator=k1"],
    "k2": ["objective.name=sampled_kl", "objective.estimator=k2"],
    "k3": ["objective.name=sampled_kl", "objective.estimator=k3", "objective.cap=3.0"],
    "forward_full": ["objective.name=forward_kl", "objective.support=full"],
    "reverse_full": ["objective.name=reverse_kl", "objective.support=full"],
    "jsd_full": ["objective.name=jsd", "objective.support=full", "objective.beta=0.3"],
    "forward_teacher": ["objective.name=forward_kl", "objective.top_k=7"],
    "reverse_student": ["objective.name=reverse_kl", "objective.support=student", "objective.top_k=5"],
}


@pytest.mark.parametrize("aggregate", ["token", "response"])
@pytest.mark.parametrize("name", CASES)
def test_gradient_matches_the_formula_on_full_logits(stored, name, aggregate):
    """Σ w_t loss_t, one response at a time, in float64: the mean over tokens, or over responses of their means."""
    models = {role: load_model(stored.models[role], device="cpu").double() for role in ("student", "teacher")}
    samples = list(read_scored(stored, 0))
    count = sum(len(sample.response.response_ids) for sample in samples)
    for sample in samples:
        prompt, response = sample.response.prompt_ids, sample.response.response_ids
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
        logp = {
            role: model(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for role, model in models.items()
        }
        student_top = torch.from_numpy(sample.response.top_ids[:, :5].astype(np.int64))
        loss = reference_loss(name, logp["student"], logp["teacher"].detach(), ids[len(prompt) :], student_top)
        weight = torch.from_numpy(IwOpd(0.5)(to_weight_inputs(sample, 0)))
        divisor = count if aggregate == "token" else len(response) * len(samples)
        ((weight * loss).sum() / divisor).backward()
    gradients = gradient(with_recipe(stored, *CASES[name], f"train.aggregate={aggregate}"))[1]
    # Stored log-probs are float32, and the tail outside the student's top 5 has few digits.
    tolerance = 1e-4 if name == "reverse_student" else 4e-5
    assert_close(gradients, {n: p.grad for n, p in models["student"].named_parameters()}, tolerance)


@pytest.mark.parametrize("name", ["policy_gradient", "k3", "reverse_full", "forward_teacher", "reverse_student"])
def test_gradient_is_independent_of_micro_batches_and_chunks(stored, name, monkeypatch):
    loss, expected = gradient(with_recipe(stored, *CASES[name], "weight.name=tip"))
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 56 * 13)
    for budget in (1, 400):
        overrides = [*CASES[name], "weight.name=tip", f"train.tokens_per_micro_batch={budget}"]
        split_loss, gradients = gradient(with_recipe(stored, *overrides))
        assert split_loss == pytest.approx(loss, rel=1e-5)
        assert_close(gradients, expected)


EXTRAPOLATED = {
    "exopd": ["weight.name=uniform"],
    "iw_exopd": [],
    "modulated": ["weight.modulates=extrapolation"],
}


def extrapolated_advantage(name: str, logp_T: list[float], teacher_T: list[float], reference_T: list[float]) -> Any:
    """Return w A of each token, λ = 1.25: A = λ (log T - log R) - (log S - log R), and the weight of log T - log S.

    exopd: w is 1. iw_exopd: w is that of IW-OPD. modulated: w multiplies λ instead of A.
    """
    plain = [abs(t - s) for s, t in zip(logp_T, teacher_T, strict=True)]
    weighted = []
    for k, (s, t, r) in enumerate(zip(logp_T, teacher_T, reference_T, strict=True)):
        weight = 1.0 if name == "exopd" else 1 + 0.5 * (1 - sum(plain[:k]) / sum(plain))
        if name == "modulated":
            weighted.append(1.25 * weight * (t - r) - (s - r))
        else:
            weighted.append(weight * (1.25 * (t - r) - (s - r)))
    return torch.tensor(weighted, dtype=torch.float64)


@pytest.mark.parametrize("name", EXTRAPOLATED)
def test_gradient_of_extrapolation_matches_the_formula(stored, name):
    """Σ w A ∇ log p over all tokens, one response at a time, in float64."""
    student, teacher = (load_model(stored.models[role], device="cpu").double() for role in ("student", "teacher"))
    samples = list(read_scored(stored, 0))
    count = sum(len(sample.response.response_ids) for sample in samples)
    for sample in samples:
        assert sample.reference is not None
        prompt = sample.response.prompt_ids
        ids = torch.from_numpy(np.concatenate([prompt, sample.response.response_ids]).astype(np.int64))
        logp, target = (
            model(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(-1, ids[len(prompt) :, None])[:, 0]
            for model in (student, teacher)
        )
        # The reference is bfloat16, so its log-probs are the stored ones.
        weighted = extrapolated_advantage(name, logp.tolist(), target.tolist(), sample.reference.logprobs.tolist())
        (-(weighted * logp).sum() / count).backward()
    gradients = gradient(with_recipe(stored, "train.extrapolation=1.25", *EXTRAPOLATED[name]))[1]
    assert_close(gradients, {n: p.grad for n, p in student.named_parameters()}, 4e-5)


def test_extrapolation_by_hand():
    """log S = -2, log T = -1 and -4, log R = -3: A = 1 and -2, w = 1.5 and 4/3 of iw_opd; λ = 2."""
    settings = ["reference.model=toy:student", "train.extrapolation=2.0", "weight.gamma=0.5"]
    names = {"sample_id": "a", "prompt_id": "a", "source": "", "teacher": "teacher", "finish_reason": "stop"}
    columns = {"prompt_ids": np.array([2]), "response_ids": np.array([3, 3]), "logprobs": np.float32([-2, -2])}
    response = Response(**names, **columns, policy_version=0, answer=None)
    scores = [TokenScores(np.array(logp, np.float32)) for logp in ([-1, -4], [-3, -3])]
    scored = [ScoredResponse(response, *scores)]
    targets = {}
    for modulates in ("loss", "extrapolation"):
        recipe = small_recipe(*settings, f"weight.modulates={modulates}")
        (batch,) = make_micro_batches(recipe, 0, scored, IwOpd(0.5), "cpu")
        assert batch.weight_N.tolist() == pytest.approx([1.5, 4 / 3])
        targets[modulates] = batch.target_logp_N.tolist(), (2 * batch.loss_scale_N).tolist()
    # 2 (log T - log R) + log R = 1 and -5, weighted by w; with w in the factor 3 · 2 - 3 and 8/3 · -1 - 3
    assert targets["loss"] == ([1, -5], pytest.approx([1.5, 4 / 3]))
    assert targets["extrapolation"] == (pytest.approx([3, -17 / 3]), [1, 1])


def test_student_as_reference_scales_the_advantage(tmp_path):
    """log R = log S on-policy, so A is λ (log T - log S)."""
    overrides = ["reference.model=toy:student", "reference.dtype=float32", "train.extrapolation=1.5", "train.steps=1"]
    assert invoke("train", "--recipe", QUICKSTART, *sets(*overrides), "--output", tmp_path / "run").code == 0
    for sample in read_scored(Run.load(tmp_path / "run"), 0):
        extrapolated = target_logprobs(sample, 1.5) - sample.response.logprobs
        np.testing.assert_allclose(extrapolated, 1.5 * to_weight_inputs(sample, 0).advantage_T, atol=1e-3)


def test_trainer_scores_the_reference_that_is_its_base(tmp_path, monkeypatch):
    """At the second step the adapters have changed. No engine is started; `score-teacher` starts one."""
    started: list[str] = []
    get = EnginePool.get
    monkeypatch.setattr(EnginePool, "get", lambda pool, role, *args: started.append(role) or get(pool, role, *args))
    settings = ["lora.rank=4", "train.learning_rate=1e-2", "train.extrapolation=1.5", "train.steps=2"]
    common = [*sets(*settings, "rollout.max_tokens=40"), "--output", tmp_path / "run"]
    trained = invoke("train", "--recipe", QUICKSTART, *common)
    assert trained.code == 0, trained.err
    assert set(started) == {"student", "teacher"}
    stage = Run.load(tmp_path / "run").score_stage(1, "reference")
    assert stage.manifest()["logprob_metadata"]["engine"] == "trainer"
    by_trainer = list(read_scored(Run.load(tmp_path / "run"), 1))
    assert max(abs(each.reference.logprobs - each.response.logprobs).max() for each in by_trainer) > 0.1
    shutil.rmtree(stage.path)
    scored = invoke("score-teacher", "--recipe", QUICKSTART, *common, "--step", "1", "--only", "reference")
    assert scored.code == 0, scored.err
    assert started[-1] == "reference"
    assert stage.manifest()["logprob_metadata"]["engine"] == "transformers"
    by_engine = {each.response.sample_id: each for each in read_scored(Run.load(tmp_path / "run"), 1)}
    for each in by_trainer:
        expected = by_engine[each.response.sample_id].reference.logprobs
        np.testing.assert_allclose(each.reference.logprobs, expected, atol=1e-5)


def test_reference_that_is_not_the_base_has_an_engine(tmp_path):
    settings = ["lora.rank=4", "train.extrapolation=1.5", "train.steps=1", "reference.model=toy:teacher"]
    settings += ["reference.dtype=float32", "rollout.max_tokens=40"]
    assert invoke("train", "--recipe", QUICKSTART, *sets(*settings), "--output", tmp_path / "run").code == 0
    stage = Run.load(tmp_path / "run").score_stage(0, "reference")
    assert stage.manifest()["logprob_metadata"]["engine"] == "transformers"


# ── From recipe to student ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", WEIGHTS.names())
def test_every_weight_trains_and_is_plotted(name, tmp_path):
    common = [*sets(f"weight.name={name}", "train.steps=1", "rollout.prompts_per_step=4"), "--output", tmp_path / "run"]
    trained = invoke("train", "--recipe", QUICKSTART, *common)
    assert trained.code == 0, trained.err
    analyzed = invoke("analyze-position", tmp_path / "run", "--json")
    assert analyzed.code == 0, analyzed.err
    metrics = Run.load(tmp_path / "run").update(0)["metrics"]
    assert analyzed.json()["summary"]["phases"][0]["weight"] == pytest.approx(metrics["weight"], rel=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_every_objective_trains(name, tmp_path):
    output = tmp_path / "run"
    overrides = [f"objective.name={name}", "train.steps=1", "rollout.prompts_per_step=4", "train.updates_per_step=2"]
    if "top_k" in {field.name for field in dataclasses.fields(OBJECTIVES.get(name))}:
        overrides.append("objective.top_k=8")  # the toy task has 56 tokens
    result = invoke("train", "--recipe", QUICKSTART, *sets(*overrides), "--output", output)
    assert result.code == 0, result.err
    metrics = Run.load(output).update(0)["metrics"]
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["grad_norm"] > 0


def test_inputs_of_token_weights_share_the_memory_of_the_stored_columns(stored):
    for sample in read_scored(stored, 0):
        tokens = to_weight_inputs(sample, 0)
        assert {*tokens.columns} == {*COLUMN_SETTINGS}
        assert np.shares_memory(tokens.columns["student_top_logprobs"], sample.response.top_logprobs)
        assert np.shares_memory(tokens.columns["teacher_entropies"], sample.teacher.entropies)
        assert tokens.column("student_top_logprobs").dtype == np.float64
        np.testing.assert_array_equal(tokens.column("teacher_top_ids"), sample.teacher.top_ids)


def test_step_weights_are_computed_before_batching(stored):
    """tip keeps half of the tokens of the step, not half of each micro-batch."""
    step = [to_weight_inputs(sample, 0) for sample in read_scored(stored, 0)]
    run = with_recipe(stored, "weight.name=tip", "train.tokens_per_micro_batch=200")
    batches = Trainer(run, "cpu").make_micro_batches(0, list(read_scored(run, 0)))
    assert len(batches) > 3
    kept = torch.cat([batch.weight_N for batch in batches])
    assert sum(float(weight.sum()) for weight in weigh(WEIGHTS.build("tip", {}), step)) == float(kept.sum())
    assert {float(batch.weight_N.mean()) for batch in batches} != {0.5}


def test_weight_whose_columns_are_not_stored(tmp_path):
    output = tmp_path / "run"
    assert invoke("train", "--recipe", QUICKSTART, *sets("train.steps=1"), "--output", output).code == 0
    result = invoke("analyze-position", output, "--set", "weight.name=fire")
    assert result.code == ExitCode.RECIPE_MISMATCH
    assert "`rollout.entropy = true`, `score.entropy = true`" in result.err
    assert invoke("analyze-position", output, "--set", "weight.name=linear_decay").code == 0


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_top_k_of_the_full_vocabulary(tmp_path, dry):
    overrides = sets("objective.name=jsd", "objective.top_k=56")
    result = invoke("train", "--recipe", QUICKSTART, *overrides, "--output", tmp_path / "run", *dry)
    assert result.code == ExitCode.USAGE
    assert result.kind == "unsupported_setting"
    assert re.search(r"score\.top_k.*\b56\b.*\b56 tokens", result.err)
    assert 'support = "full"' in result.err
    assert not (tmp_path / "run").exists()


# ── Several teachers ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def two_teachers(tmp_path) -> Path:
    """A recipe with two teachers and its prompts: one in three is for the student, the others for the teacher."""
    rows = [
        {"text": "".join(np.random.default_rng(i).permutation(list("abcdefghijkl"))) + "?", "who": "abc"[i % 3 > 0]}
        for i in range(32)
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "two.toml"
    recipe.write_text(
        QUICKSTART.read_text()
        .replace('[teacher]\nmodel = "toy:teacher"\ndtype = "float32"', TEACHERS)
        .replace('source = "toy:sort12"\nlimit = 3584', PROMPTS.format(tmp_path / "prompts.jsonl"))
    )
    return recipe


MODEL = '[teachers.{}]\nmodel = "toy:{}"\ndtype = "float32"\n'
TEACHERS = MODEL.format("a", "student") + MODEL.format("b", "teacher")
PROMPTS = 'source = "{}"\nprompt_column = "text"\nteacher_column = "who"\nsuffix = ""'


def test_each_response_is_scored_by_the_teacher_of_its_prompt(two_teachers, tmp_path):
    """One of the two teachers is the student, so A is 0 for its prompts only."""
    output = tmp_path / "run"
    common = [*sets("train.steps=1")[2:], "--output", output]
    result = invoke("train", "--recipe", two_teachers, *common)
    assert result.code == 0, result.err
    run = Run.load(output)
    scored = list(read_scored(run, 0))
    assert {sample.response.teacher for sample in scored} == {"teacher-a", "teacher-b"}
    for sample in scored:
        size = np.abs(to_weight_inputs(sample, 0).advantage_T).max()
        assert (size < 1e-4) == (sample.response.teacher == "teacher-a")
    parts = [stage.manifest()["parts"] for stage in run.score_stages(0).values()]
    assert sum(part["rows"] for stage in parts for part in stage) == len(scored) == 8


def test_teachers_can_score_separately(two_teachers, tmp_path):
    common = [*sets("train.steps=1")[2:], "--output", tmp_path / "run"]
    for command in (["rollout"], ["score-teacher", "--only", "teacher-b"]):
        result = invoke(*command, "--recipe", two_teachers, *common)
        assert result.code == 0, result.err
    assert "opdctl score-teacher" in result.err
    assert invoke("train", "--no-fill", "--output", tmp_path / "run").code == ExitCode.FAILED
    assert invoke("score-teacher", "--output", tmp_path / "run", "--only", "teacher-a").code == 0
    assert invoke("train", "--no-fill", "--output", tmp_path / "run").code == 0
    assert invoke("train", "--recipe", two_teachers, *common[:-1], tmp_path / "at-once").code == 0
    student = "student/step-00001/model.safetensors"
    assert (tmp_path / "run" / student).read_bytes() == (tmp_path / "at-once" / student).read_bytes()
    unknown = invoke("score-teacher", "--output", tmp_path / "run", "--only", "teacher-c")
    assert unknown.code == ExitCode.USAGE
    assert "`teacher-" in unknown.err
    assert invoke("eval", "--output", tmp_path / "run", "--model", "teacher-b", "--bench", "sort12").code == 0
    status = invoke("status", tmp_path / "run", "--verify", "--json").json()
    assert [stage["stage"] for stage in status["stages"]] == ["rollout", "teacher-a", "teacher-b", "update"]


def test_full_vocabulary_losses_use_the_teacher_of_each_response(two_teachers, tmp_path):
    """The hidden states of the two teachers have different sizes, so using the wrong matrix would fail."""
    overrides = ["train.steps=1", "objective.name=reverse_kl", "objective.support=full"]
    common = [*sets(*overrides)[2:], "--output", tmp_path / "run"]
    result = invoke("train", "--recipe", two_teachers, *common)
    assert result.code == 0, result.err
    assert Run.load(tmp_path / "run").update(0)["metrics"]["divergence"] > 0


def test_prompt_with_an_unknown_teacher(two_teachers, tmp_path):
    rows = (tmp_path / "prompts.jsonl").read_text().replace('"who": "a"', '"who": "bb"', 1)
    (tmp_path / "prompts.jsonl").write_text(rows)
    result = invoke("rollout", "--recipe", two_teachers, *sets()[2:], "--output", tmp_path / "run")
    assert result.code == ExitCode.BAD_DATA
    assert result.kind == "invalid_data"
    assert "`bb`" in result.err
    assert not (tmp_path / "run").exists()


# ── A separate prompt for the teacher ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def own_prompts(tmp_path: Path) -> Callable[..., list[object]]:
    """Return the arguments of a run whose teacher is the student, with extra prompt columns."""

    def build(*overrides: str, output: str = "run") -> list[object]:
        rows = [
            {"text": p.prompt, "told": f"{p.answer}.{p.prompt}", "gold": p.answer, "long": "a" * 40}
            for p in islice(sort12.problems("train", 0), 16)
        ]
        path = tmp_path / "told.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = (
            f"prompts.source={path}",
            "prompts.prompt_column=text",
            "prompts.answer_column=gold",
            "prompts.max_tokens=32",
            "teacher.model=toy:student",
            "train.steps=1",
        )
        return ["--recipe", QUICKSTART, *sets(*settings, *overrides), "--output", tmp_path / output]

    return build


def test_teacher_scores_after_its_own_prompt(own_prompts, tmp_path):
    result = invoke("train", *own_prompts("prompts.teacher_prompt_column=told"))
    assert result.code == 0, result.err
    assert "warning" not in result.err  # the models are identical, but the advantage is not 0
    run = Run.load(tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(run.models["teacher"].path, dtype=torch.float64)
    prompts = {prompt.prompt_id: prompt for prompt in run.prompts}
    for sample in read_scored(run, 0):
        prompt, response = prompts[sample.response.prompt_id], sample.response
        assert len(prompt.teacher_prompt_ids) == 26
        assert response.prompt_ids.tolist() == prompt.prompt_ids.tolist() == prompt.teacher_prompt_ids[13:].tolist()
        ids = torch.from_numpy(np.concatenate([prompt.teacher_prompt_ids, response.response_ids])).long()
        with torch.inference_mode():
            logp = model(ids[None]).logits[0].log_softmax(-1)
        wanted = logp[25:-1].gather(1, ids[26:, None])[:, 0].numpy()
        assert np.allclose(sample.teacher.logprobs, wanted, atol=1e-4)
    assert Run.load(tmp_path / "run").update(0)["metrics"]["abs_advantage"] > 0.1


def test_teacher_continues_prefixes_after_its_own_prompt(own_prompts, tmp_path, monkeypatch):
    assert invoke("rollout", *own_prompts("prompts.teacher_prompt_column=told")).code == 0
    lengths, stream = {}, TransformersEngine.stream_completions

    def record_lengths(engine: Any, requests: Any, **options: Any) -> Any:
        requests = list(requests)
        lengths[len(lengths)] = {len(request.prompt_ids) for request in requests[::10]}  # the prefixes of 0 %
        return stream(engine, requests, **options)

    monkeypatch.setattr(TransformersEngine, "stream_completions", record_lengths)
    settings = ["--set", "continuations.responses=4"]
    result = invoke("run", "continuations", tmp_path / "run", *settings)
    assert set(map(frozenset, lengths.values())) == {frozenset({13}), frozenset({26})}, result.err


def test_same_teacher_prompt_gives_the_same_student(own_prompts, tmp_path):
    model = "teacher.model=toy:teacher"
    for column, output in (("null", "plain"), ("text", "same")):
        settings = [] if column == "null" else [f"prompts.teacher_prompt_column={column}"]
        assert invoke("train", *own_prompts(model, *settings, output=output)).code == 0
    student = "student/step-00001/model.safetensors"
    assert (tmp_path / "plain" / student).read_bytes() == (tmp_path / "same" / student).read_bytes()


def test_teacher_of_a_source_reads_the_column_of_that_source(own_prompts, tmp_path):
    sources = [f"prompts.sources.{name}.source={tmp_path / 'told.jsonl'}" for name in "ab"]
    column = "prompts.sources.b.teacher_prompt_column=told"
    assert invoke("rollout", *own_prompts(*sources, column)).code == 0
    run = Run.load(tmp_path / "run")
    lengths = {}
    for prompt in run.prompts:
        response = SimpleNamespace(prompt_id=prompt.prompt_id, prompt_ids=prompt.prompt_ids)
        lengths.setdefault(prompt.prompt_id[0], set()).add(len(run.prompt_ids("teacher", response)))
    assert lengths == {"a": {13}, "b": {26}}


def test_settings_of_a_teacher_that_change_nothing_are_warned_of(own_prompts):
    setting = "teacher.template_arguments={enable_thinkng=true}"
    result = invoke("rollout", *own_prompts(setting), "--dry-run")
    assert "warning: teacher: its system turn, chat template and template arguments change no prompt" in " ".join(
        result.err.split()
    )


@pytest.mark.parametrize(
    ("setting", "code", "kind", "detail"),
    [
        (
            "prompts.teacher_prompt_column=long",
            ExitCode.BAD_DATA,
            "invalid_data",
            "prompts.max_tokens = 32: `0` with 40",
        ),
        ("prompts.teacher_prompt_column=tld", ExitCode.BAD_DATA, "invalid_data", "did you mean `told`?"),
        (
            "prompts.source=toy:sort12",
            ExitCode.USAGE,
            "unsupported_setting",
            "prompts.teacher_prompt_column: `toy:sort12`",
        ),
    ],
)
def test_invalid_teacher_prompt(own_prompts, tmp_path, setting, code, kind, detail):
    result = invoke("train", *own_prompts("prompts.teacher_prompt_column=told", setting))
    assert (result.code, result.kind) == (code, kind)
    assert detail in result.err
    assert not (tmp_path / "run").exists()


# ── Plugins ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def run_opdctl(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "opdctl", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env={**os.environ})


PLUGIN = """
from dataclasses import dataclass
import numpy as np
from opdctl.plugins import OBJECTIVES, WEIGHTS, Objective, Weight

@WEIGHTS.register("last_token", "a test")
@dataclass(frozen=True)
class LastToken(Weight):
    '''1 + extra on the last token.'''
    extra: float = 2.0

    def __call__(self, tokens):
        return 1 + self.extra * (np.arange(len(tokens)) == len(tokens) - 1)

@OBJECTIVES.register("likelihood", "a test")
@dataclass(frozen=True)
class Likelihood(Objective):
    '''Ordinary likelihood of the sampled token.'''

    def __call__(self, tokens):
        return -tokens.logp_N, {"nll": -tokens.logp_N}
"""


def test_plugin_with_a_weight_and_an_objective(tmp_path):
    (tmp_path / "mine.py").write_text(PLUGIN)
    chosen = ("plugins=['mine']", "weight.name=last_token", "objective.name=likelihood", "train.steps=1")
    trained = run_opdctl(tmp_path, "train", "--recipe", QUICKSTART, *sets(*chosen), "--output", "run", "--json")
    assert trained.returncode == 0, trained.stderr
    record = json.loads((tmp_path / "run/step-00000/update.json").read_text())
    assert record["metrics"]["nll"] > 0
    assert record["settings"]["weight.extra"] == 2.0
    assert record["settings"]["plugins"] == ["mine"]
    assert len(record["inputs"]["plugin mine"]) == 64
    again = run_opdctl(tmp_path, "analyze-position", "run")
    assert again.returncode == 0, again.stderr
    assert "weight `last_token` of a plugin is not run" in again.stderr
    listed = run_opdctl(tmp_path, "list", "weights", "--output", "run", *sets("plugins=['mine']"), "--json")
    assert "last_token" in [entry["name"] for entry in json.loads(listed.stdout)["weights"]]
    misspelled = sets(*chosen, "weight.name=last_tokn")
    typo = run_opdctl(tmp_path, "train", "--recipe", QUICKSTART, *misspelled, "--output", "b")
    assert typo.returncode == ExitCode.USAGE
    assert "did you mean `last_token`?" in typo.stderr


def test_weights_of_a_plugin_are_listed(tmp_path):
    (tmp_path / "mine.py").write_text(PLUGIN)
    listed = run_opdctl(tmp_path, "list", "weights", *sets("plugins=['mine']"), "--json")
    assert "last_token" in [entry["name"] for entry in json.loads(listed.stdout)["weights"]]
    typo = run_opdctl(tmp_path, "list", "weights", *sets("plugins=['mime']"))
    assert typo.returncode == ExitCode.USAGE
    assert "plugins: `mime`" in typo.stderr


@pytest.mark.parametrize(
    ("text", "reason"),
    [(None, "not found"), ("import nothing_of_the_kind", "nothing_of_the_kind"), ("1 / 0", "ZeroDivisionError")],
)
def test_missing_or_failing_plugin(tmp_path, text, reason):
    if text is not None:
        (tmp_path / "broken.py").write_text(text)
    result = run_opdctl(tmp_path, "train", "--recipe", QUICKSTART, *sets("plugins=['broken']"), "--output", "run")
    assert result.returncode == ExitCode.USAGE
    assert result.stderr.startswith("error: Invalid plugin: ")
    assert "plugins: `broken`" in result.stderr
    assert reason in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("kind", "registry"), [("weights", WEIGHTS), ("objectives", OBJECTIVES)])
def test_components_are_listed_with_parameters_and_source(kind, registry):
    result = invoke("list", kind, "--json")
    assert result.code == 0, result.err
    entries = result.json()[kind]
    assert [entry["name"] for entry in entries] == registry.names()
    for entry in entries:
        assert entry["summary"]
        assert entry["source"]
        assert f"{entry['name']}  {entry['summary']}" in result.err
        for name, value in entry["parameters"].items():
            assert f"{name} = {json.dumps(value)}" in result.err

"""Every weight and objective through the stages: what they need is stored, and the gradient is that of the formula."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import QUICKSTART, invoke, sets, small_recipe
from transformers import AutoModelForCausalLM

from opdctl.data.toy import sort12
from opdctl.engines.pool import open_engine_pool
from opdctl.engines.transformers import TransformersEngine
from opdctl.errors import ExitCode, OpdctlError
from opdctl.losses.token_weights import IwOpd, Weight, weigh
from opdctl.models import logprobs
from opdctl.models.loading import load_model
from opdctl.pipeline import rollout, score
from opdctl.recipe.load import load_recipe
from opdctl.registry import OBJECTIVES, WEIGHTS
from opdctl.runs.open import open_run
from opdctl.runs.run import Run, load_run
from opdctl.runs.scored_responses import read_scored, target_logprobs, to_weight_inputs
from opdctl.training.trainer import Trainer

EVERYTHING = ("rollout.entropy=true", "rollout.top_k=20", "score.entropy=true", "score.top_k=20")
EVERYTHING += ("score.student_top_k=true", "score.hidden_states=true", "reference.model=toy:student-spread")


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Run:
    """A run whose first step is rolled out and scored, with all that can be stored."""
    run = open_run(small_recipe(*EVERYTHING), tmp_path_factory.mktemp("stored") / "run")
    with open_engine_pool(run.recipe, "cpu") as engines:
        rollout.run_rollout(run, 0, engines)
        score.run_scoring(run, 0, engines)
    return run


def under(run: Run, *overrides: str) -> Run:
    """Return the run under another recipe, for looking at its update alone."""
    return dataclasses.replace(run, recipe=small_recipe(*EVERYTHING, *overrides))


def gradient(run: Run) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss and the gradient of a step, before clipping."""
    trainer = Trainer(run, "cpu")
    batches = trainer.micro_batches(0, list(read_scored(run, 0)))
    loss = sum(trainer._backward(batch)[1]["loss"] for batch in batches)
    return loss, {name: parameter.grad.clone() for name, parameter in trainer._model.named_parameters()}


def assert_same(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor], relative: float = 1e-5) -> None:
    for name, value in found.items():
        assert (value.double() - want[name].double()).norm() <= relative * want[name].norm() + 1e-9, name


# ── The gradient, against the formula on full logits in float64 ──────────────────────────────────────────────────────


def rest(logp: torch.Tensor) -> torch.Tensor:
    """One more word for all that are not listed."""
    return torch.cat([logp, torch.log1p(-logp.exp().sum(-1, keepdim=True))], -1)


def kl(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p.exp() * (p - q)).sum(-1)


def plain_loss(
    name: str, student_TV: torch.Tensor, teacher_TV: torch.Tensor, ids: torch.Tensor, own: torch.Tensor
) -> torch.Tensor:
    """Return each token's loss, on the policy's own distribution and the teacher's over the vocabulary; `own` are the
    student's most probable ids as they were stored."""
    logp, target = (values.gather(-1, ids[:, None]).squeeze(-1) for values in (student_TV, teacher_TV))
    old = logp.detach()
    advantage = target - old
    top = teacher_TV.topk(7, -1).indices
    held = rest(student_TV.gather(-1, top)), rest(teacher_TV.gather(-1, top))
    held_own = rest(student_TV.gather(-1, own)), rest(teacher_TV.gather(-1, own))
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
        case "control":
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
            return kl(held[1], held[0])
        case "reverse_student":
            return kl(*held_own)
    raise AssertionError(name)


CASES = {
    "policy_gradient": ["objective.name=policy_gradient"],
    "clipped": ["objective.advantage_clip=0.5"],
    "power": ["objective.name=power", "objective.alpha=2.0"],
    "top_d": ["objective.name=top_d", "objective.alpha=0.25"],
    "control": ["objective.name=control", "objective.penalty=0.1"],
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
def test_the_gradient_is_that_of_the_formula_on_full_logits(stored, name, aggregate):
    """Σ w_t loss_t, one response at a time, in float64; over the tokens, or each response's mean over the responses."""
    models = {who: load_model(stored.models[who], device="cpu").double() for who in ("student", "teacher")}
    samples = list(read_scored(stored, 0))
    count = sum(len(sample.response.response_ids) for sample in samples)
    for sample in samples:
        prompt, response = sample.response.prompt_ids, sample.response.response_ids
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
        whole = {who: model(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for who, model in models.items()}
        own = torch.from_numpy(sample.response.top_ids[:, :5].astype(np.int64))
        loss = plain_loss(name, whole["student"], whole["teacher"].detach(), ids[len(prompt) :], own)
        weight = torch.from_numpy(IwOpd(0.5)(to_weight_inputs(sample, 0, 1.0)))
        divisor = count if aggregate == "token" else len(response) * len(samples)
        ((weight * loss).sum() / divisor).backward()
    found = gradient(under(stored, *CASES[name], f"train.aggregate={aggregate}"))[1]
    # Stored log-probs are float32: what is left beside the student's five likeliest tokens has few digits.
    tolerance = 1e-4 if name == "reverse_student" else 2e-5
    assert_same(found, {n: p.grad for n, p in models["student"].named_parameters()}, tolerance)


@pytest.mark.parametrize("name", ["policy_gradient", "k3", "reverse_full", "forward_teacher", "reverse_student"])
def test_neither_micro_batches_nor_chunks_change_the_gradient(stored, name, monkeypatch):
    loss, want = gradient(under(stored, *CASES[name], "weight.name=tip"))
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 56 * 13)
    for budget in (1, 400):
        cut, found = gradient(under(stored, *CASES[name], "weight.name=tip", f"train.tokens_per_micro_batch={budget}"))
        assert cut == pytest.approx(loss, rel=1e-5)
        assert_same(found, want)


def test_extrapolated_rewards_move_the_target_and_the_weight(stored):
    """λ (log T - log R) - (log S - log R), in the loss and in the IW-OPD weight alike."""
    samples = list(read_scored(stored, 0))
    for sample in samples:
        assert sample.reference is not None
        s, t, r = (x.logprobs.astype(float) for x in (sample.response, sample.teacher, sample.reference))
        np.testing.assert_allclose(to_weight_inputs(sample, 0, 1.25).advantage_T, 1.25 * (t - r) - (s - r), atol=1e-5)
        np.testing.assert_array_equal(to_weight_inputs(sample, 0, 1.0).advantage_T, t - s)
    run = under(stored, "train.extrapolation=1.25")
    batches = Trainer(run, "cpu").micro_batches(0, list(read_scored(run, 0)))
    weights, targets = (
        {s.response.sample_id: v for b in batches for s, v in zip(b.samples, b.padded.split(column(b)), strict=True)}
        for column in (lambda b: b.weight_N, lambda b: b.target_logp_N)
    )
    for sample in samples:
        name = sample.response.sample_id
        np.testing.assert_allclose(targets[name], target_logprobs(sample, 1.25), atol=1e-6)
        np.testing.assert_allclose(weights[name], IwOpd(0.5)(to_weight_inputs(sample, 0, 1.25)), atol=1e-6)


def test_a_reference_that_is_the_student_gives_lambda_times_the_advantage(tmp_path):
    """log R = log S on-policy, so A is λ (log T - log S)."""
    overrides = ["reference.model=toy:student", "reference.dtype=float32", "train.extrapolation=1.5", "train.steps=1"]
    assert invoke("train", "--recipe", QUICKSTART, *sets(*overrides), "--output", tmp_path / "run").code == 0
    for sample in read_scored(load_run(tmp_path / "run"), 0):
        plain, extrapolated = to_weight_inputs(sample, 0, 1.0).advantage_T, to_weight_inputs(sample, 0, 1.5).advantage_T
        np.testing.assert_allclose(extrapolated, 1.5 * plain, atol=1e-3)


# ── From recipe to student ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", WEIGHTS.names())
def test_every_weight_trains_and_is_drawn(name, tmp_path):
    common = [*sets(f"weight.name={name}", "train.steps=1", "rollout.prompts_per_step=4"), "--output", tmp_path / "run"]
    trained = invoke("train", "--recipe", QUICKSTART, *common)
    assert trained.code == 0, trained.err
    drawn = invoke("analyze-position", tmp_path / "run", "--json")
    assert drawn.code == 0, drawn.err
    metrics = load_run(tmp_path / "run").update(0)["metrics"]
    assert drawn.json()["summary"]["phases"][0]["weight"] == pytest.approx(metrics["weight"], rel=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES.names())
def test_every_objective_trains_with_what_it_needs_stored(name, tmp_path):
    output = tmp_path / "run"
    overrides = [f"objective.name={name}", "train.steps=1", "rollout.prompts_per_step=4", "train.updates_per_step=2"]
    if "top_k" in {field.name for field in dataclasses.fields(OBJECTIVES.get(name))}:
        overrides.append("objective.top_k=8")  # the embedded task has 56 tokens
    result = invoke("train", "--recipe", QUICKSTART, *sets(*overrides), "--output", output)
    assert result.code == 0, result.err
    metrics = load_run(output).update(0)["metrics"]
    assert all(np.isfinite(value) for value in metrics.values())
    assert metrics["grad_norm"] > 0


def test_statistics_of_the_step_are_those_of_all_micro_batches(stored):
    """tip keeps half of the step's tokens, however they are batched: no micro-batch has statistics of its own."""
    step = [to_weight_inputs(sample, 0, 1.0) for sample in read_scored(stored, 0)]
    run = under(stored, "weight.name=tip", "train.tokens_per_micro_batch=200")
    batches = Trainer(run, "cpu").micro_batches(0, list(read_scored(run, 0)))
    assert len(batches) > 3
    kept = torch.cat([batch.weight_N for batch in batches])
    assert sum(float(weight.sum()) for weight in weigh(WEIGHTS.build("tip", {}), step)) == float(kept.sum())
    assert {float(batch.weight_N.mean()) for batch in batches} != {0.5}


def test_a_weight_whose_columns_are_not_stored_is_refused_with_the_settings_to_add(tmp_path):
    output = tmp_path / "run"
    assert invoke("train", "--recipe", QUICKSTART, *sets("train.steps=1"), "--output", output).code == 0
    result = invoke("analyze-position", output, "--set", "weight.name=fire")
    assert result.code == ExitCode.RECIPE_MISMATCH
    assert "`rollout.entropy = true`, `score.entropy = true`" in result.err
    assert invoke("analyze-position", output, "--set", "weight.name=linear_decay").code == 0


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_more_most_probable_tokens_than_there_are_are_refused(tmp_path, dry):
    overrides = sets("objective.name=jsd", "objective.top_k=56")
    result = invoke("train", "--recipe", QUICKSTART, *overrides, "--output", tmp_path / "run", *dry)
    assert result.code == ExitCode.USAGE
    assert "score.top_k: 56 of 56 tokens" in result.err
    assert 'support = "full"' in result.err
    assert not (tmp_path / "run").exists()


# ── Several teachers ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def two_teachers(tmp_path) -> Path:
    """A recipe of two teachers, and its prompts: every third is for the student's twin, the others for the teacher."""
    rows = [
        {"text": "".join(np.random.default_rng(i).permutation(list("abcdefghijkl"))) + "?", "who": "abc"[i % 3 > 0]}
        for i in range(32)
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "two.toml"
    recipe.write_text(
        QUICKSTART.read_text()
        .replace('[teacher]\nmodel = "toy:teacher"\ndtype = "float32"', TEACHERS)
        .replace('source = "toy:sort12"\nlimit = 4096', PROMPTS.format(tmp_path / "prompts.jsonl"))
    )
    return recipe


MODEL = '[teachers.{}]\nmodel = "toy:{}"\ndtype = "float32"\n'
TEACHERS = MODEL.format("a", "student") + MODEL.format("b", "teacher")
PROMPTS = 'source = "{}"\nprompt_column = "text"\nteacher_column = "who"\nsuffix = ""'


def test_each_response_is_scored_by_the_teacher_of_its_prompt(two_teachers, tmp_path):
    """Of the two, one is the student itself, so A is 0 on its prompts and not on the others."""
    output = tmp_path / "run"
    common = [*sets("train.steps=1")[2:], "--output", output]
    result = invoke("train", "--recipe", two_teachers, *common)
    assert result.code == 0, result.err
    run = load_run(output)
    scored = list(read_scored(run, 0))
    assert {sample.response.teacher for sample in scored} == {"teacher-a", "teacher-b"}
    for sample in scored:
        size = np.abs(to_weight_inputs(sample, 0, 1.0).advantage_T).max()
        assert (size < 1e-4) == (sample.response.teacher == "teacher-a")
    parts = [stage.manifest()["parts"] for stage in run.score_stages(0).values()]
    assert sum(part["rows"] for stage in parts for part in stage) == len(scored) == 8


def test_teachers_score_one_by_one_on_their_own_and_give_the_same_student(two_teachers, tmp_path):
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


def test_full_vocabulary_losses_take_the_matrix_of_each_response_s_own_teacher(two_teachers, tmp_path):
    """One teacher has hidden states of another size than the other: neither could stand in."""
    overrides = ["train.steps=1", "objective.name=reverse_kl", "objective.support=full"]
    common = [*sets(*overrides)[2:], "--output", tmp_path / "run"]
    result = invoke("train", "--recipe", two_teachers, *common)
    assert result.code == 0, result.err
    assert load_run(tmp_path / "run").update(0)["metrics"]["divergence"] > 0


def test_a_prompt_that_names_no_teacher_of_the_recipe_is_refused(two_teachers, tmp_path):
    rows = (tmp_path / "prompts.jsonl").read_text().replace('"who": "a"', '"who": "bb"', 1)
    (tmp_path / "prompts.jsonl").write_text(rows)
    result = invoke("rollout", "--recipe", two_teachers, *sets()[2:], "--output", tmp_path / "run")
    assert result.code == ExitCode.BAD_DATA
    assert "no teacher `bb`" in result.err
    assert not (tmp_path / "run").exists()


# ── A teacher with a prompt of its own ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def own_prompts(tmp_path: Path) -> Callable[..., list[object]]:
    """Return the words of a run whose teacher is the student, and whose rows have columns for it."""

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


def test_a_teacher_with_a_prompt_of_its_own_scores_the_response_behind_that(own_prompts, tmp_path):
    result = invoke("train", *own_prompts("prompts.teacher_prompt_column=told"))
    assert result.code == 0, result.err
    assert "one and the same model" not in result.err
    run = load_run(tmp_path / "run")
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
    assert load_run(tmp_path / "run").update(0)["metrics"]["abs_advantage"] > 0.1


def test_the_teacher_goes_on_from_prefixes_behind_its_own_prompt(own_prompts, tmp_path, monkeypatch):
    assert invoke("rollout", *own_prompts("prompts.teacher_prompt_column=told")).code == 0
    lengths, generate = {}, TransformersEngine.generate

    def noted(engine: Any, requests: list[Any], *others: Any, **options: Any) -> Any:
        lengths[len(lengths)] = {len(request.prompt_ids) for request in requests[::10]}  # the prefixes of 0 %
        return generate(engine, requests, *others, **options)

    monkeypatch.setattr(TransformersEngine, "generate", noted)
    settings = ["--set", "continuations.responses=4"]
    result = invoke("analyze-position", tmp_path / "run", "--continuations", *settings)
    assert set(map(frozenset, lengths.values())) == {frozenset({13}), frozenset({26})}, result.err


def test_a_teacher_told_the_same_makes_the_same_student(own_prompts, tmp_path):
    model = "teacher.model=toy:teacher"
    for column, output in (("null", "plain"), ("text", "same")):
        settings = [] if column == "null" else [f"prompts.teacher_prompt_column={column}"]
        assert invoke("train", *own_prompts(model, *settings, output=output)).code == 0
    student = "student/step-00001/model.safetensors"
    assert (tmp_path / "plain" / student).read_bytes() == (tmp_path / "same" / student).read_bytes()


@pytest.mark.parametrize(
    ("setting", "code", "told"),
    [
        ("prompts.teacher_prompt_column=long", ExitCode.BAD_DATA, "longer than prompts.max_tokens = 32: `0` with 40"),
        ("prompts.teacher_prompt_column=tld", ExitCode.BAD_DATA, "did you mean `told`?"),
        ("prompts.source=toy:sort12", ExitCode.USAGE, "prompts.teacher_prompt_column: `toy:sort12` has no columns"),
    ],
)
def test_a_teacher_s_prompt_that_cannot_be_is_refused(own_prompts, tmp_path, setting, code, told):
    result = invoke("train", *own_prompts("prompts.teacher_prompt_column=told", setting))
    assert result.code == code
    assert told in result.err
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


def test_a_user_s_own_weight_and_objective_by_plugin(tmp_path):
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
    listed = run_opdctl(tmp_path, "train", "--list-weights", "--output", "run", "--json")
    assert "last_token" in [entry["name"] for entry in json.loads(listed.stdout)["weights"]]
    misspelt = sets(*chosen, "weight.name=last_tokn")
    typo = run_opdctl(tmp_path, "train", "--recipe", QUICKSTART, *misspelt, "--output", "b")
    assert typo.returncode == ExitCode.USAGE
    assert "did you mean `last_token`?" in typo.stderr


def test_a_plugin_s_weights_are_listed_before_any_recipe_names_them(tmp_path):
    (tmp_path / "mine.py").write_text(PLUGIN)
    listed = run_opdctl(tmp_path, "train", "--list-weights", *sets("plugins=['mine']"), "--json")
    assert "last_token" in [entry["name"] for entry in json.loads(listed.stdout)["weights"]]
    typo = run_opdctl(tmp_path, "train", "--list-weights", *sets("plugins=['mime']"))
    assert typo.returncode == ExitCode.USAGE
    assert "plugins: `mime`" in typo.stderr


@pytest.mark.parametrize(
    ("text", "why"),
    [(None, "no such module"), ("import nothing_of_the_kind", "nothing_of_the_kind"), ("1 / 0", "ZeroDivisionError")],
)
def test_a_plugin_that_is_not_there_or_fails_is_one_clear_error(tmp_path, text, why):
    if text is not None:
        (tmp_path / "broken.py").write_text(text)
    result = run_opdctl(tmp_path, "train", "--recipe", QUICKSTART, *sets("plugins=['broken']"), "--output", "run")
    assert result.returncode == ExitCode.USAGE
    assert "plugins: `broken`" in result.stderr
    assert why in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_weight_that_is_no_dataclass_is_refused():
    class Odd(Weight):
        def __call__(self, response: Any) -> Any:
            return np.ones(len(response))

    WEIGHTS.register("odd")(Odd)
    try:
        with pytest.raises(OpdctlError, match="must be a dataclass"):
            load_recipe([QUICKSTART], ["weight.name=odd"])
    finally:
        del WEIGHTS._makers["odd"]


@pytest.mark.parametrize(("flag", "registry"), [("--list-weights", WEIGHTS), ("--list-objectives", OBJECTIVES)])
def test_the_components_are_listed_with_parameters_and_source(flag, registry):
    result = invoke("train", flag, "--json")
    assert result.code == 0, result.err
    (found,) = (value for key, value in result.json().items() if key != "schema_version")
    assert [entry["name"] for entry in found] == registry.names()
    for entry in found:
        assert entry["summary"]
        assert entry["source"]
        assert f"{entry['name']}  {entry['summary']}" in result.err
        for name, value in entry["parameters"].items():
            assert f"{name} = {json.dumps(value)}" in result.err

"""The stages joined: one command or many, killed or not, cut this way or that - the same student."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import artifacts, invoke, names, sets, small_recipe
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

from opdctl.artifacts.records import Response, TokenScores
from opdctl.artifacts.tables import read_rows
from opdctl.engines.pool import open_engine_pool
from opdctl.errors import ExitCode, OpdctlError
from opdctl.losses.token_weights import IwOpd
from opdctl.models.loading import load_model
from opdctl.pipeline import loop, progress, rollout, score
from opdctl.runs.open import open_run
from opdctl.runs.run import load_run
from opdctl.runs.scored_responses import join, read_scored, to_weight_inputs
from opdctl.training.trainer import Trainer

QUICKSTART = Path(__file__).parent.parent / "recipes" / "quickstart.toml"


def train(output: Path, *overrides: str):
    return invoke("train", "--recipe", QUICKSTART, *sets(*overrides), "--output", output, "--json")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    """A small run made by one `train`."""
    path = tmp_path_factory.mktemp("undisturbed") / "run"
    result = train(path)
    assert result.code == 0, result.err
    return path


@pytest.fixture
def copy(undisturbed, tmp_path) -> Path:
    return Path(shutil.copytree(undisturbed, tmp_path / "run"))


def test_training_moves_the_student(undisturbed):
    run = load_run(undisturbed)
    before, after = (load_file(run.student_at(step).path / "model.safetensors") for step in (0, 2))
    assert before.keys() == after.keys()
    assert any((before[name] != after[name]).any() for name in before)


def test_the_stages_one_by_one_make_the_same_student_bit_for_bit(undisturbed, tmp_path):
    common = ["--recipe", QUICKSTART, *sets(), "--output", tmp_path / "run"]
    for _ in range(2):
        for stage in (["rollout"], ["score-teacher"], ["train", "--no-fill"]):
            result = invoke(*stage, *common)
            assert result.code == 0, result.err
    assert artifacts(tmp_path / "run") == artifacts(undisturbed)


KILLED = ("train.steps=3", "eval.every_steps=1", "train.keep_latest=1", "train.keep_every_steps=2")
CHANGES = ("replace", "rename", "unlink", "rmdir")


def changes_until_done(output: Path, kill_at: int | None) -> int:
    """Train in a forked process that is killed just before its `kill_at`-th change of a folder; return its wait status.

    Parts, manifests and directories come and go by these calls of `os` alone, so between two of them a kill leaves the
    same names behind.
    """
    child = os.fork()
    if child == 0:
        count = 0

        def counted(call):
            def change(*arguments, **options):
                nonlocal count
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                return call(*arguments, **options)

            return change

        for name in CHANGES:
            setattr(os, name, counted(getattr(os, name)))
        code = train(output, *KILLED).code
        (output / "changes").write_text(str(count))
        os._exit(code)
    return os.waitpid(child, 0)[1]


def test_killed_before_any_of_its_changes_and_started_again_it_ends_the_same(tmp_path):
    whole = tmp_path / "whole"
    assert changes_until_done(whole, None) == 0
    total = int((whole / "changes").read_text())
    assert total > 100
    for moment in range(0, total, 11):
        output = tmp_path / f"killed-{moment}"
        assert os.WTERMSIG(changes_until_done(output, moment)) == signal.SIGKILL
        assert os.waitstatus_to_exitcode(changes_until_done(output, None)) == 0, moment
        assert artifacts(output) == artifacts(whole), moment
        assert sorted(names(output)) == sorted(names(whole)), moment
        assert len((output / "metrics.jsonl").read_text().splitlines()) == 3
        shutil.rmtree(output)


def test_killed_again_and_again_it_still_ends_with_the_same_student(tmp_path):
    output, kills = tmp_path / "run", 0
    while os.WIFSIGNALED(changes_until_done(output, 20)):
        kills += 1
        assert kills < 50
    assert kills > 3
    assert changes_until_done(tmp_path / "whole", None) == 0
    assert artifacts(output) == artifacts(tmp_path / "whole")


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, ExitCode.REQUEUE),
        (signal.SIGUSR1, ExitCode.REQUEUE),
        (signal.SIGINT, ExitCode.INTERRUPTED),
    ],
)
def test_a_cluster_s_signal_or_ctrl_c_stops_it_and_the_same_command_goes_on(undisturbed, tmp_path, number, code):
    output = tmp_path / "run"
    arguments = ["--recipe", str(QUICKSTART), *sets("train.steps=200"), "--output", str(output)]
    command = [sys.executable, "-m", "opdctl", "train", *arguments]
    # Ctrl-C counts even where these tests run in the background of a shell, which has its jobs ignore it.
    heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    assert running.stderr is not None
    assert running.stderr.readline().startswith("step   1/200")
    running.send_signal(number)
    _, said = running.communicate()
    assert running.returncode == code
    assert not list(output.rglob(".tmp-*"))
    assert "run the same command again to go on" in said
    assert "Traceback" not in said
    again = train(output, "train.steps=2")
    assert again.code == 0, again.err
    for step in (0, 1):
        name = f"step-0000{step}/rollout/part-00000-of-00002.parquet"
        assert (output / name).read_bytes() == (undisturbed / name).read_bytes()


def test_a_finished_command_does_nothing_and_says_so(copy):
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}
    for command in ("rollout", "score-teacher", "train"):
        result = invoke(command, "--output", copy)
        assert result.code == 0
        assert "nothing to do" in result.err
        assert "all 2 steps are done" in result.err
    assert before == {path: path.stat().st_mtime_ns for path in copy.rglob("*") if path.is_file()}


def test_more_steps_go_on_from_the_last(undisturbed, copy, tmp_path):
    longer = train(copy, "train.steps=3")
    assert longer.code == 0, longer.err
    assert longer.json()["steps"] == 3
    assert train(tmp_path / "at-once", "train.steps=3").code == 0
    for name in ("model.safetensors", "config.json"):
        at = Path("student/step-00003") / name
        assert (copy / at).read_bytes() == (tmp_path / "at-once" / at).read_bytes()


def test_training_without_scores_names_the_command_that_is_next(tmp_path):
    result = invoke("train", "--no-fill", "--recipe", QUICKSTART, *sets(), "--output", tmp_path / "run")
    assert result.code == ExitCode.FAILED
    assert f"opdctl rollout --output {tmp_path / 'run'}" in result.err


def test_scoring_without_responses_names_the_command_that_is_next(tmp_path):
    result = invoke("score-teacher", "--recipe", QUICKSTART, *sets(), "--output", tmp_path / "run")
    assert result.code == ExitCode.FAILED
    assert "opdctl rollout" in result.err


@pytest.mark.parametrize("change", ["weight.gamma=0.7", "rollout.max_tokens=150", "seed=1", "train.learning_rate=1e-3"])
def test_a_changed_recipe_is_refused_with_what_changed_and_the_ways_on(copy, change):
    before = artifacts(copy)
    result = train(copy, change)
    assert result.code == ExitCode.RECIPE_MISMATCH
    assert f"{change.split('=')[0]} " in result.err
    assert "→" in result.err
    assert "another --output" in result.err
    assert artifacts(copy) == before


@pytest.mark.parametrize("stage", ["rollout", "teacher"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "removed"])
def test_a_damaged_part_stops_the_analysis_is_shown_by_status_and_repaired(copy, stage, damage):
    part = next((copy / "step-00000" / stage).glob("part-00001*"))
    whole = part.read_bytes()
    if damage == "removed":
        part.unlink()
    else:
        part.write_bytes(whole[:-7] if damage == "truncated" else whole[:99] + bytes([whole[99] ^ 1]) + whole[100:])
    result = invoke("analyze-position", copy)
    assert result.code == ExitCode.BAD_DATA
    assert str(part) in result.err
    assert "--repair" in result.err
    shown = invoke("status", copy, "--verify", "--json")
    assert shown.code == ExitCode.BAD_DATA
    assert [s["state"] for s in shown.json()["stages"][:2]].count("damaged") == 1
    command = shown.json()["next"].split()[1:]
    assert "--repair" in command
    assert invoke(*command).code == 0
    assert part.read_bytes() == whole
    assert invoke("status", copy, "--verify").code == 0


def flip(path: Path) -> bytes:
    """Flip a bit in the middle of a file and return what it was."""
    whole = path.read_bytes()
    at = len(whole) // 2
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    return whole


def test_the_last_step_of_a_finished_run_is_repaired_without_naming_it(copy):
    part = next((copy / "step-00001" / "rollout").glob("part-00000*"))
    whole = flip(part)
    result = invoke("rollout", "--output", copy, "--repair")
    assert result.code == 0, result.err
    assert part.read_bytes() == whole


def test_repair_that_cannot_make_a_part_again_leaves_it_and_status_does_not_ask_for_it(tmp_path):
    output = tmp_path / "run"
    assert train(output, "train.steps=3", "train.keep_latest=1", "train.keep_every_steps=50").code == 0
    part = next((output / "step-00001" / "rollout").glob("part-00000*"))
    flip(part)
    damaged = part.read_bytes()
    result = invoke("rollout", "--output", output, "--step", "1", "--repair")
    assert result.code == ExitCode.USAGE
    assert "is not kept" in result.err
    assert part.read_bytes() == damaged
    assert "--repair" not in invoke("status", output, "--verify", "--json").json()["next"]


def test_status_finds_a_damaged_evaluation_and_eval_repairs_it(copy):
    assert invoke("eval", "--output", copy).code == 0
    part = next((copy / "eval/sort12/step-00002").glob("part-*"))
    whole = flip(part)
    assert invoke("status", copy, "--verify").code == ExitCode.BAD_DATA
    result = invoke("eval", "--output", copy)
    assert result.code == ExitCode.BAD_DATA
    hint = next(line for line in result.err.splitlines() if line.startswith("hint"))
    command = hint.partition("opdctl ")[2].partition("`")[0].split()
    assert invoke(*command).code == 0
    assert part.read_bytes() == whole


def test_status_misses_the_newest_student_but_no_trainer_state_which_updates_make_again(copy):
    shutil.rmtree(copy / "trainer/step-00002")
    assert invoke("status", copy).code == 0
    shutil.rmtree(copy / "student/step-00002")
    result = invoke("status", copy)
    assert result.code == ExitCode.BAD_DATA
    assert "student/step-00002" in result.err


def test_accuracies_of_another_protocol_are_not_shown_beside_one_another(tmp_path):
    output = tmp_path / "run"
    assert train(output, "eval.every_steps=2").json()["accuracy"]["before"] is not None
    later = train(output, "eval.every_steps=2", "eval.samples=2", "train.steps=4").json()["accuracy"]
    assert later["before"] is None
    assert later["after"] is not None


def test_fewer_steps_than_are_done_are_nothing_to_do(copy):
    result = train(copy, "train.steps=1")
    assert result.code == 0, result.err
    assert result.json()["steps"] == 2
    assert "nothing to do" in result.err


def test_every_default_is_written_out_so_naming_one_changes_nothing(copy):
    assert "dual_clip = 3.0" in (copy / "recipe.toml").read_text()
    assert train(copy, "objective.dual_clip=3").code == 0


def test_a_damaged_student_is_named_before_it_is_used(copy):
    path = copy / "student/step-00002/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    result = train(copy, "train.steps=3")
    assert result.code == ExitCode.BAD_DATA
    assert str(path) in result.err


def test_a_run_directory_that_was_moved_still_works(copy, tmp_path):
    moved = copy.rename(tmp_path / "elsewhere")
    assert train(moved, "train.steps=3").code == 0


def test_another_model_under_the_same_path_is_refused(tmp_path):
    model = tmp_path / "student"
    shutil.copytree(QUICKSTART.parent.parent / "opdctl/tasks/models/student", model)
    assert (
        invoke("rollout", "--recipe", QUICKSTART, *sets(f"student.model={model}"), "--output", tmp_path / "run").code
        == 0
    )
    shutil.copy(QUICKSTART.parent.parent / "opdctl/tasks/models/student-spread/model.safetensors", model)
    result = invoke("rollout", "--output", tmp_path / "run")
    assert result.code == ExitCode.RECIPE_MISMATCH
    assert "is not the one this run began with" in result.err


# ── Numbers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def gradient(run, step=0) -> dict[str, torch.Tensor]:
    """Return the gradient that a step's responses give, before clipping."""
    trainer = Trainer(run, "cpu")
    for batch in trainer.micro_batches(step, list(read_scored(run, step))):
        trainer._backward(batch)
    return {name: parameter.grad.clone() for name, parameter in trainer._model.named_parameters()}


def assert_same_gradient(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """Within 1e-5 of each parameter's gradient by norm: what float32 leaves of sums over a thousand tokens."""
    assert found.keys() == want.keys()
    for name, value in found.items():
        assert (value.double() - want[name].double()).norm() <= 1e-5 * want[name].norm(), name


@pytest.fixture(scope="module")
def scored_run(tmp_path_factory):
    """A run whose first step is rolled out and scored."""
    run = open_run(small_recipe(), tmp_path_factory.mktemp("scored") / "run")
    with open_engine_pool(run.recipe, "cpu") as engines:
        rollout.run_rollout(run, 0, engines)
        score.run_scoring(run, 0, engines)
    return run


@pytest.mark.parametrize("budget", [1, 300, 700])
def test_the_gradient_does_not_depend_on_the_micro_batches(scored_run, budget):
    train_settings = scored_run.recipe.train.model_copy(update={"tokens_per_micro_batch": budget})
    recipe = scored_run.recipe.model_copy(update={"train": train_settings})
    cut = dataclasses.replace(scored_run, recipe=recipe)
    assert_same_gradient(gradient(cut), gradient(scored_run))


def test_recomputed_activations_give_the_same_gradient_and_are_recomputed(scored_run, monkeypatch):
    train_settings = scored_run.recipe.train.model_copy(update={"gradient_checkpointing": True})
    recipe = scored_run.recipe.model_copy(update={"train": train_settings})
    calls = []
    monkeypatch.setattr(Qwen3MLP, "forward", counted(Qwen3MLP.forward, calls))
    found = gradient(dataclasses.replace(scored_run, recipe=recipe))
    recomputed = len(calls)
    calls.clear()
    assert_same_gradient(found, gradient(scored_run))
    assert recomputed == len(calls) + 2  # each of the two layers once more


def counted(function, calls):
    def count(*arguments):
        calls.append(1)
        return function(*arguments)

    return count


def test_the_gradient_is_that_of_the_formula_on_full_logits(scored_run):
    """- (1 / tokens) Σ w_t A_t ∇ log p, one response at a time, in float64."""
    model = load_model(scored_run.student, device="cpu").double()
    samples = list(read_scored(scored_run, 0))
    tokens = sum(len(sample.response.response_ids) for sample in samples)
    for sample in samples:
        prompt, response = sample.response.prompt_ids, sample.response.response_ids
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
        logp = model(ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        logp = logp.gather(-1, ids[len(prompt) :, None]).squeeze(-1)
        advantage = torch.from_numpy(sample.teacher.logprobs).double() - logp.detach()
        spent = advantage.abs().cumsum(0) - advantage.abs()
        weight = 1 + 0.5 * (1 - spent / advantage.abs().sum())
        (-(weight * advantage * logp).sum() / tokens).backward()
    assert_same_gradient(gradient(scored_run), {name: p.grad for name, p in model.named_parameters()})


def test_stored_logprobs_are_those_of_the_models(scored_run):
    """The rollout's log-probs against the student, the teacher's against the teacher, by plain forward passes."""
    models = {name: load_model(model, device="cpu") for name, model in scored_run.models.items()}
    for sample in read_scored(scored_run, 0):
        prompt, response = sample.response.prompt_ids, sample.response.response_ids
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
        for name, stored in (("student", sample.response.logprobs), ("teacher", sample.teacher.logprobs)):
            with torch.no_grad():
                whole = models[name](ids[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            want = whole.gather(-1, ids[len(prompt) :, None]).squeeze(-1)
            np.testing.assert_allclose(stored, want.numpy(), rtol=0, atol=2e-4)


def test_a_teacher_equal_to_the_student_gives_no_advantage(tmp_path):
    output = tmp_path / "run"
    result = train(output, "teacher.model=toy:student", "train.steps=1")
    assert result.code == 0, result.err
    advantage = np.concatenate(
        [to_weight_inputs(sample, 0, 1.0).advantage_T for sample in read_scored(load_run(output), 0)]
    )
    assert np.abs(advantage).max() < 1e-4
    assert load_run(output).update(0)["metrics"]["abs_advantage"] < 1e-5


def test_in_bfloat16_the_noise_floor_of_the_advantage_is_small(tmp_path):
    """Teacher = student in bfloat16: what is left of |A| is rounding, and it enters the weights."""
    output = tmp_path / "run"
    both = ("student.dtype=bfloat16", "teacher.dtype=bfloat16", "teacher.model=toy:student", "train.steps=1")
    result = train(output, *both)
    assert result.code == 0, result.err
    advantage = np.concatenate(
        [to_weight_inputs(sample, 0, 1.0).advantage_T for sample in read_scored(load_run(output), 0)]
    )
    assert 0 < np.abs(advantage).mean() < 0.01


def test_several_updates_on_one_batch_keep_the_first_policy_as_the_old_one(tmp_path):
    """The second update's mean ratio is p(after one update) / p(before any), by plain forward passes."""
    once, twice = tmp_path / "once", tmp_path / "twice"
    for output, updates in ((once, 1), (twice, 2)):
        result = train(output, f"train.updates_per_step={updates}", "train.steps=1", "train.learning_rate=3e-4")
        assert result.code == 0, result.err
    run = load_run(once)
    before, after = (load_model(run.student_at(step), device="cpu") for step in (0, 1))
    ratios = []
    for sample in read_scored(run, 0):
        prompt, response = sample.response.prompt_ids, sample.response.response_ids
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
        with torch.no_grad():
            logps = [m(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for m in (after, before)]
        taken = [logp.gather(-1, ids[0, len(prompt) :, None]) for logp in logps]
        ratios.append((taken[0] - taken[1]).exp())
    assert run.update(0)["metrics"]["ratio"] == pytest.approx(1, abs=1e-5)
    want = float(torch.cat(ratios).mean())
    assert abs(want - 1) > 1e-3
    assert load_run(twice).update(0)["metrics"]["ratio"] == pytest.approx(want, abs=1e-4)


def test_bfloat16_students_keep_float32_master_weights(tmp_path):
    output = tmp_path / "run"
    result = train(output, "student.dtype=bfloat16", "train.steps=2")
    assert result.code == 0, result.err
    exported = load_torch(output / "student/step-00002/model.safetensors")
    files = (output / "trainer/step-00002").iterdir()
    master = {name: value for file in files for name, value in load_torch(file).items()}
    for name, value in exported.items():
        assert value.dtype == torch.bfloat16
        assert master[f"weight/{name}"].dtype == torch.float32
        torch.testing.assert_close(master[f"weight/{name}"].bfloat16(), value, rtol=0, atol=0)


def test_the_exported_student_is_a_plain_model_directory(undisturbed):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = undisturbed / "student/step-00002"
    model, info = AutoModelForCausalLM.from_pretrained(path, local_files_only=True, output_loading_info=True)
    assert not info["missing_keys"]
    assert AutoTokenizer.from_pretrained(path, local_files_only=True).decode([2, 3]) == "ab"
    assert model.generation_config.eos_token_id == 1


# ── Rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_prompt_of_an_epoch_is_drawn_once_and_later_epochs_have_another_order(undisturbed):
    run = load_run(undisturbed)  # 32 prompts, 8 a step
    epochs = [
        [prompt.prompt_id for step in range(4 * e, 4 * e + 4) for _, prompt in run.samples(step)] for e in (0, 1, 2)
    ]
    assert all(len(set(epoch)) == 32 for epoch in epochs)
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] == [prompt.prompt_id for prompt in run.prompts]


def test_every_response_is_there_once_with_its_policy_and_answer(undisturbed):
    run = load_run(undisturbed)
    stage = run.rollout_stage(1)
    rows = [row for index in range(2) for row in read_rows(stage.verify(index), Response)]
    assert [row.sample_id for row in rows] == [name for name, _ in run.samples(1)]
    for row in rows:
        assert row.policy_version == 1
        assert row.answer == "".join(sorted(row.prompt_id.removeprefix("sort12-")))


def test_joining_is_strict(scored_run):
    samples = list(read_scored(scored_run, 0))
    responses = [sample.response for sample in samples]
    scores = {sample.response.sample_id: sample.teacher for sample in samples}
    first = responses[0].sample_id
    logprobs = scores[first].logprobs
    backwards = {"teacher": dict(reversed(scores.items()))}
    assert [s.response.sample_id for s in join(responses, backwards)] == [r.sample_id for r in responses]
    for broken, why in [
        ({k: v for k, v in scores.items() if k != first}, first),
        (scores | {"stranger": scores[first]}, "stranger"),
        (scores | {first: TokenScores(logprobs[:-1])}, "logprobs of the teacher"),
        (scores | {first: TokenScores(np.full_like(logprobs, np.nan))}, "position 0 is nan"),
        (
            scores | {first: TokenScores(np.append(logprobs[:-1], np.float32(-np.inf)))},
            f"position {len(logprobs) - 1} is -inf",
        ),
    ]:
        with pytest.raises(OpdctlError, match=why) as caught:
            join(responses, {"teacher": broken})
        assert caught.value.code == ExitCode.BAD_DATA
    spoilt = TokenScores(logprobs, entropies=np.full_like(logprobs, np.nan))
    with pytest.raises(OpdctlError, match="entropies at position 0 is nan"):
        join(responses, {"teacher": scores | {first: spoilt}})
    with pytest.raises(OpdctlError, match="occurs twice"):
        join([*responses, responses[0]], {"teacher": scores})
    with pytest.raises(OpdctlError, match="a teacher `teacher` that there is not"):
        join(responses, {"teacher-math": scores})
    with pytest.raises(OpdctlError, match="teacher-math"):
        join(responses, {"teacher": scores, "teacher-math": {first: scores[first]}})


def test_old_students_go_and_the_ones_to_keep_stay(tmp_path):
    output = tmp_path / "run"
    assert train(output, "train.steps=6", "train.keep_every_steps=4", "train.keep_latest=1").code == 0
    assert load_run(output).kept_steps() == [0, 4, 6]
    assert [path.name for path in (output / "trainer").iterdir()] == ["step-00006"]
    result = invoke("eval", "--output", output, "--step", "3")
    assert result.code == ExitCode.USAGE
    assert "0, 4, 6" in result.err


def test_the_clock_covers_every_stage(tmp_path):
    run = open_run(small_recipe("eval.every_steps=1", "train.steps=1"), tmp_path / "run")
    clock = loop.run_training(run, "cpu")
    assert all(seconds > 0 for seconds in clock.seconds.values())
    accuracy = progress.accuracy(run)
    assert set(accuracy) == {"before", "after", "teacher"}
    assert all(0 <= value <= 1 for value in accuracy.values())


def test_the_weights_in_training_and_in_the_analysis_are_one_function(scored_run):
    trainer = Trainer(scored_run, "cpu")
    batches = trainer.micro_batches(0, list(read_scored(scored_run, 0)))
    weights = {
        s.response.sample_id: w for b in batches for s, w in zip(b.samples, b.padded.split(b.weight_N), strict=True)
    }
    for sample in read_scored(scored_run, 0):
        want = IwOpd(0.5)(to_weight_inputs(sample, 0, 1.0))
        np.testing.assert_allclose(weights[sample.response.sample_id].numpy(), want, rtol=0, atol=1e-6)

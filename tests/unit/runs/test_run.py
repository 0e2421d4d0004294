import json
import shutil
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from helpers.commands import invoke, rewrite_json
from torch.utils.data import RandomSampler

from opdctl.artifacts import directories, files
from opdctl.data.order import epoch_order
from opdctl.data.prompts import load_problems
from opdctl.errors import ExitCode, OpdctlError
from opdctl.recipe.schema import Lora
from opdctl.runs.run import Run, UnrecordedUpdate, read_recipe


def error_of(call) -> OpdctlError:
    with pytest.raises(OpdctlError) as caught:
        call()
    return caught.value


# ── Loading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_run_loads_without_its_models(finished_copy):
    path = finished_copy / "run.json"
    models = json.loads(path.read_text())["models"]
    rewrite_json(path, models={name: {**model, "path": "/nowhere"} for name, model in models.items()})
    run = Run.load(finished_copy)
    assert run.student.path == Path("/nowhere")
    assert run.digests["student"] == models["student"]["digest"]
    assert (run.start_step, run.current_step(), run.forked_from) == (0, 2, None)
    assert len(run.prompts) == 32


@pytest.mark.parametrize(
    ("remove", "kind"), [("recipe.toml", "missing_run"), ("run.json", "missing_run"), ("step-00000", None)]
)
def test_incomplete_run_is_refused(finished_copy, remove, kind):
    path = finished_copy / remove
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if kind is None:
        run = Run.load(finished_copy)
        assert (run.current_step(), run.finished_steps(), run.removed_steps()) == (2, [1], [0])
    else:
        assert error_of(lambda: Run.load(finished_copy)).kind == kind


def begin_second_update(path: Path) -> tuple[Run, Future[None], str]:
    """Return a run whose second update is not recorded, what is to end when it is, and the text of its record."""
    text, written = (path / "step-00001/update.json").read_text(), Future()
    (path / "step-00001/update.json").unlink()
    run = Run.load(path)
    record = json.loads(text)
    run.begin_update(UnrecordedUpdate(1, record["metrics"], record["probe"], written))
    return run, written, text


def test_unrecorded_update_counts_without_a_wait(finished_copy):
    recorded = Run.load(finished_copy)
    probe, metrics = recorded.student_at(2).probe, recorded.update(1)["metrics"]
    run, _, _ = begin_second_update(finished_copy)
    assert (run.current_step(), run.finished_steps()) == (2, [0, 1])
    assert (run.metrics(0), run.metrics(1)) == (recorded.metrics(0), metrics)
    assert (run.student_at(2).path, run.student_at(2).probe) == (run.student_path(2), probe)
    assert not run.rollout_stage(2).is_finished()
    assert Run.load(finished_copy).current_step() == 1  # for others


@pytest.mark.parametrize(
    "wait",
    [
        lambda run: run.update(1),
        lambda run: run.student_digest(2),
        lambda run: run.student_digests(2),
        lambda run: run.rollout_stage(2).fingerprint.digest,
        lambda run: run.begin_update(UnrecordedUpdate(2, {}, {"ids": [], "logprobs": []}, Future())),
    ],
)
def test_what_needs_the_record_of_an_update_waits_for_it(finished_copy, wait):
    run, written, text = begin_second_update(finished_copy)
    with ThreadPoolExecutor(1) as waiting:
        value = waiting.submit(wait, run)
        with pytest.raises(TimeoutError):
            value.result(0.2)
        (finished_copy / "step-00001/update.json").write_text(text)
        written.set_result(None)
        assert value.result(10) == wait(Run.load(finished_copy))


def test_update_that_could_not_be_recorded_is_an_error_for_all_that_need_it(finished_copy):
    run, written, _ = begin_second_update(finished_copy)
    written.set_exception(OpdctlError("disk_full", "no space"))
    for _ in range(2):
        assert error_of(lambda: run.student_digest(2)).kind == "disk_full"
        assert error_of(run.finish_update).kind == "disk_full"


def test_misspelt_run_gets_the_nearest_name(finished_copy):
    error = error_of(lambda: Run.load(finished_copy.with_name("rum")))
    assert error.kind == "missing_run"
    assert f"did you mean `{finished_copy}`?" in error.message


def test_run_without_a_recorded_model_is_corrupt(finished_copy):
    models = json.loads((finished_copy / "run.json").read_text())["models"]
    rewrite_json(finished_copy / "run.json", models={"student": models["student"]})
    error = error_of(lambda: Run.load(finished_copy))
    assert error.kind == "corrupt_artifact"
    assert "`teacher`" in error.message


@pytest.mark.parametrize("version", [{"schema_version": 4, "artifact": ..., "version": ...}, {"version": 6}], ids=str)
@pytest.mark.parametrize("read", [Run.load, read_recipe])
def test_other_version_is_refused_before_its_recipe_is_read(finished_copy, version, read):
    rewrite_json(finished_copy / "run.json", **version)
    (finished_copy / "recipe.toml").write_text("prompts.count = 32\n")  # a key of version 4
    error = error_of(lambda: read(finished_copy))
    assert (error.kind, error.code) == ("unsupported_version", ExitCode.BAD_DATA)
    assert str(finished_copy / "run.json") in error.message
    assert error.hint


# ── Steps ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_next_command_follows_the_stages(finished_copy):
    run = Run.load(finished_copy)
    assert run.next_command() == f"opdctl analyze-position {finished_copy}"
    (finished_copy / "step-00001/update.json").unlink()
    assert run.next_command() == f"opdctl train {finished_copy}"
    shutil.rmtree(finished_copy / "step-00001/teacher")
    assert run.next_command() == f"opdctl score-teacher {finished_copy}"
    shutil.rmtree(finished_copy / "step-00001/rollout")
    assert run.next_command() == f"opdctl rollout {finished_copy}"


def test_next_command_quotes_the_path(finished_run, tmp_path):
    run = Run.load(Path(shutil.copytree(finished_run, tmp_path / "my run")))
    assert run.next_command() == f"opdctl analyze-position '{run.path}'"


def test_next_command_writes_a_missing_newest_student(finished_copy):
    shutil.rmtree(finished_copy / "student/step-00002")
    assert Run.load(finished_copy).next_command() == f"opdctl train {finished_copy}"


def test_states_of_steps(finished_copy):
    run = Run.load(finished_copy)
    assert [run.is_started(step) for step in range(4)] == [True, True, True, False]
    assert [run.is_sampled(step) for step in range(3)] == [True, True, False]
    assert [run.is_scored(step) for step in range(2)] == [True, True]
    assert run.finished_steps() == [0, 1]
    assert [run.count_ready_steps(stage) for stage in ("rollout", "score")] == [0, 0]
    (finished_copy / "step-00001/update.json").unlink()
    assert [run.count_ready_steps(stage) for stage in ("rollout", "score")] == [1, 1]
    next((finished_copy / "step-00001/teacher").glob("part-*")).unlink()
    assert run.is_sampled(1)
    assert not run.is_scored(1)


def test_every_epoch_has_every_prompt_once_in_another_order(finished_run):
    run = Run.load(finished_run)
    epochs = [[prompt.prompt_id for step in range(4 * e, 4 * e + 4) for _, prompt in run.samples(step)] for e in (0, 1)]
    source = [prompt.prompt_id for prompt in run.prompts]
    assert Counter(epochs[0]) == Counter(epochs[1]) == Counter(source)
    assert len({tuple(order) for order in (source, *epochs)}) == 3
    generator = torch.Generator()
    generator.manual_seed(run.recipe.seed)
    sampler = RandomSampler(source, generator=generator)
    assert epochs == [[source[i] for i in sampler] for _ in range(2)]


def test_prompts_of_a_run_keep_the_order_of_their_source(finished_run):
    run = Run.load(finished_run)
    assert [prompt.prompt_id for prompt in run.prompts] == [problem.id for problem in load_problems(run.recipe.prompts)]


def test_unknown_order_of_a_record_is_refused(finished_copy):
    path = finished_copy / "run.json"
    rewrite_json(path, prompts={**json.loads(path.read_text())["prompts"], "order": "sorted"})
    error = error_of(lambda: Run.load(finished_copy))
    assert error.kind == "corrupt_artifact"
    assert "order" in error.message


def test_sample_ids_name_prompt_step_and_sample(finished_run):
    run = Run.load(finished_run)
    settings = run.recipe.rollout.model_copy(update={"samples_per_prompt": 2, "prompts_per_step": 1})
    run = Run(run.recipe.model_copy(update={"rollout": settings}), run.path, run.models, run.digests)
    name = run.prompts[epoch_order("random_sampler", 32, run.recipe.seed, 0)[3]].prompt_id
    assert [sample for sample, _ in run.samples(3)] == [f"{name}/00003/0", f"{name}/00003/1"]


# ── Students ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_students_by_step(finished_copy):
    run = Run.load(finished_copy)
    assert run.kept_steps() == [0, 1, 2]
    assert run.student_at(0) is run.student
    assert run.student_at(1).path == finished_copy / "student/step-00001"
    assert len({run.student_digest(step) for step in range(3)}) == 3


@pytest.mark.parametrize("rank", [0, 8])
def test_trained_student_with_lora_has_the_initial_one_as_its_base(finished_copy, rank):
    run = Run.load(finished_copy)
    run = replace(run, recipe=run.recipe.model_copy(update={"lora": Lora(rank=rank)}))
    assert run.student_at(0).base is None
    run.held_students[2] = finished_copy / "student/step-00002"
    assert [run.student_at(step).base for step in (1, 2)] == [run.student if rank else None] * 2


def test_one_rank_of_a_machine_reads_a_student_to_check_it_once_until_it_changes(finished_copy, monkeypatch):
    """Engines load 61 GB at 30B parameters; every rank would read them twice."""
    run, read = Run.load(finished_copy), []

    def sha256_files(paths: list[Path]) -> dict[Path, str]:
        read.extend(path.name for path in paths)
        return files.sha256_files(paths)

    monkeypatch.setattr(directories, "sha256_files", sha256_files)
    for _ in range(2):
        run.student_at(1)
    assert read.count("model.safetensors") == 1
    launch = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    with monkeypatch.context() as patch:
        for name, value in launch.items():
            patch.setenv(name, value)
        run.student_at(2)
    assert read.count("model.safetensors") == 1
    weights = finished_copy / "student/step-00001/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert error_of(lambda: run.student_at(1)).kind == "corrupt_artifact"


@pytest.mark.parametrize(
    ("damage", "step", "kind", "hint"),
    [
        (lambda run: None, 3, "missing_checkpoint", "opdctl train"),
        (lambda run: shutil.rmtree(run / "student/step-00001"), 1, "missing_checkpoint", "0, 2"),
        (lambda run: shutil.rmtree(run / "student/step-00002"), 2, "corrupt_artifact", "opdctl train"),
        (lambda run: (run / "student/step-00001/config.json").unlink(), 1, "corrupt_artifact", "opdctl run repair"),
        (lambda run: (run / "student/step-00002/config.json").write_text("{}"), 2, "corrupt_artifact", "run repair"),
    ],
)
def test_student_that_cannot_be_used_is_refused_with_the_way_to_get_it(finished_copy, damage, step, kind, hint):
    damage(finished_copy)
    error = error_of(lambda: Run.load(finished_copy).student_at(step))
    assert error.kind == kind
    assert str(finished_copy / f"student/step-{step:05d}") in error.message
    assert hint in error.hint


def test_changed_prompts_are_refused(finished_copy):
    path = finished_copy / "prompts.parquet"
    path.write_bytes(path.read_bytes() + b"x")
    error = error_of(lambda: Run.load(finished_copy).prompts)
    assert (error.kind, error.code) == ("checksum_mismatch", ExitCode.BAD_DATA)


# ── Stages ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_changed_settings_of_a_stage_are_refused_with_what_they_affect(finished_run):
    run = Run.load(finished_run)
    settings = run.recipe.rollout.model_copy(update={"temperature": 0.7})
    changed = Run(run.recipe.model_copy(update={"rollout": settings}), run.path, run.models, run.digests)
    error = error_of(lambda: changed.rollout_stage(0))
    assert (error.kind, error.code) == ("settings_mismatch", ExitCode.RECIPE_MISMATCH)
    assert "rollout.temperature 1.0 → 0.7 affects rollouts" in error.message


def test_inputs_of_an_update(finished_run):
    run = Run.load(finished_run)
    assert run.update_input_digests(1) == run.update(1)["inputs"]
    assert set(run.update_input_digests(1)) == {"rollout", "teacher"}


def test_no_file_is_read_twice_for_the_stages_of_a_run(finished_run, monkeypatch):
    parsed, read = Counter(), files._read_json_once.__wrapped__

    def counted(path, form, identity):
        parsed[str(path.relative_to(finished_run)), form.__name__] += 1
        return read(path, form, identity)

    monkeypatch.setattr(files, "_read_json_once", lru_cache(maxsize=4096)(counted))
    run = Run.load(finished_run)
    for _ in range(3):
        for step in range(2):
            rollout, scores = run.rollout_stage(step), run.score_stages(step)["teacher"]
            for stage in (rollout, scores):
                assert stage.missing() == []
                assert [stage.verify(index) for index in range(2)]
            assert run.is_scored(step)
            assert run.update_input_digests(step)
    assert set(parsed.values()) == {1}
    steps = [f"step-0000{step}/{name}/manifest.json" for step in range(2) for name in ("rollout", "teacher")]
    assert {name for name, _ in parsed} == {"run.json", "step-00000/update.json", *steps}


def test_policy_version_is_pinned_by_the_first_worker_only_with_staleness(finished_copy):
    run = Run.load(finished_copy)
    run.pin_policy_version(2)
    assert not (finished_copy / "step-00002").exists()
    pipeline = run.recipe.pipeline.model_copy(update={"max_staleness": 2})
    ahead = Run(run.recipe.model_copy(update={"pipeline": pipeline}), run.path, run.models, run.digests)
    assert [ahead.can_sample(step) for step in range(2, 6)] == [True, True, True, False]
    ahead.pin_policy_version(1)  # its rollout exists
    assert not (finished_copy / "step-00001/rollout/policy_version.json").exists()
    ahead.pin_policy_version(4)
    assert ahead.policy_version(4) == 2
    assert ahead.is_started(4)
    ahead.pin_policy_version(5)  # has no student yet
    assert ahead.policy_version(5) == 5
    error = error_of(lambda: run.rollout_stage(4))  # with max_staleness 0
    assert (error.kind, error.code) == ("stale_rollout", ExitCode.RECIPE_MISMATCH)


def test_status_and_next_command_agree(finished_run):
    result = invoke("status", finished_run, "--json")
    assert result.json()["next"] == Run.load(finished_run).next_command()

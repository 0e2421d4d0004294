import json
import shutil
from pathlib import Path

import pytest
from helpers.commands import QUICKSTART, rewrite_json

from opdctl.artifacts import files
from opdctl.artifacts.versions import VERSIONS
from opdctl.errors import ExitCode, OpdctlError
from opdctl.evaluation.benchmarks import find_benchmark
from opdctl.models.directory import ModelDir, find_or_download
from opdctl.recipe.load import load_recipe
from opdctl.recipe.schema import Model
from opdctl.runs import open as opening
from opdctl.runs.models import find_model
from opdctl.runs.open import check_output_dir, open_run, record_settings, resolve_open_settings, standalone_eval_run
from opdctl.runs.repair import find_corrupt_artifacts
from opdctl.runs.run import Run


def error_of(call) -> OpdctlError:
    with pytest.raises(OpdctlError) as caught:
        call()
    return caught.value


def names(path: Path) -> list[str]:
    return sorted(each.name for each in path.iterdir())


# ── Creation ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_new_run_records_models_prompts_and_libraries(small, tmp_path):
    run = open_run(small(), tmp_path / "run")
    assert names(run.path) == ["prompts.parquet", "recipe.toml", "run.json"]
    record = files.read_json(run.path / "run.json")
    assert (record["artifact"], record["version"]) == ("run", VERSIONS["run"])
    assert set(record["models"]) == {"student", "teacher"}
    assert record["models"]["student"]["digest"] == run.digests["student"] == run.student.digest()
    assert (record["prompts"]["rows"], record["prompts"]["dropped"], record["prompts"]["source_files"]) == (
        32,
        0,
        {},
    )
    assert len(run.prompts) == 32
    assert set(record["libraries"]) >= {"opdctl", "torch", "transformers"}


def test_two_workers_that_create_a_run_write_the_same_files(small, tmp_path):
    created = {}
    for name in ("one", "two"):
        open_run(small(), tmp_path / name)
        created[name] = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
    assert created["one"] == created["two"]


def test_creation_resumes_after_a_kill(small, tmp_path):
    open_run(small(), tmp_path / "run")
    record = (tmp_path / "run/run.json").read_bytes()
    for name in ("run.json", "prompts.parquet"):
        (tmp_path / "run" / name).unlink()
        open_run(small(), tmp_path / "run")
    assert (tmp_path / "run/run.json").read_bytes() == record


def test_lost_record_is_written_again_after_an_upgrade_and_without_the_source(small, tmp_path):
    source = tmp_path / "mine.jsonl"
    source.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("ab?", "ba?")))
    recipe = small(f"prompts.source={source}", "prompts.limit=2", "rollout.prompts_per_step=2", "rollout.num_parts=1")
    run = open_run(recipe, tmp_path / "run")
    before = files.read_json(run.path / "run.json")["prompts"]
    (run.path / "step-00000").mkdir()
    (run.path / "run.json").unlink()
    source.unlink()
    recorded = run.path / "recipe.toml"
    lines = recorded.read_text().splitlines(keepends=True)
    older = [line for line in lines if not line.startswith(("held_out", "few_shot", "min_p"))]
    assert len(older) < len(lines) - 3
    recorded.write_text("".join(older))  # by a version without these keys
    open_run(recipe, run.path)
    assert files.read_json(run.path / "run.json")["prompts"] == {**before, "source_files": {}}


@pytest.mark.parametrize("name", ["notes.txt", "metrics.jsonl"])
def test_other_files_are_not_written_beside(small, tmp_path, name):
    (tmp_path / name).write_text("mine")
    error = error_of(lambda: check_output_dir(small(), tmp_path))
    assert (error.kind, error.code) == ("unusable_output", ExitCode.USAGE)
    assert str(tmp_path) in error.message
    assert names(tmp_path) == [name]


def test_recipe_of_another_run_is_not_overwritten(small, tmp_path):
    (tmp_path / "recipe.toml").write_text(small("seed=1").to_toml())
    assert error_of(lambda: check_output_dir(small(), tmp_path)).kind == "unusable_output"
    check_output_dir(small("seed=1"), tmp_path)


def test_file_as_output_is_refused(small, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        assert str(tmp_path / "file") in error_of(lambda path=path: check_output_dir(small(), path)).message


def test_too_few_prompts_are_refused(small, tmp_path):
    source = tmp_path / "mine.jsonl"
    source.write_text(json.dumps({"prompt": "ab?"}))
    error = error_of(lambda: open_run(small(f"prompts.source={source}"), tmp_path / "run"))
    assert (error.kind, error.code) == ("invalid_data", ExitCode.BAD_DATA)
    assert not (tmp_path / "run").exists()


def test_top_k_beyond_the_vocabulary_is_refused(small, tmp_path):
    error = error_of(lambda: open_run(small("rollout.top_k=56"), tmp_path / "run"))
    assert error.kind == "unsupported_setting"
    assert "rollout.top_k = 56" in error.message


# ── Resumption ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_mutable_settings_are_used_and_recorded_on_request(small, tmp_path, capsys):
    open_run(small(), tmp_path / "run")
    run = open_run(small("train.steps=9"), tmp_path / "run")
    assert run.recipe.train.steps == 9
    assert "steps = 2\n" in (tmp_path / "run/recipe.toml").read_text()
    record_settings(run)
    assert "steps = 9\n" in (tmp_path / "run/recipe.toml").read_text()
    assert "train.steps 2 → 9" in capsys.readouterr().err
    record_settings(run)
    assert capsys.readouterr().err == ""


def test_other_recipe_is_refused_and_nothing_is_written(small, tmp_path):
    open_run(small(), tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    error = error_of(lambda: open_run(small("weight.gamma=0.7"), tmp_path / "run"))
    assert error.kind == "recipe_mismatch"
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


@pytest.fixture
def own_model(small, tmp_path):
    """A run whose student is a private copy of the toy student: the copy and the recipe."""
    model = Path(shutil.copytree(find_or_download(Model(model="toy:student"), "student.model"), tmp_path / "model"))
    recipe = small(f"student.model={model}")
    open_run(recipe, tmp_path / "run")
    return model, recipe


def test_changed_model_is_refused_only_if_it_is_needed(own_model, tmp_path):
    model, recipe = own_model
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"more": 1}))
    error = error_of(lambda: open_run(recipe, tmp_path / "run"))
    assert (error.kind, error.code) == ("model_mismatch", ExitCode.RECIPE_MISMATCH)
    assert str(model) in error.message
    open_run(recipe, tmp_path / "run", needs=["teacher"])


def test_unchanged_model_is_not_hashed_again(own_model, tmp_path, monkeypatch):
    model, recipe = own_model

    def fail(self):
        raise AssertionError("hashed")

    with monkeypatch.context() as patch:
        patch.setattr(ModelDir, "digest", fail)
        open_run(recipe, tmp_path / "run")
    (model / "config.json").touch()
    open_run(recipe, tmp_path / "run")  # another modification time, the same content


def test_removed_model_is_refused(own_model, tmp_path):
    model, recipe = own_model
    shutil.rmtree(model)
    assert error_of(lambda: open_run(recipe, tmp_path / "run")).kind == "model_mismatch"


def test_prompts_of_a_run_are_kept_when_their_file_changes_or_goes(small, tmp_path):
    source = tmp_path / "mine.jsonl"
    source.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("ab?", "ba?", "ca?")))
    recipe = small(f"prompts.source={source}", "prompts.limit=3", "rollout.prompts_per_step=2", "rollout.num_parts=1")
    open_run(recipe, tmp_path / "run")
    source.write_text(json.dumps({"prompt": "other"}))
    error = error_of(lambda: open_run(recipe, tmp_path / "run"))
    assert (error.kind, error.code) == ("source_mismatch", ExitCode.RECIPE_MISMATCH)
    assert str(source) in error.message
    source.unlink()
    assert len(open_run(recipe, tmp_path / "run").prompts) == 3


def test_run_records_every_file_of_its_prompts(small, tmp_path):
    for name, text in (("a", "ab?"), ("b", "ba?")):
        (tmp_path / f"data/{name}.jsonl").parent.mkdir(exist_ok=True)
        (tmp_path / f"data/{name}.jsonl").write_text(json.dumps({"prompt": text}))
    recipe = small(f"prompts.source={tmp_path}/data", "rollout.prompts_per_step=2", "rollout.num_parts=1")
    open_run(recipe, tmp_path / "run")
    record = files.read_json(tmp_path / "run/run.json")["prompts"]
    paths = [tmp_path / "data/a.jsonl", tmp_path / "data/b.jsonl"]
    assert record["source_files"] == {str(path): files.sha256_file(path) for path in paths}
    paths[0].unlink()
    open_run(recipe, tmp_path / "run")
    paths[1].write_text(json.dumps({"prompt": "other"}))
    error = error_of(lambda: open_run(recipe, tmp_path / "run"))
    assert (error.kind, error.code) == ("source_mismatch", ExitCode.RECIPE_MISMATCH)
    assert str(paths[1]) in error.message


def test_file_of_a_run_of_an_earlier_version_is_compared(small, tmp_path):
    source = tmp_path / "mine.jsonl"
    source.write_text(json.dumps({"prompt": "ab?"}))
    recipe = small(f"prompts.source={source}", "rollout.prompts_per_step=1", "rollout.num_parts=1")
    open_run(recipe, tmp_path / "run")
    record = files.read_json(tmp_path / "run/run.json")["prompts"]
    (digest,) = record.pop("source_files").values()
    rewrite_json(tmp_path / "run/run.json", prompts={**record, "source_sha256": digest})
    open_run(recipe, tmp_path / "run")
    source.write_text(json.dumps({"prompt": "ba?"}))
    assert error_of(lambda: open_run(recipe, tmp_path / "run")).kind == "source_mismatch"


# ── Mixtures and held-out prompts ────────────────────────────────────────────────────────────────────────────────────

MIXTURE = (
    "prompts.sources.long.source=toy:sort12",
    "prompts.sources.long.weight=3",
    "prompts.sources.short.source=toy:sort12",
    "prompts.sources.short.split=test",
    "prompts.sources.short.limit=5",
    "prompts.sources.short.weight=1",
)


def test_every_step_has_the_weights_of_its_sources(small, tmp_path):
    run = open_run(small(*MIXTURE), tmp_path / "run")
    record = files.read_json(run.path / "run.json")["prompts"]
    assert record["sources"] == {"long": {"rows": 32, "per_step": 6}, "short": {"rows": 5, "per_step": 2}}
    seen = []
    for step in range(10):
        names = [prompt.prompt_id for _, prompt in run.samples(step)]
        assert sum(name.startswith("long/") for name in names) == 6
        seen += [name for name in names if name.startswith("short/")]
    assert [len(set(seen[epoch : epoch + 4])) for epoch in range(0, 20, 4)] == [4] * 5  # two steps, one prompt is left
    assert len(set(seen)) == 5
    assert [name for name, _ in Run.load(run.path).samples(7)] == [name for name, _ in run.samples(7)]


def test_sources_without_weights_are_one_set(small, tmp_path):
    run = open_run(small(*(text for text in MIXTURE if "weight" not in text)), tmp_path / "run")
    assert "sources" not in files.read_json(run.path / "run.json")["prompts"]
    seen = [prompt.prompt_id for step in range(4) for _, prompt in run.samples(step)]
    assert len(set(seen)) == 32  # of 37
    assert len({name.partition("/")[0] for name in seen}) == 2


def test_source_with_too_few_prompts_is_named(small, tmp_path):
    error = error_of(lambda: open_run(small(*MIXTURE, "prompts.sources.short.limit=1"), tmp_path / "run"))
    assert (error.kind, error.code) == ("invalid_data", ExitCode.BAD_DATA)
    assert "[prompts.sources.short]: 1 prompts, its share of rollout.prompts_per_step is 2" in error.message


@pytest.mark.parametrize("sources", [{"long": {"rows": 32, "per_step": 6}}, {"a": {"rows": 1, "per_step": 8}}])
def test_record_of_sources_that_does_not_fit_is_corrupt(small, tmp_path, sources):
    run = open_run(small(*MIXTURE), tmp_path / "run")
    prompts = files.read_json(run.path / "run.json")["prompts"]
    rewrite_json(run.path / "run.json", prompts={**prompts, "sources": sources})
    assert "its sources do not make up" in error_of(lambda: Run.load(run.path).samples(0)).message


def test_held_out_prompts_are_kept_as_a_benchmark(small, tmp_path):
    recipe = small("prompts.limit=100", "prompts.held_out=0.3")
    run = open_run(recipe, tmp_path / "run")
    stored = run.path / "held_out.jsonl"
    rows = [json.loads(line) for line in stored.read_text().splitlines()]
    assert len(rows) + len(run.prompts) == 100
    assert 15 < len(rows) < 45
    assert not {row["id"] for row in rows} & {prompt.prompt_id for prompt in run.prompts}
    assert all(row["answer"] == "".join(sorted(row["prompt"][:-1])) for row in rows)
    benchmark = find_benchmark(str(stored), recipe.eval)
    assert [problem.id for problem in benchmark.problems(None, None)] == [row["id"] for row in rows]
    before = stored.read_bytes()
    stored.unlink()
    open_run(recipe, run.path)
    assert stored.read_bytes() == before
    stored.write_bytes(before[:-9])
    assert [artifact.path for artifact in find_corrupt_artifacts(run)] == [stored]


# ── Models and engines ───────────────────────────────────────────────────────────────────────────────────────────────


def test_started_run_keeps_the_number_of_parts_that_its_recipe_leaves_open(finished_copy):
    """Runs of earlier versions recorded another default, and the files of their steps have it in their names."""
    recorded = finished_copy / "recipe.toml"
    text = recorded.read_text()
    assert text.count("num_parts = 2\n") == 1
    (finished_copy / "open.toml").write_text(text.replace("num_parts = 2\n", ""))
    unset = load_recipe([finished_copy / "open.toml"])
    assert unset.rollout.num_parts == 1  # 8 responses
    assert open_run(unset, finished_copy).recipe.rollout.num_parts == 2
    other = load_recipe([finished_copy / "open.toml"], ["rollout.num_parts=4"])
    assert error_of(lambda: open_run(other, finished_copy)).kind == "recipe_mismatch"


@pytest.mark.parametrize(("installed", "engine"), [(True, "vllm"), (False, "transformers")])
def test_auto_engine_is_what_is_installed_and_then_what_the_run_recorded(
    small, finished_run, tmp_path, monkeypatch, installed, engine
):
    monkeypatch.setattr(opening, "has_vllm", lambda on_gpus: installed)
    recipe = small("rollout.engine=auto", "score.engine=auto")
    resolved = resolve_open_settings(recipe, tmp_path / "run")
    assert (resolved.rollout.engine, resolved.score.engine) == (engine, engine)
    assert resolve_open_settings(recipe, finished_run).rollout.engine == "transformers"


@pytest.mark.parametrize(
    ("ratio", "settings", "dtypes"),
    [
        (40.0, (), ("float32", "float32")),
        (1.5, (), ("bfloat16", "bfloat16")),
        (40.0, ("teacher.dtype=bfloat16",), ("float32", "bfloat16")),
        (40.0, ("rollout.engine=vllm",), ("bfloat16", "float32")),
        (40.0, ("train.master_dtype=bfloat16",), ("bfloat16", "float32")),
        (40.0, ("pipeline.launcher=ray",), ("bfloat16", "bfloat16")),
    ],
)
def test_open_dtypes_are_fast_on_this_cpu_and_then_what_the_run_recorded(
    tmp_path, monkeypatch, capsys, finished_run, ratio, settings, dtypes
):
    monkeypatch.setattr(opening, "bfloat16_time_ratio", lambda: ratio)
    text = QUICKSTART.read_text().replace('dtype = "float32"\n', "")
    (tmp_path / "open.toml").write_text(text)
    recipe = load_recipe([tmp_path / "open.toml"], ["rollout.engine=transformers", *settings])
    resolved = resolve_open_settings(recipe, tmp_path / "run")
    assert (resolved.student.dtype, resolved.teacher.dtype) == dtypes
    assert ("take 40 times as long" in " ".join(capsys.readouterr().err.split())) == ("float32" in dtypes)
    continued = resolve_open_settings(recipe, finished_run)  # in float32
    explicit = {name for name in ("student", "teacher") if f"{name}.dtype=bfloat16" in settings}
    assert {name for name, model in continued.models().items() if model.dtype == "bfloat16"} == explicit


def test_evaluations_of_a_run_keep_recorded_template_arguments(finished_copy):
    """Earlier versions recorded a default; a recipe without the key continues them."""
    recorded = finished_copy / "recipe.toml"
    unset = load_recipe([recorded])
    assert unset.eval.template_arguments is None
    recorded.write_text(f"{recorded.read_text()}\n[eval.template_arguments]\nenable_thinking = false\n")
    assert resolve_open_settings(unset, finished_copy).eval.template_arguments == {"enable_thinking": False}
    other = load_recipe([recorded], ["eval.template_arguments={enable_thinking=true}"])
    assert resolve_open_settings(other, finished_copy).eval.template_arguments == {"enable_thinking": True}


def test_column_of_a_run_that_recorded_the_default_of_earlier_versions(finished_copy):
    recorded = finished_copy / "recipe.toml"
    unset = load_recipe([recorded])
    recorded.write_text(recorded.read_text().replace("[prompts]", '[prompts]\nprompt_column = "prompt"'))
    assert unset.prompts.prompt_column is None
    assert open_run(unset, finished_copy).recipe.prompts.prompt_column == "prompt"
    other = load_recipe([recorded], ["prompts.prompt_column=question"])
    assert error_of(lambda: open_run(other, finished_copy)).kind == "recipe_mismatch"


def test_standalone_evaluation_has_no_models_of_a_run(small, tmp_path):
    run = standalone_eval_run(small(), tmp_path)
    assert (run.path, run.models, run.digests, run.prompts_digest) == (tmp_path, {}, {}, None)


def test_remote_code_is_warned_of(small, capsys):
    model = Model(model="toy:student", trust_remote_code=True)
    assert find_model(small(), model, "--model", "transformers").trust_remote_code
    assert "trust_remote_code" in capsys.readouterr().err


def test_student_that_is_its_own_teacher_is_warned_of(small, tmp_path, capsys):
    open_run(small("teacher.model=toy:student"), tmp_path / "run")
    assert "identical" in capsys.readouterr().err

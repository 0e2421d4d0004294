"""Invalid recipes: every error at once, each with its source, its key and the nearest valid name."""

from pathlib import Path

import pytest
from helpers.recipes import SMALLEST, error_lines, load_error

from opdctl.recipe.load import load_recipe
from opdctl.recipe.schema import Sampling

TOY_TEACHERS = ["teachers.math.model=toy:teacher", "teachers.code.model=toy:teacher"]


@pytest.mark.parametrize(
    ("override", "key", "detail"),
    [
        ("train.step=3", "train.step", "did you mean `steps`?"),
        ("wieght.name=uniform", "wieght", "did you mean `weight`?"),
        ("student.modle=toy:student", "student.modle", "did you mean `model`?"),
        ("train.steps=many", "train.steps", "integer"),
        ("lora.rank=9223372036854775807", "lora.rank", "65536"),
        ("train.steps='3'", "train.steps", "integer"),
        ("train.steps=2.0", "train.steps", "integer"),
        ("train.steps=true", "train.steps", "integer"),
        ("train.steps=0", "train.steps", "greater than 0"),
        ("rollout.temperature=inf", "rollout.temperature", "finite"),
        ("rollout.temperature=nan", "rollout.temperature", "finite"),
        ("eval.top_p=1.5", "eval.top_p", "less than or equal to 1"),
        ("eval.top_k=-1", "eval.top_k", "greater than or equal to 0"),
        ("eval.min_p=1.1", "eval.min_p", "less than or equal to 1"),
        ("eval.repetition_penalty=0", "eval.repetition_penalty", "greater than 0"),
        ("rollout.presence_penalty=2.1", "rollout.presence_penalty", "less than or equal to 2"),
        ("eval.stop=['']", "eval.stop.0", "at least 1 character"),
        ("rollout.stop_token_ids=[-1]", "rollout.stop_token_ids.0", "greater than or equal to 0"),
        ("student.dtype=bf16", "student.dtype", "'bfloat16'"),
        ("name=a/b", "name", "a/b"),
        ("name=..", "name", ".."),
        ("weight.name=unifrom", "weight.name", "did you mean `uniform`?"),
        ("weight.gama=0.5", "weight.gama", "did you mean `gamma`?"),
        ("weight.gamma=-1", "weight.gamma", "got -1"),
        ("weight.gamma=inf", "weight.gamma", "got inf"),
        ("weight.gamma=high", "weight.gamma", "got 'high'"),
        ("objective.name=policy_gradent", "objective.name", "did you mean `policy_gradient`?"),
        ("objective.dual_clip=1", "objective.dual_clip", "got 1"),
        ("rollout.engine=transfomers", "rollout.engine", "did you mean `transformers`?"),
        ("score.engine=transfomers", "score.engine", "did you mean `transformers`?"),
        ("eval.bench=['aime25', 'amie24']", "eval.bench", "did you mean `aime24`?"),
    ],
)
def test_error_names_source_key_and_reason(smallest: Path, override: str, key: str, detail: str) -> None:
    (line,) = error_lines([smallest], override)
    assert line.startswith(f"--set: {key}: ")
    assert detail in line


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "rollout.num_parts=5"], "rollout.num_parts"),
        (["rollout.prompts_per_step=10", "prompts.limit=9"], "prompts.limit"),
        (["vllm.enable_lora=true"], "vllm.enable_lora"),
        (["vllm.enable_lora=true", "lora.rank=4", "lora.modules_to_save=['norm']"], "vllm.enable_lora"),
        (["prompts.data_files=a.parquet"], "prompts.data_files"),
        (["prompts.subset=main"], "prompts.subset"),
        (["prompts.source="], "prompts.source"),
        (["prompts.source=[]"], "prompts.source"),
        (["prompts.where.difficulty='>= hard'"], "prompts.where.difficulty"),
        (["prompts.sources.a.weight=1", "prompts.sources.b.limit=9"], "prompts.sources.b.weight"),
        (["prompts.sources.a.weight=1e-9", "prompts.sources.b.weight=1"], "prompts.sources.a.weight"),
        (["prompts.sources.a.teacher=math"], "prompts.sources.a.teacher"),
        (["prompts.tools_column=tools", "prompts.held_out=0.1"], "prompts.held_out"),
        (["prompts.sources.a.tools_column=tools", "prompts.held_out=0.1"], "prompts.held_out"),
        (["prompts.sources={'a b' = {limit = 2000}}"], "prompts.sources.a b"),
        (["prompts.source=a.parquet", "prompts.data_files=b.parquet"], "prompts.data_files"),
        (["train.betas=[0.9, 1.0]"], "train.betas"),
        (["rollout.temperature=0.0099"], "rollout.temperature"),
        (["rollout.temperature=0.5", "rollout.engine=server"], "rollout.temperature"),
        (["rollout.temperature=0.5", "objective.name=jsd"], "rollout.temperature"),
        (["rollout.top_p=0.9", "objective.name=sampled_kl"], "rollout.top_p"),
        (["rollout.sampling_top_k=20", "objective.name=reverse_kl"], "rollout.sampling_top_k"),
        (["rollout.presence_penalty=1.5", "objective.name=forward_kl"], "rollout.presence_penalty"),
        (["rollout.routed_experts=true", "rollout.engine=server"], "rollout.routed_experts"),
        (["train.router_replay=true", "rollout.engine=vllm", "pipeline.device=cpu"], "train.router_replay"),
        (["train.router_replay=true", "vllm.pipeline_parallel_size=2"], "train.router_replay"),
        (["eval.bench=[]"], "eval.bench"),
        (["train.lr_scheduler_type=linear"], "train.decay_steps"),
        (["train.lr_scheduler_type=cosine", "train.warmup_steps=4", "train.decay_steps=4"], "train.decay_steps"),
        (["eval.temperature=0", "eval.samples=2"], "eval.samples"),
        (["eval.temperature=1e-39"], "eval.temperature"),
        (["eval.temperature=0.0099"], "eval.temperature"),
        (["eval.max_thinking_tokens=16384"], "eval.max_thinking_tokens"),
        (["eval.max_thinking_tokens=99", "eval.presence_penalty=1.5"], "eval.presence_penalty"),
        (["eval.max_thinking_tokens=99", "eval.stop=['a']"], "eval.stop"),
        (["eval.max_thinking_tokens=99", "eval.end_thinking='stop'"], "eval.end_thinking"),
        (["eval.few_shot=4"], "eval.few_shot_file"),
        (["eval.few_shot_file=examples.jsonl"], "eval.few_shot_file"),
        (["eval.few_shot=4", f"eval.few_shot_file={'a' * 300}"], "eval.few_shot_file"),
        (["eval.bench=['humaneval_plus']"], "eval.bench"),
        (["objective.name=jsd", "pipeline.max_staleness=1"], "pipeline.max_staleness"),
    ],
)
def test_invalid_combination(smallest: Path, overrides: list[str], key: str) -> None:
    assert error_lines([smallest], *overrides)[0].startswith(f"--set: {key}: ")


@pytest.mark.parametrize("objective", ["policy_gradient", "power", "top_d"])
def test_other_distributions_are_sampled_with_a_rollout_correction(smallest: Path, objective: str) -> None:
    recipe = load_recipe([smallest], ["rollout.temperature=0.6", "rollout.min_p=0.1", f"objective.name={objective}"])
    assert recipe.rollout.modifications == {"temperature": 0.6, "min_p": 0.1}
    assert recipe.rollout.sampling_logprobs


@pytest.mark.parametrize("name", ["stop=['Question']", "stop_token_ids=[7]", "top_k=4", "max_tokens=9"])
def test_settings_that_leave_the_distribution_need_no_correction(smallest: Path, name: str) -> None:
    recipe = load_recipe([smallest], [f"rollout.{name}", "objective.name=sampled_kl"])
    assert recipe.rollout.modifications == {}
    assert not recipe.rollout.sampling_logprobs


def test_rollout_samples_as_an_evaluation_with_its_settings(smallest: Path) -> None:
    shared = ["top_p=0.9", "min_p=0.1", "temperature=0.6", "repetition_penalty=1.1", "stop=['a']"]
    settings = [*(f"{section}.{each}" for each in shared for section in ("rollout", "eval")), "eval.max_tokens=16384"]
    recipe = load_recipe([smallest], [*settings, "rollout.sampling_top_k=5", "rollout.top_k=2", "eval.top_k=5"])
    sampling = recipe.rollout.sampling()
    assert sampling == Sampling(**{name: getattr(recipe.eval, name) for name in Sampling.model_fields})
    assert sampling.top_k == 5


@pytest.mark.parametrize("temperature", [0.0, 0.01])
def test_least_temperatures_are_valid(smallest: Path, temperature: float) -> None:
    assert load_recipe([smallest], [f"eval.temperature={temperature}"]).eval.temperature == temperature


def test_router_replay_stores_the_experts(smallest: Path) -> None:
    assert load_recipe([smallest], ["train.router_replay=true"]).rollout.routed_experts
    assert not load_recipe([smallest], []).rollout.routed_experts


def test_as_many_parts_as_responses_are_valid(smallest: Path) -> None:
    recipe = load_recipe(
        [smallest], ["rollout.prompts_per_step=2", "rollout.samples_per_prompt=2", "rollout.num_parts=4"]
    )
    assert recipe.responses_per_step() == 4


def test_toy_task_requires_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "endless.toml"
    path.write_text(SMALLEST.replace("prompts.limit = 2048", ""))
    (line,) = error_lines([path])
    assert line.startswith(f"{path}: prompts.limit: is required")


def test_all_missing_keys_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "bare.toml"
    path.write_text("seed = 1\n")
    missing = {f"{path}: {key}: is required" for key in ("student", "prompts", "train")}
    assert set(error_lines([path])) == missing | {f"{path}: teacher: is required, or [teachers]"}


def test_all_errors_are_reported_with_their_sources(smallest: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.toml"
    other.write_text("train.stpes = 4\nweight.gamma = -1.0\nrollout.engine = 'nothing'\n")
    error = load_error([smallest, other], "objective.clip_lo=0.1", "eval.temperature=inf", "eval.bench=['nothing']")
    lines = (error.detail or "").splitlines()
    assert len(lines) == 6
    assert "6" in (error.hint or "")
    for file, key in [
        (other, "train.stpes"),
        (other, "weight"),
        (other, "rollout.engine"),
        ("--set", "objective"),
        ("--set", "eval.temperature"),
        ("--set", "eval.bench"),
    ]:
        assert any(line.startswith(f"{file}: {key}") for line in lines), (file, key)


def test_all_invalid_parameters_of_a_component_are_reported(smallest: Path) -> None:
    error = load_error([smallest], "objective.clip_lo=0.1", "objective.dual_clp=3.0", "objective.clip_high='x'")
    assert all(name in error.message for name in ("clip_lo", "dual_clp", "clip_high must be"))


def test_invalid_parameter_is_reported_with_its_own_file(smallest: Path, tmp_path: Path) -> None:
    typo, named = tmp_path / "typo.toml", tmp_path / "named.toml"
    typo.write_text("weight = { name = 'iw_opd', gama = 0.5 }\n")
    named.write_text("weight.name = 'iw_opd'\n")
    assert error_lines([smallest, typo, named])[0].startswith(f"{typo}: weight")


@pytest.mark.parametrize("key", ["weight.gamma", "objective.clip_high", "train.learning_rate", "eval.temperature"])
def test_number_too_large_for_a_float(smallest: Path, key: str) -> None:
    assert key.partition(".")[0] in load_error([smallest], f"{key}=1{'0' * 400}").message


def test_server_address_is_not_printed(smallest: Path) -> None:
    error = load_error([smallest], "teacher.server=http://user:secret@host/v1")
    assert "teacher.server" in error.message
    assert "secret" not in error.message


def test_several_teachers(smallest: Path) -> None:
    several = [*TOY_TEACHERS, "prompts.teacher_column=domain"]
    (line,) = error_lines([smallest], *several)
    assert line.startswith(f"{smallest}: teacher: ")
    smallest.write_text(smallest.read_text().replace('teacher.model = "toy:teacher"', ""))
    assert list(load_recipe([smallest], several).scorers()) == ["teacher-math", "teacher-code"]
    assert "prompts.teacher_column" in load_error([smallest], *TOY_TEACHERS).message
    assert "teachers.a/b" in load_error([smallest], *several, "teachers.a/b.model=toy:teacher").message


def test_teacher_column_requires_several_teachers(smallest: Path) -> None:
    assert "prompts.teacher_column" in load_error([smallest], "prompts.teacher_column=domain").message


@pytest.mark.parametrize("objective", ["jsd", "power"])  # power is bounded for log-probs only
def test_extrapolation_requires_a_fitting_objective(smallest: Path, objective: str) -> None:
    (line,) = error_lines([smallest], "train.extrapolation=1.25", f"objective.name={objective}")
    assert line.startswith(f"--set: train.extrapolation: objective `{objective}` ")


def test_weight_modulates_the_extrapolation_only_if_there_is_one(smallest: Path) -> None:
    (line,) = error_lines([smallest], "weight.modulates=extrapolation")
    assert line.startswith("--set: weight.modulates: `extrapolation` requires train.extrapolation")
    recipe = load_recipe([smallest], ["train.extrapolation=1.25", "weight.modulates=extrapolation"])
    assert (recipe.weight.modulates, recipe.weight.params["gamma"]) == ("extrapolation", 0.5)


def test_new_weight_keeps_what_is_no_parameter_of_it(smallest: Path) -> None:
    settings = ["train.extrapolation=1.25", "weight.modulates=extrapolation"]
    recipe = load_recipe([smallest], [*settings, "weight.gamma=0.7", "weight.name=linear_decay"])
    assert (recipe.weight.modulates, recipe.weight.params) == ("extrapolation", {"gamma": 0.5})


@pytest.mark.parametrize("key", ["student.model", "teacher.model", "prompts.source"])
@pytest.mark.parametrize("value", ["x" * 5000, "~no-such-user/model"])
def test_names_that_the_system_rejects_are_reported(key, value, tmp_path):
    (tmp_path / "recipe.toml").write_text(SMALLEST)
    error = load_error([tmp_path / "recipe.toml"], f"{key}='{value}'")
    assert f"{key}: is no valid name of a file" in error.message


def test_long_values_are_shown_in_part(tmp_path):
    (tmp_path / "recipe.toml").write_text(SMALLEST)
    assert len(load_error([tmp_path / "recipe.toml"], f"train.steps='{'x' * 10**5}'").message) < 1000

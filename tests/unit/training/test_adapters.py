"""LoRA adapters: where they are trained, refused, merged, and how they are written."""

import json
from pathlib import Path

import peft
import pytest
import torch
from helpers.commands import small_recipe
from helpers.export import IDS_1T, KINDS, check_export, make, train_and_export
from helpers.models import save
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from opdctl.errors import ExitCode, OpdctlError
from opdctl.models.directory import ModelDir
from opdctl.training.adapters import adapters_disabled, base_model
from opdctl.training.policy import check_trainable, load_policy

LORA = "lora.rank=4"


def rejection(folder: Path, *overrides: str) -> OpdctlError:
    """Return the error, which is the same with and without the weights."""
    errors = []
    for check in (check_trainable, lambda *args: load_policy(*args, "cpu")):
        with pytest.raises(OpdctlError) as error:
            check(ModelDir(folder, "float32"), small_recipe(LORA, *overrides))
        errors.append(error.value)
    assert errors[0].message == errors[1].message
    assert (errors[0].kind, errors[0].code) == ("unsupported_setting", ExitCode.USAGE)
    assert errors[0].hint
    return errors[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("students")
    models = {
        "untied": make("qwen3"),
        "tied": make("qwen3", tied=True),
        **{kind: make(kind, tied=kind == "zamba2") for kind in KINDS if kind != "qwen3"},
    }
    return {name: save(model, path / name) for name, model in models.items()}


EMBEDDINGS = ["embed_tokens", "model.embed_tokens", "lm_head"]


@pytest.mark.parametrize(
    ("kind", "override", "named"),
    [
        ("tied", 'lora.target_modules=["q_proj", "v_porj"]', "`v_proj`"),
        ("qwen3_moe", 'lora.target_modules=["gate_proj"]', "`gate_up_proj`"),
        ("tied", 'lora.target_modules=["all_linear"]', "`all-linear`"),
        ("tied", 'lora.modules_to_save=["norm", "no_such_layer"]', "no_such_layer"),
        ("untied", 'lora.target_modules=["mlp"]', "lora.target_modules"),
        ("untied", 'lora.modules_to_save=["proj"]', "lora.modules_to_save"),
        ("untied", 'lora.modules_to_save=["model"]', "lora.modules_to_save"),
        ("untied", 'lora.modules_to_save=["orm"]', "`norm`"),
        ("untied", 'lora.modules_to_save=["norm."]', "`norm`"),
        ("untied", 'lora.modules_to_save=[""]', "has no layer ``"),
        ("untied", 'lora.modules_to_save=["embed_tokens.weight"]', "`embed_tokens`"),
        ("untied", 'lora.target_modules=["all-linear", "v_porj"]', "`v_proj`"),
        ("untied", 'lora.target_modules=["self_attn"]', "contains k_proj, o_proj, q_proj, v_proj"),
        ("zamba2", 'lora.modules_to_save=["self_attn"]', "lora.modules_to_save: `self_attn` has a weight"),
        ("tied", 'lora.modules_to_save=["model"]', "lora.modules_to_save: `model`"),
        *(
            ("tied", f'lora.target_modules=["q_proj", "{name}"]', f"lora.target_modules: `{name}`")
            for name in EMBEDDINGS
        ),
        *(("tied", f'lora.modules_to_save=["{name}"]', f"lora.modules_to_save: `{name}`") for name in EMBEDDINGS),
        ("gpt_oss", "lora.dropout=0.1", "lora.dropout"),
        ("qwen3_next", "lora.alpha=8", "shared_expert.gate_proj"),
        ("nemotron_h", "lora.alpha=8", "out_proj"),
        ("mamba2", "lora.alpha=8", "out_proj"),
        ("phimoe", "lora.alpha=8", "mlp.router"),
        ("zamba2", "lora.alpha=8", "self_attn.q_proj"),
    ],
)
def test_unsupported_settings_are_rejected(kind, override, named, folders):
    assert named in rejection(folders[kind], override).message


@pytest.mark.parametrize("kind", ["qwen3_next", "nemotron_h"])
def test_settings_of_the_hint_are_supported(kind, folders):
    hint = rejection(folders[kind]).hint
    names = json.loads(hint[hint.index("[") :])
    assert len(names) > 5
    load_policy(
        ModelDir(folders[kind], "float32"), small_recipe(LORA, f"lora.target_modules={json.dumps(names)}"), "cpu"
    )


def test_adapter_of_a_weight_that_is_used_without_its_layer_is_rejected(folders):
    """Jamba multiplies by the weight of dt_proj, so its adapter would be merged without having been trained."""
    student = ModelDir(folders["jamba"], "float32")
    with pytest.raises(OpdctlError) as error:
        load_policy(student, small_recipe(LORA), "cpu")
    assert error.value.kind == "unsupported_setting"
    assert "dt_proj" in error.value.message
    names = error.value.hint[error.value.hint.index("[") :]
    load_policy(student, small_recipe(LORA, f"lora.target_modules={names}"), "cpu")


def test_dropout_is_enabled_after_the_check(folders):
    settings = small_recipe(LORA, "lora.dropout=0.5")
    policy = load_policy(ModelDir(folders["untied"], "float32"), settings, "cpu")
    training = {name for name, module in policy.named_modules() if module.training and "lora_dropout" in name}
    assert len(training) == 2 * 2 * 7  # the dictionary and its dropout in each of seven layers of two blocks
    assert not any(module.training for name, module in policy.named_modules() if "lora_dropout" not in name)


def test_model_that_fails_with_adapters_is_rejected(folders, monkeypatch):
    monkeypatch.setattr(peft.tuners.lora.Linear, "forward", lambda self, x, *, other: x)
    with pytest.raises(OpdctlError) as error:
        load_policy(ModelDir(folders["untied"], "float32"), small_recipe(LORA), "cpu")
    assert error.value.kind == "unsupported_setting"
    assert "TypeError" in error.value.message


@pytest.mark.parametrize("overrides", [(), ('lora.target_modules=["q_proj"]',)])
def test_matrices_without_an_adapter_are_logged(overrides, folders, capsys):
    load_policy(ModelDir(folders["qwen3_moe"], "float32"), small_recipe(LORA, *overrides), "cpu")
    logged = capsys.readouterr().err
    assert ("does not include mlp.gate\n" in logged) == (not overrides)


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("untied", ()),
        ("untied", ('lora.target_modules=["embed_tokens", "all-linear"]',)),
        ("untied", ('lora.target_modules=["lm_head", "q_proj"]',)),
        ("untied", ('lora.modules_to_save=["embed_tokens", "lm_head", "norm"]',)),
        ("untied", ('lora.modules_to_save=["mlp"]',)),
        ("untied", ('lora.modules_to_save=["layers.0", "self_attn"]',)),
        ("untied", ('lora.target_modules=["q_proj", "all-linear", "lm_head"]', 'lora.modules_to_save=["norm"]')),
        ("tied", ('lora.modules_to_save=["norm"]',)),
        ("tied", ('lora.target_modules=["layers.1.self_attn.q_proj"]',)),
        ("gpt2", ()),
        ("qwen3_moe", ()),
        ("qwen3_moe", ("train.cpu_offload=true",)),
        ("qwen3_moe", ('lora.target_modules=["down_proj"]',)),
        ("qwen3_moe", ('lora.modules_to_save=["experts"]',)),
        ("gpt_oss", ()),
        (
            "qwen3_next",
            ('lora.target_modules=["q_proj", "in_proj_qkvz", "experts.gate_up_proj", "experts.down_proj"]',),
        ),
        ("nemotron_h", ('lora.target_modules=["in_proj", "q_proj", "up_proj"]',)),
        ("mamba2", ('lora.target_modules=["in_proj"]',)),
    ],
)
def test_merged_student_and_adapter_of_peft_give_the_logits_of_the_policy(kind, overrides, folders, tmp_path):
    folder = folders[kind]
    policy, exported = train_and_export(folder, LORA, *overrides, exported=tmp_path / "exported")
    check_export(folder, policy, exported)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = policy(input_ids=IDS_1T).logits
        found = peft.PeftModel.from_pretrained(base, exported / "adapter").eval()(input_ids=IDS_1T).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def gradient(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    logits = model(input_ids=IDS_1T).logits
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    gradients = torch.autograd.grad(logits.logsumexp(-1).sum(), list(trained.values()), allow_unused=True)
    return {name: value for name, value in zip(trained, gradients, strict=True) if value is not None}


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("untied", ('lora.modules_to_save=["embed_tokens", "lm_head", "norm"]',)),
        ("untied", ("train.gradient_checkpointing=true",)),
        ("tied", ('lora.modules_to_save=["mlp"]',)),
        ("gpt2", ()),
        ("qwen3_moe", ()),
        ("qwen3_moe", ('lora.modules_to_save=["experts"]',)),
        ("gpt_oss", ()),
    ],
)
def test_student_with_disabled_adapters_is_the_initial_one_and_trains_on(kind, overrides, folders):
    model = load_policy(ModelDir(folders[kind], "float32"), small_recipe(LORA, *overrides), "cpu")
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape)
    before = gradient(model)
    with torch.no_grad():
        changed = model(input_ids=IDS_1T).logits
        with adapters_disabled(model):
            found = model(input_ids=IDS_1T).logits
        expected = AutoModelForCausalLM.from_pretrained(folders[kind], dtype=torch.float32)(input_ids=IDS_1T).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (changed - expected).abs().max() > 0.1
    after = gradient(model)
    assert len(after) > 3
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_adapter_that_peft_would_read_incorrectly_is_not_written(folders, tmp_path, capsys):
    """peft renames `shared_experts`, of the loaded model, as if it were `shared_expert`, of the stored one."""
    policy, exported = train_and_export(folders["laguna"], LORA, exported=tmp_path / "exported")
    check_export(folders["laguna"], policy, exported)
    assert not (exported / "adapter").exists()
    assert "adapter/" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["untied", "qwen3_moe", "gpt_oss"])
def test_all_linear_trains_every_matrix_but_routers_embedding_and_head(kind, folders, tmp_path):
    _, exported = train_and_export(folders[kind], LORA, exported=tmp_path / "exported")
    before, after = (load_file(path / "model.safetensors") for path in (folders[kind], exported))
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    excluded = ("norm.weight", "bias", "sinks", "embed_tokens.weight", "lm_head.weight", "gate.weight", "router.weight")
    assert unchanged == {name for name in before if name.endswith(excluded)}


def test_adapter_config_has_sorted_names(folders, tmp_path):
    """peft holds them in sets, whose order differs between processes."""
    _, exported = train_and_export(folders["qwen3_moe"], LORA, exported=tmp_path / "exported")
    config = json.loads((exported / "adapter/adapter_config.json").read_text())
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert config["target_parameters"] == ["down_proj", "gate_up_proj"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/cache/hub/models--Qwen--Qwen3-4B/snapshots/1cfa9a7", ("Qwen/Qwen3-4B", "1cfa9a7")),
        ("/cache/hub/models--gpt2/snapshots/607a30d", ("gpt2", "607a30d")),
        ("/models/qwen/snapshots/a", ("/models/qwen/snapshots/a", None)),
        ("/m", ("/m", None)),
    ],
)
def test_adapter_names_the_hub_id_and_revision_of_its_base(path, expected):
    assert base_model(Path(path)) == expected

"""The models of a recipe, checked against one another and against the lengths."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.models import TOY, VOCAB_SIZE, edit_config, make, save

from opdctl.artifacts.records import Prompt
from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir
from opdctl.runs.models import check_lengths, prepare_models

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}


@pytest.fixture
def teacher(tmp_path) -> Path:
    return Path(shutil.copytree(TOY, tmp_path / "teacher"))


def rejection(recipe):
    with pytest.raises(OpdctlError) as error:
        prepare_models(recipe)
    return error.value


def test_quantized_teacher_is_loaded_and_quantized_student_is_not(small, teacher):
    edit_config(teacher, quantization_config=FP8)
    models, _ = prepare_models(small(f"teacher.model={teacher}"))
    assert models["teacher"].is_quantized
    error = rejection(small(f"student.model={teacher}"))
    assert error.kind == "unsupported_model"
    assert str(teacher) in error.message


def test_vllm_may_load_a_quantization_whose_package_transformers_lacks(small, teacher):
    edit_config(teacher, quantization_config=GPTQ)
    assert rejection(small(f"teacher.model={teacher}", "score.engine=transformers")).kind == "missing_package"
    models, lines = prepare_models(small(f"teacher.model={teacher}", "score.engine=vllm"))
    assert models["teacher"].is_quantized
    assert any(line.startswith("teacher: Qwen3ForCausalLM") for line in lines)


def test_served_model_needs_no_weights(small, teacher):
    (teacher / "model.safetensors").unlink()
    served = (f"teacher.model={teacher}", "teacher.server=http://host:8000/v1", "score.engine=server")
    models, lines = prepare_models(small(*served))
    assert models["teacher"].vocab_size == VOCAB_SIZE
    assert any(line.startswith("teacher: served") for line in lines)


def test_ids_are_those_that_all_models_share(small, tmp_path):
    rows = {name: save(make("llama"), tmp_path / name) for name in ("student", "teacher")}
    edit_config(rows["teacher"], vocab_size=50)
    served = ("teacher.server=http://host:8000/v1", "score.engine=server")
    models, lines = prepare_models(
        small(f"student.model={rows['student']}", f"teacher.model={rows['teacher']}", *served)
    )
    assert {model.vocab_size for model in models.values()} == {50}
    assert f"{VOCAB_SIZE - 50} ids" in lines[-1]


def test_lengths_of_the_teachers_own_prompts_count(small, teacher):
    edit_config(teacher, max_position_embeddings=8, model_type="gpt2", n_embd=64, n_head=2, n_layer=1, n_positions=8)
    model, recipe = ModelDir(teacher, "float32"), small("rollout.max_tokens=2")
    short, long = np.zeros(4, np.int32), np.zeros(7, np.int32)
    check_lengths(recipe, {"teacher": model}, [Prompt("a", long, None, "teacher", short)])
    with pytest.raises(OpdctlError) as error:
        check_lengths(recipe, {"student": model}, [Prompt("a", long, None, "teacher", short)])
    assert error.value.kind == "unsupported_setting"

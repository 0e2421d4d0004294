"""Models unlike the embedded ones: other architectures, heads, vocabularies, files - through the whole pipeline."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import QUICKSTART, invoke, sets
from helpers.models import SMALL, save
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from opdctl.errors import OpdctlError
from opdctl.models.directory import ModelDir, find_or_download
from opdctl.models.loading import load_model
from opdctl.recipe.schema import Model
from opdctl.runs.run import load_run
from opdctl.runs.scored_responses import read_scored

TOY = find_or_download(Model(model="toy:student"), "student.model")
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
KINDS = {
    "qwen3-untied": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=False)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, **EXPERTS, tie_word_embeddings=False)),
}


def prompts(folder: Path) -> Path:
    """Write prompts of one to sixteen tokens, so that most need padding."""
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": "abcdefghijklmnop"[: n % 16 + 1]}) + "\n" for n in range(32)))
    return path


def train(tmp_path: Path, *overrides: str):
    data = (f"prompts.source={prompts(tmp_path)}", "prompts.max_tokens=16", "rollout.max_tokens=24")
    return invoke("train", "--recipe", QUICKSTART, *sets(*data, *overrides), "--output", tmp_path / "run", "--json")


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_of_another_kind_trains_and_its_logprobs_are_its_own(kind, tmp_path):
    torch.manual_seed(0)
    student, teacher = (save(KINDS[kind](), tmp_path / name) for name in ("student", "teacher"))
    result = train(tmp_path, f"student.model={student}", f"teacher.model={teacher}")
    assert result.code == 0, result.err
    run = load_run(tmp_path / "run")
    for step in (0, 1):  # step 1 was drawn by an engine that took the first update's weights over
        models = [load_model(run.student_at(step), device="cpu"), load_model(run.models["teacher"], device="cpu")]
        for sample in read_scored(run, step):
            prompt, response = sample.response.prompt_ids, sample.response.response_ids
            assert response.max() < 56
            assert not np.isin(response[:-1], [1, 5]).any()
            ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
            for model, stored in zip(models, (sample.response.logprobs, sample.teacher.logprobs), strict=True):
                with torch.no_grad():
                    whole = model(ids[None]).logits[0, len(prompt) - 1 : -1, :56].log_softmax(-1)
                np.testing.assert_allclose(stored, whole.gather(-1, ids[len(prompt) :, None])[:, 0], rtol=0, atol=1e-4)


def test_a_model_that_does_more_to_its_logits_is_refused_not_scored_wrongly(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = PhiForCausalLM(PhiConfig(**{**SMALL, "num_key_value_heads": 2}))
    torch.nn.init.normal_(model.lm_head.bias)
    path = save(model, tmp_path / "phi")
    assert load_model(ModelDir(path, "float32"), device="cpu").lm_head.bias.abs().max() > 0
    forward = PhiForCausalLM.forward

    def doubled(self, **inputs):
        output = forward(self, **inputs)
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr(PhiForCausalLM, "forward", doubled)
    with pytest.raises(OpdctlError, match="its logits are not what opdctl makes of its hidden states"):
        load_model(ModelDir(path, "float32"), device="cpu")


def test_a_model_with_a_tensor_missing_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    path = Path(shutil.copytree(TOY, tmp_path / "model"))
    tensors = load_file(path / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OpdctlError, match=r"weights missing: model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(ModelDir(path, "float32"), device="cpu")


def test_pickled_weights_are_refused(tmp_path):
    path = Path(shutil.copytree(TOY, tmp_path / "model"))
    torch.save({}, path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises(OpdctlError, match="loads no pickled weights"):
        load_model(ModelDir(path, "float32"), device="cpu")


def test_the_student_ends_its_responses_as_it_did_when_it_came_and_nothing_foreign_is_exported(tmp_path):
    """Without a generation config the tokenizer's end of sequence counts, before and after an update."""
    path = Path(shutil.copytree(TOY, tmp_path / "student"))
    (path / "generation_config.json").unlink()
    (path / "pytorch_model.bin").write_bytes(b"stale")
    config = json.loads((path / "config.json").read_text()) | {"eos_token_id": 9}
    (path / "config.json").write_text(json.dumps(config))
    result = train(tmp_path, f"student.model={path}")
    assert result.code == 0, result.err
    exported = load_run(tmp_path / "run").student_at(2)
    assert exported.eos_ids == ModelDir(path, "float32").eos_ids == (1,)
    assert not (exported.path / "generation_config.json").exists()
    assert not (exported.path / "pytorch_model.bin").exists()


def test_a_generation_config_that_transformers_would_not_write_does_not_stop_the_export(tmp_path):
    path = Path(shutil.copytree(TOY, tmp_path / "student"))
    (path / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6, "eos_token_id": 1}')
    result = train(tmp_path, f"student.model={path}")
    assert result.code == 0, result.err
    exported = tmp_path / "run/student/step-00002/generation_config.json"
    assert exported.read_bytes() == (path / "generation_config.json").read_bytes()


@pytest.mark.parametrize("file", ["generation_config.json", "tokenizer.json", "chat_template.jinja", "config.json"])
def test_a_changed_file_of_the_model_is_refused(tmp_path, file):
    path = Path(shutil.copytree(TOY, tmp_path / "student"))
    assert train(tmp_path, f"student.model={path}", "train.steps=1").code == 0
    (path / file).write_text((path / file).read_text() + " ")
    result = train(tmp_path, f"student.model={path}", "train.steps=2")
    assert result.code == 4
    assert "is not the one this run began with" in result.err


def test_a_rollout_does_not_need_the_teacher_nor_scoring_the_student(tmp_path):
    student, teacher = (Path(shutil.copytree(TOY, tmp_path / name)) for name in ("student", "teacher"))
    begin = ["--recipe", QUICKSTART, *sets(f"student.model={student}", f"teacher.model={teacher}")]
    run = ["--output", tmp_path / "run"]
    assert invoke("rollout", *begin, *run).code == 0
    (tmp_path / "run/step-00000/rollout/manifest.json").rename(tmp_path / "aside")
    teacher.rename(tmp_path / "teacher-elsewhere")
    shutil.rmtree(tmp_path / "run/step-00000")
    again = invoke("rollout", *run)
    assert again.code == 0, again.err
    (tmp_path / "teacher-elsewhere").rename(teacher)
    student.rename(tmp_path / "student-elsewhere")
    scored = invoke("score-teacher", *run)
    assert scored.code == 0, scored.err
    assert invoke("train", "--no-fill", *run).code == 4


def test_relative_paths_hold_from_whatever_folder_a_run_goes_on(tmp_path, monkeypatch):
    shutil.copytree(TOY, tmp_path / "here" / "student")
    monkeypatch.chdir(tmp_path / "here")
    begin = ["--recipe", QUICKSTART, *sets("student.model=./student", "train.steps=1"), "--output", tmp_path / "run"]
    assert invoke("train", *begin).code == 0
    monkeypatch.chdir(tmp_path)
    result = invoke("train", "--output", tmp_path / "run", "--set", "train.steps=2")
    assert result.code == 0, result.err


def test_a_model_of_nan_is_refused_when_it_is_loaded(tmp_path):
    from safetensors.torch import load_file, save_file

    path = Path(shutil.copytree(TOY, tmp_path / "model"))
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"].fill_(float("nan"))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OpdctlError, match="nan nats apart"):
        load_model(ModelDir(path, "float32"), device="cpu")

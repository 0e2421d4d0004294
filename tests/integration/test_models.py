"""Models of other architectures, with other heads, vocabularies and files, through the complete pipeline."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import QUICKSTART, invoke, sets
from helpers.models import SMALL, TOY, save
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from opdctl.models.directory import ModelDir
from opdctl.models.loading import load_model
from opdctl.runs.run import Run
from opdctl.runs.scored_responses import read_scored

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
KINDS = {
    "qwen3-untied": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=False)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True)),
    "qwen3-moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, **EXPERTS, tie_word_embeddings=False)),
}


def prompts(folder: Path) -> Path:
    """Write prompts of one to sixteen tokens; most of them need padding."""
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": "abcdefghijklmnop"[: n % 16 + 1]}) + "\n" for n in range(32)))
    return path


def train(tmp_path: Path, *overrides: str):
    data = (f"prompts.source={prompts(tmp_path)}", "prompts.max_tokens=16", "rollout.max_tokens=24")
    return invoke("train", "--recipe", QUICKSTART, *sets(*data, *overrides), "--output", tmp_path / "run", "--json")


@pytest.mark.parametrize("kind", KINDS)
def test_other_architectures_train_with_correct_logprobs(kind, tmp_path):
    torch.manual_seed(0)
    student, teacher = (save(KINDS[kind](), tmp_path / name) for name in ("student", "teacher"))
    result = train(tmp_path, f"student.model={student}", f"teacher.model={teacher}")
    assert result.code == 0, result.err
    run = Run.load(tmp_path / "run")
    for step in (0, 1):  # the engine of step 1 loaded the weights of the first update
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


def test_exported_student_has_the_same_eos_and_no_foreign_files(tmp_path):
    """Without a generation config the tokenizer defines the end of sequence, before and after an update."""
    path = Path(shutil.copytree(TOY, tmp_path / "student"))
    (path / "generation_config.json").unlink()
    (path / "pytorch_model.bin").write_bytes(b"stale")
    config = json.loads((path / "config.json").read_text()) | {"eos_token_id": 9}
    (path / "config.json").write_text(json.dumps(config))
    result = train(tmp_path, f"student.model={path}")
    assert result.code == 0, result.err
    exported = Run.load(tmp_path / "run").student_at(2)
    assert exported.eos_ids == ModelDir(path, "float32").eos_ids == (1,)
    assert not (exported.path / "generation_config.json").exists()
    assert not (exported.path / "pytorch_model.bin").exists()


def test_generation_config_that_transformers_rejects_is_copied(tmp_path):
    path = Path(shutil.copytree(TOY, tmp_path / "student"))
    (path / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6, "eos_token_id": 1}')
    result = train(tmp_path, f"student.model={path}")
    assert result.code == 0, result.err
    exported = tmp_path / "run/student/step-00002/generation_config.json"
    assert exported.read_bytes() == (path / "generation_config.json").read_bytes()


@pytest.mark.parametrize("file", ["generation_config.json", "tokenizer.json", "chat_template.jinja", "config.json"])
def test_changed_model_file_is_rejected(tmp_path, file):
    path = Path(shutil.copytree(TOY, tmp_path / "student"))
    assert train(tmp_path, f"student.model={path}", "train.steps=1").code == 0
    (path / file).write_text((path / file).read_text() + " ")
    result = train(tmp_path, f"student.model={path}", "train.steps=2")
    assert result.code == 4
    assert result.kind == "model_mismatch"
    assert str(path) in result.err


def test_rollout_needs_no_teacher_and_scoring_no_student(tmp_path):
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


def test_relative_model_path_resolves_from_any_directory(tmp_path, monkeypatch):
    shutil.copytree(TOY, tmp_path / "here" / "student")
    monkeypatch.chdir(tmp_path / "here")
    begin = ["--recipe", QUICKSTART, *sets("student.model=./student", "train.steps=1"), "--output", tmp_path / "run"]
    assert invoke("train", *begin).code == 0
    monkeypatch.chdir(tmp_path)
    result = invoke("train", "--output", tmp_path / "run", "--set", "train.steps=2")
    assert result.code == 0, result.err


def test_settings_that_a_student_does_not_support_are_rejected_before_anything_is_sampled(tmp_path):
    settings = sets("lora.rank=4", 'lora.target_modules=["q_proj", "v_porj"]')
    command = ["train", "--recipe", QUICKSTART, *settings, "--output", tmp_path / "run"]
    planned, trained = invoke(*command, "--dry-run"), invoke(*command)
    assert (planned.code, planned.kind) == (trained.code, trained.kind) == (2, "unsupported_setting")
    assert "`v_proj`" in planned.err
    assert not (tmp_path / "run/step-00000").exists()

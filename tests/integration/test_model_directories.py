"""Model directories that others publish: one error before anything is drawn, the same under --dry-run, or right
numbers."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.commands import QUICKSTART, invoke, sets
from helpers.models import SMALL, TOY, VOCAB_SIZE, edit_config, edit_tensors, save
from transformers import (
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from opdctl.models.loading import load_model
from opdctl.runs.run import Run
from opdctl.runs.scored_responses import read_scored

HEAD = "model.embed_tokens.weight"  # the toy models are tied


@pytest.fixture
def teacher(tmp_path) -> Path:
    return Path(shutil.copytree(TOY, tmp_path / "teacher"))


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def make_adapter(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "owner/base"}')


BROKEN: dict[str, tuple[Callable[[Path], object], str, int, str]] = {
    "absent": (shutil.rmtree, "missing_model", 2, "teacher.model"),
    "cut": (cut, "invalid_model", 3, "model.safetensors"),
    "gguf only": (lambda d: (d / "model.safetensors").rename(d / "m.gguf"), "unsupported_model", 2, "m.gguf"),
    "adapter alone": (make_adapter, "missing_model", 2, "owner/base"),
    "adapter beside": (lambda d: (d / "adapter_config.json").write_text("{}"), "unsupported_model", 2, "adapter"),
    "no tokenizer": (remove_tokenizer, "missing_file", 2, "no tokenizer"),
    "missing tensor": (lambda d: edit_tensors(d, lambda t: t.pop("model.norm.weight")), "invalid_model", 3, "norm"),
    "config": (lambda d: (d / "config.json").write_text(""), "invalid_model", 3, "config.json"),
    "generation config": (lambda d: (d / "generation_config.json").write_text("{"), "invalid_model", 3, "generation"),
}


@pytest.mark.parametrize(("damage", "kind", "code", "text"), BROKEN.values(), ids=list(BROKEN))
def test_broken_teacher_is_one_error_before_anything_is_written(damage, kind, code, text, teacher, tmp_path):
    damage(teacher)
    begin = ("--recipe", QUICKSTART, *sets(f"teacher.model={teacher}"), "--output", tmp_path / "run")
    results = [invoke("train", *begin), invoke("train", *begin, "--dry-run")]
    for result in results:
        assert (result.kind, result.code) == (kind, code), result.err
        assert str(teacher) in result.err
        assert text in result.err
    assert results[0].err == results[1].err
    assert not (tmp_path / "run").exists()


def test_weights_that_are_not_finite_are_rejected_before_the_run(teacher, tmp_path):
    edit_tensors(teacher, lambda tensors: tensors["model.norm.weight"].fill_(float("nan")))
    result = invoke("train", "--recipe", QUICKSTART, *sets(f"teacher.model={teacher}"), "--output", tmp_path / "run")
    assert (result.kind, result.code) == ("invalid_model", 3)
    assert "model.norm.weight" in result.err
    assert not (tmp_path / "run").exists()


def test_repaired_file_goes_on(teacher, tmp_path):
    sound = (teacher / "model.safetensors").read_bytes()
    cut(teacher)
    begin = ("--recipe", QUICKSTART, *sets(f"teacher.model={teacher}", "train.steps=1"), "--output", tmp_path / "run")
    assert invoke("train", *begin).code == 3
    (teacher / "model.safetensors").write_bytes(sound)
    assert invoke("train", *begin).code == 0


def test_evaluated_model_is_inspected(teacher, tmp_path):
    cut(teacher)
    result = invoke("eval", "--bench", "sort12", "--model", teacher, "--output", tmp_path / "eval")
    assert (result.kind, result.code) == ("invalid_model", 3)
    assert "model.safetensors" in result.err


def test_what_was_found_is_printed(teacher, tmp_path):
    shutil.copy(TOY / "model.safetensors", teacher / "model-old.safetensors")
    begin = ("--recipe", QUICKSTART, *sets(f"teacher.model={teacher}", "train.steps=1"), "--output", tmp_path / "run")
    for result in (invoke("train", *begin, "--dry-run"), invoke("train", *begin)):
        assert result.code == 0
        assert "teacher: Qwen3ForCausalLM, 110,528 parameters in F32" in result.err
        assert "weights: model.safetensors; ignored: model-old.safetensors" in result.err


def train(tmp_path: Path, student: Path, teacher: Path, *arguments: str, max_tokens: int = 24, settings=()):
    """Train one step on prompts of 1 to 16 tokens."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": "abcdefghijklmnop"[: n % 16 + 1]}) + "\n" for n in range(32)))
    data = (f"prompts.source={prompts}", "prompts.max_tokens=16", f"rollout.max_tokens={max_tokens}", "train.steps=1")
    models = (f"student.model={student}", f"teacher.model={teacher}")
    begin = ("--recipe", QUICKSTART, *sets(*data, *models, *settings), "--output", tmp_path / "run")
    return invoke("train", *begin, *arguments)


def check_logprobs(run: Run, vocab_size: int) -> None:
    """Compare all log-probs of step 0 with one pass over each sequence alone."""
    models = [load_model(run.student_at(0), device="cpu"), load_model(run.models["teacher"], device="cpu")]
    for sample in read_scored(run, 0):
        prompt, response = sample.response.prompt_ids, sample.response.response_ids
        assert response.max() < vocab_size
        ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
        for model, stored in zip(models, (sample.response.logprobs, sample.teacher.logprobs), strict=True):
            with torch.no_grad():  # by a copy: a rotary embedding may keep what a longer sequence changed
                whole_TV = copy.deepcopy(model)(ids[None]).logits[0, len(prompt) - 1 : -1, :vocab_size].log_softmax(-1)
            np.testing.assert_allclose(stored, whole_TV.gather(-1, ids[len(prompt) :, None])[:, 0], rtol=0, atol=1e-4)


FULL = ("objective.name=reverse_kl", "objective.support=full")


@pytest.mark.parametrize("settings", [(), FULL], ids=["sampled tokens", "full vocabulary"])
def test_ids_without_a_row_in_every_model_are_masked(settings, tmp_path):
    torch.manual_seed(0)
    rows = {"student": VOCAB_SIZE + 8, "teacher": VOCAB_SIZE - 4}
    paths = {
        name: save(LlamaForCausalLM(LlamaConfig(**SMALL | {"vocab_size": n})), tmp_path / name)
        for name, n in rows.items()
    }
    result = train(tmp_path, paths["student"], paths["teacher"], settings=settings)
    assert result.code == 0, result.err
    run = Run.load(tmp_path / "run")
    assert run.student.vocab_size == run.models["teacher"].vocab_size == VOCAB_SIZE - 4
    check_logprobs(run, VOCAB_SIZE - 4)


def test_stray_weights_are_not_read(tmp_path, teacher):
    """A full-vocabulary objective reads the teacher's head from the files by itself."""
    shutil.copy(teacher / "model.safetensors", teacher / "a-stray.safetensors")
    (tmp_path / "clean").mkdir()
    clean = train(tmp_path / "clean", TOY, TOY, settings=FULL)
    assert clean.code == 0, clean.err
    edit_tensors(teacher, lambda tensors: tensors[HEAD].mul_(3))
    (teacher / "model.safetensors").rename(teacher / "zz-stray.safetensors")
    shutil.copy(TOY / "model.safetensors", teacher)
    stray = train(tmp_path, TOY, teacher, settings=FULL)
    assert stray.code == 0, stray.err
    students = [folder / "run/student/step-00001/model.safetensors" for folder in (tmp_path / "clean", tmp_path)]
    assert students[0].read_bytes() == students[1].read_bytes()


def test_responses_must_fit_into_a_table_of_positions(tmp_path):
    config = GPT2Config(vocab_size=64, n_embd=32, n_head=2, n_layer=1, n_positions=32, bos_token_id=0, eos_token_id=1)
    gpt2 = save(GPT2LMHeadModel(config), tmp_path / "gpt2")
    for student, teacher in ((gpt2, TOY), (TOY, gpt2)):
        for option in ((), ("--dry-run",)):
            result = train(tmp_path, student, teacher, *option)
            assert (result.kind, result.code) == ("unsupported_setting", 2)
            assert "16 + rollout.max_tokens = 24" in result.err
            assert "32 positions" in result.err
    assert not (tmp_path / "run").exists()
    assert train(tmp_path, gpt2, TOY, max_tokens=16).code == 0
    check_logprobs(Run.load(tmp_path / "run"), VOCAB_SIZE)
    evaluate = ("eval", "--bench", "sort12", "--output", tmp_path / "run", "--set", "eval.limit=2", "--set")
    result = invoke(*evaluate, "eval.max_tokens=24")
    assert (result.kind, result.code) == ("unsupported_setting", 2)
    assert "eval.max_tokens = 24" in result.err
    assert invoke(*evaluate, "eval.max_tokens=8").code == 0


def test_rotary_positions_beyond_the_training_are_warned_of(tmp_path, teacher):
    edit_config(teacher, max_position_embeddings=32)
    result = train(tmp_path, TOY, teacher)
    assert result.code == 0, result.err
    assert "16 + rollout.max_tokens = 24 tokens exceed its 32 positions" in result.err


def test_student_is_not_sampled_where_its_rotary_frequencies_depend_on_the_batch(tmp_path):
    """The teacher is scored there: alone, or with responses of the same length."""
    model = shutil.copytree(TOY, tmp_path / "dynamic")
    edit_config(
        model,
        max_position_embeddings=32,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    )
    for option in ((), ("--dry-run",)):
        result = train(tmp_path, model, TOY, *option)
        assert (result.kind, result.code) == ("unsupported_setting", 2)
        assert all(number in result.err for number in ("beyond 32 tokens", "prompts of 16", "responses of 24"))
    assert not (tmp_path / "run").exists()
    assert train(tmp_path, TOY, model).code == 0
    check_logprobs(Run.load(tmp_path / "run"), VOCAB_SIZE)


def test_continuations_must_fit_into_a_table_of_positions(tmp_path):
    """A continuation follows a prefix of the response, so it needs more positions than the response."""
    config = GPT2Config(vocab_size=64, n_embd=32, n_head=2, n_layer=1, n_positions=40, bos_token_id=0, eos_token_id=1)
    student = save(GPT2LMHeadModel(config), tmp_path / "gpt2")
    small = ("rollout.prompts_per_step=4", "rollout.max_tokens=24", "continuations.responses=2", "train.steps=1")
    begin = ("--recipe", QUICKSTART, *sets(f"student.model={student}", *small), "--output", tmp_path / "run")
    result = invoke("rollout", *begin)
    assert result.code == 0, result.err
    for option in ((), ("--dry-run",)):
        result = invoke("run", "continuations", tmp_path / "run", *option)
        assert (result.kind, result.code) == ("unsupported_setting", 2)
        assert "rollout.max_tokens = 24 tokens exceed its 40 positions" in result.err
        result = invoke("run", "continuations", tmp_path / "run", "--set", "continuations.max_tokens=28", *option)
        assert (result.kind, result.code) == ("unsupported_setting", 2)
        assert "continuations.max_tokens = 28 tokens exceed its 40 positions" in result.err
    assert not (tmp_path / "run/continuations").exists()
    result = invoke("run", "continuations", tmp_path / "run", "--set", "continuations.max_tokens=4")
    assert result.code == 0, result.err


def test_teacher_that_fails_its_self_check_costs_no_rollout(tmp_path):
    config = BertConfig(**SMALL | {"num_key_value_heads": 2}, is_decoder=False, tie_word_embeddings=True)
    teacher = save(BertLMHeadModel(config), tmp_path / "teacher")
    result = train(tmp_path, TOY, teacher)
    assert (result.kind, result.code) == ("unsupported_model", 2)
    assert str(teacher) in result.err
    assert not list((tmp_path / "run").rglob("part-*"))

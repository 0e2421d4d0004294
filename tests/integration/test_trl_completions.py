"""Files that TRL's own trainers write by `log_completions` are read as the ids that they sampled.

The trainers need torch, transformers, accelerate, datasets and pandas, which the development environment has.
"""

from pathlib import Path
from typing import Any

import pytest

from opdctl.artifacts.records import Trajectory
from opdctl.data.trajectories.reading import read_trajectories
from opdctl.models.directory import ModelDir

trl = pytest.importorskip("trl", reason="trl is not installed")
datasets = pytest.importorskip("datasets")

MODELS = Path(__file__).parents[2] / "opdctl" / "data" / "toy" / "models"
STUDENT = ModelDir(MODELS / "student", "float32")
QUESTIONS = ("qzywvutsrpnm?", "abcdefghijkl?")
MAX_TOKENS = 160


def load_trainer(name: str) -> Any:
    """Return one of TRL's trainer classes, or skip: TRL imports them when they are first used."""
    try:
        return getattr(trl, name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"TRL's {name} cannot be imported: {error}")


def settings(folder: Path) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "max_completion_length": MAX_TOKENS,
        "max_steps": 1,
        "logging_steps": 1,
        "log_completions": True,
        "num_completions_to_print": 0,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def load_model(name: str) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODELS / name)


def run_grpo(folder: Path, prompts: list[Any]) -> list[tuple[str, list[int]]]:
    """Train for a step, and return the prompts and the ids of the completions that TRL passes to the reward."""
    trainer_class = load_trainer("GRPOTrainer")
    sampled: list[tuple[str, list[int]]] = []

    def count_tokens(prompts: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        texts = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
        sampled.extend(zip(texts, completion_ids, strict=True))
        return [float(len(ids)) for ids in completion_ids]

    trainer_class(
        model=load_model("student"),
        processing_class=STUDENT.tokenizer,
        reward_funcs=count_tokens,
        args=trl.GRPOConfig(per_device_train_batch_size=4, num_generations=2, seed=3, **settings(folder)),
        train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
    ).train()
    return sampled


def read_completions(folder: Path) -> list[Trajectory]:
    return list(read_trajectories([folder / "completions"], STUDENT.tokenizer, STUDENT.vocab_size))


@pytest.mark.parametrize("is_chat", [False, True], ids=["texts", "messages"])
def test_completions_of_grpo(is_chat: bool, tmp_path: Path) -> None:
    prompts = [[{"role": "user", "content": text}] if is_chat else text for text in QUESTIONS]
    sampled = run_grpo(tmp_path, prompts)
    read = read_completions(tmp_path)
    assert len(read) == len(sampled) == 4
    end = STUDENT.tokenizer.eos_token_id
    for trajectory, (prompt, ids) in zip(read, sampled, strict=True):
        assert trajectory.prompt_ids.tolist() == STUDENT.tokenizer(prompt)["input_ids"]
        assert trajectory.response_ids.tolist() == [id_ for id_ in ids if id_ != end]
        assert trajectory.loss_mask is None
    assert any(end in ids for _, ids in sampled), "the end of sequence is sampled, and TRL drops it"
    assert [each.sample_id for each in read] == ["1", "2", "3", "4"]
    assert len({each.prompt_id for each in read}) == len({prompt for prompt, _ in sampled})


def test_completions_of_distillation(tmp_path: Path) -> None:
    trainer_class = load_trainer("DistillationTrainer")
    trainer_class(
        model=load_model("student"),
        teacher_model=load_model("teacher"),
        processing_class=STUDENT.tokenizer,
        args=trl.DistillationConfig(per_device_train_batch_size=2, seed=3, **settings(tmp_path)),
        train_dataset=datasets.Dataset.from_list([{"prompt": text} for text in QUESTIONS]),
    ).train()
    read = read_completions(tmp_path)
    assert {STUDENT.tokenizer.decode(each.prompt_ids) for each in read} == {*QUESTIONS}
    assert all(len(each.response_ids) > 0 for each in read)

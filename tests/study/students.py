"""The degraded students of the conditions: models that solve the task, then trained briefly on one kind of faulty
answers.

They differ in where in the answer the faults begin (onset), in the kind of fault (an incorrect letter, or remaining
letters that are not written), in model size, and in the length of the answers.
"""

import random
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from arms import Scale, Student
from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

from opdctl.data.toy import TASKS, sort12
from opdctl.data.toy.train_models import Trace, TrainingStage, fit, wrong_swaps
from opdctl.models.directory import ModelDir, find_or_download
from opdctl.recipe.schema import Model

EARLY, LATE = range(3), range(7, 10)
"""Of the twelve passes of sort12: the first 34 % of the tokens of a worked answer, and those from 67 to 83 %."""


@dataclass(frozen=True)
class Faults:
    """Faulty answers to sort12. A fault begins in each of `passes` with probability `rate`.

    The fault is a random letter, from which the answer continues correctly; or, if `terse`, the answer stops writing
    the remaining letters and then picks a random one in two of five passes.
    """

    passes: range
    rate: float
    terse: bool

    def __call__(self, word: str, rng: random.Random) -> str:
        remaining, picked, passes, is_terse = list(word), [], [], False
        for number in range(len(word)):
            is_fault = number in self.passes and rng.random() < self.rate
            is_terse = is_terse or (self.terse and is_fault)
            is_random = (is_terse and rng.random() < 0.4) if self.terse else is_fault
            letter = rng.choice(remaining) if is_random else min(remaining)
            remaining.remove(letter)
            picked.append(letter)
            passes.append(f"{letter}:{'' if is_terse else ''.join(remaining)};")
        return f"{''.join(passes)}>{''.join(picked)}"


@dataclass(frozen=True)
class Degradation:
    """How to make one degraded student. `base` is the toy model to start from; student-spread is restored first."""

    name: str
    task: str
    base: str
    teacher: str
    faults: Trace


def degradations() -> list[Degradation]:
    kinds = {
        "early content": Faults(EARLY, 0.30, terse=False),
        "early format": Faults(EARLY, 0.28, terse=True),
        "late content": Faults(LATE, 0.38, terse=False),
        "late format": Faults(LATE, 0.38, terse=True),
    }
    sizes = {"small": ("toy:student-spread", kinds), "large": ("toy:teacher", [*kinds][:2])}
    sorting = [
        Degradation(f"{kind}, {size}", "sort12", base, "toy:teacher", kinds[kind])
        for size, (base, names) in sizes.items()
        for kind in names
    ]
    rates = {"perm4": 0.25, "perm8": 0.13, "perm": 0.09}
    swapping = [
        Degradation(task, task, "toy:perm-teacher", "toy:perm-teacher", partial(wrong_swaps, rate=rate))
        for task, rate in rates.items()
    ]
    return sorting + swapping


def degraded_student(degradation: Degradation, folder: Path) -> Student:
    """Return the student of a degradation, whose model directory is in `folder`."""
    path = folder / degradation.name.replace(", ", "-").replace(" ", "-")
    return Student(degradation.name, degradation.task, str(path), degradation.teacher)


def train_degraded(degradation: Degradation, scale: Scale, path: Path) -> None:
    """Train a degraded student and write its model directory."""
    base = ModelDir(find_or_download(Model(model=degradation.base), "model"), "float32")
    model, tokenizer = Qwen3ForCausalLM.from_pretrained(base.path), base.tokenizer
    if degradation.base == "toy:student-spread":
        restore(model, tokenizer, scale)
    stage = TrainingStage((TASKS[degradation.task],), scale.degrade_steps, lr=5e-4, batch=32, trace=degradation.faults)
    fit(model, tokenizer, stage, seed=3)
    unfinished = path.with_name(f".{path.name}")
    tokenizer.save_pretrained(unfinished)
    model.save_pretrained(unfinished)
    unfinished.rename(path)  # an interrupted run leaves no incomplete model directory


def restore(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, scale: Scale) -> None:
    """Train a weak student on correct answers again."""
    fit(model, tokenizer, TrainingStage((sort12,), 2 * scale.degrade_steps, lr=1e-3, batch=32), seed=4)

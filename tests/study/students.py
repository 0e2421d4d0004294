"""The students of the conditions: able models, made weak by a short training on faulty answers of one kind.

What differs between them: where in the answer faults begin (onset), whether a fault is a wrong letter or an answer that
leaves out what it should list (kind), how large the student is, and how long its answers are.
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
    """Faulty answers to sort12 whose faults begin in some passes, in each with probability `rate`.

    A wrong letter is taken and the answer goes on from there faithfully; or, if `terse`, the answer lists no more what
    is left, and takes a wrong letter two times in five.
    """

    passes: range
    rate: float
    terse: bool

    def __call__(self, word: str, rng: random.Random) -> str:
        left, picked, passes, terse = list(word), [], [], False
        for number in range(len(word)):
            strikes = number in self.passes and rng.random() < self.rate
            terse = terse or (self.terse and strikes)
            wrong = (terse and rng.random() < 0.4) if self.terse else strikes
            letter = rng.choice(left) if wrong else min(left)
            left.remove(letter)
            picked.append(letter)
            passes.append(f"{letter}:{'' if terse else ''.join(left)};")
        return f"{''.join(passes)}>{''.join(picked)}"


@dataclass(frozen=True)
class Making:
    """How one student is made: `able` names the embedded model that it begins as, healed first if that one is weak."""

    name: str
    task: str
    able: str
    teacher: str
    faults: Trace


def makings() -> list[Making]:
    kinds = {
        "early content": Faults(EARLY, 0.30, terse=False),
        "early format": Faults(EARLY, 0.28, terse=True),
        "late content": Faults(LATE, 0.38, terse=False),
        "late format": Faults(LATE, 0.38, terse=True),
    }
    sizes = {"small": ("toy:student-spread", kinds), "large": ("toy:teacher", [*kinds][:2])}
    sorting = [
        Making(f"{kind}, {size}", "sort12", able, "toy:teacher", kinds[kind])
        for size, (able, some) in sizes.items()
        for kind in some
    ]
    rates = {"perm4": 0.25, "perm8": 0.13, "perm": 0.09}
    swapping = [
        Making(task, task, "toy:perm-teacher", "toy:perm-teacher", partial(wrong_swaps, rate=rate))
        for task, rate in rates.items()
    ]
    return sorting + swapping


def make(making: Making, scale: Scale, folder: Path) -> Student:
    """Make a student under `folder`, unless it is there, and return it."""
    path = folder / making.name.replace(", ", "-").replace(" ", "-")
    if not (path / "config.json").exists():
        able = ModelDir(find_or_download(Model(model=making.able), "model"), "float32")
        model, tokenizer = Qwen3ForCausalLM.from_pretrained(able.path), able.tokenizer
        if making.able == "toy:student-spread":
            heal(model, tokenizer, scale)
        lesson = TrainingStage((TASKS[making.task],), scale.lesson_steps, lr=5e-4, batch=32, trace=making.faults)
        fit(model, tokenizer, lesson, seed=3)
        tokenizer.save_pretrained(path)
        model.save_pretrained(path)
    return Student(making.name, making.task, str(path), making.teacher)


def heal(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerBase, scale: Scale) -> None:
    """Teach a weak student right answers again."""
    fit(model, tokenizer, TrainingStage((sort12,), 2 * scale.lesson_steps, lr=1e-3, batch=32), seed=4)

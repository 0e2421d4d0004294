"""The design of the study: arms, students, scales, and the training runs of each comparison."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PREFIX_FRACTION = 0.3
"""Fraction of the tokens of a response that the paper calls its prefix."""
FIXED_LEARNING_RATE = 1e-4
"""Learning rate of the degraded students and of the noise-floor runs."""


@dataclass(frozen=True)
class Arm:
    """A token weight or an objective. `settings` are its overrides of the recipe."""

    name: str
    settings: tuple[str, ...]


@dataclass(frozen=True)
class Student:
    """A student and its teacher: names of toy models, or model directories."""

    name: str
    task: str
    model: str
    teacher: str


@dataclass(frozen=True)
class Training:
    """One training run. Runs with the same seed have the same prompts in the same order, and the same first responses.

    is_evaluated: whether the final student is also evaluated on test problems.
    """

    student: Student
    arm: Arm
    learning_rate: float
    seed: int
    is_evaluated: bool = False

    @property
    def key(self) -> str:
        return f"{self.student.name}/{self.arm.name}/{self.learning_rate:g}/{self.seed}"


def weight_arm(name: str, **parameters: float) -> Arm:
    label = " ".join([name, *(f"{key} {value:g}" for key, value in parameters.items())])
    return Arm(label, (f"weight.name={name}", *(f"weight.{key}={value}" for key, value in parameters.items())))


def prefix_ratio_arm(alpha: float) -> Arm:
    """Return an arm with the ratio normalized within each response."""
    arm = weight_arm("prefix_ratio", alpha=alpha)
    return Arm(arm.name, (*arm.settings, "weight.normalize=response"))


def objective_arm(label: str, *settings: str) -> Arm:
    """Return an arm with uniform weights and another objective."""
    return Arm(label, ("weight.name=uniform", *settings))


UNIFORM = weight_arm("uniform")
IW_OPD = weight_arm("iw_opd", gamma=0.5)
PREFIX = weight_arm("prefix_only", fraction=PREFIX_FRACTION)
SUFFIX = weight_arm("suffix_only", fraction=PREFIX_FRACTION)
ARMS = (
    UNIFORM,
    weight_arm("iw_opd", gamma=0.25),
    IW_OPD,
    weight_arm("iw_opd", gamma=1.0),
    weight_arm("linear_decay", gamma=0.5),
    *map(prefix_ratio_arm, (0.03, 0.1, 0.3)),
    PREFIX,
    SUFFIX,
    objective_arm("reverse_kl, whole vocabulary", "objective.name=reverse_kl", "objective.support=full"),
    objective_arm("reverse_kl, top 4", "objective.name=reverse_kl", "objective.top_k=4"),
    weight_arm("tip", rho=0.5),
    weight_arm("position_sigmoid"),
    objective_arm("control (placebo)", "objective.name=constant_penalty"),
)
STUDENTS = (
    Student("student", "sort12", "toy:student", "toy:teacher"),
    Student("student-spread", "sort12", "toy:student-spread", "toy:teacher"),
    Student("perm-student", "perm", "toy:perm-student", "toy:perm-teacher"),
)


@dataclass(frozen=True)
class Scale:
    """The size of the study.

    responses: per student, for continuations and the noise floor. degrade_steps: training steps of a degraded student.
    degraded: names of the degraded students; all if None. selection_seeds: seeds of the runs that select the learning
    rates; no other run uses them.
    """

    steps: int = 20
    prompts_per_step: int = 32
    responses: int = 96
    max_tokens: int = 128
    test_problems: int = 128
    degrade_steps: int = 80
    degraded: tuple[str, ...] | None = None
    students: tuple[Student, ...] = STUDENTS
    arms: tuple[Arm, ...] = ARMS
    learning_rates: tuple[float, ...] = (5e-5, 1.5e-4, 4e-4)
    selection_seeds: tuple[int, ...] = (100,)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    condition_seeds: tuple[int, ...] = (0, 1, 2)

    def includes(self, degraded: str) -> bool:
        return self.degraded is None or degraded in self.degraded

    def selection(self) -> list[Training]:
        """Return the training runs that select the learning rate of each arm."""
        return [
            Training(student, arm, learning_rate, seed)
            for student in self.students
            for arm in self.arms
            for learning_rate in self.learning_rates
            for seed in self.selection_seeds
        ]

    def comparison(self, learning_rates: Mapping[str, float]) -> list[Training]:
        """Return the training runs of the main comparison, given the learning rate of each arm."""
        return [
            Training(student, arm, learning_rates[arm.name], seed, is_evaluated=True)
            for student in self.students
            for arm in self.arms
            for seed in self.seeds
        ]

    def condition_cases(self, degraded: Sequence[Student]) -> list[tuple[Student, float]]:
        """Return the student and learning rate of each condition: the degraded students at one learning rate, and the
        first student at all of them."""
        first = self.students[0]
        return [*((student, FIXED_LEARNING_RATE) for student in degraded), *((first, r) for r in self.learning_rates)]

    def conditions(self, degraded: Sequence[Student]) -> list[Training]:
        """Return the training runs on prefixes, suffixes and all tokens in each condition."""
        return [
            Training(student, arm, learning_rate, seed)
            for student, learning_rate in self.condition_cases(degraded)
            for arm in (UNIFORM, PREFIX, SUFFIX)
            for seed in self.condition_seeds
        ]


FULL = Scale()
QUICK = Scale(
    steps=3,
    prompts_per_step=8,
    responses=8,
    max_tokens=48,
    test_problems=8,
    degrade_steps=20,
    degraded=("perm4",),
    students=(Student("perm-student", "perm4", "toy:perm-student", "toy:perm-teacher"),),
    arms=(UNIFORM, IW_OPD, PREFIX, SUFFIX),
    learning_rates=(2e-4, 4e-4),
    seeds=(0, 1),
    condition_seeds=(0, 1),
)
"""Runs all code in a minute; the numbers mean nothing. One short task, since a response takes most of the time."""

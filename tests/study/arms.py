"""What the study compares: the arms, the students and the single trainings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

FIRST = 0.3
"""The share of a response that the paper calls its prefix."""
FIXED_RATE = 1e-4


@dataclass(frozen=True)
class Arm:
    """One way to weigh tokens, or another loss. `settings` are what it changes in the recipe."""

    name: str
    settings: tuple[str, ...]


@dataclass(frozen=True)
class Student:
    """One student with its teacher; `model` is an embedded one's name or a folder."""

    name: str
    task: str
    model: str
    teacher: str


@dataclass(frozen=True)
class Training:
    """One training. Two with the same seed see the same prompts in the same order, and begin with the same answers.

    rate: the learning rate. is_evaluated: whether its last student also answers test problems.
    """

    student: Student
    arm: Arm
    rate: float
    seed: int
    is_evaluated: bool = False

    @property
    def key(self) -> str:
        return f"{self.student.name}/{self.arm.name}/{self.rate:g}/{self.seed}"


def weight(name: str, **parameters: float) -> Arm:
    label = " ".join([name, *(f"{key} {value:g}" for key, value in parameters.items())])
    return Arm(label, (f"weight.name={name}", *(f"weight.{key}={value}" for key, value in parameters.items())))


def objective(label: str, *settings: str) -> Arm:
    return Arm(label, ("weight.name=uniform", *settings))


UNIFORM = weight("uniform")
IW_OPD = weight("iw_opd", gamma=0.5)
PREFIX = weight("prefix_only", fraction=FIRST)
SUFFIX = weight("suffix_only", fraction=FIRST)
ARMS = (
    UNIFORM,
    weight("iw_opd", gamma=0.25),
    IW_OPD,
    weight("iw_opd", gamma=1.0),
    weight("linear_decay", gamma=0.5),
    *(weight("prefix_ratio", alpha=alpha) for alpha in (0.03, 0.1, 0.3)),
    PREFIX,
    SUFFIX,
    objective("reverse_kl, whole vocabulary", "objective.name=reverse_kl", "objective.support=full"),
    objective("reverse_kl, top 4", "objective.name=reverse_kl", "objective.top_k=4"),
    weight("tip", rho=0.5),
    weight("position_sigmoid"),
    objective("control (placebo)", "objective.name=constant_penalty"),
)
STUDENTS = (
    Student("student", "sort12", "toy:student", "toy:teacher"),
    Student("student-spread", "sort12", "toy:student-spread", "toy:teacher"),
    Student("perm-student", "perm", "toy:perm-student", "toy:perm-teacher"),
)


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Learning rates are chosen by trainings with `selection_seeds`, on all students together, and none is used again.
    """

    steps: int = 20
    prompts_per_step: int = 32
    responses: int = 96
    lesson_steps: int = 80
    makings: int | None = None
    students: tuple[Student, ...] = STUDENTS
    arms: tuple[Arm, ...] = ARMS
    rates: tuple[float, ...] = (5e-5, 1.5e-4, 4e-4)
    selection_seeds: tuple[int, ...] = (100,)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    condition_seeds: tuple[int, ...] = (0, 1, 2)

    def selection(self) -> list[Training]:
        return [
            Training(student, arm, rate, seed)
            for student in self.students
            for arm in self.arms
            for rate in self.rates
            for seed in self.selection_seeds
        ]

    def comparison(self, rates: Mapping[str, float]) -> list[Training]:
        """Return the trainings of the main comparison, given each arm's learning rate."""
        return [
            Training(student, arm, rates[arm.name], seed, is_evaluated=True)
            for student in self.students
            for arm in self.arms
            for seed in self.seeds
        ]

    def cases(self, made: Sequence[Student]) -> list[tuple[Student, float]]:
        """Return each condition's student and learning rate: other students, and the first one at every rate."""
        return [(student, FIXED_RATE) for student in made] + [(self.students[0], rate) for rate in self.rates]

    def conditions(self, made: Sequence[Student]) -> list[Training]:
        """Return the trainings of the conditions on prefix, suffix and all tokens."""
        return [
            Training(student, arm, rate, seed)
            for student, rate in self.cases(made)
            for arm in (UNIFORM, PREFIX, SUFFIX)
            for seed in self.condition_seeds
        ]


FULL = Scale()
QUICK = Scale(
    steps=4,
    prompts_per_step=6,
    responses=6,
    lesson_steps=2,
    makings=2,
    students=STUDENTS[:2],
    arms=(UNIFORM, IW_OPD, PREFIX, SUFFIX),
    rates=(2e-4, 4e-4),
    seeds=(0, 1),
    condition_seeds=(0, 1),
)

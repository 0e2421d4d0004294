"""Benchmarks: where the problems lie, how a problem is put, and how an answer is graded. Imports no torch."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

from opdctl.data.prompts import Problem
from opdctl.data.tables import TableRow, load_from_hub, read_table
from opdctl.data.toy import TASKS
from opdctl.data.toy.task import Task
from opdctl.errors import ExitCode, OpdctlError, did_you_mean
from opdctl.evaluation import code_execution, graders
from opdctl.recipe.schema import TABLE_SUFFIXES, TEACHER_NAME_PATTERN, Eval, is_data_file
from opdctl.registry import BENCHMARKS

EMBEDDED_PROBLEMS = 256


class Source(Protocol):
    """Where a benchmark's problems come from. `where` names it; `local` says whether no network is needed."""

    @property
    def where(self) -> str: ...

    @property
    def local(self) -> bool: ...

    def problems(self, name: str, count: int | None, data: Path | None) -> Iterator[Problem]:
        """Yield the problems of the benchmark `name`, from the local file or folder `data` if one is given.

        `count` is how many are wanted; only a source without an end needs to know.

        Raises OpdctlError: code 3 for bad data, 5 when the hub cannot be reached.
        """
        ...


@dataclass(frozen=True)
class Benchmark:
    """One benchmark. `samples` is how often a problem is answered unless the recipe says otherwise; `wants` the form
    that the answer is asked for in: within \\boxed{}, as a block of code, or in none; `size` how many problems it has,
    where that is fixed. `on_track` tells whether the beginning of a response is right so far, given the prompt; None
    where the task cannot tell."""

    name: str
    source: Source
    grader: graders.Grader
    samples: int = 32
    answer_format: Literal["box", "code", "any"] = "box"
    size: int | None = None
    on_track: Callable[[str, str], bool] | None = None

    def samples_under(self, settings: Eval) -> int:
        """Return how often each problem is answered."""
        return settings.samples or (1 if settings.temperature == 0 else self.samples)

    def suffix_under(self, settings: Eval) -> str:
        """Return the text that asks for the answer's form, put behind every problem."""
        return {"box": settings.suffix, "code": settings.code_suffix, "any": ""}[self.answer_format]

    def problems(self, count: int | None, data: Path | None) -> list[Problem]:
        """Return the first `count` problems, all by default. Raises OpdctlError as their source does."""
        where = str(data or self.source.where)
        problems = list(islice(self.source.problems(self.name, count, data), count))
        if not problems:
            raise OpdctlError(f"{where}: holds no problems", code=ExitCode.BAD_DATA)
        if twice := [name for name, n in Counter(problem.id for problem in problems).items() if n > 1]:
            raise OpdctlError(f"{where}: id `{twice[0]}` occurs more than once", code=ExitCode.BAD_DATA)
        return problems


@dataclass(frozen=True)
class Columns:
    """Names that a column may have, tried in order. Without an id column the row number is the id."""

    id: tuple[str, ...] = ("id", "problem_idx", "unique_id")
    problem: tuple[str, ...] = ("problem", "question", "prompt")
    answer: tuple[str, ...] = ("answer", "final_answer")

    def problems(self, rows: Iterator[TableRow], where: str) -> Iterator[Problem]:
        for number, row in enumerate(rows):
            name = self._cell(row, self.id, f"{where}: problem {number}") if set(self.id) & {*row} else number
            text = self._cell(row, self.problem, f"{where}: problem {number}")
            answer = self._cell(row, self.answer, f"{where}: problem {number}")
            yield Problem(str(name), str(text), gold(answer))

    def _cell(self, row: TableRow, columns: tuple[str, ...], where: str) -> Any:
        for column in columns:
            if row.get(column) is not None:
                return row[column]
        raise OpdctlError(
            f"{where} has none of the columns {', '.join(columns)}; it has {', '.join(row)}"
            f"{did_you_mean(columns[0], row)}",
            code=ExitCode.BAD_DATA,
        )


def gold(answer: Any) -> str:
    """Return a data set's answer as text: what stands behind GSM8K's `####`, several answers with commas between, and
    27.0 as 27."""
    if isinstance(answer, list):
        return ", ".join(map(gold, answer))
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    return str(answer).rpartition("####")[2].strip()


@dataclass(frozen=True)
class Hub:
    """A data set on the hub, at one revision; the hub's library keeps it in its cache."""

    id: str
    revision: str
    split: str = "test"
    subset: str | None = None
    local: bool = False

    @property
    def where(self) -> str:
        return f"{self.id}@{self.revision}"

    def problems(self, name: str, count: int | None, data: Path | None) -> Iterator[Problem]:
        if data is not None:
            return Columns().problems(read_table(file_of(name, data)), str(data))
        hint = f"give local data by --data FILE_OR_DIR, such as {name}.jsonl; or run it once where there is a network"
        key = f"--bench {name}"
        rows = load_from_hub(self.id, self.split, self.revision, key, subset=self.subset, hint=hint)
        return Columns().problems(rows, self.id)


def file_of(name: str, data: Path) -> Path:
    """Return `data`, or the file of the benchmark `name` in it when it is a folder. Raises OpdctlError if none is."""
    if not data.is_dir():
        return data
    names = [f"{name}{suffix}" for suffix in TABLE_SUFFIXES]
    for each in names:
        if (data / each).is_file():
            return data / each
    raise OpdctlError(f"--data {data}: holds no {' or '.join(names)}")


@dataclass(frozen=True)
class Embedded:
    """An embedded task, whose problems have no end: the first ones of its test split."""

    task: Task
    local: bool = True

    @property
    def where(self) -> str:
        return f"toy:{self.task.name}"

    def problems(self, name: str, count: int | None, data: Path | None) -> Iterator[Problem]:
        for problem in islice(self.task.problems("test", seed=0), count or EMBEDDED_PROBLEMS):
            yield Problem(problem.id, problem.prompt, problem.answer)


@dataclass(frozen=True)
class Table:
    """A file of the user's own."""

    where: str
    columns: Columns
    local: bool = True

    def problems(self, name: str, count: int | None, data: Path | None) -> Iterator[Problem]:
        return self.columns.problems(read_table(Path(self.where).expanduser()), self.where)


@dataclass(frozen=True)
class EvalPlus:
    """HumanEval+ or MBPP+, from the package evalplus, which pins their version."""

    dataset: code_execution.Dataset
    local: bool = False

    @property
    def where(self) -> str:
        return "evalplus:" + "@".join(code_execution.RELEASES[self.dataset])

    def problems(self, name: str, count: int | None, data: Path | None) -> Iterator[Problem]:
        return code_execution.problems(self.dataset, file_of(name, data) if data else None)


def find(name: str, settings: Eval) -> Benchmark:
    """Return the benchmark `name`, or the one that a file of the user's own is. Raises OpdctlError if there is none."""
    if not is_data_file(name):
        found: Benchmark = BENCHMARKS.get(name)()
        return found
    stem = Path(name).stem
    if stem in BENCHMARKS.names():
        raise OpdctlError(f"{name}: `{stem}` is another benchmark's name", hint=f"give --bench {stem} --data {name}")
    if not TEACHER_NAME_PATTERN.fullmatch(stem):
        raise OpdctlError(f"{name}: a benchmark's name must be letters, digits, `_` or `-`", hint="rename the file")
    own = (settings.id_column, settings.problem_column, settings.answer_column)
    tried = (Columns.id, Columns.problem, Columns.answer)
    columns = Columns(*((column,) if column else names for column, names in zip(own, tried, strict=True)))
    grader = graders.mathematics if settings.grader == "mathematics" else graders.text
    return Benchmark(stem, Table(name, columns), grader)


def _all() -> Iterator[Benchmark]:
    math = graders.mathematics
    for task in TASKS.values():
        grader = graders.Text(task.extract)
        yield Benchmark(task.name, Embedded(task), grader, samples=1, answer_format="any", on_track=task.on_track)
    yield Benchmark(
        "aime24", Hub("HuggingFaceH4/aime_2024", "2fe88a2f1091d5048c0f36abc874fb997b3dd99a", "train"), math, size=30
    )
    yield Benchmark(
        "aime25", Hub("MathArena/aime_2025", "c94da77eb22bbd6439e62a323bec18493a421302", "train"), math, size=30
    )
    yield Benchmark(
        "hmmt25_feb", Hub("MathArena/hmmt_feb_2025", "6fdc4277120810ff75aa22d2d5489b91f7a262a1", "train"), math, size=30
    )
    yield Benchmark(
        "hmmt25_nov", Hub("MathArena/hmmt_nov_2025", "118dbfb45c4c9467c672268ed55166642897aa46", "train"), math, size=30
    )
    yield Benchmark("amc23", Hub("math-ai/amc23", "80815d37005feb82cd7f8fbc6901d5d3eff43057"), math, size=40)
    yield Benchmark(
        "math500", Hub("HuggingFaceH4/MATH-500", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be"), math, 4, size=500
    )
    yield Benchmark(
        "gsm8k", Hub("openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866", subset="main"), math, 4, size=1319
    )
    yield Benchmark(
        "minerva", Hub("math-ai/minervamath", "ee46ddc498933b1977577953250ca5c66be64f96"), math, 4, size=272
    )
    yield Benchmark(
        "olympiadbench", Hub("math-ai/olympiadbench", "4faaf1e6ec17d11a4218a9bf4c049ecaf954dd84"), math, 4, size=674
    )
    yield Benchmark(
        "humaneval_plus", EvalPlus("humaneval"), code_execution.code, samples=4, answer_format="code", size=164
    )
    yield Benchmark("mbpp_plus", EvalPlus("mbpp"), code_execution.code, samples=4, answer_format="code", size=378)


for _benchmark in _all():
    BENCHMARKS.register(_benchmark.name)(lambda benchmark=_benchmark: benchmark)

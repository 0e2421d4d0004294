"""Benchmarks: where the problems lie, how a problem is put, and how an answer is graded. Imports no torch."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from opdctl import grading
from opdctl.errors import ExitCode, OpdctlError
from opdctl.prompts import FORMATS, Problem, Row, from_hub, read_table
from opdctl.registry import BENCHMARKS
from opdctl.tasks import sort12

EMBEDDED_PROBLEMS = 256


@dataclass(frozen=True)
class Benchmark:
    """One benchmark. `hub` is None for the embedded task; columns are tried in order."""

    name: str
    grade: grading.Grader
    hub: str | None = None
    split: str = "train"
    id_columns: tuple[str, ...] = ("id", "problem_idx", "unique_id")
    problem_columns: tuple[str, ...] = ("problem", "question", "prompt")
    answer_columns: tuple[str, ...] = ("answer",)

    @property
    def boxed(self) -> bool:
        """Whether the answer is asked for within \\boxed{}."""
        return self.hub is not None

    def problems(self, count: int | None, data: Path | None) -> list[Problem]:
        """Return the first `count` problems, all by default, from `data` if given, else from where they lie.

        Raises OpdctlError: code 3 for bad data, 5 when the hub cannot be reached.
        """
        if self.hub is None:
            drawn = islice(sort12.problems("test", seed=0), count or EMBEDDED_PROBLEMS)
            return [Problem(p.id, p.prompt, p.answer) for p in drawn]
        rows = read_table(self._file(data)) if data else from_hub(self.hub, self.split, None, "--bench")
        problems = [self._problem(row, number) for number, row in enumerate(islice(rows, count))]
        if not problems:
            raise OpdctlError(f"{data or self.hub}: holds no problems", code=ExitCode.DATA)
        if twice := [name for name, n in Counter(problem.id for problem in problems).items() if n > 1]:
            raise OpdctlError(f"{data or self.hub}: id `{twice[0]}` occurs more than once", code=ExitCode.DATA)
        return problems

    def _file(self, data: Path) -> Path:
        """Return `data`, or this benchmark's file in it when it is a folder. Raises OpdctlError when it has none."""
        if not data.is_dir():
            return data
        names = [f"{self.name}{suffix}" for suffix in FORMATS]
        for name in names:
            if (data / name).is_file():
                return data / name
        raise OpdctlError(f"--data {data}: holds no {' or '.join(names)}")

    def _problem(self, row: Row, number: int) -> Problem:
        return Problem(
            str(self._cell(row, self.id_columns, number) if any(c in row for c in self.id_columns) else number),
            str(self._cell(row, self.problem_columns, number)),
            str(self._cell(row, self.answer_columns, number)),
        )

    def _cell(self, row: Row, columns: tuple[str, ...], number: int) -> object:
        for column in columns:
            if row.get(column) is not None:
                return row[column]
        raise OpdctlError(
            f"{self.name}: problem {number} has none of the columns {', '.join(columns)}; it has {', '.join(row)}",
            code=ExitCode.DATA,
        )


def _all() -> Iterator[Benchmark]:
    yield Benchmark("sort12", grading.exact(sort12.extract))
    yield Benchmark("aime24", grading.mathematics, "HuggingFaceH4/aime_2024")
    yield Benchmark("aime25", grading.mathematics, "MathArena/aime_2025")
    yield Benchmark("hmmt25_feb", grading.mathematics, "MathArena/hmmt_feb_2025")
    yield Benchmark("hmmt25_nov", grading.mathematics, "MathArena/hmmt_nov_2025")


for _benchmark in _all():
    BENCHMARKS.register(_benchmark.name)(lambda benchmark=_benchmark: benchmark)

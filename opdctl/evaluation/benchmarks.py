"""Benchmarks: the source of the problems, the form of a prompt, and the grader of an answer. Imports no torch."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

from opdctl.data.cells import parse_cell
from opdctl.data.columns import Columns, find_cell, find_prompt
from opdctl.data.messages import parse_chat
from opdctl.data.prompts import Problem
from opdctl.data.tables import TableRow, load_from_hub, read_table
from opdctl.data.toy import TASKS
from opdctl.data.toy.task import Task
from opdctl.errors import OpdctlError
from opdctl.evaluation import code_execution, livecodebench
from opdctl.evaluation.gpqa import read_gpqa
from opdctl.evaluation.graders import CHOICE_GRADER, GRADERS, MATH_GRADER, Grader, Text
from opdctl.recipe.data_names import (
    COMPRESSED_SUFFIXES,
    HUB_BENCHMARK_PATTERN,
    TABLE_SUFFIXES,
    benchmark_directory,
    is_named_by_data,
)
from opdctl.recipe.schema import TEACHER_NAME_PATTERN, Eval, Recipe
from opdctl.registry import BENCHMARKS, are_imported

TOY_PROBLEMS = 256  # of a toy benchmark unless a limit is given


AnswerFormat = Literal["box", "code", "any"]


class Source(Protocol):
    """The origin of a benchmark's problems.

    location: a path, or the id of a data set. is_local: whether it can be read without a network.
    """

    @property
    def location(self) -> str: ...

    @property
    def is_local(self) -> bool: ...

    def problems(self, name: str, limit: int | None, data: Path | None) -> Iterator[Problem]:
        """Yield the problems of the benchmark `name`, from the local file or directory `data` if one is given.

        limit: the number of problems that are used; only an infinite source needs it.

        Raises:
            OpdctlError: the data are missing or invalid, or the download fails.
        """
        ...


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    samples: per problem, unless the recipe sets them. answer_format: what the prompt asks for: a \\boxed{} answer, a
    block of code, or no special form. size: the number of problems, if it is fixed. on_track: whether the prefix of a
    response to a prompt is right so far; None if the task cannot decide that. selection: settings that select the
    problems of this benchmark alone, for its protocol and fingerprint.
    """

    name: str
    source: Source
    grader: Grader
    samples: int = 32
    answer_format: AnswerFormat = "box"
    size: int | None = None
    on_track: Callable[[str, str], bool] | None = None
    selection: Mapping[str, Any] = field(default_factory=dict)

    def samples_per_problem(self, settings: Eval) -> int:
        """Return the number of samples per problem; by default 1 at temperature 0, where all are equal."""
        return settings.samples or (1 if settings.temperature == 0 else self.samples)

    def prompt_suffix(self, settings: Eval) -> str:
        """Return the text that follows each problem and asks for the answer format."""
        return {"box": settings.suffix, "code": settings.code_suffix, "any": ""}[self.answer_format]

    def problems(self, limit: int | None, data: Path | None) -> list[Problem]:
        """Return the first `limit` problems, by default all.

        Raises:
            OpdctlError: the data are missing, invalid or empty, an id is repeated, or the download fails.
        """
        location = data or self.source.location
        problems = list(islice(self.source.problems(self.name, limit, data), limit))
        if not problems:
            raise OpdctlError("invalid_data", f"{location}: no problems")
        if repeated := [name for name, count in Counter(problem.id for problem in problems).items() if count > 1]:
            raise OpdctlError("invalid_data", f"{location}: id `{repeated[0]}` occurs more than once")
        return problems


USUAL_COLUMNS = Columns()


def read_problems(rows: Iterator[TableRow], location: str, columns: Columns = USUAL_COLUMNS) -> Iterator[Problem]:
    """Yield the problem of each row. location: of the rows, for errors.

    Raises:
        OpdctlError: a row has no problem or no answer.
    """
    for number, row in enumerate(rows, 1):
        at = f"{location}: row {number}"
        has_id = len(columns.id) == 1 or bool({*columns.id} & {*row})
        name = find_cell(row, columns.id, "eval.id_column", at) if has_id else (number - 1, at)
        chat = parse_chat(*find_prompt(row, columns.problem, "eval.problem_column", at))
        answer = parse_gold(*find_cell(row, columns.answer, "eval.answer_column", at))
        yield Problem(parse_cell(*name), chat.text, answer, location=at, earlier=chat.earlier, later=chat.later)


def parse_gold(answer: Any, location: str) -> str:
    """Return a data set's answer as text: of GSM8K's solutions the text after `####`.

    Raises:
        OpdctlError: it cannot be read as text.
    """
    if isinstance(answer, list) and answer:
        return ", ".join(parse_gold(item, location) for item in answer)
    return parse_cell(answer, location).rpartition("####")[2].strip()


@dataclass(frozen=True)
class Hub:
    """A data set of the Hugging Face hub at one revision; the `datasets` library caches it.

    read: rows and their location → problems. access: what to do if it cannot be downloaded.
    """

    id: str
    revision: str | None
    split: str = "test"
    subset: str | None = None
    read: Callable[[Iterator[TableRow], str], Iterator[Problem]] = read_problems
    access: str = "run it once with a network"
    is_local: bool = False

    @property
    def location(self) -> str:
        return f"{self.id}@{self.revision}" if self.revision else self.id

    def problems(self, name: str, limit: int | None, data: Path | None) -> Iterator[Problem]:
        if data is not None:
            return self.read(read_table(benchmark_file(name, data)), str(data))
        hint = f"give a local copy by --data FILE_OR_DIR, such as {name}.jsonl; or {self.access}"
        rows = load_from_hub(self.id, self.split, self.revision, f"--bench {name}", subset=self.subset, hint=hint)
        return self.read(rows, self.id)


def benchmark_file(name: str, data: Path) -> Path:
    """Return `data` if it is a file, or the file of the benchmark `name` in the directory `data`.

    Raises:
        OpdctlError: the directory has no such file.
    """
    if not data.is_dir():
        return data
    candidates = [data / f"{name}{suffix}" for suffix in (*TABLE_SUFFIXES, *COMPRESSED_SUFFIXES)]
    for path in candidates:
        if path.is_file():
            return path
    wanted = " or ".join(f"{name}{suffix}" for suffix in TABLE_SUFFIXES)
    raise OpdctlError("missing_file", f"--data {data}: no {wanted}")


@dataclass(frozen=True)
class Toy:
    """The first problems of a toy task's test split, which is infinite."""

    task: Task
    is_local: bool = True

    @property
    def location(self) -> str:
        return f"toy:{self.task.name}"

    def problems(self, name: str, limit: int | None, data: Path | None) -> Iterator[Problem]:
        for problem in islice(self.task.problems("test", seed=0), limit or TOY_PROBLEMS):
            yield Problem(problem.id, problem.prompt, problem.answer, location=self.location)


@dataclass(frozen=True)
class Table:
    """A local file of problems. location: its path."""

    location: str
    columns: Columns
    is_local: bool = True

    def problems(self, name: str, limit: int | None, data: Path | None) -> Iterator[Problem]:
        return read_problems(read_table(Path(self.location).expanduser()), self.location, self.columns)


@dataclass(frozen=True)
class EvalPlus:
    """HumanEval+ or MBPP+ from the package evalplus, which pins their version."""

    dataset: code_execution.Dataset
    is_local: bool = False

    @property
    def location(self) -> str:
        return "evalplus:" + "@".join(code_execution.RELEASES[self.dataset])

    def problems(self, name: str, limit: int | None, data: Path | None) -> Iterator[Problem]:
        return code_execution.load_tasks(self.dataset, benchmark_file(name, data) if data else None)


def is_of_unknown_plugin(recipe: Recipe, name: str) -> bool:
    """Whether a benchmark belongs to a plugin that was not imported."""
    return name not in BENCHMARKS.names() and not is_named_by_data(name) and not are_imported(recipe.plugins)


def chosen_columns(settings: Eval) -> Columns:
    """Return the columns of the recipe, and the usual ones for those that it does not name."""
    chosen = (settings.id_column, settings.problem_column, settings.answer_column)
    defaults = (Columns.id, Columns.problem, Columns.answer)
    return Columns(*((column,) if column else names for column, names in zip(chosen, defaults, strict=True)))


def find_benchmark(name: str, settings: Eval) -> Benchmark:
    """Return the registered benchmark `name`, or that of the file or hub data set `name` with the recipe's columns.

    Raises:
        OpdctlError: there is no such benchmark, or the file's name is not allowed.
    """
    if name == "livecodebench":
        return _livecodebench(settings)
    if not is_named_by_data(name):
        benchmark: Benchmark = BENCHMARKS.get(name)()
        is_boxed = benchmark.grader is MATH_GRADER and settings.grader != CHOICE_GRADER.name
        return replace(benchmark, grader=GRADERS[settings.grader]) if is_boxed else benchmark
    columns = chosen_columns(settings)
    label, grader = benchmark_directory(name), GRADERS[settings.grader]
    if match := HUB_BENCHMARK_PATTERN.fullmatch(name):
        read = partial(read_problems, columns=columns)
        source = Hub(match["id"], match["revision"], settings.split, match["subset"], read)
        return Benchmark(label, source, grader, selection={"source": name, "split": settings.split})
    if label in BENCHMARKS.names():
        detail = f"{name}: `{label}` is the name of a registered benchmark"
        raise OpdctlError("invalid_usage", detail, hint=f"give --bench {label} --data {name}")
    if not TEACHER_NAME_PATTERN.fullmatch(label):
        detail = f"{name}: the name of a benchmark consists of letters, digits, `_` and `-`"
        raise OpdctlError("invalid_usage", detail, hint="rename the file")
    return Benchmark(label, Table(name, columns), grader)


def _toy(task: Task) -> Benchmark:
    return Benchmark(task.name, Toy(task), Text(task.extract), samples=1, answer_format="any", on_track=task.on_track)


def _math(name: str, size: int, source: Hub, samples: int = 32) -> Benchmark:
    return Benchmark(name, source, MATH_GRADER, samples, size=size)


GPQA = Hub(
    "Idavidrein/gpqa",
    "633f5ee89ab8ad4522a9f850766b73f62147ffdd",
    "train",
    "gpqa_diamond",
    read_gpqa,
    "accept its terms at https://huggingface.co/datasets/Idavidrein/gpqa, set HF_TOKEN and run it once with a network",
)


def _code(name: str, size: int, dataset: code_execution.Dataset) -> Benchmark:
    return Benchmark(name, EvalPlus(dataset), code_execution.CODE_GRADER, 4, answer_format="code", size=size)


def _livecodebench(settings: Eval) -> Benchmark:
    keys = ("release_version", "start_date", "end_date")
    selection = {key: getattr(settings, key) for key in keys}
    questions = livecodebench.Questions(*selection.values())
    grader = livecodebench.Programs(questions)
    return Benchmark("livecodebench", questions, grader, 4, "any", questions.size, selection=selection)


SHIPPED_BENCHMARKS = (
    *(_toy(task) for task in TASKS.values() if task.tool is None),  # an evaluation has single turns
    _math("aime24", 30, Hub("HuggingFaceH4/aime_2024", "2fe88a2f1091d5048c0f36abc874fb997b3dd99a", "train")),
    _math("aime25", 30, Hub("MathArena/aime_2025", "c94da77eb22bbd6439e62a323bec18493a421302", "train")),
    _math("aime26", 30, Hub("MathArena/aime_2026", "d2de22f3c656b4f56cf8981212186377d1e23bc3", "train")),
    _math("hmmt25_feb", 30, Hub("MathArena/hmmt_feb_2025", "6fdc4277120810ff75aa22d2d5489b91f7a262a1", "train")),
    _math("hmmt25_nov", 30, Hub("MathArena/hmmt_nov_2025", "118dbfb45c4c9467c672268ed55166642897aa46", "train")),
    _math("hmmt26_feb", 33, Hub("MathArena/hmmt_feb_2026", "02fba4f74d8e68e73e66a02d540fd979c05c274c", "train")),
    _math("amc23", 40, Hub("math-ai/amc23", "80815d37005feb82cd7f8fbc6901d5d3eff43057")),
    _math("math500", 500, Hub("HuggingFaceH4/MATH-500", "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be"), 4),
    _math("gsm8k", 1319, Hub("openai/gsm8k", "740312add88f781978c0658806c59bc2815b9866", subset="main"), 4),
    _math("minerva", 272, Hub("math-ai/minervamath", "ee46ddc498933b1977577953250ca5c66be64f96"), 4),
    _math("olympiadbench", 674, Hub("math-ai/olympiadbench", "4faaf1e6ec17d11a4218a9bf4c049ecaf954dd84"), 4),
    Benchmark("gpqa_diamond", GPQA, CHOICE_GRADER, 4, answer_format="any", size=198),
    _code("humaneval_plus", 164, "humaneval"),
    _code("mbpp_plus", 378, "mbpp"),
)
for _benchmark in SHIPPED_BENCHMARKS:
    BENCHMARKS.register(_benchmark.name)(lambda benchmark=_benchmark: benchmark)
BENCHMARKS.register("livecodebench")(lambda: _livecodebench(Eval()))

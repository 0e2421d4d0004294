"""Benchmarks: the registry, gold answers as data sets store them, local files, an unavailable hub."""

import json
import math
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.commands import ROOT, small_recipe

from opdctl.data.messages import Message
from opdctl.data.prompts import load_problems
from opdctl.data.toy import TASKS
from opdctl.data.toy.task import split_of
from opdctl.errors import OpdctlError
from opdctl.evaluation.benchmarks import Benchmark, Hub, benchmark_file, find_benchmark, parse_gold
from opdctl.evaluation.graders import MATH_GRADER
from opdctl.recipe.dependencies import fingerprint_settings
from opdctl.recipe.prompts import Prompts
from opdctl.recipe.schema import Eval
from opdctl.registry import BENCHMARKS

DATA = ROOT.parent / "shared" / "benchmarks"
SIZES = {"aime24": 30, "aime25": 30, "hmmt25_feb": 30, "hmmt25_nov": 30, "math500": 500, "gsm8k": 1319}


def registered(name: str) -> Benchmark:
    return find_benchmark(name, Eval())


# ── The registry ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_shipped_benchmarks_are_complete() -> None:
    toy_tasks = {"sort12", "perm", "perm4", "perm8"}  # calc needs its calculator
    assert toy_tasks == TASKS.keys() - {"calc"}
    wanted = {
        *toy_tasks,
        "aime26",
        "hmmt26_feb",
        "amc23",
        "minerva",
        "olympiadbench",
        "gpqa_diamond",
        "livecodebench",
        "humaneval_plus",
        "mbpp_plus",
        *SIZES,
    }
    assert set(BENCHMARKS.names()) == wanted
    for name in BENCHMARKS.names():
        benchmark = registered(name)
        assert benchmark.name == name
        # AIME and HMMT as in the paper
        assert benchmark.samples == (1 if name in toy_tasks else 32 if name[:4] in ("aime", "hmmt", "amc2") else 4)
        if isinstance(benchmark.source, Hub):
            assert len(benchmark.source.revision) == 40
            assert not benchmark.source.is_local
            int(benchmark.source.revision, 16)
        else:
            assert benchmark.answer_format == ("code" if name.endswith("_plus") else "any")


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no benchmark files in {DATA.parent.name}/{DATA.name}")
@pytest.mark.parametrize("name", SIZES)
def test_local_data_replace_the_hub(name: str) -> None:
    problems = registered(name).problems(None, DATA)
    assert len(problems) == SIZES[name]
    assert registered(name).problems(7, DATA) == problems[:7]
    assert all(problem.text and problem.answer for problem in problems)


def test_unavailable_hub_is_reported_with_both_solutions() -> None:
    with pytest.raises(OpdctlError) as caught:
        registered("aime25").problems(None, None)
    assert caught.value.kind == "failed_download"
    assert "--bench aime25: `MathArena/aime_2025`" in caught.value.message
    assert "--data FILE_OR_DIR, such as aime25.jsonl" in str(caught.value.hint)
    assert "with a network" in str(caught.value.hint)


def test_hub_request_has_the_pinned_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: object, **kwargs: object) -> datasets.Dataset:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"question": "1+1?", "answer": "It is two.\n#### 2"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (problem,) = registered("gsm8k").problems(None, None)
    assert (problem.id, problem.text, problem.answer) == ("0", "1+1?", "2")
    assert asked == [
        (
            ("openai/gsm8k", "main"),
            {"data_files": None, "split": "test", "revision": "740312add88f781978c0658806c59bc2815b9866"},
        )
    ]


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ("204", "204"),
        (204, "204"),
        (27.0, "27"),
        (0.5, "0.5"),
        ("She has 3 + 4 = <<3+4=7>>7.\n#### 7", "7"),
        ("#### 1,000 ", "1,000"),
        (["$2$"], "$2$"),
        (["2", "3"], "2, 3"),
        ([2.0, "x"], "2, x"),
        (r"\frac{1}{2}", r"\frac{1}{2}"),
    ],
)
def test_parse_gold(cell: object, text: str) -> None:
    assert parse_gold(cell, "here") == text


def test_chat_is_a_problem_with_earlier_messages(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"}]
    (tmp_path / "aime24.json").write_text(json.dumps([{"problem": chat, "answer": 2}], indent=2))
    (problem,) = registered("aime24").problems(None, tmp_path)
    assert (problem.text, problem.answer, problem.earlier) == ("1+1?", "2", (Message("system", "Be brief."),))


BAD_CELLS = [b"3", {"value": "3"}, math.nan, math.inf, [], True, [None], [["a"], [b"a"]]]


@pytest.mark.parametrize("cell", BAD_CELLS, ids=map(repr, BAD_CELLS))
def test_training_and_evaluation_refuse_the_same_cells(tmp_path: Path, cell: object) -> None:
    """No cell becomes text by the notation of Python."""
    columns = {"problem": "1+1?", "answer": "2", "id": "a"}
    for number, column in enumerate(columns):
        path = tmp_path / f"rows-{number}.parquet"
        pq.write_table(pa.Table.from_pylist([columns | {column: cell}]), path)
        prompts = Prompts(source=str(path), prompt_column="problem", answer_column="answer", id_column="id")
        with pytest.raises(OpdctlError) as of_training:
            load_problems(prompts)
        with pytest.raises(OpdctlError) as of_evaluation:
            find_benchmark(str(path), Eval()).problems(None, None)
        assert f"row 1: `{column}" in of_training.value.message
        if not isinstance(cell, dict):  # whose fields are offered to the settings of prompts
            assert of_evaluation.value.message == of_training.value.message


def test_toy_benchmark_is_held_out_and_infinite() -> None:
    problems = registered("sort12").problems(10, None)
    assert {split_of(problem.text[:-1]) for problem in problems} == {"test"}
    assert len(registered("sort12").problems(None, None)) == 256
    assert len(registered("sort12").problems(300, None)) == 300


# ── Local data ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_file_and_its_directory_give_the_same_problems(tmp_path: Path) -> None:
    (tmp_path / "aime24.jsonl").write_text(
        '{"id": "a", "problem": "1+1?", "answer": 2}\n{"problem_idx": 9, "question": "?", "answer": "3"}\n'
    )
    problems = registered("aime24").problems(None, tmp_path)
    assert [(p.id, p.text, p.answer) for p in problems] == [("a", "1+1?", "2"), ("9", "?", "3")]
    assert registered("aime24").problems(None, tmp_path / "aime24.jsonl") == problems
    assert registered("aime24").problems(1, tmp_path) == problems[:1]


def test_directory_without_the_benchmark_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(OpdctlError) as caught:
        registered("aime24").problems(None, tmp_path)
    assert caught.value.kind == "missing_file"
    assert all(f"aime24.{suffix}" in caught.value.message for suffix in ("jsonl", "parquet", "csv"))


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("", ["mine.jsonl: "]),
        (
            '{"problem": "1+1?", "anser": "2"}\n',
            ["mine.jsonl: row 1", "`final_answer`; did you mean `anser`?"],
        ),
        ('{"problem": "1+1?", "answer": null}\n', ["mine.jsonl: row 1: `answer` is null"]),
        ("1\n", ["mine.jsonl:1: "]),
        ('{"id": 1, "problem": "a", "answer": "2"}\n{"id": 1, "problem": "b", "answer": "3"}\n', ["mine.jsonl", "`1`"]),
    ],
)
def test_invalid_data_are_rejected(tmp_path: Path, content: str, parts: list[str]) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    with pytest.raises(OpdctlError) as caught:
        registered("aime24").problems(None, path)
    assert caught.value.kind == "invalid_data"
    assert all(part in caught.value.message for part in parts)


ROWS = [{"nr": "a", "frage": "1+1?", "lösung": "2"}, {"nr": "b", "frage": 'Two,\n"three"?', "lösung": "{2, 3}"}]


def write(path: Path) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        cells = [["nr", "frage", "lösung"], *(list(row.values()) for row in ROWS)]
        quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in row) for row in cells]
        path.write_text("\ufeff" + "\r\n".join(quoted) + "\r\n", newline="")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_local_file_is_a_benchmark(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"mine{suffix}"
    write(path)
    columns = Eval(id_column="nr", problem_column="frage", answer_column="lösung", grader="text")
    benchmark = find_benchmark(str(path), columns)
    assert [(p.id, p.text, p.answer) for p in benchmark.problems(None, None)] == [tuple(row.values()) for row in ROWS]
    assert (benchmark.name, benchmark.answer_format, benchmark.source.is_local) == ("mine", "box", True)
    assert benchmark.grader.grade([("2", r"\boxed{2}"), ("2", r"\boxed{02}")])[1].correct is False
    assert find_benchmark(str(path), Eval()).grader.grade([("2", r"\boxed{02}")])[0].correct is True
    with pytest.raises(OpdctlError, match=r"no column `prompt` or `messages`") as caught:
        find_benchmark(str(path), Eval()).problems(None, None)
    assert caught.value.kind == "invalid_data"
    assert caught.value.hint == "set eval.problem_column to one of the columns `nr`, `frage`, `lösung`"


def test_grader_applies_to_registered_benchmarks_with_mathematics() -> None:
    assert find_benchmark("aime24", Eval()).grader is MATH_GRADER
    assert find_benchmark("aime24", Eval(grader="math-verify")).grader.name == "math-verify"
    assert find_benchmark("sort12", Eval(grader="math-verify")).grader.name == "text"
    assert find_benchmark("aime24", Eval(grader="choice")).grader is MATH_GRADER  # no benchmark of choices
    assert find_benchmark("hub:a/b", Eval(grader="choice")).grader.name == "choice"


@pytest.mark.parametrize(
    ("text", "location"),
    [
        ("problem,answer\n1+1?\n", r"mine\.csv:2: .* 2\b"),
        ("problem,answer\n1+1?,2,3\n", r"mine\.csv:2: .* 2\b"),
        ('problem,answer\n"1+1?,2\n', r"mine\.csv:\d+: "),
        ("problem,answer\n", r"mine\.csv: no problems"),
        ("", r"mine\.csv: no problems"),
    ],
)
def test_invalid_csv_is_rejected_with_its_line(tmp_path: Path, text: str, location: str) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(text)
    with pytest.raises(OpdctlError, match=location) as caught:
        find_benchmark(str(path), Eval()).problems(None, None)
    assert caught.value.kind == "invalid_data"


def test_csv_must_be_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_bytes("problem,answer\nüber?,2\n".encode("latin-1"))
    with pytest.raises(OpdctlError, match=r"mine\.csv:\d+: .*utf-8"):
        find_benchmark(str(path), Eval()).problems(None, None)


@pytest.mark.parametrize(("name", "hint"), [("aime25.jsonl", "--bench aime25 --data"), ("..jsonl", "rename")])
def test_file_needs_a_free_and_valid_name(tmp_path: Path, name: str, hint: str) -> None:
    with pytest.raises(OpdctlError) as caught:
        find_benchmark(str(tmp_path / name), Eval())
    assert caught.value.kind == "invalid_usage"
    assert name in caught.value.message
    assert hint in str(caught.value.hint)


def test_recipe_resolves_the_path_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "mine.csv")
    monkeypatch.chdir(tmp_path)
    recipe = small_recipe('eval.bench=["sort12", "mine.csv"]')
    assert recipe.eval.bench == ["sort12", str(tmp_path / "mine.csv")]


def test_directory_is_searched_for_each_format(tmp_path: Path) -> None:
    write(tmp_path / "aime24.parquet")
    assert benchmark_file("aime24", tmp_path) == tmp_path / "aime24.parquet"
    assert benchmark_file("aime24", tmp_path / "any.csv") == tmp_path / "any.csv"


# ── Data sets of the hub ─────────────────────────────────────────────────────────────────────────────────────────────

HUB_NAMES = {
    "hub:openai/gsm8k:main": (("openai/gsm8k", "main", None), "openai-gsm8k-main"),
    "hub:a/b": (("a/b", None, None), "a-b"),
    "hub:math-ai/amc23@80815d37": (("math-ai/amc23", None, "80815d37"), "math-ai-amc23"),
    "hub:cais/mmlu_v1.0:en-US@refs/pr/1": (("cais/mmlu_v1.0", "en-US", "refs/pr/1"), "cais-mmlu_v1-0-en-US"),
    "hub:squad": (("squad", None, None), "squad"),
    "hub:a/rows.jsonl": (("a/rows.jsonl", None, None), "a-rows-jsonl"),  # not a file
}


@pytest.mark.parametrize("name", HUB_NAMES)
def test_data_set_of_the_hub_is_a_benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: object, **kwargs: object) -> datasets.Dataset:
        asked.append((args, kwargs))
        row = {"nr": 7, "frage": [{"role": "user", "content": "1+1?"}], "gold": {"text": "2"}}
        return datasets.Dataset.from_list([row])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    columns = {"id_column": "nr", "problem_column": "frage", "answer_column": "gold.text"}
    benchmark = find_benchmark(name, Eval(split="validation", grader="text", **columns))
    (problem,) = benchmark.problems(None, None)
    (source, subset, revision), directory = HUB_NAMES[name]
    assert (problem.id, problem.text, problem.answer) == ("7", "1+1?", "2")
    assert asked == [((source, subset), {"data_files": None, "split": "validation", "revision": revision})]
    assert (benchmark.name, benchmark.grader.name, benchmark.source.is_local) == (directory, "text", False)
    assert benchmark.selection == {"source": name, "split": "validation"}
    assert small_recipe(f'eval.bench=["{name}"]').eval.bench == [name]


@pytest.mark.parametrize("name", ["hub:", "hub:a b", "hub:a/b/c", "hub:a/b:", "hub:a/b:c:d", "hub:a/b@", "a/b"])
def test_malformed_name_of_the_hub_is_unknown(name: str) -> None:
    with pytest.raises(OpdctlError, match=f"unknown benchmark `{name}`"):
        small_recipe(f'eval.bench=["{name}"]')


def test_unavailable_data_set_can_be_given_as_a_file(tmp_path: Path) -> None:
    benchmark = find_benchmark("hub:openai/gsm8k:main", Eval())
    with pytest.raises(OpdctlError) as caught:
        benchmark.problems(None, None)
    assert caught.value.kind == "failed_download"
    assert "--bench openai-gsm8k-main: `openai/gsm8k`" in caught.value.message
    assert "--data FILE_OR_DIR, such as openai-gsm8k-main.jsonl" in str(caught.value.hint)
    (tmp_path / "openai-gsm8k-main.jsonl").write_text('{"question": "1+1?", "answer": "It is two.\\n#### 2"}\n')
    (problem,) = benchmark.problems(None, tmp_path)
    assert (problem.id, problem.text, problem.answer) == ("0", "1+1?", "2")


def test_selection_of_a_benchmark_is_in_its_own_fingerprint_only() -> None:
    fingerprints = [fingerprint_settings(small_recipe(f"eval.split={split}"), "eval") for split in ("test", "train")]
    assert fingerprints[0] == fingerprints[1]
    assert find_benchmark("aime24", Eval(split="train")).selection == {}

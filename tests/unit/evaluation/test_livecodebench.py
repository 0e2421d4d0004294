"""LiveCodeBench: its problems, their tests, and the comparison. acceptance/test_livecodebench.py runs programs."""

import json
import time
import weakref
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.commands import small_recipe
from helpers.livecodebench import ADD, SCALE, encode_private, question, write_questions

from opdctl.errors import OpdctlError
from opdctl.evaluation import livecodebench
from opdctl.evaluation.benchmarks import Benchmark, find_benchmark
from opdctl.evaluation.livecodebench import (
    NEW_PROBLEMS,
    ProblemTests,
    Programs,
    Questions,
    accepts_output,
    accepts_value,
    extract_program,
)
from opdctl.recipe.dependencies import fingerprint_settings
from opdctl.recipe.schema import Eval


def benchmark(**settings: Any) -> Benchmark:
    return find_benchmark("livecodebench", Eval(**settings))


# ── Problems ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_prompts_are_those_of_livecodebench_for_chat_models(tmp_path: Path) -> None:
    program, function = benchmark().problems(None, write_questions(tmp_path / "test6.jsonl"))
    (system,) = program.earlier
    assert system.role == "system"
    assert system.text.startswith("You are an expert Python programmer. You will be given a question (problem spec")
    assert system.text.endswith("passes all tests. You will NOT return anything except for the program.")
    assert program.text == (
        "### Question:\nSolve add.\n\n### Format: Read the inputs from stdin solve the problem and write the answer to "
        "stdout (do not directly test on the sample inputs). Enclose your code within delimiters as follows.\n"
        "```python\n# YOUR CODE HERE\n```\n\n### Answer: (use the provided format with backticks)\n\n"
    )
    assert function.text == (
        "### Question:\nSolve scale.\n\n### Format: You will use the following starter code to write the solution to "
        f"the problem and enclose your code within delimiters.\n```python\n{SCALE['starter_code']}\n```\n\n"
        "### Answer: (use the provided format with backticks)\n\n"
    )
    assert benchmark().prompt_suffix(Eval()) == ""


def test_gold_answer_is_a_small_reference_to_the_tests(tmp_path: Path) -> None:
    large = question("large", [("1", "1")], [(str(n), "x" * 1000) for n in range(1000)])
    changed = large | {"private_test_cases": question("", [], [("1", "2")])["private_test_cases"]}
    golds = [
        benchmark().problems(None, write_questions(tmp_path / "rows.jsonl", [row]))[0].answer or ""
        for row in (large, large, changed)
    ]
    assert len(golds[0]) < 150
    assert golds[0] == golds[1] != golds[2]
    assert json.loads(golds[0])["question_id"] == "large"


def test_dates_select_problems_inclusively(tmp_path: Path) -> None:
    dates = ("2025-01-31T00:00:00", "2025-02-01T00:00:00", "2025-03-01T12:00:00", "2025-03-02")
    rows = [question(str(n), [("1", "1")], [], contest_date=each) for n, each in enumerate(dates)]
    path = write_questions(tmp_path / "rows.jsonl", rows)

    def ids(**settings: str) -> str:
        return "".join(problem.id for problem in benchmark(**settings).problems(None, path))

    assert ids() == "0123"
    assert ids(start_date="2025-02-01") == "123"
    assert ids(end_date="2025-03-01") == "012"
    assert ids(start_date="2025-02-01", end_date="2025-03-01") == "12"
    with pytest.raises(OpdctlError, match="no problems"):
        ids(start_date="2026-01-01")
    table = pa.Table.from_pylist([row | {"contest_date": None} for row in rows])
    stamps = pa.array(["2025-01-31", "2025-02-01", "2025-03-01", "2025-03-02"]).cast(pa.timestamp("s"))
    pq.write_table(
        table.set_column(table.schema.get_field_index("contest_date"), "contest_date", stamps),
        tmp_path / "rows.parquet",
    )
    path = tmp_path / "rows.parquet"
    assert ids(start_date="2025-02-01", end_date="2025-03-01") == "12"


@pytest.mark.parametrize(
    ("release", "names"),
    [
        ("release_v1", ["test.jsonl"]),
        ("release_v3", ["test.jsonl", "test2.jsonl", "test3.jsonl"]),
        ("v1", ["test.jsonl"]),
        ("v3", ["test3.jsonl"]),
    ],
)
def test_release_is_read_from_a_copy_of_the_data_set(tmp_path: Path, release: str, names: list[str]) -> None:
    for number in range(1, 5):
        write_questions(tmp_path / f"test{number if number > 1 else ''}.jsonl", [ADD | {"question_id": str(number)}])
    source = benchmark(release_version=release)
    ids = [problem.id for problem in source.problems(None, tmp_path)]
    assert ids == [name.removeprefix("test").removesuffix(".jsonl") or "1" for name in names]
    assert [path.name for path in source.source.files] == names  # type: ignore[attr-defined]
    (tmp_path / names[-1]).unlink()
    with pytest.raises(OpdctlError, match=f"no {release}/test-\\*.parquet and no {names[-1]}"):
        benchmark(release_version=release).problems(None, tmp_path)


def test_release_comes_from_the_hub_at_the_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def snapshot_download(*args: object, **options: object) -> str:
        asked.append((args, options))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(OpdctlError, match=r"no v6/test-\*\.parquet"):  # of another release in the cache
        benchmark(release_version="v6").problems(None, None)
    (tmp_path / "v6").mkdir()
    for number, row in enumerate([ADD, SCALE]):
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / "v6" / f"test-{number:05d}-of-00002.parquet")
    assert [problem.id for problem in benchmark(release_version="v6").problems(None, None)] == ["add", "scale"]
    assert asked[0] == (
        ("livecodebench/code_generation_lite",),
        {
            "repo_type": "dataset",
            "revision": "48d36ed304dca42cf8ab20e941262ccd096518a3",
            "allow_patterns": "v6/test-*.parquet",
        },
    )


def test_unavailable_hub_is_reported_with_both_solutions() -> None:
    with pytest.raises(OpdctlError) as caught:
        benchmark().problems(None, None)
    assert caught.value.kind == "failed_download"
    assert "--data FILE_OR_DIR, such as test6.jsonl" in str(caught.value.hint)


def test_sizes_are_those_that_livecodebench_states() -> None:
    stated = {"release_v1": 400, "release_v2": 511, "release_v3": 612, "release_v4": 713, "release_v5": 880}
    stated |= {"release_v6": 1055, "v5": 167, "v6": 175}
    assert {release: benchmark(release_version=release).size for release in stated} == stated
    assert benchmark(start_date="2025-02-01").size is None
    assert len(NEW_PROBLEMS) == 6


def test_release_and_dates_are_settings_of_this_benchmark_alone() -> None:
    overrides = ('eval.release_version="v6"', "eval.start_date=2025-02-01", 'eval.end_date="2025-05-31"')
    plain, chosen = small_recipe(), small_recipe(*overrides)
    assert fingerprint_settings(plain, "eval") == fingerprint_settings(chosen, "eval")
    assert all(find_benchmark(name, chosen.eval).selection == {} for name in ("aime24", "humaneval_plus"))
    selected = find_benchmark("livecodebench", chosen.eval)
    wanted = {"release_version": "v6", "start_date": "2025-02-01", "end_date": "2025-05-31"}
    assert selected.selection == wanted
    assert (selected.grader.name, selected.grader.rules) == (
        "livecodebench",
        {"grader_version": 1, "time_limit_seconds": 6},
    )


@pytest.mark.parametrize("value", ['"2025-02-30"', '"May"', "7", "true"])
def test_date_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(OpdctlError, match=r"eval\.start_date: "):
        small_recipe(f"eval.start_date={value}")


# ── Tests ────────────────────────────────────────────────────────────────────────────────────────────────────────────


BAD_OUTPUT = encode_private('[{"input": "1", "output": "no JSON"}]')


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"question_content": None}, r"rows\.jsonl: row 1: no `question_content`"),
        ({"private_test_cases": "*"}, "the tests cannot be read: "),
        ({"private_test_cases": "YWI="}, "the tests cannot be read: .*header check"),
        ({"private_test_cases": encode_private(["ab"])}, "not a pickle of a text"),
        ({"private_test_cases": encode_private("ab")}, "the tests cannot be read: "),
        ({"private_test_cases": encode_private("[" * 200)}, "the tests cannot be read: "),
        ({"private_test_cases": encode_private('[{"input": "1"}]')}, "the tests cannot be read: no 'output'"),
        ({"private_test_cases": encode_private('[{"input": 1, "output": "2"}]')}, "the tests cannot be read: "),
        ({"public_test_cases": "[]", "private_test_cases": "[]"}, "no tests"),
        ({"metadata": "[]"}, "the tests cannot be read: "),
        ({"metadata": '{"func_name": "f"}', "private_test_cases": BAD_OUTPUT}, "the tests cannot be read: "),
        ({"contest_date": "May"}, "`contest_date` must be a date such as 2025-02-01, got 'May'"),
    ],
)
def test_row_in_another_form_is_refused(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    path = write_questions(tmp_path / "rows.jsonl", [ADD | columns])
    with pytest.raises(OpdctlError, match=message) as caught:
        benchmark().problems(None, path)
    assert caught.value.kind == "invalid_data"
    assert "row 1" in caught.value.message


def test_tests_beyond_the_bound_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(livecodebench, "MAX_TESTS_BYTES", 1000)
    path = write_questions(tmp_path / "rows.jsonl", [question("a", [], [("x" * 2**20, "y")])])
    with pytest.raises(OpdctlError, match="inflates to more than 1000 bytes"):
        benchmark().problems(None, path)


def test_private_tests_may_be_plain_json(tmp_path: Path) -> None:
    plain = ADD | {"private_test_cases": json.dumps([{"input": "5 7\n", "output": "12", "testtype": "stdin"}])}
    read = []
    for row in (ADD, plain):
        questions = Questions("v6")
        [*questions.problems("livecodebench", None, write_questions(tmp_path / "rows.jsonl", [row]))]
        read += [tests for _, tests in questions.tests({"add": [0]})]
    assert read[0] == read[1] == ProblemTests(None, ["1 2", "5 7\n"], ["3\n", "12"])


def test_tests_of_few_problems_are_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight problems with four responses each and two workers: at most two, and the one that waits."""
    rows = [question(str(n), [("1", "1")], []) for n in range(8)]
    problems = (source := benchmark()).problems(None, write_questions(tmp_path / "rows.jsonl", rows))
    held: list[weakref.ref[ProblemTests]] = []
    most, read = 0, livecodebench._read_tests

    def read_tests(row: Any, location: str) -> ProblemTests:
        nonlocal most
        tests = read(row, location)
        held.append(weakref.ref(tests))
        most = max(most, sum(each() is not None for each in held))
        return tests

    monkeypatch.setattr(livecodebench, "_read_tests", read_tests)
    monkeypatch.setattr(livecodebench, "_check_sandbox", lambda: None)
    monkeypatch.setattr(livecodebench, "_grade", lambda name, tests, response: time.sleep(0.01) or (name, response))
    monkeypatch.setattr("os.sched_getaffinity", lambda process: {0, 1})
    pairs = [(problem.answer or "", f"{problem.id}/{n}") for problem in problems for n in range(4)]
    graded = source.grader.grade(pairs)
    assert [response for _, response in graded] == [response for _, response in pairs]  # type: ignore[misc]
    assert most <= 4


def test_tests_that_are_gone_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(livecodebench, "_check_sandbox", lambda: None)
    source = benchmark()
    problems = source.problems(None, path := write_questions(tmp_path / "rows.jsonl"))
    write_questions(path, [ADD])
    with pytest.raises(OpdctlError, match="the tests of problem `scale` are gone"):
        source.grader.grade([(problem.answer or "", "no code") for problem in problems])


# ── Comparison ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ("```python\na\n```", "a"),
        ("```\na\n```\nor\n```python\nb\nc\n```\nDone.", "b\nc"),
        ("<think>```\na\n```</think>```\nb\n```", "b"),
        ("```python\na\n```\nand ```", ""),  # as there: the last two lines with backticks
        ("```python\na", ""),
        ("a", ""),
        ("", ""),
    ],
)
def test_code_is_that_of_the_last_block(response: str, code: str) -> None:
    assert extract_program(response) == code


@pytest.mark.parametrize(
    ("found", "expected", "correct"),
    [
        ("3\n", "3", True),
        ("  3  \n\n", "3\n", True),
        ("3.0", "3", True),
        ("1 2.50\nYes", "1 2.5\nYes", True),
        ("1  2", "1 2", True),
        ("yes", "Yes", False),
        ("a  b", "a b", False),  # no numbers
        ("1\n2", "1 2", False),
        ("1\n\n2", "1\n2", False),
        ("0.1", "0.10000001", False),
        ("50000000000000000", "50000000000000001", False),
        ("1e3", "1000", True),
        ("1e999999999", "1", False),
        ("nan", "nan ", True),
        ("nan 1", "nan  1", False),  # NaN equals no number
        ("sNaN 1", "1 sNaN", False),
        ("1 2", "1", False),
        ("", "", True),
        ("", "1", False),
    ],
)
def test_output_is_compared_by_lines_and_numbers(found: str, expected: str, correct: bool) -> None:
    assert accepts_output(found, expected) == correct


@pytest.mark.parametrize(
    ("found", "expected", "correct"),
    [
        ([1, 2], "[1, 2]", True),
        ((1, 2), "[1, 2]", True),
        ([(1, 2)], "[[1, 2]]", False),  # as there
        (1.0, "1", True),
        (True, "true", True),
        (None, "null", True),
        ("a", '"a"', True),
        (0.1 + 0.2, "0.3", False),  # as there
        ({1, 2}, "[1, 2]", False),
    ],
)
def test_value_is_compared_exactly(found: Any, expected: str, correct: bool) -> None:
    assert accepts_value(found, expected) == correct


def test_programs_have_no_votes() -> None:
    grader = Programs(Questions("v6"))
    assert grader.are_parsable(["a", "b"]) == [True, True]
    assert grader.votes([("a", [])]) == [[]]
    assert (grader.runs_code, grader.package) == (True, None)

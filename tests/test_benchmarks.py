"""Benchmarks: the registry, golds in the shapes that data sets give them, files of one's own, a hub out of reach."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.commands import ROOT, small_recipe

from opdctl.data.toy import TASKS
from opdctl.data.toy.task import split_of
from opdctl.errors import ExitCode, OpdctlError
from opdctl.evaluation import benchmarks
from opdctl.evaluation.benchmarks import Benchmark, Hub, find, gold
from opdctl.recipe.schema import Eval
from opdctl.registry import BENCHMARKS

DATA = ROOT.parent / "shared" / "benchmarks"
SIZES = {"aime24": 30, "aime25": 30, "hmmt25_feb": 30, "hmmt25_nov": 30, "math500": 500, "gsm8k": 1319}


def registered(name: str) -> Benchmark:
    return find(name, Eval())


# ── The registry ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_benchmark_is_declared_whole() -> None:
    wanted = {*TASKS, "amc23", "minerva", "olympiadbench", "humaneval_plus", "mbpp_plus", *SIZES}
    assert set(BENCHMARKS.names()) == wanted
    for name in BENCHMARKS.names():
        benchmark = registered(name)
        assert benchmark.name == name
        assert benchmark.samples == (
            1 if name in TASKS else 32 if name[:4] in ("aime", "hmmt", "amc2") else 4
        )  # AIME and HMMT as in the paper
        if isinstance(benchmark.source, Hub):
            assert len(benchmark.source.revision) == 40
            assert not benchmark.source.local
            int(benchmark.source.revision, 16)
        else:
            assert benchmark.answer_format == ("any" if name in TASKS else "code")


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no benchmark files in {DATA.parent.name}/{DATA.name}")
@pytest.mark.parametrize("name", SIZES)
def test_local_data_stand_in_for_the_hub_s(name: str) -> None:
    problems = registered(name).problems(None, DATA)
    assert len(problems) == SIZES[name]
    assert registered(name).problems(7, DATA) == problems[:7]
    assert all(problem.text and problem.answer for problem in problems)


def test_without_data_and_without_a_hub_both_ways_are_told() -> None:
    with pytest.raises(OpdctlError) as caught:
        registered("aime25").problems(None, None)
    assert caught.value.code == ExitCode.UNAVAILABLE
    assert "--bench aime25: `MathArena/aime_2025`" in caught.value.message
    assert "--data FILE_OR_DIR, such as aime25.jsonl" in str(caught.value.hint)
    assert "where there is a network" in str(caught.value.hint)


def test_the_hub_is_asked_for_the_pinned_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(*args: object, **kwargs: object) -> list[dict[str, object]]:
        asked.append((args, kwargs))
        return [{"question": "1+1?", "answer": "It is two.\n#### 2"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (problem,) = registered("gsm8k").problems(None, None)
    assert (problem.id, problem.text, problem.answer) == ("0", "1+1?", "2")
    assert asked == [
        (("openai/gsm8k", "main"), {"split": "test", "revision": "740312add88f781978c0658806c59bc2815b9866"})
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
def test_a_gold_answer_is_read_from_whatever_shape_a_data_set_gives_it(cell: object, text: str) -> None:
    assert gold(cell) == text


def test_the_embedded_benchmark_is_held_out_and_has_no_end() -> None:
    problems = registered("sort12").problems(10, None)
    assert {split_of(problem.text[:-1]) for problem in problems} == {"test"}
    assert len(registered("sort12").problems(None, None)) == 256
    assert len(registered("sort12").problems(300, None)) == 300


# ── Data by hand ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_and_the_folder_it_lies_in_give_the_same_problems(tmp_path: Path) -> None:
    (tmp_path / "aime24.jsonl").write_text(
        '{"id": "a", "problem": "1+1?", "answer": 2}\n{"problem_idx": 9, "question": "?", "answer": "3"}\n'
    )
    problems = registered("aime24").problems(None, tmp_path)
    assert [(p.id, p.text, p.answer) for p in problems] == [("a", "1+1?", "2"), ("9", "?", "3")]
    assert registered("aime24").problems(None, tmp_path / "aime24.jsonl") == problems
    assert registered("aime24").problems(1, tmp_path) == problems[:1]


def test_a_folder_without_the_benchmark_s_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(OpdctlError, match=r"holds no aime24\.jsonl or aime24\.parquet or aime24\.csv"):
        registered("aime24").problems(None, tmp_path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "holds no problems"),
        ('{"problem": "1+1?", "anser": "2"}\n', "it has problem, anser"),
        ('{"problem": "1+1?", "answer": null}\n', "answer"),
        ("1\n", "must be a JSON object"),
        ('{"id": 1, "problem": "a", "answer": "2"}\n{"id": 1, "problem": "b", "answer": "3"}\n', "1"),
    ],
)
def test_bad_benchmark_data_are_refused(tmp_path: Path, content: str, told: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(content)
    with pytest.raises(OpdctlError) as caught:
        registered("aime24").problems(None, path)
    assert caught.value.code == ExitCode.BAD_DATA
    assert told in caught.value.message
    assert "mine.jsonl" in caught.value.message


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
def test_a_file_of_one_s_own_is_a_benchmark_by_its_columns(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"mine{suffix}"
    write(path)
    columns = Eval(id_column="nr", problem_column="frage", answer_column="lösung", grader="text")
    benchmark = find(str(path), columns)
    assert [(p.id, p.text, p.answer) for p in benchmark.problems(None, None)] == [tuple(row.values()) for row in ROWS]
    assert (benchmark.name, benchmark.answer_format, benchmark.source.local) == ("mine", "box", True)
    assert benchmark.grader.grade([("2", r"\boxed{2}"), ("2", r"\boxed{02}")])[1].correct is False
    assert find(str(path), Eval()).grader.grade([("2", r"\boxed{02}")])[0].correct is True
    with pytest.raises(OpdctlError, match="has none of the columns problem, question, prompt; it has nr, frage"):
        find(str(path), Eval()).problems(None, None)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("problem,answer\n1+1?\n", r"mine\.csv:2: has not 2 cells"),
        ("problem,answer\n1+1?,2,3\n", r"mine\.csv:2: has not 2 cells"),
        ('problem,answer\n"1+1?,2\n', r"mine\.csv:\d+: "),
        ("problem,answer\n", "holds no problems"),
        ("", "holds no problems"),
    ],
)
def test_a_csv_that_is_none_is_refused_with_its_line(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(text)
    with pytest.raises(OpdctlError, match=told) as caught:
        find(str(path), Eval()).problems(None, None)
    assert caught.value.code == ExitCode.BAD_DATA


def test_a_csv_that_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_bytes("problem,answer\nüber?,2\n".encode("latin-1"))
    with pytest.raises(OpdctlError, match=r"mine\.csv:\d+: .*utf-8"):
        find(str(path), Eval()).problems(None, None)


def test_a_file_cannot_take_a_benchmark_s_name_or_one_that_is_no_folder_s(tmp_path: Path) -> None:
    with pytest.raises(OpdctlError, match="another benchmark's name") as caught:
        find(str(tmp_path / "aime25.jsonl"), Eval())
    assert "--bench aime25 --data" in str(caught.value.hint)
    with pytest.raises(OpdctlError, match="must be letters"):
        find(str(tmp_path / "..jsonl"), Eval())


def test_a_recipe_s_own_file_is_found_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "mine.csv")
    monkeypatch.chdir(tmp_path)
    recipe = small_recipe('eval.bench=["sort12", "mine.csv"]')
    assert recipe.eval.bench == ["sort12", str(tmp_path / "mine.csv")]


def test_a_folder_s_file_is_sought_in_each_format(tmp_path: Path) -> None:
    write(tmp_path / "aime24.parquet")
    assert benchmarks.file_of("aime24", tmp_path) == tmp_path / "aime24.parquet"
    assert benchmarks.file_of("aime24", tmp_path / "any.csv") == tmp_path / "any.csv"

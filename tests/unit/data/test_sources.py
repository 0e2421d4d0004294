"""Sources of prompts: several files, patterns, folders with splits, folders saved by `datasets`, and mixtures."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opdctl.data.prompts import Problem, load_problems, split_held_out
from opdctl.data.sources import find_files
from opdctl.errors import OpdctlError
from opdctl.recipe.prompts import Prompts


def write(path: Path, texts: str, **columns: Any) -> Path:
    """Write a row for each character of `texts`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"prompt": text, **columns}) + "\n" for text in texts)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return path


def read(**settings: Any) -> str:
    return "".join(problem.text for problem in load_problems(Prompts.model_validate(settings)))


def refusal(**settings: Any) -> OpdctlError:
    with pytest.raises(OpdctlError) as caught:
        load_problems(Prompts.model_validate(settings))
    return caught.value


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "data/train-2.jsonl", "cd")
    write(tmp_path / "data/train-1.jsonl.gz", "ab")
    write(tmp_path / "data/test.jsonl", "xy")
    (tmp_path / "data/README.md").write_text("A data set.")
    write(tmp_path / "data/.cache/train-3.jsonl", "z")
    return tmp_path


# ── Files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_forms_of_local_sources(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = folder / "data"
    assert read(source=str(data)) == "abcd"  # files by name, those of the split
    assert read(source=str(data), split="test") == "xy"
    assert read(source=str(folder)) == "abcd"
    assert read(source=str(data / "*-?.jsonl*")) == "abcd"
    assert read(source=str(folder / "**/*.jsonl")) == "xycd"
    assert read(source=[str(data / "test.jsonl"), str(data / "train-*.jsonl")]) == "xycd"
    assert read(source=[str(data)], limit=3) == "abc"
    monkeypatch.setenv("HOME", str(folder))
    assert read(source="~/data/test.jsonl") == "xy"
    assert read(source="~/data/te*") == "xy"


def test_folder_without_splits_is_read_whole(tmp_path: Path) -> None:
    write(tmp_path / "b.jsonl", "c")
    write(tmp_path / "a/later.jsonl", "ab")
    assert read(source=str(tmp_path)) == "abc"
    assert read(source=str(tmp_path), split="test") == "abc"


def test_names_of_folders_tell_splits(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        write(tmp_path / split / "part-0.jsonl", split[0])
    assert [read(source=str(tmp_path), split=split) for split in ("train", "validation", "test")] == ["t", "v", "t"]
    error = refusal(source=str(tmp_path), split="tset")
    assert error.kind == "unsupported_setting"
    assert "did you mean `test`?" in error.message


def test_ids_and_locations_of_several_files(folder: Path) -> None:
    problems = load_problems(Prompts(source=[str(folder / "data")]))
    assert [problem.id for problem in problems] == ["0", "1", "2", "3"]
    assert [problem.location for problem in problems][2:] == [
        f"{folder}/data/train-2.jsonl: row 1",
        f"{folder}/data/train-2.jsonl: row 2",
    ]
    write(folder / "data/train-9.jsonl", "ef", prompt=None)
    assert f"{folder}/data/train-9.jsonl: row 1: `prompt` is null" in refusal(source=str(folder / "data")).message


@pytest.mark.parametrize(
    ("source", "kind", "words"),
    [
        ("none-*.jsonl", "missing_file", "no file matches"),
        ("empty", "missing_file", "no file that ends in .jsonl"),
        (["data/test.jsonl", "owner/name"], "missing_file", "owner/name is no local file or folder"),
        (["data/test.jsonl", "none.jsonl"], "missing_file", "none.jsonl"),
        ("data/README.md", "unsupported_setting", "the name must end in"),
    ],
)
def test_source_that_is_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch, source: Any, kind: str, words: str):
    monkeypatch.chdir(folder)
    (folder / "empty").mkdir()
    error = refusal(source=source)
    assert error.kind == kind
    assert words in error.message


def test_found_files_are_those_that_are_read(folder: Path) -> None:
    files = find_files(Prompts(source=str(folder / "data")), "prompts")
    assert [file.name for file in files] == ["train-1.jsonl.gz", "train-2.jsonl"]
    assert find_files(Prompts(source="owner/name"), "prompts") == []
    assert find_files(Prompts(source="toy:sort12", limit=1), "prompts") == []


# ── Data sets ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_folder_saved_by_datasets(tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"prompt": text, "score": 0.1} for text in "abc"])
    rows = rows.cast_column("score", datasets.Value("float32"))
    rows.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": rows, "test": rows.select([2])}).save_to_disk(tmp_path / "two")
    assert read(source=str(tmp_path / "one")) == "abc"
    assert read(source=str(tmp_path / "two")) == "abc"
    assert read(source=str(tmp_path / "two"), split="test") == "c"
    assert read(source=[str(tmp_path / "one"), str(tmp_path / "two")], limit=4) == "abca"
    answers = load_problems(Prompts(source=str(tmp_path / "one"), answer_column="score"))
    assert [problem.answer for problem in answers] == ["0.1"] * 3  # as written, not the nearest float64
    assert {file.suffix for file in find_files(Prompts(source=str(tmp_path / "one")), "prompts")} == {".arrow"}
    assert "did you mean `test`?" in refusal(source=str(tmp_path / "two"), split="tests").message
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"broken")
    assert refusal(source=str(tmp_path / "one")).kind == "invalid_data"


def test_subset_of_a_hub_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*args: object, **kwargs: object) -> datasets.Dataset:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([{"question": "1+1?"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read(source="openai/gsm8k", subset="main", split="test", prompt_column="question") == "1+1?"
    assert asked == [(("openai/gsm8k", "main"), {"data_files": None, "split": "test", "revision": None})]


def test_data_set_with_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set of scripts, as the hub had them: its code does not run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/theirs.py").write_text("open('ran', 'w')\n")
    assert refusal(source="theirs").kind == "missing_file"
    shutil.rmtree(tmp_path / "theirs")
    assert not (tmp_path / "ran").exists()


# ── Order and selection ──────────────────────────────────────────────────────────────────────────────────────────────


def test_shuffle_is_before_limit_and_by_its_seed(tmp_path: Path) -> None:
    letters = "abcdefghijklmnopqrst"
    source = {"source": str(write(tmp_path / "p.jsonl", letters))}
    shuffled = read(**source, shuffle_seed=1)
    assert sorted(shuffled) == sorted(letters)
    assert shuffled != letters
    assert read(**source, shuffle_seed=1, limit=5) == shuffled[:5]
    assert read(**source, shuffle_seed=2) != shuffled
    ids = [problem.id for problem in load_problems(Prompts(**source, shuffle_seed=1))]
    assert ids == [str(letters.index(letter)) for letter in shuffled]  # a row keeps its id


@given(st.floats(0, 0.99), st.lists(st.text(max_size=3), min_size=1, max_size=30))
def test_held_out_share_depends_on_the_text_alone(share: float, texts: list[str]) -> None:
    problems = [Problem(str(number), text, None) for number, text in enumerate(texts)]
    training, held_out = split_held_out(problems, share)
    assert sorted([*training, *held_out], key=lambda problem: int(problem.id)) == problems
    assert not {problem.text for problem in training} & {problem.text for problem in held_out}
    again, _ = split_held_out(problems[::-1], share)
    assert again[::-1] == training
    more, _ = split_held_out(problems, share / 2)
    assert set(map(id, training)) <= set(map(id, more))


def test_held_out_share_is_about_the_given_one() -> None:
    problems = [Problem(str(number), f"What is {number}?", None) for number in range(10_000)]
    assert len(split_held_out(problems, 0.0)[1]) == 0
    assert 900 < len(split_held_out(problems, 0.1)[1]) < 1100  # 3.3 standard deviations


# ── Mixtures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_sources_have_the_keys_of_the_section_around_them(tmp_path: Path) -> None:
    math = write(tmp_path / "math.jsonl", "abc", level=6)
    code = tmp_path / "code.jsonl"
    code.write_text(json.dumps({"task": "d", "level": 9}) + "\n" + json.dumps({"task": "e", "level": 1}) + "\n")
    settings = {
        "suffix": "!",
        "where": {"level": ">= 5"},
        "sources": {
            "math": {"source": str(math), "limit": 2, "teacher": "m"},
            "code": {"source": str(code), "prompt_column": "task", "suffix": "?", "teacher": "c"},
        },
    }
    problems = load_problems(Prompts.model_validate(settings))
    assert [(p.id, p.text, p.teacher) for p in problems] == [
        ("math/0", "a!", "m"),
        ("math/1", "b!", "m"),
        ("code/0", "d?", "c"),
    ]


def test_options_of_a_source_are_not_those_of_another() -> None:
    common = {"source": "owner/a", "revision": "1", "data_files": "x.parquet", "subset": "s", "suffix": "!"}
    sources = {"same": {"data_files": "y.parquet"}, "other": {"source": "owner/b"}}
    prompts = Prompts.model_validate({**common, "sources": sources})
    same, other = prompts.sources["same"], prompts.sources["other"]
    assert (same.source, same.revision, same.data_files, same.subset, same.suffix) == (
        "owner/a",
        "1",
        "y.parquet",
        "s",
        "!",
    )
    assert (other.source, other.revision, other.data_files, other.subset, other.suffix) == (
        "owner/b",
        None,
        None,
        None,
        "!",
    )
    assert Prompts.model_validate(prompts.model_dump(exclude_none=True)) == prompts  # as a run records it


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(1, 2000))
def test_a_step_is_split_by_the_weights(weights: list[float], per_step: int) -> None:
    sources = {str(number): {"weight": weight} for number, weight in enumerate(weights)}
    shares = Prompts.model_validate({"source": "a.jsonl", "sources": sources}).split_step(per_step)
    assert sum(shares.values()) == per_step
    for number, weight in enumerate(weights):
        assert abs(shares[str(number)] - per_step * weight / sum(weights)) < 1
